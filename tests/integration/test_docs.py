"""The blocks of docs/own-data.md run as they stand, on drawn photos."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cosa_hf.data import load_shapes

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_guide_to_own_data_runs(tmp_path):
    (tmp_path / "photos").mkdir()
    dataset = load_shapes("train", num_images=30)
    names = dataset.features["labels"].feature.names
    lines = ["file_name,labels"]
    for index, row in enumerate(dataset):
        row["image"].save(tmp_path / f"photos/{index}.png")
        lines.append(f"{index}.png,{'; '.join(names[label] for label in row['labels'])}")
    (tmp_path / "photos/metadata.csv").write_text("\n".join(lines))
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PATH": path}

    blocks = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "docs/own-data.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 3
    for language, code in blocks:
        command = ["bash", "-e", "-c", code] if language == "sh" else [sys.executable, "-c", code]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stdout + run.stderr
    assert (tmp_path / "runs/dry/masks/0.png").is_file()
