import dataclasses
import math
from pathlib import Path

import pytest
import yaml

from cosa_hf.data import COEXISTENCE_CLASSES
from cosa_hf.training.config import TrainingConfig

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        # METHOD sections 1 to 8: the paper's setting for VOC.
        ("backbone", "vit_base_patch16_224.orig_in21k_ft_in1k"),
        ("aux_layer", -3),
        ("decoder_channels", 512),
        ("decoder_dilation", 5),
        ("ema_momentum", 0.9994),
        ("crop_size", 448),
        ("input_size", 448),
        ("scale_min", 0.5),
        ("scale_max", 2.0),
        ("label_scales", [1.0, 0.5, 1.5]),
        ("spl_temperature", 0.01),
        ("perplexity_alpha", 0.8),
        ("perplexity_beta", 1.0),
        ("perplexity_epsilon", 1.0),
        ("threshold", 0.5),
        ("threshold_decay", 0.99),
        ("threshold_queue", 100),
        ("separation_scope", "image"),
        ("cam2seg_weight", 0.1),
        ("aux_cam2seg_weight", 0.1),
        ("seg2cam_weight", 0.05),
        ("separation_weight", 0.1),
        ("max_steps", 20_000),
        ("warmup_steps", 6_000),
        ("learning_rate", 6e-5),
        ("head_lr_multiplier", 10.0),
        ("weight_decay", 0.01),
        ("lr_warmup_steps", 1_500),
        ("lr_power", 0.9),
        # All switches of Tab. 3 on.
        ("swapping_assignments", True),
        ("reliability_weighting", True),
        ("dynamic_threshold", True),
        ("supervision", "tags"),
        ("guidance", "spl"),
        ("detach", "none"),
        ("cam_fusion", "max"),
        ("supervision_stride", 1),
        # What only the released code does.
        ("background_threshold", None),
        ("balanced", False),
        ("relu_cams", False),
        ("dense_energy_weight", 0.0),
    ],
)
def test_defaults_are_the_papers(name, value):
    assert getattr(TrainingConfig(), name) == value


def test_every_field_says_what_it_is():
    for spec in dataclasses.fields(TrainingConfig):
        assert spec.metadata.get("help"), spec.name


