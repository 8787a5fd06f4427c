"""kill -9, a full disk and a read-only directory at drawn moments: nothing half is taken for whole, and the same
command then leaves what it leaves without any of them.

A moment is the n-th time that the process opens, makes, renames or removes a file or connects to the Hub, and up to
some milliseconds later; a disk fails from the n-th time on that it writes, or in the middle of a file. A handful are
drawn here; fifty, and twenty of the disk: COSA_HF_FAULTS=50 pytest tests/integration/test_faults.py
"""

import errno
import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hub_server import Hub
from huggingface_hub import constants
from in_process import run_command
from runs_of import assert_equal, left, load_few_shapes, tiny_config
from tqdm import tqdm

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import SHAPES_CLASSES, load_shapes
from cosa_hf.files import CONFIG
from cosa_hf.inference import Segmenter, load_model
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.train import _checkpoints, train_multistage
from cosa_hf.pseudo_labels.export import RECORD, export_pseudo_labels
from cosa_hf.training import setup
from cosa_hf.training.checkpoints import read_checkpoint
from cosa_hf.training.config import TrainingConfig
from cosa_hf.training.features import EncodedImages
from cosa_hf.training.snapshots import snapshots
from cosa_hf.training.trainer import train

COMMANDS = ("caching", "training", "label", "export", "push", "convert", "stage", "multistage")
KILLS = int(os.environ.get("COSA_HF_FAULTS", len(COMMANDS)))
DISKS = max(2, 2 * KILLS // 5)
REPO = "org/cosa-tiny"


def network(**fields) -> CoSAForWeaklySupervisedSegmentation:
    torch.manual_seed(0)
    names = ["background", *SHAPES_CLASSES]
    config = {"backbone": "test_vit", "aux_layer": -2, "decoder_channels": 16, "id2label": dict(enumerate(names))}
    return CoSAForWeaklySupervisedSegmentation(CoSAConfig(**config | fields)).eval()


class Caching:
    """Features of six images, two at a time."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def encoded(self) -> EncodedImages:
        AcceleratorState._reset_state(True)
        processor, images = CoSAImageProcessor(size={"height": 48, "width": 48}), load_few_shapes("", None, "train")
        model = network()
        model.backbone.freeze()
        return EncodedImages(model, processor, images, self.root / "cache", Accelerator(cpu=True))

    def run(self) -> None:
        self.encoded().fill(0)

    def left(self) -> dict[str, Any]:
        encoded = self.encoded()
        return {key: encoded.read(key) for key in encoded.keys}

    def check(self, expected: dict[str, Any]) -> None:
        encoded = self.encoded()
        there = set(encoded.keys) - set(encoded.store.missing(encoded.keys))
        for key in there:
            assert_equal(encoded.read(key), expected[key])


class Training:
    """Six steps, a checkpoint and a snapshot after every two, and resumed where there is a checkpoint."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def config(self, **fields) -> TrainingConfig:
        return tiny_config(output_dir=str(self.root / "run"), checkpoint_every=2, snapshot_every=2, **fields)

    def run(self) -> None:
        setup.load_dataset_by_name = load_few_shapes
        complete = (self.root / "run/checkpoints").glob("step-*")
        train(self.config(resume=any(complete)))

    def left(self) -> dict[str, Any]:
        summary = json.loads((self.root / "run/run.json").read_text())
        kept = {step: networks(place) for step, place in snapshots(self.root / "run").items()}
        return left(self.config()) | {"recommended": summary["recommended"], "snapshots": kept}

    def check(self, expected: dict[str, Any]) -> None:
        run = self.root / "run"
        kept = [read_checkpoint(path) and int(path.stem[-7:]) for path in run.glob("checkpoints/step-*")]
        if (run / "log.jsonl").exists():
            lines = (run / "log.jsonl").read_text().splitlines(keepends=True)
            logged = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
            assert max(logged, default=0) - max(kept, default=0) <= 2
        for step, place in snapshots(run).items():
            assert_equal(networks(place), expected["snapshots"][step])
        assert_equal(networks(run), {name: expected["weights"][name] for name in networks(run)})
        if (run / "recipe.yaml").exists():
            assert TrainingConfig.from_yaml(run / "recipe.yaml") == self.config()
        if (run / "run.json").exists():
            assert json.loads((run / "run.json").read_text())["recommended"] == expected["recommended"]
            assert_equal(networks(run), expected["weights"])


class Multistage:
    """Four steps of another network on exported labels, a checkpoint after every two, resumed likewise."""

    def __init__(self, root: Path) -> None:
        self.root, self.labels = root, root.parent / "labels"
        if not self.labels.exists():
            segmenter = Segmenter(network(), CoSAImageProcessor(size={"height": 48, "width": 48}))
            images = load_shapes("train", num_images=6, image_size=48)
            export_pseudo_labels(
                segmenter, images, self.labels, source="cam", format="png", split="train", progress=False
            )

    def run(self) -> None:
        settings = {
            "pseudo_labels": str(self.labels), "network": "largefov/test_resnet", "pretrained": False,
            "decoder_channels": 16, "freeze_batch_norm": False, "crop_size": 48, "input_size": 64, "batch_size": 2,
            "images_per_step": 2, "num_workers": 0, "max_steps": 4, "learning_rate": 1e-3, "lr_warmup_steps": 1,
            "tracker": "none", "checkpoint_every": 2, "output_dir": str(self.root / "run"),
        }  # fmt: skip
        resume = bool(_checkpoints(self.root / "run"))
        train_multistage(MultistageConfig.from_mapping(settings | {"resume": resume}))

    def left(self) -> dict[str, Any]:
        return dict(load_model(str(self.root / "run/model"), "cpu")[0].state_dict())

    def check(self, expected: dict[str, Any]) -> None:
        for path in _checkpoints(self.root / "run").values():
            load_model(str(path), "cpu")
        if (self.root / "run/model" / CONFIG).exists():
            assert_equal(self.left(), expected)
        if (self.root / "run/run.json").exists():
            assert_equal(self.left(), expected)


def networks(place: Path) -> dict[str, Any]:
    """The weights of those that are there; each of them loads."""
    there = {name: place / name for name in ("online", "assignment") if (place / name / CONFIG).exists()}
    return {name: dict(load_model(str(path), "cpu")[0].state_dict()) for name, path in there.items()}


class Label:
    """Pseudo-labels of six images, two a shard."""

    def __init__(self, root: Path) -> None:
        self.output = root / "labels"

    def run(self) -> None:
        segmenter = Segmenter(network(), CoSAImageProcessor(size={"height": 48, "width": 48}))
        images = load_shapes("train", num_images=6, image_size=48)
        export_pseudo_labels(
            segmenter, images, self.output, source="cam", format="png", split="train", shard_size=2, progress=False
        )

    def left(self) -> dict[str, Any]:
        files = (path for path in self.output.rglob("*") if path.is_file() and path.name != RECORD)
        return {str(path.relative_to(self.output)): path.read_bytes() for path in files}

    def check(self, expected: dict[str, Any]) -> None:
        there = {name: content for name, content in self.left().items() if not Path(name).name.startswith(".")}
        assert {name: content == expected.get(name) for name, content in there.items() if name.endswith(".png")} == {
            name: True for name in there if name.endswith(".png")
        }
        if (self.output / RECORD).exists() and json.loads((self.output / RECORD).read_text())["complete"]:
            assert there.items() >= expected.items()


class Model:
    """A saved model to begin with."""

    def __init__(self, root: Path) -> None:
        self.root, self.model = root, root.parent / "model"
        if not self.model.exists():
            network().save_pretrained(self.model)
            CoSAImageProcessor(size={"height": 48, "width": 48}).save_pretrained(self.model)
            tiny_config().to_yaml(root.parent / "recipe.yaml")


class Export(Model):
    """The authors' layout."""

    def run(self) -> None:
        if not (self.root / "back.pth").exists():  # what is there is whole, and not written again
            report(run_command("export", self.model, self.root / "back.pth", "--format", "official"))

    def left(self) -> dict[str, Any]:
        return torch.load(self.root / "back.pth", weights_only=True)["model"]

    def check(self, expected: dict[str, Any]) -> None:
        if (self.root / "back.pth").exists():
            assert_equal(self.left(), expected)


class Convert(Model):
    """And back."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        # 20 classes, as the authors' checkpoints have.
        self.released = root.parent / "released.pth"
        if not self.released.exists():
            names = ["background", *map(str, range(20))]
            network(id2label=dict(enumerate(names))).save_pretrained(root.parent / "voc")
            CoSAImageProcessor().save_pretrained(root.parent / "voc")
            assert run_command("export", root.parent / "voc", self.released, "--format", "official") == 0

    def run(self) -> None:
        options = ("--dataset", "voc", "--backbone", "test_vit", "--aux_layer", -2)
        if not (self.root / "converted" / CONFIG).exists():
            report(run_command("convert", "checkpoint", self.released, self.root / "converted", *options))

    def left(self) -> dict[str, Any]:
        return dict(load_model(str(self.root / "converted"), "cpu")[0].state_dict())

    def check(self, expected: dict[str, Any]) -> None:
        if (self.root / "converted" / CONFIG).exists():
            assert_equal(self.left(), expected)


class Stage(Model):
    """What would be published, in a directory."""

    def run(self) -> None:
        if not (self.root / "staged" / CONFIG).exists():
            report(run_command("push", self.model, "--repo_id", REPO, "--dry_run", self.root / "staged"))

    def left(self) -> dict[str, Any]:
        return {path.name: path.read_bytes() for path in (self.root / "staged").glob("[!.]*")}

    def check(self, expected: dict[str, Any]) -> None:
        if (self.root / "staged" / CONFIG).exists():
            assert self.left() == expected


class Push(Model):
    """Over a model that is published already; the hub is a thread of the test's own process."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.hub = Hub()
        before = {".gitattributes": b"", "model.safetensors": b"old", "outdated.png": b"old"}
        self.hub.repos[REPO] = {"private": False, "commits": [("0" * 40, before)]}
        self.before = before

    def run(self) -> None:
        constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_XET = self.hub.endpoint, False, True
        os.environ["TMPDIR"] = str(self.root)
        import tempfile

        tempfile.tempdir = None
        report(run_command("push", self.model, "--repo_id", REPO))

    def left(self) -> dict[str, Any]:
        return self.hub.repos[REPO]["commits"][-1][1]

    def check(self, expected: dict[str, Any]) -> None:
        assert self.left() in (self.before, expected)


def report(status: int) -> None:
    if status:
        raise Complaint(status)


class Complaint(Exception):
    """A command ended with its one line instead of a traceback."""


KINDS = dict(zip(COMMANDS, (Caching, Training, Label, Export, Push, Convert, Stage, Multistage), strict=True))


WRITING = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate")
TOUCHING = ("open", "os.remove", "os.rmdir", "os.listdir", "os.scandir", *WRITING)


def in_child(
    task: Callable[[], None], root: Path, at_moment: Callable[[], None] | None = None, moment: int = 1, writes=False
) -> int:
    """Fork, and run `task`; from the `moment`-th time on that it touches a file beside `root` or connects, or writes
    below `root`, `at_moment` is called. Returns the child's process id."""
    child = os.fork()
    if child:
        return child
    status = 3
    try:
        log = os.open(root / ".said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = os.fdopen(os.dup(log), "w")
        touches = itertools.count(1)

        def hook(event: str, arguments: tuple) -> None:
            if writes:
                writing = event in WRITING or (event == "open" and arguments[2] & os.O_ACCMODE)
                counts = writing and str(arguments[0]).startswith(f"{root}/")
            else:
                beside = event in TOUCHING and str(arguments[0]).startswith(f"{root.parent}/")
                counts = beside or event == "socket.connect"
            if counts and next(touches) >= moment:
                at_moment()

        if at_moment:
            sys.addaudithook(hook)
        AcceleratorState._reset_state(True)
        tqdm.set_lock(threading.RLock())  # a lock of several processes would stay locked by one that is killed
        task()
        status = 0
    except (Complaint, OSError) as error:
        status = 1
        print(repr(error), file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
    raise AssertionError


def ended(child: int) -> int:
    """The child's exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """Of a command without faults: what it leaves, and how often it touches files, and writes them."""
    known: dict[str, Any] = {}

    def of(name: str):
        if name not in known:
            root = tmp_path_factory.mktemp(name) / "root"
            root.mkdir()
            command = KINDS[name](root)
            counts = []
            for writes in (False, True):
                shutil.rmtree(root)
                root.mkdir()
                read, write = os.pipe()
                status = ended(in_child(command.run, root, functools.partial(os.write, write, b"."), writes=writes))
                assert status == 0, (root / ".said").read_text()
                counts.append(len(os.read(read, 1 << 20)))
            known[name] = command.left(), *counts
        return known[name]

    return of


@pytest.mark.parametrize("number", range(KILLS))
def test_killed_at_any_moment(number, clean, tmp_path):
    draw = random.Random(number)
    name = COMMANDS[number % len(COMMANDS)]
    expected, moments, _ = clean(name)
    root = tmp_path / "root"
    root.mkdir()
    command = KINDS[name](root)
    read, write = os.pipe()
    moment, delay = draw.randint(1, moments), draw.expovariate(draw.choice([10, 100, 1000]))
    child = in_child(command.run, root, lambda: os.write(write, b"."), moment)
    os.close(write)
    assert os.read(read, 1), (root / ".said").read_text()
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    status = ended(child)
    print(f"{name}: killed at {moment} of {moments}, {1000 * delay:.1f} ms, {'at work' if status else 'done'}")
    assert status in (0, -signal.SIGKILL), (root / ".said").read_text()
    command.check(expected)
    assert ended(in_child(command.run, root)) == 0, (root / ".said").read_text()
    assert_equal(command.left(), expected)


def refuse(number: int) -> Callable[[], None]:
    def refusing() -> None:
        raise OSError(number, os.strerror(number))

    return refusing


@pytest.mark.parametrize("number", range(DISKS))
def test_full_disk_and_read_only_directory(number, clean, tmp_path):
    """The files of the process itself fail; who reads them again does so after there is room."""
    draw = random.Random(number)
    kind = ("full", "read-only")[number % 2]
    name = COMMANDS[number // 2 % len(COMMANDS)]
    expected, _, moments = clean(name)
    root = tmp_path / "root"
    root.mkdir()
    command = KINDS[name](root)
    moment = draw.randint(1, moments)
    if kind == "full" and draw.random() < 0.5:  # in the middle of a file
        limit = draw.randint(1, 200_000)

        def task():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            command.run()

        status, moment = ended(in_child(task, root)), f"byte {limit} of a file"
    else:
        fault = refuse(errno.ENOSPC if kind == "full" else errno.EROFS)
        status = ended(in_child(command.run, root, fault, moment, writes=True))
    print(f"{name}: {kind} at {moment} of {moments}, ended with {status}")
    said = (root / ".said").read_text()
    assert status in (0, 1), said
    assert "Traceback" not in said
    command.check(expected)
    assert ended(in_child(command.run, root)) == 0, (root / ".said").read_text()
    assert_equal(command.left(), expected)
