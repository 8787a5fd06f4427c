"""The paper's equations a second time: float64 NumPy, one position at a time, slow and obvious.

Written from the paper and from the decisions in docs/equations.md, not from the package, which is tested against it.
Arrays are laid out as there: images B, foreground classes C, labels K = C + 1 with background first, grid h x w.
"""

import math

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

IGNORE = 255


def tolerance(*scores: Array) -> float:
    """How far a loss in float32 may lie from its reference: 1e-5 where scores are at most 10 in size.

    Beyond, a millionth of the largest score: such a loss is a difference of scores, each known to 6e-8 of its size.
    """
    return 1e-6 * max(10.0, *(float(np.abs(array).max(initial=0)) for array in scores))


# --- the network (Sec. 3.1-3.2) ---------------------------------------------------------------------------


def class_logits(features: Array, weight: Array) -> Array:
    """Z = GMP(F) Wᵀ (Sec. 3.1): F (B, D, h, w), W (C, D); the maximum of each channel comes before the weight."""
    result = np.zeros((len(features), len(weight)))
    for image, c in np.ndindex(result.shape):
        for d in range(features.shape[1]):
            result[image, c] += features[image, d].max() * weight[c, d]
    return result


def activation_maps(features: Array, weight: Array) -> Array:
    """M = F Wᵀ (Sec. 3.1): the same weight at every token."""
    batch, _, height, width = features.shape
    result = np.zeros((batch, len(weight), height, width))
    for image, c, y, x in np.ndindex(result.shape):
        result[image, c, y, x] = sum(f * w for f, w in zip(features[image, :, y, x], weight[c], strict=True))
    return result


def dilated_convolution(maps: Array, weight: Array, dilation: int) -> Array:
    """A 3x3 convolution without bias over maps (D, h, w) in a frame of zeros."""
    result = np.zeros((len(weight), *maps.shape[1:]))
    for out, y, x in np.ndindex(result.shape):
        for channel, dy, dx in np.ndindex(*weight.shape[1:]):
            row, column = y + (dy - 1) * dilation, x + (dx - 1) * dilation
            if 0 <= row < maps.shape[1] and 0 <= column < maps.shape[2]:
                result[out, y, x] += weight[out, channel, dy, dx] * maps[channel, row, column]
    return result


def large_fov(features: Array, conv6: Array, conv7: Array, conv8: Array, dilation: int) -> Array:
    """S = LargeFOV(F) (Sec. 3.1, 4.1): two dilated 3x3 convolutions with ReLU, then a 1x1 convolution."""
    hidden = [np.maximum(dilated_convolution(image, conv6, dilation), 0) for image in features]
    hidden = [np.maximum(dilated_convolution(image, conv7, dilation), 0) for image in hidden]
    return activation_maps(np.stack(hidden), conv8[:, :, 0, 0])


def layer_norm(tokens: Array, weight: Array, bias: Array, eps: float) -> Array:
    """Token by token."""
    result = np.zeros(tokens.shape)
    for index in np.ndindex(tokens.shape[:-1]):
        token = tokens[index]
        result[index] = (token - token.mean()) / math.sqrt(token.var() + eps) * weight + bias
    return result


def attention_weights(query: Array, key: Array) -> Array:
    """softmax(q k^T / sqrt(d)) of one head, (N, N), row by row."""
    result = np.zeros((len(query), len(key)))
    for row in range(len(query)):
        scores = np.array([query[row] @ other / math.sqrt(query.shape[1]) for other in key])
        result[row] = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
    return result


def smooth_maximum(logits: Array, sharpness: float, weights: Array | None = None) -> Array:
    """log mean exp(r z) / r over the tokens (B, C, N), the mean weighted by (B, N)."""
    result = np.zeros(logits.shape[:2])
    for image, c in np.ndindex(result.shape):
        highest = logits[image, c].max()
        powers = [math.exp(sharpness * (z - highest)) for z in logits[image, c]]
        mean = np.average(powers, weights=None if weights is None else weights[image])
        result[image, c] = highest + math.log(mean) / sharpness
    return result


