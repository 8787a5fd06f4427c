import dataclasses
import math
import re

import pytest
import yaml

from cosa_hf.data import COEXISTENCE_CLASSES
from cosa_hf.training.config import RECIPES, TrainingConfig, config_from_flags

FIELDS = {spec.name: spec for spec in dataclasses.fields(TrainingConfig)}

# The names of flags and of the lines in recipes, which runs on disk and in papers have.
NAMES = """
    dataset dataset_name dataset_config image_column label_column mask_column classes data_dir train_split eval_split
    streaming shuffle_buffer crop_size input_size scale_min scale_max normalization enhancement_factors posterize_bits
    batch_size gradient_accumulation_steps
    images_per_step num_workers backbone backbone_weights pretrained aux_layer output_stride decoder_channels
    decoder_dilation gradient_checkpointing max_steps warmup_steps learning_rate head_lr_multiplier lr_warmup_steps
    lr_power weight_decay max_grad_norm seed mixed_precision output_dir tracker log_every eval_every eval_images
    eval_panels checkpoint_every keep_checkpoints snapshot_every resume allow_changed_data supervision ema_momentum
    swapping_assignments bf16_assignment label_scales cam_fusion spl_temperature dynamic_threshold threshold
    background_threshold threshold_decay threshold_queue threshold_covariance cam2seg_weight aux_cam2seg_weight
    supervision_stride balanced seg2cam_weight guidance detach relu_cams separation_weight separation_temperature
    separation_scope reliability_weighting perplexity_alpha perplexity_beta perplexity_epsilon dense_energy_weight
    dense_energy_scale feature_layer attention aux_attention pooling pooling_sharpness pooling_weights
    classifier_bias frozen_blocks cache_features center_features standardize_features decoder decoder_inputs
    decoder_dropout affinity affinity_layer
    affinity_blocks affinity_temperature affinity_power affinity_steps value_range bands mask_values cam_threshold
    pseudo_labels
"""

RANGES = {
    "least 1": """
        crop_size input_size batch_size gradient_accumulation_steps images_per_step max_steps shuffle_buffer log_every
        eval_images keep_checkpoints decoder_channels decoder_dilation threshold_queue supervision_stride
        affinity_steps bands
    """,
    "least 0": """
        warmup_steps lr_warmup_steps lr_power weight_decay max_grad_norm seed num_workers eval_every eval_panels
        checkpoint_every snapshot_every background_threshold cam2seg_weight aux_cam2seg_weight seg2cam_weight
        separation_weight dense_energy_weight perplexity_beta enhancement_factors
    """,
    "least 1, most 8": "posterize_bits",
    "least 0, infinite": "perplexity_epsilon",
    "least 0, below 1": "ema_momentum threshold_decay decoder_dropout",  # a moving average at 1 would never move
    "least 0.001": "separation_temperature",
    "above 0": """
        scale_min scale_max label_scales learning_rate head_lr_multiplier spl_temperature pooling_sharpness
        affinity_temperature affinity_power
    """,
    "above 0, below 1": "threshold cam_threshold",
    "above 0, most 0.999": "perplexity_alpha",  # perplexity is 0 at full distance for 1 and infinite for 0
    "above 0, most 1": "dense_energy_scale",
    "most -1": "feature_layer aux_layer affinity_layer affinity_blocks",  # counted from the end
    "": "output_stride",  # CoSAConfig knows
}


