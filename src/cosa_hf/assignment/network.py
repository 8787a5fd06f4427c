"""The assignment network (AN): the online network's moving average, and the pseudo-labels it gives to a batch."""

import copy
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cosa_hf.assignment.threshold import DynamicThreshold, ThresholdConfig
from cosa_hf.inference import MultiScaleOutput, eval_mode, forward_multiscale
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.affinity import foreground, spread_cams
from cosa_hf.objective.guidance import seg2cam_target
from cosa_hf.objective.overall import valid_tokens
from cosa_hf.objective.precision import at_least_float32
from cosa_hf.objective.pseudo_labels import PseudoLabels, normalize_cams
from cosa_hf.objective.targets import Reduce, one_process
from cosa_hf.settings import Settings, setting


@dataclass(kw_only=True)
class TeacherConfig(Settings):
    """The assignment network and what its pseudo-labels are made of (Sec. 3.2-3.4). The defaults are the paper's."""

    _argument_group_name = "Teacher and pseudo-labels (Sec. 3.2-3.4)"

    ema_momentum: float = setting(
        0.9994,
        "m of the assignment network, AN <- m AN + (1 - m) ON: averages over about 1 / (1 - m) steps. At m = 1 it "
        "would never learn, and training collapses (Tab. 5d)",
        least=0,
        below=1,
    )
    swapping_assignments: bool = setting(True, "SA: labels from the assignment network; false: from the online one")
    bf16_assignment: bool = setting(False, "the teacher runs in bf16, whatever mixed_precision says")
    label_scales: list[float] = setting([1.0, 0.5, 1.5], "scales that the teacher sees", above=0)
    cam_fusion: Literal["max", "sum"] = setting("max", "of the CAMs over those scales; the released code sums")
    spl_temperature: float = setting(0.01, "tau of Eq. 7", above=0)
    guidance: Literal["none", "spl", "gt", "noise"] = setting(
        "spl",
        "GC, what Seg2CAM holds the CAMs to: SPL; none: they are not guided; gt: ground-truth masks, an oracle; noise: "
        "random masks (Fig. 1)",
    )


