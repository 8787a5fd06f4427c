"""What ties a report to the weights it was measured on."""

import hashlib
from pathlib import Path

from transformers.utils import SAFE_WEIGHTS_NAME, cached_file


def weights_sha256(model: str | Path) -> str:
    """SHA-256 of a saved model's `model.safetensors`, in hex.

    Args:
        model: directory of a saved model, or its name on the Hub.

    Raises:
        FileNotFoundError: there is no such file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> with tempfile.TemporaryDirectory() as model:
        ...     _ = (Path(model) / "model.safetensors").write_bytes(b"weights")
        ...     weights_sha256(model)[:12]
        '9a129038d9a0'
    """
    try:
        path = cached_file(str(model), SAFE_WEIGHTS_NAME)
    except OSError as error:
        raise FileNotFoundError(
            f"{model} has no {SAFE_WEIGHTS_NAME}: save it with save_pretrained, in one file (see its max_shard_size)"
        ) from error
    with open(str(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
