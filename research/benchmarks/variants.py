"""What single optimisations of a training step gain: seconds of each variant, in turns, in one process.

    OMP_NUM_THREADS=1 python research/benchmarks/variants.py
    OMP_NUM_THREADS=1 python research/benchmarks/variants.py --only compiled --rounds 5

CPU time, the median of the rounds, on a machine without a GPU; the first call, in which a compiler runs, in wall time.
Weights are random and images noise. notes/speed.md says which optimisations are kept, and why.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from speed.naive_baseline import materialise_attention
from speed.stopwatch import Stopwatch
from torch import Tensor, nn
from torch.nn import functional as F

from cosa_hf import CoSAConfig
from cosa_hf.assignment.network import AssignmentNetwork, TeacherConfig
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.overall import CoSAObjective
from cosa_hf.objective.pseudo_labels import PseudoLabels

# An optimisation is a group of variants that compute the same, the first of them without it.
Variants = dict[str, Callable[[], object]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Network:
    """lite0 as in notes/speed.md, or a small ViT, with a batch; only ratios count."""

    def __init__(self, name: str) -> None:
        backbone, aux_layer, batch = {
            "lite0": ("tf_efficientnet_lite0", -2, 8),
            "ViT-S": ("vit_small_patch16_224", -3, 2),
        }[name]
        config = CoSAConfig(backbone=backbone, aux_layer=aux_layer, num_labels=21)
        self.model = CoSAForWeaklySupervisedSegmentation(config).train().to(DEVICE)
        nn.Module.to(self.model, memory_format=torch.channels_last)
        self.images = torch.randn(batch, 3, 224, 224, device=DEVICE)


def forward(model: Any, images: Tensor) -> Any:
    with torch.no_grad():
        return model(images)


def forward_and_backward(model: Any, images: Tensor) -> None:
    outputs = model(images)
    sum(outputs[name].mean() for name in ("logits", "cls_logits", "aux_cls_logits", "cam_logits")).backward()


def flips(network: Network) -> Variants:
    both = torch.cat([network.images, network.images.flip(-1)])
    return {
        "two passes": lambda: [forward(network.model, images) for images in both.chunk(2)],
        "one pass": lambda: forward(network.model, both),
    }


def packed(scales: tuple[float, ...] = (1.0, 0.5, 1.5), side: int = 28) -> Variants:
    """One of the twelve blocks of a ViT-B at 448 pixels, one image."""
    block = timm.create_model("vit_base_patch16_224").blocks[0].eval().to(DEVICE)
    sequences = [torch.randn(1, round(side * scale) ** 2 + 1, 768, device=DEVICE) for scale in scales]
    whole = torch.cat(sequences, dim=1)
    own = torch.block_diag(*(torch.ones(s.shape[1], s.shape[1]) for s in sequences)).bool().to(DEVICE)
    attention = block.attn

    def pack() -> Tensor:
        normed = block.norm1(whole)
        q, k, v = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=own).transpose(1, 2).flatten(2)
        tokens = whole + attention.proj(mixed)
        return tokens + block.mlp(block.norm2(tokens))

    def linear_only(sequence: Tensor) -> Tensor:
        return block.mlp(block.norm2(attention.proj(attention.qkv(block.norm1(sequence))[..., :768])))

    with torch.no_grad():
        torch.testing.assert_close(pack(), torch.cat([block(s) for s in sequences], dim=1), atol=1e-4, rtol=1e-4)
    return {
        "a pass for each scale": torch.no_grad()(lambda: [block(sequence) for sequence in sequences]),
        "packed": torch.no_grad()(pack),
        "each, without attention": torch.no_grad()(lambda: [linear_only(sequence) for sequence in sequences]),
        "packed, without attention": torch.no_grad()(lambda: linear_only(whole)),
    }


def fused_attention(network: Network) -> Variants:
    plain = copy.deepcopy(network.model)
    materialise_attention(plain)
    return {
        "matrix materialised": lambda: forward_and_backward(plain, network.images),
        "SDPA": lambda: forward_and_backward(network.model, network.images),
    }


def channels_last(network: Network) -> Variants:
    plain = nn.Module.to(copy.deepcopy(network.model), memory_format=torch.contiguous_format)
    return {
        "channels first": lambda: forward_and_backward(plain, network.images),
        "channels last": lambda: forward_and_backward(network.model, network.images),
    }


def compiled(network: Network, step: Callable[[Any, Tensor], Any]) -> Variants:
    fast = torch.compile(network.model)
    return {
        "eager": lambda: step(network.model, network.images),
        "torch.compile": lambda: step(fast, network.images),
    }


def bf16(network: Network) -> Variants:
    return {
        "fp32": lambda: forward(network.model, network.images),
        "bf16": torch.autocast(DEVICE.type, torch.bfloat16)(lambda: forward(network.model, network.images)),
    }


def adamw(network: Network) -> Variants:
    variants: Variants = {}
    for name, options in {"a loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}.items():
        model = copy.deepcopy(network.model)
        forward_and_backward(model, network.images)
        variants[name] = torch.optim.AdamW(model.parameters(), **options).step
    return variants


def average(network: Network) -> Variants:
    other, assignment = (
        copy.deepcopy(network.model),
        AssignmentNetwork(network.model, TeacherConfig(ema_momentum=0.999)).to(DEVICE),
    )

    def loop() -> None:
        with torch.no_grad():
            for own, online in zip(other.parameters(), network.model.parameters(), strict=True):
                own.lerp_(online, 0.001)
            for own, online in zip(other.buffers(), network.model.buffers(), strict=True):
                own.copy_(online)

    return {"a loop": loop, "foreach": lambda: assignment.update(network.model)}


def stride(network: Network) -> Variants:
    """Both CAM2Seg losses and their gradient; not the same loss, unlike the other variants."""
    with torch.no_grad():
        outputs = network.model(network.images)
    cams = torch.zeros_like(outputs.cam_logits)
    cams[:, :2] = torch.rand_like(cams[:, :2])  # two tags
    valid = torch.ones(len(cams), *network.images.shape[-2:], dtype=torch.bool, device=DEVICE)
    pseudo_labels = PseudoLabels(cams, cams, outputs.logits.softmax(1), threshold=0.5, aux_threshold=0.5)
    outputs.logits.requires_grad_()

    def losses(every: int) -> None:
        objective = CoSAObjective(supervision_stride=every, seg2cam_weight=0, separation_weight=0)
        targets = objective.targets(pseudo_labels, valid)
        objective(outputs, torch.ones_like(outputs.cls_logits), targets)["loss"].backward()

    return {f"stride {every}": lambda every=every: losses(every) for every in (1, 2, 4)}


OPTIMISATIONS: dict[str, Callable[[], Variants]] = {
    "flips, lite0": lambda: flips(Network("lite0")),
    "flips, ViT-S": lambda: flips(Network("ViT-S")),
    "packed scales, a block of ViT-B": packed,
    "SDPA, ViT-S": lambda: fused_attention(Network("ViT-S")),
    "channels last, lite0": lambda: channels_last(Network("lite0")),
    "channels last, ViT-S": lambda: channels_last(Network("ViT-S")),
    "bf16 AN, lite0": lambda: bf16(Network("lite0")),
    "bf16 AN, ViT-S": lambda: bf16(Network("ViT-S")),
    "AdamW, lite0": lambda: adamw(Network("lite0")),
    "EMA, lite0": lambda: average(Network("lite0")),
    "supervision stride, lite0": lambda: stride(Network("lite0")),
    "compiled AN, lite0": lambda: compiled(Network("lite0"), forward),
    "compiled ON, lite0": lambda: compiled(Network("lite0"), forward_and_backward),
    "compiled AN, ViT-S": lambda: compiled(Network("ViT-S"), forward),
    "compiled ON, ViT-S": lambda: compiled(Network("ViT-S"), forward_and_backward),
}


def measure(variants: Variants, rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds of the first call and of the others, by variant."""
    watch, first, seconds = Stopwatch(DEVICE, cpu_time=DEVICE.type == "cpu"), {}, {name: [] for name in variants}
    for name, variant in variants.items():
        started = time.perf_counter()
        variant()
        first[name] = time.perf_counter() - started
    for _ in range(rounds):
        for name, variant in variants.items():
            watch.begin()
            variant()
            watch.end()
            seconds[name].append(sum(watch.steps[-1].values()))
    return {name: (first[name], statistics.median(several)) for name, several in seconds.items()}


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    print(f"torch {torch.__version__}, {DEVICE.type}, {torch.get_num_threads()} threads, {args.rounds} rounds\n")
    print("| optimisation | variant | seconds | speed-up | first call, s |\n|---|---|---|---|---|")
    for title, variants in OPTIMISATIONS.items():
        if args.only and not any(word in title for word in args.only):
            continue
        torch.manual_seed(0)
        found = measure(variants(), args.rounds)
        (_, without), *_ = found.values()
        for name, (first, seconds) in found.items():
            print(f"| {title} | {name} | {seconds:.4f} | {without / seconds:.2f} x | {first:.1f} |", flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only those with one of these words in their name")
    parser.add_argument("--rounds", type=int, default=5, help="calls of each variant (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
