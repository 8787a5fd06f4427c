"""A page to try a model on: upload a photo, tick what is in it or nothing, see the mask and where a class is seen."""

import atexit
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cosa_hf import demo_model
from cosa_hf.data import SHAPES_CLASSES, load_shapes
from cosa_hf.data.images import open_image
from cosa_hf.data.tags import multi_hot
from cosa_hf.evaluation.figures import heat, overlay
from cosa_hf.inference import Segmentation, Segmenter, has_cams

__all__ = ["build", "main"]

#: Longest side, in pixels, of what is shown: a phone's photo is 4000, which costs seconds and shows no more.
LONGEST_SIDE = 768
EXAMPLES = Path(__file__).parent / "demo" / "examples"
ABOUT = """# Tags in, masks out
This network was trained on photos and on *which* things are in them; nobody ever showed it *where*. Tick the things
that you know to be in the photo, or tick nothing and let it find out.
"""


def analyze(segmenter: Segmenter, path: str) -> Segmentation:
    """What the model says of one photo, with the CAM of every class, whatever the tags will be.

    Raises:
        ValueError: the file is not an image that can be read.
    """
    image = open_image(path, segmenter.reading)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    one = segmenter(image, tags=segmenter.names[1:])
    maps = {name: getattr(one, name) for name in ("labels", "seg_logits", "cam", "aux_cam")}
    # Interaction goes on where the tags are made: on the CPU.
    return replace(one, **{name: each.cpu() for name, each in maps.items() if each is not None})


def tagged(one: Segmentation, tags: Sequence[str], names: Sequence[str]) -> Segmentation:
    """The same with other tags: its mask is among background and the tags, or among all classes without any."""
    return replace(one, labels=multi_hot([names.index(tag) - 1 for tag in tags], len(names) - 1))


def default_class(one: Segmentation, tags: Sequence[str], names: Sequence[str]) -> str:
    """The class to show first: of those the mask has, the largest; else the first tag, else the first."""
    counts = np.bincount(tagged(one, tags, names).mask.flatten(), minlength=len(names))[1:]
    if counts.any():
        return names[int(counts.argmax()) + 1]
    return tags[0] if tags else names[1]


def class_images(
    one: Segmentation, name: str, threshold: float, names: Sequence[str]
) -> tuple[Image.Image, Image.Image | None]:
    """One class's CAM as heat, and its pseudo-label (Eq. 3): what reaches the threshold.

    Of a network without CAMs the class's probability as heat, and nothing.
    """
    index = names.index(name)
    if one.cam is None:
        return heat(one.image, one.seg_logits.softmax(dim=0)[index : index + 1].numpy()), None
    ids, _ = tagged(one, [name], names).label("cam", threshold)
    return heat(one.image, one.cam[index - 1 : index].numpy()), overlay(one.image, ids, names)


def example_images(names: Sequence[str]) -> list[str]:
    """Paths of three images: photos, or drawn ones for a model that knows the drawn classes only."""
    if list(names[1:]) != list(SHAPES_CLASSES):
        return [str(path) for path in sorted(EXAMPLES.glob("*.jpg"))]
    directory = tempfile.TemporaryDirectory(prefix="cosa-examples-")
    atexit.register(directory.cleanup)
    paths = [Path(directory.name) / f"shapes-{number}.png" for number in range(1, 4)]
    rows = [row for row in load_shapes("test", num_images=20, image_size=320) if len(row["labels"]) > 1]
    for path, row in zip(paths, rows, strict=False):
        row["image"].save(path)
    return [str(path) for path in paths]


def build(segmenter: Segmenter) -> Any:
    """The page, a `gradio.Blocks`; its functions are also an API: /segment, /tags and /class."""
    import gradio as gr

    names, cams = segmenter.names, has_cams(segmenter.model)
    cam_threshold = getattr(segmenter.model.config, "cam_threshold", 0.5)

    # The maps stay on the server, so that tags, class and threshold answer at once.
    def segment(path: str | None, tags: list[str], threshold: float) -> tuple:
        if path is None:
            return None, *retag(None, tags, threshold)
        try:
            one = analyze(segmenter, path)
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return one, *retag(one, tags, threshold)

    def retag(one: Segmentation | None, tags: list[str], threshold: float) -> tuple:
        if one is None:
            return None, None, None, None
        name = default_class(one, tags, names)
        painted = overlay(one.image, tagged(one, tags, names).mask, names)
        return painted, name, *class_images(one, name, threshold, names)

    def show_class(one: Segmentation | None, name: str | None, threshold: float) -> tuple:
        return (None, None) if one is None or name is None else class_images(one, name, threshold, names)

    with gr.Blocks(title="CoSA: tags in, masks out", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        found = gr.State()
        shown: dict[str, Any] = {"interactive": False, "buttons": ["download", "fullscreen"]}
        with gr.Row():
            with gr.Column():
                photo = gr.Image(label="Photo", type="filepath", image_mode=None, sources=["upload", "clipboard"])
                if examples := example_images(names):
                    gr.Examples(examples, photo, label="Or one of these")
            with gr.Column():
                mask = gr.Image(label="Mask", **shown)
                tags = gr.CheckboxGroup(names[1:], label="What is in it?", info="Nothing ticked: unknown.")
        gr.Markdown("### Where it looks for one class" if cams else "### Where it sees one class")
        with gr.Row():
            name = gr.Dropdown(names[1:], value=None, label="Class")
            threshold = gr.Slider(0, 1, cam_threshold, step=0.01, label="Threshold of the CAM", visible=cams)
        with gr.Row():
            heated = gr.Image(label="Class activation map" if cams else "Probability", **shown)
            pseudo_label = gr.Image(label="Pseudo-label: what reaches the threshold", visible=cams, **shown)
        photo.change(segment, [photo, tags, threshold], [found, mask, name, heated, pseudo_label], api_name="segment")
        tags.input(retag, [found, tags, threshold], [mask, name, heated, pseudo_label], api_name="tags")
        for control in (name, threshold):
            control.input(
                show_class, [found, name, threshold], [heated, pseudo_label], api_name="class", show_progress="hidden"
            )
    return page


def main(model: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is interrupted.

    Args:
        model: a directory of a saved model, or its name on the Hub; default: `COSA_MODEL` of the environment, or else
            the demo model.
        port: default: the first free one from 7860.

    Raises:
        ModuleNotFoundError: gradio is not installed.
        FileNotFoundError, ValueError: as `load_model`.
    """
    if find_spec("gradio") is None:
        raise ModuleNotFoundError('the page needs gradio: pip install "cosa-hf[app]"')
    import gradio as gr

    page = build(Segmenter.from_pretrained(model or os.environ.get("COSA_MODEL") or demo_model()))
    # Fonts of the system: the default ones are fetched from elsewhere.
    page.launch(server_port=port, theme=gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["monospace"]))
