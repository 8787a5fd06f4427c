from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.mixture import GaussianMixture

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.assignment import threshold as threshold_module
from cosa_hf.assignment.threshold import BINS, LEAST, DynamicThreshold, ThresholdConfig, fit_mixture
from cosa_hf.data import load_voc, multi_hot, read_image, undecoded
from cosa_hf.objective.pseudo_labels import normalize_cams

SHARED = Path(__file__).resolve().parents[2] / "../shared"
LITE0 = SHARED / "weights/tf_efficientnet_lite0.in1k.fp16.safetensors"
VOC = SHARED / "data/VOC2012"


def following(**settings) -> DynamicThreshold:
    """A threshold with settings by their names after `threshold_`; `start` is `threshold` itself."""
    names = {"start": "threshold"}
    return DynamicThreshold(
        ThresholdConfig(**{names.get(name, f"threshold_{name}"): value for name, value in settings.items()})
    )


def draw(seed, weight=0.5, low=(0.2, 0.05), high=(0.8, 0.05), size=4000) -> torch.Tensor:
    """Values of a mixture; `weight` is the low component's."""
    rng = np.random.default_rng(seed)
    from_low = rng.random(size) < weight
    values = np.where(from_low, rng.normal(*low, size), rng.normal(*high, size))
    return torch.tensor(values[(values > LEAST) & (values <= 1)], dtype=torch.float32)


def histogram(values: torch.Tensor) -> torch.Tensor:
    return torch.tensor(np.histogram(values.double().numpy(), bins=BINS, range=(LEAST, 1))[0], dtype=torch.float64)


def reference_fit(values: np.ndarray, covariance: str = "full") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's weights, means and variances, the background first."""
    mixture = GaussianMixture(2, covariance_type=covariance, tol=1e-11, max_iter=20_000, random_state=0)
    mixture.fit(values.astype(np.float64)[:, None])
    order = mixture.means_[:, 0].argsort()
    variances = np.broadcast_to(mixture.covariances_.reshape(-1), 2)
    return mixture.weights_[order], mixture.means_[order, 0], variances[order]


def assert_is_the_best_split(split: float, values: np.ndarray, covariance: str = "full") -> None:
    """No threshold explains the values better (Eq. 6), for the mixture that scikit-learn fits to them.

    Two thresholds with no value between them are equally good: what is compared is their likelihood, and on how many
    values they disagree.
    """
    values = values.astype(np.float64)
    fit = reference_fit(values, covariance)
    best = reference.best_split(values, *fit)
    assert fit[1][0] < split < fit[1][1]
    assert reference.split_likelihood(values, split, *fit) >= reference.split_likelihood(values, best, *fit) - 1e-4
    assert ((values >= split) != (values >= best)).mean() <= 5e-3


