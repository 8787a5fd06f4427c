"""What would be published: the card and the directory, from reports and recipes."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from tiny import save_cosa, save_segformer
from transformers import AutoModelForSemanticSegmentation

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.data import VOC_CLASSES
from cosa_hf.data.coco import COCO_CLASSES
from cosa_hf.digest import weights_sha256
from cosa_hf.evaluation.evaluate import PROTOCOLS
from cosa_hf.inference import load_model
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.networks import build_network
from cosa_hf.publishing.card import model_card
from cosa_hf.publishing.hub import stage
from cosa_hf.training.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["background", "cat", "dog"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_cosa(tmp_path_factory.mktemp("run") / "online", 64, NAMES[1:], aux_layer=-2)


@functools.cache
def digest_of(model):
    return weights_sha256(load_model(str(model), "cpu")[0])


def write_report(model, path, columns=PROTOCOLS):
    """As `cosa-hf evaluate` writes it; a class that never occurs has no score."""
    scores = {
        column: {
            "miou": 40.126 + number,
            "per_class": {"background": 60.25, "cat": 20.0 + number, "dog": None},
            "coexistence_miou": None,
        }
        for number, column in enumerate(columns)
    }
    protocol = {
        **{column: PROTOCOLS[column] for column in columns},
        "scales": [1.0, 0.5],
        "flip": False,
        "input_size": [64, 64],
        "cam_threshold": 0.5,
        "ignore_index": 255,
        "coexistence_classes": [],
        "dataset": "voc",
        "split": "val_report",
        "model": "/home/someone/run/online",
    }
    rest = {"images": 200, "untagged": [], "cls_map": 87.65 if "cam" in columns else None, "protocol": protocol}
    path.write_text(json.dumps({**scores, **rest, "weights_sha256": digest_of(model)}))
    return path


@pytest.fixture
def report(model, tmp_path):
    return write_report(model, tmp_path / "report.json")


EXPORT = {
    "complete": True,
    "settings": {
        **{"source": "cam_mean", "format": "parquet", "threshold": 0.45, "scales": [1.0, 0.5], "flip": False},
        **{"split": "train_aug", "weights_sha256": "c05a" * 16, "images": 1696},
    },
    "model": "/home/someone/runs/voc/assignment",
    "cosa_hf": "0.1.0",
}


@pytest.fixture
def network(tmp_path):
    """Saves an untrained network of CoSA-MS and what its run leaves beside it; returns the model's directory."""

    def save(network="largefov/test_resnet", labels=EXPORT, **fields):
        directory = tmp_path / "network"
        recipe = MultistageConfig(
            network=network, pseudo_labels="/home/someone/VOC2012-pseudo", data_dir="/home/someone/VOC2012",
            output_dir="/scratch/someone/net", eval_every=10,
            **{"pretrained": False, "decoder_channels": 16} | fields,
        )  # fmt: skip
        model, processor = build_network(recipe, NAMES)
        model.save_pretrained(directory / "model")
        processor.save_pretrained(directory / "model")
        recipe.to_yaml(directory / "recipe.yaml")
        run = {"images": 1696, "hardware": "1 x abacus", "seconds": 600, "pseudo_labels": labels}
        (directory / "run.json").write_text(json.dumps(run))
        return directory / "model"

    return save


def card_of(model, tmp_path, **options):
    """The text of the card that is staged."""
    stage(model, tmp_path / "staged", "org/cats", **options)
    return (tmp_path / "staged" / "README.md").read_text()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_numbers_come_from_the_report(model, report, tmp_path):
    text = card_of(model, tmp_path, report=report)
    card = ModelCard(text)
    assert card.data.model_name == "cats"
    assert [(each.metric_config, each.metric_value) for each in card.data.eval_results] == [
        ("seg", 40.13),
        ("seg_tags", 41.13),
    ]
    assert all(each.dataset_type == "voc" and each.dataset_split == "val_report" for each in card.data.eval_results)
    assert f"| `seg` | {PROTOCOLS['seg']} | 40.1 | - |" in text
    assert "| cat | 20.0 | 21.0 | 22.0 | 23.0 | 24.0 |" in text
    assert "| dog | - | - | - | - | - |" in text
    assert digest_of(model) in text
    assert "Classification: mean average precision 87.7 over" in text
    assert "200 images" in text
    assert "--split val_report --scales 1 0.5 --input_size 64 --num_images 200 --no_flip" in text
    assert "not recorded: they were published without a recipe" in text
    # The paper's numbers are there, as the paper's.
    assert "**not measured here**" in text
    (entry,) = yaml.safe_load((tmp_path / "staged" / ".eval_results" / "seg_tags.yaml").read_text())
    assert entry["dataset"] == {"id": "voc", "task_id": "seg_tags"}
    assert entry["value"] == 41.13
    assert "tags given" in entry["notes"]


