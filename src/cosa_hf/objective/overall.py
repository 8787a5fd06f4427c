"""Eq. 11: the objective of the online network, from the targets of a step to its named terms."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cosa_hf.objective.classification import classification_loss
from cosa_hf.objective.dense_energy import dense_energy_loss
from cosa_hf.objective.pseudo_labels import PseudoLabels, cam_pseudo_labels, present_classes, resize_cams
from cosa_hf.objective.reliability import perplexity
from cosa_hf.objective.separation import LEAST_TEMPERATURE, contrastive_separation_loss
from cosa_hf.objective.swapping import cam2seg_loss, seg2cam_loss
from cosa_hf.objective.targets import Reduce, Targets, anchors, normalized, one_process
from cosa_hf.settings import Settings, setting

UNKNOWN = -100  # an id that no class can have, however many there are


@dataclass(kw_only=True)
class ObjectiveConfig(Settings):
    """Weights and switches of Eq. 3-11. Defaults are the paper's; "release" is what the released code differs in."""

    _argument_group_name = "Objective (Eq. 3-11)"

    cam2seg_weight: float = setting(0.1, "lambda_c2s, labels from M'", least=0)
    aux_cam2seg_weight: float = setting(0.1, "lambda_c2s, labels from M†'", least=0)
    seg2cam_weight: float = setting(0.05, "lambda_s2c", least=0)
    separation_weight: float = setting(0.1, "lambda_csc (CSC)", least=0)
    reliability_weighting: bool = setting(True, "RAW")
    perplexity_alpha: float = setting(
        0.8,
        "lambda_alpha of Eq. 4; towards 1 the least perplexity goes to 0, and its reciprocal, a weight, to infinity",
        above=0,
        most=0.999,
    )
    perplexity_beta: float = setting(1.0, "lambda_beta of Eq. 4", least=0)
    perplexity_epsilon: float = setting(1.0, "highest perplexity of a token in Omega (Eq. 9)", least=0, infinite=True)
    separation_temperature: float = setting(0.5, "of the contrast, Eq. 10", least=LEAST_TEMPERATURE)
    separation_scope: Literal["image", "batch"] = setting("image", "which tokens see each other in Eq. 10")
    detach: Literal["none", "features", "classifier"] = setting(
        "none", "what the gradient of Seg2CAM does not reach: nothing, F or W_fc (Tab. 4a)"
    )
    supervision_stride: int = setting(1, "CAM2Seg looks at one point in so many pixels, in both directions", least=1)
    background_threshold: float | None = setting(
        None, "CAM2Seg ignores confidences from here to a fixed `threshold` (release); default: none", least=0
    )
    balanced: bool = setting(False, "background and foreground make up half of CAM2Seg each (release)")
    relu_cams: bool = setting(False, "Seg2CAM sees relu(M), whose loss is at least ln 2 for a background (release)")
    dense_energy_weight: float = setting(0.0, "of the bilateral regulariser (release: 0.05)", least=0)
    dense_energy_scale: float = setting(
        0.5, "side of its grid, relative to the crop; its time grows with the fourth power", above=0, most=1
    )


