"""Runs on a frozen encoder: what is shared and kept, and what a cache of its features changes and does not change."""

import functools
import json
import multiprocessing
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from runs_of import assert_equal, left, log_of
from safetensors.torch import load_file

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation
from cosa_hf.assignment.network import AssignmentNetwork, TeacherConfig
from cosa_hf.commands.train import parse
from cosa_hf.data import load_shapes, read_image, undecoded
from cosa_hf.data.encoded import EncodedDataset, image_keys
from cosa_hf.inference import forward_multiscale
from cosa_hf.training import features, setup
from cosa_hf.training.features import EncodedImages
from cosa_hf.training.trainer import Trainer, train

pytestmark = pytest.mark.usefixtures("few_shapes")

HEADS = {
    "pooling": "lse", "classifier_bias": True, "standardize_features": True, "decoder": "mlp",
    "decoder_inputs": "concat", "affinity": "features",
}  # fmt: skip


@pytest.fixture
def frozen(tiny, tmp_path):
    """A run on cached features, by default of the heads alone."""

    def make(**fields):
        settings = HEADS | {"frozen_blocks": "all", "cache_features": str(tmp_path / "cache"), "max_steps": 8}
        return tiny(**settings | {"warmup_steps": 3} | fields)

    return make


def build(**fields):
    torch.manual_seed(0)
    return CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone="test_vit", aux_layer=-2, num_labels=4, **fields))


@pytest.mark.parametrize("blocks", [None, 0, 2])
def test_what_is_frozen_has_no_gradient_and_stays_in_eval_mode(blocks):
    model = build().train()
    model.backbone.freeze(blocks)
    model.train()
    trained = {name for name, parameter in model.backbone.model.named_parameters() if parameter.requires_grad}
    if blocks is None:
        assert not trained
        assert not any(module.training for module in model.backbone.modules())
    else:
        assert {name.split(".")[1] for name in trained if name.startswith("blocks")} == {
            str(index) for index in range(blocks, 6)
        }
        assert not any(name.startswith(("patch_embed", "cls_token", "pos_embed")) for name in trained)
        assert [block.training for block in model.backbone.model.blocks] == [index >= blocks for index in range(6)]
    assert model.decoder.training


def test_more_blocks_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"'test_vit' has \d+ blocks, fewer than 99"):
        build().backbone.freeze(99)


def test_the_teacher_shares_what_is_frozen_and_follows_the_rest():
    online = build()
    online.backbone.freeze(2)
    teacher = AssignmentNetwork(online, TeacherConfig(ema_momentum=0.5))
    with torch.no_grad():
        for parameter in online.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    teacher.update(online)
    for own, followed in zip(teacher.network.parameters(), online.parameters(), strict=True):
        if followed.requires_grad:
            torch.testing.assert_close(own + 0.5, followed)
        else:
            assert own.data_ptr() == followed.data_ptr()


@pytest.mark.parametrize("blocks", ["all", 4])
def test_a_cached_run_leaves_complete_models_and_what_is_frozen_as_it_was(frozen, tmp_path, capsys, blocks):
    config = frozen(frozen_blocks=blocks)
    trainer = Trainer(config)
    before = {name: value.clone() for name, value in trainer.student.backbone.state_dict().items()}
    trained = {name for name, value in trainer.student.backbone.named_parameters() if value.requires_grad}
    directory = trainer.train()
    assert "encoding 6 images once, 0.0 GB in" in capsys.readouterr().out
    model = CoSAForWeaklySupervisedSegmentation.from_pretrained(directory)
    assert {name.split(".")[2] for name in trained if "blocks" in name} == (set() if blocks == "all" else {"4", "5"})
    for name, value in before.items():
        assert torch.equal(model.backbone.state_dict()[name], value) == (name not in trained), name
    log = [json.loads(line) for line in (Path(config.output_dir) / "log.jsonl").read_text().splitlines()]
    assert {"c2s", "s2c", "csc"} <= set(log[-1])
    # The second run encodes nothing, and is the same.
    again = frozen(frozen_blocks=blocks, output_dir=str(tmp_path / "again"))
    train(again)
    assert "encoding" not in capsys.readouterr().out
    for name in ("online", "assignment"):
        weights = [load_file(Path(each.output_dir) / name / "model.safetensors") for each in (config, again)]
        assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_checkpoint_holds_the_heads_and_a_digest(frozen, tiny, tmp_path):
    sizes = []
    for config in (
        frozen(checkpoint_every=8),
        tiny(output_dir=str(tmp_path / "whole"), max_steps=8, checkpoint_every=8, **HEADS),
    ):
        train(config)
        (checkpoint,) = (Path(config.output_dir) / "checkpoints").iterdir()
        sizes.append(checkpoint.stat().st_size)
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.parametrize("blocks", ["all", 4])
def test_a_resumed_run_is_the_uninterrupted_one_and_wants_the_same_encoder(frozen, tmp_path, blocks):
    expected, run = frozen(frozen_blocks=blocks, output_dir=str(tmp_path / "whole")), frozen(frozen_blocks=blocks)
    train(expected)
    train(replace(run, checkpoint_every=4))
    sorted((tmp_path / "run/checkpoints").iterdir())[-1].unlink()
    said = (
        "the frozen part of the encoder is not that of the checkpoint's run: keep frozen_blocks, .* as they were, or "
        "start anew in another output_dir"
    )
    for changed in ({"seed": 1}, {"frozen_blocks": "5"}):  # random weights of another seed; another frozen part
        with pytest.raises(ValueError, match=said):
            train(replace(run, resume=True, **changed))
        train(replace(run, max_steps=2, warmup_steps=1, output_dir=str(tmp_path / "-".join(changed)), **changed))
    train(replace(run, resume=True, checkpoint_every=4))
    assert_equal(left(expected)["weights"], left(run)["weights"])


