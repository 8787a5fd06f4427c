"""The assignment network (AN): the online network's moving average, and the pseudo-labels it gives to a batch."""

from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cosa_hf.assignment.threshold import DynamicThreshold
from cosa_hf.inference import forward_multiscale
from cosa_hf.modeling_cosa import CoSAForWeaklySupervisedSegmentation
from cosa_hf.objective.guidance import seg2cam_target
from cosa_hf.objective.overall import valid_tokens
from cosa_hf.objective.pseudo_labels import PseudoLabels, normalize_cams
from cosa_hf.objective.reliability import ProcessMean, single_process


class AssignmentNetwork(nn.Module):
    """Teacher of the online network: an EMA copy that is never trained by gradient and always in eval mode (Sec. 3.2).

    Args:
        online: the network to follow; the copy starts equal to it.
        momentum: m in AN <- m AN + (1 - m) ON; averages over about 1 / (1 - m) steps, so take less than the paper's
            0.9994 for a run much shorter than its 20,000 steps.

    Raises:
        ValueError: a momentum outside [0, 1). At m = 1 the copy would never learn and training collapses (Tab. 5d).

    Example:
        >>> from cosa_hf import CoSAConfig
        >>> online = CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit", aux_layer=-2))
        >>> teacher = AssignmentNetwork(online, momentum=0.9)
        >>> teacher.update(online)
        >>> teacher.network.training
        False
    """

    def __init__(self, online: CoSAForWeaklySupervisedSegmentation, momentum: float = 0.9994) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"ema_momentum must be in [0, 1): {momentum} would freeze or repel the assignment network")
        self.average = AveragedModel(online, multi_avg_fn=get_ema_multi_avg_fn(momentum))
        # AveragedModel would overwrite its copy at the first update; ours already is the start of the average.
        self.average.n_averaged.fill_(1)
        self.average.requires_grad_(False)
        self.eval()

    @property
    def network(self) -> CoSAForWeaklySupervisedSegmentation:
        """The averaged model."""
        return cast(CoSAForWeaklySupervisedSegmentation, self.average.module)

    def train(self, mode: bool = True) -> "AssignmentNetwork":
        """Stay in eval mode, whatever the training loop asks for."""
        return super().train(False)

    def update(self, online: CoSAForWeaklySupervisedSegmentation) -> None:
        """Follow the online network by one step; its buffers are copied."""
        self.average.update_parameters(online)

    @torch.no_grad()
    def distance(self, online: CoSAForWeaklySupervisedSegmentation) -> float:
        """How far the two networks are apart: |AN - ON| / |ON| over all weights (Euclidean norms)."""
        apart = sum(
            (own - other).square().sum()
            for own, other in zip(self.network.parameters(), online.parameters(), strict=True)
        )
        whole = sum(parameter.square().sum() for parameter in online.parameters())
        return float((cast(Tensor, apart) / whole).sqrt())


@torch.no_grad()
def assign(
    network: CoSAForWeaklySupervisedSegmentation,
    weak_view: Tensor,
    labels: Tensor,
    valid: Tensor,
    thresholds: Sequence[DynamicThreshold],
    scales: Sequence[float] = (1.0, 0.5, 1.5),
    temperature: float = 0.01,
    dynamic: bool = True,
    mean: ProcessMean = single_process,
    cam_fusion: Literal["max", "sum"] = "max",
    guidance: Literal["none", "spl", "gt", "noise"] = "spl",
    masks: Tensor | None = None,
    batch_size: int | None = None,
) -> PseudoLabels:
    """Pseudo-labels of a batch (Alg. 1 lines 7-10): CAMs and segmentation filtered by the tags, thresholds moved on.

    Args:
        network: whose word counts, usually the assignment network; run in eval mode and left as it was found.
        weak_view: normalised images, (B, 3, H, W).
        labels: multi-hot tags, (B, C).
        valid: V, (B, H, W), False where random crop padded the image.
        thresholds: the states for M' and for M†'.
        scales: run plain and mirrored at each.
        temperature: tau of the segmentation pseudo-labels (Eq. 7).
        dynamic: update the thresholds (Eq. 6), or leave them at their fixed start.
        mean: see `reliability.ProcessMean`.
        cam_fusion: of the scales, see `forward_multiscale`.
        guidance: where `PseudoLabels.segmentation` comes from, see `seg2cam_target`.
        masks: class ids, (B, H, W), for the guidance `gt` alone.
        batch_size: images per forward pass, to save memory; all by default.

    Example:
        >>> from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation
        >>> network = CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit", aux_layer=-2, num_labels=4))
        >>> tags, valid = torch.tensor([[1, 0, 1]]), torch.ones(1, 64, 64, dtype=torch.bool)
        >>> thresholds = [DynamicThreshold(), DynamicThreshold()]
        >>> labels = assign(network, torch.rand(1, 3, 64, 64), tags, valid, thresholds, scales=(1.0,))
        >>> labels.cams.shape, labels.segmentation.shape, 0 < labels.threshold < 1
        (torch.Size([1, 3, 4, 4]), torch.Size([1, 4, 4, 4]), True)
    """
    was_training = network.training
    network.eval()
    fused = [
        forward_multiscale(network, images, scales, cam_fusion=cam_fusion)
        for images in weak_view.split(batch_size or len(weak_view))
    ]
    network.train(was_training)
    cam_logits = torch.cat([part.cam_logits for part in fused])
    aux_cam_logits = torch.cat([part.aux_cam_logits for part in fused])
    seg_logits = torch.cat([part.seg_logits for part in fused])

    tokens = valid_tokens(valid, cam_logits)
    cams = normalize_cams(cam_logits, labels, tokens)
    aux_cams = normalize_cams(aux_cam_logits, labels, tokens)
    if dynamic:
        for threshold, maps in zip(thresholds, (cams, aux_cams), strict=True):
            threshold.update(maps.amax(dim=1)[tokens], mean)
    threshold, aux_threshold = thresholds
    return PseudoLabels(
        cams=cams,
        aux_cams=aux_cams,
        segmentation=seg2cam_target(guidance, seg_logits, labels, temperature, masks),
        threshold=threshold.value,
        aux_threshold=aux_threshold.value,
    )
