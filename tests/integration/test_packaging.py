"""What `pip install cosa-hf` gets: built from the source archive, installed and used away from the sources."""

import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import yaml
from drawn import write_photos

import cosa_hf

ROOT = Path(__file__).resolve().parents[2]

# CPU time: a wall clock would measure the machine's other work. What any vision model of transformers imports
# comes first; what is left is this package, without timm, which waits for the first model, and the libraries of data.
IMPORT = """
import sys
import time
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel
from transformers.image_processing_backends import PilBackend
before = set(sys.modules)
began = time.process_time()
import cosa_hf
seconds = time.process_time() - began
imported = {name.split(".")[0] for name in set(sys.modules) - before}
assert not imported & {"accelerate", "datasets", "evaluate", "sklearn", "tensorboard", "timm"}, imported
for name in cosa_hf.__all__:
    getattr(cosa_hf, name)
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from the source archive of a copy: building leaves directories behind."""
    directory = tmp_path_factory.mktemp("wheel")
    clone = directory / "clone"
    for name in ("src", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, clone / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(source, clone / name)
    python("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(directory)!r})", cwd=clone)
    (archive,) = directory.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        assert any(name.endswith("/LICENSE") for name in tar.getnames())
    python(*("-m", "pip", "wheel", archive, "--no-deps", "--no-build-isolation", "-q", "-w", directory), cwd=directory)
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(wheel):
    """A virtual environment with the wheel, and the libraries of this one."""
    directory = wheel.parent / "venv"
    venv.create(directory, with_pip=False)
    (packages,) = directory.glob("lib/python*/site-packages")
    python("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--prefix", directory, "--ignore-installed", wheel)
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries))
    return directory / "bin"


def run(program, *arguments, cwd):
    """In the installed environment, away from the sources and from any network."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [program, *map(str, arguments)]
    options = {"cwd": cwd, "env": environment | {"HF_HUB_OFFLINE": "1"}}
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, **options)


@pytest.mark.slow
def test_wheel_has_all_that_the_package_needs(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    package = ROOT / "src" / "cosa_hf"
    wanted = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path.relative_to(ROOT / "src").as_posix() for path in wanted} <= names
    listed = ("py.typed", "publishing/cards/frame.md", "recipes/folder-lite0.yaml", "demo/model/model.safetensors")
    assert {f"cosa_hf/{name}" for name in listed} <= names
    assert not [name for name in names if not name.startswith(("cosa_hf/", "cosa_hf-"))]


@pytest.mark.slow
def test_import_of_the_installed_package_is_quick(installed, tmp_path):
    done = run(installed / "python", "-c", IMPORT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, version, seconds = done.stdout.split()
    assert Path(file).is_relative_to(installed.parent)
    assert version == cosa_hf.__version__
    assert float(seconds) < 1


@pytest.mark.slow
def test_the_command_works_where_nothing_else_is(installed, tmp_path):
    """Help in no time, a recipe by name, a training cut short, and masks."""
    command = installed / "cosa-hf"
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "train CoSA from image-level tags" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1

    write_photos(tmp_path / "photos", 20)
    cut = "--max_steps 2 --warmup_steps 1 --lr_warmup_steps 1 --ema_momentum 0.2 --batch_size 2 --images_per_step 2 "
    cut += "--num_workers 0 --crop_size 64 --input_size 64 --pretrained false"
    data = ("--dataset", "folder", "--data_dir", "photos")
    labels = "--split train --source cam_mean --format png --scales 1 --output_dir labels"
    for arguments in (
        ("check", *data),
        ("train", "--recipe", "folder-lite0", "--data_dir", "photos", "--output_dir", "run", *cut.split()),
        ("predict", "run/assignment", "photos/0.png", "--output_dir", "masks"),
        ("label", "run/assignment", *data, *labels.split()),
    ):
        done = run(command, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert arguments[0] != "predict" or done.stderr == "", "nothing to be told but the results"
    assert (tmp_path / "masks" / "0.png").is_file()
    assert len(list((tmp_path / "labels" / "SegmentationClassAug").glob("*.png"))) == 20


def test_version_comes_from_one_place():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == cosa_hf.__version__
    assert citation["preferred-citation"]["year"] == 2024
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first[1] == cosa_hf.__version__
