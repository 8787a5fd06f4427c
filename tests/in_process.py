"""Commands and scripts run in this process, where starting Python and torch anew would only cost time."""

import runpy
import sys
from pathlib import Path

from cosa_hf.cli import main

ROOT = Path(__file__).resolve().parents[1]


def run_command(*arguments):
    """Run `cosa-hf` with arguments of any type.

    Returns:
        Its exit status.

    Raises:
        SystemExit: as the command does.
    """
    return main([*map(str, arguments)])


def run_script(monkeypatch, script, *arguments):
    """Run a script of the repository, by its path in it, with command line arguments of any type.

    Raises:
        SystemExit: as the script does; its code is what it complains of.
    """
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *map(str, arguments)])
    monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
    runpy.run_path(str(ROOT / script), run_name="__main__")
