"""Batches for which implementations of this method report NaN: each loss, and the whole step, in every precision.

A loss must be finite, and its gradient usable: finite, and in half precision what float32 would give, rounded. Where
nothing counts, the loss is exactly 0 and its gradient exactly 0.
"""

from types import SimpleNamespace

import pytest
import reference
import torch
from batches import SIZE, B, C, losses_of, make_batch

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation
from cosa_hf.assignment.network import AssignmentNetwork, TeacherConfig
from cosa_hf.assignment.threshold import ThresholdConfig
from cosa_hf.objective.classification import classification_loss
from cosa_hf.objective.overall import CoSAObjective, mask_targets
from cosa_hf.objective.pseudo_labels import PseudoLabels
from cosa_hf.objective.separation import contrastive_separation_loss
from cosa_hf.objective.swapping import cam2seg_loss, seg2cam_loss
from cosa_hf.objective.targets import anchors, normalized

pytestmark = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def value_and_gradient(loss_of, logits):
    """The loss and its gradient, both finite; the gradient as float32 has it."""
    logits = logits.detach().requires_grad_()
    loss = loss_of(logits)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    exact = logits.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(loss_of(exact), exact)
    assert torch.equal(gradient, expected.to(logits.dtype))
    return loss.item(), gradient


def in_float64(logits):
    return logits.detach().double().numpy()


# --- each loss by itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize("extreme", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("tags", [[[0, 0, 0], [1, 0, 1]], [[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]])
def test_classification_of_saturated_logits(extreme, tags, dtype):
    logits, labels = torch.full((2, 3), extreme, dtype=dtype), torch.tensor(tags)
    loss, gradient = value_and_gradient(lambda z: classification_loss(z, labels), logits)
    expected = reference.classification_loss(in_float64(logits), labels.numpy())
    assert loss == pytest.approx(expected, rel=1e-5)
    wrong = (logits > 0) != labels.bool()
    assert gradient[wrong].ne(0).all()  # a saturated mistake is still corrected


PIXEL = torch.full((1, 4, 4), 255)
PIXEL[0, 1, 3] = 1
MASKS = {
    "all ignored": torch.full((1, 4, 4), 255),
    "all background": torch.zeros(1, 4, 4, dtype=torch.long),
    "one class": torch.full((1, 4, 4), 2),
    "one pixel": PIXEL,
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [1.0, 9e3])
def test_cam2seg(mask, scale, dtype):
    seg_logits = scale * torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    seg_logits, ids = seg_logits.to(dtype), MASKS[mask]
    targets = mask_targets(ids, ignore_index=255)
    loss, gradient = value_and_gradient(lambda s: cam2seg_loss(s, targets.cpl, targets.cpl_weights), seg_logits)
    expected = reference.cam2seg_loss(in_float64(seg_logits), ids.numpy())
    assert loss == pytest.approx(expected, rel=1e-5, abs=reference.tolerance(in_float64(seg_logits)))
    if mask == "all ignored":
        assert loss == 0
        assert not gradient.any()


@pytest.mark.parametrize("value", [0.0, 3e4, -3e4])
@pytest.mark.parametrize("some_valid", [True, False])
def test_seg2cam_of_saturated_maps(value, some_valid, dtype):
    cam_logits = torch.full((1, 2, 2, 2), value, dtype=dtype)
    segmentation = torch.zeros(1, 3, 2, 2, dtype=dtype)
    segmentation[:, 0, 1], segmentation[:, 1, 0] = 1, 1
    valid = torch.full((1, 2, 2), some_valid)
    (weights,) = normalized([valid.float()])
    loss, gradient = value_and_gradient(lambda m: seg2cam_loss(m, segmentation, weights), cam_logits)
    expected = reference.seg2cam_loss(in_float64(cam_logits), in_float64(segmentation), valid.numpy())
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradient.any() == some_valid


