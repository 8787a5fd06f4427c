"""The embedded demo, start to end: train from tags, score on unseen images, segment an unseen picture.

    python scripts/demo.py --output_dir runs/demo

Leaves model/, report.json (with cam_baseline: the CAMs of a classification-only run of the same length), panels/*.png,
all panels in one picture as panels.png, and unseen.png with its mask.
"""

import argparse
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

import cosa_hf  # noqa: F401  (registers the model with transformers)
from cosa_hf.data import load_shapes
from cosa_hf.training.config import TrainingConfig

SCRIPTS = Path(__file__).resolve().parent


def run(script: str, *arguments: str | Path) -> None:
    """One of the scripts, as a user would call it."""
    print(f"\n$ python scripts/{script} {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([sys.executable, SCRIPTS / script, *map(str, arguments)], check=True)


@contextlib.contextmanager
def training(*arguments: str | Path, log: Path | None = None) -> Iterator[subprocess.Popen]:
    """The training script, through Accelerate, running until the end of the `with` block at the latest.

    What it prints goes to the terminal, or to a file.
    """
    print(f"\n$ accelerate launch scripts/train.py {' '.join(map(str, arguments))}", flush=True)
    launch = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    options = ("--mixed_precision", "no", "--dynamo_backend", "no", SCRIPTS / "train.py")
    output = None if log is None else log.open("w")
    # Two networks too small to share work between cores train side by side, on a core each.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [*launch, *options, *map(str, arguments)]
    # A session of its own, so that what the launcher starts can be ended with it: the training and its data workers.
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def finish(process: subprocess.Popen, log: Path | None = None) -> None:
    if process.wait():
        sys.exit(f"training failed; {log or 'the message above'} says why")


def recommended(run_dir: Path) -> Path:
    return run_dir / json.loads((run_dir / "run.json").read_text())["recommended"]


def main(output_dir: Path, recipe: str) -> None:
    started = time.perf_counter()
    # A warm-up as long as the run is classification and nothing else.
    steps = TrainingConfig.named(recipe).max_steps
    shutil.rmtree(output_dir, ignore_errors=True)
    model, report_path, panels = output_dir / "model", output_dir / "report.json", output_dir / "panels"
    on_unseen_images = ("--dataset", "shapes", "--split", "val")

    baseline, baseline_log = output_dir / "classification", output_dir / "classification.log"
    output_dir.mkdir(parents=True)
    classification_only = ("--output_dir", baseline, "--warmup_steps", str(steps))
    # Where one fails, the other ends too: it would train for nobody.
    with (
        training("--recipe", recipe, "--output_dir", output_dir / "cosa") as cosa_training,
        training("--recipe", recipe, *classification_only, log=baseline_log) as baseline_training,
    ):
        finish(cosa_training)
        finish(baseline_training, baseline_log)

    shutil.copytree(recommended(output_dir / "cosa"), model)
    run("evaluate.py", model, *on_unseen_images, "--report", report_path, "--panels", panels, "--num_panels", "6")
    run("evaluate.py", recommended(baseline), *on_unseen_images, "--report", baseline / "report.json")

    report = json.loads(report_path.read_text())
    report["cam_baseline"] = json.loads((baseline / "report.json").read_text())["cam"]
    report_path.write_text(json.dumps(report, indent=2) + "\n")

    stack(sorted(panels.glob("*.png")), output_dir / "panels.png")
    segment_unseen_picture(model, output_dir)
    print(
        f"\nmIoU on {report['images']} unseen images, in percent:\n"
        f"  segmentation, tags unknown          {report['seg']['miou']:5.1f}\n"
        f"  segmentation, tags given            {report['seg_tags']['miou']:5.1f}\n"
        f"  CAM, tags given                     {report['cam']['miou']:5.1f}\n"
        f"  CAM of a classification-only run    {report['cam_baseline']['miou']:5.1f}\n"
        f"{output_dir}: model/, report.json, panels/, unseen.png and its mask; {time.perf_counter() - started:.0f} s"
    )


def stack(pictures: list[Path], target: Path) -> None:
    """All panels in one picture, one below the other."""
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    whole = Image.new("RGB", (max(i.width for i in images), sum(i.height for i in images)), "white")
    top = 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    whole.save(target)


def segment_unseen_picture(model: Path, output_dir: Path) -> None:
    """A picture of neither split, through the pipeline that any Hugging Face user would take."""
    picture = output_dir / "unseen.png"
    load_shapes("test", num_images=1)[0]["image"].save(picture)
    segments = pipeline("image-segmentation", model=str(model))(str(picture))
    print(f"\npipeline('image-segmentation', model='{model}')('{picture}') found:")
    for segment in segments:
        print(f"  {segment['label']:12} {segment['mask'].histogram()[255]:6} pixels")
    # A directory of its own: the mask bears the picture's name.
    run("predict.py", model, picture, "--output_dir", output_dir / "unseen")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="emptied first")
    parser.add_argument("--recipe", default="shapes-tiny", help="a YAML file, or the name of one in recipes/")
    arguments = parser.parse_args()
    # The trainings have sessions of their own, which no signal to this one reaches: leave through the `with` block.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    main(arguments.output_dir, arguments.recipe)
