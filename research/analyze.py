"""What the pseudo-labels of a run are worth and how certain they are: the paper's Fig. 3, 4, 6, 7 and Tab. 4b.

    python research/analyze.py runs/voc --dataset voc --data_dir VOC2012 --split val --figure 3 --output_dir analysis
    python research/analyze.py CoSA=runs/a "no RAW=runs/b" --dataset shapes --figure 7 --output_dir analysis

MODEL is the directory of a run, or of a single saved model. A run is followed through the snapshots that it kept
(train with --snapshot_every N) to its end; its thresholds and perplexity constants are those of its training. A single
model is taken at its own cam_threshold and the paper's constants.

  3   accuracy of CPL against confidence and against perplexity
  4   mIoU of M and M†, over all pixels and over those of low perplexity
  6   mIoU of SPL and CPL, of the online and of the assignment network
  7   mIoU and perplexity of each image's CPL; give a run with and one without RAW
  4b  (Tab. 4b) C-mIoU and mIoU of CPL at the end; give a run with and one without CSC

Leaves OUTPUT_DIR/figure-N.csv and .png.
"""

import argparse
import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState
from analyses import ANALYSES, Labelling, format_table
from arguments import add_inference, check_output, dataset_of, dataset_parser, inference_of, named_directories, positive
from datasets import Dataset
from plots import plot_analysis
from tqdm.auto import tqdm
from transformers import AutoConfig

from cosa_hf.data import DatasetOptions
from cosa_hf.evaluation.evaluate import predict_dataset
from cosa_hf.evaluation.maps import label_names
from cosa_hf.inference import load_model, require_cams
from cosa_hf.training.checkpoints import moments
from cosa_hf.training.config import TrainingConfig


@dataclass(frozen=True)
class Subject:
    """One network at one step; `labelling` holds what its run knows about thresholds and perplexity."""

    run: str
    step: int
    network: str
    directory: Path
    labelling: dict[str, float]


def main(args: argparse.Namespace, options: DatasetOptions) -> None:
    table = args.output_dir / f"figure-{args.figure}.csv"
    picture = table.with_suffix(".png")
    try:
        check_output(table)
        check_output(picture)
        runs = named_directories(args.models)
        subjects = [subject for name, path in runs.items() for subject in networks_of(name, path, args.figure)]
        dataset = dataset_of(args, options, AutoConfig.from_pretrained(subjects[0].directory), masks=True)
        if args.num_images is not None:
            dataset = dataset.select(range(min(args.num_images, len(dataset))))
        rows = [row for subject in subjects for row in analyze(subject, args, dataset)]
        args.output_dir.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(format_table(rows))
        print(table)
        print(plot_analysis(args.figure, rows, picture))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def networks_of(name: str, path: Path, figure: str) -> Iterator[Subject]:
    """A model itself; of a run, the network that gave it its labels at each moment, for Fig. 6 both networks."""
    # A published model has its recipe beside it, as a run has.
    if (path / "config.json").is_file():
        yield Subject(name, 0, "model", path, {})
        return
    if not (path / "run.json").is_file():
        raise FileNotFoundError(f"{path} is neither a model, with a config.json, nor a finished run, with a run.json")
    recipe = TrainingConfig.from_yaml(path / "recipe.yaml")
    constants = {
        "alpha": recipe.perplexity_alpha,
        "beta": recipe.perplexity_beta,
        "epsilon": recipe.perplexity_epsilon,
    }
    labeller = "assignment" if recipe.swapping_assignments else "online"
    for moment in moments(path)[-1 if figure == "4b" else 0 :]:
        thresholds = {"threshold": moment.threshold, "aux_threshold": moment.aux_threshold}
        for network in ("online", "assignment"):
            if figure == "6" or network == labeller:
                yield Subject(name, moment.step, network, getattr(moment, network), constants | thresholds)


def analyze(subject: Subject, args: argparse.Namespace, dataset: Dataset) -> list[dict]:
    model, processor = load_model(str(subject.directory), PartialState().device)
    require_cams(model)
    config = model.config
    own = {"threshold": config.cam_threshold, "aux_threshold": config.cam_threshold}
    labelling = Labelling(
        label_names(config), coexistence_classes=config.coexistence_classes, **own | subject.labelling
    )
    predictions = predict_dataset(model, processor, dataset, **inference_of(args))
    title = f"{subject.run}, step {subject.step}, {subject.network}"
    found = ANALYSES[args.figure](tqdm(predictions, title, total=len(dataset), unit="image"), labelling)
    return [{"run": subject.run, "step": subject.step, "network": subject.network} | row for row in found]


def parse_args() -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__)
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="directory of a run or a model; NAME=DIRECTORY names it"
    )
    parser.add_argument("--figure", required=True, choices=ANALYSES, help="which, see above")
    parser.add_argument("--split", default="val", help="part of the dataset to look at (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the CSV and the PNG go")
    parser.add_argument("--num_images", type=positive, help="only the first N images; all without")
    add_inference(parser)
    options, args = parser.parse_args_into_dataclasses()
    return args, options


if __name__ == "__main__":
    main(*parse_args())