PAPER = {
    # Network, optimisation and data (Sec. 4.1).
    "backbone": "vit_base_patch16_224.orig_in21k_ft_in1k", "aux_layer": -3, "decoder_channels": 512,
    "decoder_dilation": 5, "crop_size": 448, "input_size": 448, "scale_min": 0.5, "scale_max": 2.0,
    "normalization": "backbone", "enhancement_factors": [0.05, 0.95], "posterize_bits": [4, 8],
    "max_steps": 20_000, "warmup_steps": 6_000, "learning_rate": 6e-5, "head_lr_multiplier": 10.0,
    "weight_decay": 0.01, "lr_warmup_steps": 1_500, "lr_power": 0.9, "supervision": "tags",
    # Teacher, thresholds and objective (Sec. 3, Tab. 5 and 8-10).
    "ema_momentum": 0.9994, "label_scales": [1.0, 0.5, 1.5], "cam_fusion": "max", "spl_temperature": 0.01,
    "guidance": "spl", "detach": "none", "threshold": 0.5, "threshold_decay": 0.99, "threshold_queue": 100,
    "perplexity_alpha": 0.8, "perplexity_beta": 1.0, "perplexity_epsilon": 1.0, "separation_scope": "image",
    "cam2seg_weight": 0.1, "aux_cam2seg_weight": 0.1, "seg2cam_weight": 0.05, "separation_weight": 0.1,
    # All switches of Tab. 3 on.
    "swapping_assignments": True, "reliability_weighting": True, "dynamic_threshold": True,
    # Nothing that frozen encoders need.
    "feature_layer": -1, "attention": "standard", "pooling": "max", "pooling_weights": "equal",
    "classifier_bias": False, "center_features": False, "standardize_features": False, "decoder": "largefov",
    "decoder_inputs": "last", "decoder_dropout": 0.0,
    "affinity": "none",
    # Nothing that only the released code does.
    "supervision_stride": 1, "background_threshold": None, "balanced": False, "relu_cams": False,
    "dense_energy_weight": 0.0,
}  # fmt: skip


def test_defaults_are_the_papers():
    defaults = vars(TrainingConfig())
    assert {name: defaults[name] for name in PAPER} == PAPER


def test_fields_keep_their_names_and_say_what_they_are():
    assert set(FIELDS) == set(NAMES.split())
    for name, spec in FIELDS.items():
        assert spec.metadata.get("help"), name


def test_help_shows_every_flag_once_under_the_title_of_its_part(capsys):
    with pytest.raises(SystemExit):
        config_from_flags(TrainingConfig, {}, ["--help"])
    shown = capsys.readouterr().out
    titles = [part._argument_group_name for part in TrainingConfig.parts]
    sections = re.split("|".join(rf"^{re.escape(title)}:$" for title in titles), shown, flags=re.MULTILINE)[1:]
    flags = [[spec.name for spec in dataclasses.fields(part)] for part in TrainingConfig.parts]
    assert [re.findall(r"^  --(?!no_)(\w+)", section, flags=re.MULTILINE) for section in sections] == flags
    assert sorted(name for names in flags for name in names) == sorted(FIELDS)


def test_flags_win_over_the_recipe_and_the_rest_are_defaults():
    values = {"max_steps": 7000, "batch_size": 3, "label_scales": [1.0]}
    flags = "--batch_size 5 --pretrained false --label_scales 1 0.5 --classes cat dog --learning_rate 2e-4"
    config = config_from_flags(TrainingConfig, values, flags.split())
    changed = {"batch_size": 5, "pretrained": False, "label_scales": [1.0, 0.5], "classes": ["cat", "dog"]}
    assert config == TrainingConfig(max_steps=7000, learning_rate=2e-4, **changed)
    for wrong, error in (["--batch_size", "0"], ValueError), (["--max_stops", "3"], SystemExit):
        with pytest.raises(error):
            config_from_flags(TrainingConfig, {}, wrong)


def test_unknown_fields_are_named_all_at_once():
    with pytest.raises(ValueError, match=r"\['learning_rat', 'max_step'\]"):
        TrainingConfig.from_mapping({"max_step": 3, "learning_rat": 1e-3, "seed": 1})


WRONG_TYPES = {
    "batch_size": [True, "4", 4.0, None],
    "seed": [1.5],
    "learning_rate": [True, "fast", None, [1e-3]],
    "dynamic_threshold": [1, "true"],
    "dataset": [3, None],
    "data_dir": [3],
    "label_scales": [["one", "half"], [True], [[1.0]], [], 1.0, "1.0", None],
    "supervision": ["boxes", True, ["tags"]],
    "separation_scope": ["world"],
    "guidance": ["segmentation", None],
    "detach": ["F"],
    "cam_fusion": ["mean"],
    "supervision_stride": [1.5],
    "background_threshold": ["low"],
    "balanced": [0.5],
    "mixed_precision": [False, "fp8"],  # False: what YAML makes of an unquoted `no`
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG_TYPES.items() for value in values])
def test_wrong_types_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TrainingConfig.from_mapping({name: value})


