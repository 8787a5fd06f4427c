"""A page to try a model on: upload a photo, tick what is in it or nothing, see the mask and the CAM of a class.

python app.py [MODEL]                              without MODEL, the small one that comes with the package
COSA_MODEL=org/cosa-vit-b-voc python app.py        as a Space of Hugging Face starts it: see docs/app.md
"""

import argparse
import atexit
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from cosa_hf import demo_model
from cosa_hf.data import SHAPES_CLASSES, load_shapes
from cosa_hf.data.tags import multi_hot, tag_features
from cosa_hf.evaluation.figures import heat, overlay
from cosa_hf.evaluation.maps import ImageMaps, label_names, predict_maps
from cosa_hf.image_processing_cosa import to_rgb
from cosa_hf.inference import load_model, require_cams

#: Longest side, in pixels, of what is shown: a phone's photo is 4000, which costs seconds and shows no more.
LONGEST_SIDE = 768
HERE = Path(__file__).resolve().parent
ABOUT = """# Tags in, masks out
This network was trained on photos and on *which* things are in them; nobody ever showed it *where*. Tick the things
that you know to be in the picture, or tick nothing and let it find out.
"""


def analyze(model: Any, processor: Any, path: str) -> ImageMaps:
    """The model's maps of one photo, with the CAM of every class, whatever the tags will be.

    Raises:
        ValueError: the file is not an image that can be read.
    """
    try:
        with Image.open(path) as file:
            image = to_rgb(file)
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, DecompressionBombError ...
        raise ValueError(f"cannot read this picture: {error}") from error
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    names = label_names(model.config)[1:]
    row = {"image": [image], "labels": [list(range(len(names)))], "image_id": [Path(path).stem]}
    (maps,) = predict_maps(model, processor, Dataset.from_dict(row, features=tag_features(names)))
    # Interaction goes on where the tags are made: on the CPU.
    moved = {field: getattr(maps, field).cpu() for field in ("labels", "seg_logits", "cam", "aux_cam")}
    return replace(maps, **moved)


def default_class(maps: ImageMaps, tags: Sequence[str], names: Sequence[str]) -> str:
    """The class whose CAM to show first: of those the mask has, the largest; else the first tag, else the first."""
    mask, _ = segmentation(maps, tags, names)
    counts = np.bincount(mask.flatten(), minlength=len(names))[1:]
    if counts.any():
        return names[int(counts.argmax()) + 1]
    return tags[0] if tags else names[1]


def segmentation(maps: ImageMaps, tags: Sequence[str], names: Sequence[str]) -> tuple[np.ndarray, Image.Image]:
    """The mask, (H, W) ids, and its picture: among background and the tags, or among all classes without any."""
    given = replace(maps, labels=multi_hot([names.index(tag) - 1 for tag in tags], len(names) - 1))
    mask = given.label("seg_tags" if tags else "seg")[0].numpy()
    return mask, overlay(maps.image, mask, names)


def cam_pictures(maps: ImageMaps, name: str, threshold: float, names: Sequence[str]) -> tuple[Image.Image, Image.Image]:
    """One class's CAM as heat, and its pseudo-label (Eq. 3): what reaches the threshold."""
    index = names.index(name)
    only = replace(maps, labels=multi_hot([index - 1], len(names) - 1))
    mask = only.label("cam", threshold)[0].numpy()
    return heat(maps.image, maps.cam[index - 1 : index].numpy()), overlay(maps.image, mask, names)


def example_pictures(names: Sequence[str]) -> list[str]:
    """Paths of three pictures: photos, or drawn ones for a model that knows the drawn classes only."""
    if list(names[1:]) != list(SHAPES_CLASSES):
        return [str(path) for path in sorted((HERE / "demo/examples").glob("*.jpg"))]
    directory = tempfile.TemporaryDirectory(prefix="cosa-examples-")
    atexit.register(directory.cleanup)
    paths = [Path(directory.name) / f"shapes-{number}.png" for number in range(1, 4)]
    rows = [row for row in load_shapes("test", num_images=20, image_size=320) if len(row["labels"]) > 1]
    for path, row in zip(paths, rows, strict=False):
        row["image"].save(path)
    return [str(path) for path in paths]


def build(model: Any, processor: Any) -> Any:
    """The page, a `gradio.Blocks`; its functions are also an API: /segment, /tags and /cam."""
    import gradio as gr

    names = label_names(model.config)

    # The maps stay on the server, so that tags, class and threshold answer at once.
    def segment(path: str | None, tags: list[str], threshold: float) -> tuple:
        if path is None:
            return None, *retag(None, tags, threshold)
        try:
            maps = analyze(model, processor, path)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return maps, *retag(maps, tags, threshold)

    def retag(maps: ImageMaps | None, tags: list[str], threshold: float) -> tuple:
        if maps is None:
            return None, None, None, None
        name = default_class(maps, tags, names)
        return segmentation(maps, tags, names)[1], name, *cam_pictures(maps, name, threshold, names)

    def show_cam(maps: ImageMaps | None, name: str | None, threshold: float) -> tuple:
        return (None, None) if maps is None or name is None else cam_pictures(maps, name, threshold, names)

    with gr.Blocks(title="CoSA: tags in, masks out", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        maps = gr.State()
        shown: dict[str, Any] = {"interactive": False, "buttons": ["download", "fullscreen"]}
        with gr.Row():
            with gr.Column():
                photo = gr.Image(label="Photo", type="filepath", image_mode=None, sources=["upload", "clipboard"])
                gr.Examples(example_pictures(names), photo, label="Or one of these")
            with gr.Column():
                mask = gr.Image(label="Mask", **shown)
                tags = gr.CheckboxGroup(names[1:], label="What is in it?", info="Nothing ticked: unknown.")
        gr.Markdown("### Where it looks for one class")
        with gr.Row():
            name = gr.Dropdown(names[1:], value=None, label="Class")
            threshold = gr.Slider(0, 1, model.config.cam_threshold, step=0.01, label="Threshold of the CAM")
        with gr.Row():
            cam = gr.Image(label="Class activation map", **shown)
            pseudo_label = gr.Image(label="Pseudo-label: what reaches the threshold", **shown)
        photo.change(segment, [photo, tags, threshold], [maps, mask, name, cam, pseudo_label], api_name="segment")
        tags.input(retag, [maps, tags, threshold], [mask, name, cam, pseudo_label], api_name="tags")
        for control in (name, threshold):
            control.input(
                show_cam, [maps, name, threshold], [cam, pseudo_label], api_name="cam", show_progress="hidden"
            )
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        default=os.environ.get("COSA_MODEL") or demo_model(),
        help="directory of a saved model, or its name on the Hub; without, $COSA_MODEL or the package's demo model",
    )
    parser.add_argument("--port", type=int, help="the first free one from 7860 without")
    args = parser.parse_args()
    if find_spec("gradio") is None:
        raise SystemExit('error: the page needs gradio: pip install -e ".[app]"')
    try:
        model, processor = load_model(args.model, "cuda" if torch.cuda.is_available() else "cpu")
        require_cams(model)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from error
    import gradio as gr

    # Fonts of the system: the default ones are fetched from elsewhere.
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    build(model, processor).launch(server_port=args.port, theme=theme)


if __name__ == "__main__":
    main()
