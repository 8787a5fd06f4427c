"""The same run on one process, on two, and in micro-batches."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator, PartialState
from runs_of import assert_equal, checkpoints_of, left, train_on
from tiny import square, tiny_cosa

from cosa_hf.data import load_shapes
from cosa_hf.evaluation.evaluate import evaluate
from cosa_hf.inference import Segmenter
from cosa_hf.training import checkpoints
from cosa_hf.training.trainer import train

pytestmark = pytest.mark.usefixtures("few_shapes")

SPLITS = {  # processes, and how many images at a time
    "one process": (1, {"batch_size": 4}),
    "two processes": (2, {"batch_size": 2}),
    "accumulated": (1, {"batch_size": 1, "gradient_accumulation_steps": 4}),
    "two processes, accumulated": (2, {"batch_size": 1, "gradient_accumulation_steps": 2}),
}


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
def test_a_step_is_the_same_however_its_images_are_shared_out(tiny, tmp_path, steps, splits, fields):
    settings = {
        "max_steps": steps,
        "warmup_steps": steps // 4,
        # Where the gradient is zero but for rounding, Adam makes steps of noise, as long as the rate: a small one.
        "learning_rate": 1e-5,
        "head_lr_multiplier": 100,
        "images_per_step": 4,
        "threshold_decay": 0.5,
        "max_grad_norm": 1.0,
        # Crops with much padding: no two micro-batches of a step have as many valid pixels.
        "scale_min": 0.4,
        "scale_max": 1.2,
    }
    results = {}
    for name in dict.fromkeys(["one process", *splits]):
        processes, sizes = SPLITS[name]
        config = tiny(output_dir=str(tmp_path / name.replace(" ", "-")), **settings | sizes | fields)
        train_on(processes, config)
        results[name] = left(config)
    expected = results.pop("one process")
    assert len(expected["log"]) == steps
    for name, result in results.items():
        assert_equal(expected, result, tolerance=1e-5, where=name)


def test_two_processes_resume_to_what_they_would_have_been(tiny):
    settings = {"batch_size": 1, "guidance": "noise", "checkpoint_every": 4, "max_steps": 8}
    config = tiny(**settings)
    train_on(2, config)
    expected = left(config)
    checkpoints_of(config)[-1].unlink()
    train_on(2, tiny(resume=True, **settings))
    assert_equal(expected, left(config))


def fill_the_disk(config, log):
    def full(*arguments, **options):
        raise OSError("no space left on device")

    checkpoints.save_file = full  # in this process alone, which ends with the test
    try:
        train(config)
    except OSError as error:
        Path(f"{log}-{PartialState().process_index}").write_text(str(error))


def test_a_full_disk_ends_all_processes(tiny, tmp_path):
    train_on(2, tiny(batch_size=1, checkpoint_every=2), fill_the_disk, tmp_path / "said")
    for rank in (0, 1):
        assert "cannot write the checkpoint of step 2" in Path(f"{tmp_path}/said-{rank}").read_text()


def score(model, batch_size, images, path):
    """The report of every process, and how many images its network saw."""
    seen, accelerator = [], Accelerator()
    model.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    segmenter = Segmenter(accelerator.prepare(model), square(48), batch_size=batch_size, flip=True)
    dataset = load_shapes("val", num_images=images, image_size=48, masks=True)
    report = evaluate(segmenter, dataset, progress=False, accelerator=accelerator)
    Path(f"{path}-{accelerator.process_index}").write_text(json.dumps({"report": report, "seen": sum(seen)}))


@pytest.mark.parametrize(("images", "batch_size", "shares"), [(1, 1, (2, 0)), (5, 2, (6, 4))])
def test_every_image_counts_once_on_two_processes(tmp_path, images, batch_size, shares):
    """Each once as it is and once mirrored, however uneven the shares."""
    model = tiny_cosa()
    train_on(2, model, score, batch_size, images, tmp_path / "two")
    score(model, batch_size, images, tmp_path / "one")
    expected = json.loads(Path(f"{tmp_path}/one-0").read_text())
    assert expected["report"]["images"] == images
    assert expected["report"]["cls_map"] is not None
    for rank in (0, 1):
        scored = json.loads(Path(f"{tmp_path}/two-{rank}").read_text())
        assert scored == {"report": expected["report"], "seen": shares[rank]}