def mlp(features: Array, hidden: tuple[Array, Array], output: tuple[Array, Array]) -> Array:
    """Two linear layers at each token, exact GELU between: weights (out, in) and biases."""

    def gelu(x: float) -> float:
        return 0.5 * x * (1 + math.erf(x / math.sqrt(2)))

    batch, _, height, width = features.shape
    result = np.zeros((batch, len(output[1]), height, width))
    for image, y, x in np.ndindex(batch, height, width):
        inside = np.array([gelu(value) for value in hidden[0] @ features[image, :, y, x] + hidden[1]])
        result[image, :, y, x] = output[0] @ inside + output[1]
    return result


def moving_average(assignment: Array, online: Array, momentum: float) -> Array:
    """Θ' <- m Θ' + (1 - m) Θ (Sec. 3.2)."""
    return momentum * assignment + (1 - momentum) * online


# --- classification (Sec. 3.1) ----------------------------------------------------------------------------


def classification_loss(logits: Array, labels: Array) -> float:
    """Eq. 1, one image and one class at a time, then their mean."""
    terms = []
    for z, y in zip(logits.ravel(), labels.ravel(), strict=True):
        # -log sigmoid(z) = log(1 + exp(-z)), and -log(1 - sigmoid(z)) = log(1 + exp(z))
        terms.append(y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z))
    return float(np.mean(terms))


# --- pseudo-labels for the segmentation (Sec. 3.3) --------------------------------------------------------


def normalize_cams(cam_logits: Array, labels: Array, valid: Array | None = None) -> Array:
    """Confidences (Sec. 3.3): relu, absent classes to zero, min-max over the valid tokens of one image and class."""
    result = np.zeros(cam_logits.shape)
    valid = np.ones((len(cam_logits), *cam_logits.shape[2:]), bool) if valid is None else valid
    for image, c in np.ndindex(cam_logits.shape[:2]):
        inside = valid[image]
        if not labels[image, c] or not inside.any():
            continue
        cam = np.maximum(cam_logits[image, c], 0)
        low, high = cam[inside].min(), cam[inside].max()
        if high == 0:
            continue  # nothing is active
        # Where all tokens are equally active there is no extent to stretch: all are certain.
        scaled = (cam - low) / (high - low) if high > low else np.ones(cam.shape)
        result[image, c][inside] = scaled[inside]
    return result


def cam_pseudo_labels(cams: Array, threshold: float, valid: Array | None = None) -> NDArray[np.int64]:
    """CPL (Eq. 3), pixel by pixel; of classes that tie, the first."""
    ids = np.zeros((cams.shape[0], *cams.shape[2:]), np.int64)
    for image, y, x in np.ndindex(ids.shape):
        vector = cams[image, :, y, x]
        if vector.max() >= threshold:
            ids[image, y, x] = vector.argmax() + 1
        if valid is not None and not valid[image, y, x]:
            ids[image, y, x] = IGNORE
    return ids


def perplexity(confidence: Array, threshold: float, alpha: float = 0.8, beta: float = 1.0, eps: float = 1e-4) -> Array:
    """Eq. 4, value by value; the normalised distance is clamped to [eps, 1], since P is infinite at distance 0."""
    result = np.zeros(confidence.shape)
    for index in np.ndindex(confidence.shape):
        nu = confidence[index]
        if nu < threshold:
            distance = (threshold - nu) / threshold
        else:
            distance = (nu - threshold) / (1 - threshold) if threshold < 1 else 0.0
        result[index] = (-math.log(alpha * min(max(distance, eps), 1.0))) ** beta
    return result


def reliability_weights(perplexity: Array, valid: Array) -> Array:
    """RAW (Sec. 3.3), the "normalized reliability" of the text: (1/P) / mean(1/P), the mean over valid pixels."""
    result = np.zeros(perplexity.shape)
    count, total = 0, 0.0
    for index in np.ndindex(perplexity.shape):
        if valid[index]:
            count += 1
            total += 1 / perplexity[index]
    for index in np.ndindex(perplexity.shape):
        if valid[index]:
            result[index] = (1 / perplexity[index]) * count / total
    return result


