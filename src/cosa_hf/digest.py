"""What ties reports and exports to the weights that they come from."""

import hashlib
from collections.abc import Collection

import torch


def weights_sha256(model: torch.nn.Module, without: Collection[str] = ()) -> str:
    """SHA-256 of a network's weights, in hex: of the names, dtypes, shapes and bytes in its state dict.

    It is the same on every device and before and after saving, in however many files.

    Args:
        model: the network.
        without: names in its state dict to leave out.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.ones_(model.weight), torch.nn.init.zeros_(model.bias)
        >>> weights_sha256(model)[:12]
        'e931bb08c877'
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name in without:
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


__all__ = ["weights_sha256"]
