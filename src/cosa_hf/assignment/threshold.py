"""The dynamic threshold (Eq. 6): two Gaussians fitted to the CAM confidences of the last batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cosa_hf.objective.precision import at_least_float32
from cosa_hf.objective.targets import Reduce, one_process
from cosa_hf.settings import Settings, setting

BINS = 512
# Confidences up to here are what min-max leaves of an inactive map. Their spike would be a Gaussian of its own and all
# else the other, so that they belong to no cluster; where both must be equally wide they are the background.
LEAST = 0.05
Covariance = Literal["full", "tied"]
Pair = Sequence[float] | np.ndarray
LOWEST: dict[Covariance, float] = {"full": LEAST, "tied": 0.0}
# Nats per value by which two Gaussians must explain the confidences better than one. A single narrow cluster gains
# 1e-4, the confidences of real CAMs a hundred to a thousand times more.
LEAST_GAIN = 1e-3
LEAST_WEIGHT = 1e-6  # of a Gaussian; below, nothing is left of it
# How far EM may be from where it goes: in both means, both log variances and the log odds of the weights together.
TOLERANCE = 1e-9
MOST_ROUNDS = 1000  # of three steps; a few are enough, but for a mixture that is hardly two clusters
FARTHEST = 40.0  # any of those, which themselves are below 16 in size


@dataclass(kw_only=True)
class ThresholdConfig(Settings):
    """The threshold that separates foreground from background in CAMs (Eq. 6). The defaults are the paper's."""

    _argument_group_name = "Threshold (Eq. 6)"

    dynamic_threshold: bool = setting(True, "DT (Eq. 6); false: stay at `threshold`")
    threshold: float = setting(0.5, "xi at the start, or throughout", above=0, below=1)
    threshold_decay: float = setting(
        0.99,
        "EMA decay of xi; 0.99 averages over about 100 steps, so use less for a run of a few hundred",
        least=0,
        below=1,
    )
    threshold_queue: int = setting(100, "batches that the mixture is fitted to", least=1)
    threshold_covariance: Covariance = setting(
        "full",
        "Gaussians of Eq. 6: full, each as wide as fits the confidences above 0.05 (paper); tied, both equally wide, "
        "fitted to all confidences (few images, clean CAMs)",
    )


class Mixture(NamedTuple):
    """Two Gaussians fitted to confidences, background first, and the value between their means that separates them.

    That value, `split`, is where pi_fg N_fg = pi_bg N_bg: the threshold of greatest likelihood for the mixture (Eq. 6).
    """

    weights: list[float]
    means: list[float]
    variances: list[float]
    split: float