def upsample(maps: Array, size: tuple[int, int]) -> Array:
    """Bilinear, corners not aligned, one target pixel at a time."""
    height, width = maps.shape[-2:]
    result = np.zeros((*maps.shape[:-2], *size))
    for y, x in np.ndindex(*size):
        source_y = max((y + 0.5) * height / size[0] - 0.5, 0)
        source_x = max((x + 0.5) * width / size[1] - 0.5, 0)
        y0, x0 = int(source_y), int(source_x)
        y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
        wy, wx = source_y - y0, source_x - x0
        result[..., y, x] = (1 - wy) * ((1 - wx) * maps[..., y0, x0] + wx * maps[..., y0, x1]) + wy * (
            (1 - wx) * maps[..., y1, x0] + wx * maps[..., y1, x1]
        )
    return result


def upsample_valid(maps: Array, tokens: Array, size: tuple[int, int]) -> tuple[Array, Array]:
    """`upsample` of each pixel's valid tokens alone, their weights made to sum to 1; and where there are any."""
    result, reached = np.zeros((*maps.shape[:2], *size)), np.zeros((len(maps), *size), bool)
    for image, y, x in np.ndindex(len(maps), *tokens.shape[1:]):
        if not tokens[image, y, x]:
            continue
        one = np.zeros(tokens.shape[1:])
        one[y, x] = 1
        share = upsample(one, size)
        reached[image] |= share > 0
        for c in range(maps.shape[1]):
            result[image, c] += share * maps[image, c, y, x]
    reached &= upsample(tokens.astype(float), size) > 1e-5  # in float32 less is rounding
    total = upsample(tokens.astype(float), size)
    result = np.where(reached[:, None], result / np.where(total > 0, total, 1)[:, None], 0)
    return result, reached


def cam2seg_loss(
    seg_logits: Array, ids: NDArray[np.int64], weights: Array | None = None, ignore: int = IGNORE
) -> float:
    """Eq. 5, pixel by pixel, averaged over the pixels that are not ignored; S is resized to them."""
    scores = upsample(seg_logits, ids.shape[1:])
    losses = []
    for image, y, x in np.ndindex(ids.shape):
        if ids[image, y, x] == ignore:
            continue
        vector = scores[image, :, y, x]
        weight = 1.0 if weights is None else weights[image, y, x]
        losses.append(weight * (np.logaddexp.reduce(vector) - vector[ids[image, y, x]]))
    return float(np.mean(losses)) if losses else 0.0


# --- the affinity of tokens (frozen encoders; not in the paper) -------------------------------------------


def feature_affinity(
    features: Array, temperature: float = 0.15, power: float | None = None, valid: Array | None = None
) -> Array:
    """(B, N, N): cosines of tokens less their image's mean, through a softmax or a power, row by row."""
    batch, channels = features.shape[:2]
    tokens = features.reshape(batch, channels, -1)
    inside = np.ones((batch, tokens.shape[2]), bool) if valid is None else valid.reshape(batch, -1)
    result = np.zeros((batch, tokens.shape[2], tokens.shape[2]))
    for image, row, column in np.ndindex(result.shape):
        known = [n for n in range(tokens.shape[2]) if inside[image, n]]
        mean = tokens[image][:, known].mean(axis=1) if known else np.zeros(channels)
        # Shorter than this, what sets a token apart is rounding.
        least = 1e-5 * max(np.linalg.norm(token) for token in tokens[image].T)
        one, other = (tokens[image][:, n] - mean for n in (row, column))
        lengths = max(np.linalg.norm(one), least) * max(np.linalg.norm(other), least)
        cosine = one @ other / lengths if lengths else 0.0
        result[image, row, column] = math.exp(cosine / temperature) if power is None else max(cosine, 0.0) ** power
    return normalize_rows(result)