@pytest.mark.parametrize(
    ("size", "said"),
    [([224, 448], "Input 224 x 448, scales"), ([None, None], "Input as `preprocessor_config.json` resizes it, scales")],
)
def test_the_command_leaves_the_processor_its_size(size, said, model, report, tmp_path):
    """--input_size makes squares: no other size, and none given by an edge, can be asked for."""
    protocol = json.loads(report.read_text())["protocol"]
    edit(report, protocol=protocol | {"input_size": size})
    text = card_of(model, tmp_path, report=report)
    assert "--scales 1 0.5 --num_images 200 --no_flip" in text
    assert said in text
    assert "None" not in text


def test_a_crf_is_named_wherever_its_numbers_are(model, report, tmp_path):
    protocol = json.loads(report.read_text())["protocol"]
    edit(report, protocol=protocol | {"seg": "tags unknown, CRF: argmax", "crf": {"backend": "torch"}})
    text = card_of(model, tmp_path, report=report)
    assert "--num_images 200 --no_flip --crf" in text
    assert "name: mIoU (tags unknown, CRF)" in text


def test_benchmark_names_the_leaderboard(model, report, tmp_path):
    stage(model, tmp_path / "staged", "org/cats", report=report, benchmark="org/voc-2012")
    (entry,) = yaml.safe_load((tmp_path / "staged" / ".eval_results" / "seg.yaml").read_text())
    assert entry["dataset"]["id"] == "org/voc-2012"


def test_report_of_other_weights_is_refused(model, report, tmp_path):
    edit(report, weights_sha256="0" * 64)
    with pytest.raises(ValueError, match=r"report.json was measured on those with SHA-256 000000000000") as refused:
        stage(model, tmp_path / "staged", "org/cats", report=report)
    assert "or publish without a report, and so without numbers" in str(refused.value)
    stage(model, tmp_path / "as advised", "org/cats")
    edit(report, weights_sha256=None)
    with pytest.raises(ValueError, match="has no weights_sha256"):
        stage(model, tmp_path / "staged", "org/cats", report=report)
    assert not (tmp_path / "staged").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"report\.json is not a complete JSON file \(.+\): write it again, or name another"),
        ("[]", r"report\.json holds a list where a JSON object was expected: name another file"),
        ("{digest}", r"report\.json lacks protocol, images, seg, seg_tags: write it again"),
    ],
    ids=["empty", "a list", "no scores"],
)
def test_a_broken_report_is_named(content, message, model, report, tmp_path):
    file, whole = tmp_path / "report.json", report.read_text()
    file.write_text(content.replace("{digest}", json.dumps({"weights_sha256": digest_of(model)})))
    with pytest.raises(ValueError, match=message):
        stage(model, tmp_path / "staged", "org/cats", report=file)
    assert not (tmp_path / "staged").exists()
    file.write_text(whole)
    stage(model, tmp_path / "staged", "org/cats", report=file)


def test_without_a_report_there_are_no_numbers(model, tmp_path):
    stage(model, tmp_path / "staged", "org/cats")
    card = ModelCard((tmp_path / "staged" / "README.md").read_text())
    assert card.data.eval_results is None
    assert "No numbers: nothing has been measured on these weights." in card.text
    assert not (tmp_path / "staged" / ".eval_results").exists()


@pytest.mark.parametrize(
    ("fields", "role", "data"),
    [
        ({}, "learned from image-level tags alone", "image-level tags only"),
        ({"supervision": "masks"}, "the fully supervised upper bound", "ground-truth masks |"),
        ({"guidance": "gt"}, "an oracle", "image-level tags and ground-truth masks |"),
    ],
)
def test_a_run_that_saw_masks_is_not_called_weakly_supervised(fields, role, data):
    config = CoSAConfig(id2label=dict(enumerate(NAMES)))
    card = model_card("org/cats", config, TrainingConfig(dataset="voc", **fields), weights_sha256="0" * 64)
    assert role in card.text
    assert data in card.text
    assert ("weakly-supervised-segmentation" in card.data.tags) == (not fields)
    assert ("tags alone" in card.text) == ("never shown an outline" in card.text) == (not fields)


