"""`cosa-hf push` against a hub on this machine, and the published model in a process without this package."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hub_server import Hub
from huggingface_hub import ModelCard, constants
from PIL import Image
from tiny import save_cosa
from transformers import pipeline

import cosa_hf.commands.push
from cosa_hf import CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import SHAPES_CLASSES, load_shapes
from cosa_hf.digest import weights_sha256
from cosa_hf.inference import load_model
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.networks import build_network
from cosa_hf.publishing.hub import publish, stage
from cosa_hf.training.config import TrainingConfig

REPO = "org/cosa-tiny"
MODEL_FILES = {
    *("README.md", "config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml"),
    *("backbone_cosa.py", "configuration_cosa.py", "image_processing_cosa.py", "modeling_cosa.py", "timm_models.py"),
}
TAUGHT_FILES = MODEL_FILES | {"configuration_cosa_ms.py", "modeling_cosa_ms.py", "wide_resnet38.py"}

READER = """
import json, sys
import numpy as np
import torch
from PIL import Image
sys.modules["cosa_hf"] = None
from transformers import AutoImageProcessor, AutoModel, pipeline

name, photo = sys.argv[1:]
model = AutoModel.from_pretrained(name, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
image = Image.open(photo)
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
mask = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0]
segments = pipeline("image-segmentation", model=name, trust_remote_code=True)(photo)
print(json.dumps({
    "mask": mask.tolist(),
    "logits": outputs.logits[0, :, 0, 0].tolist(),
    "segments": {segment["label"]: np.asarray(segment["mask"]).tolist() for segment in segments},
}))
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A training run as the loop leaves it, with random weights."""
    directory = tmp_path_factory.mktemp("run")
    save_cosa(directory / "assignment", 64, aux_layer=-2)
    TrainingConfig(
        dataset="shapes", backbone="test_vit", pretrained=False, data_dir="/home/someone/data", output_dir="/tmp/mine"
    ).to_yaml(directory / "recipe.yaml")
    (directory / "run.json").write_text(json.dumps({"images": 7, "hardware": "1 x abacus", "seconds": 5400}))
    load_shapes("test", num_images=1)[0]["image"].save(directory / "photo.png")
    return directory


@pytest.fixture(scope="module")
def taught_dir(run_dir, tmp_path_factory):
    """The same of a network of CoSA-MS."""
    directory = tmp_path_factory.mktemp("labels")
    torch.manual_seed(0)
    recipe = MultistageConfig(
        network="smp/deeplabv3plus/test_resnet", pretrained=False, decoder_channels=16, input_size=64, dataset="shapes",
        pseudo_labels="/home/someone/labels",
    )  # fmt: skip
    model, processor = build_network(recipe, ["background", *SHAPES_CLASSES])
    model.save_pretrained(directory / "model")
    processor.save_pretrained(directory / "model")
    recipe.to_yaml(directory / "recipe.yaml")
    return directory


@pytest.fixture
def hub():
    server = Hub()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def online(hub, monkeypatch):
    """This process talks to that hub, whatever its environment says."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return hub


def run(*command, hub, home):
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_TOKEN", None)
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment, cwd=home)


@pytest.fixture
def published(run_dir, online, tmp_path):
    """The commits of a public repository that has the model."""
    stage(run_dir / "assignment", tmp_path / "first", REPO)
    publish(tmp_path / "first", REPO)
    return list(online.repos[REPO]["commits"])


@pytest.mark.slow
def test_evaluated_pushed_and_loaded_by_a_stranger(run_dir, hub, tmp_path, cosa_hf):
    model = run_dir / "assignment"
    shown = ("--report", tmp_path / "report.json", "--panels", tmp_path / "panels")
    few = ("--dataset", "shapes", "--num_images", 3, "--scales", 1, "--no_flip", "--num_panels", 2)
    cosa_hf("evaluate", model, *few, *shown)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["weights_sha256"] == weights_sha256(load_model(str(model), "cpu")[0])

    words = ("push", model, "--repo_id", REPO, "--private", *shown)
    done = run("-m", "cosa_hf.cli", *words, hub=hub, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO]["private"]
    (_, empty), (sha, files) = hub.repos[REPO]["commits"]
    assert set(empty) == {".gitattributes"}
    assert done.stdout.strip().endswith(sha)
    assert set(files) == MODEL_FILES | {
        *(".gitattributes", ".eval_results/seg.yaml", ".eval_results/seg_tags.yaml"),
        *("panels/val-00000.png", "panels/val-00001.png"),
    }

    card = ModelCard(files["README.md"].decode())
    headline = {result.metric_config: result for result in card.data.eval_results}
    for column, protocol in (("seg", "tags unknown"), ("seg_tags", "tags given")):
        assert headline[column].metric_value == pytest.approx(report[column]["miou"], abs=0.01)
        assert protocol in headline[column].metric_name
        (entry,) = yaml.safe_load(files[f".eval_results/{column}.yaml"])
        assert entry["value"] == headline[column].metric_value
        assert protocol in entry["notes"]
        assert f"| `{column}` | {protocol}" in card.text

    assert_same_masks(model, run_dir / "photo.png", hub, tmp_path / "stranger")


