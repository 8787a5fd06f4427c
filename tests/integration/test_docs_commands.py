"""The shell blocks of README and docs/: typed by bash, run on small data, their trainings cut short."""

import functools
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from in_process import run_script

from cosa_hf.data import SHAPES_CLASSES, VOC_CLASSES, load_shapes
from cosa_hf.inference import load_model
from cosa_hf.publishing.official import to_official

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: What bash is kept from running: it writes down what it was asked to run.
PROGRAMS = ("python", "python3", ".venv/bin/pip", "accelerate", "torchrun", "pip", "make", "hf")
#: Flags given last win. Sizes and lengths only, and nothing that would need a download.
RANDOM = "--pretrained false --backbone_weights ''"
NETWORK = f"--backbone test_vit --aux_layer -2 {RANDOM} --resume false --label_scales 1.0 --ema_momentum 0.2"
SHORT = (
    "--max_steps 2 --lr_warmup_steps 1 --crop_size 48 --input_size 48 --batch_size 2 --gradient_accumulation_steps 1 "
    "--num_workers 0 --mixed_precision no --eval_every 0 --checkpoint_every 0 --tracker none"
)
CUT = {
    "train.py": f"{NETWORK} --warmup_steps 1 {SHORT}",
    "train_multistage.py": f"--network largefov/test_resnet {RANDOM} --decoder_channels 16 {SHORT}",
    "convert_checkpoint.py": "--backbone test_vit",
    "evaluate.py": "--scales 1",
    "analyze.py": "--num_images 2",
    "compress.py": "--num_images 2",
    "threshold.py": "--images 2",
    # One of the four that wait for a compiler.
    "ways.py": "--rounds 1 --ways flips scales SDPA last bf16 AdamW EMA stride 'compiled AN, ViT-S'",
}
#: Too long even so; the tests named here run them.
ELSEWHERE = {
    "research/ablate.py": "test_ablate.py",
    "research/benchmark.py": "test_benchmark.py",
    "app.py": "test_app.py",
}


@functools.cache
def typed(page):
    """The commands of a page's `sh` blocks, as lists of words: variables, loops and quotes done by bash."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    # Blocks with three dots or brackets show a form; they are not to be typed.
    return [block for block in blocks if not re.search(r"\s(\.\.\.|\[--)", block)]


def commands(page, directory):
    """The commands of a page's `sh` blocks in words, typed in `directory`, where all but PROGRAMS runs."""
    written = directory / "commands"
    record = "".join(
        f"{name}() {{ printf '%q ' {name} \"$@\" >> {written}; echo >> {written}; }}\n" for name in PROGRAMS
    )
    written.write_text("")
    run = subprocess.run(
        ["bash", "-eu", "-c", record + "\n".join(typed(page))],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return [shlex.split(line) for line in written.read_text().splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What somebody has who reads one page: a clone, VOC 2012, photos, and models that were trained before."""
    directory = tmp_path_factory.mktemp("clone")
    for name in ("space", "src", "app.py", "recipes"):
        (directory / name).symlink_to(ROOT / name)

    # Six drawn pictures pass for VOC, their classes for its first eight.
    voc = directory / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClassAug"):
        (voc / name).mkdir(parents=True)
    (directory / "VOC2012").symlink_to(voc, target_is_directory=True)
    tags = {}
    for row in load_shapes("val", num_images=6, masks=True):
        row["image"].save(voc / "JPEGImages" / f"{row['image_id']}.jpg")
        row["mask"].save(voc / "SegmentationClassAug" / f"{row['image_id']}.png")
        tags[row["image_id"]] = [VOC_CLASSES[label] for label in row["labels"]]
    (voc / "image_labels.json").write_text(json.dumps(tags))
    for split in ("train_aug", "val", "val_tune", "val_report"):
        (voc / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(tags) + "\n")

    photos = directory / "photos"
    photos.mkdir()
    lines = ["file_name,labels"]
    for index, row in enumerate(load_shapes("train", num_images=6)):
        row["image"].save(photos / f"{index}.png")
        lines.append(f"{index}.png,{'; '.join(SHAPES_CLASSES[label] for label in row['labels'])}")
    (photos / "metadata.csv").write_text("\n".join(lines))
    shutil.copy(photos / "0.png", directory / "photo.jpg")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(directory)
        run_here(
            monkeypatch, shlex.split("scripts/train.py --recipe voc-vit-b --data_dir VOC2012 --output_dir runs/voc")
        )
    for name in ("cosa", "no-raw", "long", "long-gt"):
        shutil.copytree(directory / "runs/voc", directory / "runs" / name)
    for name in ("MODEL", "runs/demo/model", "runs/upernet/model"):
        shutil.copytree(directory / "runs/voc/assignment", directory / name)
    shutil.copy(photos / "0.png", directory / "runs/demo/unseen.png")
    torch.save(to_official(load_model(str(directory / "MODEL"), "cpu")[0]), directory / "voc_weights.pth")
    return directory


def run_here(monkeypatch, command):
    script, *arguments = command
    try:
        run_script(monkeypatch, script, *arguments, *shlex.split(CUT.get(Path(script).name, "")))
    except SystemExit as end:
        if end.code:
            pytest.fail(f"{shlex.join(sys.argv)}\n{end.code}")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if typed(page)], ids=lambda page: page.stem)
def test_commands_run(page, clone, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(clone, tmp_path / "clone", symlinks=True))
    for words in commands(page, Path.cwd()):
        scripts = [place for place, word in enumerate(words) if word.endswith(".py")]
        sends = "scripts/push_to_hub.py" in words and "--dry_run" not in words  # test_push_to_hub.py has a Hub
        if scripts and words[scripts[0]] not in ELSEWHERE and not sends:
            run_here(monkeypatch, words[scripts[0] :])


def test_what_is_installed_and_made_exists(tmp_path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for page in PAGES:
        code = "\n".join(typed(page))
        for extra in re.findall(r"pip install .*\[(\w+)\]", code):
            assert extra in project["optional-dependencies"], page
        for target in re.findall(r"^make (\S+)", code, flags=re.MULTILINE):
            assert target in targets, page
    for place, test in ELSEWHERE.items():
        assert place.split("/")[-1].removesuffix(".py") in (Path(__file__).parent / test).read_text()