@dataclass(kw_only=True)
class CoSAObjective(ObjectiveConfig):
    """Classification, CAM2Seg from M' and M†', Seg2CAM and contrastive separation, weighted (Eq. 11).

    First `targets`, once for all images of an optimiser step; then the objective itself, for each of its micro-batches.
    A term whose weight is 0 is not computed. Without targets (warm-up) only the classification terms remain.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> outputs = SimpleNamespace(cls_logits=torch.zeros(1, 2), aux_cls_logits=torch.zeros(1, 2))
        >>> sorted(CoSAObjective()(outputs, labels=torch.ones(1, 2)))
        ['aux_cls', 'cls', 'loss']
    """

    def targets(
        self, pseudo_labels: PseudoLabels, valid: Tensor, micro_batches: int = 1, reduce: Reduce = one_process
    ) -> Targets:
        """Pseudo-labels as ids and weights, normalised over all micro-batches and processes of the step.

        Args:
            pseudo_labels: of this process's images of the step.
            valid: V, (B, H, W).
            micro_batches: that the images will be taken in, all of one size.
            reduce: mean over processes; called once.
        """
        cpl, cpl_weights = self._cam2seg(pseudo_labels.cams, pseudo_labels.threshold, valid)
        aux_cpl, aux_cpl_weights = self._cam2seg(pseudo_labels.aux_cams, pseudo_labels.aux_threshold, valid)
        spl = pseudo_labels.segmentation
        tokens = valid_tokens(valid, spl)
        guided = tokens & spl.any(dim=1)  # ground truth leaves pixels open
        members = self._omega(pseudo_labels, tokens)
        anchored = torch.cat([anchors(micro, self.separation_scope) for micro in members.chunk(micro_batches)])

        weights = [*cpl_weights, *aux_cpl_weights, guided.to(cpl_weights[0]), anchored.to(cpl_weights[0])]
        *halves, spl_weights, anchor_weights = normalized(weights, micro_batches, reduce)
        count = len(cpl_weights)
        cpl_mean, aux_cpl_mean = (torch.stack(each).sum(dim=0) / count for each in (halves[:count], halves[count:]))
        return Targets(cpl, cpl_mean, aux_cpl, aux_cpl_mean, spl, spl_weights, members, anchor_weights)

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        targets: Targets | None = None,
        valid: Tensor | None = None,
        images: Tensor | None = None,
        classifier: Tensor | None = None,
        classifier_bias: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The terms and their weighted sum.

        Args:
            outputs: of the online network on the strong view (`cls_logits`, `cam_logits`, `logits`, ...; with `detach`
                also `hidden_states`).
            labels: multi-hot tags, (B, C).
            targets: of these images; None during warm-up.
            valid: V, (B, H, W); for the dense energy alone.
            images: what `outputs` were made of, (B, 3, H, W) in steps of 0..255; for the dense energy alone.
            classifier: W_fc, (C, D, 1, 1); for `detach` alone.
            classifier_bias: (C,), if there is one; likewise.

        Returns:
            Scalars by name; `loss` is what to differentiate.
        """
        losses = {
            "cls": classification_loss(outputs.cls_logits, labels),
            "aux_cls": classification_loss(outputs.aux_cls_logits, labels),
        }
        total = losses["cls"] + losses["aux_cls"]
        for name, (weight, term) in self._terms(outputs, targets, valid, images, (classifier, classifier_bias)).items():
            if weight:
                losses[name] = term()
                total = total + weight * losses[name]
        return losses | {"loss": total}

    def _terms(
        self, outputs: Any, targets: Targets | None, valid: Any, images: Any, classifier: tuple[Tensor | None, ...]
    ) -> dict[str, tuple[float, Callable[[], Tensor]]]:
        """The losses against pseudo-labels: by name, lambda and the loss."""
        if targets is None:
            return {}
        cpl, cpl_weights, aux_cpl, aux_cpl_weights, spl, spl_weights, members, anchor_weights = targets
        temperature, scope = self.separation_temperature, self.separation_scope
        return {
            "c2s": (self.cam2seg_weight, lambda: cam2seg_loss(outputs.logits, cpl, cpl_weights)),
            "aux_c2s": (self.aux_cam2seg_weight, lambda: cam2seg_loss(outputs.logits, aux_cpl, aux_cpl_weights)),
            "s2c": (
                self.seg2cam_weight,
                lambda: seg2cam_loss(self._guided_cams(outputs, classifier), spl, spl_weights),
            ),
            "csc": (
                self.separation_weight,
                lambda: contrastive_separation_loss(outputs.cam_logits, members, anchor_weights, temperature, scope),
            ),
            "energy": (
                self.dense_energy_weight,
                # A mean over images, of which every micro-batch and process has as many: nothing to normalise.
                lambda: dense_energy_loss(outputs.logits, images, valid, cpl_weights > 0, self.dense_energy_scale),
            ),
        }

    def _cam2seg(self, cams: Tensor, threshold: float, valid: Tensor) -> tuple[Tensor, list[Tensor]]:
        """CPL (Eq. 3) at pixel resolution, and weights: one tensor, or two of equal effect if balanced."""
        grid = [math.ceil(side / self.supervision_stride) for side in valid.shape[-2:]]
        tokens = valid_tokens(valid, cams)
        cams, classes = present_classes(cams)
        cams, reached = resize_cams(cams, tokens, grid)
        pixels = valid_tokens(valid, cams) & reached
        ids = cam_pseudo_labels(cams, threshold, pixels, UNKNOWN, self.background_threshold, classes)
        known = ids != UNKNOWN
        weights = known.to(torch.promote_types(cams.dtype, torch.float32))
        if self.reliability_weighting:
            weights = weights / self._perplexity(cams, threshold)  # RAW: reliability, to be normalised
        ids = ids.masked_fill(~known, 0)
        return ids, [weights * (ids == 0), weights * (ids > 0)] if self.balanced else [weights]

    def _omega(self, pseudo_labels: PseudoLabels, tokens: Tensor) -> Tensor:
        """Eq. 9: the labels of the tokens that M†' is certain of, -1 elsewhere and in images without any foreground."""
        cams, threshold = pseudo_labels.aux_cams, pseudo_labels.aux_threshold
        certain = self._perplexity(cams, threshold) <= self.perplexity_epsilon
        active = cams.flatten(1).any(dim=1)[:, None, None]  # a true negative has nothing to separate
        return cam_pseudo_labels(cams, threshold, certain & tokens & active, ignore_index=-1)

    def _perplexity(self, cams: Tensor, threshold: float) -> Tensor:
        return perplexity(cams.amax(dim=1), threshold, self.perplexity_alpha, self.perplexity_beta)

    def _guided_cams(self, outputs: Any, classifier: tuple[Tensor | None, ...]) -> Tensor:
        """M as Seg2CAM sees it."""
        cam_logits = outputs.cam_logits
        if self.detach != "none":
            # M over again, with the gradient stopped in one of its two factors; CSC still sees all of it.
            features, (weight, bias) = outputs.hidden_states[-1], classifier
            assert weight is not None
            if self.detach == "features":
                cam_logits = F.conv2d(features.detach(), weight, bias)
            else:
                cam_logits = F.conv2d(features, weight.detach(), None if bias is None else bias.detach())
        return cam_logits.relu() if self.relu_cams else cam_logits


