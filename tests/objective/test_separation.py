import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosa_hf.objective import separation
from cosa_hf.objective.separation import contrastive_separation_loss
from cosa_hf.objective.targets import anchors, normalized


def random_batch(seed: int, shape=(2, 3, 3, 4), share: float = 0.7, classes: int = 3):
    rng = np.random.default_rng(seed)
    cam_logits = rng.normal(size=shape).astype(np.float32)
    labels = rng.integers(0, classes, (shape[0], *shape[2:]))
    return cam_logits, labels, rng.random(labels.shape) < share


def as_tensors(*arrays):
    return tuple(torch.tensor(array) for array in arrays)


def separation_of(cam_logits, labels, confident, temperature=0.5, scope="image"):
    """The loss of one batch by itself: the mean over its anchors."""
    members = labels.masked_fill(~confident, -1)
    (weights,) = normalized([anchors(members, scope).to(torch.promote_types(cam_logits.dtype, torch.float32))])
    return contrastive_separation_loss(cam_logits, members, weights, temperature, scope)


scopes = st.sampled_from(["image", "batch"])
temperatures = st.sampled_from([0.01, 0.07, 0.5, 2.0])


def drawn_batch(data, shape):
    """Tokens that are ordinary, alike, dead (no activation) or huge; labels and Omega of any kind."""
    spatial = (shape[0], *shape[2:])
    cam_logits = data.draw(strategies.logits(shape, extreme=False))
    faint = data.draw(hnp.arrays(np.float32, spatial, elements=st.sampled_from([1.0, 1.0, 0.0, 1e-5, 1e4])))
    labels = data.draw(hnp.arrays(np.int64, spatial, elements=st.integers(0, shape[1])))
    return cam_logits * faint[:, None], labels, data.draw(strategies.masks(spatial))


@given(st.data(), strategies.map_shapes, scopes, temperatures)
def test_equals_reference(data, shape, scope, temperature):
    cam_logits, labels, confident = drawn_batch(data, shape)
    value = separation_of(*as_tensors(cam_logits, labels, confident), temperature, scope).item()
    expected = reference.separation_loss(cam_logits.astype(float), labels, confident, temperature, scope)
    # A cosine is known to about 1e-7, and the temperature divides that error.
    assert value == pytest.approx(expected, rel=1e-5, abs=max(1e-5, 5e-7 / temperature))


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_equals_reference_on_more_tokens(scope, temperature):
    batch = random_batch(0, shape=(2, 3, 6, 7))
    value = separation_of(*as_tensors(*batch), temperature, scope)
    assert value.item() == pytest.approx(reference.separation_loss(*batch, temperature, scope), rel=1e-5)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_images_with_and_without_anchors_share_one_mean(scope):
    """An image of one label has no anchor of its own, and does not water down the others' mean."""
    cam_logits, labels, confident = random_batch(1, share=1.0)
    labels[1] = 2
    value = separation_of(*as_tensors(cam_logits, labels, confident), scope=scope).item()
    assert value == pytest.approx(reference.separation_loss(cam_logits, labels, confident, scope=scope), rel=1e-5)


def test_similarity_is_the_cosine():
    cam_logits, labels, confident = as_tensors(*random_batch(3))
    scaled = cam_logits * (1 + torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)) * 50)
    torch.testing.assert_close(
        separation_of(scaled, labels, confident),
        separation_of(cam_logits, labels, confident),
        rtol=1e-5,
        atol=1e-6,
    )


def test_background_is_a_label():
    """Two labels of which one is background contrast as any two labels do."""
    cam_logits, labels, confident = random_batch(4, classes=2)
    with_background = separation_of(*as_tensors(cam_logits, labels, confident))
    without = separation_of(*as_tensors(cam_logits, labels + 1, confident))
    assert with_background.item() == without.item() > 0


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_gradient(scope, temperature):
    cam_logits, labels, confident = as_tensors(*random_batch(5, shape=(2, 2, 2, 3), share=0.8, classes=2))
    cam_logits = cam_logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: separation_of(m, labels, confident, temperature, scope), cam_logits)
    (gradient,) = torch.autograd.grad(separation_of(cam_logits, labels, confident), cam_logits)
    assert gradient.any()
    assert (gradient.transpose(0, 1)[:, ~confident] == 0).all()


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("chunk", [1, 3, 12, 13])
def test_chunks_change_neither_value_nor_gradient(monkeypatch, scope, chunk):
    cam_logits, labels, confident = as_tensors(*random_batch(6))

    def value_and_gradient():
        tokens = cam_logits.clone().requires_grad_()
        loss = separation_of(tokens, labels, confident, scope=scope)
        loss.backward()
        return loss.detach(), tokens.grad

    whole = value_and_gradient()
    monkeypatch.setattr(separation, "ANCHORS_AT_ONCE", chunk)
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
            loss = separation_of(batch[0].requires_grad_(), *batch[1:])
        assert loss.requires_grad
        return sum(storages.values())

    # Four times the tokens: four times the memory, not sixteen.
    assert 0 < kept_for(32) <= 6 * kept_for(16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps_are_compared_in_full(dtype):
    cam_logits, labels, confident = as_tensors(*random_batch(8))
    cam_logits = cam_logits.to(dtype)
    value = separation_of(cam_logits, labels, confident, 0.07).item()
    expected = reference.separation_loss(cam_logits.double().numpy(), labels.numpy(), confident.numpy(), 0.07)
    assert value == pytest.approx(expected, rel=1e-5)
