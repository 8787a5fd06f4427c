"""The naive baseline that the package is compared with: eager, fp32, organised as the released code is.

The assignment network runs during warm-up too, once for each scale and each mirror image; attention materialises its
matrix; Python loops go over images, classes and maps; the mixture is scikit-learn's, fitted to all values of a hundred
batches; all logits are upsampled to all pixels; the dense energy is part of the loss.
"""

import copy
import math
from collections import deque
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cosa_hf.assignment.threshold import LEAST, DynamicThreshold
from cosa_hf.data import class_names
from cosa_hf.data.dataset import TrainingDataset
from cosa_hf.data.views import Views
from cosa_hf.objective.dense_energy import dense_energy_loss
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.setup import build_student

from .stopwatch import Stopwatch

QUEUE = 100


class SklearnThreshold:
    """xi as the paper finds it: scikit-learn's mixture on the values of the last hundred batches."""

    def __init__(self, value: float, decay: float) -> None:
        self.value, self.decay, self.queue = value, decay, deque[np.ndarray](maxlen=QUEUE)

    def update(self, confidence: Tensor) -> None:
        values = confidence[confidence > LEAST].float().cpu().numpy()
        # Full from the first step on, because the step to be timed is one of a long run.
        self.queue.extend([values] * (1 if self.queue else QUEUE))
        split = sklearn_split(np.concatenate(self.queue))
        if split is not None:
            self.value = self.decay * self.value + (1 - self.decay) * split


def sklearn_split(values: np.ndarray) -> float | None:
    """Where both fitted Gaussians are equally likely, between their means; None if there is no such value."""
    from sklearn.mixture import GaussianMixture

    if len(np.unique(values)) < 2:
        return None
    mixture = GaussianMixture(2, means_init=np.quantile(values, [0.1, 0.9])[:, None]).fit(values[:, None])
    between = np.linspace(*sorted(mixture.means_.ravel()), 1000)
    likelier = mixture.predict(between[:, None])
    changes = np.flatnonzero(np.diff(likelier))
    return float(between[changes[0]]) if len(changes) else None


def update_with_sklearn(self: DynamicThreshold, confidence: Tensor, reduce: Any = None) -> None:
    """Replaces `DynamicThreshold.update`."""
    fitted = self.__dict__.setdefault("fitted_by_sklearn", SklearnThreshold(self.value, self.decay))
    fitted.update(confidence)
    self.current.fill_(fitted.value)


def train(recipe: TrainingConfig, dataset: Dataset, watch: Stopwatch, device: torch.device) -> list[dict[str, float]]:
    """Train by the naive baseline; returns the loss terms of each step."""
    online = build_student(recipe, class_names(dataset)).to(device).train()
    materialise_attention(online)
    assignment = copy.deepcopy(online).eval()
    optimizer = torch.optim.AdamW(online.parameters(), lr=recipe.learning_rate, foreach=False)
    thresholds = [SklearnThreshold(recipe.threshold, recipe.threshold_decay) for _ in range(2)]
    config = online.backbone.data_config
    views = Views(recipe.crop_size, config["mean"], config["std"], scale_range=(recipe.scale_min, recipe.scale_max))
    items = TrainingDataset(dataset, views, length=recipe.max_steps * recipe.batch_size, seed=recipe.seed)
    batches, history = iter(DataLoader(items, batch_size=recipe.batch_size)), []
    for _ in range(recipe.max_steps):
        watch.begin()
        with watch.phase("data"):
            batch = {name: value.to(device) for name, value in next(batches).items() if isinstance(value, Tensor)}
        losses = step_losses(online, assignment, batch, thresholds, recipe, watch)
        history.append({name: value.item() for name, value in losses.items()})
        with watch.phase("backward"):
            losses["loss"].backward()
        with watch.phase("optimiser"):
            optimizer.step()
            optimizer.zero_grad()
        with watch.phase("EMA"), torch.no_grad():
            for own, other in zip(assignment.parameters(), online.parameters(), strict=True):
                own.copy_(recipe.ema_momentum * own + (1 - recipe.ema_momentum) * other)
        watch.end()
    return history


