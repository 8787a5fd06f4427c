"""NEU_Seg with its test images in two splits, `tune` to choose on and `report` to report on (notes/neu-seg.md).

    python research/neu_seg.py NEU_Seg neu

The images and masks are linked, not copied. What the first trial looked at, 250 images drawn from all, is in no report.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
from arguments import one_line_errors

from cosa_hf.files import check_output

SEEN = 250  # images of the trial that the recipe comes from


def split(source: Path, target: Path) -> dict[str, int]:
    """Write `target/metadata.csv` beside links to the images and masks.

    Returns:
        How many images each split has.
    """
    rows = list(csv.DictReader((source / "metadata.csv").read_text(encoding="utf-8").splitlines()))
    seen = set(np.random.default_rng(0).permutation(len(rows))[:SEEN].tolist())
    tests = [index for index, row in enumerate(rows) if row["split"] == "test"]
    for number, index in enumerate(tests):
        rows[index]["split"] = "report" if number % 2 and index not in seen else "tune"
    target.mkdir(parents=True)
    for directory in ("images", "masks"):
        (target / directory).symlink_to((source / directory).resolve())
    with (target / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    names = [row["split"] for row in rows]
    return {name: names.count(name) for name in dict.fromkeys(names)}


@one_line_errors()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="directory of NEU_Seg")
    parser.add_argument("target", type=Path, help="directory to make")
    args = parser.parse_args(arguments)
    check_output(args.target, directory=True)
    print(split(args.source, args.target))


if __name__ == "__main__":
    main()
