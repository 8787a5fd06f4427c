"""CoSAConfig: labels, validation, and what a saved config carries."""

import doctest
import json

import pytest

import cosa_hf.configuration_cosa
from cosa_hf import CoSAConfig
from cosa_hf.configuration_cosa_ms import CoSAMSConfig

LABELS = {0: "background", 1: "cat", 2: "dog"}


def test_labels_and_their_inverse():
    config = CoSAConfig(id2label=LABELS)
    assert (config.num_labels, config.num_classes) == (3, 2)
    assert config.label2id == {"background": 0, "cat": 1, "dog": 2}


def test_num_labels_alone_names_the_labels():
    config = CoSAConfig(num_labels=21)
    assert (config.num_labels, config.num_classes) == (21, 20)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_labels": 1}, "background"),
        ({"id2label": {}}, "background"),
        ({"id2label": {1: "cat", 2: "dog"}}, r"0\.\.1"),
        ({"id2label": {0: "background", 1: "cat", 2: "cat"}}, "cat"),
        ({"id2label": LABELS, "label2id": {"background": 0, "cat": 2, "dog": 1}}, "label2id"),
        ({"aux_layer": -1}, "aux_layer=-1"),
        ({"aux_layer": 2}, "aux_layer=2"),
        ({"output_stride": 0}, "output_stride=0 must be 8, 16 or 32"),
        ({"output_stride": 4}, "output_stride=4"),
        ({"output_stride": 12}, "output_stride=12"),
        ({"cam_threshold": 0.0}, "cam_threshold=0.0"),
        ({"cam_threshold": 1.0}, "cam_threshold=1.0"),
        ({"pooling_weights": "distance", "pooling": "lse"}, "pooling_weights='distance' needs.*got 'lse' and False"),
        ({"pooling_weights": "distance", "center_features": True}, "pooling_weights='distance' needs.*got 'max' and"),
        ({"id2label": LABELS, "coexistence_classes": ["cat", "train"]}, r"\['train'\]"),
        ({"id2label": LABELS, "coexistence_classes": ["background"]}, "background"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        CoSAConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "advice", "followed"),
    [
        ({"aux_layer": 2}, "aux_layer=2 is not a layer: count from the end, -1 or lower", [{"aux_layer": -2}]),
        ({"affinity_blocks": [1]}, r"affinity_blocks=\[1\] must be blocks, counted", [{"affinity_blocks": [-2]}]),
        (
            {"aux_layer": -1},
            r"is the map F itself: choose another layer \(-2 or lower\), or another attention",
            [{"aux_layer": -2}, {"aux_attention": "value-value"}],
        ),
    ],
)
def test_what_an_error_advises_works(settings, advice, followed):
    with pytest.raises(ValueError, match=advice):
        CoSAConfig(**settings)
    for changed in followed:
        CoSAConfig(**settings | changed)


@pytest.fixture
def saved(tmp_path):
    CoSAConfig(id2label=LABELS, coexistence_classes=["cat", "dog"]).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("given", "names", "coexistence"),
    [
        ({"id2label": {0: "background", 1: "dog"}}, ["background", "dog"], ["dog"]),
        ({"num_labels": 2}, ["LABEL_0", "LABEL_1"], []),
        ({"num_labels": 3}, list(LABELS.values()), ["cat", "dog"]),
        (
            {"id2label": {0: "sky", 1: "sun"}, "label2id": {"sky": 0, "sun": 1}, "coexistence_classes": ["sun"]},
            ["sky", "sun"],
            ["sun"],
        ),
    ],
)
def test_other_labels_than_the_saved_ones(saved, tmp_path, given, names, coexistence):
    config = CoSAConfig.from_pretrained(saved, **given)
    assert list(config.id2label.values()) == names
    assert config.coexistence_classes == coexistence
    config.save_pretrained(tmp_path / "changed")
    assert CoSAConfig.from_pretrained(tmp_path / "changed").label2id == config.label2id


@pytest.mark.parametrize(
    ("given", "named"),
    [({"label2id": {"x": 0}}, "label2id"), ({"num_labels": 2, "coexistence_classes": ["dog"]}, r"\['dog'\]")],
)
def test_labels_that_contradict_each_other_are_named(saved, given, named):
    with pytest.raises(ValueError, match=named):
        CoSAConfig.from_pretrained(saved, **given)


def test_what_could_not_be_loaded_again_is_not_saved(tmp_path):
    config = CoSAConfig(id2label=LABELS)
    config.id2label = {0: "background", 1: "cow"}
    with pytest.raises(ValueError, match="label2id"):
        config.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


def test_a_stride_that_no_encoder_has_is_named_for_the_other_networks_too():
    with pytest.raises(ValueError, match="output_stride=5 must be 8, 16 or 32"):
        CoSAMSConfig(output_stride=5)


def test_saved_and_loaded_again(tmp_path):
    config = CoSAConfig(
        backbone="test_vit",
        aux_layer=-4,
        output_stride=8,
        decoder_channels=32,
        decoder_dilation=2,
        cam_threshold=0.4,
        coexistence_classes=["dog"],
        id2label=LABELS,
    )
    config.save_pretrained(tmp_path)
    loaded = CoSAConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.id2label == LABELS


def test_saved_directory_carries_the_code_it_names(tmp_path):
    CoSAConfig().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) >= {"AutoConfig", "AutoModelForSemanticSegmentation", "AutoImageProcessor"}
    backends = auto_map.pop("AutoImageProcessor")
    assert set(backends) == {"pil", "torchvision"}
    for target in (*auto_map.values(), *backends.values()):
        module, name = target.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()


def test_saving_over_the_directory_again_keeps_the_code(tmp_path):
    CoSAConfig().save_pretrained(tmp_path)
    first = (tmp_path / "modeling_cosa.py").read_text()
    CoSAConfig().save_pretrained(tmp_path)
    assert (tmp_path / "modeling_cosa.py").read_text() == first


def test_examples():
    results = doctest.testmod(cosa_hf.configuration_cosa)
    assert results.attempted
    assert not results.failed
