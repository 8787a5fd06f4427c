"""The page: what it shows, its API, and itself in a browser where there is one."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import square, tiny_cosa

from cosa_hf import app
from cosa_hf.data import SHAPES_CLASSES, load_shapes
from cosa_hf.inference import Segmenter

NAMES = ["background", *SHAPES_CLASSES]


@pytest.fixture(scope="module")
def segmenter():
    return Segmenter(tiny_cosa(decoder_channels=32), square(96))


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "shapes.png"
    load_shapes("val", num_images=1)[0]["image"].resize((120, 80)).save(path)
    return path


@pytest.fixture(scope="module")
def one(segmenter, photo):
    return app.analyze(segmenter, str(photo))


@pytest.mark.parametrize("tags", [[], ["star"], ["square", "train"]])
def test_mask_and_cam_are_those_of_the_segmenter(segmenter, photo, one, tags):
    expected = segmenter(photo, tags=tags)
    assert torch.equal(app.tagged(one, tags, NAMES).mask, expected.mask)
    for tag in tags:
        index = SHAPES_CLASSES.index(tag)
        torch.testing.assert_close(one.cam[index], expected.cam[index])


def test_threshold_takes_pixels_away_from_the_pseudo_label(one):
    def painted(threshold):
        heat, label = app.class_images(one, "star", threshold, NAMES)
        assert heat.size == (120, 80)
        return (np.asarray(label)[:80] != np.asarray(one.image)).any(-1).sum()

    assert painted(0.0) == 120 * 80
    assert painted(0.0) > painted(0.4) > painted(0.8) > 0
    other = app.class_images(one, "boat", 0.4, NAMES)[0]
    assert other.tobytes() != app.class_images(one, "star", 0.4, NAMES)[0].tobytes()


def test_the_class_shown_first_is_the_largest_in_the_mask(one):
    counts = np.bincount(app.tagged(one, [], NAMES).mask.flatten(), minlength=len(NAMES))[1:]
    assert counts.any()
    assert app.default_class(one, [], NAMES) == SHAPES_CLASSES[counts.argmax()]
    nothing = replace(one, seg_logits=torch.eye(len(NAMES))[0].reshape(-1, 1, 1))
    assert app.default_class(nothing, [], NAMES) == SHAPES_CLASSES[0]
    assert app.default_class(nothing, ["ring", "boat"], NAMES) == "ring"


def test_photos_are_turned_and_made_smaller_and_other_files_refused(segmenter, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # show turned by a quarter
    Image.new("RGB", (1600, 800)).save(tmp_path / "turned.jpg", exif=exif)
    assert app.analyze(segmenter, str(tmp_path / "turned.jpg")).image.size == (384, 768)
    (tmp_path / "notes.png").write_text("not an image")
    with pytest.raises(ValueError, match="cannot read"):
        app.analyze(segmenter, str(tmp_path / "notes.png"))


@pytest.mark.parametrize(("names", "ending"), [(NAMES, ".png"), (["background", "cat"], ".jpg")])
def test_three_examples_for_any_model(names, ending):
    if ending == ".jpg" and not app.EXAMPLES.is_dir():
        pytest.skip("the package has no photos")
    paths = app.example_images(names)
    assert len({Path(path).read_bytes() for path in paths}) == 3
    assert all(path.endswith(ending) and Image.open(path).width >= 300 for path in paths)


def test_the_missing_extra_is_named_first(monkeypatch, tmp_path):
    monkeypatch.setattr(app, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'the page needs gradio: pip install "cosa-hf\[app\]"'):
        app.main(str(tmp_path / "nothing"))


@pytest.mark.parametrize("argument", [True, False], ids=["argument", "environment"])
def test_a_model_that_is_not_there_is_named(argument, monkeypatch, tmp_path):
    pytest.importorskip("gradio")
    monkeypatch.setenv("COSA_MODEL", str(tmp_path / ("other" if argument else "nothing")))
    with pytest.raises(FileNotFoundError, match=r"no model at .*nothing"):
        app.main(str(tmp_path / "nothing") if argument else None)


def test_a_network_without_cams_shows_probabilities(segmentation_only, photo):
    segmenter = Segmenter.from_pretrained(segmentation_only, device="cpu")
    one = app.analyze(segmenter, str(photo))
    name = app.default_class(one, [], segmenter.names)
    seen, label = app.class_images(one, name, 0.5, segmenter.names)
    index = segmenter.names.index(name)
    certain = replace(one, seg_logits=20 * torch.eye(len(segmenter.names))[index][:, None, None])
    red, _, blue = app.class_images(certain, name, 0.5, segmenter.names)[0].split()
    assert seen.size == one.image.size
    assert label is None
    assert np.mean(red) > np.mean(np.asarray(seen)[..., 0])
    assert np.mean(red) > np.mean(blue)


def test_the_page_of_a_network_without_cams_answers(segmentation_only, photo, tmp_path):
    pytest.importorskip("gradio")
    from gradio_client import Client, handle_file

    segmenter = Segmenter.from_pretrained(segmentation_only, device="cpu")
    page = app.build(segmenter)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    client = Client(url, verbose=False, download_files=tmp_path)
    mask, name, seen, label = client.predict(handle_file(photo), [], 0.5, api_name="/segment")
    assert Path(mask).is_file()
    assert Path(seen).is_file()
    assert name in segmenter.names[1:]
    assert label is None
    page.close()


@pytest.fixture(scope="module")
def url(segmenter):
    pytest.importorskip("gradio")
    page = app.build(segmenter)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


def test_page_answers_through_its_api(url, photo, one, tmp_path):
    from gradio_client import Client, handle_file

    def same(answer, image):
        with Image.open(answer) as shown:
            difference = np.abs(np.asarray(shown.convert("RGB"), dtype=float) - np.asarray(image))
        return difference.mean() < 4  # webp is lossy

    def painted(tags):
        return app.overlay(one.image, app.tagged(one, tags, NAMES).mask, NAMES)

    client = Client(url, verbose=False, download_files=tmp_path)
    mask, name, cam, label = client.predict(handle_file(photo), [], 0.5, api_name="/segment")
    assert same(mask, painted([]))
    assert name == app.default_class(one, [], NAMES)
    expected = app.class_images(one, name, 0.5, NAMES)
    assert same(cam, expected[0])
    assert same(label, expected[1])
    mask, *_ = client.predict(["star"], 0.5, api_name="/tags")
    assert same(mask, painted(["star"]))
    _, label = client.predict("boat", 0.2, api_name="/class")
    assert same(label, app.class_images(one, "boat", 0.2, NAMES)[1])
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
            """The address of the image under a label, once it is there."""
            image = page.locator(".block", has=page.get_by_text(label, exact=True)).locator("img[src*='file=']").last
            image.wait_for(timeout=120_000)
            return image.get_attribute("src")

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
