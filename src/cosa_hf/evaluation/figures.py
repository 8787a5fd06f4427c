"""Visualizations to judge a model by: CAMs, prediction and ground truth in a row, and masks drawn over an image."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFont, ImageOps

from cosa_hf.data.images import ignored_id
from cosa_hf.data.palette import painted, voc_palette
from cosa_hf.files import file_name
from cosa_hf.inference import Segmenter

__all__ = ["comparison", "heat", "overlay", "save_visualizations", "visualization"]

TILE_HEIGHT = 192
TILE_WIDTH = 768  # of panoramas, at most
SMALL_TILE = (128, 128)  # what an image of a comparison has to fit into, width and height
GAP = 6
FONT_SIZE = 13
LINE_HEIGHT = 20
CHUNK = 256  # rows of an overlay that are painted at a time
INK = (40, 40, 40)
PAPER = (255, 255, 255)


def visualization(
    image: Image.Image,
    cam: Any,
    aux_cam: Any,
    prediction: Any,
    ground_truth: Any,
    names: Sequence[str],
    title: str | None = None,
    spread_cam: Any = None,
    spread: Any = None,
) -> Image.Image:
    """One image as a row: image, CAMs if there are any, prediction, ground truth; below it the colours of the classes.

    Args:
        image: RGB, H x W.
        cam: (C, h, w) normalised CAM in [0, 1], drawn as heat by its maximum over the classes; None: without this tile.
        aux_cam: (C, h, w) of the auxiliary layer.
        prediction: (H, W) ids (tags unknown).
        ground_truth: (H, W) ids, `ignored_id` = ignore.
        names: the K class names, background first.
        title: a line above the row, for instance the image id and its tags.
        spread_cam: (C, h, w) CAMs spread by the encoder's affinity, of a model that has one.
        spread: (H, W) ids of its spread segmentation (tags unknown).

    Returns:
        An RGB image, the same height for every landscape or portrait image.

    Raises:
        ValueError: a mask does not have the size of the image, or holds an id without a name.

    Example:
        >>> mask, cam = np.zeros((60, 80), dtype=int), np.zeros((2, 4, 5))
        >>> row = visualization(Image.new("RGB", (80, 60)), cam, cam, mask, mask, ["background", "cat", "dog"])
        >>> row.mode, row.width > 5 * row.height
        ('RGB', True)
    """
    cams = {"CAM": cam, "aux CAM": aux_cam, "spread CAM": spread_cam}
    masks = {"prediction (tags unknown)": prediction, "spread (tags unknown)": spread, "ground truth": ground_truth}
    masks = {name: _mask(mask, image, names) for name, mask in masks.items() if mask is not None}
    tiles = {
        "image": image,
        **{name: heat(image, one) for name, one in cams.items() if one is not None},
        **{name: _paint(image, mask) for name, mask in masks.items()},
    }
    size = _fit(image, (TILE_WIDTH, TILE_HEIGHT))
    # An upright image must not be narrower than its caption.
    column = max(size[0], *(int(_font().getlength(caption)) + GAP for caption in tiles))
    seen = np.unique(np.concatenate([np.unique(mask) for mask in masks.values()]))
    legend = _legend(seen, names, len(tiles) * (column + GAP) - GAP)
    top = GAP + (LINE_HEIGHT if title else 0)
    row = Image.new(
        "RGB",
        (len(tiles) * (column + GAP) + GAP, top + LINE_HEIGHT + TILE_HEIGHT + GAP + legend.height + GAP),
        PAPER,
    )
    draw = ImageDraw.Draw(row)
    if title:
        draw.text((GAP, GAP), title, fill=INK, font=_font())
    for index, (caption, tile) in enumerate(tiles.items()):
        left = GAP + index * (column + GAP)
        draw.text((left, top), caption, fill=INK, font=_font())
        row.paste(tile.resize(size, Image.Resampling.LANCZOS), (left, top + LINE_HEIGHT))
    row.paste(legend, (GAP, top + LINE_HEIGHT + TILE_HEIGHT + GAP))
    return row


def save_visualizations(segmenter: Segmenter, dataset: Dataset, directory: Path) -> None:
    """A visualization of every image of a dataset with masks, as `directory/ID.png`.

    Args:
        segmenter: its CRF, if any, refines the prediction.
        dataset: with the columns image, labels, image_id and mask.
        directory: made if need be.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = segmenter.names
    for one in segmenter.predict(dataset):
        tags = ", ".join(names[index + 1] for index in one.labels.nonzero().flatten().tolist()) or "none"
        visualization(
            one.image,
            one.cam,
            one.aux_cam,
            one.label("seg")[0],
            one.ground_truth,
            names,
            title=f"{one.image_id}   tags: {tags}",
            spread_cam=one.spread_cam,
            spread=None if one.spread_seg is None else one.label("seg_spread")[0],
        ).save(directory / file_name(one.image_id, ".png"))


