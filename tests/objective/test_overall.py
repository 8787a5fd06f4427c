from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import reference
import strategies
import torch
from batches import STRIDE, B, C, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa_hf.objective.overall import CoSAObjective, valid_tokens
from cosa_hf.objective.pseudo_labels import PseudoLabels

PARTS = {"cls", "aux_cls", "c2s", "aux_c2s", "s2c", "csc"}


def of_reference(outputs, labels, valid, targets, **settings):
    """`reference.overall` on what the objective was given."""
    tensors = [outputs.cls_logits, outputs.aux_cls_logits, outputs.cam_logits, outputs.logits, labels, valid]
    tensors += [targets.cams, targets.aux_cams, targets.segmentation]
    arrays = [t.detach().numpy() if t.dtype == torch.bool else t.detach().double().numpy() for t in tensors]
    return reference.overall(*arrays, targets.threshold, targets.aux_threshold, **settings)


def assert_equals_reference(batch, epsilon=1.0, temperature=0.5, scope="image", raw=True):
    losses = CoSAObjective(
        epsilon=epsilon, separation_temperature=temperature, separation_scope=scope, reliability_weighting=raw
    )(*batch)
    expected = of_reference(*batch, epsilon=epsilon, temperature=temperature, scope=scope, raw=raw)
    abs_tolerance = reference.tolerance(*(logits.detach().numpy() for logits in vars(batch[0]).values()))
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(
        expected, rel=1e-5, abs=abs_tolerance
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("thresholds", [(0.5, 0.4), (0.2, 0.8)])
@pytest.mark.parametrize("raw", [True, False])
def test_parts_and_sum_equal_reference(seed, thresholds, raw):
    batch = make_batch(seed, threshold=thresholds[0], aux_threshold=thresholds[1])
    assert_equals_reference(batch, raw=raw)
    if thresholds == (0.5, 0.4):
        assert of_reference(*batch)["csc"] > 0  # a random batch must not leave Omega empty


@given(st.data(), st.tuples(strategies.thresholds(), strategies.thresholds()), st.sampled_from(["image", "batch"]))
@settings(max_examples=30)
def test_parts_and_sum_equal_reference_on_drawn_maps(data, thresholds, scope):
    """Maps that are constant, empty or at the threshold; logits that tie; tags and padding of any kind."""
    shape, pixels = (B, C, 2, 2), (B, 4, 4)

    def scores(*of_shape):
        return torch.tensor(data.draw(strategies.logits(of_shape, extreme=False)), requires_grad=True)

    # Resized values right beside the threshold fall to either side by rounding: only whole steps of 1/8 are drawn.
    steps = st.integers(0, 8).map(lambda eighths: eighths / 8)
    maps = [torch.tensor(data.draw(hnp.arrays(np.float32, shape, elements=steps))) for _ in range(2)]
    outputs = SimpleNamespace(
        cls_logits=scores(B, C),
        aux_cls_logits=scores(B, C),
        cam_logits=scores(*shape),
        logits=scores(B, C + 1, 2, 2),
    )
    labels = torch.tensor(data.draw(strategies.tags((B, C))))
    valid = torch.tensor(data.draw(strategies.masks(pixels)))
    segmentation = torch.tensor(data.draw(strategies.probabilities((B, C + 1, 2, 2))))
    batch = (outputs, labels, valid, PseudoLabels(*maps, segmentation, *thresholds))
    assert_equals_reference(batch, scope=scope)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_gradient(scope):
    outputs, labels, valid, targets = make_batch(seed=3, dtype=torch.float64)
    objective = CoSAObjective(separation_scope=scope)

    def loss(*logits):
        online = SimpleNamespace(**dict(zip(vars(outputs), logits, strict=True)))
        return objective(online, labels, valid, targets)["loss"]

    assert torch.autograd.gradcheck(loss, tuple(vars(outputs).values()))


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
    batch = make_batch()
    assert_equals_reference(batch, epsilon=float("inf"))
    assert CoSAObjective(epsilon=0.0)(*batch)["csc"].item() == 0


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (5, 7)])
def test_valid_tokens_are_at_least_half_image(grid):
    valid = torch.tensor(np.random.default_rng(0).random((2, grid[0] * 4, grid[1] * 4)) < 0.5)
    tokens = valid_tokens(valid, torch.zeros(2, 3, *grid))
    np.testing.assert_array_equal(tokens.numpy(), reference.valid_tokens(valid.numpy(), grid))


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
