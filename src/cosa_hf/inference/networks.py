"""Any segmentation network, CoSA's or another: loaded, asked what it can do, and its output read as logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    BaseImageProcessor,
    PreTrainedModel,
)

from cosa_hf.data.images import ignored_id
from cosa_hf.data.tags import class_names
from cosa_hf.files import whole_model
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.modeling_cosa_ms import STRIDE
from cosa_hf.objective.precision import at_least_float32

#: Networks whose answer is a set of masks with classes. Others of their auto class want more than images, or images of
#: one size alone.
MASK_SETS = ("maskformer", "mask2former")
LEAST_SCORE = 1e-6  # of a class at a pixel: its logarithm is finite


def has_cams(model: Any) -> bool:
    """Whether a model has class activation maps, as CoSA's have; others only segment.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> has_cams(CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit")))
        True
    """
    return getattr(model.config, "model_type", None) == CoSAForWeaklySupervisedSegmentation.config_class.model_type


def require_cams(model: Any) -> None:
    """Refuse a model that only segments, for what is about CAMs.

    Raises:
        ValueError: it has no CAMs.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> require_cams(CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit")))
    """
    if not has_cams(model):
        raise ValueError(f"a {type(model).__name__} only segments and has no CAMs; give a model that CoSA trained")


def stride_of(model: Any) -> int:
    """What the sides of a network's images are multiples of, in pixels.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> stride_of(CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit")))
        16
    """
    return model.backbone.stride if has_cams(model) else STRIDE  # as every common encoder


def auto_class(config: Any) -> Any:
    """Of transformers, what loads the segmentation network of a config.

    Example:
        >>> from transformers import SegformerConfig
        >>> auto_class(SegformerConfig()).__name__
        'AutoModelForSemanticSegmentation'
    """
    return AutoModelForUniversalSegmentation if config.model_type in MASK_SETS else AutoModelForSemanticSegmentation


def segmentation_logits(outputs: Any) -> Tensor:
    """S, (B, K, h, w), of any segmentation network's output: its logits, or what a set of masks says of each pixel.

    A class's score is the sum over masks of sigmoid(mask) times the probability that the mask is of that class, as in
    Mask2Former's semantic inference; its logarithm is a logit whose softmax divides the scores by their sum.

    Example:
        >>> from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput
        >>> masks, classes = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]]), torch.tensor([[[9.0, 0, 0], [0, 9.0, 0]]])
        >>> outputs = Mask2FormerForUniversalSegmentationOutput(
        ...     masks_queries_logits=masks, class_queries_logits=classes
        ... )
        >>> segmentation_logits(outputs).argmax(1).tolist()  # the first mask is of class 0, the second of class 1
        [[[0, 1]]]
    """
    if not hasattr(outputs, "class_queries_logits"):
        return outputs.logits
    classes = at_least_float32(outputs.class_queries_logits).softmax(-1)[..., :-1]  # the last is "no object"
    masks = at_least_float32(outputs.masks_queries_logits).sigmoid()
    return torch.einsum("bqk,bqhw->bkhw", classes, masks).clamp_min(LEAST_SCORE).log()


def load_model(
    name: str, device: torch.device | str, **processor_settings: Any
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """A saved segmentation model, CoSA or another, in eval mode, and its processor.

    Args:
        name: a directory of a saved model, or its name on the Hub.
        device: where to put the model.
        processor_settings: settings of the processor to replace, such as `size`.

    Raises:
        FileNotFoundError: there is no segmentation model of that name, or no processor beside it.
        ValueError: its weights are damaged.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from cosa_hf import CoSAConfig, CoSAImageProcessor
        >>> with TemporaryDirectory() as folder:
        ...     CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit")).save_pretrained(folder)
        ...     _ = CoSAImageProcessor().save_pretrained(folder)
        ...     model, processor = load_model(folder, "cpu")
        >>> model.training, processor.size["height"]
        (False, 448)
    """
    try:
        config = AutoConfig.from_pretrained(name)
        model = auto_class(config).from_pretrained(name, config=config)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no model at {name!r}: neither a directory with one nor a name within reach on the Hub\n{error}"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{name}/model.safetensors is damaged ({error}): copy or download it again") from error
    try:
        processor = AutoImageProcessor.from_pretrained(name, **processor_settings)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"the model {name!r} has no image processor: save one beside it (processor.save_pretrained), or copy the "
            f"preprocessor_config.json of the run it comes from\n{error}"
        ) from error
    return model.eval().to(device), processor


def save_model(model: PreTrainedModel, processor: BaseImageProcessor, directory: Path) -> None:
    """Save a network and its processor as one directory, which has both or is not taken for a model.

    Example:
        >>> from cosa_hf import CoSAConfig, CoSAImageProcessor
        >>> model = CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit"))
        >>> save_model(model, CoSAImageProcessor(), Path("model"))
        >>> load_model("model", "cpu")[0].config.backbone
        'test_vit'
    """
    with whole_model(directory) as unfinished:
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)


def label_names(config: Any) -> list[str]:
    """The K label names of a model's config in the order of their ids, background first.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> label_names(CoSAConfig(id2label={1: "cat", 0: "background"}))
        ['background', 'cat']
    """
    return [config.id2label[index] for index in range(config.num_labels)]


def ignore_index(config: Any) -> int:
    """The id that a model's config leaves out of masks; that of `ignored_id` where it names none, or one of a label.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> ignore_index(CoSAConfig())
        255
    """
    usual = ignored_id(config.num_labels - 1)
    named = getattr(config, "semantic_loss_ignore_index", usual)
    return usual if 0 <= named < config.num_labels else named


def check_classes(dataset: Dataset, config: Any) -> None:
    """Refuse a dataset whose classes are not the model's, in the same order.

    Raises:
        ValueError: shows both lists.
    """
    known = label_names(config)[1:]
    found = class_names(dataset)
    if known != found:
        raise ValueError(
            f"the dataset's classes are not the model's, in order:\n  dataset: {found}\n  model:    {known}"
        )


@contextmanager
def eval_mode(model: Any) -> Iterator[Any]:
    """A model in eval mode for a while; each of its modules gets the mode back that it had.

    Example:
        >>> model = torch.nn.Dropout()
        >>> with eval_mode(model):
        ...     print(model.training)
        False
        >>> model.training
        True
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:  # not model.train(): a part of it may have been in eval mode
            module.training = True


__all__ = [
    "MASK_SETS",
    "auto_class",
    "check_classes",
    "eval_mode",
    "has_cams",
    "ignore_index",
    "label_names",
    "load_model",
    "require_cams",
    "save_model",
    "segmentation_logits",
    "stride_of",
]
