"""The precision that the equations are computed in."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """Raise bfloat16 and float16 to float32, and leave float32 and float64 as they are.

    Half precision cannot hold what the equations need, such as the number of pixels of a crop; float64 stays, so that
    gradients can be checked numerically. Integers and booleans become float32.

    Example:
        >>> at_least_float32(torch.zeros(1, dtype=torch.float16)).dtype, at_least_float32(torch.zeros(1).double()).dtype
        (torch.float32, torch.float64)
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
