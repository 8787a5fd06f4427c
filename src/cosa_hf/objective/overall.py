"""Eq. 11: the objective of the online network, as one object that returns its named parts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_hf.objective.classification import classification_loss
from cosa_hf.objective.dense_energy import dense_energy_loss
from cosa_hf.objective.pseudo_labels import PseudoLabels, cam_pseudo_labels, present_classes
from cosa_hf.objective.reliability import ProcessMean, perplexity, reliability_weights, single_process
from cosa_hf.objective.separation import contrastive_separation_loss
from cosa_hf.objective.swapping import cam2seg_loss, seg2cam_loss


@dataclass(frozen=True)
class CoSAObjective:
    """Classification, CAM2Seg from M' and M†', Seg2CAM and contrastive separation, weighted (Eq. 11).

    A part whose weight is 0 is not computed. Without pseudo-labels (warm-up) only the classification parts remain. The
    defaults are the paper's; the released code differs in the attributes that say so.

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
        detach: what the gradient of Seg2CAM does not reach: nothing, F, or W_fc (Tab. 4a).
        supervision_stride: CAM2Seg looks at one point in so many pixels, in both directions.
        background_threshold: CAM2Seg ignores confidences from here up to xi (released code); None: no such range.
        balanced: background and foreground make up half of CAM2Seg each (released code).
        relu_cams: Seg2CAM sees relu(M), which floors it at ln 2 for a background (released code).
        dense_energy_weight: of the regulariser (released code: 0.05).
        dense_energy_scale: see `dense_energy_loss`.
        ignore_index: the id that no loss counts; none that a class can have, however many there are.

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
    detach: Literal["none", "features", "classifier"] = "none"
    supervision_stride: int = 1
    background_threshold: float | None = None
    balanced: bool = False
    relu_cams: bool = False
    dense_energy_weight: float = 0.0
    dense_energy_scale: float = 0.5
    ignore_index: int = -100

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        valid: Tensor,
        pseudo_labels: PseudoLabels | None,
        mean: ProcessMean = single_process,
        images: Tensor | None = None,
        classifier: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The parts and their weighted sum.

        Args:
            outputs: of the online network on the strong view (`cls_logits`, `cam_logits`, `logits`, ...; with `detach`
                also `hidden_states`).
            labels: multi-hot tags, (B, C).
            valid: V at pixel resolution, (B, H, W).
            pseudo_labels: what the assignment network said about the weak view; None during warm-up.
            mean: see `reliability.ProcessMean`.
            images: what `outputs` were made of, (B, 3, H, W) in steps of 0..255; for the dense energy alone.
            classifier: W_fc, (C, D, 1, 1); for `detach` alone.

        Returns:
            Scalars by name; `loss` is what to differentiate.
        """
        losses = {
            "cls": classification_loss(outputs.cls_logits, labels),
            "aux_cls": classification_loss(outputs.aux_cls_logits, labels),
        }
        total = losses["cls"] + losses["aux_cls"]
        if pseudo_labels is not None:
            cams, xi = pseudo_labels.cams, pseudo_labels.threshold
            aux_cams, aux_xi = pseudo_labels.aux_cams, pseudo_labels.aux_threshold
            parts: dict[str, tuple[float, Callable[..., Tensor], tuple]] = {
                "c2s": (self.cam2seg_weight, self._cam2seg, (outputs, cams, xi)),
                "aux_c2s": (self.aux_cam2seg_weight, self._cam2seg, (outputs, aux_cams, aux_xi)),
                "s2c": (self.seg2cam_weight, self._seg2cam, (outputs, classifier, pseudo_labels)),
                "csc": (self.separation_weight, self._separation, (outputs, pseudo_labels)),
                "energy": (self.dense_energy_weight, self._dense_energy, (outputs, images, cams, xi)),
            }
            for name, (weight, part, arguments) in parts.items():
                if weight:
                    losses[name] = part(*arguments, valid, mean)
                    total = total + weight * losses[name]
        return losses | {"loss": total}

    def _cam2seg(self, outputs: Any, cams: Tensor, threshold: float, valid: Tensor, mean: ProcessMean) -> Tensor:
        grid = [math.ceil(side / self.supervision_stride) for side in valid.shape[-2:]]
        cams, classes = present_classes(cams)
        cams = F.interpolate(cams, size=grid, mode="bilinear", align_corners=False)
        valid = valid_tokens(valid, cams)
        ids = cam_pseudo_labels(cams, threshold, valid, self.ignore_index, self.background_threshold, classes)
        weights = None
        if self.reliability_weighting:
            weights = reliability_weights(self._perplexity(cams, threshold), valid, mean)
        return cam2seg_loss(outputs.logits, ids, weights, self.ignore_index, mean, self.balanced)

    def _seg2cam(
        self, outputs: Any, classifier: Tensor | None, targets: PseudoLabels, valid: Tensor, mean: ProcessMean
    ) -> Tensor:
        cam_logits = outputs.cam_logits
        if self.detach != "none":
            # M over again, with the gradient stopped in one of its two factors; CSC goes on seeing the whole of it.
            assert classifier is not None
            features = outputs.hidden_states[-1]
            factors = (features.detach(), classifier) if self.detach == "features" else (features, classifier.detach())
            cam_logits = F.conv2d(*factors)
        if self.relu_cams:
            cam_logits = cam_logits.relu()
        known = targets.segmentation.any(dim=1)  # true masks leave pixels open
        return seg2cam_loss(cam_logits, targets.segmentation, valid_tokens(valid, cam_logits) & known, mean)

    def _separation(self, outputs: Any, targets: PseudoLabels, valid: Tensor, mean: ProcessMean) -> Tensor:
        certain = self._perplexity(targets.aux_cams, targets.aux_threshold) <= self.epsilon
        return contrastive_separation_loss(
            outputs.cam_logits,
            cam_pseudo_labels(targets.aux_cams, targets.aux_threshold),
            certain & valid_tokens(valid, outputs.cam_logits),
            self.separation_temperature,
            self.separation_scope,
            mean,
        )

    def _dense_energy(
        self, outputs: Any, images: Tensor | None, cams: Tensor, threshold: float, valid: Tensor, _mean: ProcessMean
    ) -> Tensor:
        assert images is not None
        cams, _ = present_classes(cams)
        cams = F.interpolate(cams, size=valid.shape[-2:], mode="bilinear", align_corners=False)
        ids = cam_pseudo_labels(cams, threshold, valid, self.ignore_index, self.background_threshold)
        # A mean over images, of which every process has as many: its gradients need no common count.
        return dense_energy_loss(outputs.logits, images, valid, ids != self.ignore_index, self.dense_energy_scale)

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
