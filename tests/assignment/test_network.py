import copy

import numpy as np
import pytest
import reference
import torch
from torch import nn

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation
from cosa_hf.assignment.network import AssignmentNetwork, TeacherConfig
from cosa_hf.assignment.threshold import DynamicThreshold, ThresholdConfig
from cosa_hf.inference import forward_multiscale
from cosa_hf.objective.affinity import attention_affinity
from cosa_hf.objective.guidance import mask_probabilities
from cosa_hf.objective.overall import valid_tokens
from cosa_hf.objective.pseudo_labels import normalize_cams, segmentation_pseudo_labels

SCALES = [1.0, 0.5]


def build(backbone="test_vit", seed=0) -> CoSAForWeaklySupervisedSegmentation:
    torch.manual_seed(seed)
    model = CoSAForWeaklySupervisedSegmentation(
        CoSAConfig(backbone=backbone, aux_layer=-2, num_labels=4, decoder_channels=8)
    )
    # Fresh classifiers say next to nothing; make maps that differ.
    with torch.no_grad():
        for head in (model.classifier, model.aux_classifier):
            head.weight.mul_(50)
    return model


def teacher_of(online, momentum=0.9, threshold=None, **labelling) -> AssignmentNetwork:
    """An assignment network that labels at SCALES."""
    config = TeacherConfig(ema_momentum=momentum, **{"label_scales": SCALES} | labelling)
    return AssignmentNetwork(online, config, threshold or ThresholdConfig(threshold_decay=0.0, threshold_queue=4))


@pytest.fixture
def online() -> CoSAForWeaklySupervisedSegmentation:
    return build()


