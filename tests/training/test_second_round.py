"""A second round: training on masks that `cosa-hf label` wrote of the same images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from drawn import write_voc
from in_process import run_command
from PIL import Image
from runs_of import assert_equal, log_of, summary_of, tiny_config, weights_of

from cosa_hf.assignment.network import AssignmentNetwork
from cosa_hf.backbone_cosa import CoSABackbone
from cosa_hf.data import SHAPES_CLASSES
from cosa_hf.training.trainer import train

TERMS = {"loss", "cls", "aux_cls", "c2s"}


@pytest.fixture
def second(tmp_path):
    def make(labels, name="second", **fields):
        settings = {"train_split": "train", "pseudo_labels": str(labels), "output_dir": str(tmp_path / name)}
        return tiny_config(**settings | fields)

    return make


@pytest.mark.parametrize("format", ["png", "parquet"])
def test_the_exports_masks_are_learned_as_true_ones_would_be(second, export, tmp_path, capsys, monkeypatch, format):
    monkeypatch.setattr(AssignmentNetwork, "label", None)
    config = second(export(format))
    train(config)
    assert f"on the masks of {config.pseudo_labels}; " in capsys.readouterr().out
    assert all(set(entry) >= TERMS and "s2c" not in entry for entry in log_of(config)), "from the first step on"
    made = summary_of(config)["pseudo_labels"]
    assert made["settings"]["source"] == "cam_mean"
    bound = {"dataset": "voc", "data_dir": str(export("png")), "supervision": "masks", "pseudo_labels": None}
    true = replace(config, output_dir=str(tmp_path / "true"), **bound)
    train(true)
    assert_equal(weights_of(config), weights_of(true))
    assert summary_of(true)["pseudo_labels"] is None


def test_a_second_round_takes_what_the_first_encoded(tmp_path, monkeypatch, capsys):
    """Train on tags, label with a CRF, train on these labels: the encoder runs in the first of the three alone."""
    root = tmp_path / "VOC2012"
    root.mkdir()
    write_voc(root, ["train"])
    (root / "classes.txt").write_text("\n".join(SHAPES_CLASSES))
    cache, first = str(tmp_path / "cache"), str(tmp_path / "first")
    heads = {"frozen_blocks": "all", "cache_features": cache, "affinity": "features", "standardize_features": True}
    on_tags = tiny_config(dataset="voc", data_dir=str(root), train_split="train", output_dir=first, **heads)
    recommended = train(on_tags)
    monkeypatch.setattr(CoSABackbone, "forward", None)
    voc = ["--dataset", "voc", "--data_dir", root, "--split", "train", "--scales", "1", "--format", "png"]
    made_of = ["--source", "seg_spread", "--crf", "--cache_features", cache]
    assert run_command("label", recommended, *voc, *made_of, "--output_dir", tmp_path / "labels") == 0
    on_labels = replace(on_tags, pseudo_labels=str(tmp_path / "labels"), output_dir=str(tmp_path / "second"))
    train(on_labels)
    assert summary_of(on_labels)["pseudo_labels"]["settings"]["crf"]["iterations"] == 10
    assert capsys.readouterr().out.count("encoding 6 images once") == 1


def test_masks_that_cannot_be_learned_are_named_before_the_first_step(second, export, tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    for path in export("png").iterdir():
        if path.name != "SegmentationClassAug":
            (labels / path.name).symlink_to(path)
    (labels / "SegmentationClassAug").mkdir()
    masks = sorted((export("png") / "SegmentationClassAug").iterdir())
    for path in masks:
        (labels / "SegmentationClassAug" / path.name).write_bytes(path.read_bytes())
    Image.new("L", (7, 7)).save(labels / "SegmentationClassAug" / masks[2].name)
    with pytest.raises(ValueError, match=f"(?s)1 of 6 pseudo-labels cannot be trained on.*{masks[2].name}.*7x7"):
        train(second(labels))
    assert not Path(second(labels).output_dir).exists()


def test_an_export_that_was_interrupted_is_refused(second, export, tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    record = json.loads((export("png") / "export.json").read_text())
    (labels / "export.json").write_text(json.dumps(record | {"complete": False}))
    with pytest.raises(ValueError, match="was interrupted; run the same export again"):
        train(second(labels))


@pytest.mark.parametrize(
    "fields", [{"supervision": "masks"}, {"guidance": "gt"}, {"dataset": "hub", "streaming": True}], ids=str
)
def test_other_masks_beside_them_are_refused(second, fields):
    with pytest.raises(ValueError, match="pseudo_labels take the place of streaming, supervision masks and guidance"):
        second("labels", **fields)
    assert tiny_config(**fields).pseudo_labels is None, "without them, as advised"
