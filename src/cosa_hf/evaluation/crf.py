"""A fully connected CRF after the segmentation: pixels alike in colour and place should get the same class.

An option, never the default: the paper reports its own results without one, and 0.2 points more with one (Tab. 6a).
"""

import importlib.util
import itertools
import math
import operator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

__all__ = ["DenseCRF"]


def _installed_backend() -> Literal["pydensecrf", "torch"]:
    return "pydensecrf" if importlib.util.find_spec("pydensecrf") else "torch"


@dataclass(frozen=True)
class DenseCRF:
    """Mean-field inference in a CRF that connects every two pixels (Krähenbühl and Koltun, NeurIPS 2011).

    The energy has the segmentation's -log softmax for each pixel and, for each pair that gets two classes, a Gaussian
    of its distance in place and one of its distance in place and colour. The paper gives no parameters; the defaults
    are those of the released DeepLab-v2 with ResNet-101 (Chen et al., TPAMI 2018, the paper's [10]), which most of the
    methods that the paper compares with use too. They are for photographs of some 500 pixels. A much smaller image is
    taken for one of those that was made smaller: closeness in place and colour shrinks with it.

    Both backends filter on the permutohedral lattice (Adams et al., Eurographics 2010), which approximates the
    Gaussians; time grows with the number of pixels and of classes and not with the square of it. They differ by
    rounding.

    Attributes:
        iterations: of the mean field.
        spatial_weight: what a pair that is close counts for.
        spatial_sigma: width of closeness, pixels.
        bilateral_weight: what a pair that is close and alike counts for.
        bilateral_sigma_xy: width of that closeness, pixels of an image of `min_pixels` or more.
        bilateral_sigma_rgb: width of likeness, steps of 0..255.
        min_pixels: in an image of fewer, `bilateral_sigma_xy` is less, as the sides are; 0: never.
        backend: "pydensecrf", compiled, by the extra `crf`; "torch", without it and on the device of the logits. The
            former where it is installed.

    Raises:
        ValueError: unknown backend.
        ModuleNotFoundError: the backend is not installed; raised when called.

    Example:
        >>> image = Image.new("RGB", (8, 8), "white")
        >>> image.paste("black", (0, 0, 3, 8))
        >>> logits = torch.zeros(2, 8, 8)
        >>> logits[1, :, :4] = 1  # one column too wide
        >>> logits[0, :, 4:] = 1
        >>> DenseCRF(backend="torch")(logits, image).argmax(0)[0]
        tensor([1, 1, 1, 0, 0, 0, 0, 0])
    """

    iterations: int = 10
    spatial_weight: float = 3.0
    spatial_sigma: float = 1.0
    bilateral_weight: float = 4.0
    bilateral_sigma_xy: float = 67.0
    bilateral_sigma_rgb: float = 3.0
    min_pixels: int = 100_000
    backend: Literal["pydensecrf", "torch"] = field(default_factory=_installed_backend)

    def __post_init__(self) -> None:
        if self.backend not in ("pydensecrf", "torch"):
            raise ValueError(f"unknown backend {self.backend!r} of the CRF; known: pydensecrf, torch")

    @torch.no_grad()
    def __call__(self, logits: Tensor, image: Image.Image) -> Tensor:
        """The classes' probabilities after inference.

        Args:
            logits: (K, H, W) of the classes that are possible, at the size of the image.
            image: RGB, H x W.

        Returns:
            (K, H, W) float32, sum 1 over the classes, on the device of the logits.

        Raises:
            ValueError: the sizes differ.
        """
        if logits.shape[1:] != (image.height, image.width):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for an image of {image.height} x {image.width}")
        log_probabilities = logits.float().log_softmax(dim=0)
        if self.backend == "pydensecrf":
            return self._compiled(log_probabilities, image).to(logits.device)
        pixels = torch.from_numpy(np.array(image)).to(logits.device).flatten(0, 1).float()  # (N, 3)
        sides = (torch.arange(side, device=logits.device).float() for side in logits.shape[1:])
        places = torch.cartesian_prod(*sides).flip(1)  # (N, 2), x first
        kernels = (
            (self.spatial_weight, _Gaussian(places / self.spatial_sigma)),
            (
                self.bilateral_weight,
                _Gaussian(torch.cat([places / self._width(image), pixels / self.bilateral_sigma_rgb], dim=1)),
            ),
        )
        unary = log_probabilities.flatten(1).T.contiguous()  # (N, K)
        beliefs = unary.exp()
        for _ in range(self.iterations):
            energy = unary.clone()
            for weight, kernel in kernels:
                energy.add_(kernel(beliefs), alpha=weight)
            torch.softmax(energy, dim=1, out=beliefs)
        return beliefs.T.view(logits.shape)

    def _width(self, image: Image.Image) -> float:
        """Of closeness in place and colour, in this image's pixels."""
        shrunk = math.sqrt(image.width * image.height / self.min_pixels) if self.min_pixels else 1.0
        return self.bilateral_sigma_xy * min(1.0, shrunk)

    def _compiled(self, log_probabilities: Tensor, image: Image.Image) -> Tensor:
        from pydensecrf.densecrf import DenseCRF2D

        crf = DenseCRF2D(image.width, image.height, len(log_probabilities))
        crf.setUnaryEnergy(-log_probabilities.flatten(1).cpu().numpy())
        crf.addPairwiseGaussian(sxy=self.spatial_sigma, compat=self.spatial_weight)
        crf.addPairwiseBilateral(
            sxy=self._width(image),
            srgb=self.bilateral_sigma_rgb,
            rgbim=np.array(image),
            compat=self.bilateral_weight,
        )
        beliefs = np.asarray(crf.inference(self.iterations), dtype=np.float32)
        return torch.from_numpy(beliefs).reshape(log_probabilities.shape)


