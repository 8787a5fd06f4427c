"""The shell blocks of README and docs/: typed by bash, run on small data, their trainings cut short."""

import functools
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch
from drawn import write_photos, write_voc
from exports import write_exports
from in_process import ROOT, run_command, run_script

from cosa_hf.cli import COMMANDS
from cosa_hf.data import VOC_CLASSES
from cosa_hf.inference import load_model
from cosa_hf.publishing.official import to_official

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

#: What bash is kept from running: it writes down what it was asked to run.
PROGRAMS = ("cosa-hf", "python", "python3", ".venv/bin/pip", "accelerate", "torchrun", "pip", "make", "hf")
#: Flags given last win. Sizes and lengths only, and nothing that would need a download.
RANDOM = "--pretrained false --backbone_weights ''"
NETWORK = f"--backbone test_vit --aux_layer -2 {RANDOM} --resume false --label_scales 1.0 --ema_momentum 0.2"
SHORT = (
    "--max_steps 2 --lr_warmup_steps 1 --crop_size 48 --input_size 48 --batch_size 2 --gradient_accumulation_steps 1 "
    "--num_workers 0 --mixed_precision no --eval_every 0 --checkpoint_every 0 --tracker none"
)
CUT = {
    "train": f"{NETWORK} --affinity_blocks -2 --warmup_steps 1 {SHORT}",
    "multistage": f"--network largefov/test_resnet {RANDOM} --decoder_channels 16 {SHORT}",
    "convert checkpoint": "--backbone test_vit",
    "evaluate": "--scales 1",
    "research/figures.py": "--num_images 2",
    "research/threshold.py": "--images 2",
}
#: Too long even so, or never done; the tests named here run them.
ELSEWHERE = {
    "demo": "integration/test_demo.py",
    "app": "integration/test_space.py",
    "research/ablate.py": "research/test_ablate.py",
    "research/benchmark.py": "research/test_benchmark.py",
}
#: What `accelerate launch` and `torchrun` start from a clone.
FRONTS = {
    f"scripts/{path.name}": re.search(r'main\(\["(\w+)"', path.read_text())[1]
    for path in (ROOT / "scripts").glob("*.py")
}


@functools.cache
def typed(page):
    """The commands of a page's `sh` blocks, as lists of words: variables, loops and quotes done by bash."""
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    # Blocks with three dots or brackets show a form; they are not to be typed.
    return [block for block in blocks if not re.search(r"\s(\.\.\.|\[--)", block)]


def asked(page, directory):
    """(command or script, arguments) of a page's `sh` blocks, typed in `directory`, where all but PROGRAMS runs."""
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
    for line in written.read_text().splitlines():
        words = shlex.split(line)
        if words[0] == "cosa-hf":
            yield words[1], words[2:]
        elif "cosa_hf.cli" in words:
            place = words.index("cosa_hf.cli") + 1
            yield words[place], words[place + 1 :]
        elif scripts := [place for place, word in enumerate(words) if word.endswith(".py")]:
            yield FRONTS.get(words[scripts[0]], words[scripts[0]]), words[scripts[0] + 1 :]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What somebody has who reads one page: a clone, VOC 2012, photos, and models that were trained before."""
    directory = tmp_path_factory.mktemp("clone")
    for name in ("space", "src", "research"):
        (directory / name).symlink_to(ROOT / name)

    # Drawn images pass for VOC, their classes for its first eight.
    write_voc(directory / "VOCdevkit/VOC2012", ("train_aug", "val", "val_tune", "val_report"), VOC_CLASSES)
    (directory / "VOC2012").symlink_to(directory / "VOCdevkit/VOC2012", target_is_directory=True)
    write_photos(directory / "photos", 6)
    write_exports(directory)
    shutil.copy(directory / "photos/0.png", directory / "photo.jpg")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(directory)
        recipe = shlex.split("--recipe voc-vit-b --data_dir VOC2012 --output_dir runs/voc")
        run_here(monkeypatch, "train", recipe)
    for name in ("cosa", "no-raw", "long", "long-gt"):
        shutil.copytree(directory / "runs/voc", directory / "runs" / name)
    for name in ("MODEL", "runs/demo/model", "runs/upernet/model"):
        shutil.copytree(directory / "runs/voc/assignment", directory / name)
    shutil.copy(directory / "photos/0.png", directory / "runs/demo/unseen.png")
    torch.save(to_official(load_model(str(directory / "MODEL"), "cpu")[0]), directory / "voc_weights.pth")
    return directory


def run_here(monkeypatch, command, arguments):
    words = list(arguments)
    if "--max_steps" not in words:  # a dry run on the page is run as it stands there
        words += shlex.split(CUT.get(" ".join([command, *words[:1]]), CUT.get(command, "")))
    try:
        failed = run_command(command, *words) if command in COMMANDS else run_script(monkeypatch, command, *words)
    except SystemExit as end:
        failed = end.code
    if failed:
        pytest.fail(f"{command} {shlex.join(words)}\n{failed}")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if typed(page)], ids=lambda page: page.stem)
def test_commands_run(page, clone, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(clone, tmp_path / "clone", symlinks=True))
    for command, arguments in asked(page, Path.cwd()):
        if command in ("train", "multistage") and "--output_dir" in arguments:
            # A page that trains does not have this run before.
            shutil.rmtree(arguments[arguments.index("--output_dir") + 1], ignore_errors=True)
        sends = command == "push" and "--dry_run" not in arguments  # test_push_to_hub.py has a Hub
        if command not in ELSEWHERE and not sends:
            run_here(monkeypatch, command, arguments)


def test_what_is_installed_and_made_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for page in PAGES:
        code = "\n".join(typed(page))
        for extra in re.findall(r"pip install .*\[(\w+)\]", code):
            assert extra in project["optional-dependencies"], page
        for target in re.findall(r"^make (\S+)", code, flags=re.MULTILINE):
            assert target in targets, page
    for test in ELSEWHERE.values():
        assert (ROOT / "tests" / test).is_file()