class DynamicThreshold(nn.Module):
    """The value that separates foreground from background confidences, followed through training (Eq. 6).

    Keeps histograms of the last `queue` batches, fits a two-component Gaussian mixture to their sum by EM, takes the
    point between the means where both components are equally likely, and smooths it by EMA. All of it is state:
    `state_dict` restores it. Where the fit says nothing (too few values, one cluster, EM that does not
    settle) the value stays as it is.

    Attributes:
        mixture: what the last update fitted; None before the first, and where the fit said nothing.

    Args:
        config: start, decay, queue and covariance.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> threshold = DynamicThreshold(ThresholdConfig(threshold_decay=0.0))
        >>> low, high = 0.2 + 0.05 * torch.randn(5000), 0.8 + 0.05 * torch.randn(5000)
        >>> threshold.update(torch.cat([low, high]).clamp(0, 1))
        >>> round(threshold.value, 1)
        0.5
    """

    histograms: Tensor
    seen: Tensor
    current: Tensor

    def __init__(self, config: ThresholdConfig | None = None) -> None:
        super().__init__()
        config = config or ThresholdConfig()
        self.decay, self.covariance = config.threshold_decay, config.threshold_covariance
        self.mixture: Mixture | None = None
        self.register_buffer("histograms", torch.zeros(config.threshold_queue, BINS, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("current", torch.tensor(config.threshold, dtype=torch.float64))

    @property
    def value(self) -> float:
        """xi, in (0, 1)."""
        return self.current.item()

    def update(self, confidence: Tensor, reduce: Reduce = one_process) -> None:
        """Take in one batch of confidences nu = max_c M' (any shape) and move xi.

        With several processes `reduce` gives all of them the same histogram, and so the same xi.
        """
        values = at_least_float32(confidence.detach())
        if self.covariance == "full":
            values = values[values > LEAST]
        histogram = torch.histc(values, bins=BINS, min=LOWEST[self.covariance], max=1.0)
        self.histograms[self.seen % len(self.histograms)] = reduce(histogram).to(self.histograms)
        self.seen += 1
        self.mixture = fit_mixture(self.histograms.sum(dim=0), self.covariance)
        if self.mixture is not None:
            self.current.lerp_(torch.tensor(self.mixture.split, dtype=torch.float64), 1 - self.decay)


def fit_mixture(histogram: Tensor, covariance: Covariance = "full") -> Mixture | None:
    """Fit two Gaussians to a histogram by EM.

    EM on the histogram agrees with EM on the values to about the width of a bin and costs as much for a million values
    as for a thousand. Where clusters overlap each step of EM is hardly shorter than the one before, and thousands are
    needed: here every third is extrapolated (SQUAREM: Varadhan and Roland, Scand. J. Statist. 35, 2008), and only where
    that makes the values likelier.

    Args:
        histogram: counts, (BINS,), float64, from LOWEST[covariance] to 1.
        covariance: see `ThresholdConfig`.

    Returns:
        The mixture, or None where there are not two clusters to separate, or EM has not settled on them.

    Example:
        >>> low, high = 0.2 + 0.02 * torch.randn(3000), 0.8 + 0.02 * torch.randn(1000)
        >>> mixture = fit_mixture(torch.histc(torch.cat([low, high]), BINS, LEAST, 1.0).double())
        >>> [round(weight, 2) for weight in mixture.weights], [round(mean, 1) for mean in mixture.means]
        ([0.75, 0.25], [0.2, 0.8])
    """
    # In NumPy, whose small operations take a fraction of torch's time: there are hundreds of them in a fit.
    counts = histogram.double().cpu().numpy()
    if counts.sum() < 2:
        return None
    mass = counts / counts.sum()
    lowest = LOWEST[covariance]
    width = (1.0 - lowest) / BINS
    powers = np.vander(lowest + width * (np.arange(BINS) + 0.5), 3, increasing=True).T  # 1, x, x^2 of each bin
    least = width**2 / 12  # nothing is narrower than the bin that it was counted in
    _, mean, square = total = powers @ mass

    def maximize(high: np.ndarray) -> np.ndarray | None:
        """Parameters of greatest likelihood, where `high` is the share of each bin that is foreground."""
        upper = powers @ (mass * high)
        weights, sums, squares = np.stack([total - upper, upper], axis=1)
        if not weights.min() > LEAST_WEIGHT:
            return None
        means = sums / weights
        variances = squares / weights - means**2
        if covariance == "tied":
            variances = np.full(2, weights @ variances)
        return np.concatenate([np.log(weights[1:] / weights[:1]), means, np.log(variances.clip(least))])

    def step(parameters: np.ndarray) -> np.ndarray | None:
        return maximize((1 + np.tanh(_log_odds(*_unpacked(parameters)) @ powers / 2)) / 2)

    def likelihood(parameters: np.ndarray) -> float:
        """Mean log density of the values."""
        weights, means, variances = _unpacked(parameters)
        lower = _log_density(powers[1], weights[0], means[0], variances[0])
        return mass @ (lower + np.logaddexp(0, _log_odds(weights, means, variances) @ powers))

    # Start from the halves on either side of the mean, as two-means would.
    parameters = maximize((powers[1] > mean).astype(float))
    for _ in range(MOST_ROUNDS):
        if parameters is None or (first := step(parameters)) is None or (second := step(first)) is None:
            return None
        moved = first - parameters
        turned = second - first - moved
        length, change = np.linalg.norm(moved), np.linalg.norm(turned)
        if length * length <= TOLERANCE * change:  # all steps that are left, if each is shorter by as much as this one
            break
        ahead = length / max(change, np.finfo(float).tiny)
        jump = parameters + 2 * ahead * moved + ahead**2 * turned
        safe = ahead > 1 and np.abs(jump).max() < FARTHEST and likelihood(jump) >= likelihood(first)
        jumped = step(jump) if safe else None
        parameters = second if jumped is None else jumped
    else:
        return None

    # EM cuts even a single Gaussian in two; only a mixture that explains the values better separates anything.
    one = _log_density(powers[1], 1.0, mean, max(square - mean**2, least))
    if likelihood(second) - mass @ one < LEAST_GAIN:
        return None
    weights, means, variances = _unpacked(second)
    order = means.argsort()  # a component much wider than the other may end up on its other side
    fitted = weights[order].tolist(), means[order].tolist(), variances[order].tolist()
    split = _crossing(*fitted)
    return None if split is None else Mixture(*fitted, split)


def _unpacked(parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights, means and variances of (log odds of the weights, both means, both log variances)."""
    high = 1 / (1 + math.exp(-parameters[0]))
    return np.array([1 - high, high]), parameters[1:3], np.exp(parameters[3:])


def _log_density(x: np.ndarray, weight: float, mean: float, variance: float) -> np.ndarray:
    """log(pi N(x)), up to the constant that all Gaussians share."""
    return np.log(weight) - 0.5 * np.log(variance) - 0.5 * (x - mean) ** 2 / variance


def _log_odds(weights: Pair, means: Pair, variances: Pair) -> np.ndarray:
    """log(pi_1 N_1) - log(pi_0 N_0) is a quadratic: its coefficients of 1, x and x^2."""
    (w0, w1), (m0, m1), (v0, v1) = weights, means, variances
    constant = 0.5 * m0 * m0 / v0 - 0.5 * m1 * m1 / v1 + math.log(w1 / w0) - 0.5 * math.log(v1 / v0)
    return np.array([constant, m1 / v1 - m0 / v0, 0.5 / v0 - 0.5 / v1])


def _crossing(weights: Pair, means: Pair, variances: Pair) -> float | None:
    """Where the log odds are 0 between the means."""
    c, b, a = _log_odds(weights, means, variances).tolist()
    low, high = sorted(means)
    if abs(a) < 1e-12:
        roots = [-c / b] if b else []
    else:
        discriminant = b * b - 4 * a * c
        if discriminant < 0:
            return None
        # The numerically safe pair: never subtract two numbers of like size.
        q = -0.5 * (b + math.copysign(math.sqrt(discriminant), b))
        roots = [q / a] + ([c / q] if q else [])
    between = [root for root in roots if low < root < high]
    return between[0] if between else None
