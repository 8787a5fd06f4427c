"""Models in half the room: weights stored as float16, computed with as float32."""

import json
from pathlib import Path

from transformers import BaseImageProcessor, PreTrainedModel

from cosa_hf.files import CONFIG, whole_model


def save_half(model: PreTrainedModel, processor: BaseImageProcessor, directory: Path) -> None:
    """Save a network and its processor, the weights as float16, which `from_pretrained` reads back as float32.

    Half the size of the file, and the speed and range of float32 in use: CPUs are slow in half precision. The weights
    are rounded to 11 significant bits; a value outside the range of float16 is refused.

    Raises:
        ValueError: a weight is above 65,504 or not finite.

    Example:
        >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
        >>> model = CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit"))
        >>> save_half(model, CoSAImageProcessor(), Path("half"))
        >>> CoSAForWeaklySupervisedSegmentation.from_pretrained("half").dtype
        torch.float32
    """
    state = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    unfit = [name for name, value in state.items() if not value.isfinite().all()]
    if unfit:
        raise ValueError(f"{', '.join(unfit)}: values that float16 cannot hold")
    with whole_model(directory) as unfinished:
        model.save_pretrained(unfinished, state_dict=state)
        processor.save_pretrained(unfinished)
        # The type to compute in: without it, loading would follow that of the file.
        config = unfinished / CONFIG
        settings = json.loads(config.read_text(encoding="utf-8"))
        config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