def test_the_card_of_a_second_round_tells_what_labelled_its_images():
    config = CoSAConfig(id2label=dict(enumerate(NAMES)))
    recipe = TrainingConfig(dataset="voc", pseudo_labels="VOC2012-pseudo")
    made = EXPORT | {"settings": EXPORT["settings"] | {"source": "seg_spread", "crf": {"iterations": 10}}}
    card = model_card("org/cats", config, recipe, run={"pseudo_labels": made}, weights_sha256="0" * 64)
    assert "learned from pseudo-labels: its training\nimages had image-level tags" in card.text
    assert "image-level tags and pseudo-labels |" in card.text
    assert "| pseudo-labels | split `train_aug`: `seg_spread` of " in card.text
    assert ", refined by a CRF |\n| backbone |" in card.text
    assert "--no_flip --crf --output_dir VOC2012-pseudo\naccelerate launch -m cosa_hf.cli train " in card.text
    assert "--data_dir VOCdevkit/VOC2012 --pseudo_labels VOC2012-pseudo\n" in card.text
    assert "No human drew the outlines it learned from: masks are coarse" in card.text
    assert "weakly-supervised-segmentation" in card.data.tags
    unknown = model_card("org/cats", config, recipe, weights_sha256="0" * 64).text
    assert "pseudo-labels, of which is not recorded how they were made" in unknown


def test_notes_come_first(model, tmp_path):
    notes = tmp_path / "notes.md"
    notes.write_text("**Mind the subset.**\n")
    stage(model, tmp_path / "staged", "cats", notes=notes)
    text = (tmp_path / "staged" / "README.md").read_text()
    assert text.index("**Mind the subset.**") < text.index("Classes: ") < text.index("## Results")
    # A name without an owner is not an address to load from.
    assert "trust_remote_code" not in text
    with pytest.raises(FileNotFoundError, match="no notes"):
        stage(model, tmp_path / "other", "cats", notes=tmp_path / "none.md")


def test_recipe_travels_without_the_paths_of_this_machine(model, tmp_path):
    recipe = TrainingConfig(
        dataset="voc",
        data_dir="/home/someone/VOC2012",
        backbone="test_vit",
        backbone_weights="/home/someone/weights/tiny.safetensors",
        output_dir="/scratch/someone/cats",
        resume=True,
        seed=3,
    )
    recipe.to_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "run.json").write_text(json.dumps({"images": 1696, "hardware": "2 x RTX 3090", "seconds": 31000}))
    stage(model, tmp_path / "staged", "org/cats", recipe=tmp_path / "recipe.yaml")
    for path in (tmp_path / "staged").iterdir():
        if path.suffix != ".safetensors":
            assert "someone" not in path.read_text(), path
    published = TrainingConfig.from_yaml(tmp_path / "staged" / "recipe.yaml")
    assert (published.seed, published.backbone_weights, published.resume) == (3, "tiny.safetensors", False)
    text = (tmp_path / "staged" / "README.md").read_text()
    assert "| hardware | 2 x RTX 3090 |" in text
    assert "| wall clock | 8.6 h |" in text
    assert "1696 images" in text
    assert "started from `tiny.safetensors`" in text
    assert ModelCard(text).data.base_model is None


def test_what_the_run_did_not_record_is_not_made_up(model, tmp_path):
    """Runs of before, and streams, whose length nobody knows."""
    TrainingConfig(backbone="test_vit").to_yaml(tmp_path / "recipe.yaml")
    (tmp_path / "run.json").write_text(json.dumps({"images": None, "recommended": "online"}))
    text = card_of(model, tmp_path, recipe=tmp_path / "recipe.yaml")
    assert "split `train_aug`, image-level tags only |" in text
    assert "| hardware | not recorded |" in text
    assert "| wall clock | not recorded |" in text


