"""The notebook, its cells run one after the other as Jupyter would, in an empty directory."""

import json
import sys
import types

import pytest
from drawn import write_photos
from in_process import ROOT
from PIL import Image

CELLS = json.loads((ROOT / "notebooks" / "own_photos.ipynb").read_text())["cells"]


def cells_run(monkeypatch, directory, **parameters):
    """What the cells leave behind, and the images that they show; parameters replace those of the first cell."""
    shown = []
    display = types.SimpleNamespace(display=shown.append)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(display=display))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.chdir(directory)
    variables = {}
    for number, cell in enumerate(each for each in CELLS if each["cell_type"] == "code"):
        exec("".join(cell["source"]), variables)
        if not number:
            assert set(parameters) < set(variables)
            variables |= parameters
    return variables, shown


@pytest.mark.slow
def test_every_cell_runs_as_it_is(monkeypatch, tmp_path):
    variables, shown = cells_run(monkeypatch, tmp_path, steps=24)
    assert variables["labelled"] == 200
    assert len(list((tmp_path / "own-photos/labels/SegmentationClassAug").glob("*.png"))) == 200
    assert len(shown) == 6
    assert all(isinstance(each, Image.Image) for each in shown)


@pytest.mark.slow
def test_with_ones_own_folder_it_trains_what_the_text_says(monkeypatch, tmp_path):
    write_photos(tmp_path / "mine", 6)
    asked = []
    monkeypatch.setattr("cosa_hf.train", lambda config: asked.append(config) or sys.exit())
    with pytest.raises(SystemExit):
        cells_run(monkeypatch, tmp_path, photos=tmp_path / "mine")
    (config,) = asked
    assert (config.data_dir, config.frozen_blocks) == (str(tmp_path / "mine"), "all")
    assert "clip" in config.backbone


def test_it_is_kept_without_outputs():
    for cell in CELLS:
        assert not cell.get("outputs"), "".join(cell["source"])
