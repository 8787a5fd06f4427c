"""Visualizations: layout, colours and refusals; that they are pretty is for eyes."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import square, tiny_cosa

from cosa_hf.data import load_shapes
from cosa_hf.data.palette import voc_palette
from cosa_hf.evaluation.figures import (
    SMALL_TILE,
    TILE_HEIGHT,
    TILE_WIDTH,
    comparison,
    overlay,
    save_visualizations,
    visualization,
)
from cosa_hf.inference import Segmenter

NAMES = ["background", "cat", "dog"]


def parts(size=(80, 60), color=(0, 0, 0)):
    image = Image.new("RGB", size, color)
    mask = np.zeros((size[1], size[0]), dtype=int)
    mask[:, : size[0] // 2] = 1
    return image, np.zeros((2, 4, 5), dtype=np.float32), mask


def colors_of(drawn):
    return {color for _, color in drawn.getcolors(maxcolors=10**6)}


@pytest.mark.parametrize("size", [(80, 60), (60, 80), (500, 20), (333, 500)])
def test_rows_of_all_shapes_have_one_height(size):
    image, cam, mask = parts(size)
    reference, reference_cam, reference_mask = parts((100, 100))
    expected = visualization(reference, reference_cam, reference_cam, reference_mask, reference_mask, NAMES, title="x")
    assert visualization(image, cam, cam, mask, mask, NAMES, title="x").height == expected.height > TILE_HEIGHT


@pytest.mark.parametrize("size", [(3000, 2), (2, 3000)])
def test_a_strip_of_an_image_is_drawn_at_a_size_for_eyes(size):
    image, cam, mask = parts(size)
    row = visualization(image, cam, cam, mask, mask, NAMES)
    assert row.width < 5 * (TILE_WIDTH + 10)
    assert comparison([(image, {"mask": mask})], NAMES).width < row.width


def test_tensors_and_arrays_draw_the_same():
    image, cam, mask = parts()
    cam[1, 2, 2] = 1.0
    arrays = visualization(image, cam, cam, mask, mask, NAMES)
    tensors = visualization(image, torch.tensor(cam), torch.tensor(cam), torch.tensor(mask), torch.tensor(mask), NAMES)
    assert arrays.tobytes() == tensors.tobytes()


def test_each_input_changes_its_own_tile_only():
    image, cam, mask = parts()
    hot = cam.copy()
    hot[0, 1, 1] = 1.0
    other = mask.copy()
    other[:30] = 1
    spread = {"spread_cam": cam, "spread": mask}
    base = visualization(image, cam, cam, mask, mask, NAMES, **spread)
    overlays = [
        visualization(image, hot, cam, mask, mask, NAMES, **spread),
        visualization(image, cam, hot, mask, mask, NAMES, **spread),
        visualization(image, cam, cam, mask, mask, NAMES, **spread | {"spread_cam": hot}),
        visualization(image, cam, cam, other, mask, NAMES, **spread),
        visualization(image, cam, cam, mask, mask, NAMES, **spread | {"spread": other}),
        visualization(image, cam, cam, mask, other, NAMES, **spread),
    ]
    tile = base.width / 7
    assert visualization(image, cam, cam, mask, mask, NAMES).width < base.width
    for place, drawn in enumerate(overlays, start=1):
        columns = np.flatnonzero((np.asarray(drawn) != np.asarray(base)).any(axis=(0, 2)))
        assert place * tile - 5 <= columns.min() < columns.max() < (place + 1) * tile + 5


def test_a_visualization_of_every_image_is_saved(tmp_path):
    segmenter = Segmenter(tiny_cosa(), square(32))
    dataset = load_shapes("val", num_images=2, masks=True)
    save_visualizations(segmenter, dataset, tmp_path / "new" / "panels")
    files = sorted((tmp_path / "new" / "panels").iterdir())
    assert [file.stem for file in files] == dataset["image_id"][:]
    for one, file in zip(segmenter.predict(dataset), files, strict=True):
        tags = ", ".join(segmenter.names[int(index) + 1] for index in one.labels.nonzero())
        row = visualization(
            one.image, one.cam, one.aux_cam, one.label("seg")[0], one.ground_truth, segmenter.names,
            title=f"{one.image_id}   tags: {tags}",
        )  # fmt: skip
        with Image.open(file) as saved:
            assert saved.tobytes() == row.tobytes()


def test_overlay_paints_classes_and_leaves_background_alone():
    image, _, mask = parts(color=(200, 200, 200))
    drawn = overlay(image, mask, NAMES)
    assert drawn.width == image.width
    assert drawn.height > image.height
    assert drawn.getpixel((79, 10)) == (200, 200, 200)
    red, green, blue = drawn.getpixel((0, 10))
    assert red > green == blue < 200


def test_legend_shows_the_colours_of_the_classes_that_occur():
    image, _, mask = parts((200, 60))
    strip = overlay(image, mask, NAMES).crop((0, 60, 200, 10**4))
    palette = voc_palette(3)
    assert palette[1] in colors_of(strip)
    assert palette[2] not in colors_of(strip)
    mask[:10] = 2
    strip = overlay(image, mask, NAMES).crop((0, 60, 200, 10**4))
    assert {palette[1], palette[2]} <= colors_of(strip)


def test_many_classes_wrap_instead_of_leaving_the_image():
    names = ["background", *(f"class {index}" for index in range(12))]
    mask = np.arange(13)[:, None].repeat(120, axis=1)
    wrapped = overlay(Image.new("RGB", (120, 13)), mask, names)
    assert wrapped.width == 120
    assert set(voc_palette(13)) - {(0, 0, 0)} <= colors_of(wrapped.crop((0, 13, 120, wrapped.height)))


@pytest.mark.parametrize("draw", ["overlay", "visualization"])
def test_masks_that_do_not_fit_are_refused(draw):
    image, cam, mask = parts()

    def draw(mask):
        return overlay(image, mask, NAMES) if draw == "overlay" else visualization(image, cam, cam, mask, mask, NAMES)

    with pytest.raises(ValueError, match="60 x 80"):
        draw(mask.T)
    with pytest.raises(ValueError, match=r"\[3\]"):
        draw(mask * 3)
    draw(mask * 255)


def test_a_comparison_has_a_column_for_each_mask_and_names_every_class():
    image, _, mask = parts((200, 100))
    other = np.where(mask == 1, 2, 0)
    drawn = comparison([(image, {"ground truth": mask, "one": mask, "two": other})] * 2, NAMES)
    pixels, width, palette = np.asarray(drawn), (drawn.width - 6) / 4, voc_palette()
    shown = [pixels[60, round(6 + column * width + SMALL_TILE[0] / 4)] for column in range(4)]
    assert (shown[0] == 0).all()
    assert (shown[1] == shown[2]).all()
    assert shown[1].argmax() == np.argmax(palette[1])
    assert shown[3].argmax() == np.argmax(palette[2])
    assert {palette[1], palette[2]} <= colors_of(drawn)  # in the legend, undiluted


def test_a_comparison_fits_images_of_all_shapes():
    images = [parts(size) for size in ((80, 60), (60, 80), (500, 20))]
    drawn = comparison([(image, {"mask": mask}) for image, _, mask in images], NAMES)
    assert drawn.height < 60 + sum(SMALL_TILE[1] * min(1, image.height / image.width) + 6 for image, *_ in images) + 20


def test_a_comparison_refuses_a_mask_of_another_size():
    image, _, mask = parts()
    with pytest.raises(ValueError, match="for an image of 60 x 80"):
        comparison([(image, {"mask": mask.T})], NAMES)