def test_recipe_of_another_backbone_is_refused(model, tmp_path):
    TrainingConfig(backbone="test_resnet").to_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="trains cosa/test_resnet, but the model is cosa/test_vit"):
        stage(model, tmp_path / "staged", "org/cats", recipe=tmp_path / "recipe.yaml")


def test_examples_are_offered_by_the_models_page(model, tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "cat.jpg")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "a dog.png")
    photos = [tmp_path / "cat.jpg", tmp_path / "a dog.png"]
    stage(model, tmp_path / "staged", "org/cats", examples=photos)
    assert ModelCard.load(tmp_path / "staged/README.md").data.widget == [
        {"src": "examples/cat.jpg", "example_title": "cat"},
        {"src": "examples/a dog.png", "example_title": "a dog"},
    ]
    for photo in photos:
        assert (tmp_path / "staged/examples" / photo.name).read_bytes() == photo.read_bytes()


def test_examples_that_a_page_cannot_show_are_refused(model, tmp_path):
    for name in ("cat.png", "cat.tif", "other/cat.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.effect_noise((64, 64), 50).save(tmp_path / name)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes((tmp_path / "cat.png").read_bytes()[:2000])
    for names, message in {
        ("nowhere.png",): "no example .*nowhere.png",
        ("text.png",): "the example .*text.png cannot be read as an image",
        ("half.png",): "the example .*half.png cannot be read as an image",
        ("cat.tif",): "the example .*cat.tif is TIFF: browsers show JPEG, PNG, WEBP",
        ("cat.png", "other/cat.png"): "two examples are called cat.png: rename one",
        ("cat.png", "cat.png"): "two examples are called cat.png: rename one",
    }.items():
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            stage(model, tmp_path / "staged", "org/cats", examples=[tmp_path / name for name in names])
        assert not (tmp_path / "staged").exists()


@pytest.mark.parametrize("argument", ["report", "recipe", "panels"])
def test_what_is_named_must_exist(argument, model, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        stage(model, tmp_path / "staged", "org/cats", **{argument: tmp_path / "nowhere"})


def test_half_a_model_is_refused(model, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"lacks model.safetensors, preprocessor_config.json, backbone"):
        stage(broken, tmp_path / "staged", "org/cats")


def test_weights_in_many_files_are_asked_for_in_one(model, tmp_path):
    CoSAForWeaklySupervisedSegmentation.from_pretrained(model).save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    CoSAImageProcessor.from_pretrained(model).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: .* in one file \(see its max_shard_size\)"):
        stage(tmp_path, tmp_path / "staged", "org/cats")
    CoSAForWeaklySupervisedSegmentation.from_pretrained(model).save_pretrained(tmp_path, max_shard_size="1GB")
    stage(tmp_path, tmp_path / "staged", "org/cats")


def test_nothing_is_mixed_into_a_directory(model, tmp_path):
    (tmp_path / "staged").mkdir()
    (tmp_path / "staged" / "note.txt").touch()
    with pytest.raises(FileExistsError, match=r"note\.txt is there already: choose another directory, or remove"):
        stage(model, tmp_path / "staged", "org/cats")


@pytest.mark.parametrize(("dataset", "classes"), [("voc", VOC_CLASSES), ("coco", COCO_CLASSES)])
def test_cards_of_the_papers_settings_are_up_to_date(dataset, classes):
    """After a change of template or recipe: write `card.content` to the file."""
    name = f"cosa-vit-b-{dataset}"
    recipe = TrainingConfig.named(f"{dataset}-vit-b")
    config = CoSAConfig(backbone=recipe.backbone, id2label=dict(enumerate(["background", *classes])))
    card = model_card(name, config, recipe, recipe_name=f"{dataset}-vit-b")
    assert card.data.eval_results is None
    assert "Not trained here" in card.text
    assert (ROOT / "model_cards" / f"{name}.md").read_text() == card.content


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (TrainingConfig(dataset="hub", dataset_name="org/pets"), ["org/pets"]),
        (TrainingConfig(dataset="hub", dataset_name="/home/someone/pets"), None),
        (TrainingConfig(dataset="voc", dataset_name="org/pets"), None),
        (TrainingConfig(dataset="folder", data_dir="org/pets"), None),
        (MultistageConfig(pseudo_labels="org/labels", dataset="voc"), ["org/labels"]),
        (MultistageConfig(pseudo_labels="VOC2012-pseudo"), None),
        (None, None),
    ],
)
def test_the_card_links_the_dataset_on_the_hub(recipe, expected):
    config = CoSAConfig(id2label=dict(enumerate(NAMES)))
    assert model_card("org/cats", config, recipe, weights_sha256="0" * 64).data.datasets == expected