def test_unknown_fields_are_named_all_at_once():
    with pytest.raises(ValueError, match=r"\['learning_rat', 'max_step'\]"):
        TrainingConfig.from_mapping({"max_step": 3, "learning_rat": 1e-3, "seed": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", True),
        ("batch_size", "4"),
        ("batch_size", 4.0),
        ("batch_size", None),
        ("seed", 1.5),
        ("learning_rate", True),
        ("learning_rate", "fast"),
        ("learning_rate", None),
        ("learning_rate", [1e-3]),
        ("dynamic_threshold", 1),
        ("dynamic_threshold", "true"),
        ("dataset", 3),
        ("dataset", None),
        ("data_dir", 3),
        ("label_scales", ["one", "half"]),
        ("label_scales", [True]),
        ("label_scales", [[1.0]]),
        ("label_scales", []),
        ("label_scales", 1.0),
        ("label_scales", "1.0"),
        ("label_scales", None),
        ("supervision", "boxes"),
        ("supervision", True),
        ("supervision", ["tags"]),
        ("separation_scope", "world"),
        ("guidance", "segmentation"),
        ("guidance", None),
        ("detach", "F"),
        ("cam_fusion", "mean"),
        ("supervision_stride", 1.5),
        ("background_threshold", "low"),
        ("balanced", 0.5),
        ("mixed_precision", False),  # what YAML makes of an unquoted `no`
        ("mixed_precision", "fp8"),
    ],
)
def test_wrong_types_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TrainingConfig.from_mapping({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("crop_size", "batch_size", "gradient_accumulation_steps") for value in (0, -1)),
        *((name, value) for name in ("input_size", "max_steps", "log_every", "threshold_queue") for value in (0, -1)),
        *((name, value) for name in ("learning_rate", "head_lr_multiplier") for value in (0.0, -1.0)),
        *((name, value) for name in ("spl_temperature", "separation_temperature") for value in (0.0, -1.0)),
        ("warmup_steps", -1),
        ("warmup_steps", 20_001),
        ("lr_warmup_steps", -1),
        ("lr_warmup_steps", 20_000),
        *((name, value) for name in ("supervision_stride", "dense_energy_scale") for value in (0, -1)),
        ("dense_energy_scale", 1.5),
        ("scale_min", 0.0),
        ("scale_min", 2.5),
        ("scale_max", 0.1),
        ("ema_momentum", 1.0),
        ("ema_momentum", 1),
        ("ema_momentum", -0.1),
        ("learning_rate", float("nan")),
        ("ema_momentum", float("nan")),
        ("eval_images", 0),
        ("scale_max", float("inf")),
        *((name, 0) for name in ("decoder_channels", "decoder_dilation")),
        *((name, -1) for name in ("seed", "num_workers", "eval_every", "eval_panels", "checkpoint_every")),
        *((name, -1) for name in ("snapshot_every", "lr_power", "weight_decay", "max_grad_norm")),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TrainingConfig.from_mapping({name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_scales", [1.0, 0.0]),
        ("label_scales", [-1.0]),
        ("label_scales", [1.0, float("nan")]),
        ("label_scales", [float("inf")]),
        ("perplexity_alpha", 1.0),
        ("perplexity_alpha", 1 - 1e-12),
        ("perplexity_alpha", 0.0),
        ("perplexity_beta", -1.0),
        ("perplexity_beta", float("inf")),
        ("perplexity_epsilon", -1.0),
        ("perplexity_epsilon", float("nan")),
        ("spl_temperature", float("inf")),
        ("separation_temperature", 1e-6),
        *((f"{part}_weight", value) for part in ("cam2seg", "seg2cam", "dense_energy") for value in (-1, float("nan"))),
        *((f"{part}_weight", -0.1) for part in ("aux_cam2seg", "separation")),
    ],
)
def test_what_would_only_fail_after_warm_up_or_teach_the_opposite_is_refused_at_once(name, value):
    """Perplexity is 0 at full distance for alpha = 1 and infinite for 0; a scale of 0 has no pixels."""
    with pytest.raises(ValueError, match=name):
        TrainingConfig.from_mapping({name: value})


@pytest.mark.parametrize("fields", [{}, {"dynamic_threshold": False, "threshold": 0.1}])
def test_a_background_threshold_needs_a_fixed_one_above_it(fields):
    with pytest.raises(ValueError, match="background_threshold"):
        TrainingConfig.from_mapping({"background_threshold": 0.2} | fields)
    assert TrainingConfig(background_threshold=0.2, dynamic_threshold=False).background_threshold == 0.2


def test_weights_that_nothing_would_read_are_refused():
    with pytest.raises(ValueError, match=r"backbone_weights vit.pth need pretrained: true"):
        TrainingConfig(backbone_weights="vit.pth", pretrained=False)


def test_masks_are_for_the_bound_and_the_oracle():
    assert not any(TrainingConfig(guidance=source).reads_masks for source in ("none", "spl", "noise"))
    assert TrainingConfig(guidance="gt").reads_masks
    assert TrainingConfig(supervision="masks").reads_masks


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("warmup_steps", 0),
        ("warmup_steps", 20_000),
        ("ema_momentum", 0.0),
        ("scale_min", 2.0),
        ("separation_weight", 0.0),
        ("perplexity_epsilon", float("inf")),  # every token (Tab. 5)
        ("perplexity_beta", 0.0),
    ],
)
def test_bounds_belong_to_the_range(name, value):
    assert getattr(TrainingConfig.from_mapping({name: value}), name) == value


def test_numbers_are_taken_as_written():
    recipe = TrainingConfig.from_mapping(
        {
            "learning_rate": "2e-4",
            "weight_decay": 1,
            "label_scales": [1, "5e-1"],
            "perplexity_epsilon": math.inf,
        }
    )
    assert recipe.learning_rate == 2e-4
    assert recipe.label_scales == [1.0, 0.5]
    assert all(type(scale) is float for scale in recipe.label_scales)
    assert type(recipe.weight_decay) is float
    assert recipe.perplexity_epsilon == math.inf


def test_optional_fields_take_none_and_text():
    assert TrainingConfig(data_dir=None).data_dir is None
    assert TrainingConfig(data_dir="VOC2012").data_dir == "VOC2012"


def test_label_scales_are_not_shared():
    one, other = TrainingConfig(), TrainingConfig()
    one.label_scales.append(2.0)
    assert other.label_scales == [1.0, 0.5, 1.5]