def attention_affinity(attention: Array, power: float = 1.0) -> Array:
    """(B, N, N): the mean of both directions of two tokens' attention, to a power, row by row."""
    result = np.zeros(attention.shape)
    for image, row, column in np.ndindex(result.shape):
        result[image, row, column] = ((attention[image, row, column] + attention[image, column, row]) / 2) ** power
    return normalize_rows(result)


def normalize_rows(affinity: Array, valid: Array | None = None) -> Array:
    """Rows that sum to 1 over valid columns; a token that nothing is like has itself alone."""
    result = np.zeros(affinity.shape)
    for image, row in np.ndindex(affinity.shape[:2]):
        columns = [n for n in range(affinity.shape[2]) if valid is None or valid[image, n]]
        total = sum(affinity[image, row, n] for n in columns)
        for n in columns:
            result[image, row, n] = affinity[image, row, n] / total if total else 0.0
        if not total:
            result[image, row, row] = 1.0
    return result


def spread(cams: Array, affinity: Array, steps: int = 1, valid: Array | None = None) -> Array:
    """Token by token the mean over valid tokens, weighted by affinity, as often as asked; then min-max (Sec. 3.3)."""
    batch, classes, height, width = cams.shape
    valid = np.ones((batch, height, width), bool) if valid is None else valid
    rows = normalize_rows(affinity, valid.reshape(batch, -1))
    maps = cams.reshape(batch, classes, -1)
    for _ in range(steps):
        after = np.zeros(maps.shape)
        for image, c, n in np.ndindex(maps.shape):
            after[image, c, n] = sum(rows[image, n, m] * maps[image, c, m] for m in range(height * width))
        maps = after
    return normalize_cams(maps.reshape(cams.shape), np.ones((batch, classes)), valid)


# --- the dynamic threshold (Eq. 6) ------------------------------------------------------------------------


def split_likelihood(values: Array, threshold: float, weights: Array, means: Array, variances: Array) -> float:
    """What Eq. 6 maximises: mean log pi N(x), of the foreground for x >= xi and of the background for x < xi.

    Component 0 is the background. The paper adds the two products; the likelihood of all values is their product.
    """
    background, foreground = (
        math.log(weights[k]) - 0.5 * np.log(2 * np.pi * variances[k]) - (values - means[k]) ** 2 / (2 * variances[k])
        for k in range(2)
    )
    return float(np.where(values >= threshold, foreground, background).mean())


def best_split(values: Array, weights: Array, means: Array, variances: Array, candidates: int = 500) -> float:
    """xi* (Eq. 6) by trying: the most likely split among many between the two means."""
    tried = np.linspace(means[0], means[1], candidates)
    return float(max(tried, key=lambda xi: split_likelihood(values, xi, weights, means, variances)))


# --- pseudo-labels for the CAMs (Sec. 3.4) ----------------------------------------------------------------


def segmentation_pseudo_labels(seg_logits: Array, labels: Array, temperature: float = 0.01) -> Array:
    """SPL (Eq. 7), pixel by pixel: a softmax over the background and the classes of the tags."""
    result = np.zeros(seg_logits.shape)
    for image, y, x in np.ndindex(seg_logits.shape[0], *seg_logits.shape[2:]):
        present = [0] + [c + 1 for c in range(labels.shape[1]) if labels[image, c]]
        scores = seg_logits[image, present, y, x] / temperature
        exponentials = np.exp(scores - scores.max())
        result[image, present, y, x] = exponentials / exponentials.sum()
    return result


def seg2cam_loss(cam_logits: Array, segmentation: Array, valid: Array) -> float:
    """Eq. 8, class by class and position by position, averaged over both."""
    terms = []
    for image, c, y, x in np.ndindex(cam_logits.shape):
        if valid[image, y, x]:
            m, target = cam_logits[image, c, y, x], segmentation[image, c + 1, y, x]
            terms.append(target * np.logaddexp(0, -m) + (1 - target) * np.logaddexp(0, m))
    return float(np.mean(terms)) if terms else 0.0


