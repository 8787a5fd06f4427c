import numpy as np
import pytest
import torch

from cosa_hf.objective.swapping import cam2seg_loss, seg2cam_loss

IGNORE = 255
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def upsample(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
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


def reference_cam2seg(seg_logits: np.ndarray, ids: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Eq. 5, pixel by pixel, averaged over the pixels that are not ignored."""
    scores = upsample(seg_logits.astype(np.float64), ids.shape[1:])
    losses = []
    for image, y, x in np.ndindex(ids.shape):
        if ids[image, y, x] == IGNORE:
            continue
        vector = scores[image, :, y, x]
        weight = 1.0 if weights is None else weights[image, y, x]
        losses.append(weight * (np.logaddexp.reduce(vector) - vector[ids[image, y, x]]))
    return float(np.mean(losses)) if losses else 0.0


def reference_seg2cam(cam_logits: np.ndarray, segmentation: np.ndarray, valid: np.ndarray) -> float:
    """Eq. 8, class by class and position by position."""
    total, classes = 0.0, cam_logits.shape[1]
    for image, c, y, x in np.ndindex(cam_logits.shape):
        if valid[image, y, x]:
            m, target = float(cam_logits[image, c, y, x]), segmentation[image, c + 1, y, x]
            total += target * np.logaddexp(0, -m) + (1 - target) * np.logaddexp(0, m)
    return total / (classes * valid.sum()) if valid.any() else 0.0


def probabilities(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.random(shape) ** 4
    return values / values.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("grid", "size"), [((2, 3), (8, 9)), ((3, 3), (3, 3)), ((1, 1), (4, 5)), ((2, 2), (7, 5))])
def test_cam2seg_equals_reference(grid, size, weighted):
    rng = np.random.default_rng(0)
    seg_logits = rng.normal(scale=3, size=(2, 4, *grid)).astype(np.float32)
    ids = rng.choice([0, 1, 2, 3, IGNORE], size=(2, *size))
    weights = rng.random((2, *size)) * 3 if weighted else None
    value = cam2seg_loss(
        torch.tensor(seg_logits),
        torch.tensor(ids),
        None if weights is None else torch.tensor(weights, dtype=torch.float32),
    )
    assert value.item() == pytest.approx(reference_cam2seg(seg_logits, ids, weights), rel=1e-5, abs=1e-5)


def test_cam2seg_gradient_equals_central_differences(numeric_gradient):
    rng = np.random.default_rng(1)
    seg_logits, ids = rng.normal(size=(2, 3, 2, 2)), rng.choice([0, 1, 2, IGNORE], size=(2, 4, 4))
    weights = rng.random(ids.shape)
    tensor = torch.tensor(seg_logits, dtype=torch.float32, requires_grad=True)
    cam2seg_loss(tensor, torch.tensor(ids), torch.tensor(weights, dtype=torch.float32)).backward()
    expected = numeric_gradient(lambda s: reference_cam2seg(s, ids, weights), seg_logits)
    np.testing.assert_allclose(tensor.grad.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ids", ["all ignored", "all background", "one class", "one pixel"])
def test_cam2seg_degenerate(dtype, ids):
    target = {
        "all ignored": torch.full((1, 4, 4), IGNORE),
        "all background": torch.zeros(1, 4, 4, dtype=torch.long),
        "one class": torch.full((1, 4, 4), 2),
        "one pixel": torch.full((1, 4, 4), IGNORE).index_put_([torch.tensor(i) for i in (0, 1, 3)], torch.tensor(1)),
    }[ids]
    rng = np.random.default_rng(2)
    seg_logits = torch.tensor(rng.normal(scale=9e3, size=(1, 3, 2, 2))).to(dtype).requires_grad_()
    loss = cam2seg_loss(seg_logits, target, torch.ones(1, 4, 4))
    loss.backward()
    expected = reference_cam2seg(seg_logits.detach().double().numpy(), target.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert torch.isfinite(seg_logits.grad).all()
    if ids == "all ignored":
        assert loss.item() == 0
        assert (seg_logits.grad == 0).all()


def test_cam2seg_custom_ignore_index():
    seg_logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[[0, 1], [2, IGNORE]]])
    moved = torch.where(ids == IGNORE, -1, ids)
    assert torch.equal(cam2seg_loss(seg_logits, ids), cam2seg_loss(seg_logits, moved, ignore_index=-1))


@pytest.mark.parametrize("ids", [[0, 0, 1, 2], [0, 0, 0, 0], [2, 1, 1, IGNORE], [IGNORE] * 4])
def test_balanced_cam2seg_is_half_background_and_half_foreground(ids):
    seg_logits = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    target = torch.tensor(ids).view(1, 2, 2)
    halves = [target.masked_fill(target != 0, IGNORE), target.masked_fill(target == 0, IGNORE)]
    expected = sum(reference_cam2seg(seg_logits.numpy(), half.numpy()) for half in halves) / 2
    assert cam2seg_loss(seg_logits, target, balanced=True).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("classes", [1, 3])
def test_seg2cam_equals_reference(classes, share):
    rng = np.random.default_rng(3)
    cam_logits = rng.normal(scale=4, size=(2, classes, 3, 4)).astype(np.float32)
    segmentation = probabilities(rng, (2, classes + 1, 3, 4))
    valid = rng.random((2, 3, 4)) < share
    value = seg2cam_loss(torch.tensor(cam_logits), torch.tensor(segmentation, dtype=torch.float32), torch.tensor(valid))
    assert value.item() == pytest.approx(reference_seg2cam(cam_logits, segmentation, valid), rel=1e-5, abs=1e-6)


def test_seg2cam_gradient_equals_central_differences(numeric_gradient):
    rng = np.random.default_rng(4)
    cam_logits, segmentation = rng.normal(size=(2, 2, 2, 2)), probabilities(rng, (2, 3, 2, 2))
    valid = np.array([[[1, 1], [0, 1]], [[0, 0], [1, 0]]], bool)
    tensor = torch.tensor(cam_logits, dtype=torch.float32, requires_grad=True)
    seg2cam_loss(tensor, torch.tensor(segmentation, dtype=torch.float32), torch.tensor(valid)).backward()
    expected = numeric_gradient(lambda m: reference_seg2cam(m, segmentation, valid), cam_logits)
    np.testing.assert_allclose(tensor.grad.numpy(), expected, atol=1e-5)
    assert (tensor.grad.numpy().transpose(0, 2, 3, 1)[~valid] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 3e4, -3e4])
@pytest.mark.parametrize("some_valid", [True, False])
def test_seg2cam_degenerate(dtype, value, some_valid):
    cam_logits = torch.full((1, 2, 2, 2), value, dtype=dtype, requires_grad=True)
    segmentation = torch.zeros(1, 3, 2, 2, dtype=dtype)
    segmentation[:, 0], segmentation[:, 1, 0] = 1, 1
    segmentation[:, 0, 0] = 0
    valid = torch.full((1, 2, 2), some_valid)
    loss = seg2cam_loss(cam_logits, segmentation, valid)
    loss.backward()
    expected = reference_seg2cam(cam_logits.detach().double().numpy(), segmentation.double().numpy(), valid.numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.isfinite(cam_logits.grad).all()


def test_seg2cam_takes_the_sigmoid_of_raw_maps():
    """The released code floors the loss at ln 2 by a relu; the paper's loss goes to zero."""
    background = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    loss = seg2cam_loss(torch.full((1, 1, 1, 1), -20.0), background, torch.ones(1, 1, 1, dtype=torch.bool))
    assert loss.item() < 1e-6


# (share of counted positions, processes); "one" counts a single position in the whole batch.
SHARES = [(0.7, 2), (0.7, 3), ("first empty", 2), ("one", 2), ("none", 2)]


def counted(rng: np.random.Generator, share: float | str, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, bool)
    if share == "one":
        mask[0, 0, 0] = True
    elif share == "first empty":
        mask[shape[0] // 2 :] = True
    elif share != "none":
        mask = rng.random(shape) < share
    return mask


@pytest.mark.parametrize(("share", "processes"), SHARES)
def test_cam2seg_mean_runs_over_the_global_batch(as_processes, share, processes):
    rng = np.random.default_rng(5)
    batch = 2 * processes
    seg_logits = torch.tensor(rng.normal(size=(batch, 3, 2, 2)), dtype=torch.float32, requires_grad=True)
    ids = rng.integers(0, 3, (batch, 4, 4))
    ids[~counted(rng, share, ids.shape)] = IGNORE
    ids, weights = torch.tensor(ids), torch.tensor(rng.random(ids.shape), dtype=torch.float32)

    whole = cam2seg_loss(seg_logits, ids, weights)
    (expected,) = torch.autograd.grad(whole, seg_logits)
    shares = list(zip(seg_logits.split(2), ids.split(2), weights.split(2), strict=True))
    parts = as_processes(*(lambda mean, s=share: cam2seg_loss(*s, mean=mean) for share in shares))
    average = torch.stack(parts).mean()
    (gradient,) = torch.autograd.grad(average, seg_logits)
    torch.testing.assert_close(average, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("share", "processes"), SHARES)
def test_seg2cam_mean_runs_over_the_global_batch(as_processes, share, processes):
    rng = np.random.default_rng(6)
    batch = 2 * processes
    cam_logits = torch.tensor(rng.normal(size=(batch, 3, 2, 2)), dtype=torch.float32, requires_grad=True)
    segmentation = torch.tensor(probabilities(rng, (batch, 4, 2, 2)), dtype=torch.float32)
    valid = torch.tensor(counted(rng, share, (batch, 2, 2)))

    whole = seg2cam_loss(cam_logits, segmentation, valid)
    (expected,) = torch.autograd.grad(whole, cam_logits)
    shares = list(zip(cam_logits.split(2), segmentation.split(2), valid.split(2), strict=True))
    parts = as_processes(*(lambda mean, s=share: seg2cam_loss(*s, mean) for share in shares))
    average = torch.stack(parts).mean()
    (gradient,) = torch.autograd.grad(average, cam_logits)
    torch.testing.assert_close(average, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
