"""The model that comes with the package: there, small, as its card says, and of use at once."""

from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

import cosa_hf
from cosa_hf.data import VOC_CLASSES
from cosa_hf.digest import weights_sha256
from cosa_hf.inference import load_model

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path(cosa_hf.demo_model())


def test_pipeline_works_at_once():
    segmenter = pipeline("image-segmentation", model=cosa_hf.demo_model())
    segments = segmenter(Image.new("RGB", (60, 40), "grey"))
    assert list(segmenter.model.config.id2label.values()) == ["background", *VOC_CLASSES]
    assert {segment["label"] for segment in segments} <= {"background", *VOC_CLASSES}
    assert all(segment["mask"].size == (60, 40) for segment in segments)


def test_small_and_in_half_precision():
    weights = DEMO / "model.safetensors"
    assert weights.stat().st_size < 7e6
    assert {tensor.dtype.itemsize for tensor in load_file(weights).values() if tensor.is_floating_point()} == {2}


def test_the_card_is_of_these_weights_and_says_what_they_are():
    card = (DEMO / "README.md").read_text()
    assert weights_sha256(load_model(str(DEMO), "cpu")[0]) in card
    known = ("VOC-1696", "tags unknown", "no mask of any", "CLIP", "Flickr", "No number here compares")
    for words in (*known, "cosa_hf.demo_model()"):
        assert words in card, words
    assert "trust_remote_code" not in card  # its code is the package
    copy = (ROOT / "model_cards" / "cosa-ms-lite0-voc-1696.md").read_text()
    assert copy == card.replace("](recipe.yaml)", "](../src/cosa_hf/demo/model/recipe.yaml)")


@pytest.mark.parametrize("name", ["config.json", "recipe.yaml", "README.md"])
def test_nothing_of_the_machine_it_was_made_on(name):
    assert "/tmp/" not in (DEMO / name).read_text()
