import numpy as np
import pytest
import torch

from cosa_hf.objective import separation
from cosa_hf.objective.separation import contrastive_separation_loss

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The documented floor on a token's norm.
FLOOR = 1e-3


def anchor_losses(cam_logits: np.ndarray, labels: np.ndarray, confident: np.ndarray, temperature: float) -> list[float]:
    """Eq. 9-10 for the tokens (C, N) of one group, anchor by anchor."""
    members = [i for i in range(len(labels)) if confident[i]]
    unit = cam_logits / np.maximum(np.linalg.norm(cam_logits, axis=0), FLOOR)
    losses = []
    for i in members:
        positives = [j for j in members if labels[j] == labels[i] and j != i]
        negatives = [j for j in members if labels[j] != labels[i]]
        if not positives or not negatives:
            continue
        against = np.logaddexp.reduce([unit[:, i] @ unit[:, j] / temperature for j in negatives])
        terms = []
        for j in positives:
            s = unit[:, i] @ unit[:, j] / temperature
            terms.append(np.logaddexp(s, against) - s)  # -log(L / (L + K))
        losses.append(float(np.mean(terms)))
    return losses


def reference(
    cam_logits: np.ndarray,
    labels: np.ndarray,
    confident: np.ndarray,
    temperature: float = 0.5,
    scope: str = "image",
) -> float:
    cam_logits = cam_logits.astype(np.float64)
    tokens = cam_logits.reshape(*cam_logits.shape[:2], -1)
    labels, confident = labels.reshape(len(labels), -1), confident.reshape(len(confident), -1)
    if scope == "batch":
        losses = anchor_losses(np.concatenate(list(tokens), axis=1), labels.ravel(), confident.ravel(), temperature)
    else:
        losses = [
            loss
            for image in range(len(tokens))
            for loss in anchor_losses(tokens[image], labels[image], confident[image], temperature)
        ]
    return float(np.mean(losses)) if losses else 0.0


def random_batch(seed: int, shape=(2, 3, 3, 4), share: float = 0.7, classes: int = 3):
    rng = np.random.default_rng(seed)
    cam_logits = rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(0, classes, (shape[0], *shape[2:]))
    return cam_logits, labels, rng.random(labels.shape) < share


def as_tensors(*arrays):
    return tuple(torch.tensor(array) for array in arrays)


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 0.5, 2.0])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.2])
def test_equals_reference(scope, temperature, share):
    batch = random_batch(int(10 * share), share=share)
    value = contrastive_separation_loss(*as_tensors(*batch), temperature, scope)
    # A similarity's rounding error is divided by the temperature.
    assert value.item() == pytest.approx(reference(*batch, temperature, scope), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_images_with_and_without_anchors_share_one_mean(scope):
    """An image of one label has no anchor of its own, and does not water down the others' mean."""
    cam_logits, labels, confident = random_batch(1, share=1.0)
    labels[1] = 2
    value = contrastive_separation_loss(*as_tensors(cam_logits, labels, confident), scope=scope).item()
    assert value == pytest.approx(reference(cam_logits, labels, confident, scope=scope), rel=1e-5)


def test_ties_and_dead_tokens():
    cam_logits, labels, confident = random_batch(2, share=1.0)
    cam_logits[0, :, 0] = cam_logits[0, :, :1, 0, None].mean(axis=1)  # a row of identical tokens
    cam_logits[1, :, 1] = 0  # a row without activation
    cam_logits[1, :, 2, 0] = 1e-5  # below the floor
    tokens, *rest = as_tensors(cam_logits, labels, confident)
    tokens.requires_grad_()
    loss = contrastive_separation_loss(tokens, *rest)
    loss.backward()
    assert loss.item() == pytest.approx(reference(cam_logits, labels, confident), rel=1e-5)
    assert torch.isfinite(tokens.grad).all()


def test_similarity_is_the_cosine():
    cam_logits, labels, confident = as_tensors(*random_batch(3))
    scaled = cam_logits * (1 + torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)) * 50)
    torch.testing.assert_close(
        contrastive_separation_loss(scaled, labels, confident),
        contrastive_separation_loss(cam_logits, labels, confident),
        rtol=1e-5,
        atol=1e-6,
    )


def test_background_is_a_label():
    """Two labels of which one is background contrast as any two labels do."""
    cam_logits, labels, confident = random_batch(4, classes=2)
    with_background = contrastive_separation_loss(*as_tensors(cam_logits, labels, confident))
    without = contrastive_separation_loss(*as_tensors(cam_logits, labels + 1, confident))
    assert with_background.item() == without.item() > 0


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_gradient_equals_central_differences(numeric_gradient, scope):
    cam_logits, labels, confident = random_batch(5, shape=(2, 2, 2, 3), share=0.8, classes=2)
    tokens, *rest = as_tensors(cam_logits, labels, confident)
    tokens.requires_grad_()
    contrastive_separation_loss(tokens, *rest, scope=scope).backward()
    expected = numeric_gradient(lambda m: reference(m, labels, confident, scope=scope), cam_logits)
    np.testing.assert_allclose(tokens.grad.numpy(), expected, atol=1e-5)
    outside = ~confident[:, None].repeat(cam_logits.shape[1], axis=1)
    assert (tokens.grad.numpy()[outside] == 0).all()


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("slab", [1, 3, 12, 13])
def test_slabs_change_neither_value_nor_gradient(monkeypatch, scope, slab):
    cam_logits, labels, confident = as_tensors(*random_batch(6))

    def value_and_gradient():
        tokens = cam_logits.clone().requires_grad_()
        loss = contrastive_separation_loss(tokens, labels, confident, scope=scope)
        loss.backward()
        return loss.detach(), tokens.grad

    whole = value_and_gradient()
    monkeypatch.setattr(separation, "ANCHORS_AT_ONCE", slab)
    torch.testing.assert_close(value_and_gradient(), whole, rtol=1e-6, atol=1e-7)


