"""The paper's figures about pseudo-labels, thresholds and classification: Fig. 1a, 3, 4, 6, 7, 9 and Tab. 4b.

    python research/figures.py runs/voc --figure 3 --dataset voc --data_dir VOC2012 --split val --output_dir figures
    python research/figures.py CoSA=runs/a "no RAW=runs/b" --figure 7 --dataset shapes --output_dir figures
    python research/figures.py guided=runs/a unguided=runs/b --figure 1a --output_dir figures

MODEL is the directory of a run, or of a single saved model. A run is followed through the snapshots that it kept (train
with --snapshot_every N) to its end, with the thresholds and perplexity constants of its training. A single model is
taken at its own cam_threshold, with the paper's constants.

  1a  precision of the classification, from the reports in the directories of runs; give runs with and without guidance
  3   accuracy of CPL by confidence and by perplexity
  4   mIoU of CPL from M and M†, over all pixels and over those of low perplexity
  6   mIoU of SPL and CPL, from the online and from the assignment network
  7   mIoU and perplexity of each image's CPL; give a run with and one without RAW
  9   (left half) xi of M and M† over the steps of runs, from their log.jsonl
  4b  (Tab. 4b) C-mIoU and mIoU of CPL at the end; give a run with and one without CSC

Writes OUTPUT_DIR/figure-N.csv and .png. 1a and 9 need no dataset.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analyses import ANALYSES, Labelling
from arguments import (
    dataset_parser,
    named_paths,
    one_line_errors,
    segmenter_of,
)
from datasets import Dataset
from plots import plot_figure
from records import RECORDS

from cosa_hf.commands.arguments import positive
from cosa_hf.commands.inputs import add_inference, dataset_of, parse_dataset_args
from cosa_hf.data import DatasetOptions
from cosa_hf.files import CONFIG, check_output
from cosa_hf.inference import require_cams
from cosa_hf.progress import progress
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.snapshots import moments


@dataclass(frozen=True)
class Subject:
    """One network at one step; `labelling` holds what its run knows about thresholds and perplexity."""

    run: str
    step: int
    network: str
    directory: Path
    labelling: dict[str, float]


@one_line_errors()
def main(arguments: list[str] | None = None) -> None:
    args, options = parse(arguments)
    table = args.output_dir / f"figure-{args.figure}.csv"
    image = table.with_suffix(".png")
    check_output(table)
    check_output(image)
    runs = named_paths(args.models)
    if args.figure in RECORDS:
        rows = [row for name, path in runs.items() for row in RECORDS[args.figure](name, path)]
    else:
        rows = measure(runs, args, options)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(format_table(rows))
    print(table)
    print(plot_figure(args.figure, rows, image))


def measure(runs: dict[str, Path], args: argparse.Namespace, options: DatasetOptions) -> list[dict[str, Any]]:
    if args.dataset is None:
        raise ValueError(f"figure {args.figure} is measured on images: name a --dataset")
    subjects = [subject for name, path in runs.items() for subject in networks_of(name, path, args.figure)]
    dataset = dataset_of(args, options, segmenter_of(args, subjects[0].directory), masks=True)
    if args.num_images is not None:
        dataset = dataset.select(range(min(args.num_images, len(dataset))))
    return [row for subject in subjects for row in analyze(subject, args, dataset)]


def networks_of(name: str, path: Path, figure: str) -> Iterator[Subject]:
    """A model itself; of a run, the network that gave it its labels at each moment, for Fig. 6 both networks."""
    # A published model has its recipe beside it, as a run has.
    if (path / CONFIG).is_file():
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
    teacher = "assignment" if recipe.swapping_assignments else "online"
    for moment in moments(path)[-1 if figure == "4b" else 0 :]:
        thresholds = {"threshold": moment.threshold, "aux_threshold": moment.aux_threshold}
        for network in ("online", "assignment"):
            if figure == "6" or network == teacher:
                yield Subject(name, moment.step, network, getattr(moment, network), constants | thresholds)


def analyze(subject: Subject, args: argparse.Namespace, dataset: Dataset) -> list[dict[str, Any]]:
    segmenter = segmenter_of(args, subject.directory)
    require_cams(segmenter.model)
    config = segmenter.model.config
    own = dict.fromkeys(("threshold", "aux_threshold"), config.cam_threshold)
    labelling = Labelling(segmenter.names, coexistence_classes=config.coexistence_classes, **own | subject.labelling)
    title = f"{subject.run}, step {subject.step}, {subject.network}"
    images = progress(segmenter.predict(dataset), title, total=len(dataset), unit="image")
    place = {"run": subject.run, "step": subject.step, "network": subject.network}
    return [place | row for row in ANALYSES[args.figure](images, labelling)]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """A list of equal dicts as text: one line each, numbers to the right, None as a dash.

    Example:
        >>> print(format_table([{"run": "CoSA", "miou": 76.19}, {"run": "no CSC", "miou": None}]))
        run      miou
        CoSA    76.19
        no CSC      -
    """
    lines = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    words = [isinstance(value, str) for value in rows[0].values()]

    def padded(line: list[str]) -> Iterator[str]:
        for cell, width, left in zip(line, widths, words, strict=True):
            yield cell.ljust(width) if left else cell.rjust(width)

    return "\n".join("  ".join(padded(line)).rstrip() for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, DatasetOptions]:
    parser = dataset_parser(__doc__, required=False)
    parser.add_argument(
        "models", metavar="MODEL", nargs="+", help="directory of a run or a model; NAME=DIRECTORY names it"
    )
    parser.add_argument("--figure", required=True, choices=[*RECORDS, *ANALYSES], help="which figure, see above")
    parser.add_argument("--split", default="val", help="split of the dataset")
    parser.add_argument("--output_dir", type=Path, required=True, help="directory for the CSV and the PNG")
    parser.add_argument("--num_images", type=positive, help="only the first N images (default: all)")
    add_inference(parser)
    return parse_dataset_args(parser, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    main()
