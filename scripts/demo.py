"""The embedded demo, start to end: train from tags, score on unseen images, segment an unseen picture.

    python scripts/demo.py --output_dir runs/demo

Leaves model/, report.json (with cam_baseline: the CAMs of a classification-only run of the same length), panels/*.png
and unseen.png with its mask.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent


def run(script: str, *arguments: str | Path) -> None:
    """One of the scripts, as a user would call it."""
    print(f"\n$ python scripts/{script} {' '.join(map(str, arguments))}", flush=True)
    subprocess.run([sys.executable, SCRIPTS / script, *map(str, arguments)], check=True)


def train(output_dir: Path, *flags: str) -> Path:
    """Train the demo recipe through Accelerate; the directory of the network that the run recommends."""
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        SCRIPTS / "train.py",
    ]
    print(f"\n$ accelerate launch scripts/train.py --output_dir {output_dir} {' '.join(flags)}", flush=True)
    subprocess.run([*launch, "--output_dir", output_dir, *flags], check=True)
    return output_dir / json.loads((output_dir / "run.json").read_text())["recommended"]


def main(output_dir: Path) -> None:
    started = time.perf_counter()
    shutil.rmtree(output_dir, ignore_errors=True)
    on_unseen_images = ("--dataset", "shapes", "--split", "val")

    model = output_dir / "model"
    shutil.copytree(train(output_dir / "cosa"), model)
    run("evaluate.py", model, *on_unseen_images, "--report", output_dir / "report.json",
        "--panels", output_dir / "panels", "--num_panels", "6")  # fmt: skip

    recipe = output_dir / "cosa" / "recipe.yaml"
    steps = next(line.split()[1] for line in recipe.read_text().splitlines() if line.startswith("max_steps:"))
    baseline = train(output_dir / "classification", "--warmup_steps", steps)
    baseline_report = output_dir / "classification" / "report.json"
    run("evaluate.py", baseline, *on_unseen_images, "--report", baseline_report)

    report = json.loads((output_dir / "report.json").read_text())
    report["cam_baseline"] = json.loads(baseline_report.read_text())["cam"]
    (output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n")

    segment_unseen_picture(model, output_dir)
    print(
        f"\nmIoU on {report['images']} unseen images, in percent:\n"
        f"  segmentation, tags unknown                  {report['seg']['miou']:5.1f}\n"
        f"  segmentation, tags given                    {report['seg_tags']['miou']:5.1f}\n"
        f"  CAM, tags given                             {report['cam']['miou']:5.1f}\n"
        f"  CAM of a classification-only run            {report['cam_baseline']['miou']:5.1f}\n"
        f"{output_dir}: model/, report.json, panels/, unseen*.png; {time.perf_counter() - started:.0f} s in all"
    )


def segment_unseen_picture(model: Path, output_dir: Path) -> None:
    """A picture of neither split, through the pipeline that any Hugging Face user would take."""
    from transformers import pipeline

    import cosa_hf  # noqa: F401  registers the model
    from cosa_hf.data import load_shapes

    picture = output_dir / "unseen.png"
    load_shapes("test", num_images=1)[0]["image"].save(picture)
    segments = pipeline("image-segmentation", model=str(model))(str(picture))
    print(f"\npipeline('image-segmentation', model='{model}')('{picture}') found:")
    for segment in segments:
        print(f"  {segment['label']:12} {sum(segment['mask'].histogram()[1:]):6} pixels")
    run("predict.py", model, picture, "--output_dir", output_dir)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="emptied first")
    main(parser.parse_args().output_dir)
