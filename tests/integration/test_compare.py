"""scripts/compare.py as a user runs it, on small random models."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare.py"


def test_a_picture_with_a_line_for_each_image_and_a_column_for_each_model(model_dir, tmp_path):
    output = tmp_path / "new" / "compare.png"
    quick = ("--dataset", "shapes", "--num_images", "3", "--scales", "1", "--no_flip")
    done = subprocess.run(
        [sys.executable, SCRIPT, f"one={model_dir}", f"two={model_dir}", *quick, "--output", output],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{output}: val-00000, val-00100, val-00199"
    with Image.open(output) as picture:
        assert picture.width > 4 * 128  # image, truth, one, two
        assert picture.height > 3 * 128


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["nowhere"], "error: no directory nowhere"),
        (["{model}", "{model}"], "both .* are called .*; call one of them NAME="),
        (["{model}", "--source", "crf"], "invalid choice: 'crf'"),
    ],
)
def test_mistakes_are_named(models, message, model_dir, tmp_path, complaint):
    models = [model.format(model=model_dir) for model in models]
    said = complaint("compare.py", *models, "--dataset", "shapes", "--output", tmp_path / "x.png")
    assert re.search(message, said), said
    assert not (tmp_path / "x.png").exists()