def materialise_attention(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False


def step_losses(
    online: Any,
    assignment: Any,
    batch: dict[str, Tensor],
    thresholds: list[Any],
    recipe: TrainingConfig,
    watch: Stopwatch,
) -> dict[str, Tensor]:
    """The loss terms of Eq. 11 with the dense energy, and their sum."""
    labels, valid = batch["labels"], batch["valid"]
    with torch.no_grad():
        with watch.phase("AN forward"):
            passes = labelling_passes(assignment, batch["weak"], recipe.label_scales)
        with watch.phase("pseudo-labels"):
            grid = passes[0].logits.shape[-2:]
            tokens = [F.adaptive_avg_pool2d(mask[None].float(), grid)[0] >= 0.5 for mask in valid]
            cams, aux_cams = [], []
            for name, collected in (("cam_logits", cams), ("aux_cam_logits", aux_cams)):
                highest = torch.stack([resized(maps[name], grid) for maps in passes]).amax(0)
                for maps, tags, inside in zip(highest, labels, tokens, strict=True):
                    collected.append(normalized(maps, tags, inside))
            logits = torch.stack([resized(maps["logits"], grid) for maps in passes]).mean(0)
            spl = [sharpened(maps, tags, recipe.spl_temperature) for maps, tags in zip(logits, labels, strict=True)]
        with watch.phase("threshold"):
            for threshold, maps in zip(thresholds, (cams, aux_cams), strict=True):
                seen = [cam.amax(0)[inside] for cam, inside in zip(maps, tokens, strict=True)]
                threshold.update(torch.cat(seen))
    with watch.phase("ON forward"):
        outputs = online(batch["strong"])
    xi, aux_xi = (threshold.value for threshold in thresholds)
    with watch.phase("objective"):
        losses = {
            "cls": F.multilabel_soft_margin_loss(outputs.cls_logits, labels),
            "aux_cls": F.multilabel_soft_margin_loss(outputs.aux_cls_logits, labels),
            "c2s": cam2seg(outputs.logits, cams, xi, valid, recipe),
            "aux_c2s": cam2seg(outputs.logits, aux_cams, aux_xi, valid, recipe),
            "s2c": seg2cam(outputs.cam_logits, spl, tokens),
            "csc": separation(outputs.cam_logits, aux_cams, aux_xi, tokens, recipe),
        }
    with watch.phase("dense energy"):
        losses["energy"] = energy(outputs.logits, batch["strong"], valid, online, recipe)
    weights = {"c2s": 0.1, "aux_c2s": 0.1, "s2c": 0.05, "csc": 0.1, "energy": 0.05}
    losses["loss"] = sum(weights.get(name, 1.0) * value for name, value in losses.items())
    return losses


def labelling_passes(assignment: Any, images: Tensor, scales: list[float]) -> list[Any]:
    stride, passes = assignment.backbone.stride, []
    for scale in scales:
        size = [max(1, math.floor(side * scale / stride + 0.5)) * stride for side in images.shape[-2:]]
        scaled = F.interpolate(images, size=size, mode="bilinear", align_corners=False)
        passes.append(assignment(scaled))
        mirrored = assignment(scaled.flip(-1))
        for name in ("logits", "cam_logits", "aux_cam_logits"):
            mirrored[name] = mirrored[name].flip(-1)
        passes.append(mirrored)
    return passes


def resized(maps: Tensor, size: Any) -> Tensor:
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def normalized(maps: Tensor, tags: Tensor, inside: Tensor) -> Tensor:
    cams = torch.zeros_like(maps)
    for c in torch.nonzero(tags).flatten().tolist():
        cam = maps[c].relu()
        low, high = cam[inside].min(), cam[inside].max()
        if high > low:
            cams[c] = torch.where(inside, (cam - low) / (high - low), 0.0)
        elif high > 0:
            cams[c] = inside.float()
    return cams


def sharpened(logits: Tensor, tags: Tensor, temperature: float) -> Tensor:
    present = F.pad(tags.bool(), (1, 0), value=True)
    return (logits.masked_fill(~present[:, None, None], -torch.inf) / temperature).softmax(0)


def perplexity(nu: Tensor, xi: float, recipe: TrainingConfig) -> Tensor:
    distance = torch.where(nu >= xi, (nu - xi) / (1 - xi), (xi - nu) / xi).clamp(1e-4, 1.0)
    return (-(recipe.perplexity_alpha * distance).log()) ** recipe.perplexity_beta


def cam2seg(logits: Tensor, cams: list[Tensor], xi: float, valid: Tensor, recipe: TrainingConfig) -> Tensor:
    upsampled = resized(logits, valid.shape[-2:])
    errors, reliability = [], []
    for maps, cam, inside in zip(upsampled, cams, valid, strict=True):
        nu, winner = resized(cam[None], valid.shape[-2:])[0].max(0)
        ids = torch.where(nu >= xi, winner + 1, 0).masked_fill(~inside, 255)
        errors.append(F.cross_entropy(maps[None], ids[None], ignore_index=255, reduction="none")[0])
        reliability.append(inside / perplexity(nu, xi, recipe))
    weight, count = torch.stack(reliability), valid.sum()
    return (torch.stack(errors) * weight * (count / weight.sum())).sum() / count


def seg2cam(cam_logits: Tensor, spl: list[Tensor], tokens: list[Tensor]) -> Tensor:
    errors = [
        F.binary_cross_entropy_with_logits(maps, target[1:], reduction="none").mean(0)[inside]
        for maps, target, inside in zip(cam_logits, spl, tokens, strict=True)
    ]
    return torch.cat(errors).mean()


def separation(
    cam_logits: Tensor, cams: list[Tensor], xi: float, tokens: list[Tensor], recipe: TrainingConfig
) -> Tensor:
    losses = []
    for maps, cam, inside in zip(cam_logits, cams, tokens, strict=True):
        nu, winner = cam.max(0)
        omega = inside & (perplexity(nu, xi, recipe) <= recipe.perplexity_epsilon)
        ids = torch.where(nu >= xi, winner + 1, 0)[omega]
        vectors = F.normalize(maps[:, omega].T, dim=1, eps=1e-3)
        similarity = vectors @ vectors.T / recipe.separation_temperature
        same = ids[:, None] == ids[None]
        against = similarity.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
        positive = same & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
        anchors = positive.any(1) & (~same).any(1)
        errors = F.softplus(against[anchors] - similarity[anchors]) * positive[anchors]
        losses.append(errors.sum(1) / positive[anchors].sum(1))
    anchors = torch.cat(losses)
    return anchors.mean() if len(anchors) else cam_logits.sum() * 0.0


def energy(logits: Tensor, images: Tensor, valid: Tensor, online: Any, recipe: TrainingConfig) -> Tensor:
    """Exact, as in the package; the released code's filter is a compiled approximation, several times as fast."""
    colors = images * (255 * torch.tensor(online.backbone.data_config["std"], device=images.device).view(3, 1, 1))
    return dense_energy_loss(logits, colors, valid, valid, recipe.dense_energy_scale)