def test_yaml_reads_exponents_without_a_point(tmp_path):
    """YAML 1.1 takes `2e-4` for a string."""
    path = tmp_path / "recipe.yaml"
    path.write_text("learning_rate: 2e-4\nlabel_scales: [1, 5e-1]\nmixed_precision: 'no'\n")
    assert isinstance(yaml.safe_load(path.read_text())["learning_rate"], str)
    recipe = TrainingConfig.from_yaml(path)
    assert recipe.learning_rate == 2e-4
    assert recipe.label_scales == [1.0, 0.5]


def test_yaml_round_trip(tmp_path):
    recipe = TrainingConfig(
        dataset="shapes", data_dir="Bilder/größe", learning_rate=1e-10, max_steps=10, warmup_steps=3, lr_warmup_steps=2,
        label_scales=[0.1], dynamic_threshold=False, mixed_precision="no", perplexity_epsilon=math.inf,
        separation_scope="batch",
    )  # fmt: skip
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert TrainingConfig.from_yaml(tmp_path / "recipe.yaml") == recipe
    # All fields are written, so that a default changed later does not change an old run.
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
    assert list(written) == [spec.name for spec in dataclasses.fields(TrainingConfig)]


def test_overrides_replace_the_files_values(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("batch_size: 8\nseed: 3\n")
    recipe = TrainingConfig.from_yaml(path, seed=4)
    assert (recipe.batch_size, recipe.seed) == (8, 4)
    with pytest.raises(ValueError, match="sede"):
        TrainingConfig.from_yaml(path, sede=4)


@pytest.mark.parametrize("text", ["", "- batch_size\n", "batch_size\n"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"broken\.yaml"):
        TrainingConfig.from_yaml(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        TrainingConfig.from_yaml(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_of_the_repository_are_valid(path):
    assert TrainingConfig.named(path.stem).dataset in COEXISTENCE_CLASSES


def test_a_recipe_goes_by_name_or_by_path(tmp_path):
    (tmp_path / "mine.yaml").write_text("batch_size: 3\n")
    assert TrainingConfig.named(tmp_path / "mine.yaml", seed=5) == TrainingConfig(batch_size=3, seed=5)
    assert TrainingConfig.named("voc-vit-b", max_steps=8_000).max_steps == 8_000
    with pytest.raises(FileNotFoundError, match=r"voc-vit-x\.yaml; known by name: .*voc-lite0, voc-release"):
        TrainingConfig.named("voc-vit-x")
    with pytest.raises(FileNotFoundError, match=r"theirs\.yaml"):
        TrainingConfig.named(tmp_path / "theirs.yaml")


def differences(one: str, other: str) -> dict[str, tuple]:
    first, second = vars(TrainingConfig.named(one)), vars(TrainingConfig.named(other))
    return {name: (first[name], second[name]) for name in first if first[name] != second[name]}


RUN = {"output_dir", "eval_every", "checkpoint_every"}
OBJECTIVE = {
    "cam_fusion", "dynamic_threshold", "threshold", "background_threshold", "spl_temperature", "cam2seg_weight",
    "aux_cam2seg_weight", "reliability_weighting", "balanced", "relu_cams", "separation_weight", "dense_energy_weight",
}  # fmt: skip


@pytest.mark.parametrize(
    ("paper", "release", "thresholds", "steps"),
    [
        ("voc-vit-b", "voc-release", (0.2, 0.7), (20_000, 32_000)),
        ("coco-vit-b", "coco-release", (0.25, 0.65), (40_000, 60_000)),
    ],
)
def test_the_release_differs_from_the_paper_in_what_its_logs_say(paper, release, thresholds, steps):
    differing = differences(paper, release)
    assert set(differing) - RUN == OBJECTIVE | {"max_steps"}
    assert differing["max_steps"] == steps
    recipe = TrainingConfig.named(release)
    assert (recipe.background_threshold, recipe.threshold) == thresholds
    assert recipe.dense_energy_weight == 0.05


def test_the_papers_recipes_are_its_defaults_but_for_the_schedule():
    for name in ("voc-vit-b", "coco-vit-b"):
        changed = {
            field for field, value in vars(TrainingConfig.named(name)).items() if value != vars(TrainingConfig())[field]
        }
        schedule = {"batch_size", "images_per_step", "max_steps", "warmup_steps"}
        assert changed <= RUN | schedule | {"dataset", "train_split", "eval_split"}
