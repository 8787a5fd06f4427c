"""From images to masks: the same as the pipeline's, whatever the image and its tags."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_cosa, tiny_segformer
from torch.nn import functional as F
from transformers import SegformerImageProcessor, pipeline

from cosa_hf import CoSAImageProcessor
from cosa_hf.data.images import UnreadableImageError
from cosa_hf.inference import Segmenter, crf_size, forward_multiscale, load_model
from cosa_hf.multistage.config import MultistageConfig
from cosa_hf.multistage.networks import build_network
from cosa_hf.objective.affinity import foreground, spread_cams
from cosa_hf.objective.pseudo_labels import restrict_to_labels

NAMES = ["background", "cat", "dog", "sea horse"]


SIZES = [(150, 100), (77, 130), (140, 90), (9, 300), (60, 40)]


def save_network(kind, directory):
    """An untrained network of four classes, whose processor asks for a size that is not a multiple of 32."""
    torch.manual_seed(1)
    if kind == "cosa":
        model = tiny_cosa(NAMES[1:], seed=1)
        processor = CoSAImageProcessor(size={"height": 90, "width": 70})
    elif kind == "segformer":
        model = tiny_segformer(id2label=dict(enumerate(NAMES)))
        processor = SegformerImageProcessor(size={"height": 90, "width": 70})
    else:
        config = MultistageConfig(
            network=kind, pseudo_labels="none", pretrained=False, decoder_channels=16, input_size=72
        )
        model, processor = build_network(config, NAMES)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module", params=["cosa", "segformer", "largefov/test_resnet", "upernet/test_resnet"])
def network(request, tmp_path_factory):
    return save_network(request.param, tmp_path_factory.mktemp("network"))


@pytest.fixture(scope="module")
def cosa(tmp_path_factory):
    return Segmenter.from_pretrained(
        save_network("cosa", tmp_path_factory.mktemp("network")), device="cpu", batch_size=2
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photos of many shapes; the last was taken with the camera on its side."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    paths = [folder / f"{number}.{'png' if number % 2 else 'jpg'}" for number in range(len(SIZES))]
    for path, size in zip(paths, SIZES, strict=True):
        exif = Image.Exif()
        exif[0x0112] = 6 if path == paths[-1] else 1  # 6: show turned by a quarter
        colours = Image.fromarray(generator.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        colours.resize(size, Image.Resampling.BICUBIC).save(path, exif=exif)
    return paths


def mask_of_pipeline(segment, image, names):
    segments = segment(image)
    mask = np.zeros(segments[0]["mask"].size[::-1], dtype=int)
    for each in segments:
        mask[np.asarray(each["mask"]) > 0] = names.index(each["label"])
    return mask


def test_the_mask_is_that_of_the_pipeline(network, photos):
    """One at a time and in batches, of a path and of an image."""
    segmenter, segment = (
        Segmenter.from_pretrained(network, device="cpu", batch_size=2),
        pipeline("image-segmentation", network),
    )
    expected = [mask_of_pipeline(segment, str(path), NAMES) for path in photos]
    assert len(np.unique(np.concatenate([mask.ravel() for mask in expected]))) > 1, "one class would prove nothing"
    assert expected[-1].shape == (60, 40)  # upright
    for path, one, mask in zip(photos, segmenter(photos), expected, strict=True):
        np.testing.assert_array_equal(one.mask, mask)
        np.testing.assert_array_equal(segmenter(str(path)).mask, mask)
        with Image.open(path) as image:
            np.testing.assert_array_equal(segmenter(image).mask, mask)
        assert (one.image_id, one.ground_truth) == (path.stem, None)


def test_a_set_of_masks_is_segmented_within_its_tags(mask2former, photos):
    """Its processor keeps the aspect ratio: the images of a batch have inputs of different sizes."""
    segmenter = Segmenter.from_pretrained(mask2former, device="cpu")
    segmenter.processor.size = {"shortest_edge": 32, "longest_edge": 64}
    together = segmenter(photos, tags=[["LABEL_7"], None, None, None, "LABEL_7, LABEL_9"])
    assert set(together[0].mask.unique().tolist()) <= {0, 7}
    assert set(together[-1].mask.unique().tolist()) <= {0, 7, 9}
    for path, one in zip(photos[1:-1], together[1:-1], strict=True):
        assert one.mask.shape == (one.image.height, one.image.width)
        assert torch.equal(one.mask, segmenter(path).mask)


@pytest.mark.parametrize("tags", [[1, 2], [0], []])
def test_tags_rule_out_the_other_classes(network, photos, tags):
    """As logits at -inf would, and without what those do to an interpolation."""
    segmenter = Segmenter.from_pretrained(network, device="cpu")
    one = segmenter(photos[1], tags=[NAMES[index + 1] for index in tags])
    assert one.labels.nonzero().flatten().tolist() == tags
    with torch.no_grad(), Image.open(photos[1]) as image:
        logits = segmenter.model(**segmenter.processor(image.convert("RGB"), return_tensors="pt")).logits
    logits = F.interpolate(logits, size=(130, 77), mode="bilinear", align_corners=False)
    given = logits if not tags else restrict_to_labels(logits, one.labels[None])
    assert torch.equal(one.mask, given.argmax(1)[0])
    for source, scores in (("seg", logits), ("seg_tags", restrict_to_labels(logits, one.labels[None]))):
        ids, confidence = one.label(source)
        assert torch.equal(ids, scores.argmax(1)[0])
        torch.testing.assert_close(confidence, scores.softmax(1).amax(1)[0])


def test_a_crf_gets_logits_and_image_and_its_probabilities_are_taken(cosa, photos):
    asked = []

    def least_likely(logits, image):
        asked.append((logits, image))
        return (-logits).softmax(0)

    segmenter = Segmenter(cosa.model, cosa.processor, crf=least_likely)
    one, plain = (each(photos[1], tags=["cat", "dog"]) for each in (segmenter, cosa))
    logits = plain.upsample(plain.seg_logits[:3])
    assert torch.equal(one.mask, logits.argmin(0))
    assert torch.equal(asked[0][0], logits)
    assert asked[0][1].size == (77, 130)
    torch.testing.assert_close(one.label("seg_tags")[1], (-logits).softmax(0).amax(0))
    assert segmenter.settings["crf"] == {
        "backend": "least_likely", "cam_sharpness": 8.0, "max_pixels": 320_000, "max_values": 32_000_000,
    }  # fmt: skip


def test_a_large_image_goes_through_a_crf_smaller_and_its_result_is_upsampled(cosa):
    """As if the probabilities had been those of a network with that grid."""
    asked = []

    def crf(logits, image):
        asked.append((tuple(logits.shape), image.size))
        return logits.softmax(0)

    photo = Image.effect_noise((1280, 1000), 64).convert("RGB")
    one = Segmenter(cosa.model, cosa.processor, crf=crf)(photo)
    assert one.crf_size == (640, 500)
    mask, confidence = one.label("seg")
    assert asked == [((len(cosa.names), 500, 640), (640, 500))]
    small = torch.nn.functional.interpolate(one.seg_logits[None], size=(500, 640), mode="bilinear").softmax(1)
    full = torch.nn.functional.interpolate(small, size=(1000, 1280), mode="bilinear")[0]
    assert torch.equal(mask, full.argmax(0))
    assert torch.equal(one.mask, mask)
    torch.testing.assert_close(confidence, full.amax(0))


def test_scales_and_flips_are_fused(cosa, photos):
    segmenter = Segmenter(cosa.model, cosa.processor, scales=(1.0, 0.5), flip=True)
    one = segmenter(photos[0], tags=["cat"])
    with torch.no_grad(), Image.open(photos[0]) as image:
        pixel_values = cosa.processor(image, return_tensors="pt").pixel_values
        fused = forward_multiscale(cosa.model, pixel_values, (1.0, 0.5), True)
    torch.testing.assert_close(one.seg_logits, fused.seg_logits[0])
    torch.testing.assert_close(one.cls_logits, fused.cls_logits[0])
    assert one.cam[0].max() == 1
    assert not one.cam[1:].any()


def test_kinds_of_images_people_have(cosa):
    """Transparency, greys, palettes, CMYK and 16 bits: what a viewer shows is what is segmented."""
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    grey = colours.convert("L")
    clear = colours.convert("RGBA")
    clear.putalpha(grey)
    over_white = Image.composite(colours, Image.new("RGB", colours.size, "white"), grey)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for image, shown in ((clear, over_white), (grey, grey.convert("RGB")), (deep, grey.convert("RGB"))):
        one, expected = cosa([image, shown])
        assert one.image.mode == "RGB"
        torch.testing.assert_close(one.seg_logits, expected.seg_logits, atol=0.05, rtol=0.05)
    for mode in ("P", "CMYK", "1"):
        assert cosa(colours.convert(mode)).mask.shape == (40, 60)


def test_a_large_photo_needs_the_memory_of_one_class(cosa, monkeypatch):
    """All classes at once would be gigabytes for a phone's photo."""
    planes, interpolate = [], F.interpolate
    one = cosa(Image.new("RGB", (300, 200)), tags=NAMES[1:])
    monkeypatch.setattr(F, "interpolate", lambda maps, **rest: planes.append(len(maps[0])) or interpolate(maps, **rest))
    mask, (ids, _) = one.mask, one.label("seg_tags")
    assert torch.equal(mask, ids)
    assert set(planes) == {1}


