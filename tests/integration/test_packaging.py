"""What `pip install cosa-hf` gets: built from the source archive, imported away from the sources."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import cosa_hf

ROOT = Path(__file__).resolve().parents[2]

# CPU time: a wall clock would measure the machine's other work. What any vision model of transformers imports
# comes first; what is left is this package, without timm, which waits for the first model.
IMPORT = """
import sys
import time
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.image_processing_backends import PilBackend
began = time.process_time()
import cosa_hf
seconds = time.process_time() - began
assert "timm" not in sys.modules
from cosa_hf.publishing.card import TEMPLATES
assert (TEMPLATES / "frame.md").is_file(), TEMPLATES
print(cosa_hf.__file__, cosa_hf.__version__, seconds, sep="\\n")
"""


def python(*arguments, **options):
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=600, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_wheel_from_the_source_archive_works_away_from_the_sources(tmp_path):
    # A copy: building leaves directories behind.
    clone = tmp_path / "clone"
    names = ("src", "pyproject.toml", "README.md", "LICENSE")
    for name in names:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, clone / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, clone / name)
    python("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(tmp_path)!r})", cwd=clone)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        assert any(name.endswith("/LICENSE") for name in tar.getnames())
    python("-m", "pip", "wheel", archive, "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, cwd=tmp_path)

    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
        content.extractall(tmp_path / "installed")
    modules = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "cosa_hf").rglob("*.py")}
    demo = {f"cosa_hf/demo/{path.name}" for path in (ROOT / "src" / "cosa_hf" / "demo").iterdir()}
    assert "cosa_hf/demo/model.safetensors" in demo
    cards = {f"cosa_hf/publishing/cards/{path.name}" for path in (ROOT / "src/cosa_hf/publishing/cards").iterdir()}
    assert {"cosa_hf/publishing/cards/frame.md", "cosa_hf/py.typed", *cards, *demo, *modules} <= names
    assert not [name for name in names if name.startswith(("tests", "scripts"))]

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n{IMPORT}"
    file, version, seconds = python("-c", code, cwd=tmp_path, env=environment).split()
    assert Path(file).is_relative_to(tmp_path / "installed")
    assert version == cosa_hf.__version__
    assert float(seconds) < 1


def test_version_comes_from_one_place():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == cosa_hf.__version__
    assert citation["preferred-citation"]["year"] == 2024
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1] == cosa_hf.__version__