def killed_while_encoding(config, count):
    write, calls = features.FeatureStore.write, []

    def deadly(self, *arguments):
        calls.append(1)
        if len(calls) > count:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, *arguments)

    features.FeatureStore.write = deadly
    train(config)


@pytest.mark.parametrize(("blocks", "count"), [("all", 0), ("all", 1), ("all", 4), (4, 4)])
def test_a_run_killed_while_it_encodes_goes_on_to_the_same_weights(frozen, tmp_path, blocks, count, capsys):
    run = frozen(frozen_blocks=blocks)
    expected = replace(run, output_dir=str(tmp_path / "whole"), cache_features=str(tmp_path / "other"))
    train(expected)
    process = multiprocessing.get_context("fork").Process(target=killed_while_encoding, args=(run, count))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    capsys.readouterr()
    train(run)
    assert f"encoding {6 - count} images once" in capsys.readouterr().out
    assert_equal(left(expected)["weights"], left(run)["weights"])


def images_in_place_of_views(monkeypatch):
    """Runs without a cache see each image as those with one do: resized, plain or mirrored, by the teacher once."""

    def loader(config, dataset, untagged, processor, accelerator, encoded=None):
        def views(key):
            image = read_image(undecoded(dataset)[keys.index(key)])
            pixels = processor(image, return_tensors="pt")["pixel_values"][0]
            both = torch.stack([pixels, pixels.flip(-1)])
            return {"weak": both, "strong": both}

        keys = image_keys(dataset)
        source = encoded or SimpleNamespace(read=views, keys=keys)
        return setup.training_loader(config, dataset, untagged, processor, accelerator, source)

    monkeypatch.setattr("cosa_hf.training.trainer.training_loader", loader)
    monkeypatch.setattr(
        "cosa_hf.assignment.network.forward_multiscale", functools.partial(forward_multiscale, flip=False)
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"frozen_blocks": "all"},
        {"frozen_blocks": "4", "aux_layer": -3},
        {"frozen_blocks": "4", "affinity": "attention", "affinity_blocks": [-4, -2], "attention": "value-value"},
        {"frozen_blocks": "5", "affinity": "none", "gradient_accumulation_steps": 2, "batch_size": 1},
    ],
)
def test_a_cache_changes_nothing_but_by_the_rounding_of_float16(frozen, tmp_path, monkeypatch, fields):
    images_in_place_of_views(monkeypatch)
    # Both find their own otherwise: over mirrored images too, or plain ones alone.
    fields = fields | {"standardize_features": False, "learning_rate": 1e-4}
    fresh, cached = (
        frozen(**fields, cache_features=cache, output_dir=str(tmp_path / name))
        for name, cache in (("fresh", "never"), ("cached", str(tmp_path / "cache")))
    )
    for config in (fresh, cached):
        train(config)
    losses = [[entry["loss"] for entry in log_of(config)] for config in (fresh, cached)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    # The same in float32: nothing else is different.
    exact = replace(cached, cache_features=str(tmp_path / "none"), output_dir=str(tmp_path / "exact"))
    records = {}
    monkeypatch.setattr(features.FeatureStore, "write", lambda self, key, maps: records.update({key: maps}))
    monkeypatch.setattr(features.FeatureStore, "read", lambda self, key: records[key])
    train(exact)
    assert_equal(left(fresh)["weights"], left(exact)["weights"], tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["all", 4])
def test_two_processes_share_cache_and_steps(frozen, tmp_path, blocks):
    fields = {"frozen_blocks": blocks, "learning_rate": 1e-5}
    one = frozen(output_dir=str(tmp_path / "one"), cache_features=str(tmp_path / "one-cache"), **fields)
    train(one)
    two = frozen(batch_size=1, **fields)
    AcceleratorState._reset_state(True)
    debug_launcher(train, args=(two,), num_processes=2)
    AcceleratorState._reset_state(True)
    assert len(list((tmp_path / "cache").glob("*/*.f16"))) == 2
    assert_equal(left(one)["weights"], left(two)["weights"], tolerance=1e-5)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"frozen_blocks": "0"}, "needs frozen_blocks, a number or all, got 0"),
        ({"frozen_blocks": "-1"}, "frozen_blocks must be 0, a number of blocks, or all, got '-1'"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(frozen, fields, said):
    with pytest.raises(ValueError, match=said):
        train(frozen(**fields))


@pytest.mark.parametrize(
    ("fields", "said", "advised"),
    [
        pytest.param({"streaming": True}, "streaming True needs the images", "streaming false", marks=pytest.mark.slow),
        ({"label_scales": [1.0, 0.5]}, r"label_scales \[1.0, 0.5\] needs the images", "label_scales 1"),
        ({"dense_energy_weight": 0.1}, "dense_energy_weight 0.1 needs the images", "dense_energy_weight 0"),
        (
            {"frozen_blocks": "2", "backbone": "test_resnet", "affinity": "none"},
            "frozen_blocks 2 of test_resnet cannot be cached",
            "frozen_blocks all",
        ),
    ],
)
def test_what_cannot_be_cached_trains_as_the_error_advises(frozen, fields, said, advised, tmp_path):
    load_shapes("train", num_images=6, image_size=48).to_parquet(tmp_path / "photos/train.parquet")
    photos = {"dataset": "hub", "dataset_name": str(tmp_path / "photos"), "train_split": "train", "shuffle_buffer": 3}
    config, recipe = frozen(max_steps=2, warmup_steps=1, **photos, **fields), tmp_path / "recipe.yaml"
    with pytest.raises(ValueError, match=said) as refused:
        train(config)
    flags = re.findall(r"--(\w+) (\w+)", str(refused.value))
    assert sorted(map(" ".join, flags)) == sorted(["cache_features never", advised])
    config.to_yaml(recipe)
    for name, value in flags:
        train(parse(["--recipe", str(recipe), f"--{name}", value, "--output_dir", str(tmp_path / name)]))


def test_a_disk_without_room_is_avoided_as_the_error_advises(frozen, tmp_path, monkeypatch):
    def usage(directory):
        return SimpleNamespace(total=10**9, free=0 if directory.is_relative_to(tmp_path / "cache") else 10**9)

    monkeypatch.setattr(features.shutil, "disk_usage", usage)
    advice = "name another disk with cache_features DIR, .*, or encode anew in every step with cache_features never"
    config = frozen(max_steps=2, warmup_steps=1)
    with pytest.raises(OSError, match=advice):
        train(config)
    for number, cache in enumerate((str(tmp_path / "other"), "never")):
        train(replace(config, cache_features=cache, output_dir=str(tmp_path / str(number))))


@pytest.mark.parametrize("cache", ["never", "auto"])
def test_without_a_cache_the_same_heads_train_on_fresh_views(frozen, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("cosa_hf.training.features.default_directory", lambda: tmp_path / "default")
    train(frozen(cache_features=cache))
    assert (tmp_path / "default").exists() == (cache == "auto" and not torch.cuda.is_available())


def test_some_blocks_frozen_train_the_rest(tiny):
    config = tiny(frozen_blocks=3, cache_features="never")
    trainer = Trainer(config)
    before = {name: value.clone() for name, value in trainer.student.named_parameters()}
    trainer.train()
    moved = {name for name, value in trainer.student.named_parameters() if not torch.equal(value, before[name])}
    assert any("blocks.5" in name for name in moved)
    assert not any(f"blocks.{index}." in name for name in moved for index in range(3))


def images_in(directory, count=4):
    directory.mkdir(exist_ok=True)
    for index, row in enumerate(load_shapes("train", num_images=count, image_size=48)):
        row["image"].save(directory / f"{index}.png")
    paths = [str(directory / f"{index}.png") for index in range(count)]
    from datasets import Dataset

    from cosa_hf.data.tags import tag_features

    columns = {"image": paths, "labels": [[0]] * count, "image_id": [str(index) for index in range(count)]}
    return Dataset.from_dict(columns, features=tag_features(["thing"]))


@pytest.fixture
def encoder(tmp_path):
    from accelerate import Accelerator

    from cosa_hf import CoSAImageProcessor

    model, processor = build(), CoSAImageProcessor(size={"height": 48, "width": 48})
    model.backbone.freeze()
    return lambda dataset: EncodedImages(model, processor, dataset, tmp_path / "cache", Accelerator(cpu=True))


@pytest.mark.parametrize("changed", [{"value_range": [0, 128]}, {"bands": [3, 2, 1]}])
def test_images_that_are_read_otherwise_are_encoded_anew(tmp_path, changed):
    from accelerate import Accelerator

    from cosa_hf import CoSAImageProcessor

    dataset, size = images_in(tmp_path / "photos"), {"height": 48, "width": 48}
    model = build()
    model.backbone.freeze()
    stores = [
        EncodedImages(model, CoSAImageProcessor(size=size, **options), dataset, tmp_path, Accelerator(cpu=True)).store
        for options in ({}, changed)
    ]
    about = [json.loads((store.directory / "about.json").read_text())["made_by"] for store in stores]
    assert stores[0].directory != stores[1].directory
    assert about[0] | changed == about[1], "what is read as before keeps its place"


def test_what_blocks_that_train_hold_makes_no_other_cache(tmp_path):
    from accelerate import Accelerator

    from cosa_hf import CoSAImageProcessor

    dataset, processor = images_in(tmp_path / "photos"), CoSAImageProcessor(size={"height": 48, "width": 48})

    def directory(blocks, changed=None):
        model = build()
        model.backbone.freeze(blocks)
        if changed is not None:
            with torch.no_grad():
                model.backbone.model.blocks[changed].norm1.weight.add_(1)
        return EncodedImages(model, processor, dataset, tmp_path, Accelerator(cpu=True)).store.directory

    kept = directory(4)
    assert directory(4, changed=4) == kept
    others = [directory(4, changed=3), directory(5), directory(None)]
    assert len({kept, *others}) == 4


@pytest.mark.parametrize("cached", [True, False])
def test_statistics_are_of_images_from_all_over_the_dataset(cached, encoder, tmp_path, monkeypatch):
    """A table sorted by class begins with one class."""
    from cosa_hf import CoSAImageProcessor

    monkeypatch.setattr(setup, "STANDARDIZED_OVER", 2)
    dataset = images_in(tmp_path / "photos")
    encoded = encoder(dataset)
    encoded.fill(0)
    models = [build(standardize_features=True) for _ in range(2)]
    for model in models:
        model.load_state_dict(encoded.model.state_dict(), strict=False)
        model.backbone.freeze()
    processor = CoSAImageProcessor(size={"height": 48, "width": 48})
    setup.standardize(models[0], processor, dataset, encoded if cached else None)
    seen = [processor(read_image(undecoded(dataset)[index]), return_tensors="pt")["pixel_values"] for index in (0, 2)]
    if cached:
        seen += [image.flip(-1) for image in seen]
    models[1].eval().set_feature_statistics(models[1].backbone(image) for image in seen)
    tolerance = {"rtol": 1e-2, "atol": 1e-3} if cached else {}  # the cache is in float16
    torch.testing.assert_close(models[0].aux_feature_std, models[1].aux_feature_std, **tolerance)
    torch.testing.assert_close(models[0].feature_mean, models[1].feature_mean, **tolerance)


def test_a_changed_photo_is_encoded_anew_and_a_broken_one_named(encoder, tmp_path):
    dataset = images_in(tmp_path / "photos")
    encoded = encoder(dataset)
    encoded.fill(0)
    before = encoded.read(encoded.keys[1])["features"]
    read_image(undecoded(dataset)[0]).rotate(90).save(tmp_path / "photos/1.png")
    (tmp_path / "photos/2.png").write_bytes(b"not an image")
    changed = encoder(dataset)
    assert [a == b for a, b in zip(encoded.keys, changed.keys, strict=True)] == [True, False, False, True]
    changed.fill(0)
    assert not torch.equal(changed.read(changed.keys[1])["features"], before)
    assert len(list(changed.sample(4))) == 3
    items = EncodedDataset(dataset, changed.read, changed.keys, 48, length=8, seed=0)
    problems = [item["unreadable"] for item in (items[position] for position in range(8))]
    assert sum("2.png" in problem for problem in problems) == 2


def test_items_are_the_encoders_maps_of_the_image_or_its_mirror_image(encoder, tmp_path):
    dataset = images_in(tmp_path / "photos")
    encoded = encoder(dataset)
    encoded.fill(0)
    model, processor = encoded.model, encoded.processor
    items, seen = EncodedDataset(dataset, encoded.read, encoded.keys, 48, length=16, seed=0), set()
    for position in range(16):
        item = items[position]
        image = read_image(undecoded(dataset)[int(item["image_id"])])
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            views = [model.backbone(view)[0][0] for view in (pixels, pixels.flip(-1))]
        close = [torch.allclose(item["features"], view, atol=2e-2, rtol=1e-2) for view in views]
        assert sum(close) == 1
        seen.add((item["image_id"], close.index(True)))
    assert len(seen) > 5
    assert len(set(image_keys(dataset))) == 4
