"""research/compare.py as a user runs it, on small random models."""

import re

import compare
import pytest
from PIL import Image

from cosa_hf.data import SHAPES_CLASSES, load_shapes


def test_an_image_with_a_row_for_each_image_and_a_column_for_each_model(model_dir, tmp_path, capsys):
    output = tmp_path / "new" / "compare.png"
    quick = ("--dataset", "shapes", "--num_images", "3", "--scales", "1", "--no_flip")
    compare.main([f"one={model_dir}", f"two={model_dir}", *quick, "--output", str(output)])
    assert capsys.readouterr().out.strip() == f"{output}: val-00000, val-00100, val-00199"
    with Image.open(output) as image:
        assert image.width > 4 * 128  # image, ground truth, one, two
        assert image.height > 3 * 128


def test_photos_without_masks(model_dir, tmp_path, capsys):
    for row in load_shapes("val", num_images=2):
        row["image"].save(tmp_path / f"{row['image_id']}.png")
    rows = [f"{name}.png,{SHAPES_CLASSES[0]},train" for name in ("val-00000", "val-00001")]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,labels,split", *rows]))
    photos = ("--dataset", "folder", "--data_dir", tmp_path, "--split", "train", "--classes", *SHAPES_CLASSES)
    quick = ("--no_truth", "--scales", 1, "--no_flip")
    compare.main([*map(str, (model_dir, *photos, *quick, "--output", tmp_path / "x.jpg"))])
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'x.jpg'}: val-00000, val-00001"
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.width < 3 * 150  # image and model, no third


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["nowhere"], "error: no directory nowhere"),
        (["{model}", "{model}"], "both .* are called .*; call one of them NAME="),
        (["{model}", "--source", "crf"], "invalid choice: 'crf'"),
        (["{model}", "--dataset", "folder", "--data_dir", "{photos}", "--split", "train"], "names no mask for .*0.png"),
        (["{model}", "--output", "{photos}"], "error: cannot write .*: .* is a directory"),
        (["{model}", "--output", "{photos}/0.png/x.png"], "error: cannot write .*x.png: .*0.png is a file"),
        (["{model}", "--output", "x.doc"], "error: cannot write x.doc: unknown image format; end the name in .png"),
    ],
)
def test_mistakes_are_named(models, message, model_dir, tmp_path, complaint):
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,labels\n0.png,{SHAPES_CLASSES[0]}")
    models = [model.format(model=model_dir, photos=tmp_path) for model in models]
    said = complaint(compare.main, "--output", tmp_path / "x.png", "--dataset", "shapes", *models)
    assert re.search(message, said), said
    assert not (tmp_path / "x.png").exists()
