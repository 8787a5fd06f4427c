"""`cosa-hf predict` as a user runs it, on a small random model."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from in_process import run_command
from PIL import Image
from torch.nn import functional as F
from transformers import pipeline

from cosa_hf import CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor, demo_model
from cosa_hf.app import EXAMPLES
from cosa_hf.commands.predict import known_tags
from cosa_hf.data import SHAPES_CLASSES, load_shapes
from cosa_hf.data.palette import voc_palette
from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.objective.pseudo_labels import restrict_to_labels

NAMES = ["background", *SHAPES_CLASSES]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three photographs of different shapes; the last was taken with the camera on its side."""
    directory = tmp_path_factory.mktemp("photos")
    images = [row["image"] for row in load_shapes("val", num_images=3)]
    images[0].resize((150, 100)).save(directory / "wide.jpg")
    images[1].resize((77, 130)).save(directory / "tall.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # show turned by a quarter
    images[2].resize((140, 90)).save(directory / "turned.jpg", exif=exif)
    return [directory / name for name in ("wide.jpg", "tall.png", "turned.jpg")]


def read_ids(path):
    with Image.open(path) as image:
        assert image.mode == "P"
        return np.asarray(image)


def test_masks_are_the_pipelines(model_dir, photos, tmp_path, cosa_hf):
    output = tmp_path / "new" / "masks"
    assert "3 of 3 images" in cosa_hf("predict", model_dir, *photos, "--output_dir", output)
    stems = [path.stem for path in photos]
    assert sorted(path.name for path in output.iterdir()) == sorted(
        f"{stem}{ending}.png" for stem in stems for ending in ("", "_overlay")
    )
    segment = pipeline("image-segmentation", model=str(model_dir))
    seen = set()
    for path in photos:
        ids = read_ids(output / f"{path.stem}.png")
        expected = np.zeros_like(ids)
        for part in segment(str(path)):
            expected[np.asarray(part["mask"]) > 0] = NAMES.index(part["label"])
        np.testing.assert_array_equal(ids, expected)
        seen |= set(np.unique(ids))
    assert len(seen) > 1, "a model that answers one class everywhere would prove nothing"
    assert read_ids(output / "turned.png").shape == (140, 90)
    with Image.open(output / "wide.png") as image:
        assert image.getpalette()[:9] == [value for color in voc_palette(3) for value in color]
    with Image.open(output / "wide_overlay.png") as image:
        assert (image.mode, image.width) == ("RGB", 150)
        assert image.height > 100


def test_tags_rule_out_the_other_classes(model_dir, photos, tmp_path, cosa_hf):
    tags = [2, 5]
    cosa_hf(
        *("predict", model_dir, photos[1], "--output_dir", tmp_path),
        *("--tags", f"{SHAPES_CLASSES[tags[0]]}, {SHAPES_CLASSES[tags[1]]}"),
    )
    model = CoSAForWeaklySupervisedSegmentation.from_pretrained(model_dir).eval()
    processor = CoSAImageProcessor.from_pretrained(model_dir)
    labels = torch.zeros(1, len(SHAPES_CLASSES))
    labels[0, tags] = 1
    with torch.no_grad(), Image.open(photos[1]) as image:
        logits = model(processor(image, return_tensors="pt").pixel_values).logits
        logits = F.interpolate(logits, size=(130, 77), mode="bilinear", align_corners=False)
    ids = read_ids(tmp_path / "tall.png")
    np.testing.assert_array_equal(ids, restrict_to_labels(logits, labels).argmax(1)[0])
    assert (ids != logits.argmax(1)[0].numpy()).any(), "the tags must have mattered"


def test_crf_refines_the_mask(model_dir, photos, tmp_path, cosa_hf):
    tags = ("--tags", ",".join(SHAPES_CLASSES[:3]))
    cosa_hf("predict", model_dir, photos[1], *tags, "--output_dir", tmp_path / "plain")
    cosa_hf("predict", model_dir, photos[1], *tags, "--output_dir", tmp_path / "crf", "--crf")
    model = CoSAForWeaklySupervisedSegmentation.from_pretrained(model_dir).eval()
    processor = CoSAImageProcessor.from_pretrained(model_dir)
    with torch.no_grad(), Image.open(photos[1]) as image:
        logits = model(processor(image, return_tensors="pt").pixel_values).logits[:, :4]
        logits = F.interpolate(logits, size=(130, 77), mode="bilinear", align_corners=False)[0]
        expected = DenseCRF()(logits, image.convert("RGB")).argmax(0)
    ids = read_ids(tmp_path / "crf" / "tall.png")
    np.testing.assert_array_equal(ids, expected)
    assert (ids != read_ids(tmp_path / "plain" / "tall.png")).any()


PEAK = """
import resource, sys
from cosa_hf.cli import main
status = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""


@pytest.mark.slow
def test_a_crf_of_a_large_photo_is_taken_at_a_bounded_size_and_in_bounded_memory(tmp_path, subprocess_of):
    size = (8000, 6000)
    Image.open(EXAMPLES / "cat.jpg").resize(size).save(tmp_path / "photo.jpg")
    words = ("predict", demo_model(), tmp_path / "photo.jpg", "--crf", "--output_dir", tmp_path / "masks")
    done = subprocess_of(*words, launch=("-c", PEAK), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stderr
    *printed, kilobytes = done.stdout.splitlines()
    assert f"  CRF at 653 x 490, its result upsampled to {size[0]} x {size[1]}" in printed
    assert int(kilobytes) * 1024 < 2e9
    assert read_ids(tmp_path / "masks" / "photo.png").shape == size[::-1]


def test_a_network_that_answers_with_a_set_of_masks(mask2former, photos, tmp_path, cosa_hf):
    cosa_hf("predict", mask2former, photos[1], "--tags", "LABEL_7", "--output_dir", tmp_path)
    assert set(np.unique(read_ids(tmp_path / "tall.png"))) <= {0, 7}


def test_the_value_range_of_a_model_that_has_none_is_given(model_dir, tmp_path, cosa_hf, complaint):
    dark = Image.fromarray(np.asarray(load_shapes("val", num_images=1)[0]["image"].convert("L")).astype(np.uint16) * 16)
    dark.save(tmp_path / "dark.png")
    eight = Image.fromarray((np.asarray(dark) // 16).astype(np.uint8))
    eight.save(tmp_path / "eight.png")
    cosa_hf("predict", model_dir, tmp_path / "dark.png", "--value_range", 0, 4080, "--output_dir", tmp_path / "masks")
    cosa_hf("predict", model_dir, tmp_path / "eight.png", "--output_dir", tmp_path / "masks")
    np.testing.assert_array_equal(read_ids(tmp_path / "masks/dark.png"), read_ids(tmp_path / "masks/eight.png"))
    wrong = ("predict", model_dir, tmp_path / "dark.png", "--output_dir", tmp_path / "other", "--value_range")
    assert "--value_range auto is for training" in complaint(*wrong, "auto")
    assert "value_range must be auto, window, or two numbers LOW HIGH, got 3" in complaint(*wrong, "3")


def test_bands_are_chosen_as_the_error_says(model_dir, tmp_path, cosa_hf, complaint):
    tifffile = pytest.importorskip("tifffile")
    bands = np.random.default_rng(0).integers(0, 255, (40, 50, 5), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "field.tif", bands, photometric="minisblack", planarconfig="contig")
    predict = ("predict", model_dir, tmp_path / "field.tif", "--output_dir", tmp_path / "masks")
    advice = re.search(r"choose one or three, as in (--bands 3 2 1)\n", complaint(*predict))[1]
    cosa_hf(*predict, *advice.split())
    Image.fromarray(bands[..., [2, 1, 0]]).save(tmp_path / "photo.png")
    cosa_hf("predict", model_dir, tmp_path / "photo.png", "--output_dir", tmp_path / "masks")
    np.testing.assert_array_equal(read_ids(tmp_path / "masks/field.png"), read_ids(tmp_path / "masks/photo.png"))


def test_unknown_tag_is_an_error_that_lists_the_classes(model_dir, photos, tmp_path, complaint):
    tags = ("--tags", f"{SHAPES_CLASSES[0]},unicorn")
    said = complaint("predict", model_dir, photos[0], "--output_dir", tmp_path / "new", *tags)
    assert re.match(rf"error: unknown tags \['unicorn'\].*{SHAPES_CLASSES[-1]}\n$", said)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("cat, red, ripe", ["cat", "red, ripe"]),
        ("red, ripe,cat", ["red, ripe", "cat"]),
        ("red , cat", ["red", "cat"]),
        ("red", ["red"]),
    ],
)
def test_classes_with_commas_in_their_names(text, tags):
    names = ["background", "red", "cat", "red, ripe"]
    assert known_tags(text, names) == tags
    with pytest.raises(ValueError, match=r"unknown tags \['ripe'\]; this model's classes are red; cat; red, ripe"):
        known_tags("cat, ripe, red", names)


def test_an_unreadable_image_does_not_stop_the_others(model_dir, photos, tmp_path, capsys):
    broken, missing = tmp_path / "broken.jpg", tmp_path / "missing.jpg"
    broken.write_bytes(photos[0].read_bytes()[:1500])
    output = tmp_path / "masks"
    assert run_command("predict", model_dir, broken, photos[0], missing, photos[1], "--output_dir", output) == 1
    printed = capsys.readouterr()
    assert f"error: cannot read {broken}" in printed.err
    assert f"error: cannot read {missing}" in printed.err
    assert printed.err.splitlines()[-1] == f"error: not segmented: {broken}, {missing}"
    assert "2 of 4 images" in printed.out
    assert {path.stem for path in output.iterdir()} == {"wide", "wide_overlay", "tall", "tall_overlay"}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["a/cat.jpg", "b/cat.png"], r"a/cat\.jpg and \S*b/cat\.png would both be written to cat\.png"),
        (["a/cat_overlay.jpg", "b/cat.png"], r"would both be written to cat_overlay\.png"),
        (["a"], "a is a directory"),
        (["masks/cat.png"], r"masks/cat\.png would be overwritten"),
        (["b/cat.png"], r"masks/cat\.png is there already"),
    ],
)
def test_inputs_that_would_cost_a_file_are_refused_first(inputs, message, tmp_path, complaint):
    for name in ("a/cat.jpg", "a/cat_overlay.jpg", "b/cat.png", "masks/cat.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    paths = [tmp_path / name for name in inputs]
    said = complaint("predict", "no-model-is-needed-to-see-that", *paths, "--output_dir", tmp_path / "masks")
    assert re.search(message, said)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("inputs", "advice", "followed"),
    [
        (["a/owl.jpg", "b/owl.png"], "would both be written to owl.png; rename one", ["a/owl.jpg", "b/dog.png"]),
        (["a"], "a is a directory; name the image files, for instance a/*.jpg", ["a/owl.jpg"]),
        (["masks/cat.png"], "be overwritten; choose another directory", ["masks/cat.png", "--output_dir", "others"]),
        (["b/cat.png"], "is there already: choose another --output_dir", ["b/cat.png", "--output_dir", "others"]),
        (["b/cat.png"], "choose another --output_dir, pass --overwrite", ["b/cat.png", "--overwrite"]),
        (["b/cat.png"], "or remove masks/cat.png", ["b/cat.png"]),
        (["b/dog.png", "--value_range", "auto"], "the model has it, so leave it out", ["b/dog.png"]),
        (["b/dog.png", "--tags", "owl"], "this model's classes are disc; ", ["b/dog.png", "--tags", "disc"]),
    ],
)
def test_what_an_error_advises_works(inputs, advice, followed, model_dir, tmp_path, monkeypatch, cosa_hf, complaint):
    monkeypatch.chdir(tmp_path)
    for name in ("a/owl.jpg", "b/owl.png", "b/cat.png", "b/dog.png", "masks/cat.png"):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(name)
    assert advice in complaint("predict", model_dir, "--output_dir", "masks", *inputs)
    if "remove" in advice:
        Path("masks/cat.png").unlink()
    assert "images segmented" in cosa_hf("predict", model_dir, "--output_dir", "masks", *followed)


def test_what_is_there_is_replaced_only_when_told(model_dir, photos, tmp_path, cosa_hf, complaint):
    """A photo of one's own, say, that has the name of a mask."""
    mine = tmp_path / "wide.png"
    mine.write_bytes(photos[1].read_bytes())
    said = complaint("predict", "no-model-is-needed-to-see-that", photos[0], "--output_dir", tmp_path)
    assert said == f"error: {mine} is there already: choose another --output_dir, pass --overwrite, or remove {mine}\n"
    assert mine.read_bytes() == photos[1].read_bytes()
    for _ in range(2):
        cosa_hf("predict", model_dir, photos[0], "--output_dir", tmp_path, "--overwrite")
    assert read_ids(mine).shape == (100, 150)
    (tmp_path / "tall.png").mkdir()
    said = complaint("predict", model_dir, photos[1], "--output_dir", tmp_path, "--overwrite")
    assert re.match(r"error: cannot write \S*tall\.png: \S*tall\.png is a directory", said)


def test_missing_model_is_one_clear_line(photos, tmp_path, complaint):
    missing = tmp_path / "no-such-model"
    said = complaint("predict", missing, photos[0], "--output_dir", tmp_path / "masks")
    assert said.startswith(f"error: no model at '{missing}'")
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_kinds_of_images_people_have(model_dir, tmp_path, cosa_hf):
    """Transparency, greys, palettes, CMYK and 16 bits: each gets a mask of its own size."""
    colors = load_shapes("val", num_images=1)[0]["image"].resize((60, 40))
    colors.convert("RGBA").save(tmp_path / "rgba.png")
    colors.convert("L").save(tmp_path / "grey.png")
    colors.convert("P").save(tmp_path / "palette.gif")
    colors.convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(np.asarray(colors.convert("L")).astype(np.uint16) * 257).save(tmp_path / "deep.png")
    inputs = sorted(tmp_path.iterdir())
    cosa_hf("predict", model_dir, *inputs, "--output_dir", tmp_path / "masks")
    for path in inputs:
        assert read_ids(tmp_path / "masks" / f"{path.stem}.png").shape == (40, 60)
