"""Datasets of the package pushed to a hub on this machine, and read back from it by name, whole and as a stream."""

import json
import os
import subprocess
import sys

import numpy as np
from hub_server import Hub
from PIL import Image

# A process of its own: the libraries read the hub's address, and whether there is one, when they are imported.
PUSH_AND_READ = """
import sys
from pathlib import Path
from cosa_hf.data import DatasetOptions, load_dataset_by_name, load_folder, load_shapes, stream_hub, undecoded

def rows(dataset):
    contents = lambda value: value["bytes"] or Path(value["path"]).read_bytes()
    return [{k: contents(v) if k in ("image", "mask") else v for k, v in row.items()} for row in undecoded(dataset)]

for name, dataset in {
    "org/shapes": load_shapes("train", num_images=3, masks=True),
    "org/photos": load_folder(sys.argv[1], masks=True),
}.items():
    dataset.push_to_hub(name, split="train")
    options = DatasetOptions(dataset_name=name)
    back = load_dataset_by_name("hub", None, "train", masks=True, options=options)
    assert back.features == dataset.features, back.features
    assert rows(back) == rows(dataset)
    stream = stream_hub(options, "train")
    assert not any(row["negative"] for row in stream)  # a stream cannot know beforehand whether there is one
    stream = stream.remove_columns("negative")
    assert stream.features == dataset.remove_columns("mask").features, stream.features
    assert rows(stream) == rows(dataset.remove_columns("mask"))
"""


def photos(folder):
    """A JPEG and a PNG with tags and masks, one of them without a tag."""
    rng = np.random.default_rng(0)
    rows = [("a.jpg", ["dog", "cat"]), ("b.png", [])]
    (folder / "masks").mkdir(parents=True)
    for name, _ in rows:
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(folder / name)
        Image.fromarray(rng.integers(0, 3, (9, 12), dtype=np.uint8)).save(folder / "masks" / f"{name}.png")
    lines = [{"file_name": n, "labels": tags, "mask_file_name": f"masks/{n}.png"} for n, tags in rows]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_what_is_pushed_comes_back_identical(tmp_path):
    hub = Hub()
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_test"}
    command = [sys.executable, "-c", PUSH_AND_READ, photos(tmp_path / "photos")]
    try:
        run = subprocess.run(
            command,
            env=os.environ | settings | {"HF_HOME": str(tmp_path / "home")},
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        hub.shutdown()
        hub.server_close()
    assert run.returncode == 0, run.stderr
    assert set(hub.repos) == {"org/shapes", "org/photos"}