def test_maps_of_a_model_in_half_precision_are_float32(cosa, photos):
    model, processor = load_model(str(cosa.model.config.name_or_path), "cpu")
    one = Segmenter(model.bfloat16(), processor)(photos[0], tags=["cat"])
    assert {one.seg_logits.dtype, one.cls_logits.dtype, one.cam.dtype} == {torch.float32}


def test_what_cannot_be_segmented_is_named(cosa, photos, tmp_path):
    (tmp_path / "notes.jpg").write_text("not an image")
    (tmp_path / "half.jpg").write_bytes(photos[0].read_bytes()[:700])
    for name in ("notes.jpg", "half.jpg", "missing.jpg"):
        with pytest.raises(UnreadableImageError, match=f"cannot read .*{name}: "):
            cosa(tmp_path / name)
    with pytest.raises(ValueError, match=r"'dgo' \(did you mean 'dog'\?\).*The classes are cat, dog, sea horse"):
        cosa(photos[0], tags=["dgo"])
    with pytest.raises(ValueError, match="1 lists of tags for 2 images: give one each, None for unknown"):
        cosa(photos[:2], tags=[["cat"]])
    assert len(cosa(photos[:2], tags=[["cat"], None])) == 2
    with pytest.raises(ValueError, match="no 'crf': sources are seg"):
        cosa(photos[0]).label("crf")