MIXTURES = {
    "even": (0.5, (0.2, 0.05), (0.8, 0.05)),
    "mostly background": (0.85, (0.2, 0.06), (0.7, 0.1)),
    "mostly foreground": (0.15, (0.3, 0.05), (0.8, 0.07)),
    "unequal widths": (0.6, (0.25, 0.03), (0.7, 0.12)),
    "cut off at the lower bound and at one": (0.6, (0.1, 0.05), (0.9, 0.08)),
    "close": (0.5, (0.4, 0.07), (0.65, 0.06)),
    "narrow": (0.5, (0.3, 0.004), (0.7, 0.004)),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_fit_agrees_with_scikit_learn(name):
    weight, low, high = MIXTURES[name]
    values = draw(0, weight, low, high, size=20_000)
    mixture = fit_mixture(histogram(values))
    _, means, variances = reference_fit(values.numpy())
    # A bin is 1.9e-3 wide.
    np.testing.assert_allclose(mixture.means, means, atol=1e-3)
    np.testing.assert_allclose(np.sqrt(mixture.variances), np.sqrt(variances), atol=1e-3)
    assert_is_the_best_split(mixture.split, values.numpy())


OVERLAPPING = {
    "a narrow one in the tail": (0.9, (0.32, 0.13), (0.62, 0.06)),
    "equal widths": (0.24, (0.32, 0.14), (0.6, 0.14)),
    "mostly foreground": (0.12, (0.3, 0.09), (0.65, 0.16)),
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_fit_of_overlapping_clusters_goes_all_the_way(name, monkeypatch):
    """Plain EM needs hundreds of steps here, and is 0.07 to 0.09 from the split where two hundred end."""
    monkeypatch.setattr(threshold_module, "MOST_ROUNDS", 300)  # without a jump ahead they would take 370 and more
    values = draw(0, *OVERLAPPING[name])
    mixture = fit_mixture(histogram(values))
    fit = reference_fit(values.numpy())
    np.testing.assert_allclose(mixture.means, fit[1], atol=1e-3)
    assert mixture.split == pytest.approx(threshold_module._crossing(*fit), abs=1e-3)
    assert_is_the_best_split(mixture.split, values.numpy())


@pytest.mark.parametrize("covariance", ["full", "tied"])
def test_a_fit_is_where_em_stands_still(covariance):
    """A thousand plain steps of EM from it lead nowhere else."""
    counts = histogram(draw(0, *OVERLAPPING["equal widths"]))
    weights, means, variances, _ = fit_mixture(counts, covariance)
    lowest = threshold_module.LOWEST[covariance]
    x, p = lowest + (np.arange(BINS) + 0.5) * (1 - lowest) / BINS, counts.numpy() / counts.sum().item()
    expected = weights, means, variances
    for _ in range(1000):
        densities = [w / np.sqrt(v) * np.exp(-((x - m) ** 2) / v / 2) for w, m, v in zip(*expected, strict=True)]
        share = p * densities / np.sum(densities, axis=0)
        weight = share.sum(axis=1)
        mean = share @ x / weight
        variance = (share * (x - mean[:, None]) ** 2).sum(axis=1) / weight
        expected = weight, mean, variance if covariance == "full" else np.full(2, weight @ variance)
    for value, after in zip((weights, means, variances), expected, strict=True):
        np.testing.assert_allclose(value, after, atol=1e-8)


def test_a_fit_that_does_not_settle_keeps_the_value(monkeypatch):
    monkeypatch.setattr(threshold_module, "MOST_ROUNDS", 2)
    threshold = following(start=0.5, decay=0.0)
    threshold.update(draw(0, *OVERLAPPING["equal widths"]))
    assert threshold.value == 0.5
    assert threshold.mixture is None


@st.composite
def mixtures(draw_value):
    """Two Gaussians whose means lie three to five times their summed widths apart, of any weights and widths."""
    widths = [draw_value(st.floats(0.015, 0.08)) for _ in range(2)]
    low = draw_value(st.floats(0.12, 0.5))
    high = low + draw_value(st.floats(3, 5)) * sum(widths)
    assume(high <= 0.95)
    return draw_value(st.floats(0.1, 0.9)), (low, widths[0]), (high, widths[1])


@given(mixtures(), st.integers(0, 100))
@settings(max_examples=40)
def test_split_is_the_best_of_drawn_mixtures(mixture, seed):
    values = draw(seed, *mixture)
    threshold = following(decay=0.0)
    threshold.update(values)
    assert_is_the_best_split(threshold.value, values.numpy())


@pytest.fixture(scope="module")
def real_confidences() -> torch.Tensor:
    """nu of 48 photos: CAMs of an ImageNet network whose classifier is the least-squares fit of their own tags."""
    if not (LITE0.exists() and VOC.exists()):
        pytest.skip("needs the shared weights and images")
    dataset = load_voc(VOC, "val").select(range(48))
    config = CoSAConfig(backbone="tf_efficientnet_lite0", aux_layer=-2, num_labels=21)
    backbone = CoSAForWeaklySupervisedSegmentation.from_pretrained_backbone(config, LITE0).eval().backbone
    processor = CoSAImageProcessor(
        size={"height": 224, "width": 224},
        image_mean=list(backbone.data_config["mean"]),
        image_std=list(backbone.data_config["std"]),
    )
    images = processor([read_image(row) for row in undecoded(dataset)], return_tensors="pt")["pixel_values"]
    labels = torch.stack([multi_hot(tags, 20) for tags in dataset["labels"]])
    with torch.no_grad():
        features = torch.cat([backbone(batch)[0] for batch in images.split(8)])
    pooled = features.amax(dim=(2, 3))
    weight = torch.linalg.solve(
        pooled.T @ pooled + pooled.square().mean() * torch.eye(pooled.shape[1]), pooled.T @ labels
    )
    return normalize_cams(torch.einsum("bdhw,dc->bchw", features, weight), labels).amax(dim=1)


def test_split_is_the_best_of_real_cam_values(real_confidences):
    threshold = following(decay=0.0)
    for batch in real_confidences.split(8):
        threshold.update(batch)
    values = real_confidences[real_confidences > LEAST].numpy()
    assert len(values) > 2000
    assert_is_the_best_split(threshold.value, values)
    assert threshold.value == pytest.approx(reference.best_split(values, *reference_fit(values)), abs=2e-3)


@pytest.mark.parametrize("cut", [0.0, 0.4])
def test_tied_split_is_the_best_of_real_cam_values(real_confidences, cut):
    """As they are, and with nearly half of them at zero, as in CAMs that were guided."""
    confidences = (real_confidences - cut).relu() / (1 - cut)
    threshold = following(decay=0.0, covariance="tied")
    for batch in confidences.split(8):
        threshold.update(batch)
    values = confidences.flatten().numpy()
    assert_is_the_best_split(threshold.value, values, "tied")
    assert threshold.value == pytest.approx(reference.best_split(values, *reference_fit(values, "tied")), abs=2e-3)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_tied_gaussians_find_the_border_of_what_stands_on_an_empty_ground(share, seed):
    """Clean CAMs: zero but for the objects, which rise from nothing to one."""
    objects = torch.rand(int(20_000 * share), generator=torch.Generator().manual_seed(seed))
    values = torch.cat([torch.zeros(int(20_000 * (1 - share))), objects])
    tied = following(decay=0.0, covariance="tied")
    tied.update(values)
    assert_is_the_best_split(tied.value, values.numpy(), "tied")
    assert 0.3 < tied.value < 0.5


def spikes(counts: dict[int, int]) -> torch.Tensor:
    """A histogram with nothing but these bins."""
    return torch.tensor([counts.get(number, 0) for number in range(BINS)], dtype=torch.float64)


def test_nothing_is_narrower_than_the_bin_it_was_counted_in():
    mixture = fit_mixture(spikes({100: 3, 400: 1}))
    assert mixture.weights == pytest.approx([0.75, 0.25])
    assert mixture.variances == pytest.approx([2.869e-7, 2.869e-7], rel=1e-3)


def test_background_comes_first_where_em_has_swapped_the_components():
    """A spike inside a wide component, whose mean it overtakes."""
    mixture = fit_mixture(spikes({50: 2, 100: 3, 150: 7, 250: 2}))
    assert mixture.means == pytest.approx([0.2896, 0.3292], abs=1e-4)
    assert mixture.weights == pytest.approx([0.5018, 0.4982], abs=1e-4)
    assert mixture.variances == pytest.approx([2.171e-2, 2.869e-7], rel=1e-3)
    assert mixture.split == pytest.approx(0.3274, abs=1e-4)


def test_inactive_pixels_belong_to_no_cluster():
    """Without the lower bound, the zeros of empty maps would be the background."""
    values = draw(1)
    with_zeros = torch.cat([values, torch.zeros(50_000), torch.full((50_000,), LEAST * 0.9)])
    one, other = following(decay=0.0), following(decay=0.0)
    one.update(values)
    other.update(with_zeros)
    assert one.value == other.value


DEGENERATE = {
    "empty": torch.zeros(0),
    "empty maps": torch.zeros(0, 4, 4),
    "zeros": torch.zeros(100),
    "at the lower bound": torch.full((100,), LEAST),
    "one value": torch.tensor([0.7]),
    "constant": torch.full((100,), 0.3),
    "all ones": torch.ones(2, 8, 8),
    "ones and zeros": torch.cat([torch.ones(50), torch.zeros(50)]),
    "NaN": torch.full((100,), torch.nan),
    "one narrow cluster": draw(2, 1.0, (0.6, 1e-4), size=5000),
}


@pytest.mark.parametrize("name", DEGENERATE)
@pytest.mark.parametrize("start", [0.5, 0.31])
def test_degenerate_input_keeps_the_value(name, start):
    threshold = following(start=start, decay=0.5)
    for _ in range(3):
        threshold.update(DEGENERATE[name])
        assert threshold.value == start


@pytest.mark.parametrize("mean", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("width", [0.02, 0.06])
def test_one_cluster_keeps_the_value(mean, width):
    """A single Gaussian has no two clusters to part, though EM can always cut it into two."""
    threshold = following(start=0.5, decay=0.5)
    threshold.update(draw(3, 1.0, (mean, width), size=20_000))
    assert threshold.value == 0.5


@pytest.mark.parametrize("name", DEGENERATE)
def test_value_goes_on_after_degenerate_input(name):
    if name in ("constant", "all ones", "ones and zeros", "one narrow cluster", "one value"):
        pytest.skip("those values stay in the queue and count")
    threshold, untouched = following(decay=0.0), following(decay=0.0)
    threshold.update(DEGENERATE[name])
    for state in (threshold, untouched):
        state.update(draw(4))
    assert threshold.value == untouched.value != 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_adversarial_input_stays_inside_the_unit_interval(dtype):
    generator = torch.Generator().manual_seed(0)
    threshold = following(decay=0.0, queue=2)
    extremes = [
        torch.tensor([0.0, 1.0] * 50),
        torch.tensor([0.051] * 99 + [1.0]),
        torch.tensor([0.06, 0.0605, 0.061]),
        torch.tensor([0.999, 1.0]),
        torch.rand(1000, generator=generator),
        torch.rand(1000, generator=generator) ** 8,
        1 - torch.rand(1000, generator=generator) ** 8,
        torch.tensor([0.5, torch.nan, torch.inf, -torch.inf, 2.0, 0.9]),
    ]
    for values in extremes * 2:
        threshold.update(values.to(dtype))
        assert 0 < threshold.value < 1


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
def test_ema_decay_is_exact(decay):
    threshold, expected, total = (
        following(start=0.4, decay=decay),
        0.4,
        torch.zeros(BINS, dtype=torch.float64),
    )
    for step in range(4):
        values = draw(step, weight=0.3 + 0.1 * step)
        threshold.update(values)
        total += torch.histc(values, bins=BINS, min=LEAST, max=1.0).double()
        expected = decay * expected + (1 - decay) * fit_mixture(total).split
        assert threshold.value == pytest.approx(expected, abs=1e-12)


def test_queue_forgets_the_oldest_batches():
    early, late = draw(0, low=(0.1, 0.03), high=(0.4, 0.03)), draw(1, low=(0.6, 0.03), high=(0.9, 0.03))
    threshold, fresh = following(decay=0.0, queue=3), following(decay=0.0, queue=3)
    for _ in range(5):
        threshold.update(early)
    for step in range(4):
        threshold.update(late)
        fresh.update(late)
        # What was seen early counts until three late batches have pushed it out.
        assert (threshold.value == fresh.value) == (step >= 2)


def test_queue_remembers_all_its_batches():
    """One batch of background and one of foreground: together they are two clusters."""
    threshold = following(decay=0.0, queue=2)
    threshold.update(torch.full((50,), 0.3))
    assert threshold.value == 0.5
    threshold.update(torch.full((50,), 0.6))
    assert threshold.value == pytest.approx(0.45, abs=0.01)


def test_state_dict_round_trip_continues_identically():
    original = following(start=0.3, decay=0.9, queue=3)
    for step in range(4):
        original.update(draw(step, weight=0.2 + 0.1 * step))
    restored = following(start=0.7, decay=0.9, queue=3)
    restored.load_state_dict({name: value.clone() for name, value in original.state_dict().items()})
    assert restored.value == original.value
    for step in range(4, 8):
        for state in (original, restored):
            state.update(draw(step, weight=0.9 - 0.1 * step))
        assert restored.value == original.value


def test_processes_agree_on_the_value_of_all_their_pixels():
    shares = [draw(0, 0.9), draw(1, 0.2, (0.3, 0.05), (0.7, 0.1), size=1500)]
    histograms = []
    for share in shares:
        following().update(share, lambda value: histograms.append(value.double()) or value)
    values = []
    for share in shares:
        threshold = following(decay=0.5)
        threshold.update(share, lambda _: torch.stack(histograms).mean(dim=0))
        values.append(threshold.value)
    joined = following(decay=0.5)
    joined.update(torch.cat(shares))
    assert values[0] == values[1]
    assert values[0] == pytest.approx(joined.value, abs=1e-6)


def test_confidence_with_a_graph_is_taken_without_it():
    confidence = draw(0).requires_grad_()
    threshold = following(decay=0.0)
    threshold.update(confidence)
    assert not any(buffer.requires_grad for buffer in threshold.buffers())
    assert confidence.grad is None


def test_nothing_of_it_is_trained():
    assert list(following().parameters()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"start": 0.0}, "0.0"),
        ({"start": 1.0}, "1.0"),
        ({"start": -0.5}, "-0.5"),
        ({"start": float("nan")}, "nan"),
        ({"decay": 1.0}, "1.0"),
        ({"decay": -0.1}, "-0.1"),
        ({"queue": 0}, "0"),
        ({"covariance": "diag"}, "full, tied, got 'diag'"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, named):
    with pytest.raises(ValueError, match=named):
        following(**arguments)
