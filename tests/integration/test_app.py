"""The directory of a Space."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from huggingface_hub import metadata_load

ROOT = Path(__file__).resolve().parents[2]


def test_space_is_complete(tmp_path):
    _, block = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/app.md").read_text(), re.DOTALL)
    shutil.copy(ROOT / "app.py", tmp_path)
    for source in ("src", "space"):
        shutil.copytree(ROOT / source, tmp_path / source)
    local = "\n".join(line for line in block.splitlines() if not line.startswith("hf "))
    subprocess.run(["bash", "-ec", local], cwd=tmp_path, check=True)
    space = tmp_path / "build" / "space"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import app, cosa_hf; print(cosa_hf.__file__, *app.example_pictures(['background', 'cat']), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(space) for line in done.stdout.split())
    assert len(done.stdout.split()) == 4

    metadata = metadata_load(space / "README.md")
    assert metadata["sdk"] == "gradio"
    assert (space / metadata["app_file"]).is_file()
    wanted = [line for line in (space / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # Trackers are for training.
    assert sorted(wanted) == sorted(name for name in project["dependencies"] if not name.startswith("tensorboard"))