def comparison(lines: Sequence[tuple[Image.Image, dict[str, Any]]], names: Sequence[str]) -> Image.Image:
    """Masks of the same images beside each other: a line for each image, a column for each of its masks.

    Args:
        lines: an RGB image, H x W, and by their captions its masks, (H, W) ids, `ignored_id` = ignore; the same
            captions in every line.
        names: the K class names, background first.

    Returns:
        An RGB image: captions, lines, and the colours of the classes.

    Raises:
        ValueError: a mask does not have the size of its image, or holds an id without a name.

    Example:
        >>> image, mask = Image.new("RGB", (80, 60)), np.ones((60, 80), dtype=int)
        >>> one = comparison([(image, {"mine": mask, "theirs": mask})], ["background", "cat"])
        >>> two = comparison([(image, {"mine": mask, "theirs": mask})] * 2, ["background", "cat"])
        >>> one.width == two.width, one.height < two.height
        (True, True)
    """
    captions = ["image", *lines[0][1]]
    tiles = []
    for image, masks in lines:
        painted = [_paint(image, _mask(mask, image, names)) for mask in masks.values()]
        tiles.append([tile.resize(_fit(tile, SMALL_TILE)) for tile in (image, *painted)])
    column = GAP + max(SMALL_TILE[0], *(int(_font().getlength(caption)) for caption in captions))
    seen = np.unique(np.concatenate([np.unique(_numpy(mask)) for _, masks in lines for mask in masks.values()]))
    legend = _legend(seen, names, len(captions) * column)
    height = GAP + LINE_HEIGHT + sum(line[0].height + GAP for line in tiles) + legend.height
    sheet = Image.new("RGB", (len(captions) * column + GAP, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, caption in enumerate(captions):
        draw.text((GAP + index * column, GAP), caption, fill=INK, font=_font())
    top = GAP + LINE_HEIGHT
    for line in tiles:
        for index, tile in enumerate(line):
            sheet.paste(tile, (GAP + index * column, top))
        top += line[0].height + GAP
    sheet.paste(legend, (GAP, top))
    return sheet


def overlay(image: Image.Image, mask: Any, names: Sequence[str]) -> Image.Image:
    """A mask drawn over its image, with a strip below that names the classes.

    Args:
        image: RGB, H x W.
        mask: (H, W) ids, 0 = background (left clear), `ignored_id` = ignore.
        names: the K class names, background first.

    Returns:
        An RGB image of the image's width and, with the strip, a little more than its height.

    Raises:
        ValueError: the mask does not have the size of the image, or holds an id without a name.

    Example:
        >>> mask = np.zeros((60, 80), dtype=int)
        >>> mask[20:40, 20:40] = 1
        >>> overlay(Image.new("RGB", (80, 60)), mask, ["background", "cat"]).size[0]
        80
    """
    mask = _mask(mask, image, names)
    # Photographs come with thousands of pixels: the text grows with them.
    legend = _legend(np.unique(mask), names, image.width, max(FONT_SIZE, image.width // 45))
    result = Image.new("RGB", (image.width, image.height + legend.height), PAPER)
    for top in range(0, image.height, CHUNK):  # blending all of a phone's photo would take half a gigabyte
        rows = slice(top, min(top + CHUNK, image.height))
        result.paste(_paint(image.crop((0, rows.start, image.width, rows.stop)), mask[rows]), (0, top))
    result.paste(legend, (0, image.height))
    return result


def heat(image: Image.Image, cam: Any) -> Image.Image:
    """CAMs drawn over their image, blue for 0 to red for 1; where classes overlap, the strongest shows.

    Args:
        image: RGB, H x W.
        cam: (C, h, w) normalised CAMs in [0, 1].

    Returns:
        An RGB image of the image's size.

    Example:
        >>> red, _, blue = heat(Image.new("RGB", (80, 60), "gray"), np.ones((1, 4, 5))).getpixel((40, 30))
        >>> red > blue
        True
    """
    strength = np.clip(_numpy(cam).max(axis=0), 0, 1)
    grey = Image.fromarray(np.uint8(strength * 255)).resize(image.size, Image.Resampling.BILINEAR)
    heat = ImageOps.colorize(grey, black=(20, 30, 140), mid=(70, 220, 120), white=(230, 20, 0))
    return Image.blend(ImageOps.grayscale(image).convert("RGB"), heat, 0.55)


def _mask(mask: Any, image: Image.Image, names: Sequence[str]) -> np.ndarray:
    mask = _numpy(mask)
    if mask.shape != (image.height, image.width):
        raise ValueError(f"mask of shape {mask.shape} for an image of {image.height} x {image.width}")
    ignored = ignored_id(len(names) - 1)
    unnamed = [int(index) for index in np.unique(mask) if index != ignored and not 0 <= index < len(names)]
    if unnamed:
        raise ValueError(f"the mask holds the ids {unnamed}, but there are names for 0..{len(names) - 1} only")
    return mask.astype(np.uint16, copy=False)  # of a phone's photo int64 would take half a gigabyte


def _fit(image: Image.Image, box: tuple[int, int]) -> tuple[int, int]:
    """The largest size, of the image's shape, that fits into a box; no side is less than a pixel."""
    scale = min(box[0] / image.width, box[1] / image.height)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _numpy(values: Any) -> np.ndarray:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def _paint(image: Image.Image, mask: np.ndarray, opacity: float = 0.65) -> Image.Image:
    blended = Image.blend(image, painted(mask), opacity)
    return Image.composite(blended, image, Image.fromarray(np.uint8(mask != 0) * 255))


def _font(size: int = FONT_SIZE) -> Any:
    return ImageFont.load_default(size)


def _legend(ids: np.ndarray, names: Sequence[str], width: int, font_size: int = FONT_SIZE) -> Image.Image:
    """Swatch and name of each class, wrapped to the width; background is left clear, so it has none."""
    font, colors = _font(font_size), voc_palette(int(ids.max()) + 1)
    space = font_size // 2
    places: list[tuple[int, int, int, str]] = []  # left, line, id, name
    left, line = space, 0
    for index in ids:
        if index == 0:
            continue
        name = names[int(index)] if index < len(names) else "ignored"
        length = font_size + space + int(font.getlength(name)) + 2 * space
        if left > space and left + length > width:
            left, line = space, line + 1
        places.append((left, line, int(index), name))
        left += length
    strip = Image.new("RGB", (width, (line + 1) * (font_size + space) + space), PAPER)
    draw = ImageDraw.Draw(strip)
    if not places:
        draw.text((space, space + font_size // 2), "background only", fill=INK, font=font, anchor="lm")
    for left, line, index, name in places:
        top = line * (font_size + space) + space
        draw.rectangle((left, top, left + font_size, top + font_size), fill=colors[index], outline=INK)
        draw.text((left + font_size + space, top + font_size // 2), name, fill=INK, font=font, anchor="lm")
    return strip
