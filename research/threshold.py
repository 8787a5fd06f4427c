"""How close the dynamic threshold comes to the best fixed one: mIoU of CAM pseudo-labels on training crops, by xi.

    python research/threshold.py runs/voc/assignment --recipe voc-lite0 --data_dir VOC2012

It reads masks, so it must not choose anything for a run that claims to have seen none. Prints, for M' and M†', the
share of tokens at 0, the mIoU at each fixed xi, and at the xi of either mixture of Eq. 6.
"""

import argparse

import torch
import torch.nn.functional as F
from arguments import one_line_errors
from torch.utils.data import DataLoader

from cosa_hf.assignment.threshold import Covariance, DynamicThreshold, ThresholdConfig
from cosa_hf.data import TrainingDataset, Views, load_dataset_by_name
from cosa_hf.evaluation.metrics import SegmentationMetric
from cosa_hf.inference import forward_multiscale, load_model
from cosa_hf.objective.overall import valid_tokens
from cosa_hf.objective.pseudo_labels import cam_pseudo_labels, normalize_cams
from cosa_hf.training.config import TrainingConfig

FIXED = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7)
COVARIANCES: tuple[Covariance, ...] = ("full", "tied")


@one_line_errors()
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    recipe = TrainingConfig.named(args.recipe, data_dir=args.data_dir)
    model, processor = load_model(args.model, "cpu")
    dataset = load_dataset_by_name(recipe.dataset, recipe.data_dir, recipe.train_split, masks=True, options=recipe)
    scale_range = (recipe.scale_min, recipe.scale_max)
    views = Views(recipe.crop_size, processor.image_mean, processor.image_std, scale_range)
    crops = TrainingDataset(dataset, views, length=args.images, seed=args.seed, masks=True)
    cams: dict[str, list[torch.Tensor]] = {"M'": [], "M†'": []}
    tokens, masks = [], []
    with torch.inference_mode():
        for batch in DataLoader(crops, batch_size=8):
            fused = forward_multiscale(model, batch["weak"], recipe.label_scales)
            tokens.append(valid_tokens(batch["valid"], fused.cam_logits))
            masks.append(batch["mask"].masked_fill(~batch["valid"], 255))
            for maps, logits in zip(cams.values(), (fused.cam_logits, fused.aux_cam_logits), strict=True):
                maps.append(normalize_cams(logits, batch["labels"], tokens[-1]))
    names = list(model.config.id2label.values())
    for name, maps in cams.items():
        report(name, torch.cat(maps), torch.cat(tokens), torch.cat(masks), names)


def report(name: str, cams: torch.Tensor, tokens: torch.Tensor, masks: torch.Tensor, names: list[str]) -> None:
    confidence = cams.amax(dim=1)[tokens]
    print(f"{name}: {(confidence == 0).float().mean():.0%} of the tokens at 0")
    by_threshold = {xi: miou(cams, xi, masks, names) for xi in FIXED}
    best = max(by_threshold, key=by_threshold.__getitem__)
    print("  fixed  " + "  ".join(f"{xi}: {value:.1f}" for xi, value in by_threshold.items()) + f"  best {best}")
    for covariance in COVARIANCES:
        threshold = DynamicThreshold(ThresholdConfig(threshold_decay=0.0, threshold_covariance=covariance))
        threshold.update(confidence)
        print(f"  {covariance}   {threshold.value:.3f}: {miou(cams, threshold.value, masks, names):.1f}")


def miou(cams: torch.Tensor, threshold: float, masks: torch.Tensor, names: list[str]) -> float:
    metric = SegmentationMetric(names)
    for maps, mask in zip(cams.split(8), masks.split(8), strict=True):
        maps = F.interpolate(maps, size=mask.shape[-2:], mode="bilinear", align_corners=False)
        metric.add_batch(predictions=cam_pseudo_labels(maps, threshold).numpy(), references=mask.numpy())
    return metric.compute()["miou"]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="directory of a saved model, or its name on the Hub")
    parser.add_argument("--recipe", required=True, help="recipe of its training: dataset, crops and scales")
    parser.add_argument("--data_dir", help="directory of the dataset; not for shapes")
    parser.add_argument("--images", type=int, default=160, help="number of crops (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=3, help="seed of the crops (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