def perturb(model: nn.Module, seed: int) -> None:
    """A step of training, for what the average can see of it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("momentum", [1, 1.0, -0.1, 1.5, float("nan")])
def test_momentum_that_freezes_or_repels_is_refused(online, momentum):
    with pytest.raises(ValueError, match="momentum"):
        teacher_of(online, momentum)


def test_starts_as_a_copy_that_shares_nothing_that_trains(online):
    teacher = AssignmentNetwork(online)
    kept = copy.deepcopy(online.state_dict())
    assert teacher.network.state_dict().keys() == kept.keys()
    perturb(online, seed=0)
    for name, tensor in teacher.network.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9994])
def test_updates_follow_the_recursion(online, momentum):
    teacher = teacher_of(online, momentum)
    expected = {name: parameter.detach().double().numpy() for name, parameter in online.named_parameters()}
    for step in range(6):
        perturb(online, seed=step)
        teacher.update(online)
        for name, parameter in online.named_parameters():
            expected[name] = reference.moving_average(expected[name], parameter.detach().double().numpy(), momentum)
    actual = dict(teacher.network.named_parameters())
    assert actual.keys() == expected.keys()
    for name, parameter in actual.items():
        np.testing.assert_allclose(parameter.double().numpy(), expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_default_momentum_is_the_papers(online):
    teacher = AssignmentNetwork(online)
    before = teacher.network.classifier.weight.clone()
    with torch.no_grad():
        online.classifier.weight.add_(1.0)
    teacher.update(online)
    torch.testing.assert_close(
        teacher.network.classifier.weight - before, torch.full_like(before, 6e-4), atol=1e-6, rtol=0
    )


def test_distance_is_relative_to_the_online_network(online):
    online.requires_grad_(True)
    teacher = AssignmentNetwork(online)
    assert teacher.distance(online) == 0
    with torch.no_grad():
        for parameter in online.parameters():
            parameter.mul_(4)
    assert teacher.distance(online) == pytest.approx(0.75)


def test_buffers_are_copied():
    online = build("test_resnet")
    teacher = teacher_of(online)
    floats = 0
    for buffer in online.buffers():
        if buffer.is_floating_point():
            buffer.add_(1.5)
            floats += 1
        else:
            buffer.add_(7)
    assert floats
    teacher.update(online)
    for (name, buffer), copied in zip(online.named_buffers(), teacher.network.buffers(), strict=True):
        assert torch.equal(copied, buffer), name


def test_never_in_train_mode(online):
    online.train()
    teacher = teacher_of(online)
    assert online.training

    def modes():
        return {module.training for module in teacher.modules()}

    assert modes() == {False}
    assert teacher.train() is teacher
    assert modes() == {False}
    nn.ModuleList([teacher, online]).train()
    assert modes() == {False}
    teacher.update(online)
    assert modes() == {False}


def test_never_trained_by_gradient(online):
    trainable = {name for name, parameter in online.named_parameters() if parameter.requires_grad}
    teacher = teacher_of(online)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.network(torch.randn(1, 3, 32, 32)).logits.requires_grad
    # ... and the online network still is.
    assert {name for name, parameter in online.named_parameters() if parameter.requires_grad} == trainable
    online(torch.randn(1, 3, 32, 32)).logits.sum().backward()
    teacher.update(online)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_state_dict_round_trip_continues_identically(online):
    teacher = teacher_of(online)
    perturb(online, seed=0)
    teacher.update(online)
    restored = teacher_of(build(seed=1))
    restored.load_state_dict(copy.deepcopy(teacher.state_dict()))
    perturb(online, seed=1)
    for network in (teacher, restored):
        network.update(online)
    for name, tensor in teacher.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor), name


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(3)
    weak_view = torch.randn(3, 3, 64, 64, generator=generator)
    labels = torch.tensor([[1.0, 0, 1], [0, 1, 0], [0, 0, 0]])
    valid = torch.ones(3, 64, 64, dtype=torch.bool)
    valid[0, :, 40:] = False
    return weak_view, labels, valid


FIXED = ThresholdConfig(dynamic_threshold=False)


def assert_unchanged(states, before):
    for state, kept in zip(states, before, strict=True):
        for name, value in state.state_dict().items():
            assert torch.equal(value, kept[name]), name


def test_labels_is_the_fused_maps_filtered_by_the_tags(online, batch):
    weak_view, labels, valid = batch
    online.eval()
    pseudo_labels = teacher_of(online, threshold=FIXED, spl_temperature=0.1).label(*batch)
    with torch.no_grad():
        fused = forward_multiscale(online, weak_view, SCALES, flip=True)
    tokens = valid_tokens(valid, fused.cam_logits)
    assert torch.equal(pseudo_labels.cams, normalize_cams(fused.cam_logits, labels, tokens))
    assert torch.equal(pseudo_labels.aux_cams, normalize_cams(fused.aux_cam_logits, labels, tokens))
    assert torch.equal(pseudo_labels.segmentation, segmentation_pseudo_labels(fused.seg_logits, labels, 0.1))
    assert not torch.equal(pseudo_labels.cams, pseudo_labels.aux_cams)


def test_labels_takes_guidance_and_fusion_from_where_it_is_told(online, batch):
    weak_view, labels, valid = batch
    online.eval()
    masks = torch.randint(0, 4, valid.shape, generator=torch.Generator().manual_seed(0))
    teacher = teacher_of(online, threshold=FIXED, cam_fusion="sum", guidance="gt")
    pseudo_labels = teacher.label(*batch, masks=masks)
    with torch.no_grad():
        fused = forward_multiscale(online, weak_view, SCALES, cam_fusion="sum")
    assert torch.equal(pseudo_labels.segmentation, mask_probabilities(masks, 4, fused.seg_logits.shape[-2:]))
    tokens = valid_tokens(valid, fused.cam_logits)
    assert torch.equal(pseudo_labels.cams, normalize_cams(fused.cam_logits, labels, tokens))


def test_labels_keeps_background_and_empties_absent_classes(online, batch):
    labels = batch[1]
    pseudo_labels = teacher_of(online).label(*batch)
    absent = labels == 0
    for maps in (pseudo_labels.cams, pseudo_labels.aux_cams):
        assert (maps[absent] == 0).all()
        assert (maps[~absent].amax(dim=(-2, -1)) == 1).all()
        assert (maps >= 0).all()
        assert (maps[0, :, :, 3:] == 0).all()  # padding: columns from pixel 48 on
        assert maps[0, :, :, :2].any()
    segmentation = pseudo_labels.segmentation
    assert (segmentation[:, 1:][absent] == 0).all()
    torch.testing.assert_close(segmentation.sum(dim=1), torch.ones(3, 4, 4))
    assert (segmentation[2, 0] == 1).all()
    # Background competes in tagged images too: with a flat softmax it cannot vanish.
    flat = teacher_of(online, threshold=FIXED, spl_temperature=1e3).label(*batch).segmentation
    torch.testing.assert_close(flat[0, 0], torch.full((4, 4), 1 / 3), atol=1e-2, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("backbone", ["test_vit", "test_resnet"])
def test_labels_of_the_online_network_leave_its_mode(batch, training, backbone):
    """Without swapping assignments (SA) the online network labels, in eval mode."""
    network = build(backbone).train(training)
    before = {name: module.training for name, module in network.named_modules()}
    teacher, seen = teacher_of(network, swapping_assignments=False), []
    network.register_forward_pre_hook(lambda module, _: seen.extend(m.training for m in module.modules()))
    teacher.label(*batch)
    assert seen
    assert not any(seen)
    assert {name: module.training for name, module in network.named_modules()} == before


def test_with_swapping_the_average_labels(online, batch):
    teacher = teacher_of(online, threshold=FIXED)
    kept = teacher.label(*batch)
    perturb(online, seed=0)
    assert torch.equal(teacher.label(*batch).cams, kept.cams)
    assert not torch.equal(
        teacher_of(online, threshold=FIXED, swapping_assignments=False).label(*batch).cams, kept.cams
    )


@pytest.mark.parametrize("size", [1, 2])
def test_labels_of_micro_batches_are_those_of_the_batch(online, batch, size):
    batch_labels, micro_labels = (teacher_of(online).label(*batch, batch_size=n) for n in (None, size))
    torch.testing.assert_close(micro_labels.cams, batch_labels.cams, atol=1e-5, rtol=1e-4)
    assert micro_labels.threshold == pytest.approx(batch_labels.threshold, abs=1e-4)


def test_labels_leave_no_gradient(online, batch):
    pseudo_labels = teacher_of(online.train(), swapping_assignments=False).label(*batch)
    for maps in (pseudo_labels.cams, pseudo_labels.aux_cams, pseudo_labels.segmentation):
        assert not maps.requires_grad
    assert torch.is_grad_enabled()


def test_fixed_thresholds_are_left_alone(online, batch):
    teacher = teacher_of(online, threshold=ThresholdConfig(dynamic_threshold=False, threshold=0.4))
    before = copy.deepcopy([state.state_dict() for state in teacher.thresholds])
    pseudo_labels = teacher.label(*batch)
    assert_unchanged(teacher.thresholds, before)
    assert (pseudo_labels.threshold, pseudo_labels.aux_threshold) == (0.4, 0.4)


@pytest.mark.parametrize("covariance", ["full", "tied"])  # tied counts zeros too: padding would show
def test_each_threshold_moves_by_its_own_valid_maps(online, batch, covariance):
    config = ThresholdConfig(threshold_decay=0.0, threshold_queue=4, threshold_covariance=covariance)
    teacher, expected = teacher_of(online, threshold=config), [DynamicThreshold(config) for _ in range(2)]
    pseudo_labels = teacher.label(*batch)
    tokens = valid_tokens(batch[2], pseudo_labels.cams)
    tokens[2] = False  # it has no class, and so no foreground to part from its background
    for state, maps in zip(expected, (pseudo_labels.cams, pseudo_labels.aux_cams), strict=True):
        state.update(torch.stack([maps[i, :, y, x].max() for i, y, x in tokens.nonzero().tolist()]))
    assert_unchanged(teacher.thresholds, [state.state_dict() for state in expected])
    # The batch is labelled with the threshold that has already seen it (Alg. 1 line 13 comes before 14).
    values = (pseudo_labels.threshold, pseudo_labels.aux_threshold)
    assert values == tuple(state.value for state in teacher.thresholds)
    assert len({0.5, *values}) == 3


def test_thresholds_see_the_histogram_of_all_processes(online, batch):
    calls, teacher = [], teacher_of(online)
    teacher.label(*batch, reduce=lambda value: calls.append(value.clone()) or value * 3)
    assert len(calls) == 2
    for state, call in zip(teacher.thresholds, calls, strict=True):
        torch.testing.assert_close(state.histograms.sum(dim=0), 3 * call.double())


def test_neither_thresholds_nor_the_online_network_are_in_the_state(online):
    assert all(name.startswith("network.") for name in teacher_of(online, swapping_assignments=False).state_dict())


def test_labels_of_nothing_but_padding(online, batch):
    weak_view, labels, valid = batch
    pseudo_labels = teacher_of(online).label(torch.zeros_like(weak_view), labels, torch.zeros_like(valid))
    assert (pseudo_labels.cams == 0).all()
    assert (pseudo_labels.aux_cams == 0).all()
    assert torch.isfinite(pseudo_labels.segmentation).all()
    assert (pseudo_labels.threshold, pseudo_labels.aux_threshold) == (0.5, 0.5)


def spreading(**affinity) -> CoSAForWeaklySupervisedSegmentation:
    torch.manual_seed(0)
    settings = {"backbone": "test_vit", "aux_layer": -2, "num_labels": 4, "decoder_channels": 8} | affinity
    network = CoSAForWeaklySupervisedSegmentation(CoSAConfig(**settings)).eval()
    with torch.no_grad():
        # What hardly varies would be stretched, rounding and all.
        for head in (network.classifier, network.aux_classifier, network.decoder.conv8):
            head.weight.mul_(50)
    return network


@pytest.mark.parametrize(
    "affinity",
    [
        {"affinity": "features", "affinity_layer": -3},
        {"affinity": "features", "affinity_power": 3.0, "affinity_steps": 2},
        {"affinity": "attention", "affinity_blocks": [-3, -2]},
    ],
)
@pytest.mark.parametrize("scales", [SCALES, [0.5]])
def test_cams_are_spread_before_they_become_labels(batch, affinity, scales):
    """M' and M†' alike, by the plain image at scale 1; the thresholds see them spread."""
    weak_view, labels, valid = batch[0].double(), *batch[1:]
    network = spreading(**affinity).double()
    # Soft: at the paper's tau what is all but even would go either way.
    pseudo_labels = teacher_of(network, threshold=FIXED, label_scales=scales, spl_temperature=1.0).label(
        weak_view, labels, valid
    )
    with torch.no_grad():
        fused = forward_multiscale(network, weak_view, scales)
        source = network.backbone(weak_view, affinity=True)[2].numpy()
    tokens = valid_tokens(valid, fused.cam_logits)
    if affinity["affinity"] == "attention":
        rows = reference.attention_affinity(source)
    else:
        rows = reference.feature_affinity(source, power=affinity.get("affinity_power"), valid=tokens.numpy())
    for logits, found in ((fused.cam_logits, pseudo_labels.cams), (fused.aux_cam_logits, pseudo_labels.aux_cams)):
        plain = normalize_cams(logits, labels, tokens).numpy()
        expected = reference.spread(plain, rows, affinity.get("affinity_steps", 1), tokens.numpy())
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
        assert (found[0, :, :, 3:] == 0).all()  # padding
        assert not np.allclose(found.numpy(), plain, atol=5e-4)
    probabilities = reference.segmentation_pseudo_labels(fused.seg_logits.numpy(), labels.numpy(), 1.0)[:, 1:]
    maps = reference.spread(probabilities, rows, affinity.get("affinity_steps", 1), tokens.numpy())
    background = np.full_like(maps[:, :1], pseudo_labels.threshold)  # wins where no class reaches xi
    expected = reference.segmentation_pseudo_labels(np.concatenate([background, maps], axis=1), labels.numpy(), 1.0)
    np.testing.assert_allclose(pseudo_labels.segmentation.numpy(), expected, atol=1e-6)
    expected_thresholds = [DynamicThreshold(ThresholdConfig(threshold_decay=0.0, threshold_queue=4)) for _ in range(2)]
    teacher = teacher_of(network, label_scales=scales)
    moved = teacher.label(weak_view, labels, valid)
    for state, maps in zip(expected_thresholds, (moved.cams, moved.aux_cams), strict=True):
        state.update(maps.amax(dim=1)[tokens])
    assert (moved.threshold, moved.aux_threshold) == tuple(state.value for state in expected_thresholds)


def test_spread_labels_in_parts_are_those_of_the_whole(batch):
    network = spreading(affinity="attention", affinity_blocks=[-2])
    whole, parts = (teacher_of(network, threshold=FIXED).label(*batch, batch_size=n) for n in (None, 2))
    torch.testing.assert_close(parts.cams, whole.cams, atol=1e-4, rtol=1e-3)


def test_the_affinity_is_made_once_for_all_maps(batch, monkeypatch):
    made = []
    monkeypatch.setattr(
        "cosa_hf.objective.affinity.attention_affinity", lambda *given: made.append(1) or attention_affinity(*given)
    )
    teacher_of(spreading(affinity="attention", affinity_blocks=[-2])).label(*batch)
    assert made == [1]


def test_the_affinity_is_the_averages(batch):
    """Of the network that labels, as its CAMs are."""
    network = spreading(affinity="features", affinity_layer=-3)
    teacher = teacher_of(network, threshold=FIXED)
    kept = teacher.label(*batch)
    perturb(network, seed=0)
    assert torch.equal(teacher.label(*batch).cams, kept.cams)
