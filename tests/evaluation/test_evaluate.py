"""Protocols against a slow reference, on a model whose maps are written by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import tiny_cosa, tiny_segformer
from transformers import SegformerImageProcessor

from cosa_hf import CoSAConfig, CoSAImageProcessor, CoSAOutput
from cosa_hf.data.tags import tag_features
from cosa_hf.digest import weights_sha256
from cosa_hf.evaluation.crf import DenseCRF
from cosa_hf.evaluation.evaluate import PROTOCOLS, evaluate, format_report
from cosa_hf.inference import Segmenter

NAMES = ["boat", "bird", "train"]
PLAIN = [name for name in PROTOCOLS if not name.endswith("_spread")]  # of a model without affinity
GRID = (3, 4)


class TableModel(torch.nn.Module):
    """Answers image number n (its constant red value) with the n-th maps; remembers the batches it saw."""

    def __init__(self, seg, cam, aux_cam):
        super().__init__()
        self.tables = [torch.as_tensor(table, dtype=torch.float32) for table in (seg, cam, aux_cam)]
        self.config = CoSAConfig(
            id2label=dict(enumerate(["background", *NAMES])), coexistence_classes=["boat", "train"]
        )
        self.backbone = SimpleNamespace(stride=1)
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.modes = [], []

    def forward(self, pixel_values):
        numbers = pixel_values[:, 0, 0, 0].round().long()
        self.seen.append(tuple(pixel_values.shape))
        self.modes.append((self.training, torch.is_grad_enabled()))
        seg, cam, aux_cam = (table[numbers] for table in self.tables)
        return CoSAOutput(
            logits=seg,
            cls_logits=cam.amax((2, 3)),
            cam_logits=cam,
            aux_cls_logits=None,
            aux_cam_logits=aux_cam,
        )


def segmenter(model, **settings):
    size = {"height": GRID[0], "width": GRID[1]}
    return Segmenter(model, CoSAImageProcessor(size=size, do_rescale=False, do_normalize=False), **settings)


def score(model, dataset, cam_threshold=None, **settings):
    return evaluate(segmenter(model, **settings), dataset, cam_threshold=cam_threshold, progress=False)


def masks_of(one, threshold=None):
    """An image's masks by every protocol of a model without affinity."""
    return {protocol: one.label(protocol, threshold)[0].numpy() for protocol in PLAIN}


def make_dataset(masks, tags):
    images = [Image.new("RGB", (mask.shape[1], mask.shape[0]), (number, 0, 0)) for number, mask in enumerate(masks)]
    columns = {
        "image": images,
        "labels": tags,
        "image_id": [f"image-{number}" for number in range(len(masks))],
        "mask": [Image.fromarray(np.asarray(mask, dtype=np.uint8)) for mask in masks],
    }
    return Dataset.from_dict(columns, features=tag_features(NAMES, masks=True))


@pytest.fixture
def case():
    """Five images of five sizes, random maps, an image without a tag, ignored pixels, masks that use 0..3."""
    generator = np.random.default_rng(0)
    sizes = [(5, 7), (9, 4), (3, 4), (6, 6), (12, 8)]
    masks = [generator.choice([0, 0, 1, 2, 3, 255], size=size) for size in sizes]
    tags = [[0], [1, 2], [], [0, 1, 2], [2]]
    maps = [generator.normal(size=(5, channels, *GRID)) for channels in (4, 3, 3)]
    return TableModel(*maps), make_dataset(masks, tags), (masks, tags, maps)


