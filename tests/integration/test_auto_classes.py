"""One saved directory, two readers: a process with this package and one that cannot import it.

Both must get the same masks; the first without any question or warning, the second from the code saved beside
the weights, once it is trusted.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation, CoSAImageProcessor
from cosa_hf.configuration_cosa_ms import CoSAMSConfig
from cosa_hf.modeling_cosa_ms import CoSAMSForSemanticSegmentation

READER = """
import contextlib, hashlib, json, sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image
{preparation}
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline
from transformers import AutoModelForImageSegmentation, AutoModelForSemanticSegmentation

photos, options = sorted(map(str, Path("../photos").iterdir())), {options}
for folder in sys.argv[1:]:
    {before}
    config = AutoConfig.from_pretrained(folder, **options)
    processor = AutoImageProcessor.from_pretrained(folder, **options)
    twin = AutoImageProcessor.from_pretrained(folder, backend="torchvision", **options)
    assert (processor.backend, twin.backend) == ("pil", "torchvision")
    models = [
        auto_class.from_pretrained(folder, **options)
        for auto_class in (AutoModel, AutoModelForSemanticSegmentation, AutoModelForImageSegmentation)
    ]
    digests, masks = [], []
    for photo in photos:
        image = Image.open(photo)
        pixels = [each(image, do_normalize=False, return_tensors="pt").pixel_values for each in (processor, twin)]
        assert (pixels[0] - pixels[1]).abs().max() < 1.01 / 255
        with torch.no_grad():
            logits = [model(**processor(image, return_tensors="pt")).logits for model in models]
        assert all(torch.equal(each, logits[0]) for each in logits)
        outputs = type("Outputs", (), {{"logits": logits[0]}})
        mask = processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0]
        digests.append(hashlib.sha256(logits[0].numpy().tobytes()).hexdigest())
        masks.append(mask.tolist())

    segmenter = pipeline("image-segmentation", model=folder, **options)
    segments = [
        {{segment["label"]: np.asarray(segment["mask"]).tolist() for segment in segmenter(photo)}}
        for photo in photos
    ]
    {afterwards}
    modules = sorted({{type(each).__module__.split(".")[0] for each in (config, processor, twin, segmenter.model)}})
    print(json.dumps({{"digests": digests, "masks": masks, "segments": segments, "modules": modules}}))
"""
INSTALLED = READER.format(preparation="import cosa_hf", options="{}", before="", afterwards="")
ABSENT = READER.format(
    preparation='sys.modules["cosa_hf"] = None',
    options='{"trust_remote_code": True}',
    before="""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where the question goes
            AutoModel.from_pretrained(folder)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError("code of somebody else was run without being trusted")
""",
    afterwards="""
    # A model that came from the saved code can be saved again, with its code.
    copy = folder + "-copy"
    models[0].save_pretrained(copy)
    processor.save_pretrained(copy)
    again = AutoModelForSemanticSegmentation.from_pretrained(copy, **options)
    assert AutoImageProcessor.from_pretrained(copy, backend="torchvision", **options).to_dict() == twin.to_dict()
    image = AutoImageProcessor.from_pretrained(copy, **options)(Image.open(photos[-1]), return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(again(**image).logits, logits[0])
""",
)


FROZEN = {
    "feature_layer": -3, "aux_layer": -1, "aux_attention": "value-value", "pooling": "lse",
    "pooling_weights": "distance", "classifier_bias": True, "center_features": True, "standardize_features": True,
    "decoder": "mlp", "decoder_inputs": "concat", "affinity": "attention",
    "affinity_blocks": [-2, -1],
}  # fmt: skip


def save(folder, architecture, encoder):
    """A model with random weights: CoSA, or a network of CoSA-MS."""
    torch.manual_seed(0)
    settings = {"id2label": {0: "background", 1: "cat", 2: "dog"}, "decoder_channels": 16}
    if architecture.startswith("cosa"):
        settings |= FROZEN if architecture == "cosa, frozen" else {}
        CoSAForWeaklySupervisedSegmentation(CoSAConfig(backbone=encoder, **settings)).save_pretrained(folder)
    else:
        config = CoSAMSConfig(architecture=architecture, encoder=encoder, **settings)
        CoSAMSForSemanticSegmentation(config).save_pretrained(folder)
    CoSAImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture
def photos(tmp_path):
    """Colour, grey, transparent, four-colour, smaller than a token; in the order of their names."""
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    large = Image.fromarray(noise).resize((90, 70), Image.Resampling.BICUBIC)
    images = {
        "colour.png": large.convert("RGB"),
        "four-colour.tif": large.convert("CMYK"),
        "grey.png": large.convert("L"),
        "tiny.png": large.convert("RGB").crop((0, 0, 5, 3)),
        "transparent.png": large,
    }
    (tmp_path / "photos").mkdir()
    for name, image in images.items():
        image.save(tmp_path / "photos" / name)
    return list(images.values())


def run(code, *arguments, cache):
    """A fresh interpreter away from the sources, with closed stdin: a question on the terminal would fail."""
    environment = os.environ | {
        "HF_MODULES_CACHE": str(cache / "modules"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-I", "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=cache,
        env=environment,
        timeout=600,
    )


# What transformers logs when it asks, falls back to another class, or does not know the model.
COMPLAINTS = ("trust_remote_code", "custom code", "not supported", "Falling back", "MISSING", "UNEXPECTED")


NETWORKS = [
    ("cosa", "test_vit"), ("cosa, frozen", "test_vit"), ("largefov", "test_resnet"), ("deeplabv3plus", "test_resnet"),
    ("largefov", "wide_resnet38_a1"),
]  # fmt: skip


@pytest.mark.slow
def test_same_masks_with_and_without_the_package(photos, tmp_path):
    folders = [save(tmp_path / f"tiny-{number}", *network) for number, network in enumerate(NETWORKS)]
    read = {}
    for name, code in {"installed": INSTALLED, "absent": ABSENT}.items():
        (tmp_path / name).mkdir()
        done = run(code, *map(str, folders), cache=tmp_path / name)
        assert done.returncode == 0, done.stderr
        complaints = COMPLAINTS if name == "installed" else ("not supported",)
        assert not [words for words in complaints if words in done.stderr], done.stderr
        read[name] = [json.loads(line) for line in done.stdout.splitlines()]
    for (architecture, _), here, there in zip(NETWORKS, read["installed"], read["absent"], strict=True):
        assert (here["modules"], there["modules"]) == (["cosa_hf"], ["transformers_modules"])
        assert here["digests"] == there["digests"]
        assert len(set(here["digests"])) > 1
        assert here["masks"] == there["masks"]
        assert here["segments"] == there["segments"]
        for image, mask, segments in zip(photos, here["masks"], here["segments"], strict=True):
            assert np.shape(mask) == (image.height, image.width)
            # The pipeline's segments cover the photo once: every pixel has one label.
            assert (sum(np.asarray(segment, dtype=int) for segment in segments.values()) == 255).all()
            assert set(segments) <= {"background", "cat", "dog"}
        if architecture.startswith("cosa"):  # untrained, the others call everything background
            assert len({label for segments in here["segments"] for label in segments}) > 1
