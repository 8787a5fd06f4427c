"""The dense-energy regulariser of the released code: pixels alike in colour and place should get the same class."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of the kernel that are in memory at a time, each as long as the image has pixels: memory grows with the number of
# pixels and not with its square. More rows were not faster on a CPU.
ROWS_AT_ONCE = 256
# What one pair of pixels counts for at half size: the constant that the released weight of 0.05 multiplies.
PER_PAIR = 1e-7


def dense_energy_loss(
    seg_logits: Tensor,
    images: Tensor,
    valid: Tensor,
    labelled: Tensor | None = None,
    scale: float = 0.5,
    sigma_rgb: float = 15.0,
    sigma_xy: float = 100.0,
) -> Tensor:
    """Relaxed DenseCRF energy, -sum over classes of S_k^T W S_k (Tang et al., "On Regularized Losses", ECCV 2018).

    W is the Gaussian of the distance in colour and place between every two valid pixels, a pixel and itself included:
    exact, and without a compiled extension. Summed over pairs (1e-7 each), averaged over images. Time grows with the
    fourth power of `scale`; the value does not, since the fewer pairs of a coarser grid count for more.

    Args:
        seg_logits: S of the online network, (B, K, h, w); its softmax is taken on the grid of pairs.
        images: (B, 3, H, W) in steps of 0..255; only differences count, so any offset will do.
        valid: V, (B, H, W), False where random crop padded the image; those pixels form no pair.
        labelled: (B, H, W), where a pixel has a pseudo-label. As in the released code, such a pixel takes part
            only by 1 - max_k S_k, both in the value and in its own gradient. None: the energy as published.
        scale: side of the grid of pairs, relative to `images`.
        sigma_rgb: width of the Gaussian in colour, in steps of 0..255.
        sigma_xy: width of the Gaussian in place, in pixels of `images`.

    Returns:
        Scalar <= 0; 0, with a gradient graph, where no pixel is valid.

    Example:
        >>> images = torch.zeros(1, 3, 4, 4)
        >>> images[..., 2:] = 255
        >>> logits = torch.zeros(1, 2, 4, 4)
        >>> logits[:, 0, :, 2:] = logits[:, 1, :, :2] = 100
        >>> valid = torch.ones(1, 4, 4, dtype=torch.bool)
        >>> along, across = (dense_energy_loss(maps, images, valid) for maps in (logits, logits.transpose(2, 3)))
        >>> round(along.item() * 1e7, 2), round(across.item() * 1e7, 2)  # 2 x 2 pixels at half size
        (-8.0, -4.0)
    """
    dtype = torch.promote_types(seg_logits.dtype, torch.float32)
    height, width = images.shape[-2:]
    grid = [max(1, round(side * scale)) for side in (height, width)]
    probabilities = F.interpolate(seg_logits.to(dtype), size=grid, mode="bilinear", align_corners=False).softmax(dim=1)
    colors = F.interpolate(images.to(dtype), size=grid, mode="nearest-exact")
    inside = _on_grid(valid, grid)
    gate = torch.ones_like(inside, dtype=dtype)
    if labelled is not None:
        gate = torch.where(_on_grid(labelled, grid), 1 - probabilities.detach().amax(dim=1), gate)
    rows, columns = (
        (torch.arange(cells, device=images.device, dtype=dtype) * (side / cells)).div(sigma_xy)
        for cells, side in zip(grid, (height, width), strict=True)
    )
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))  # (2, h, w)

    energy = probabilities.sum() * 0.0
    for maps, color, keep, weight in zip(probabilities, colors / sigma_rgb, inside, gate, strict=True):
        features = torch.cat([color, places])[:, keep].T  # (N, 5)
        own = maps[:, keep].T  # (N, K)
        agreement = (own * _filtered(features, own.detach()) * weight[keep, None]).sum()
        # W is symmetric: the gradient is twice that of the product whose second factor is held.
        energy = energy - (2 * agreement - agreement.detach())
    pairs_at_half_size = (height * width / 4 / (grid[0] * grid[1])) ** 2
    return energy * (PER_PAIR * pairs_at_half_size / len(images))


def _on_grid(mask: Tensor, grid: list[int]) -> Tensor:
    return F.interpolate(mask[:, None].float(), size=grid, mode="nearest-exact")[:, 0] > 0.5


@torch.no_grad()
def _filtered(features: Tensor, values: Tensor) -> Tensor:
    """W V, (N, K), with W_ij = exp(-|f_i - f_j|^2 / 2) for features (N, D) and values V (N, K)."""
    features = features - features.mean(dim=0)  # small numbers, since squares of large ones would cancel
    squares = 0.5 * features.square().sum(dim=1, keepdim=True)
    ones = torch.ones_like(squares)
    # -|f_i - f_j|^2 / 2 as one matrix product
    left, right = torch.cat([features, -squares, ones], dim=1), torch.cat([features, ones, -squares], dim=1)
    # One buffer for all chunks: new ones would leave holes in the heap that add up to the size of the kernel.
    chunk, filtered = left.new_empty(min(ROWS_AT_ONCE, len(left)), len(left)), torch.empty_like(values)
    for rows, target in zip(left.split(ROWS_AT_ONCE), filtered.split(ROWS_AT_ONCE), strict=True):
        kernel = torch.mm(rows, right.T, out=chunk[: len(rows)]).exp_()
        torch.mm(kernel, values, out=target)
    return filtered
