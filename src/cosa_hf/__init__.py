"""CoSA: image-level tags in, segmentation masks out.

Importing the package registers its models with the auto classes of transformers; what it exports is imported when it is
first used.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cosa_hf._version import __version__

if TYPE_CHECKING:
    from cosa_hf.configuration_cosa import CoSAConfig
    from cosa_hf.demo import demo_model
    from cosa_hf.evaluation.evaluate import evaluate
    from cosa_hf.image_processing_cosa import CoSAImageProcessor, CoSAImageProcessorTorchvision
    from cosa_hf.inference import Segmenter
    from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation, CoSAOutput
    from cosa_hf.pseudo_labels.export import export_pseudo_labels
    from cosa_hf.training.config import TrainingConfig
    from cosa_hf.training.trainer import train

_MODULES = {
    "CoSAConfig": "configuration_cosa",
    "CoSAForWeaklySupervisedSegmentation": "modeling_cosa",
    "CoSAImageProcessor": "image_processing_cosa",
    "CoSAImageProcessorTorchvision": "image_processing_cosa",
    "CoSAOutput": "modeling_cosa",
    "Segmenter": "inference",
    "TrainingConfig": "training.config",
    "demo_model": "demo",
    "evaluate": "evaluation.evaluate",
    "export_pseudo_labels": "pseudo_labels.export",
    "train": "training.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


# The console command answers --help without torch, and imports this once it has work to do (cli.py).
if Path(sys.argv[0]).stem != "cosa-hf":
    from cosa_hf import registration as registration

__all__ = [
    "CoSAConfig",
    "CoSAForWeaklySupervisedSegmentation",
    "CoSAImageProcessor",
    "CoSAImageProcessorTorchvision",
    "CoSAOutput",
    "Segmenter",
    "TrainingConfig",
    "__version__",
    "demo_model",
    "evaluate",
    "export_pseudo_labels",
    "train",
]