def test_the_card_names_the_dataset_on_the_hub_and_needs_no_directory_of_it():
    recipe = TrainingConfig(dataset="hub", dataset_name="org/pets", train_split="train")
    text = model_card("org/cats", CoSAConfig(id2label=dict(enumerate(NAMES))), recipe, weights_sha256="0" * 64).text
    assert "| data | org/pets, split `train`, image-level tags only |" in text
    assert "train --recipe recipe.yaml\n" in text


def test_a_licence_that_the_hub_does_not_know_has_a_name_and_a_link(model, tmp_path):
    terms = tmp_path / "terms.md"
    terms.write_text("For research.\n")
    for link, published in ((terms, "LICENSE.md"), ("https://example.org/terms", "https://example.org/terms")):
        staged = tmp_path / published.replace("/", "-")
        stage(model, staged, "org/cats", license="other", license_name="research-only", license_link=str(link))
        card = ModelCard.load(staged / "README.md")
        data = card.data
        assert (data.license, data.license_name, data.license_link) == ("other", "research-only", published)
        assert f"Weights: [research-only]({published})." in card.text
    assert (tmp_path / "LICENSE.md" / "LICENSE.md").read_text() == "For research.\n"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"license_name": "research-only"}, ValueError, "of license other, not of apache-2.0"),
        (
            {"license": "other", "license_link": "nowhere"},
            FileNotFoundError,
            "no license_link nowhere: give an address",
        ),
    ],
)
def test_a_licence_that_cannot_be_read_is_refused(settings, error, message, model, tmp_path):
    with pytest.raises(error, match=message):
        stage(model, tmp_path / "staged", "org/cats", **settings)
    assert not (tmp_path / "staged").exists()


def test_a_class_name_cannot_break_the_card():
    config = CoSAConfig(id2label={0: "background", 1: "{{ 7 * 7 }} <b>"})
    assert "{{ 7 * 7 }} <b>" in model_card("org/x", config, weights_sha256="0" * 64).text


def test_the_card_of_a_taught_network_tells_what_taught_it(network, tmp_path):
    model = network()
    report = write_report(model, tmp_path / "report.json", columns=["seg", "seg_tags"])
    stage(model, tmp_path / "staged", "org/net", report=report)
    text = (tmp_path / "staged" / "README.md").read_text()
    card = ModelCard(text)
    assert [(each.metric_config, each.metric_value) for each in card.data.eval_results] == [
        ("seg", 40.13),
        ("seg_tags", 41.13),
    ]
    assert card.data.tags == ["cosa-ms", "semantic-segmentation"]
    assert "`largefov/test_resnet`, that learned from pseudo-labels: class activation maps of" in text
    assert "| network | `largefov/test_resnet`, encoder from random weights |" in text
    assert (
        "| pseudo-labels | `VOC2012-pseudo`, 1696 images, split `train_aug`: `cam_mean` of `assignment` "
        f"(SHA-256 of its tensors: `{'c05a' * 16}`), threshold 0.45, scales 1.0, 0.5 |"
    ) in text
    assert "| hardware | 1 x abacus |" in text
    assert (
        "cosa-hf label assignment --dataset voc --data_dir VOCdevkit/VOC2012 "
        "--split train_aug --source cam_mean --format parquet --threshold 0.45 --scales 1.0 0.5 --no_flip "
        "--output_dir VOC2012-pseudo\n"
        "cosa-hf multistage --recipe recipe.yaml --pseudo_labels VOC2012-pseudo "
        "--data_dir VOCdevkit/VOC2012\n"
    ) in text
    assert "| cat | 20.0 | 21.0 |\n" in text  # no columns for CAMs, which it has not
    assert "mean average precision" not in text
    assert "| CoSA-MS, DeepLabV3+ on ResNet-101 | val | not stated | 76.5 |" in text
    assert "ViT-B/16" not in text
    assert "No human drew the outlines it learned from" in text
    assert "cam_logits" not in text
    assert "It needs timm beside transformers." in text
    for path in (tmp_path / "staged").rglob("*.*"):
        if path.is_file() and path.suffix != ".safetensors":
            assert "someone" not in path.read_text(), path
    published = MultistageConfig.from_yaml(tmp_path / "staged" / "recipe.yaml")
    assert (published.pseudo_labels, published.data_dir, published.output_dir) == ("VOC2012-pseudo", None, "runs/net")


