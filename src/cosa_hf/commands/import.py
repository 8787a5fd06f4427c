"""Turn the export of another tool into metadata.csv, the table of a folder's tags.

    cosa-hf import one-hot photos/_classes.csv --output photos/metadata.csv
    cosa-hf import csv photos/train.csv --tag_separator " " --output photos/metadata.csv

The photos are looked for below the directory of metadata.csv. Rows of one image are joined. Where an export says that
somebody looked for every class in vain, the table says -; an image that was not tagged has nothing there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from cosa_hf.commands.arguments import command_parser
from cosa_hf.data.importers import FORMATS, ImportOptions, gather, read_names, write_table
from cosa_hf.data.tags import list_some
from cosa_hf.files import check_output


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    check_target(args.output, args.overwrite)
    options = ImportOptions(
        file_column=args.file_column,
        tag_column=args.tag_column,
        tag_separator=args.tag_separator,
        names=read_names(args.names) if args.names else {},
        classes=args.classes,
        min_confidence=args.min_confidence,
    )
    rows = []
    for path in args.files:
        if not path.exists():
            raise FileNotFoundError(f"no file {path}")
        directory = path if path.is_dir() else path.parent
        rows += [(directory, row) for row in FORMATS[args.format].read(path, options)]
    images, missing = gather(rows, args.output.parent, options, args.verified, args.skip_missing)
    write_table(images, args.output)
    if unsure := [tag for _, row in rows for tag in row.unsure]:
        print(f"{len(unsure)} tags of a confidence below {args.min_confidence:g} were left out: {list_some(unsure)}")
    if missing:
        print(f"{len(missing)} images that are not there were left out: {list_some(missing)}")
    print(
        f"{args.output}: {len(images)} images, {len({tag for image in images for tag in image.tags})} classes; "
        f"{sum(image.verified for image in images)} verified to have none of them, "
        f"{sum(not image.tags and not image.verified for image in images)} untagged\n"
        f"next: cosa-hf check --dataset folder --data_dir {args.output.parent}"
    )


def check_target(target: Path, overwrite: bool) -> None:
    if target.name != "metadata.csv":
        raise ValueError(f"--output {target}: call it metadata.csv, the name that --dataset folder reads")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists: move it away, or pass --overwrite")
    check_output(target, replace=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    formats = "\n".join(f"  {name:13} {format.purpose}" for name, format in FORMATS.items())
    parser = command_parser("import", f"{__doc__}\nformats:\n{formats}")
    parser.add_argument("format", metavar="FORMAT", choices=FORMATS, help="one of the formats above")
    parser.add_argument("files", metavar="FILE", type=Path, nargs="+", help="what was exported: files or directories")
    parser.add_argument("--output", type=Path, required=True, help="metadata.csv in the directory of the photos")
    parser.add_argument("--overwrite", action="store_true", help="replace a table that is there already")
    parser.add_argument("--file_column", help="column of the images' names (default: a usual name)")
    parser.add_argument("--tag_column", help="column of the tags, or control of Label Studio (default: a usual name)")
    parser.add_argument("--tag_separator", help="what is between tags, such as ' ' (default: commas, semicolons, bars)")
    parser.add_argument("--names", type=Path, help="CSV file of ids and names, where the export has ids")
    parser.add_argument("--classes", nargs="+", help="these alone become tags (default: all)")
    parser.add_argument(
        "--min_confidence", type=float, default=1.0, help="csv: tags of less are left out; 0 is verified to be absent"
    )
    parser.add_argument("--verified", action="store_true", help="images without a tag were looked at: they get -")
    parser.add_argument("--skip_missing", action="store_true", help="leave out images that are not there")
    return parser.parse_args(arguments)
