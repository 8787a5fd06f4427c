"""A plot is written for every figure; without matplotlib a sentence says why there is none."""

import sys

import pytest
from analyses import ANALYSES
from PIL import Image
from plots import plot_ablation, plot_figure
from records import RECORDS

SUMMARY = {
    "CoSA": {"seg": {"mean": 70.0, "std": 1.5, "n": 3}},
    "without CSC": {"seg": {"mean": 65.0, "std": None, "n": 1}},
    "unfinished": {},
}


def rows_of(figure):
    """Two runs at two steps, one of them with values that could not be counted."""
    columns = {
        "1a": [{"split": split, "images": 2, "cls_map": 90.0} for split in ("train", "val")],
        "9": [{"xi": 0.4, "aux_xi": 0.3}],
        "3": [
            {
                "against": against,
                "low": low,
                "high": low + 0.5,
                "pixels": 10 * low,
                "accuracy": accuracy,
                "threshold": 0.4,
            }
            for against in ("confidence", "perplexity")
            for low, accuracy in ((0.0, None), (0.5, 80.0))
        ],
        "4": [
            {"map": cam, "pixels": pixels, "share": 50.0, "miou": 60.0}
            for cam in ("M", "M†")
            for pixels in ("all", "certain")
        ],
        "6": [{"labels": labels, "miou": 60.0} for labels in ("SPL", "CPL")],
        "7": [
            {"image_id": "a", "miou": 60.0, "perplexity": 1.0, "mae": 0.7},
            {"image_id": "b", "miou": None, "perplexity": 1.0, "mae": None},
        ],
        "4b": [{"c_miou": None, "miou": 60.0}],
    }
    return [
        {"run": run, "step": step, "network": "assignment"} | row
        for run in ("CoSA", "no RAW")
        for step in ((300,) if figure == "4b" else (150, 300))
        for row in columns[figure]
    ]


@pytest.mark.parametrize("figure", [*ANALYSES, *RECORDS])
def test_every_figure_is_drawn(figure, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "figure.png"
    assert plot_figure(figure, rows_of(figure), path) == str(path)
    with Image.open(path) as image:
        assert image.width > 300
        assert len(image.convert("RGB").getcolors(10**6)) > 10


def test_ablations_are_drawn_with_rows_that_have_no_figure_yet(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "3b.png"
    assert plot_ablation(SUMMARY, "seg", "components", path) == str(path)
    assert path.is_file()


def test_without_matplotlib_the_tables_stand_and_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    path = tmp_path / "3b.png"
    said = plot_ablation(SUMMARY, "seg", "components", path)
    assert said == f'no {path}: matplotlib is not installed (pip install -e ".[research]")'
    assert not path.exists()
