"""`cosa-hf label`, for `accelerate launch scripts/export_pseudo_labels.py` from a clone."""

import sys

# Python put this folder first, where it holds no modules: its evaluate.py would hide the library of that name.
sys.path.pop(0)

from cosa_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["label", *sys.argv[1:]]))
