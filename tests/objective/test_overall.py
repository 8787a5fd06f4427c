from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import expit

from cosa_hf.objective.classification import classification_loss
from cosa_hf.objective.dense_energy import dense_energy_loss
from cosa_hf.objective.overall import CoSAObjective, valid_tokens
from cosa_hf.objective.pseudo_labels import PseudoLabels, normalize_cams, segmentation_pseudo_labels

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PARTS = {"cls", "aux_cls", "c2s", "aux_c2s", "s2c", "csc"}
B, C, GRID, STRIDE = 2, 3, (3, 4), 4
SIZE = (GRID[0] * STRIDE, GRID[1] * STRIDE)


def make_batch(seed=0, batch=B, dtype=torch.float32, labels=None, threshold=0.5, aux_threshold=0.4):
    """Outputs of an online network, tags, a valid mask and pseudo-labels, as one training step has them."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return torch.tensor(rng.normal(scale=2, size=shape), dtype=torch.float32).to(dtype)

    outputs = SimpleNamespace(
        cls_logits=draw(batch, C).requires_grad_(),
        aux_cls_logits=draw(batch, C).requires_grad_(),
        cam_logits=draw(batch, C, *GRID).requires_grad_(),
        logits=draw(batch, C + 1, *GRID).requires_grad_(),
    )
    if labels is None:
        labels = torch.tensor(rng.integers(0, 2, (batch, C)), dtype=torch.float32)
        labels[:, 0] = 1
    valid = torch.ones(batch, *SIZE, dtype=torch.bool)
    valid[0, :, -5:] = False
    valid[-1, :3] = False
    pseudo_labels = PseudoLabels(
        cams=normalize_cams(draw(batch, C, *GRID), labels),
        aux_cams=normalize_cams(draw(batch, C, *GRID), labels),
        segmentation=segmentation_pseudo_labels(draw(batch, C + 1, *GRID), labels, 0.5),
        threshold=threshold,
        aux_threshold=aux_threshold,
    )
    return outputs, labels, valid, pseudo_labels


def reference_valid_tokens(valid: np.ndarray) -> np.ndarray:
    result = np.zeros((len(valid), *GRID), bool)
    for image, y, x in np.ndindex(result.shape):
        cell = valid[image, y * STRIDE : (y + 1) * STRIDE, x * STRIDE : (x + 1) * STRIDE]
        result[image, y, x] = cell.mean() >= 0.5
    return result


def upsample(maps: np.ndarray) -> np.ndarray:
    """Bilinear to pixels, corners not aligned: one weight matrix for each direction."""

    def weights(tokens: int, pixels: int) -> np.ndarray:
        matrix = np.zeros((pixels, tokens))
        for pixel in range(pixels):
            source = max((pixel + 0.5) * tokens / pixels - 0.5, 0)
            low = int(source)
            matrix[pixel, low] += 1 - (source - low)
            matrix[pixel, min(low + 1, tokens - 1)] += source - low
        return matrix

    return np.einsum("yh,xw,bchw->bcyx", weights(GRID[0], SIZE[0]), weights(GRID[1], SIZE[1]), maps)


def perplexity(nu: float, threshold: float) -> float:
    distance = (nu - threshold) / (1 - threshold) if nu >= threshold else (threshold - nu) / threshold
    return float(-np.log(0.8 * np.clip(distance, 1e-4, 1)))


def reference_cam2seg(seg_logits, cams, threshold, valid, reliability=True) -> float:
    """Eq. 3, 4 and 5 in one walk over the pixels."""
    seg_logits, cams = upsample(seg_logits), upsample(cams)
    losses, reliabilities = [], []
    for image, y, x in zip(*np.nonzero(valid), strict=True):
        nu = cams[image, :, y, x].max()
        label = cams[image, :, y, x].argmax() + 1 if nu >= threshold else 0
        scores = seg_logits[image, :, y, x]
        losses.append(np.logaddexp.reduce(scores) - scores[label])
        reliabilities.append(1 / perplexity(nu, threshold) if reliability else 1.0)
    losses, reliabilities = np.array(losses), np.array(reliabilities)
    return float((losses * reliabilities / reliabilities.mean()).mean())


def reference_seg2cam(cam_logits, segmentation, tokens) -> float:
    probability = expit(cam_logits)
    target = segmentation[:, 1:]
    bce = -(target * np.log(probability) + (1 - target) * np.log(1 - probability))
    return float(bce.transpose(0, 2, 3, 1)[tokens].mean())


def reference_separation(cam_logits, aux_cams, threshold, tokens, epsilon=1.0, temperature=0.5) -> float:
    losses = []
    for image in range(len(cam_logits)):
        omega = []
        for y, x in np.ndindex(*GRID):
            vector = aux_cams[image, :, y, x]
            if tokens[image, y, x] and perplexity(vector.max(), threshold) <= epsilon:
                label = vector.argmax() + 1 if vector.max() >= threshold else 0
                m = cam_logits[image, :, y, x]
                omega.append((label, m / np.linalg.norm(m)))
        for i, (label, m) in enumerate(omega):
            positives = [m @ other / temperature for j, (b, other) in enumerate(omega) if b == label and j != i]
            negatives = [m @ other / temperature for b, other in omega if b != label]
            if positives and negatives:
                against = np.logaddexp.reduce(negatives)
                losses.append(np.mean([np.logaddexp(s, against) - s for s in positives]))
    return float(np.mean(losses)) if losses else 0.0


def as_float64(outputs, pseudo_labels):
    values = vars(outputs) | vars(pseudo_labels)
    return SimpleNamespace(
        **{name: v.detach().double().numpy() if torch.is_tensor(v) else v for name, v in values.items()}
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("thresholds", [(0.5, 0.4), (0.2, 0.8)])
@pytest.mark.parametrize("reliability", [True, False])
def test_parts_and_sum_equal_reference(seed, thresholds, reliability):
    outputs, labels, valid, pseudo_labels = make_batch(seed, threshold=thresholds[0], aux_threshold=thresholds[1])
    losses = CoSAObjective(reliability_weighting=reliability)(outputs, labels, valid, pseudo_labels)
    a, v = as_float64(outputs, pseudo_labels), valid.numpy()
    tokens = reference_valid_tokens(v)
    expected = {
        "cls": classification_loss(outputs.cls_logits, labels).item(),
        "aux_cls": classification_loss(outputs.aux_cls_logits, labels).item(),
        "c2s": reference_cam2seg(a.logits, a.cams, thresholds[0], v, reliability),
        "aux_c2s": reference_cam2seg(a.logits, a.aux_cams, thresholds[1], v, reliability),
        "s2c": reference_seg2cam(a.cam_logits, a.segmentation, tokens),
        "csc": reference_separation(a.cam_logits, a.aux_cams, thresholds[1], tokens),
    }
    expected["loss"] = (
        expected["cls"]
        + expected["aux_cls"]
        + 0.1 * (expected["c2s"] + expected["aux_c2s"])
        + 0.05 * expected["s2c"]
        + 0.1 * expected["csc"]
    )
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=2e-5, abs=1e-5)


def test_reference_of_the_contrast_sees_anchors():
    """Guards the test above: a random batch must not leave Omega empty."""
    for seed in range(4):
        outputs, _, valid, pseudo_labels = make_batch(seed)
        a = as_float64(outputs, pseudo_labels)
        assert reference_separation(a.cam_logits, a.aux_cams, 0.4, reference_valid_tokens(valid.numpy())) > 0


@pytest.mark.parametrize(
    ("field", "part"),
    [
        ("cam2seg_weight", "c2s"),
        ("aux_cam2seg_weight", "aux_c2s"),
        ("seg2cam_weight", "s2c"),
        ("separation_weight", "csc"),
    ],
)
def test_each_weight_scales_its_part_and_zero_leaves_it_out(field, part):
    batch = make_batch()
    losses = CoSAObjective(**{field: 3.0})(*batch)
    without = CoSAObjective(**{field: 0.0})(*batch)
    assert set(without) == PARTS - {part} | {"loss"}
    assert losses["loss"].item() == pytest.approx((without["loss"] + 3.0 * losses[part]).item(), rel=1e-5)


def test_warm_up_is_classification_alone():
    outputs, labels, valid, _ = make_batch()
    losses = CoSAObjective()(outputs, labels, valid, None)
    assert set(losses) == {"cls", "aux_cls", "loss"}
    losses["loss"].backward()
    assert outputs.cls_logits.grad is not None
    assert outputs.logits.grad is None
    assert outputs.cam_logits.grad is None


def test_ignored_padding_changes_nothing():
    """What the networks say where V is False counts nowhere."""
    outputs, labels, valid, pseudo_labels = make_batch()
    valid[:] = True
    valid[:, :, -2 * STRIDE :] = False
    losses = CoSAObjective()(outputs, labels, valid, pseudo_labels)["loss"]
    gradients = torch.autograd.grad(losses, [outputs.cam_logits, outputs.logits])
    # The last token column lies beyond the reach of the bilinear kernel of the valid pixels.
    for gradient in gradients:
        assert (gradient[..., -1] == 0).all()
    assert (gradients[0][..., -2:] == 0).all()
    with torch.no_grad():
        outputs.cam_logits[..., -2:] = 1e3
        outputs.logits[..., -1] = 1e3
        pseudo_labels.segmentation[..., -2:] = 0.5
        pseudo_labels.cams[..., -1] = 1
        pseudo_labels.aux_cams[..., -1] = 1
    assert CoSAObjective()(outputs, labels, valid, pseudo_labels)["loss"].item() == pytest.approx(losses.item())


def test_epsilon_infinite_admits_every_valid_token():
    outputs, labels, valid, pseudo_labels = make_batch()
    a = as_float64(outputs, pseudo_labels)
    tokens = reference_valid_tokens(valid.numpy())
    value = CoSAObjective(epsilon=float("inf"))(outputs, labels, valid, pseudo_labels)["csc"].item()
    expected = reference_separation(a.cam_logits, a.aux_cams, 0.4, tokens, epsilon=np.inf)
    assert value == pytest.approx(expected, rel=1e-5)
    assert CoSAObjective(epsilon=0.0)(outputs, labels, valid, pseudo_labels)["csc"].item() == 0


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (5, 7)])
def test_valid_tokens_are_at_least_half_image(grid):
    valid = torch.tensor(np.random.default_rng(0).random((2, grid[0] * 4, grid[1] * 4)) < 0.5)
    tokens = valid_tokens(valid, torch.zeros(2, 3, *grid))
    for image, y, x in np.ndindex(tokens.shape):
        cell = valid[image, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        assert tokens[image, y, x].item() == (cell.sum().item() >= 8)


def degenerate(case, dtype):
    """The batches of METHOD section 10."""
    labels = {
        "no class": torch.zeros(B, C),
        "one image without class": torch.tensor([[1.0, 0, 1], [0, 0, 0]]),
        "one class": torch.tensor([[1.0, 0, 0], [1, 0, 0]]),
    }.get(case)
    threshold = {
        "xi near 0": 1e-6, "xi near 1": 1 - 1e-6, "xi at 0": 0.0, "xi at 1": 1.0,
    }.get(case, 0.5)  # fmt: skip
    outputs, labels, valid, targets = make_batch(
        dtype=dtype, labels=labels, threshold=threshold, aux_threshold=threshold
    )
    cams, aux_cams = targets.cams, targets.aux_cams
    if case == "all padding":
        valid[:] = False
    elif case == "one image all padding":
        valid[0] = False
    elif case == "one valid pixel":
        valid[:] = False
        valid[0, 0, 0] = True
    elif case == "CAM all zero":
        cams, aux_cams = torch.zeros_like(cams), torch.zeros_like(cams)
    elif case == "CAM all at xi":
        cams, aux_cams = torch.full_like(cams, 0.5), torch.full_like(cams, 0.5)
    elif case == "CAM all one":
        cams, aux_cams = torch.ones_like(cams), torch.ones_like(cams)
    elif case == "Omega empty":
        aux_cams = torch.full_like(aux_cams, 0.5)
    elif case == "online CAM all zero":
        outputs.cam_logits.data.zero_()
    elif case == "huge logits":
        for logits in vars(outputs).values():
            logits.data.mul_(5e3)
    return outputs, labels, valid, PseudoLabels(cams, aux_cams, targets.segmentation, threshold, threshold)


CASES = [
    "no class", "one image without class", "one class", "all padding", "one image all padding",
    "one valid pixel", "CAM all zero", "CAM all at xi", "CAM all one", "Omega empty", "online CAM all zero",
    "huge logits", "xi near 0", "xi near 1", "xi at 0", "xi at 1",
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("case", CASES)
def test_degenerate_batches_give_finite_losses_and_gradients(case, scope, dtype):
    outputs, labels, valid, pseudo_labels = degenerate(case, dtype)
    losses = CoSAObjective(separation_scope=scope)(outputs, labels, valid, pseudo_labels)
    assert set(losses) == PARTS | {"loss"}
    for name, value in losses.items():
        assert torch.isfinite(value), f"{name} is {value.item()}"
        for output, gradient in zip(
            vars(outputs),
            torch.autograd.grad(value, list(vars(outputs).values()), allow_unused=True, retain_graph=True),
            strict=True,
        ):
            assert gradient is None or torch.isfinite(gradient).all(), f"gradient of {name} with respect to {output}"
    losses["loss"].backward()
    assert all(logits.grad is not None for logits in vars(outputs).values())
    if case == "all padding":
        assert losses["c2s"].item() == losses["aux_c2s"].item() == losses["s2c"].item() == losses["csc"].item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pseudo_labels_too(dtype):
    outputs, labels, valid, targets = make_batch(dtype=dtype)
    halved = PseudoLabels(targets.cams.to(dtype), targets.aux_cams.to(dtype), targets.segmentation.to(dtype), 0.5, 0.4)
    exact = CoSAObjective()(outputs, labels, valid, targets)
    for name, value in CoSAObjective()(outputs, labels, valid, halved).items():
        assert value.item() == pytest.approx(exact[name].item(), rel=0.1, abs=1e-2), name


@pytest.mark.parametrize("reliability", [True, False])
@pytest.mark.parametrize("case", ["random", "one process all padding", "one process without class"])
def test_processes_average_to_the_loss_of_the_joined_batch(as_processes, case, reliability):
    outputs, labels, valid, targets = make_batch(seed=7, batch=4)
    if case == "one process all padding":
        valid[:2] = False
    elif case == "one process without class":
        labels[:2] = 0
        for maps in (targets.cams, targets.aux_cams):
            maps[:2] = 0
    objective = CoSAObjective(reliability_weighting=reliability)
    whole = objective(outputs, labels, valid, targets)

    def share(rank):
        part = slice(2 * rank, 2 * rank + 2)
        return (
            SimpleNamespace(**{name: logits[part] for name, logits in vars(outputs).items()}),
            labels[part],
            valid[part],
            PseudoLabels(
                targets.cams[part], targets.aux_cams[part], targets.segmentation[part],
                targets.threshold, targets.aux_threshold,
            ),
        )  # fmt: skip

    parts = as_processes(*(lambda mean, r=rank: objective(*share(r), mean) for rank in range(2)))
    inputs = list(vars(outputs).values())
    for name, value in whole.items():
        average = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(average, value, rtol=1e-5, atol=1e-6, msg=name)
    average = (parts[0]["loss"] + parts[1]["loss"]) / 2
    for actual, expected in zip(
        torch.autograd.grad(average, inputs), torch.autograd.grad(whole["loss"], inputs), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_defaults_are_the_papers():
    objective = CoSAObjective()
    assert (objective.cam2seg_weight, objective.aux_cam2seg_weight) == (0.1, 0.1)
    assert (objective.seg2cam_weight, objective.separation_weight) == (0.05, 0.1)
    assert (objective.alpha, objective.beta, objective.epsilon) == (0.8, 1.0, 1.0)
    assert objective.reliability_weighting
    assert objective.separation_scope == "image"


@pytest.mark.parametrize("part", ["s2c", "csc"])
@pytest.mark.parametrize("detach", ["none", "features", "classifier"])
def test_detach_stops_the_gradient_of_the_guidance_and_of_nothing_else(part, detach):
    """Tab. 4a: the value stays; F or W_fc learns nothing from Seg2CAM, but all from the contrast."""
    outputs, labels, valid, pseudo_labels = make_batch()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(B, 5, *GRID, generator=generator).requires_grad_()
    classifier = torch.randn(C, 5, 1, 1, generator=generator).requires_grad_()
    outputs.hidden_states = (torch.zeros(()), features)
    outputs.cam_logits = torch.nn.functional.conv2d(features, classifier)
    losses = CoSAObjective(detach=detach)(outputs, labels, valid, pseudo_labels, classifier=classifier)
    assert losses["s2c"].item() == CoSAObjective()(outputs, labels, valid, pseudo_labels)["s2c"].item()
    sources = (features, classifier)
    gradients = torch.autograd.grad(losses[part], sources, allow_unused=True, retain_graph=True)
    whole = torch.autograd.grad(CoSAObjective()(outputs, labels, valid, pseudo_labels)[part], sources)
    for name, gradient, undetached in zip(("features", "classifier"), gradients, whole, strict=True):
        assert undetached.abs().sum() > 0
        if part == "s2c" and detach == name:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, undetached, rtol=1e-5, atol=1e-8)


def test_guidance_that_knows_nothing_of_a_token_leaves_it_out():
    outputs, labels, valid, pseudo_labels = make_batch()
    pseudo_labels.segmentation[:, :, 1] = 0  # as under the 255 of a true mask
    a = as_float64(outputs, pseudo_labels)
    tokens = reference_valid_tokens(valid.numpy())
    tokens[:, 1] = False
    value = CoSAObjective()(outputs, labels, valid, pseudo_labels)["s2c"].item()
    assert value == pytest.approx(reference_seg2cam(a.cam_logits, a.segmentation, tokens), rel=1e-5)


def test_relu_floors_seg2cam_at_ln_2():
    """What the released log shows: 0.69 for a perfect background."""
    outputs, labels, valid, pseudo_labels = make_batch()
    pseudo_labels.segmentation[:] = torch.tensor([1.0, 0, 0, 0]).view(1, C + 1, 1, 1)
    outputs.cam_logits = torch.full((B, C, *GRID), -20.0)
    floored, free = (CoSAObjective(relu_cams=relu)(outputs, labels, valid, pseudo_labels)["s2c"] for relu in (1, 0))
    assert floored.item() == pytest.approx(np.log(2), rel=1e-6)
    assert free.item() < 1e-6


def test_background_threshold_and_balance_equal_reference():
    """The released CAM2Seg: below 0.3 background, from 0.6 foreground, half of the loss for each."""
    outputs, labels, valid, pseudo_labels = make_batch(threshold=0.6)
    objective = CoSAObjective(reliability_weighting=False, background_threshold=0.3, balanced=True)
    a = as_float64(outputs, pseudo_labels)
    seg_logits, cams = upsample(a.logits), upsample(a.cams)
    halves: tuple[list, list] = ([], [])
    ignored = 0
    for image, y, x in zip(*np.nonzero(valid.numpy()), strict=True):
        nu, scores = cams[image, :, y, x].max(), seg_logits[image, :, y, x]
        if 0.3 <= nu < 0.6:
            ignored += 1
            continue
        label = cams[image, :, y, x].argmax() + 1 if nu >= 0.6 else 0
        halves[int(label > 0)].append(np.logaddexp.reduce(scores) - scores[label])
    assert ignored > 10
    assert min(map(len, halves)) > 10
    expected = (np.mean(halves[0]) + np.mean(halves[1])) / 2
    assert objective(outputs, labels, valid, pseudo_labels)["c2s"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stride", [2, 3, STRIDE])
def test_supervision_stride_looks_at_the_same_maps_on_a_coarser_grid(stride):
    outputs, labels, valid, pseudo_labels = make_batch()
    valid[:] = True
    value = CoSAObjective(supervision_stride=stride)(outputs, labels, valid, pseudo_labels)["c2s"].item()
    grid = [-(-side // stride) for side in SIZE]
    coarse = torch.ones(B, *grid, dtype=torch.bool)
    assert value == CoSAObjective()(outputs, labels, coarse, pseudo_labels)["c2s"].item()
    if stride == STRIDE:  # the token grid itself: nothing is resized at all
        a = as_float64(outputs, pseudo_labels)
        expected = [
            (np.logaddexp.reduce(s := a.logits[image, :, y, x]) - s[label], 1 / perplexity(nu, 0.5))
            for image, y, x in np.ndindex(B, *GRID)
            for nu in [a.cams[image, :, y, x].max()]
            for label in [a.cams[image, :, y, x].argmax() + 1 if nu >= 0.5 else 0]
        ]
        losses, reliabilities = map(np.array, zip(*expected, strict=True))
        assert value == pytest.approx((losses * reliabilities / reliabilities.mean()).mean(), rel=1e-5)


def test_dense_energy_is_one_more_part_and_open_to_what_cam2seg_ignores():
    outputs, labels, valid, pseudo_labels = make_batch(threshold=0.6)
    images = 255 * torch.rand(B, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    settings = {"dense_energy_weight": 2.0, "reliability_weighting": False}
    losses = CoSAObjective(**settings)(outputs, labels, valid, pseudo_labels, images=images)
    without = CoSAObjective(reliability_weighting=False)(outputs, labels, valid, pseudo_labels)
    assert losses["energy"] < 0
    assert losses["loss"].item() == pytest.approx((without["loss"] + 2 * losses["energy"]).item(), rel=1e-6)
    # Where CAM2Seg ignores every pixel, nothing damps the energy.
    ignoring = PseudoLabels(torch.full_like(pseudo_labels.cams, 0.5), *list(vars(pseudo_labels).values())[1:])
    ignored = CoSAObjective(**settings, background_threshold=0.4)(outputs, labels, valid, ignoring, images=images)
    plain = dense_energy_loss(outputs.logits, images, valid)
    assert ignored["c2s"].item() == 0
    assert ignored["energy"].item() == plain.item() < losses["energy"].item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_degenerate_batches_under_the_released_objective(case, dtype):
    outputs, labels, valid, pseudo_labels = degenerate(case, dtype)
    objective = CoSAObjective(
        background_threshold=0.0, balanced=True, relu_cams=True, reliability_weighting=False, separation_weight=0.0,
        dense_energy_weight=0.05,
    )  # fmt: skip
    images = 255 * torch.rand(B, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    losses = objective(outputs, labels, valid, pseudo_labels, images=images)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(logits.grad).all() for logits in vars(outputs).values())
