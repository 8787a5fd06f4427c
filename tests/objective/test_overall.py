from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import reference
import strategies
import torch
from batches import GRID, SIZE, STRIDE, B, C, losses_of, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from cosa_hf.objective.dense_energy import dense_energy_loss
from cosa_hf.objective.overall import CoSAObjective, valid_tokens
from cosa_hf.objective.pseudo_labels import PseudoLabels

PARTS = {"cls", "aux_cls", "c2s", "aux_c2s", "s2c", "csc"}


def of_reference(outputs, labels, valid, targets, **settings):
    """`reference.overall` on what the objective was given."""
    tensors = [outputs.cls_logits, outputs.aux_cls_logits, outputs.cam_logits, outputs.logits, labels, valid]
    tensors += [targets.cams, targets.aux_cams, targets.segmentation]
    arrays = [t.detach().numpy() if t.dtype == torch.bool else t.detach().double().numpy() for t in tensors]
    return reference.overall(*arrays, targets.threshold, targets.aux_threshold, **settings)


def in_float64(tensor):
    return tensor.detach().double().numpy()


def assert_equals_reference(batch, epsilon=1.0, temperature=0.5, scope="image", raw=True):
    objective = CoSAObjective(
        perplexity_epsilon=epsilon,
        separation_temperature=temperature,
        separation_scope=scope,
        reliability_weighting=raw,
    )
    losses = losses_of(objective, *batch)
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
        return losses_of(objective, online, labels, valid, targets)["loss"]

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
    losses = losses_of(CoSAObjective(**{field: 3.0}), *batch)
    without = losses_of(CoSAObjective(**{field: 0.0}), *batch)
    assert set(without) == PARTS - {part} | {"loss"}
    assert losses["loss"].item() == pytest.approx((without["loss"] + 3.0 * losses[part]).item(), rel=1e-5)


def test_warm_up_is_classification_alone():
    outputs, labels, valid, _ = make_batch()
    losses = losses_of(CoSAObjective(), outputs, labels, valid, None)
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
    losses = losses_of(CoSAObjective(), outputs, labels, valid, pseudo_labels)["loss"]
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
    assert losses_of(CoSAObjective(), outputs, labels, valid, pseudo_labels)["loss"].item() == pytest.approx(
        losses.item()
    )


def test_epsilon_infinite_admits_every_valid_token():
    batch = make_batch()
    assert_equals_reference(batch, epsilon=float("inf"))
    assert losses_of(CoSAObjective(perplexity_epsilon=0.0), *batch)["csc"].item() == 0


