"""The embedded demo, start to end: two trainings side by side, their scores, and an image that neither has seen."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image
from transformers import pipeline

from cosa_hf.cli import main
from cosa_hf.data.shapes import load_shapes
from cosa_hf.files import check_output, whole_model
from cosa_hf.training.config import TrainingConfig

COMMAND = ("-m", "cosa_hf.cli")
ON_UNSEEN_IMAGES = ("--dataset", "shapes", "--split", "val")
CAMS = {
    "cam": "CAM of the last layer, tags given",
    "cam_aux": "CAM of the auxiliary layer, tags given",
    "cam_mean": "their mean, tags given",
}


def run(output_dir: Path, recipe: str) -> None:
    """Train, evaluate and segment as `cosa-hf demo --help` says.

    Raises:
        FileExistsError: the directory holds something already.
        ChildProcessError: a training failed; its own message is above.
        SystemExit: one of the other commands failed, with its status and message.
    """
    # The trainings have sessions of their own, which no signal to this one reaches: leave through the `with` block.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    started = time.perf_counter()
    steps = TrainingConfig.named(recipe).max_steps
    check_output(output_dir, directory=True, instead="choose another --output_dir")
    output_dir.mkdir(parents=True, exist_ok=True)
    trained, baseline = train_both(output_dir, recipe, steps)

    model, report_path, panels = output_dir / "model", output_dir / "report.json", output_dir / "panels"
    with whole_model(model) as unfinished:
        shutil.copytree(trained, unfinished, dirs_exist_ok=True)
    visualizations = ("--panels", panels, "--num_panels", "6")
    command("evaluate", model, *ON_UNSEEN_IMAGES, "--report", report_path, *visualizations)
    command("evaluate", baseline, *ON_UNSEEN_IMAGES, "--report", baseline.parent / "report.json")
    report = json.loads(report_path.read_text())
    of_tags_alone = json.loads((baseline.parent / "report.json").read_text())
    report["classification_only"] = {name: of_tags_alone[name] for name in CAMS}
    report_path.write_text(json.dumps(report, indent=2) + "\n")

    stack(sorted(panels.glob("*.png")), output_dir / "panels.png")
    segment_unseen_image(model, output_dir)
    print(f"\nmIoU on {report['images']} unseen images, in percent     CoSA   classification alone")
    for name, label in {"seg": "segmentation, tags unknown", "seg_tags": "segmentation, tags given"}.items():
        print(f"  {label:42}{report[name]['miou']:7.1f}")
    for name, label in CAMS.items():
        print(f"  {label:42}{report[name]['miou']:7.1f}{report['classification_only'][name]['miou']:12.1f}")
    print(f"{output_dir}: model/, report.json, panels/, unseen.png and its mask; {time.perf_counter() - started:.0f} s")


def train_both(output_dir: Path, recipe: str, steps: int) -> tuple[Path, Path]:
    """CoSA and, beside it, the baseline: a warm-up as long as the run is classification and nothing else.

    Returns:
        The directories of the models that the two runs recommend.
    """
    cosa, baseline = output_dir / "cosa", output_dir / "classification"
    log = output_dir / "classification.log"
    classification_only = ("--output_dir", baseline, "--warmup_steps", str(steps))
    # Where one fails, the other ends too: it would train for nobody.
    with (
        training("--recipe", recipe, "--output_dir", cosa) as cosa_training,
        training("--recipe", recipe, *classification_only, log=log) as baseline_training,
    ):
        finish(cosa_training)
        finish(baseline_training, log)
    return recommended(cosa), recommended(baseline)


@contextlib.contextmanager
def training(*arguments: str | Path, log: Path | None = None) -> Iterator[subprocess.Popen]:
    """A training, running until the end of the `with` block at the latest.

    What it prints goes to the terminal, or to a file.
    """
    print(f"\n$ cosa-hf train {' '.join(map(str, arguments))}", flush=True)
    words = (sys.executable, *COMMAND, "train", *arguments)
    output = None if log is None else log.open("w")
    # Two networks too small to share work between cores train side by side, on a core each.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # A session of its own, so that the training's data workers end with it.
    process = subprocess.Popen(
        [*map(str, words)], env=environment, stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: subprocess.Popen, log: Path | None = None) -> None:
    if process.wait():
        raise ChildProcessError(f"training failed; {log or 'the message above'} says why")


def command(name: str, *arguments: str | Path) -> None:
    """One of the commands, as a user would call it."""
    words = [name, *map(str, arguments)]
    print(f"\n$ cosa-hf {' '.join(words)}", flush=True)
    if status := main(words):
        sys.exit(status)


def recommended(run_dir: Path) -> Path:
    return run_dir / json.loads((run_dir / "run.json").read_text())["recommended"]


def stack(paths: list[Path], target: Path) -> None:
    """All visualizations in one image, one below the other."""
    images = [Image.open(path).convert("RGB") for path in paths]
    canvas = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    canvas.save(target)


def segment_unseen_image(model: Path, output_dir: Path) -> None:
    """An image of neither split, through the pipeline that any Hugging Face user would take."""
    path = output_dir / "unseen.png"
    load_shapes("test", num_images=1)[0]["image"].save(path)
    segments = pipeline("image-segmentation", model=str(model))(str(path))
    print(f"\npipeline('image-segmentation', model='{model}')('{path}') found:")
    for segment in segments:
        print(f"  {segment['label']:12} {segment['mask'].histogram()[255]:6} pixels")
    # A directory of its own: the mask bears the image's name.
    command("predict", model, path, "--output_dir", output_dir / "unseen")