def test_memory_kept_for_backward_grows_with_tokens_not_pairs(monkeypatch):
    monkeypatch.setattr(separation, "ANCHORS_AT_ONCE", 32)

    def kept_for(side: int) -> int:
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = as_tensors(*random_batch(7, shape=(1, 2, side, side), share=1.0))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = contrastive_separation_loss(batch[0].requires_grad_(), *batch[1:])
        assert loss.requires_grad
        return sum(storages.values())

    # Four times the tokens: four times the memory, not sixteen.
    assert 0 < kept_for(32) <= 6 * kept_for(16)


LABELS = torch.tensor([[[0, 0, 1], [1, 2, 2]]])
DEGENERATE = {
    "Omega empty": (LABELS, torch.zeros(1, 2, 3, dtype=torch.bool)),
    "one member": (LABELS, torch.tensor([[[True, False, False], [False, False, False]]])),
    "one label": (torch.zeros(1, 2, 3, dtype=torch.long), torch.ones(1, 2, 3, dtype=torch.bool)),
    "no positives": (LABELS, torch.tensor([[[True, False, True], [False, False, True]]])),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("case", DEGENERATE)
def test_without_anchors_exactly_zero_with_a_graph(case, scope, dtype):
    cam_logits = torch.randn(1, 2, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    loss = contrastive_separation_loss(cam_logits, *DEGENERATE[case], scope=scope)
    loss.backward()
    assert loss.item() == 0
    assert (cam_logits.grad == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.01, 0.5])
@pytest.mark.parametrize("value", [0.0, 1e-6, -5.0, 6e4])
def test_constant_maps_have_a_finite_gradient(value, temperature, dtype):
    cam_logits = torch.full((1, 2, 2, 3), value, dtype=dtype, requires_grad=True)
    confident = torch.ones(1, 2, 3, dtype=torch.bool)
    loss = contrastive_separation_loss(cam_logits, LABELS, confident, temperature)
    loss.backward()
    # All similarities are equal: each anchor faces one positive among four negatives.
    assert loss.item() == pytest.approx(np.log(5), rel=1e-4)
    assert torch.isfinite(cam_logits.grad).all()


def test_opposite_tokens_at_the_sharpest_temperature():
    """The worst positive against perfect negatives: 2 / temperature, not infinity."""
    cam_logits = torch.tensor([1.0, -1.0, 1.0, 1.0]).view(1, 1, 1, 4).requires_grad_()
    labels = torch.tensor([[[0, 0, 1, 1]]])
    confident = torch.ones(1, 1, 4, dtype=torch.bool)
    loss = contrastive_separation_loss(cam_logits, labels, confident, temperature=0.01)
    loss.backward()
    assert loss.item() == pytest.approx(
        reference(cam_logits.detach().numpy(), labels.numpy(), confident.numpy(), 0.01), rel=1e-5
    )
    assert torch.isfinite(cam_logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_compared_in_full(dtype):
    cam_logits, labels, confident = as_tensors(*random_batch(8))
    cam_logits = cam_logits.to(dtype)
    value = contrastive_separation_loss(cam_logits, labels, confident, 0.07).item()
    expected = reference(cam_logits.double().numpy(), labels.numpy(), confident.numpy(), 0.07)
    assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", ["random", "first without anchors", "anchors in one image only", "no anchors"])
def test_mean_runs_over_the_global_batch(as_processes, processes, case):
    cam_logits, labels, confident = as_tensors(*random_batch(9, shape=(2 * processes, 3, 2, 3), share=0.8))
    if case == "first without anchors":
        confident[:2] = False
    elif case == "no anchors":
        confident[:] = False
    elif case == "anchors in one image only":
        # Two of one label and one of another: two anchors in the whole batch.
        confident[:], labels[:] = False, 0
        confident[0, 0], labels[0, 0, 0] = True, 1
    cam_logits.requires_grad_()

    whole = contrastive_separation_loss(cam_logits, labels, confident)
    (expected,) = torch.autograd.grad(whole, cam_logits)
    shares = list(zip(cam_logits.split(2), labels.split(2), confident.split(2), strict=True))
    parts = as_processes(*(lambda mean, s=share: contrastive_separation_loss(*s, mean=mean) for share in shares))
    average = torch.stack(parts).mean()
    (gradient,) = torch.autograd.grad(average, cam_logits)
    torch.testing.assert_close(average, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
