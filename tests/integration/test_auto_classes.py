"""One saved directory, two readers: a process with this package and one that cannot import it.

Both must get the same masks; the first without any question or warning, the second from the code saved beside
the weights.
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
import hashlib, json, sys
import numpy as np
import torch
from PIL import Image
{preparation}
import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoModel, pipeline
from transformers import AutoModelForImageSegmentation, AutoModelForSemanticSegmentation

folder, photos, options = sys.argv[1], sys.argv[2:], {options}
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
INSTALLED = READER.format(preparation="import cosa_hf", options="{}", afterwards="")
ABSENT = READER.format(
    preparation='sys.modules["cosa_hf"] = None',
    options='{"trust_remote_code": True}',
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
UNTRUSTED = """
import sys
sys.modules["cosa_hf"] = None
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1])
"""


FROZEN = {
    "feature_layer": -3, "aux_layer": -1, "aux_attention": "value-value", "pooling": "lse", "classifier_bias": True,
    "standardize_features": True, "decoder": "mlp", "decoder_inputs": "concat", "affinity": "attention",
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
        if architecture != "largefov":
            pytest.importorskip("segmentation_models_pytorch")
        config = CoSAMSConfig(architecture=architecture, encoder=encoder, **settings)
        CoSAMSForSemanticSegmentation(config).save_pretrained(folder)
    CoSAImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("saved") / "cosa-tiny", "cosa", "test_vit")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Colour, grey, transparent, four-colour, smaller than a token."""
    folder = tmp_path_factory.mktemp("photos")
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    large = Image.fromarray(noise).resize((90, 70), Image.Resampling.BICUBIC)
    images = {
        "colour.png": large.convert("RGB"),
        "grey.png": large.convert("L"),
        "transparent.png": large,
        "four-colour.tif": large.convert("CMYK"),
        "tiny.png": large.convert("RGB").crop((0, 0, 5, 3)),
    }
    for name, image in images.items():
        image.save(folder / name)
    return [str(folder / name) for name in images]


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


@pytest.mark.parametrize(
    ("architecture", "encoder"),
    [
        ("cosa", "test_vit"),
        ("cosa, frozen", "test_vit"),
        ("largefov", "test_resnet"),
        ("deeplabv3plus", "test_resnet"),
        pytest.param("largefov", "wide_resnet38_a1", marks=pytest.mark.slow),
    ],
)
def test_same_masks_with_and_without_the_package(architecture, encoder, photos, tmp_path):
    folder = save(tmp_path / "tiny", architecture, encoder)
    (tmp_path / "installed").mkdir()
    (tmp_path / "absent").mkdir()
    installed = run(INSTALLED, str(folder), *photos, cache=tmp_path / "installed")
    assert installed.returncode == 0, installed.stderr
    assert not [words for words in COMPLAINTS if words in installed.stderr], installed.stderr
    here = json.loads(installed.stdout)
    assert here["modules"] == ["cosa_hf"]

    absent = run(ABSENT, str(folder), *photos, cache=tmp_path / "absent")
    assert absent.returncode == 0, absent.stderr
    assert "not supported" not in absent.stderr, absent.stderr
    there = json.loads(absent.stdout)
    assert there["modules"] == ["transformers_modules"]

    assert here["digests"] == there["digests"]
    assert len(set(here["digests"])) > 1
    assert here["masks"] == there["masks"]
    assert here["segments"] == there["segments"]
    for photo, mask, segments in zip(photos, here["masks"], here["segments"], strict=True):
        with Image.open(photo) as image:
            assert np.shape(mask) == (image.height, image.width)
        # The pipeline's segments cover the photo once: every pixel has one label.
        assert (sum(np.asarray(segment, dtype=int) for segment in segments.values()) == 255).all()
        assert set(segments) <= {"background", "cat", "dog"}
    if architecture.startswith("cosa"):  # untrained, the others call everything background
        assert len({label for segments in here["segments"] for label in segments}) > 1


def test_without_the_package_and_without_trust_it_is_refused(folder, tmp_path):
    result = run(UNTRUSTED, str(folder), cache=tmp_path)
    assert result.returncode != 0
    assert "trust_remote_code=True" in result.stderr


def test_importing_the_package_leaves_the_data_libraries_alone(tmp_path):
    code = """
import sys, transformers, timm, torch, torchvision
from transformers import AutoImageProcessor, AutoModel, PreTrainedModel
import transformers.image_processing_backends
before = set(sys.modules)
import cosa_hf
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & {
    "accelerate", "datasets", "evaluate", "sklearn", "tensorboard"}))
"""
    result = run(code, cache=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
