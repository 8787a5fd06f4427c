"""`cosa-hf push`, for `accelerate launch scripts/push_to_hub.py` from a clone."""

import sys

# Python put this folder first, where it holds no modules: its evaluate.py would hide the library of that name.
sys.path.pop(0)

from cosa_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["push", *sys.argv[1:]]))
