"""Publish a model on the Hub: weights, config, processor, code, card, visualizations, recipe and scores in one commit.

Numbers come from the report of `cosa-hf evaluate`, which must have been measured on exactly these weights; without a
report none are published. MODEL is one of CoSA, or a network of `cosa-hf multistage`. Log in first with
`hf auth login`.

    cosa-hf push runs/voc/assignment --repo_id org/cosa-voc --report report.json --dry_run staged
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from cosa_hf.commands.arguments import command_parser
from cosa_hf.publishing.hub import publish, stage


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.dry_run or Path(scratch)
        stage(
            args.model,
            folder,
            args.repo_id,
            report=args.report,
            panels=args.panels,
            examples=args.examples,
            recipe=args.recipe,
            benchmark=args.benchmark,
            license=args.license,
            license_name=args.license_name,
            license_link=args.license_link,
            notes=args.notes,
        )
        if args.report is None:
            print("no report: the card will hold no numbers")
        if not (folder / "recipe.yaml").is_file():
            print("no recipe: the card will not tell how it was trained")
        if args.dry_run:
            files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
            print(f"{args.repo_id} would hold:", *files, sep="\n  ")
            print(f"staged in {folder}; nothing was sent")
            return
        send(folder, args.repo_id, args.private)


def send(folder: Path, repo_id: str, private: bool) -> None:
    try:
        print(publish(folder, repo_id, private))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(part) for part in (error, error.__cause__) if part is not None)
        failure = OSError(reason)
        failure.add_note(f"no commit was made; {repo_id} is as it was")
        raise failure from error


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("push", __doc__)
    parser.add_argument("model", metavar="MODEL", type=Path, help="directory of a saved model with its processor")
    parser.add_argument("--repo_id", required=True, help="where to publish, org/name")
    parser.add_argument("--report", type=Path, help="report.json of `cosa-hf evaluate` on these weights")
    parser.add_argument("--panels", type=Path, help="directory of visualizations (PNG)")
    parser.add_argument(
        "--examples",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=(),
        help="images that the model's page offers to try it on, published as they are",
    )
    parser.add_argument("--recipe", type=Path, help="recipe.yaml of the training run (default: the one beside MODEL)")
    parser.add_argument("--benchmark", help="registered benchmark on the Hub that the scores are for, org/name")
    parser.add_argument("--license", default="apache-2.0", help="of the weights, as the Hub spells it")
    parser.add_argument("--license_name", metavar="NAME", help="of a licence that the Hub does not know (other)")
    parser.add_argument(
        "--license_link", metavar="LINK", help="its text: an address, or a file, which is published as LICENSE"
    )
    parser.add_argument("--notes", type=Path, help="Markdown file that the card begins with")
    parser.add_argument("--private", action="store_true", help="create the repository private")
    parser.add_argument("--dry_run", metavar="DIR", type=Path, help="write it all to DIR and send nothing")
    return parser.parse_args(arguments)