class _Gaussian:
    """Sums over all points, weighted by the Gaussian of their distance: D^-1/2 W D^-1/2 V, D the row sums of W.

    W_ij = exp(-|f_i - f_j|^2 / 2) is approximated on the permutohedral lattice: each point's values are dealt to the
    d + 1 corners of its simplex, the corners are blurred along each lattice direction, and the points read their
    corners. Names follow Adams et al., Sec. 3.
    """

    def __init__(self, features: Tensor):
        """Features (N, d), in units of the Gaussian's width."""
        self.corners, self.shares = _simplices(features)
        codes, strides = _codes(self.corners)
        codes, self.corners = codes.unique(return_inverse=True)  # (M,) sorted, (N, d + 1)
        # Dealing is the transpose of reading: for each corner its points, one after the other.
        order = self.corners.flatten().argsort(stable=True)
        self.points = order // self.corners.shape[1]
        self.dealt = self.shares.flatten()[order]
        self.starts = torch.searchsorted(self.corners.flatten()[order], torch.arange(len(codes), device=codes.device))
        # A step along direction j is +1 in every coordinate, and -d in the j-th; the last one is not in the code.
        steps = [sum(strides) - (len(strides) + 1) * stride for stride in (*strides, 0)]
        self.neighbours = [torch.stack([_find(codes, codes + sign * step) for sign in (1, -1)], 1) for step in steps]
        scale = self(torch.ones_like(features[:, :1])).rsqrt()  # D^-1/2, (N, 1)
        self.shares *= scale
        self.dealt *= scale[self.points, 0]

    def __call__(self, values: Tensor) -> Tensor:
        """Values (N, K) to (N, K)."""
        lattice = F.embedding_bag(self.points, values, self.starts, mode="sum", per_sample_weights=self.dealt)
        lattice = F.pad(lattice, (0, 0, 0, 1))  # a corner that no point touches holds nothing: the row of zeros
        for neighbours in self.neighbours:
            lattice[:-1].add_(F.embedding_bag(neighbours, lattice, mode="sum"), alpha=0.5)
        return F.embedding_bag(self.corners, lattice, mode="sum", per_sample_weights=self.shares)


def _simplices(features: Tensor) -> tuple[Tensor, Tensor]:
    """Each point's simplex: corners (N, d + 1, d + 1), whose coordinates sum to 0, and shares of them (N, d + 1)."""
    d = features.shape[1]
    # Onto the plane where coordinates sum to 0, stretched so that the blur has the Gaussian's width.
    rotation = features.new_ones(d, d + 1).tril()
    for row in range(d):
        rotation[row, row + 1] = -(row + 1)
        rotation[row] *= math.sqrt(2 / 3) * (d + 1) / math.sqrt((row + 1) * (row + 2))
    elevated = features @ rotation
    nearest = (elevated / (d + 1)).round() * (d + 1)
    # Rounding each coordinate may leave the plane: those that it moved most go back by one cell.
    rank = (elevated - nearest).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    rank = rank + (nearest.sum(dim=1, keepdim=True) / (d + 1)).round().long()
    cells = (rank < 0).long() - (rank > d).long()
    rank, nearest = rank + cells * (d + 1), nearest + cells * (d + 1)

    offsets = ((elevated - nearest) / (d + 1)).gather(1, rank.argsort(dim=1)).flip(1)
    shares = offsets - offsets.roll(1, dims=1)
    shares[:, 0] += 1
    # Coordinates are small, and there are (d + 1)^2 of each point: int32, which halves what they take.
    colors = torch.arange(d + 1, device=features.device, dtype=torch.int32)[:, None]  # k modulo d + 1 at a corner
    steps = colors - (d + 1) * (rank.int()[:, None] > d - colors).int()
    return steps.add_(nearest.int()[:, None]), shares


def _codes(corners: Tensor) -> tuple[Tensor, list[int]]:
    """Each corner as one number, (N, d + 1), and what one step along each of the d coordinates adds to it.

    Corners one step outside of all that occur still have numbers of their own.
    """
    coordinates = corners[..., :-1].unbind(-1)  # the last is minus the sum of the others
    margin = corners.shape[-1]
    lows = [int(each.min()) - margin for each in coordinates]
    sizes = [int(each.max()) + margin - low + 1 for each, low in zip(coordinates, lows, strict=True)]
    strides = list(itertools.accumulate(sizes, operator.mul, initial=1))
    if strides.pop() >= 2**63:
        raise ValueError("the image is too large, or a width of the CRF too small, for its lattice")
    codes: Any = 0
    for each, low, stride in zip(coordinates, lows, strides, strict=True):
        codes += (each.long() - low) * stride
    return codes, strides


def _find(codes: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted number is in the sorted codes; their length where it is not."""
    index = torch.searchsorted(codes, wanted)
    found = codes[index.clamp(max=len(codes) - 1)] == wanted
    return torch.where(found, index, len(codes))
