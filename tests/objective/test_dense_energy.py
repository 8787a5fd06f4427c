import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cosa_hf.objective import dense_energy
from cosa_hf.objective.dense_energy import dense_energy_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_batch(seed=0, size=(12, 16), num_labels=3):
    """Logits on the pixels at half size, so that nothing is resized but by halving, and images with edges."""
    rng = np.random.default_rng(seed)
    height, width = size
    logits = rng.normal(size=(2, num_labels, height // 2, width // 2))
    images = np.clip(rng.integers(0, 2, (2, 3, height, width)) * 60 + rng.normal(scale=15, size=(2, 3, *size)), 0, 255)
    valid = np.ones((2, *size), bool)
    valid[0, :, -6:] = False
    labelled = rng.random((2, *size)) < 0.5
    return logits, images, valid, labelled


def reference(logits, images, valid, sigma_rgb, sigma_xy, gate=None):
    """-1e-7 sum_ij sum_k w_ij S_ik S_jk, pair by pair on every second pixel, and its gradient in S's logits."""
    picked = (slice(None), slice(1, None, 2), slice(1, None, 2))  # nearest to the centre of each 2 x 2 cell
    exponentials = np.exp(logits)
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    energy, gradient = 0.0, np.zeros_like(logits)
    for image in range(len(logits)):
        colors, keep = images[image][picked], valid[image][picked[1:]]
        pixels = list(zip(*np.nonzero(keep), strict=True))
        d_probabilities = np.zeros_like(probabilities[image])
        for i in pixels:
            listens = 1.0 if gate is None else gate[image][i]
            for j in pixels:
                place = ((2 * i[0] - 2 * j[0]) ** 2 + (2 * i[1] - 2 * j[1]) ** 2) / sigma_xy**2
                color = ((colors[:, *i] - colors[:, *j]) ** 2).sum() / sigma_rgb**2
                kernel = np.exp(-(place + color) / 2)
                energy -= listens * kernel * probabilities[image][:, *i] @ probabilities[image][:, *j]
                d_probabilities[:, *i] -= 2 * listens * kernel * probabilities[image][:, *j]
        s = probabilities[image]
        gradient[image] = s * (d_probabilities - (s * d_probabilities).sum(axis=0, keepdims=True))
    return 1e-7 * energy / len(logits), 1e-7 * gradient / len(logits)


@pytest.mark.parametrize("sigmas", [(15.0, 100.0), (15.0, 3.0), (200.0, 5.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_energy_and_gradient_equal_the_dense_reference(sigmas, dtype):
    logits, images, valid, _ = make_batch()
    tensor = torch.tensor(logits, dtype=dtype, requires_grad=True)
    loss = dense_energy_loss(
        tensor, torch.tensor(images, dtype=dtype), torch.tensor(valid), sigma_rgb=sigmas[0], sigma_xy=sigmas[1]
    )
    loss.backward()
    energy, gradient = reference(logits, images, valid, *sigmas)
    relative = 1e-4 if dtype == torch.float32 else 1e-10
    assert loss.item() == pytest.approx(energy, rel=relative)
    np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=relative, atol=relative * np.abs(gradient).max())


def test_gradient_is_that_of_the_value():
    """The kernel is held, the value is quadratic in S: the factor of two must be there."""
    logits, images, valid, _ = make_batch(size=(4, 6))
    tensor = torch.tensor(logits, requires_grad=True)
    arguments = torch.tensor(images), torch.tensor(valid)
    assert torch.autograd.gradcheck(
        lambda logits: 1e7 * dense_energy_loss(logits, *arguments, sigma_rgb=60.0), tensor, atol=1e-8
    )


def test_a_labelled_pixel_takes_part_by_its_uncertainty():
    logits, images, valid, labelled = make_batch(seed=1)
    exponentials = np.exp(logits)
    certainty = (exponentials / exponentials.sum(axis=1, keepdims=True)).max(axis=1)
    gate = np.where(labelled[:, 1::2, 1::2], 1 - certainty, 1.0)
    tensor = torch.tensor(logits, requires_grad=True)
    loss = dense_energy_loss(tensor, torch.tensor(images), torch.tensor(valid), torch.tensor(labelled))
    loss.backward()
    energy, gradient = reference(logits, images, valid, 15.0, 100.0, gate)
    assert loss.item() == pytest.approx(energy, rel=1e-10)
    np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-9, atol=1e-18)


def test_slabs_change_nothing(monkeypatch):
    logits, images, valid, labelled = map(torch.tensor, make_batch(size=(20, 20)))
    whole = dense_energy_loss(logits, images, valid, labelled)
    monkeypatch.setattr(dense_energy, "ROWS_AT_ONCE", 7)
    torch.testing.assert_close(dense_energy_loss(logits, images, valid, labelled), whole, rtol=1e-12, atol=0)


def test_all_that_is_ever_allocated_grows_with_the_number_of_pixels(monkeypatch):
    """Not only what lives at a time: a heap that gets a new buffer for every row block keeps the holes of the old ones,
    and a process was seen to grow by the whole dense kernel although no tensor was larger than a chunk."""

    class Allocated(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for tensor in tree_leaves(result):
                if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in given:
                    self.elements += tensor.numel()
            return result

    monkeypatch.setattr(dense_energy, "ROWS_AT_ONCE", 16)
    allocated = []
    for side in (32, 64, 128):
        logits, images, valid, _ = map(torch.tensor, make_batch(size=(side, side)))
        valid[:] = True
        with Allocated() as mode:
            dense_energy_loss(logits.requires_grad_(), images, valid).backward()
        allocated.append(mode.elements)
    assert allocated[1] < 4.5 * allocated[0]
    assert allocated[2] < 4.5 * allocated[1]


@pytest.mark.parametrize("scale", [0.25, 0.125])
def test_a_coarser_grid_keeps_the_value(scale):
    """Smooth images and maps, on which the coarser sum is the same integral."""
    y, x = torch.meshgrid(torch.linspace(0, 1, 128), torch.linspace(0, 1, 128), indexing="ij")
    images = torch.stack([60 * y, 40 * x, 30 * (y + x)])[None]
    logits = torch.stack([3 * x, 2 * y, torch.zeros_like(x)])[None]
    valid = torch.ones(1, 128, 128, dtype=torch.bool)
    half, coarse = (dense_energy_loss(logits, images, valid, scale=s).item() for s in (0.5, scale))
    assert coarse == pytest.approx(half, rel=0.02)


def test_alike_pixels_want_the_same_class():
    """Two flat halves in different colours: the split along the edge has less energy than any other, and moving towards
    it is downhill."""
    images = torch.zeros(1, 3, 16, 16)
    images[..., 8:] = 200
    valid = torch.ones(1, 16, 16, dtype=torch.bool)
    along = torch.zeros(1, 2, 8, 8)
    along[:, 1, :, 4:] = 8
    along[:, 0, :, :4] = 8
    across = along.transpose(2, 3)
    assert dense_energy_loss(along, images, valid) < 0.7 * dense_energy_loss(across, images, valid)
    noisy = (along + 6 * torch.randn(along.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    wrong = noisy.detach().argmax(dim=1) != along.argmax(dim=1)
    assert wrong.any()
    (gradient,) = torch.autograd.grad(dense_energy_loss(noisy, images, valid), noisy)
    towards = -(gradient * (2 * (along > 0) - 1)).sum(dim=1)
    assert (towards[wrong] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["all padding", "one valid pixel", "huge logits", "one colour", "black and white"])
def test_degenerate_batches_are_finite(case, dtype):
    logits, images, valid, labelled = map(torch.tensor, make_batch())
    if case == "all padding":
        valid[:] = False
    elif case == "one valid pixel":
        valid[:] = False
        valid[0, :2, :2] = True
    elif case == "huge logits":
        logits *= 1e4
    elif case == "one colour":
        images[:] = 255
    elif case == "black and white":
        images = 255 * (images > 30).double()
    logits = logits.to(dtype).requires_grad_()
    loss = dense_energy_loss(logits, images.float(), valid, labelled)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    if case == "all padding":
        assert loss.item() == 0
        assert (logits.grad == 0).all()


def test_padding_belongs_to_no_pair():
    logits, images, valid, _ = map(torch.tensor, make_batch())
    before = dense_energy_loss(logits, images, valid)
    images[0, :, :, -6:] = 17.0
    logits[0, :, :, -3:] = 40.0  # at half size, and no bilinear kernel reaches over
    assert dense_energy_loss(logits, images, valid).item() == before.item()
