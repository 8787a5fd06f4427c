"""Eq. 11: the objective of the online network, as one object that returns its named parts."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_hf.objective.classification import classification_loss
from cosa_hf.objective.pseudo_labels import PseudoLabels, cam_pseudo_labels
from cosa_hf.objective.reliability import ProcessMean, perplexity, reliability_weights, single_process
from cosa_hf.objective.separation import contrastive_separation_loss
from cosa_hf.objective.swapping import cam2seg_loss, seg2cam_loss


@dataclass(frozen=True)
class CoSAObjective:
    """Classification, CAM2Seg from M' and M†', Seg2CAM and contrastive separation, weighted (Eq. 11).

    A part whose weight is 0 is not computed. Without pseudo-labels (warm-up) only the classification parts remain.

    Attributes:
        cam2seg_weight: lambda_c2s for the labels from M'.
        aux_cam2seg_weight: lambda_c2s for the labels from M†'.
        seg2cam_weight: lambda_s2c.
        separation_weight: lambda_csc.
        reliability_weighting: RAW on or off.
        alpha: lambda_alpha of Eq. 4.
        beta: lambda_beta of Eq. 4.
        epsilon: the highest perplexity of a token in Omega (Eq. 9).
        separation_temperature: of Eq. 10.
        separation_scope: tokens of one image, or of the batch, see each other.
        ignore_index: the id that no loss counts.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> outputs = SimpleNamespace(cls_logits=torch.zeros(1, 2), aux_cls_logits=torch.zeros(1, 2))
        >>> losses = CoSAObjective()(outputs, torch.ones(1, 2), torch.ones(1, 32, 32, dtype=torch.bool), None)
        >>> sorted(losses)
        ['aux_cls', 'cls', 'loss']
    """

    cam2seg_weight: float = 0.1
    aux_cam2seg_weight: float = 0.1
    seg2cam_weight: float = 0.05
    separation_weight: float = 0.1
    reliability_weighting: bool = True
    alpha: float = 0.8
    beta: float = 1.0
    epsilon: float = 1.0
    separation_temperature: float = 0.5
    separation_scope: Literal["image", "batch"] = "image"
    ignore_index: int = 255

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        valid: Tensor,
        pseudo_labels: PseudoLabels | None,
        mean: ProcessMean = single_process,
    ) -> dict[str, Tensor]:
        """The parts and their weighted sum.

        Args:
            outputs: of the online network on the strong view (`cls_logits`, `cam_logits`, `logits`, ...).
            labels: multi-hot tags, (B, C).
            valid: V at pixel resolution, (B, H, W).
            pseudo_labels: what the assignment network said about the weak view; None during warm-up.
            mean: see `reliability.ProcessMean`.

        Returns:
            Scalars by name; `loss` is what to differentiate.
        """
        losses = {
            "cls": classification_loss(outputs.cls_logits, labels),
            "aux_cls": classification_loss(outputs.aux_cls_logits, labels),
        }
        total = losses["cls"] + losses["aux_cls"]
        if pseudo_labels is not None:
            for name, weight, part in (
                ("c2s", self.cam2seg_weight, self._cam2seg),
                ("aux_c2s", self.aux_cam2seg_weight, self._aux_cam2seg),
                ("s2c", self.seg2cam_weight, self._seg2cam),
                ("csc", self.separation_weight, self._separation),
            ):
                if weight:
                    losses[name] = part(outputs, valid, pseudo_labels, mean)
                    total = total + weight * losses[name]
        return losses | {"loss": total}

    def _cam2seg(self, outputs: Any, valid: Tensor, targets: PseudoLabels, mean: ProcessMean) -> Tensor:
        return self._from_cams(outputs.logits, targets.cams, targets.threshold, valid, mean)

    def _aux_cam2seg(self, outputs: Any, valid: Tensor, targets: PseudoLabels, mean: ProcessMean) -> Tensor:
        return self._from_cams(outputs.logits, targets.aux_cams, targets.aux_threshold, valid, mean)

    def _from_cams(
        self, seg_logits: Tensor, cams: Tensor, threshold: float, valid: Tensor, mean: ProcessMean
    ) -> Tensor:
        cams = F.interpolate(cams, size=valid.shape[-2:], mode="bilinear", align_corners=False)
        ids = cam_pseudo_labels(cams, threshold, valid, self.ignore_index)
        weights = None
        if self.reliability_weighting:
            weights = reliability_weights(self._perplexity(cams, threshold), valid, mean)
        return cam2seg_loss(seg_logits, ids, weights, self.ignore_index, mean)

    def _seg2cam(self, outputs: Any, valid: Tensor, targets: PseudoLabels, mean: ProcessMean) -> Tensor:
        return seg2cam_loss(outputs.cam_logits, targets.segmentation, valid_tokens(valid, outputs.cam_logits), mean)

    def _separation(self, outputs: Any, valid: Tensor, targets: PseudoLabels, mean: ProcessMean) -> Tensor:
        certain = self._perplexity(targets.aux_cams, targets.aux_threshold) <= self.epsilon
        return contrastive_separation_loss(
            outputs.cam_logits,
            cam_pseudo_labels(targets.aux_cams, targets.aux_threshold),
            certain & valid_tokens(valid, outputs.cam_logits),
            self.separation_temperature,
            self.separation_scope,
            mean,
        )

    def _perplexity(self, cams: Tensor, threshold: float) -> Tensor:
        return perplexity(cams.amax(dim=1), threshold, self.alpha, self.beta)


def valid_tokens(valid: Tensor, maps: Tensor) -> Tensor:
    """Token positions at least half of which is image, (B, h, w), on the grid of `maps` (B, ..., h, w).

    Example:
        >>> import torch
        >>> valid = torch.tensor([[[True, True, True, False], [True, True, False, False]]])
        >>> valid_tokens(valid, torch.zeros(1, 1, 1, 2)).tolist()
        [[[True, False]]]
    """
    return F.interpolate(valid[:, None].to(torch.float32), size=maps.shape[-2:], mode="area")[:, 0] >= 0.5
