"""Show what the cached features of frozen encoders take on the disk, or remove them.

Runs with `--frozen_blocks` make them, and make again what is missing.

    cosa-hf cache
    cosa-hf cache --clear
"""

from collections.abc import Sequence
from pathlib import Path

from cosa_hf.commands.arguments import command_parser
from cosa_hf.training.features import caches, clear, default_directory


def main(arguments: Sequence[str]) -> None:
    parser = command_parser("cache", __doc__)
    parser.add_argument("--cache_dir", type=Path, default=default_directory(), help="directory of the caches")
    parser.add_argument("--clear", action="store_true", help="remove them; runs make them again as they need them")
    args = parser.parse_args(arguments)
    found = caches(args.cache_dir)
    for directory, size, encoder in found:
        print(f"{size / 1e9:8.2f} GB  {directory}  {encoder}")
    if args.clear:
        print(f"removed {len(found)} caches, {clear(args.cache_dir) / 1e9:.2f} GB")
    elif not found:
        print(f"no cached features in {args.cache_dir}")
