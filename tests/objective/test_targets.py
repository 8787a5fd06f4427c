"""Targets are normalised once a step, over its micro-batches and processes, so that sums are the paper's means."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import reference
import torch
from batches import GRID, SIZE, B, make_batch
from hypothesis import given
from hypothesis import strategies as st

from cosa_hf.objective.overall import CoSAObjective, mask_targets
from cosa_hf.objective.pseudo_labels import PseudoLabels, normalize_cams, segmentation_pseudo_labels
from cosa_hf.objective.targets import Targets, anchors, normalized

IMAGES = 8


def as_processes(count, task):
    """`task(rank, reduce)` on as many threads; `reduce` waits, as a collective does, until all have called it."""
    slots, barrier = [None] * count, threading.Barrier(count, timeout=20)

    def start(rank):
        def reduce(value):
            slots[rank] = value.detach().clone()
            barrier.wait()
            mean = torch.stack(slots).mean(dim=0)
            barrier.wait()
            return mean

        try:
            return task(rank, reduce)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(start, range(count)))


def images_of(pseudo_labels, part):
    maps = (pseudo_labels.cams, pseudo_labels.aux_cams, pseudo_labels.segmentation)
    return PseudoLabels(*(value[part] for value in maps), pseudo_labels.threshold, pseudo_labels.aux_threshold)


CASES = [
    "random",
    "one process all padding",
    "one process without class",
    "one valid token",
    "all padding",
    "no anchors",
]
OBJECTIVES = {
    "paper": CoSAObjective(),
    "release": CoSAObjective(reliability_weighting=False, balanced=True, background_threshold=0.2),
    "balanced by reliability": CoSAObjective(balanced=True),
    "coarse": CoSAObjective(supervision_stride=2),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 1), (1, 4), (2, 2), (4, 1)])
def test_a_step_is_the_same_however_its_images_are_shared_out(processes, micro_batches, case, objective):
    outputs, labels, valid, pseudo_labels = make_batch(seed=7, batch=IMAGES, dtype=torch.float64)
    share = slice(0, IMAGES // processes // micro_batches)
    if case == "one process all padding":
        valid[share] = False
    elif case == "one process without class":
        labels[share] = 0
        for maps in (pseudo_labels.cams, pseudo_labels.aux_cams):
            maps[share] = 0
    elif case == "one valid token":
        valid[:] = False
        valid[0, : SIZE[0] // GRID[0], : SIZE[1] // GRID[1]] = True
    elif case == "all padding":
        valid[:] = False
    elif case == "no anchors":
        pseudo_labels.aux_cams[:] = pseudo_labels.aux_threshold
    whole = objective(outputs, labels, objective.targets(pseudo_labels, valid))

    def losses_of(rank, reduce):
        part = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
        targets = objective.targets(images_of(pseudo_labels, part), valid[part], micro_batches, reduce)
        losses = []
        for start in range(0, IMAGES // processes, IMAGES // processes // micro_batches):
            micro = slice(start, start + IMAGES // processes // micro_batches)
            online = SimpleNamespace(**{name: logits[part][micro] for name, logits in vars(outputs).items()})
            losses.append(objective(online, labels[part][micro], Targets(*(values[micro] for values in targets))))
        return losses

    parts = [losses for rank in as_processes(processes, losses_of) for losses in rank]
    assert len(parts) == processes * micro_batches
    inputs = list(vars(outputs).values())
    for name, value in whole.items():
        average = torch.stack([losses[name] for losses in parts]).mean()
        torch.testing.assert_close(average, value, rtol=1e-6, atol=1e-9, msg=name)
        gradients = (torch.autograd.grad(v, inputs, allow_unused=True, retain_graph=True) for v in (average, value))
        for actual, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("scope", ["image", "batch"])
def test_a_true_negative_is_background_for_both_and_no_business_of_the_contrast(scope):
    """No class in the labels, though the networks are sure of some everywhere."""
    _, _, valid, pseudo_labels = make_batch(seed=1, batch=3)
    logits = torch.full((1, 3, *GRID), 5.0)
    none = torch.zeros(1, 3)
    pseudo_labels.cams[1:2] = pseudo_labels.aux_cams[1:2] = normalize_cams(logits, none)
    seg_logits = torch.cat([-logits[:, :1], logits], dim=1)
    pseudo_labels.segmentation[1:2] = segmentation_pseudo_labels(seg_logits, none)
    targets = CoSAObjective(separation_scope=scope).targets(pseudo_labels, valid)
    assert (targets.cpl[1] == 0).all()
    assert (targets.aux_cpl[1] == 0).all()
    assert (targets.cpl_weights[1][valid[1]] == targets.cpl_weights.max()).all()  # nothing is surer
    assert (targets.spl[1, 0] == 1).all()
    assert (targets.spl_weights[1] > 0).any()
    assert (targets.members[1] == -1).all()
    assert not targets.anchor_weights[1].any()
    assert targets.anchor_weights[[0, 2]].any()


@pytest.mark.parametrize("raw", [True, False])
def test_weights_of_cam2seg_are_the_references_shares(raw):
    _, _, valid, pseudo_labels = make_batch(seed=1)
    targets = CoSAObjective(reliability_weighting=raw).targets(pseudo_labels, valid)
    tokens = reference.valid_tokens(valid.numpy(), GRID)
    cams, reached = reference.upsample_valid(pseudo_labels.cams.double().numpy(), tokens, SIZE)
    known = valid.numpy() & reached
    weights = known / known.sum()
    if raw:
        nu = cams.max(axis=1)
        weights = weights * reference.reliability_weights(reference.perplexity(nu, pseudo_labels.threshold), known)
    np.testing.assert_allclose(targets.cpl_weights, weights, rtol=1e-4, atol=1e-8)
    assert targets.cpl_weights.sum().item() == pytest.approx(1, rel=1e-5)
    expected = reference.cam_pseudo_labels(cams, pseudo_labels.threshold)
    assert (targets.cpl.numpy() == np.where(known, expected, 0)).all()


def test_what_is_between_the_two_thresholds_weighs_nothing():
    _, _, valid, pseudo_labels = make_batch(threshold=0.6)
    pseudo_labels.cams[0] = 0.45
    objective = CoSAObjective(background_threshold=0.4, reliability_weighting=False)
    weights = objective.targets(pseudo_labels, valid).cpl_weights
    assert not weights[0].any()
    assert weights[1].sum().item() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("present", [(0, 0, 1, 2), (0, 0, 0, 0), (2, 1, 1, 255), (255,) * 4])
def test_balanced_is_half_background_and_half_foreground(present):
    """A half that is not there leaves the other its half."""
    objective = CoSAObjective(reliability_weighting=False, balanced=True, background_threshold=0.2)
    cams = torch.zeros(1, 2, 2, 2)
    for position, index in enumerate(present):
        cams.view(2, 4)[:, position] = 0.3 if index == 255 else 0
        if index in (1, 2):
            cams.view(2, 4)[index - 1, position] = 1
    labels = PseudoLabels(cams, cams, torch.zeros(1, 3, 2, 2), threshold=0.5, aux_threshold=0.5)
    targets = objective.targets(labels, torch.ones(1, 2, 2, dtype=torch.bool))
    ids, weights = targets.cpl.flatten(), targets.cpl_weights.flatten()
    assert [weights[position].item() > 0 for position in range(4)] == [index != 255 for index in present]
    for half, there in ((ids == 0, 0 in present), (ids > 0, {1, 2} & set(present))):
        assert weights[half].sum().item() == pytest.approx(0.5 if there else 0)


@given(st.data(), st.sampled_from(["image", "batch"]))
def test_anchors_have_positives_and_negatives(data, scope):
    members = data.draw(hnp.arrays(np.int64, (2, 2, 3), elements=st.integers(-1, 3)))
    groups = members.reshape(2, -1) if scope == "image" else members.reshape(1, -1)
    expected = [
        [label >= 0 and (group == label).sum() > 1 and ((group >= 0) & (group != label)).any() for label in group]
        for group in groups
    ]
    assert anchors(torch.tensor(members), scope).flatten().tolist() == np.concatenate(expected).tolist()


def test_one_reduction_a_step():
    _, _, valid, pseudo_labels = make_batch()
    calls = []
    CoSAObjective(balanced=True).targets(pseudo_labels, valid, reduce=lambda value: calls.append(value) or value)
    mask_targets(torch.zeros(B, 4, 4, dtype=torch.long), 255, reduce=lambda value: calls.append(value) or value)
    assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_to_normalise_stays_zero(dtype):
    (weights,) = normalized([torch.zeros(3, dtype=dtype)])
    assert weights.tolist() == [0, 0, 0]


@pytest.mark.parametrize("ignored", [255, -1])
def test_ground_truth_weighs_all_known_pixels_alike(ignored):
    masks = np.random.default_rng(1).choice([0, 1, 2, 3, ignored], (2, 8, 7))
    targets = mask_targets(torch.tensor(masks), ignore_index=ignored)
    known = masks != ignored
    np.testing.assert_allclose(targets.cpl_weights, known / known.sum(), rtol=1e-6)
    assert (targets.cpl.numpy()[known] == masks[known]).all()
    assert not any(weights.any() for weights in (targets.aux_cpl_weights, targets.spl_weights, targets.anchor_weights))