@pytest.mark.parametrize(
    ("labels", "fields", "words"),
    [
        (
            None,
            {"train_split": "train"},
            ("trained on masks with the package", "split `train`: how they were made is not"),
        ),
        (
            EXPORT | {"settings": EXPORT["settings"] | {"source": "seg", "threshold": None}},
            {"self_training": "/home/someone/first"},
            ("another segmentation network labelled its", "new ones of the images of `VOC2012-pseudo`, 1696 images"),
        ),
    ],
    ids=["no record", "self-training"],
)
def test_the_card_claims_no_more_than_the_run_recorded(labels, fields, words, network, tmp_path):
    text = card_of(network(labels=labels, **fields), tmp_path)
    for each in words:
        assert each in text
    assert "someone" not in text
    assert "cosa-hf label" not in text
    assert "class activation maps of" not in text


def test_a_network_of_transformers_has_no_code_to_carry(network, tmp_path):
    stage(network("upernet/test_resnet"), tmp_path / "staged", "org/net")
    files = {path.name for path in (tmp_path / "staged").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml"}
    text = (tmp_path / "staged" / "README.md").read_text()
    assert "trust_remote_code" not in text
    assert "`upernet/test_resnet`" in text


def test_a_network_from_a_directory_keeps_its_name_only(network, tmp_path):
    source = save_segformer(tmp_path / "segformer")
    text = card_of(network(str(source), pretrained=True, decoder_channels=None), tmp_path)
    assert "| network | `segformer`, encoder started from `segformer` |" in text
    assert ModelCard(text).data.base_model is None  # no name on the Hub
    assert str(tmp_path) not in text
    assert AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "staged").config.num_labels == 3


def test_the_card_of_a_set_of_masks_says_how_to_read_it(network, mask2former, tmp_path):
    text = card_of(network(mask2former, pretrained=True, decoder_channels=None), tmp_path)
    assert '("photo.jpg", subtask="semantic")' in text
    assert "a set of masks and their classes, `masks_queries_logits` and `class_queries_logits`." in text


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            MultistageConfig(network="largefov-wr38", pseudo_labels="x"),
            "trains largefov/wide_resnet38_a1, but the model is",
        ),
        (TrainingConfig(backbone="test_resnet"), "trains cosa/test_resnet, but the model is largefov/test_resnet"),
    ],
    ids=["another network", "CoSA"],
)
def test_recipe_of_another_network_is_refused(recipe, message, network, tmp_path):
    recipe.to_yaml(tmp_path / "other.yaml")
    with pytest.raises(ValueError, match=message):
        stage(network(), tmp_path / "staged", "org/net", recipe=tmp_path / "other.yaml")


def test_a_network_of_ours_without_its_code_is_refused(network, tmp_path):
    model = network()
    (model / "modeling_cosa_ms.py").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks modeling_cosa_ms\.py: save model and processor there"):
        stage(model, tmp_path / "staged", "org/net")
    shutil.rmtree(model)
    with pytest.raises(FileNotFoundError, match=r"lacks model\.safetensors, config\.json, preprocessor_config\.json"):
        stage(model, tmp_path / "staged", "org/net")


def test_a_card_says_what_is_frozen_and_that_the_encoder_learned_language():
    recipe = TrainingConfig.named("folder-clip")
    config = CoSAConfig(backbone=recipe.backbone, id2label={0: "background", 1: "cat"})
    text = str(model_card("org/cat", config, recipe))
    assert "started from timm's weights, frozen, with language pretraining |" in text
    assert "Backbone: mit." in text
    plain = TrainingConfig.named("folder-lite0", frozen_blocks="2", backbone_weights="lite0.safetensors")
    text = str(model_card("org/cat", CoSAConfig(backbone=plain.backbone, aux_layer=-2), plain))
    assert "started from `lite0.safetensors`, 2 blocks frozen |" in text