def test_every_number_has_its_range():
    ranges = {}
    for name, spec in FIELDS.items():
        if any(kind in str(spec.type) for kind in ("int", "float")):
            bounds = spec.metadata["bounds"]
            words = [
                f"{bound} {bounds[bound]:g}"
                for bound in ("least", "above", "below", "most")
                if bounds[bound] is not None
            ]
            ranges.setdefault(", ".join(words + ["infinite"] * bounds["infinite"]), set()).add(name)
    assert ranges == {words: set(names.split()) for words, names in RANGES.items()}


# Fields that leave every value of another room.
LENIENT = {"warmup_steps": 0, "lr_warmup_steps": 0, "scale_min": math.ulp(0.0), "dynamic_threshold": False}


def edges(name: str) -> tuple[list, list]:
    """The outermost values that belong to a field's range, and those next to them that do not."""
    spec = FIELDS[name]
    bounds, whole = spec.metadata["bounds"], spec.type in (int, list[int], list[int] | None)
    inside, outside = [], [] if whole else [math.nan, -math.inf]
    if not whole:
        (inside if bounds["infinite"] else outside).append(math.inf)
    for bound, sign in (("least", -1), ("above", 1), ("below", -1), ("most", 1)):
        if (edge := bounds[bound]) is not None:
            beyond = edge + sign if whole else math.nextafter(edge, sign * math.inf)
            ((inside if bound in ("least", "most") else outside).append(edge if whole else float(edge)))
            (outside if bound in ("least", "most") else inside).append(beyond)
    return inside, outside


@pytest.mark.parametrize("name", " ".join(RANGES.values()).split())
def test_a_range_ends_where_it_says(name):
    first = {
        "label_scales": [1.0], "affinity_blocks": [-2], "bands": [3, 2], "enhancement_factors": [0.0],
        "posterize_bits": [1],
    }.get(name)  # fmt: skip

    def config(value):
        return TrainingConfig.from_mapping(LENIENT | {name: [*first, value] if first else value})

    inside, outside = edges(name)
    for value in inside:
        assert getattr(config(value), name) == ([*first, value] if first else value)
    for value in outside:
        with pytest.raises(ValueError, match=rf"^{name} must be"):
            config(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("warmup_steps", 20_001), ("lr_warmup_steps", 20_000), ("scale_min", 2.5), ("scale_max", 0.1)],
)
def test_values_that_do_not_fit_another_field_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        TrainingConfig.from_mapping({name: value})


@pytest.mark.parametrize(("name", "value"), [("warmup_steps", 20_000), ("lr_warmup_steps", 19_999), ("scale_min", 2.0)])
def test_values_that_just_fit_another_field_are_taken(name, value):
    assert getattr(TrainingConfig.from_mapping({name: value}), name) == value


@pytest.mark.parametrize("fields", [{}, {"dynamic_threshold": False, "threshold": 0.1}])
def test_a_background_threshold_needs_a_fixed_one_above_it(fields):
    with pytest.raises(ValueError, match="background_threshold"):
        TrainingConfig.from_mapping({"background_threshold": 0.2} | fields)
    assert TrainingConfig(background_threshold=0.2, dynamic_threshold=False).background_threshold == 0.2


def test_weights_that_nothing_would_read_are_refused():
    with pytest.raises(ValueError, match=r"backbone_weights vit.pth need pretrained: true, or leave them out"):
        TrainingConfig(backbone_weights="vit.pth", pretrained=False)
    assert TrainingConfig(backbone_weights="vit.pth", pretrained=True).backbone_weights == "vit.pth"
    assert not TrainingConfig(pretrained=False).backbone_weights