def mask_targets(masks: Tensor, ignore_index: int, micro_batches: int = 1, reduce: Reduce = one_process) -> Targets:
    """Ground truth in the place of CPL, for the supervised bound: all that is known weighs alike.

    Args:
        masks: class ids, (B, H, W).
        ignore_index: the id that does not count.
        micro_batches: as in `CoSAObjective.targets`.
        reduce: as there.

    Example:
        >>> targets = mask_targets(torch.tensor([[[2, 255]]]), ignore_index=255)
        >>> targets.cpl.tolist(), targets.cpl_weights.tolist()
        ([[[2, 0]]], [[[1.0, 0.0]]])
    """
    known = masks != ignore_index
    (weights,) = normalized([known.to(torch.get_default_dtype())], micro_batches, reduce)
    ids, nothing = masks.masked_fill(~known, 0), torch.zeros_like(weights)
    return Targets(ids, weights, ids, nothing, nothing[:, None], nothing, ids.new_full(ids.shape, -1), nothing)


def valid_tokens(valid: Tensor, maps: Tensor) -> Tensor:
    """Token positions at least half of which is image, (B, h, w), on the grid of `maps` (B, ..., h, w).

    Example:
        >>> import torch
        >>> valid = torch.tensor([[[True, True, True, False], [True, True, False, False]]])
        >>> valid_tokens(valid, torch.zeros(1, 1, 1, 2)).tolist()
        [[[True, False]]]
    """
    return F.interpolate(valid[:, None].to(torch.float32), size=maps.shape[-2:], mode="area")[:, 0] >= 0.5