def assert_same_masks(model, photo, hub, home):
    """Between this process with the directory and a stranger, who has no cosa_hf, with the repository."""
    home.mkdir()
    done = run("-I", "-c", READER, REPO, photo, hub=hub, home=home)
    assert done.returncode == 0, done.stderr
    there = json.loads(done.stdout.splitlines()[-1])
    segmenter = pipeline("image-segmentation", model=str(model))
    with torch.no_grad(), Image.open(photo) as image:
        logits = segmenter.model(**segmenter.image_processor(image, return_tensors="pt")).logits
    assert there["logits"] == pytest.approx(logits[0, :, 0, 0].tolist(), abs=1e-5)
    here = segmenter(str(photo))
    assert {segment["label"] for segment in here} == set(there["segments"])
    ids = np.zeros((96, 96), dtype=int)
    for segment in here:
        mask = np.asarray(segment["mask"])
        assert np.array_equal(mask, there["segments"][segment["label"]])
        ids[mask > 0] = ["background", *SHAPES_CLASSES].index(segment["label"])
    assert np.array_equal(ids, there["mask"])


@pytest.mark.slow
def test_a_taught_network_is_loaded_by_a_stranger(taught_dir, run_dir, online, tmp_path):
    stage(taught_dir / "model", tmp_path / "staged", REPO)
    publish(tmp_path / "staged", REPO)
    (_, (_, files)) = online.repos[REPO]["commits"]
    assert set(files) == TAUGHT_FILES | {".gitattributes"}
    assert_same_masks(taught_dir / "model", run_dir / "photo.png", online, tmp_path / "stranger")


def test_failed_upload_leaves_the_old_revision(run_dir, online, published, tmp_path):
    assert set(published[-1][1]) == MODEL_FILES | {".gitattributes"}

    changed = tmp_path / "changed"
    model = CoSAForWeaklySupervisedSegmentation.from_pretrained(run_dir / "assignment")
    torch.nn.init.zeros_(model.classifier.weight)
    model.save_pretrained(changed)
    CoSAImageProcessor.from_pretrained(run_dir / "assignment").save_pretrained(changed)
    stage(changed, tmp_path / "second", REPO)
    online.refuse_large_files = True
    with pytest.raises((RuntimeError, OSError)):
        publish(tmp_path / "second", REPO)
    assert online.repos[REPO]["commits"] == published

    online.refuse_large_files = False
    publish(tmp_path / "second", REPO)
    _, files = online.repos[REPO]["commits"][-1]
    assert files["model.safetensors"] == (changed / "model.safetensors").read_bytes()
    # The first had a recipe, the second has none: the old one must not stay beside new weights.
    assert set(files) == (MODEL_FILES | {".gitattributes"}) - {"recipe.yaml"}


def test_a_public_repository_is_no_place_for_a_private_model(online, published, tmp_path):
    advice = "exists and is public: make it private in its settings, or publish without private"
    with pytest.raises(ValueError, match=advice):
        publish(tmp_path / "first", REPO, private=True)
    assert online.repos[REPO]["commits"] == published
    publish(tmp_path / "first", REPO)
    online.repos[REPO]["private"] = True
    publish(tmp_path / "first", REPO, private=True)
    assert len(online.repos[REPO]["commits"]) == len(published) + 2


def test_it_says_that_nothing_was_committed(run_dir, online, complaint):
    online.refuse_large_files = True
    said = complaint("push", run_dir / "assignment", "--repo_id", REPO)
    assert f"no commit was made; {REPO} is as it was" in said
    assert len(online.repos[REPO]["commits"]) == 1


def test_a_reason_is_given_once(model_dir, monkeypatch, complaint):
    def out_of_reach(*arguments):
        raise OSError("the Hub is out of reach")

    monkeypatch.setattr(cosa_hf.commands.push, "publish", out_of_reach)
    said = complaint("push", model_dir, "--repo_id", REPO)
    assert said == f"error: the Hub is out of reach\nno commit was made; {REPO} is as it was\n"


def test_what_push_refuses_is_staged_once_evaluate_has_written_it_as_the_errors_advise(
    run_dir, tmp_path, monkeypatch, cosa_hf, complaint
):
    monkeypatch.chdir(tmp_path)
    words = ("push", run_dir / "assignment", "--repo_id", REPO, "--dry_run", "staged")
    Path("others.json").write_text(json.dumps({"weights_sha256": "0" * 64}))
    said = complaint(*words, "--report", "others.json")
    assert "others.json was measured on those with SHA-256" in said
    assert "score it with `cosa-hf evaluate`, or publish" in said
    said = complaint(*words, "--panels", "panels")
    assert said == "error: no PNG files in panels: `cosa-hf evaluate --panels` writes them\n"
    assert complaint(*words, "--examples", "photo.png") == "error: no example photo.png\n"
    assert not Path("staged").exists()

    shown = ("--report", "report.json", "--panels", "panels")
    drawn = ("--dataset", "shapes", "--num_images", 1, "--scales", 1, "--no_flip")
    cosa_hf("evaluate", run_dir / "assignment", *drawn, *shown)
    shutil.copy("panels/val-00000.png", "photo.png")
    cosa_hf(*words, *shown, "--examples", "photo.png")
    assert Path("staged/examples/photo.png").is_file()
    miou = json.loads(Path("report.json").read_text())["seg"]["miou"]
    (entry,) = yaml.safe_load(Path("staged/.eval_results/seg.yaml").read_text())
    assert entry["value"] == round(miou, 2)
    assert [path.name for path in Path("staged/panels").iterdir()] == ["val-00000.png"]


def test_dry_run_sends_nothing(run_dir, online, tmp_path, cosa_hf):
    staged = tmp_path / "staged"
    said = cosa_hf("push", run_dir / "assignment", "--repo_id", REPO, "--dry_run", staged)
    assert online.repos == {}
    assert {path.name for path in staged.iterdir()} == MODEL_FILES
    assert "the card will hold no numbers" in said