class AssignmentNetwork(nn.Module):
    """Teacher of the online network: an EMA copy that is never trained by gradient and always in eval mode (Sec. 3.2).

    Attributes:
        thresholds: xi of M' and of M†' (Eq. 6). They have a state of their own, which is not in this module's.

    Args:
        online: the network to follow; the copy starts equal to it.
        config: its momentum, and how it labels.
        threshold: start and pace of both thresholds.

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> online = CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit", aux_layer=-2, num_labels=4))
        >>> teacher = AssignmentNetwork(online, TeacherConfig(ema_momentum=0.9, label_scales=[1.0]))
        >>> teacher.update(online)
        >>> tags, valid = torch.tensor([[1, 0, 1]]), torch.ones(1, 64, 64, dtype=torch.bool)
        >>> labels = teacher.label(torch.rand(1, 3, 64, 64), tags, valid)
        >>> labels.cams.shape, labels.segmentation.shape, 0 < labels.threshold < 1
        (torch.Size([1, 3, 4, 4]), torch.Size([1, 4, 4, 4]), True)
    """

    def __init__(
        self,
        online: CoSAForWeaklySupervisedSegmentation,
        config: TeacherConfig | None = None,
        threshold: ThresholdConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.threshold_config = config or TeacherConfig(), threshold or ThresholdConfig()
        self.network = copy.deepcopy(online).requires_grad_(False)
        for own, followed in zip(self.network.parameters(), online.parameters(), strict=True):
            if not followed.requires_grad:  # frozen: one copy serves both
                own.data = followed.data
        self._average = get_ema_multi_avg_fn(self.config.ema_momentum)
        # In plain tuples: neither the thresholds nor the online network belong to this module's state.
        self.thresholds = tuple(DynamicThreshold(self.threshold_config) for _ in ("M'", "M†'"))
        self._labels = (self.network if self.config.swapping_assignments else online,)
        self.eval()

    def train(self, mode: bool = True) -> "AssignmentNetwork":
        """Stay in eval mode, whatever the training loop asks for."""
        return super().train(False)

    @torch.no_grad()
    def update(self, online: CoSAForWeaklySupervisedSegmentation) -> None:
        """Follow what trains of the online network by one step (Alg. 1 line 25); its buffers are copied."""
        pairs = zip(self.network.parameters(), online.parameters(), strict=True)
        own, followed = zip(*(pair for pair in pairs if pair[1].requires_grad), strict=True)
        self._average(own, followed, 0)
        for buffer, other in zip(self.network.buffers(), online.buffers(), strict=True):
            buffer.copy_(other)

    @torch.no_grad()
    def label(
        self,
        weak: Tensor | None,
        labels: Tensor,
        valid: Tensor,
        masks: Tensor | None = None,
        batch_size: int | None = None,
        reduce: Reduce = one_process,
        encoded: dict[str, Tensor] | None = None,
    ) -> PseudoLabels:
        """Pseudo-labels of a batch (Alg. 1 lines 7-10 and 13): maps filtered by the tags, thresholds moved on.

        Where the network's config names an affinity, CAMs and segmentation are spread by it, and the thresholds see the
        CAMs so.

        Args:
            weak: normalised images, (B, 3, H, W); None with `encoded`.
            labels: multi-hot tags, (B, C).
            valid: V, (B, H, W), False where random crop padded the image.
            masks: class ids, (B, H, W), for the guidance `gt` alone.
            batch_size: images per forward pass, to save memory; default: all.
            reduce: mean over processes, which so have the same xi.
            encoded: what the backbone's frozen part made of the images, in their place; it is seen as it is.
        """
        fused = self._forward(weak, encoded, batch_size or len(labels))
        tokens = valid_tokens(valid, fused.cam_logits)
        cams = normalize_cams(fused.cam_logits, labels, tokens)
        aux_cams = normalize_cams(fused.aux_cam_logits, labels, tokens)
        seg_logits = fused.seg_logits
        if fused.affinity is not None:
            joined = torch.cat([cams, aux_cams, foreground(seg_logits, labels)], dim=1)  # one affinity for all three
            spread = spread_cams(joined, fused.affinity, self.network.config, tokens)
            cams, aux_cams, probabilities = spread.chunk(3, dim=1)
        if self.threshold_config.dynamic_threshold:
            # Images without a class have no foreground to part from the background: theirs is known.
            tagged = tokens & labels.any(dim=1)[:, None, None]
            for threshold, maps in zip(self.thresholds, (cams, aux_cams), strict=True):
                threshold.update(maps.amax(dim=1)[tagged], reduce)
        xi, aux_xi = (threshold.value for threshold in self.thresholds)
        if fused.affinity is not None:
            seg_logits = F.pad(probabilities, (0, 0, 0, 0, 1, 0), value=xi)  # background wins where none reaches xi
        spl = seg2cam_target(self.config.guidance, seg_logits, labels, self.config.spl_temperature, masks)
        return PseudoLabels(cams, aux_cams, spl, xi, aux_xi)

    def _forward(self, weak: Tensor | None, encoded: dict[str, Tensor] | None, batch_size: int) -> MultiScaleOutput:
        """All maps of the network that labels: over scales and flips, or of the one view that is encoded."""
        with eval_mode(*self._labels) as network:
            if encoded is None:
                assert weak is not None
                fused = [
                    forward_multiscale(network, images, self.config.label_scales, cam_fusion=self.config.cam_fusion)
                    for images in weak.split(batch_size)
                ]
            else:
                pieces = zip(*(maps.split(batch_size) for maps in encoded.values()), strict=True)
                fused = [_one_view(network, dict(zip(encoded, piece, strict=True))) for piece in pieces]
        parts: Any = zip(*(vars(each).values() for each in fused), strict=True)
        joined: Any = [None if maps[0] is None else torch.cat(maps) for maps in parts]
        return MultiScaleOutput(*joined)

    @torch.no_grad()
    def distance(self, online: CoSAForWeaklySupervisedSegmentation) -> float:
        """How far the two networks are apart: |AN - ON| / |ON| over all weights (Euclidean norms)."""
        apart = sum(
            (own - other).square().sum()
            for own, other in zip(self.network.parameters(), online.parameters(), strict=True)
        )
        total = sum(parameter.square().sum() for parameter in online.parameters())
        return float((cast(Tensor, apart) / total).sqrt())


def _one_view(network: CoSAForWeaklySupervisedSegmentation, encoded: dict[str, Tensor]) -> MultiScaleOutput:
    outputs = network(encoded=encoded, output_affinity=network.config.affinity != "none")
    maps = {name: at_least_float32(outputs[name]) for name in ("cls_logits", "cam_logits", "aux_cam_logits")}
    return MultiScaleOutput(at_least_float32(outputs.logits), **maps, affinity=outputs.affinity)


__all__ = ["AssignmentNetwork", "TeacherConfig"]