def test_masks_are_for_the_bound_and_the_oracle():
    assert not any(TrainingConfig(guidance=source).reads_masks for source in ("none", "spl", "noise"))
    assert TrainingConfig(guidance="gt").reads_masks
    assert TrainingConfig(supervision="masks").reads_masks
    assert not TrainingConfig(pseudo_labels="labels").reads_masks
    followed = [{}, {"guidance": "gt"}, {"supervision": "masks"}, {"pseudo_labels": "labels"}]
    assert [TrainingConfig(**fields).follows_masks for fields in followed] == [False, False, True, True]


def test_numbers_are_taken_as_written():
    config = TrainingConfig.from_mapping(
        {
            "learning_rate": "2e-4",
            "weight_decay": 1,
            "label_scales": [1, "5e-1"],
            "perplexity_epsilon": math.inf,
        }
    )
    assert config.learning_rate == 2e-4
    assert config.label_scales == [1.0, 0.5]
    assert all(type(scale) is float for scale in config.label_scales)
    assert type(config.weight_decay) is float
    assert config.perplexity_epsilon == math.inf


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
    config = TrainingConfig.from_yaml(path)
    assert config.learning_rate == 2e-4
    assert config.label_scales == [1.0, 0.5]


def test_yaml_round_trip(tmp_path):
    config = TrainingConfig(
        dataset="shapes", data_dir="Bilder/größe", learning_rate=1e-10, max_steps=10, warmup_steps=3, lr_warmup_steps=2,
        label_scales=[0.1], dynamic_threshold=False, mixed_precision="no", perplexity_epsilon=math.inf,
        separation_scope="batch",
    )  # fmt: skip
    config.to_yaml(tmp_path / "recipe.yaml")
    assert TrainingConfig.from_yaml(tmp_path / "recipe.yaml") == config
    # All fields are written, so that a default changed later does not change an old run.
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text(encoding="utf-8"))
    assert set(written) == set(FIELDS)


def test_overrides_replace_the_files_values(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("batch_size: 8\nseed: 3\n")
    config = TrainingConfig.from_yaml(path, seed=4)
    assert (config.batch_size, config.seed) == (8, 4)
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


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_of_the_package_are_valid(path):
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
COLORS = {"normalization", "enhancement_factors", "posterize_bits"}


@pytest.mark.parametrize(
    ("paper", "release", "thresholds", "steps"),
    [
        ("voc-vit-b", "voc-release", (0.2, 0.7), (20_000, 32_000)),
        ("coco-vit-b", "coco-release", (0.25, 0.65), (40_000, 60_000)),
    ],
)
def test_the_release_differs_from_the_paper_in_what_its_logs_and_code_say(paper, release, thresholds, steps):
    differing = differences(paper, release)
    assert set(differing) - RUN == OBJECTIVE | COLORS | {"max_steps", "learning_rate"}
    assert differing["max_steps"] == steps
    config = TrainingConfig.named(release)
    assert (config.background_threshold, config.threshold) == thresholds
    assert config.dense_energy_weight == 0.05


SCHEDULE = {"max_steps", "warmup_steps", "lr_warmup_steps", "ema_momentum"}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("coco-clip", SCHEDULE),
        ("folder-clip", set()),
        ("folder-dinov2", {"backbone", "attention", "crop_size", "input_size", "supervision_stride", "cam_threshold"}),
    ],
)
def test_the_frozen_recipes_are_voc_clip_but_for_their_images(name, changed):
    assert set(differences("voc-clip", name)) - RUN == changed | {"dataset", "train_split", "eval_split"} - (
        {"eval_split"} if name.startswith("folder") else set()
    )


def test_the_papers_recipes_are_its_defaults_but_for_the_schedule():
    for name in ("voc-vit-b", "coco-vit-b"):
        changed = {
            field for field, value in vars(TrainingConfig.named(name)).items() if value != vars(TrainingConfig())[field]
        }
        schedule = {"batch_size", "images_per_step", "max_steps", "warmup_steps"}
        assert changed <= RUN | schedule | {"dataset", "train_split", "eval_split"}
