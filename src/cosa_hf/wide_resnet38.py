"""ResNet-38, model A1 of "Wider or Deeper" (Wu, Shen, van den Hengel, Pattern Recognition 2019), for timm.

The "WideResNet38" of weakly supervised segmentation. Importing this module registers `wide_resnet38_a1` with timm, so
that it is created by name like any other encoder, at output stride 32, 16 or 8. A1 normalises before it convolves; at
stride 8 the last two blocks are dilated by 4, as segmentation uses it.
"""

import re
from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

__all__ = ["WideResNet38", "checkpoint_filter_fn", "wide_resnet38_a1"]

# Of each stage: blocks and their widths. The last stage has bottlenecks, of which the second is wider.
DEPTHS = (3, 3, 6, 3)
WIDTHS = ((128, 128), (256, 256), (512, 512), (512, 1024))
BOTTLENECKS = ((512, 1024, 2048), (1024, 2048, 4096))
DROPOUTS = (0.3, 0.5)


class Block(nn.Module):
    """Normalise, then two 3x3 convolutions or a 1x1-3x3-1x1 bottleneck; a 1x1 shortcut where the shape changes.

    Args:
        in_channels: of the input.
        widths: of the convolutions, two or three.
        stride: of the first convolution.
        dilations: of the first and of the second convolution (of a bottleneck, the second is its 3x3).
        dropout: between convolutions of a bottleneck.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        stride: int = 1,
        dilations: tuple[int, int] = (1, 1),
        dropout: float = 0.0,
    ):
        super().__init__()
        kernels = (3, 3) if len(widths) == 2 else (1, 3, 1)
        channels = (in_channels, *widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in channels[:-1])
        self.convs = nn.ModuleList()
        for index, kernel in enumerate(kernels):
            dilation = dilations[index] if kernel == 3 else 1
            self.convs.append(
                nn.Conv2d(
                    channels[index],
                    channels[index + 1],
                    kernel,
                    stride=stride if index == 0 else 1,
                    padding=kernel // 2 * dilation,
                    dilation=dilation,
                    bias=False,
                )
            )
        self.dropout = nn.Dropout(dropout)
        changes = stride > 1 or in_channels != widths[-1]
        self.shortcut = nn.Conv2d(in_channels, widths[-1], 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        activated = self.norms[0](x).relu()
        shortcut = x if self.shortcut is None else self.shortcut(activated)
        y = self.convs[0](activated)
        for norm, conv in zip(list(self.norms)[1:], list(self.convs)[1:], strict=True):
            y = conv(self.dropout(norm(y).relu()))
        return y + shortcut


class WideResNet38(nn.Module):
    """Five stages of pre-activation blocks, 38 layers deep and up to 4096 channels wide.

    Args:
        num_classes: of a classifier on the pooled features; 0 for none.
        in_chans: channels of the images.
        output_stride: 32, 16 or 8; the stages beyond are dilated instead.

    Raises:
        ValueError: another output stride.

    Example:
        >>> import torch
        >>> with torch.device("meta"):
        ...     model = WideResNet38(num_classes=0, output_stride=8)
        ...     shape = model.forward_features(torch.empty(1, 3, 64, 96)).shape
        >>> shape
        torch.Size([1, 4096, 8, 12])
    """

    def __init__(self, num_classes: int = 1000, in_chans: int = 3, output_stride: int = 32, **unused: Any):
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride must be 8, 16 or 32, got {output_stride}")
        self.num_classes, self.num_features = num_classes, BOTTLENECKS[-1][-1]
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.feature_info = []
        stages, channels, reduction, dilation = [], 64, 1, 1
        for index in range(5):
            stride, before = 2, dilation
            if reduction >= output_stride:
                stride, dilation = 1, dilation * 2
            reduction *= stride
            blocks: list[nn.Module] = []
            if index < 4:
                for block in range(DEPTHS[index]):
                    first = (before if block == 0 else dilation, dilation)
                    blocks.append(Block(channels, WIDTHS[index], stride if block == 0 else 1, first))
                    channels = WIDTHS[index][-1]
            else:
                for block, (widths, dropout) in enumerate(zip(BOTTLENECKS, DROPOUTS, strict=True)):
                    blocks.append(Block(channels, widths, stride if block == 0 else 1, (1, dilation), dropout))
                    channels = widths[-1]
                blocks += [nn.BatchNorm2d(channels), nn.ReLU()]
            stages.append(nn.Sequential(*blocks))
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{index}"})
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        return self.stages(self.conv1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean(dim=(2, 3)))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights under the names of A1's first release (`b4_2.conv_branch2a.weight`), or its own, under its own.

    The names are those of the widespread PyTorch port of the MXNet release. Of a classifier nothing is taken.

    Example:
        >>> import torch
        >>> list(checkpoint_filter_fn({"module.b4_2.bn_branch2b1.bias": torch.zeros(1)}, nn.Module()))
        ['stages.2.2.norms.1.bias']
    """
    convs = {"branch2a": "convs.0", "branch2b1": "convs.1", "branch2b2": "convs.2", "branch1": "shortcut"}
    norms = {"branch2a": "norms.0", "branch2b1": "norms.1", "branch2b2": "norms.2"}
    renamed = {}
    for name, tensor in state_dict.items():
        name = name.removeprefix("module.")
        if found := re.fullmatch(r"b([2-7])(?:_(\d))?\.(conv|bn)_(branch\w+)\.(\w+)", name):
            number, block, kind, branch, leaf = found.groups()
            place = f"{int(number) - 2}.{block or 0}" if int(number) < 6 else f"4.{int(number) - 6}"
            name = f"stages.{place}.{(convs if kind == 'conv' else norms)[branch]}.{leaf}"
        name = name.replace("conv1a.", "conv1.").replace("bn7.", "stages.4.2.")
        if not name.startswith(("fc.", "fc8.", "linear1000.")):
            renamed[name] = tensor
    return renamed


# timm's own table is for models with published weights; A1's are a user's own file.
default_cfgs = generate_default_cfgs(
    {
        "wide_resnet38_a1": {
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bilinear",
            "crop_pct": 0.875,
            "num_classes": 0,
            "first_conv": "conv1",
            "classifier": "fc",
        }
    }
)


@register_model
def wide_resnet38_a1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-38 A1. Its weights come from a file: `pretrained_cfg_overlay={"file": PATH}`."""
    return build_model_with_cfg(
        WideResNet38,
        "wide_resnet38_a1",
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4), "flatten_sequential": True},
        **kwargs,
    )