def separation_of(cam_logits, labels, confident, temperature=0.5, scope="image"):
    members = labels.masked_fill(~confident, -1)
    (weights,) = normalized([anchors(members, scope).float()])
    return contrastive_separation_loss(cam_logits, members, weights, temperature, scope)


LABELS = torch.tensor([[[0, 0, 1], [1, 2, 2]]])
WITHOUT_ANCHORS = {
    "Omega empty": (LABELS, torch.zeros(1, 2, 3, dtype=torch.bool)),
    "one member": (LABELS, torch.tensor([[[True, False, False], [False, False, False]]])),
    "one label": (torch.zeros(1, 2, 3, dtype=torch.long), torch.ones(1, 2, 3, dtype=torch.bool)),
    "no positives": (LABELS, torch.tensor([[[True, False, True], [False, False, True]]])),
}


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("case", WITHOUT_ANCHORS)
def test_separation_without_anchors(case, scope, dtype):
    cam_logits = torch.randn(1, 2, 2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    loss, gradient = value_and_gradient(lambda m: separation_of(m, *WITHOUT_ANCHORS[case], scope=scope), cam_logits)
    assert loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("temperature", [0.01, 0.5])
@pytest.mark.parametrize("value", [0.0, 1e-6, -5.0, 6e4])
def test_separation_of_constant_maps(value, temperature, dtype):
    cam_logits, confident = torch.full((1, 2, 2, 3), value, dtype=dtype), torch.ones(1, 2, 3, dtype=torch.bool)
    loss, _ = value_and_gradient(lambda m: separation_of(m, LABELS, confident, temperature), cam_logits)
    # All similarities are equal: each anchor faces one positive among four negatives.
    assert loss == pytest.approx(torch.log(torch.tensor(5.0)).item(), rel=1e-4)


def test_separation_of_dead_and_of_opposite_tokens_at_the_sharpest_temperature(dtype):
    """The worst positive among perfect negatives costs 2 / temperature, not infinity."""
    cam_logits = torch.tensor([1.0, -1.0, 1.0, 1.0, 1e-5, 0.0]).view(1, 1, 1, 6).to(dtype)
    labels, confident = torch.tensor([[[0, 0, 1, 1, 0, 1]]]), torch.ones(1, 1, 6, dtype=torch.bool)
    loss, gradient = value_and_gradient(lambda m: separation_of(m, labels, confident, 0.01), cam_logits)
    expected = reference.separation_loss(in_float64(cam_logits), labels.numpy(), confident.numpy(), 0.01)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradient.any()


# --- the whole objective ----------------------------------------------------------------------------------


def degenerate(case, dtype):
    """One of the batches of CASES: online outputs in `dtype`, tags, V and pseudo-labels."""
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


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("case", CASES)
def test_objective(case, scope, dtype):
    outputs, *rest = degenerate(case, dtype)
    logits = vars(outputs)

    def losses_and_gradients(dtype):
        inputs = [value.detach().to(dtype).requires_grad_() for value in logits.values()]
        online = SimpleNamespace(**dict(zip(logits, inputs, strict=True)))
        losses = losses_of(CoSAObjective(separation_scope=scope), online, *rest)
        gradients = {
            name: torch.autograd.grad(value, inputs, allow_unused=True, retain_graph=True)
            for name, value in losses.items()
        }
        return losses, gradients

    losses, gradients = losses_and_gradients(dtype)
    _, exact = losses_and_gradients(torch.float32)
    assert set(losses) == {"cls", "aux_cls", "c2s", "aux_c2s", "s2c", "csc", "loss"}
    for name, loss in losses.items():
        assert torch.isfinite(loss), f"{name} is {loss.item()}"
        for logits_name, gradient, expected in zip(logits, gradients[name], exact[name], strict=True):
            if expected is None:
                assert gradient is None
                continue
            message = f"gradient of {name} with respect to {logits_name}"
            assert torch.isfinite(gradient).all(), message
            if name == "loss":  # a sum of parts, each rounded
                torch.testing.assert_close(gradient, expected.to(dtype), msg=message)
            else:
                assert torch.equal(gradient, expected.to(dtype)), message
    # Whatever else fails, the tags still give a gradient.
    assert all(gradient.any() for gradient in gradients["loss"][:2])
    if case == "all padding":
        for name in ("c2s", "aux_c2s", "s2c", "csc"):
            assert losses[name].item() == 0
            assert not any(gradient.any() for gradient in gradients[name] if gradient is not None)


@pytest.mark.parametrize("case", CASES)
def test_released_objective(case, dtype):
    outputs, *rest = degenerate(case, dtype)
    objective = CoSAObjective(
        background_threshold=0.0, balanced=True, relu_cams=True, reliability_weighting=False, separation_weight=0.0,
        dense_energy_weight=0.05,
    )  # fmt: skip
    images = 255 * torch.rand(B, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    losses = losses_of(objective, outputs, *rest, images=images)
    losses["loss"].backward()
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(torch.isfinite(logits.grad).all() for logits in vars(outputs).values())


# --- the whole step ---------------------------------------------------------------------------------------

STEPS = [
    "ordinary", "no class", "one class", "every pixel ignored", "all-padding crop", "one image all padding",
    "constant image", "CAM all zero", "xi near 0", "xi near 1", "Omega empty",
]  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_step(case, dtype):
    """Views in, weights of both networks out: finite, changed, and the next step would run."""
    torch.manual_seed(0)
    config = CoSAConfig(backbone="test_vit", aux_layer=-2, num_labels=C + 1, decoder_channels=8, decoder_dilation=1)
    online = CoSAForWeaklySupervisedSegmentation(config).train()
    weak, strong = torch.randn(2, 2, 3, 48, 48)
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    valid = torch.ones(2, 48, 48, dtype=torch.bool)
    start, epsilon = 0.5, 1.0
    if case == "no class":
        labels[:] = 0
    elif case == "one class":
        labels[:] = torch.tensor([1.0, 0, 0])
    elif case == "every pixel ignored":
        valid[:] = False
    elif case == "all-padding crop":
        weak, strong = torch.zeros_like(weak), torch.zeros_like(strong)
        valid[:] = False
    elif case == "one image all padding":
        weak[0], strong[0], valid[0] = 0, 0, False
    elif case == "constant image":
        weak, strong = torch.full_like(weak, 0.3), torch.full_like(strong, 0.3)
    elif case == "CAM all zero":
        online.classifier.weight.data.zero_()
        online.aux_classifier.weight.data.zero_()
    elif case.startswith("xi near"):
        start = {"xi near 0": 1e-6, "xi near 1": 1 - 1e-6}[case]
    elif case == "Omega empty":
        epsilon = 0.0
    assignment = AssignmentNetwork(
        online,
        TeacherConfig(ema_momentum=0.5, label_scales=[1.0, 0.5]),
        ThresholdConfig(threshold=start, threshold_decay=0.9, dynamic_threshold="xi" not in case),
    )
    optimizer = torch.optim.AdamW([p for p in online.parameters() if p.requires_grad], lr=1e-3)
    before = online.classifier.weight.detach().clone()

    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            pseudo_labels = assignment.label(weak, labels, valid)
            outputs = online(strong)
        losses = losses_of(CoSAObjective(perplexity_epsilon=epsilon), outputs, labels, valid, pseudo_labels)
        optimizer.zero_grad()
        losses["loss"].backward()
        for name, loss in losses.items():
            assert torch.isfinite(loss), f"{name} is {loss.item()}"
        for name, parameter in online.named_parameters():
            assert parameter.grad is None or torch.isfinite(parameter.grad).all(), f"gradient of {name}"
        optimizer.step()
        assignment.update(online)
        for network in (online, assignment.network):
            assert all(torch.isfinite(parameter).all() for parameter in network.parameters())
        for threshold in assignment.thresholds:
            assert 0 < threshold.value < 1
    assert not torch.equal(online.classifier.weight, before)
    assert not torch.equal(assignment.network.classifier.weight, before)
