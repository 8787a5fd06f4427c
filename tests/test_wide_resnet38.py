"""ResNet-38 A1 against what its publication and its widespread port say of it."""

import pytest
import timm
import torch

from cosa_hf import wide_resnet38
from cosa_hf.wide_resnet38 import Block, WideResNet38, checkpoint_filter_fn


@pytest.mark.parametrize(("output_stride", "reductions"), [(32, [2, 4, 8, 16, 32]), (8, [2, 4, 8, 8, 8])])
def test_stages_widen_and_shrink(output_stride, reductions):
    with torch.device("meta"):
        model = timm.create_model("wide_resnet38_a1", features_only=True, output_stride=output_stride)
        levels = model(torch.empty(2, 3, 64, 96))
    assert model.feature_info.channels() == [128, 256, 512, 1024, 4096]
    assert model.feature_info.reduction() == reductions
    assert [tuple(level.shape[-2:]) for level in levels] == [(64 // r, 96 // r) for r in reductions]


def test_thirty_eight_layers():
    with torch.device("meta"):
        model = WideResNet38()
    convolutions = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    assert len([name for name in convolutions if "shortcut" not in name]) + 1 == 38  # and the classifier
    assert sum(parameter.numel() for parameter in model.parameters()) == 109_167_912


def test_dilated_by_two_and_four_at_stride_eight():
    with torch.device("meta"):
        model = WideResNet38(num_classes=0, output_stride=8)
    stages = [
        {module.dilation[0] for module in stage.modules() if getattr(module, "kernel_size", None) == (3, 3)}
        for stage in model.stages
    ]
    assert stages == [{1}, {1}, {1}, {1, 2}, {4}]
    with pytest.raises(ValueError, match="8, 16 or 32, got 4"):
        WideResNet38(output_stride=4)


def test_a_block_normalises_before_it_convolves():
    torch.manual_seed(0)
    block = Block(4, (4, 4)).eval()
    x = torch.randn(1, 4, 5, 5)
    block.convs[1].weight.data.zero_()
    assert torch.equal(block(x), x)  # nothing but the identity is left, and it is not activated
    wider = Block(4, (8, 8), stride=2).eval()
    wider.convs[1].weight.data.zero_()
    activated = (x / (1 + wider.norms[0].eps) ** 0.5).relu()
    torch.testing.assert_close(wider(x), wider.shortcut(activated))


def published_names() -> list[str]:
    """As the widespread port spells them: `b2` is a stage's first block, `b2_1` its second."""
    names = ["conv1a.weight"]
    for number, blocks in ((2, 3), (3, 3), (4, 6), (5, 3), (6, 1), (7, 1)):
        for block in range(blocks):
            place = f"b{number}" + (f"_{block}" if block else "")
            branches = ["branch2a", "branch2b1"] + (["branch2b2"] if number > 5 else [])
            names += [f"{place}.conv_{branch}.weight" for branch in branches]
            names += [f"{place}.bn_{branch}.{leaf}" for branch in branches for leaf in BN]
            if block == 0:
                names.append(f"{place}.conv_branch1.weight")
    return names + [f"bn7.{leaf}" for leaf in BN]


BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def test_the_published_layout_is_read_whole():
    names = published_names()
    with torch.device("meta"):
        model = WideResNet38(num_classes=0)
    weights = dict.fromkeys([*(f"module.{name}" for name in names), "fc8.weight"], torch.zeros(1))
    read = checkpoint_filter_fn(weights, model)
    assert set(read) == set(model.state_dict())
    assert len(read) == len(names)
    assert checkpoint_filter_fn(read, model).keys() == read.keys()  # its own names are kept


def test_timm_loads_a_file_in_the_published_layout(tmp_path, monkeypatch):
    for name, value in (("DEPTHS", (1, 1, 1, 1)), ("WIDTHS", ((4, 4), (4, 4), (4, 4), (4, 8))),
                        ("BOTTLENECKS", ((4, 4, 8), (4, 4, 16)))):  # fmt: skip
        monkeypatch.setattr(wide_resnet38, name, value)
    model = WideResNet38(num_classes=0)
    names = [name for name in published_names() if "_1." not in name and "_2." not in name]
    names = [name for name in names if not any(f"_{block}." in name for block in range(1, 6))]
    values = model.state_dict()
    weights = {name: torch.randn_like(values[own].float()).to(values[own].dtype)
               for name in names for own in checkpoint_filter_fn({name: torch.zeros(1)}, model)}  # fmt: skip
    torch.save(weights, tmp_path / "a1.pth")
    overlay = {"file": str(tmp_path / "a1.pth")}
    loaded = timm.create_model("wide_resnet38_a1", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
    assert torch.equal(loaded.stages[4][1].convs[2].weight, weights["b7.conv_branch2b2.weight"])
    assert torch.equal(loaded.stages[4][2].bias, weights["bn7.bias"])
