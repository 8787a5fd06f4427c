"""app.py: what the page shows, its API, the page in a browser where there is one, and the directory of a Space."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cosa_hf.evaluation.maps import predict_maps
from datasets import Dataset
from huggingface_hub import metadata_load
from in_process import run_script
from PIL import Image

from cosa_hf.data import SHAPES_CLASSES, load_shapes
from cosa_hf.data.tags import tag_features
from cosa_hf.inference import load_model

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["background", *SHAPES_CLASSES]

spec = importlib.util.spec_from_file_location("app", ROOT / "app.py")
app = importlib.util.module_from_spec(spec)
spec.loader.exec_module(app)


@pytest.fixture(scope="module")
def loaded(model_dir):
    return load_model(str(model_dir), "cpu")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "shapes.png"
    load_shapes("val", num_images=1)[0]["image"].resize((120, 80)).save(path)
    return path


@pytest.fixture(scope="module")
def maps(loaded, photo):
    return app.analyze(*loaded, str(photo))


@pytest.mark.parametrize("tags", [[], ["star"], ["square", "train"]])
def test_mask_and_cam_are_those_of_the_evaluation(loaded, photo, maps, tags):
    row = {"image": [str(photo)], "labels": [[SHAPES_CLASSES.index(tag) for tag in tags]], "image_id": ["x"]}
    dataset = Dataset.from_dict(row, features=tag_features(list(SHAPES_CLASSES)))
    (expected,) = predict_maps(*loaded, dataset)
    mask, picture = app.segmentation(maps, tags, NAMES)
    np.testing.assert_array_equal(mask, expected.label("seg_tags" if tags else "seg")[0])
    assert picture.width == 120
    for tag in tags:
        index = SHAPES_CLASSES.index(tag)
        torch.testing.assert_close(maps.cam[index], expected.cam[index])


def test_threshold_takes_pixels_away_from_the_pseudo_label(maps):
    def painted(threshold):
        heat, label = app.cam_pictures(maps, "star", threshold, NAMES)
        assert heat.size == (120, 80)
        return (np.asarray(label)[:80] != np.asarray(maps.image)).any(-1).sum()

    assert painted(0.0) == 120 * 80
    assert painted(0.0) > painted(0.4) > painted(0.8) > 0
    other = app.cam_pictures(maps, "boat", 0.4, NAMES)[0]
    assert other.tobytes() != app.cam_pictures(maps, "star", 0.4, NAMES)[0].tobytes()


def test_the_class_shown_first_is_the_largest_in_the_mask(maps):
    mask, _ = app.segmentation(maps, [], NAMES)
    counts = np.bincount(mask.flatten(), minlength=len(NAMES))[1:]
    assert counts.any()
    assert app.default_class(maps, [], NAMES) == SHAPES_CLASSES[counts.argmax()]
    nothing = replace(maps, seg_logits=torch.eye(len(NAMES))[0].reshape(-1, 1, 1))
    assert app.default_class(nothing, [], NAMES) == SHAPES_CLASSES[0]
    assert app.default_class(nothing, ["ring", "boat"], NAMES) == "ring"


def test_photos_are_turned_and_made_smaller_and_other_files_refused(loaded, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # show turned by a quarter
    Image.new("RGB", (1600, 800)).save(tmp_path / "turned.jpg", exif=exif)
    assert app.analyze(*loaded, str(tmp_path / "turned.jpg")).image.size == (384, 768)
    (tmp_path / "notes.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot read this picture"):
        app.analyze(*loaded, str(tmp_path / "notes.png"))


def test_three_examples_for_any_model():
    for names, ending in ((NAMES, ".png"), (["background", "cat"], ".jpg")):
        paths = app.example_pictures(names)
        assert len({Path(path).read_bytes() for path in paths}) == 3
        assert all(path.endswith(ending) and Image.open(path).width >= 300 for path in paths)


@pytest.fixture
def gradio_is(monkeypatch):
    """Makes gradio installed or not, as far as a look for it can tell."""
    find_spec = importlib.util.find_spec

    def pretend(there):
        answer = importlib.util.spec_from_loader("gradio", loader=None) if there else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: answer if name == "gradio" else find_spec(name, *rest)
        )

    return pretend


def test_the_missing_extra_is_named_first(monkeypatch, tmp_path, gradio_is):
    gradio_is(False)
    with pytest.raises(SystemExit, match=r'error: the page needs gradio: pip install -e "\.\[app\]"'):
        run_script(monkeypatch, "app.py", tmp_path / "nothing")


def test_the_environment_names_the_model(monkeypatch, tmp_path, gradio_is):
    gradio_is(True)
    monkeypatch.setenv("COSA_MODEL", str(tmp_path / "nothing"))
    with pytest.raises(SystemExit, match="error: no model at"):
        run_script(monkeypatch, "app.py")


@pytest.fixture(scope="module")
def url(loaded):
    pytest.importorskip("gradio")
    page = app.build(*loaded)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


def test_page_answers_through_its_api(url, photo, maps, tmp_path):
    from gradio_client import Client, handle_file

    def same(answer, picture):
        with Image.open(answer) as shown:
            difference = np.abs(np.asarray(shown.convert("RGB"), dtype=float) - np.asarray(picture))
        return difference.mean() < 4  # webp is lossy

    client = Client(url, verbose=False, download_files=tmp_path)
    plain, name, cam, label = client.predict(handle_file(photo), [], 0.5, api_name="/segment")
    assert same(plain, app.segmentation(maps, [], NAMES)[1])
    assert name == app.default_class(maps, [], NAMES)
    expected = app.cam_pictures(maps, name, 0.5, NAMES)
    assert same(cam, expected[0])
    assert same(label, expected[1])
    mask, *_ = client.predict(["star"], 0.5, api_name="/tags")
    assert same(mask, app.segmentation(maps, ["star"], NAMES)[1])
    _, label = client.predict("boat", 0.2, api_name="/cam")
    assert same(label, app.cam_pictures(maps, "boat", 0.2, NAMES)[1])
    assert client.predict(None, [], 0.5, api_name="/segment") == (None,) * 4


@pytest.mark.slow
def test_page_in_a_browser(url, photo):
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url, timeout=120_000)

        def source(label):
            """The address of the picture under a label, once it is there."""
            picture = page.locator(".block", has=page.get_by_text(label, exact=True)).locator("img[src*='file=']").last
            picture.wait_for(timeout=120_000)
            return picture.get_attribute("src")

        def changed(label, before):
            page.wait_for_function(
                "before => ![...document.images].some(image => image.src === before)", arg=before, timeout=120_000
            )
            return source(label)

        page.locator("input[type=file]").first.set_input_files(str(photo))
        mask, cam = source("Mask"), source("Class activation map")
        label = source("Pseudo-label: what reaches the threshold")
        page.get_by_label("star", exact=True).check()
        changed("Mask", mask)
        cam, label = source("Class activation map"), source("Pseudo-label: what reaches the threshold")
        page.locator("input[type=number]").last.fill("0.9")
        page.keyboard.press("Enter")
        changed("Pseudo-label: what reaches the threshold", label)
        page.get_by_role("combobox", name="Class").click()
        page.get_by_role("option", name="boat").click()
        changed("Class activation map", cam)
        browser.close()
    assert errors == []


def test_space_is_complete(tmp_path):
    _, block = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/app.md").read_text(), re.DOTALL)
    shutil.copy(ROOT / "app.py", tmp_path)
    for source in ("src", "space"):
        shutil.copytree(ROOT / source, tmp_path / source)
    local = "\n".join(line for line in block.splitlines() if not line.startswith("hf "))
    subprocess.run(["bash", "-ec", local], cwd=tmp_path, check=True)
    space = tmp_path / "build" / "space"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    code = "import app, cosa_hf; print(cosa_hf.__file__, *app.example_pictures(['background', 'cat']), sep='\\n')"
    done = subprocess.run([sys.executable, "-c", code], cwd=space, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(Path(line).is_relative_to(space) for line in done.stdout.split())
    assert len(done.stdout.split()) == 4

    metadata = metadata_load(space / "README.md")
    assert metadata["sdk"] == "gradio"
    assert (space / metadata["app_file"]).is_file()
    wanted = [line for line in (space / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # Trackers are for training.
    assert sorted(wanted) == sorted(name for name in project["dependencies"] if not name.startswith("tensorboard"))
