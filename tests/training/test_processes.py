"""The same run on one process, on two, and in accumulated parts."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, PartialState, debug_launcher
from accelerate.state import AcceleratorState
from cosa_hf.training.loop import train

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import SHAPES_CLASSES, load_shapes
from cosa_hf.evaluation.evaluate import evaluate_model
from cosa_hf.training import checkpoints

pytestmark = pytest.mark.usefixtures("few_shapes")

SPLITS = {
    "one process": {"batch_size": 4},
    "two processes": {"batch_size": 2},
    "accumulated": {"batch_size": 1, "gradient_accumulation_steps": 4},
    "two processes, accumulated": {"batch_size": 1, "gradient_accumulation_steps": 2},
}


def run(name: str, recipe) -> None:
    AcceleratorState._reset_state(True)
    if name.startswith("two"):
        debug_launcher(train, args=(recipe,), num_processes=2)
    else:
        train(recipe)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(
    ("steps", "splits", "fields"),
    [
        pytest.param(20, list(SPLITS), {}, marks=pytest.mark.slow),
        (7, ["two processes, accumulated"], {}),
        (7, ["two processes, accumulated"], {"balanced": True, "reliability_weighting": False, "relu_cams": True}),
        (4, ["two processes, accumulated"], {"supervision": "masks"}),
    ],
    ids=["twenty steps", "paper", "release", "masks"],
)
def test_a_step_is_the_same_however_its_images_are_shared_out(
    tiny, tmp_path, left, assert_equal, steps, splits, fields
):
    settings = {
        "max_steps": steps,
        "warmup_steps": steps // 4,
        # Where the gradient is zero but for rounding, Adam makes steps of noise, as long as the rate: a small one.
        "learning_rate": 1e-5,
        "head_lr_multiplier": 100,
        "images_per_step": 4,
        "threshold_decay": 0.5,
        "max_grad_norm": 1.0,
        # Crops with much padding: no two parts of a step have as many valid pixels.
        "scale_min": 0.4,
        "scale_max": 1.2,
    }
    results = {}
    for name in dict.fromkeys(["one process", *splits]):
        recipe = tiny(output_dir=str(tmp_path / name.replace(" ", "-")), **settings | SPLITS[name] | fields)
        run(name, recipe)
        results[name] = left(recipe)
    expected = results.pop("one process")
    assert len(expected["log"]) == steps
    for name, result in results.items():
        assert_equal(expected, result, tolerance=1e-5, where=name)


def test_two_processes_resume_to_what_they_would_have_been(tiny, left, assert_equal):
    settings = {"batch_size": 1, "guidance": "noise", "checkpoint_every": 4, "max_steps": 8}
    recipe = tiny(**settings)
    run("two processes", recipe)
    expected = left(recipe)
    sorted((Path(recipe.output_dir) / "checkpoints").iterdir())[-1].unlink()
    run("two processes", tiny(resume=True, **settings))
    assert_equal(expected, left(recipe))


def fill_the_disk(recipe, log):
    def full(*arguments, **options):
        raise OSError("no space left on device")

    checkpoints.save_file = full  # in this process alone, which ends with the test
    try:
        train(recipe)
    except OSError as error:
        Path(f"{log}-{PartialState().process_index}").write_text(str(error))


def test_a_full_disk_ends_all_processes(tiny, tmp_path):
    AcceleratorState._reset_state(True)
    debug_launcher(fill_the_disk, args=(tiny(batch_size=1, checkpoint_every=2), tmp_path / "said"), num_processes=2)
    AcceleratorState._reset_state(True)
    for rank in (0, 1):
        assert "cannot write the checkpoint of step 2" in Path(f"{tmp_path}/said-{rank}").read_text()


def score(model, processor, images, path):
    accelerator = Accelerator()
    dataset = load_shapes("val", num_images=images, image_size=48, masks=True)
    report = evaluate_model(
        model, processor, dataset, scales=(1.0,), flip=False, progress=False, batch_size=1, accelerator=accelerator
    )
    Path(f"{path}-{accelerator.process_index}").write_text(json.dumps(report))


@pytest.mark.parametrize("images", [1, 5])
def test_every_image_counts_once_on_two_processes(tmp_path, images):
    torch.manual_seed(0)
    config = CoSAConfig(backbone="test_vit", id2label=dict(enumerate(["background", *SHAPES_CLASSES])))
    model = CoSAForWeaklySupervisedSegmentation(config).eval()
    processor = CoSAImageProcessor(size={"height": 48, "width": 48})
    AcceleratorState._reset_state(True)
    debug_launcher(score, args=(model, processor, images, tmp_path / "two"), num_processes=2)
    dataset = load_shapes("val", num_images=images, image_size=48, masks=True)
    expected = evaluate_model(model, processor, dataset, scales=(1.0,), flip=False, progress=False, batch_size=1)
    for rank in (0, 1):
        report = json.loads(Path(f"{tmp_path}/two-{rank}").read_text())
        assert report["images"] == images
        for protocol in ("seg", "seg_tags", "cam", "cam_aux", "cam_mean"):
            assert report[protocol] == expected[protocol]