def upsample(plane, size):
    """Bilinear, half-pixel centres, edges repeated; one pixel at a time."""
    height, width = plane.shape
    result = np.zeros(size)
    for y in range(size[0]):
        for x in range(size[1]):
            v = min(max((y + 0.5) * height / size[0] - 0.5, 0), height - 1)
            u = min(max((x + 0.5) * width / size[1] - 0.5, 0), width - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = (1 - u + left) * plane[top, left] + (u - left) * plane[top, right]
            lower = (1 - u + left) * plane[bottom, left] + (u - left) * plane[bottom, right]
            result[y, x] = (1 - v + top) * upper + (v - top) * lower
    return result


def normalize(cam, tags):
    result = np.zeros_like(cam)
    for tag in tags:
        positive = np.maximum(cam[tag], 0)
        low, high = positive.min(), positive.max()
        result[tag] = (positive - low) / (high - low)
    return result


def reference_masks(seg, cam, aux_cam, tags, size, threshold):
    scores = np.stack([upsample(plane, size) for plane in seg])
    allowed = np.stack([scores[k] if k == 0 or k - 1 in tags else np.full(size, -1e5) for k in range(len(scores))])
    cam, aux_cam = normalize(cam, tags), normalize(aux_cam, tags)

    def from_cam(maps):
        maps = np.stack([upsample(plane, size) for plane in maps])
        return np.where(maps.max(0) >= threshold, maps.argmax(0) + 1, 0)

    return {
        "seg": scores.argmax(0),
        "seg_tags": allowed.argmax(0),
        "cam": from_cam(cam),
        "cam_aux": from_cam(aux_cam),
        "cam_mean": from_cam((cam + aux_cam) / 2),
    }


def reference_ious(predictions, references):
    ious = []
    for index in range(4):
        intersection = union = 0
        for prediction, reference in zip(predictions, references, strict=True):
            for p, t in zip(prediction.ravel(), reference.ravel(), strict=True):
                if t != 255:
                    intersection += p == index and t == index
                    union += p == index or t == index
        ious.append(100 * intersection / union if union else None)
    return ious


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("threshold", [0.45, 0.3])  # 0.5 is what halfway between 0 and 1 rounds around
def test_scores_equal_the_slow_reference(case, batch_size, threshold):
    model, dataset, (masks, tags, maps) = case
    report = score(model, dataset, threshold, batch_size=batch_size)
    expected = [reference_masks(*(table[n] for table in maps), tags[n], masks[n].shape, threshold) for n in range(5)]
    for protocol in PLAIN:
        ious = reference_ious([one[protocol] for one in expected], masks)
        assert list(report[protocol]["per_class"].values()) == pytest.approx(ious), protocol
        assert report[protocol]["miou"] == pytest.approx(np.mean(ious))
        assert report[protocol]["coexistence_miou"] == pytest.approx((ious[1] + ious[3]) / 2)
    assert report["images"] == 5
    assert report["untagged"] == ["image-2"]
    assert report["protocol"]["cam_threshold"] == threshold


def test_true_negatives_count_where_the_classification_is_scored():
    """The boat's logit is 1, that of the image without one 2: half of the precision that it has among tagged images."""
    cam = np.zeros((2, 3, *GRID))
    cam[0, 0], cam[1, 0] = 1, 2
    model, masks = TableModel(np.zeros((2, 4, *GRID)), cam, cam), [np.eye(*GRID, dtype=int), np.zeros(GRID, int)]
    for negative, precision, untagged in (False, 100, ["image-1"]), (True, 50, []):
        dataset = make_dataset(masks, [[0], []]).add_column("negative", [False, negative])
        report = score(model, dataset)
        assert (report["cls_ap"]["boat"], report["untagged"]) == (precision, untagged)


def test_predictions_are_the_images_own_size_and_in_order(case):
    model, dataset, (masks, tags, maps) = case
    predictions = list(segmenter(model, batch_size=2).predict(dataset))
    assert [one.image_id for one in predictions] == dataset["image_id"][:]
    for n, one in enumerate(predictions):
        np.testing.assert_array_equal(one.ground_truth.numpy(), masks[n])
        assert (one.image.height, one.image.width) == masks[n].shape
        expected, found = (
            reference_masks(*(table[n] for table in maps), tags[n], masks[n].shape, 0.45),
            masks_of(one, 0.45),
        )
        for protocol in PLAIN:
            np.testing.assert_array_equal(found[protocol], expected[protocol])
        np.testing.assert_array_equal(one.mask.numpy(), expected["seg_tags" if tags[n] else "seg"])
        cam = np.stack([upsample(plane, masks[n].shape) for plane in normalize(maps[1][n], tags[n])])
        np.testing.assert_allclose(one.upsample(one.cam).numpy(), cam, atol=1e-5)


def test_by_hand_what_tags_change():
    """Truth: boat left, background right. The model says bird left; boat is its second choice."""
    seg = np.zeros((1, 4, *GRID))
    seg[0, 2, :, :2], seg[0, 1, :, :2], seg[0, 0, :, 2:] = 3, 2, 1
    cam, aux_cam = np.zeros((1, 3, *GRID)), np.zeros((1, 3, *GRID))
    cam[0, 1] = 9  # bird is not among the tags: its CAM must not count
    cam[0, 0, :, :3] = 1  # one column too many
    aux_cam[0, 0, :, :1] = 1  # one column too few
    reference = np.zeros(GRID, dtype=int)
    reference[:, :2] = 1
    reference[0, 3] = 255
    report = score(TableModel(seg, cam, aux_cam), make_dataset([reference], [[0]]))

    def scores(protocol):
        return [report[protocol]["per_class"][name] for name in ("background", *NAMES)]

    # 11 counted pixels: 6 boat, 5 background.
    assert scores("seg") == [100.0, 0.0, 0.0, None]
    assert report["seg"]["miou"] == pytest.approx(100 / 3)
    assert report["seg"]["coexistence_miou"] == 0.0
    assert scores("seg_tags") == [100.0, 100.0, None, None]
    assert report["seg_tags"]["miou"] == 100.0
    assert scores("cam") == pytest.approx([100 * 2 / 5, 100 * 6 / 9, None, None])
    assert scores("cam_aux") == pytest.approx([100 * 5 / 8, 100 * 3 / 6, None, None])
    assert report["protocol"]["cam_threshold"] == 0.5  # the config's
    # The mean is 1, 0.5, 0.5, 0 from left to right: all three columns reach 0.5.
    assert scores("cam_mean") == scores("cam")


def test_image_without_tags_is_background_where_tags_are_given():
    maps = [np.random.default_rng(1).normal(size=(1, channels, *GRID)) + 5 for channels in (4, 3, 3)]
    dataset = make_dataset([np.ones((6, 8), dtype=int)], [[]])
    (one,) = segmenter(TableModel(*maps)).predict(dataset)
    assert {protocol for protocol, mask in masks_of(one).items() if mask.any()} == {"seg"}


def test_scales_and_flip_reach_the_model(case):
    model, dataset, _ = case
    score(model, dataset, scales=(1.0, 2.0), flip=True, batch_size=3)
    assert model.seen == [(6, 3, 3, 4), (6, 3, 6, 8), (4, 3, 3, 4), (4, 3, 6, 8)]


@pytest.mark.parametrize("training", [True, False])
def test_model_runs_in_eval_mode_without_gradients_and_gets_its_mode_back(case, training):
    model, dataset, _ = case
    model.train(training)
    score(model, dataset)
    assert set(model.modes) == {(False, False)}
    assert model.training is training


def test_mode_comes_back_when_the_iteration_is_left_early(case):
    model, dataset, _ = case
    model.train()
    predictions = segmenter(model, batch_size=1).predict(dataset)
    next(predictions)
    assert not model.training
    predictions.close()
    assert model.training


def test_report_is_plain_json_and_says_how_it_was_made(case):
    model, dataset, _ = case
    report = evaluate(segmenter(model), dataset, progress=False, dataset_name="toy", split="val")
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    protocol = report["protocol"]
    assert protocol["seg"].startswith("tags unknown")
    assert protocol["seg_tags"].startswith("tags given")
    assert (protocol["scales"], protocol["flip"]) == ([1.0], False)
    assert protocol["input_size"] == list(GRID)
    assert report["weights_sha256"] == weights_sha256(model)
    assert (protocol["dataset"], protocol["split"], protocol["ignore_index"]) == ("toy", "val", 255)


def test_the_ignored_id_is_the_models(case):
    model, dataset, (masks, tags, _) = case
    report = score(model, dataset)
    model.config.semantic_loss_ignore_index = 100
    renamed = make_dataset([np.where(mask == 255, 100, mask) for mask in masks], tags)
    other = score(model, renamed)
    assert other["protocol"]["ignore_index"] == 100
    assert all(other[protocol] == report[protocol] for protocol in PLAIN)


def reference_average_precision(scores, references):
    """Precision where each object is found, going down the scores, averaged; of scores that are all different."""
    found, precisions = 0, []
    for rank, (_, reference) in enumerate(sorted(zip(scores, references, strict=True), reverse=True), 1):
        found += reference
        precisions += [found / rank] * reference
    return 100 * sum(precisions) / found


def test_classification_is_scored_over_the_images_with_tags(case):
    model, dataset, (_, tags, maps) = case
    report = score(model, dataset)
    tagged = [n for n in range(5) if tags[n]]
    expected = {
        name: reference_average_precision([maps[1][n][index].max() for n in tagged], [index in tags[n] for n in tagged])
        for index, name in enumerate(NAMES)
    }
    assert report["cls_ap"] == pytest.approx(expected)
    assert report["cls_map"] == pytest.approx(sum(expected.values()) / 3)
    without_birds = score(model, dataset.select([0, 4]))
    assert without_birds["cls_ap"]["bird"] is None
    assert without_birds["cls_map"] == pytest.approx(
        np.mean([without_birds["cls_ap"][name] for name in ("boat", "train")])
    )
    assert score(model, dataset.select([2]))["cls_map"] is None


def test_a_network_that_only_segments_has_two_protocols_and_no_classification():
    network = tiny_segformer(id2label=dict(enumerate(["background", *NAMES])))
    processor = SegformerImageProcessor(size={"height": 32, "width": 32})
    dataset = make_dataset([np.ones((6, 8), dtype=int)], [[0]])
    report = evaluate(Segmenter(network, processor), dataset, progress=False)
    assert [protocol for protocol in PROTOCOLS if protocol in report] == ["seg", "seg_tags"]
    assert report["cls_map"] is report["cls_ap"] is report["protocol"]["cam_threshold"] is None
    assert "classification" not in format_report(report)


def test_a_model_with_an_affinity_has_spread_maps_in_its_report(case):
    _, dataset, (masks, _, _) = case
    network = tiny_cosa(NAMES, decoder_channels=8, affinity="features")
    whole = Segmenter(network, CoSAImageProcessor(size={"height": 48, "width": 64}))
    report = evaluate(whole, dataset, cam_threshold=0.6, progress=False)
    assert [protocol for protocol in PROTOCOLS if protocol in report] == list(PROTOCOLS)
    assert report["protocol"]["affinity"] == whole.settings["affinity"]
    assert "cam_spread" in format_report(report).splitlines()[0]
    for source in ("cam_spread", "seg_spread", "seg_tags_spread"):
        predictions = [one.label(source, 0.6)[0].numpy() for one in whole.predict(dataset)]
        expected = reference_ious(predictions, masks)
        assert list(report[source]["per_class"].values()) == pytest.approx(expected), source


def test_crf_refines_all_masks_within_their_classes_and_is_named(case):
    model, dataset, (_, tags, _) = case
    crf = DenseCRF(backend="torch")
    plain, refined = ([masks_of(one) for one in segmenter(model, crf=each).predict(dataset)] for each in (None, crf))
    for protocol in PLAIN:
        assert any((a[protocol] != b[protocol]).any() for a, b in zip(plain, refined, strict=True)), protocol
    for masks, allowed in zip(refined, tags, strict=True):
        for protocol in PLAIN:
            classes = range(len(model.config.id2label)) if protocol == "seg" else [0, *(tag + 1 for tag in allowed)]
            assert set(np.unique(masks[protocol])) <= set(classes)

    assert score(model, dataset)["protocol"]["crf"] is None
    report = score(model, dataset, crf=crf)
    assert report["protocol"]["crf"]["backend"] == "torch"
    assert report["protocol"]["crf"]["bilateral_sigma_xy"] == 67
    assert report["protocol"]["seg_tags"].startswith("tags given, CRF: ")
    assert report["protocol"]["cam"].startswith("tags given, CRF: ")
    assert "all masks: after a CRF (torch)" in format_report(report)


def test_classes_in_another_order_are_refused_and_both_lists_shown(case):
    model, dataset, _ = case
    model.config = CoSAConfig(id2label=dict(enumerate(["background", "bird", "boat", "train"])))
    with pytest.raises(ValueError, match=r"(?s)\['boat', 'bird', 'train'\].*\['bird', 'boat', 'train'\]"):
        score(model, dataset)


def test_datasets_that_cannot_be_scored_are_refused(case):
    model, dataset, _ = case
    with pytest.raises(ValueError, match=r"needs a mask column \(load with masks=True\)"):
        score(model, dataset.remove_columns("mask"))
    assert score(model, dataset), "with its masks"
    with pytest.raises(ValueError, match="empty"):
        score(model, dataset.select([]))


def test_table_shows_every_class_under_every_protocol(case):
    model, dataset, _ = case
    report = score(model, dataset)
    lines = format_report(report).splitlines()
    assert lines[0].split()[-5:] == PLAIN
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:7]}
    assert list(rows) == ["background", *NAMES, "mIoU", "C-mIoU"]
    for name in ("background", *NAMES):
        assert rows[name] == [f"{report[protocol]['per_class'][name]:.1f}" for protocol in PLAIN]
    assert rows["mIoU"] == [f"{report[protocol]['miou']:.1f}" for protocol in PLAIN]
    assert lines[-2] == f"classification: mean average precision {report['cls_map']:.1f}"
    assert "image-2" in lines[-1]
    assert len({len(line) for line in lines[:7]}) == 1
