"""ONNX: the network for runtimes without torch, checked against it before it is handed over."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn

from cosa_hf.configuration_cosa import CoSAConfig
from cosa_hf.configuration_cosa_ms import CoSAMSConfig
from cosa_hf.files import whole_file
from cosa_hf.inference import has_cams, stride_of

TOLERANCE = 1e-4


def onnx_outputs(model: Any) -> list[str]:
    """What the file of a network gives: a segmentation, and CAMs if it has any.

    Example:
        >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation
        >>> onnx_outputs(CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit")))
        ['logits', 'cam_logits']
    """
    return ["logits", "cam_logits"] if has_cams(model) else ["logits"]


def export_onnx(model: Any, path: str | Path, int8: bool = False) -> float:
    """Write `model` as ONNX with dynamic batch and image size, and compare it with torch at another of both.

    Input `pixel_values` (B, 3, H, W), float32, prepared as the model's processor does; H and W are multiples of
    the network's stride. Outputs: `logits` (B, K, h, w), segmentation, background first, and of CoSA `cam_logits`
    (B, C, h, w), CAMs before any activation; both at the network's own resolution, to be resized to the image before
    the argmax.

    Args:
        model: CoSA, or a segmentation network of CoSA-MS, on any device; it is exported in eval mode and float32, and
            left as it was.
        path: of the `.onnx` file.
        int8: quantise the weights of matrix products and convolutions to 8 bits, for CPUs. Its outputs are close to
            torch's, not equal: the difference returned says how close.

    Returns:
        The largest difference to torch on random images, relative to the largest output.

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: another library's network.
        RuntimeError: without `int8`, the difference is above 1e-4: the file is removed.
    """
    absent = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if absent:
        raise ImportError(f'ONNX export needs {", ".join(absent)}: pip install "cosa-hf[onnx]"')
    if model.config.model_type not in (CoSAConfig.model_type, CoSAMSConfig.model_type):
        raise ValueError(f"a {type(model).__name__} is a network of transformers: export it with optimum")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    network = _Outputs(type(model)(model.config)).eval()
    network.model.load_state_dict(model.state_dict())
    stride, outputs = stride_of(model), onnx_outputs(model)
    images = torch.rand(3, 3, 5 * stride, 9 * stride)
    with torch.inference_mode():
        expected = network(images)
    _fix_padding(network)
    # Batch 1 or a square would be taken for a constant.
    example = torch.rand(2, 3, 6 * stride, 4 * stride)
    batch, rows, columns = (torch.export.Dim(name) for name in ("batch", "rows", "columns"))
    with whole_file(path) as unfinished:
        torch.onnx.export(
            network,
            (example,),
            unfinished,
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["pixel_values"],
            output_names=outputs,
            dynamic_shapes=({0: batch, 2: stride * rows, 3: stride * columns},),
        )
        if int8:
            _quantize(unfinished)
        difference = _difference(unfinished, images, expected)
        if difference > TOLERANCE and not int8:
            raise RuntimeError(
                f"ONNX and torch differ by {difference:.1e} of the largest output, above {TOLERANCE:.0e}"
            )
    return difference


class _Outputs(nn.Module):
    """The model with the outputs of the file, as a tuple."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(pixel_values)
        return tuple(outputs[name] for name in onnx_outputs(self.model))


def _fix_padding(network: nn.Module) -> None:
    """Make TensorFlow's "same" padding a constant, which it is for sizes that the stride divides.

    As arithmetic on the image size it would keep torch.export busy for good (EfficientNets and other `tf_` models).
    """
    for parent in list(network.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, Conv2dSame):
                sides = []
                for kernel, stride, dilation in zip(layer.kernel_size, layer.stride, layer.dilation, strict=True):
                    total = max((kernel - 1) * dilation + 1 - stride, 0)
                    sides.append((total // 2, total - total // 2))
                (top, bottom), (left, right) = sides
                plain = nn.Conv2d(
                    layer.in_channels,
                    layer.out_channels,
                    layer.kernel_size,  # type: ignore[arg-type]  # a pair, which the annotations of torch call a tuple
                    layer.stride,  # type: ignore[arg-type]
                    dilation=layer.dilation,  # type: ignore[arg-type]
                    groups=layer.groups,
                    bias=layer.bias is not None,
                )
                plain.weight, plain.bias = layer.weight, layer.bias
                setattr(parent, name, nn.Sequential(nn.ZeroPad2d((left, right, top, bottom)), plain))


def _quantize(path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Unsigned: the runtime's integer convolution takes no other weights.
    quantize_dynamic(path, path, weight_type=QuantType.QUInt8)


def _difference(path: Path, images: Tensor, expected: tuple[Tensor, ...]) -> float:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"pixel_values": images.numpy()})
    return max(
        ((torch.from_numpy(there) - here).abs().max() / here.abs().max()).item()
        for there, here in zip(found, expected, strict=True)
    )