@pytest.mark.parametrize(
    ("settings", "message"), [({"scales": ()}, "scales must be positive"), ({"batch_size": 0}, "batch_size")]
)
def test_settings_out_of_range(cosa, settings, message):
    with pytest.raises(ValueError, match=message):
        Segmenter(cosa.model, cosa.processor, **settings)


def test_from_pretrained_takes_a_size_and_finds_a_device(cosa, photos):
    segmenter = Segmenter.from_pretrained(cosa.model.config.name_or_path, size=48, flip=True)
    assert segmenter.settings == {"scales": [1.0], "flip": True, "input_size": [48, 48], "crf": None}
    assert segmenter.names == NAMES
    assert segmenter.model.device.type == (torch.accelerator.current_accelerator(True) or torch.device("cpu")).type
    assert segmenter(photos[0]).seg_logits.shape == (4, 3, 3)


def test_a_segmenter_spreads_the_mean_of_both_cams(spreading):
    segmenter = Segmenter(spreading, CoSAImageProcessor(size={"height": 48, "width": 64}), flip=True)
    assert segmenter.settings["affinity"]["affinity"] == spreading.config.affinity
    noise = np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    one = segmenter(Image.fromarray(noise), tags=["LABEL_1", "LABEL_3"])
    pixel_values = segmenter.processor(Image.fromarray(noise), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        source = spreading.backbone(pixel_values, affinity=True)[2]
    mean = (one.cam + one.aux_cam)[None] / 2
    torch.testing.assert_close(one.spread_cam, spread_cams(mean, source, spreading.config)[0], rtol=1e-3, atol=1e-4)
    assert (one.spread_cam[1] == 0).all()
    mask, confidence = one.label("cam_spread", threshold=0.4)
    torch.testing.assert_close(confidence, one.upsample(one.spread_cam).amax(0))
    assert torch.equal(mask > 0, confidence >= 0.4)
    assert set(mask.unique().tolist()) <= {0, 1, 3}


def test_a_segmenter_spreads_the_segmentation_of_tags_and_of_recognised_classes(spreading):
    segmenter = Segmenter(spreading, CoSAImageProcessor(size={"height": 48, "width": 64}))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    one = segmenter(noise, tags=["LABEL_1", "LABEL_3"])
    pixel_values = segmenter.processor(noise, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        source = spreading.backbone(pixel_values, affinity=True)[2]
    recognised = (one.cls_logits >= 0).float()
    assert recognised.tolist() == [1, 0, 0]
    for maps, labels in ((one.spread_seg_tags, one.labels), (one.spread_seg, recognised)):
        expected = spread_cams(foreground(one.seg_logits[None], labels[None]), source, spreading.config)[0]
        torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4)
    mask, confidence = one.label("seg_tags_spread", threshold=0.4)
    torch.testing.assert_close(confidence, one.upsample(one.spread_seg_tags).amax(0))
    assert torch.equal(mask > 0, confidence >= 0.4)
    assert set(mask.unique().tolist()) <= {0, 1, 3}
    assert torch.equal(one.label("seg_spread")[1], one.upsample(one.spread_seg).amax(0))
    assert torch.equal(one.mask, one.label("seg_tags")[0])
    spread = replace(segmenter, spread=True)
    tagged, untagged = spread([noise, noise], tags=[["LABEL_1", "LABEL_3"], None])
    assert torch.equal(tagged.mask, one.label("seg_tags_spread")[0])
    assert torch.equal(untagged.mask, one.label("seg_spread")[0])


def test_a_crf_sees_a_cam_by_how_far_it_is_from_the_threshold(spreading):
    """The classes that have a map against background, which stands at xi: alone it decides as the threshold does."""
    asked = []

    def crf(logits, image):
        asked.append((logits, image.size))
        return logits.softmax(0)

    plain = Segmenter(spreading, CoSAImageProcessor(size={"height": 48, "width": 64}), spread=True)
    refining = replace(plain, crf=crf)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 50, 3), dtype=np.uint8))
    before, after = (each(noise, tags=["LABEL_1", "LABEL_3"]) for each in (plain, refining))
    for source in ("cam", "cam_aux", "cam_mean", "cam_spread", "seg_tags_spread"):
        ids, nu = before.label(source, threshold=0.4)
        refined, probability = after.label(source, threshold=0.4)
        assert torch.equal(refined, ids), source
        logits, size = asked.pop()
        assert (size, logits.shape) == ((50, 30), (3, 30, 50))
        assert (logits[0] == 0).all()
        torch.testing.assert_close(logits[1:].amax(0), 8 * (nu - 0.4))
        torch.testing.assert_close(probability, logits.softmax(0).amax(0))
    assert torch.equal(after.mask, before.mask)
    assert asked, "masks that are spread are refined, too"
    untagged = refining(noise)
    shown = 1 + int((untagged.cls_logits >= 0).sum())
    asked.clear()
    assert untagged.mask.shape == (30, 50)
    assert [len(logits) for logits, _ in asked] == [shown]
    assert untagged.crf_size == crf_size((50, 30), shown)


def test_without_a_class_a_crf_has_nothing_to_refine(spreading):
    def crf(logits, image):
        raise AssertionError("a CRF of background alone")

    segmenter = Segmenter(spreading, CoSAImageProcessor(size={"height": 48, "width": 64}), crf=crf)
    one = segmenter(Image.new("RGB", (20, 30)))  # no tags, and so no CAM
    ids, confidence = one.label("cam_mean")
    assert not ids.any()
    assert not confidence.any()


def test_without_an_affinity_nothing_is_spread(model):
    segmenter = Segmenter(model, CoSAImageProcessor(size={"height": 48, "width": 64}))
    assert "affinity" not in segmenter.settings
    one = segmenter(Image.new("RGB", (20, 30)), tags=["LABEL_1"])
    assert one.spread_cam is None
    with pytest.raises(ValueError, match="cam_spread, seg_spread, seg_tags_spread where its config names an affinity"):
        one.label("cam_spread")
    with pytest.raises(ValueError, match="a model whose config names an affinity"):
        replace(segmenter, spread=True)