@pytest.mark.parametrize("grid", [(3, 4), (1, 1), (5, 7)])
def test_valid_tokens_are_at_least_half_image(grid):
    valid = torch.tensor(np.random.default_rng(0).random((2, grid[0] * 4, grid[1] * 4)) < 0.5)
    tokens = valid_tokens(valid, torch.zeros(2, 3, *grid))
    np.testing.assert_array_equal(tokens.numpy(), reference.valid_tokens(valid.numpy(), grid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pseudo_labels_too(dtype):
    outputs, labels, valid, targets = make_batch(dtype=dtype)
    halved = PseudoLabels(targets.cams.to(dtype), targets.aux_cams.to(dtype), targets.segmentation.to(dtype), 0.5, 0.4)
    exact = losses_of(CoSAObjective(), outputs, labels, valid, targets)
    for name, value in losses_of(CoSAObjective(), outputs, labels, valid, halved).items():
        assert value.item() == pytest.approx(exact[name].item(), rel=0.1, abs=1e-2), name


def test_defaults_are_the_papers():
    objective = CoSAObjective()
    assert (objective.cam2seg_weight, objective.aux_cam2seg_weight) == (0.1, 0.1)
    assert (objective.seg2cam_weight, objective.separation_weight) == (0.05, 0.1)
    assert (objective.perplexity_alpha, objective.perplexity_beta, objective.perplexity_epsilon) == (0.8, 1.0, 1.0)
    assert objective.reliability_weighting
    assert objective.separation_scope == "image"


@pytest.mark.parametrize("part", ["s2c", "csc"])
@pytest.mark.parametrize("detach", ["none", "features", "classifier"])
@pytest.mark.parametrize("bias", [False, True])
def test_detach_stops_the_gradient_of_the_guidance_and_of_nothing_else(part, detach, bias):
    """Tab. 4a: the value stays; F or W_fc learns nothing from Seg2CAM, but all from the contrast."""
    outputs, labels, valid, pseudo_labels = make_batch()
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(B, 5, *GRID, generator=generator).requires_grad_()
    classifier = torch.randn(C, 5, 1, 1, generator=generator).requires_grad_()
    offset = torch.randn(C, generator=generator) if bias else None
    outputs.hidden_states = (torch.zeros(()), features)
    outputs.cam_logits = torch.nn.functional.conv2d(features, classifier, offset)
    weights = {"classifier": classifier, "classifier_bias": offset}
    losses = losses_of(CoSAObjective(detach=detach), outputs, labels, valid, pseudo_labels, **weights)
    assert losses["s2c"].item() == losses_of(CoSAObjective(), outputs, labels, valid, pseudo_labels)["s2c"].item()
    sources = (features, classifier)
    gradients = torch.autograd.grad(losses[part], sources, allow_unused=True, retain_graph=True)
    whole = torch.autograd.grad(losses_of(CoSAObjective(), outputs, labels, valid, pseudo_labels)[part], sources)
    for name, gradient, undetached in zip(("features", "classifier"), gradients, whole, strict=True):
        assert undetached.abs().sum() > 0
        if part == "s2c" and detach == name:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, undetached, rtol=1e-5, atol=1e-8)


def test_guidance_that_knows_nothing_of_a_token_leaves_it_out():
    outputs, labels, valid, pseudo_labels = make_batch()
    pseudo_labels.segmentation[:, :, 1] = 0  # as under the 255 of a true mask
    tokens = reference.valid_tokens(valid.numpy(), GRID)
    tokens[:, 1] = False
    value = losses_of(CoSAObjective(), outputs, labels, valid, pseudo_labels)["s2c"].item()
    expected = reference.seg2cam_loss(in_float64(outputs.cam_logits), in_float64(pseudo_labels.segmentation), tokens)
    assert value == pytest.approx(expected, rel=1e-5)


def test_relu_floors_seg2cam_at_ln_2():
    """What the released log shows: 0.69 for a perfect background."""
    outputs, labels, valid, pseudo_labels = make_batch()
    pseudo_labels.segmentation[:] = torch.tensor([1.0, 0, 0, 0]).view(1, C + 1, 1, 1)
    outputs.cam_logits = torch.full((B, C, *GRID), -20.0)
    floored, free = (
        losses_of(CoSAObjective(relu_cams=relu), outputs, labels, valid, pseudo_labels)["s2c"] for relu in (True, False)
    )
    assert floored.item() == pytest.approx(np.log(2), rel=1e-6)
    assert free.item() < 1e-6


def test_background_threshold_and_balance_equal_reference():
    """The released CAM2Seg: below 0.3 background, from 0.6 foreground, half of the loss for each."""
    outputs, labels, valid, pseudo_labels = make_batch(threshold=0.6)
    objective = CoSAObjective(reliability_weighting=False, background_threshold=0.3, balanced=True)
    seg_logits = reference.upsample(in_float64(outputs.logits), SIZE)
    tokens = reference.valid_tokens(valid.numpy(), GRID)
    cams, reached = reference.upsample_valid(in_float64(pseudo_labels.cams), tokens, SIZE)
    halves: tuple[list, list] = ([], [])
    ignored = 0
    for image, y, x in zip(*np.nonzero(valid.numpy() & reached), strict=True):
        nu, scores = cams[image, :, y, x].max(), seg_logits[image, :, y, x]
        if 0.3 <= nu < 0.6:
            ignored += 1
            continue
        label = cams[image, :, y, x].argmax() + 1 if nu >= 0.6 else 0
        halves[int(label > 0)].append(np.logaddexp.reduce(scores) - scores[label])
    assert ignored > 10
    assert min(map(len, halves)) > 10
    expected = (np.mean(halves[0]) + np.mean(halves[1])) / 2
    assert losses_of(objective, outputs, labels, valid, pseudo_labels)["c2s"].item() == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("stride", [2, 3, STRIDE])
def test_supervision_stride_looks_at_the_same_maps_on_a_coarser_grid(stride):
    outputs, labels, valid, pseudo_labels = make_batch()
    valid[:] = True
    value = losses_of(CoSAObjective(supervision_stride=stride), outputs, labels, valid, pseudo_labels)["c2s"].item()
    grid = [-(-side // stride) for side in SIZE]
    coarse = torch.ones(B, *grid, dtype=torch.bool)
    assert value == losses_of(CoSAObjective(), outputs, labels, coarse, pseudo_labels)["c2s"].item()
    if stride == STRIDE:  # the token grid itself: nothing is resized at all
        cams = in_float64(pseudo_labels.cams)
        weights = reference.reliability_weights(reference.perplexity(cams.max(axis=1), 0.5), coarse.numpy())
        ids = reference.cam_pseudo_labels(cams, 0.5)
        assert value == pytest.approx(reference.cam2seg_loss(in_float64(outputs.logits), ids, weights), rel=1e-5)


def test_dense_energy_is_one_more_part_and_open_to_what_cam2seg_ignores():
    outputs, labels, valid, pseudo_labels = make_batch(threshold=0.6)
    images = 255 * torch.rand(B, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    settings = {"dense_energy_weight": 2.0, "reliability_weighting": False}
    losses = losses_of(CoSAObjective(**settings), outputs, labels, valid, pseudo_labels, images=images)
    without = losses_of(CoSAObjective(reliability_weighting=False), outputs, labels, valid, pseudo_labels)
    assert losses["energy"] < 0
    assert losses["loss"].item() == pytest.approx((without["loss"] + 2 * losses["energy"]).item(), rel=1e-6)
    # Where CAM2Seg ignores every pixel, nothing damps the energy.
    ignoring = PseudoLabels(torch.full_like(pseudo_labels.cams, 0.5), *list(vars(pseudo_labels).values())[1:])
    ignored = losses_of(
        CoSAObjective(**settings, background_threshold=0.4), outputs, labels, valid, ignoring, images=images
    )
    plain = dense_energy_loss(outputs.logits, images, valid)
    assert ignored["c2s"].item() == 0
    assert ignored["energy"].item() == plain.item() < losses["energy"].item()


def test_every_class_teaches_however_many_there_are():
    """The 255th foreground class has the id that stands for unknown in mask files."""
    outputs = SimpleNamespace(
        cls_logits=torch.zeros(1, 300),
        aux_cls_logits=torch.zeros(1, 300),
        cam_logits=torch.zeros(1, 300, 1, 1),
        logits=torch.zeros(1, 301, 1, 1, requires_grad=True),
    )
    cams = torch.zeros(1, 300, 1, 1)
    cams[0, 254] = 1.0
    targets = PseudoLabels(cams, cams, torch.zeros(1, 301, 1, 1), threshold=0.5, aux_threshold=0.5)
    losses = losses_of(CoSAObjective(), outputs, torch.zeros(1, 300), torch.ones(1, 16, 16, dtype=torch.bool), targets)
    losses["c2s"].backward()
    assert outputs.logits.grad.argmin().item() == 255
    assert losses["c2s"].item() == pytest.approx(5.7071, abs=1e-4)  # ln 301


def test_dense_energy_is_taken_at_its_scale():
    outputs, labels, valid, pseudo_labels = make_batch()
    pseudo_labels.cams[:] = 0.45  # between the two thresholds: nothing is labelled
    images = 255 * torch.rand(B, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    objective = CoSAObjective(dense_energy_weight=1.0, dense_energy_scale=0.25, background_threshold=0.4)
    energy = losses_of(objective, outputs, labels, valid, pseudo_labels, images=images)["energy"].item()
    assert energy == dense_energy_loss(outputs.logits, images, valid, scale=0.25).item()
    assert energy != dense_energy_loss(outputs.logits, images, valid, scale=0.5).item()
