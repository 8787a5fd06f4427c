"""Affinities of tokens and the CAMs spread by them, against the slow reference; padding, and input without meaning."""

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import reference
import strategies
import torch
from hypothesis import given
from hypothesis import strategies as st

from cosa_hf import CoSAConfig
from cosa_hf.objective import affinity as module
from cosa_hf.objective.affinity import (
    AffinityConfig,
    attention_affinity,
    feature_affinity,
    foreground,
    normalize_rows,
    spread,
    spread_cams,
)


def random(*shape, seed=0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy() if tensor.is_floating_point() else tensor.numpy()


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.05}, {"power": 3.0}, {"power": 0.5}])
@pytest.mark.parametrize("padded", [False, True])
def test_feature_affinity_equals_reference(settings, padded):
    features = random(2, 5, 3, 4) - 0.3
    valid = random(2, 3, 4, seed=1) < 0.7 if padded else None
    expected = reference.feature_affinity(numpy(features), **settings, valid=None if valid is None else valid.numpy())
    np.testing.assert_allclose(feature_affinity(features, **settings, valid=valid).numpy(), expected, atol=1e-5)


@given(st.data(), strategies.map_shapes, st.sampled_from([None, 1.0, 3.0]))
def test_feature_affinity_of_any_input_is_finite_and_its_rows_sum_to_one(data, shape, power):
    features = torch.tensor(data.draw(strategies.logits(shape, extreme=False)))
    valid = torch.tensor(data.draw(strategies.masks((shape[0], *shape[2:]))))
    rows = feature_affinity(features, power=power, valid=valid)
    assert (rows >= 0).all()
    torch.testing.assert_close(rows.sum(dim=2), torch.ones(rows.shape[:2]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("power", [None, 2.0])
def test_attention_affinity_equals_reference(power):
    attention = random(2, 6, 6).softmax(dim=2)
    expected = reference.attention_affinity(numpy(attention), power or 1.0)
    np.testing.assert_allclose(attention_affinity(attention, power).numpy(), expected, atol=1e-6)


@given(st.data(), strategies.map_shapes, st.integers(1, 3))
def test_spread_equals_reference(data, shape, steps):
    tokens = shape[2] * shape[3]
    values = st.floats(0, 1, width=32).map(lambda value: 0.0 if value < 1e-3 else value)
    cams = torch.tensor(data.draw(hnp.arrays(np.float32, shape, elements=values)))
    affinity = torch.tensor(data.draw(hnp.arrays(np.float32, (shape[0], tokens, tokens), elements=values)))
    valid = torch.tensor(data.draw(strategies.masks((shape[0], *shape[2:]))))
    result = spread(cams, affinity, steps, valid)
    assert torch.isfinite(result).all()
    assert (result[~valid[:, None].expand_as(result)] == 0).all()
    maps = reference.spread(numpy(cams), numpy(affinity), steps, valid.numpy())
    # A map that spreads to a constant is at either end of the min-max, as rounding will have it.
    flat = [(image, c) for image, c in np.ndindex(shape[:2]) if _nearly_flat(cams, affinity, steps, valid, image, c)]
    for image, c in np.ndindex(shape[:2]):
        if (image, c) not in flat:
            np.testing.assert_allclose(result[image, c].numpy(), maps[image, c], atol=1e-3)


def _nearly_flat(cams, affinity, steps, valid, image, c) -> bool:
    rows = reference.normalize_rows(numpy(affinity), valid.flatten(1).numpy())[image]
    values = numpy(cams)[image, c].ravel()
    for _ in range(steps):
        values = rows @ values
    inside = values[valid[image].flatten().numpy()]
    return inside.size > 0 and np.ptp(inside) < 1e-3


def test_padding_neither_gives_nor_takes():
    """The valid tokens get what they get where there is no padding, whatever the padding says."""
    cams, features = random(1, 2, 3, 4), random(1, 5, 3, 4, seed=1)
    padded_cams, padded_features = torch.ones(1, 2, 3, 6), torch.full((1, 5, 3, 6), 9.0)
    padded_cams[..., :4], padded_features[..., :4] = cams, features
    valid = torch.zeros(1, 3, 6, dtype=torch.bool)
    valid[..., :4] = True
    for settings in ({"affinity_power": 3.0, "affinity_steps": 2}, {}):
        config = AffinityConfig(affinity="features", **settings)
        result = spread_cams(padded_cams, padded_features, config, valid)
        torch.testing.assert_close(result[..., :4], spread_cams(cams, features, config))
        assert (result[..., 4:] == 0).all()


def test_classes_are_spread_alike_and_images_do_not_see_each_other():
    cams, features = random(3, 2, 4, 3), random(3, 5, 4, 3, seed=1)
    config = AffinityConfig(affinity="features")
    result = spread_cams(cams, features, config)
    torch.testing.assert_close(result[1:2, 1:], spread_cams(cams[1:2, 1:], features[1:2], config))
    doubled = spread_cams(cams.repeat(1, 2, 1, 1), features, config)
    torch.testing.assert_close(doubled[:, :2], doubled[:, 2:], rtol=0, atol=0)


@pytest.mark.parametrize("affinity", ["features", "attention"])
def test_a_few_images_at_a_time_are_spread_as_all_at_once(affinity, monkeypatch):
    cams, valid = random(5, 2, 2, 3), random(5, 2, 3, seed=2) < 0.8
    source = random(5, 4, 2, 3, seed=1) if affinity == "features" else random(5, 6, 6, seed=1)
    config = AffinityConfig(affinity=affinity)
    monkeypatch.setattr(module, "CHUNK", 100)
    whole = spread_cams(cams, source, config, valid)
    monkeypatch.setattr(module, "CHUNK", 2)
    torch.testing.assert_close(spread_cams(cams, source, config, valid), whole)


def test_memory_is_that_of_a_few_images(monkeypatch):
    seen = []
    monkeypatch.setattr(
        module, "normalize_rows", lambda affinity, *args: seen.append(len(affinity)) or normalize_rows(affinity, *args)
    )
    spread_cams(random(9, 1, 2, 2), random(9, 4, 2, 2), AffinityConfig(affinity="features"))
    assert max(seen) == module.CHUNK


def test_spreading_fills_what_is_alike_and_stops_where_it_is_not():
    """One token of an object is active; its features say how far the object reaches."""
    features = torch.zeros(1, 2, 4, 6)
    features[0, 0, 1:3, 1:4] = 1.0
    features[0, 1] = 1.0 - features[0, 0]
    cams = torch.zeros(1, 1, 4, 6)
    cams[0, 0, 1, 1] = 1.0
    for settings in ({"affinity_power": 3.0}, {"affinity_temperature": 0.1}):
        result = spread_cams(cams, features, AffinityConfig(affinity="features", **settings))
        torch.testing.assert_close(result[0, 0], features[0, 0])


@pytest.mark.parametrize("power", [None, 3.0])
def test_input_without_meaning(power):
    config = AffinityConfig(affinity="features", affinity_power=power)
    cams = random(1, 2, 2, 3)
    # An empty map stays empty, and what stands on one token stands there.
    assert (spread_cams(torch.zeros(1, 2, 2, 3), random(1, 4, 2, 3), config) == 0).all()
    assert spread_cams(torch.ones(1, 1, 1, 1), random(1, 4, 1, 1), config).item() == 1
    # Nothing is valid: nothing is left.
    nothing = torch.zeros(1, 2, 3, dtype=torch.bool)
    assert (spread_cams(cams, random(1, 4, 2, 3), config, nothing) == 0).all()
    # Features that are all the same: everything is alike, or nothing.
    rows = feature_affinity(torch.full((1, 3, 2, 3), 0.1), power=power)[0]
    expected = torch.full((6, 6), 1 / 6) if power is None else torch.eye(6)
    torch.testing.assert_close(rows, expected, atol=2e-2 if power is None else 1e-6, rtol=0)
    # No attention at all.
    torch.testing.assert_close(attention_affinity(torch.zeros(1, 4, 4), power)[0], torch.eye(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_full(dtype):
    cams, features = random(1, 2, 3, 4).to(dtype), random(1, 5, 3, 4, seed=1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = spread_cams(cams, features, AffinityConfig(affinity="features"))
    expected = reference.spread(numpy(cams), reference.feature_affinity(numpy(features)))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-4)


def test_the_settings_are_those_of_a_models_config():
    model, own = CoSAConfig(), AffinityConfig()
    assert {name: getattr(model, name) for name in vars(own)} == vars(own)
    assert own.affinity == "none"


def test_a_segmentation_is_spread_like_cams():
    torch.manual_seed(0)
    logits, features = 3 * torch.randn(2, 4, 3, 5), torch.randn(2, 8, 3, 5)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    valid = torch.ones(2, 3, 5, dtype=torch.bool)
    valid[1, :, 3:] = False
    config = AffinityConfig(affinity="features", affinity_steps=2)
    result = spread_cams(foreground(logits, labels), features, config, valid)
    probabilities = reference.segmentation_pseudo_labels(logits.double().numpy(), labels.numpy(), 1.0)[:, 1:]
    rows = reference.feature_affinity(features.double().numpy(), valid=valid.numpy())
    expected = reference.spread(probabilities, rows, 2, valid.numpy())
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)
    assert (result[0, 1] == 0).all()
    assert (result[1, [0, 2]] == 0).all()