def _separate(vectors: Array, labels: NDArray[np.int64], omega: list[int], temperature: float) -> list[float]:
    """The anchors' losses (Eq. 9-10) for the tokens (C, N) of one group."""
    # Below this length a direction means nothing.
    unit = vectors / np.maximum(np.sqrt((vectors**2).sum(axis=0)), 1e-3)
    losses = []
    for i in omega:
        positives = [j for j in omega if labels[j] == labels[i] and j != i]  # R+ of Eq. 9
        negatives = [j for j in omega if labels[j] != labels[i]]  # R- of Eq. 9
        if not positives or not negatives:
            continue
        log_k = np.logaddexp.reduce([unit[:, i] @ unit[:, j] / temperature for j in negatives])
        log_ls = [unit[:, i] @ unit[:, j] / temperature for j in positives]
        losses.append(float(np.mean([np.logaddexp(log_l, log_k) - log_l for log_l in log_ls])))  # -log(L / (L + K))
    return losses


def separation_loss(
    cam_logits: Array, labels: NDArray[np.int64], confident: Array, temperature: float = 0.5, scope: str = "image"
) -> float:
    """CSC (Eq. 9-10), anchor by anchor; `confident` is Omega, similarity the cosine of the online CAM vectors."""
    groups = [[image] for image in range(len(cam_logits))] if scope == "image" else [list(range(len(cam_logits)))]
    losses = []
    for group in groups:
        vectors = np.concatenate([cam_logits[image].reshape(cam_logits.shape[1], -1) for image in group], axis=1)
        ids = np.concatenate([labels[image].ravel() for image in group])
        omega = np.concatenate([confident[image].ravel() for image in group])
        losses += _separate(vectors, ids, [int(i) for i in np.flatnonzero(omega)], temperature)
    return float(np.mean(losses)) if losses else 0.0


# --- everything together (Eq. 11) -------------------------------------------------------------------------


def valid_tokens(valid: Array, grid: tuple[int, int]) -> Array:
    """Tokens at least half of which is image, on a grid that divides the pixels (B, H, W)."""
    result = np.zeros((len(valid), *grid), bool)
    tall, wide = valid.shape[1] // grid[0], valid.shape[2] // grid[1]
    for image, y, x in np.ndindex(result.shape):
        cell = valid[image, y * tall : (y + 1) * tall, x * wide : (x + 1) * wide]
        result[image, y, x] = 2 * cell.sum() >= cell.size
    return result


def overall(
    cls_logits: Array, aux_cls_logits: Array, cam_logits: Array, seg_logits: Array, labels: Array, valid: Array,
    cams: Array, aux_cams: Array, segmentation: Array, threshold: float, aux_threshold: float,
    raw: bool = True, epsilon: float = 1.0, temperature: float = 0.5, scope: str = "image",
) -> dict[str, float]:  # fmt: skip
    """Eq. 11 with the paper's weights: the online network's outputs against the assignment network's maps."""

    def cam2seg(maps: Array, xi: float) -> float:
        maps, reached = upsample_valid(maps, tokens, valid.shape[1:])
        known = valid & reached
        weights = reliability_weights(perplexity(maps.max(axis=1), xi), known) if raw else None
        return cam2seg_loss(seg_logits, cam_pseudo_labels(maps, xi, known), weights)

    tokens = valid_tokens(valid, cam_logits.shape[-2:])
    active = aux_cams.any(axis=(1, 2, 3))[:, None, None]
    omega = tokens & active & (perplexity(aux_cams.max(axis=1), aux_threshold) <= epsilon)
    parts = {
        "cls": classification_loss(cls_logits, labels),
        "aux_cls": classification_loss(aux_cls_logits, labels),
        "c2s": cam2seg(cams, threshold),
        "aux_c2s": cam2seg(aux_cams, aux_threshold),
        "s2c": seg2cam_loss(cam_logits, segmentation, tokens),
        "csc": separation_loss(cam_logits, cam_pseudo_labels(aux_cams, aux_threshold), omega, temperature, scope),
    }
    swap = 0.1 * (parts["c2s"] + parts["aux_c2s"]) + 0.05 * parts["s2c"]
    return parts | {"loss": parts["cls"] + parts["aux_cls"] + swap + 0.1 * parts["csc"]}
