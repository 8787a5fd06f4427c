"""A script run in this process, where starting Python and torch anew would only cost time."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_script(monkeypatch, script, *arguments):
    """Run a script of the repository, by its path in it, with command line arguments of any type.

    Raises:
        SystemExit: as the script does; its code is what it complains of.
    """
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, arguments)])
    # As for a script that is started. Its neighbour is imported anew: it keeps what a test had patched at the time.
    monkeypatch.syspath_prepend(ROOT / "scripts")
    sys.modules.pop("arguments", None)
    runpy.run_path(str(ROOT / script), run_name="__main__")
