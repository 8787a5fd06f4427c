import math
from types import SimpleNamespace

import datasets
import pytest
import torch
from hub_server import Hub
from huggingface_hub import constants

from cosa_hf.multistage.labels import collate, confidence_weights, labels_to_learn, repeated, weighted_loss


def items(number, generator, confidence=True):
    made = []
    for index in range(number):
        mask = torch.randint(3, (8, 8), generator=generator)
        mask[torch.rand(8, 8, generator=generator) < 0.3 * index] = 255  # no two images have as many labelled pixels
        item = {"weak": torch.zeros(3, 8, 8), "mask": mask, "image_id": str(index), "unreadable": ""}
        made.append(item | ({"confidence": torch.rand(8, 8, generator=generator)} if confidence else {}))
    return made


def reference_weight(confidence, threshold):
    """Eq. 4 with the paper's alpha and beta, or the probability itself."""
    if threshold is None:
        return max(confidence, 1e-3)
    distance = (confidence - threshold) / (1 - threshold) if confidence >= threshold else 1 - confidence / threshold
    return 1 / -math.log(0.8 * min(max(distance, 1e-4), 1.0))


def test_images_of_rare_classes_are_repeated():
    """Against the formula image by image: within one of it, and equal to it over many draws."""
    rows = [[0]] * 60 + [[0, 1]] * 30 + [[1, 2]] * 4 + [[]] * 6
    dataset = datasets.Dataset.from_dict({"labels": rows, "image_id": [str(row) for row in range(100)]})
    expected = [1.0] * 60 + [1.0] * 30 + [math.sqrt(0.3 / 0.04)] * 4 + [1.0] * 6
    counts = torch.zeros(100, dtype=torch.float64)
    for seed in range(200):
        drawn = [int(name) for name in repeated(dataset, 0.3, seed)["image_id"]]
        times = torch.tensor([drawn.count(row) for row in range(100)], dtype=torch.float64)
        assert (times - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1
        counts += times
    assert (counts / 200).tolist() == pytest.approx(expected, abs=0.15)
    assert repeated(dataset, 0.3, 7)["image_id"][:] == repeated(dataset, 0.3, 7)["image_id"][:]
    assert repeated(dataset, 0.0, 0) is dataset


@pytest.mark.parametrize("threshold", [0.4, None])
@pytest.mark.parametrize("weighted", [True, False])
def test_micro_batches_share_one_weighted_mean_over_the_step(weighted, threshold):
    """Against a float64 loop over pixels."""
    generator = torch.Generator().manual_seed(0)
    images = items(3, generator, confidence=weighted)
    logits = torch.randn(3, 3, 8, 8, generator=generator)
    batches = [collate(images[:1], threshold, 255), collate(images[1:], threshold, 255)]
    total = sum(batch["labels"]["weights"].sum() for batch in batches)
    micro_batches = [
        weighted_loss(SimpleNamespace(logits=maps), batch["labels"], total)
        for maps, batch in zip((logits[:1], logits[1:]), batches, strict=True)
    ]
    above = below = 0.0
    for image, maps in zip(images, logits.double(), strict=True):
        for row in range(8):
            for column in range(8):
                if (label := image["mask"][row, column].item()) == 255:
                    continue
                weight = reference_weight(image["confidence"][row, column].item(), threshold) if weighted else 1.0
                above -= weight * maps[:, row, column].log_softmax(0)[label].item()
                below += weight
    assert sum(micro_batches).item() == pytest.approx(above / below, abs=1e-5)


def test_a_step_without_a_labelled_pixel_costs_nothing():
    (item,) = items(1, torch.Generator().manual_seed(0))
    item["mask"][:] = 255
    labels = collate([item], None, 255)["labels"]
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    loss = weighted_loss(SimpleNamespace(logits=logits), labels, labels["weights"].sum())
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_a_cam_is_trusted_away_from_its_threshold_on_both_sides():
    labelled = torch.tensor([[[True, True, True, True, False]]])
    weights = confidence_weights(torch.tensor([[[0.0, 0.45, 0.55, 1.0, 1.0]]]), labelled, 0.5)[0, 0]
    assert weights[4] == 0
    assert weights[0] == weights[3] > 5 * weights[1]
    torch.testing.assert_close(weights[1], weights[2])


CONFIDENCE = (
    r"confidence_weighting: {} is not read with confidence .* --format parquet, and name that directory with its "
    r"export\.json, not a dataset on the Hub"
)


def test_confidence_needs_a_format_that_carries_it(tiny, export):
    with pytest.raises(ValueError, match=CONFIDENCE.format(export("png"))):
        labels_to_learn(tiny(pseudo_labels=str(export("png")), confidence_weighting=True), torch.device("cpu"))
    advised = tiny(pseudo_labels=str(export("parquet")), confidence_weighting=True)
    assert "confidence" in labels_to_learn(advised, torch.device("cpu")).dataset.column_names


def test_labels_on_the_hub_are_learned_once_their_split_is_named(tiny, export, tmp_path, monkeypatch):
    hub, cpu = Hub(), torch.device("cpu")
    settings = {
        constants: {"HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(tmp_path / "hub")},
        datasets.config: {"HF_ENDPOINT": hub.endpoint, "HF_DATASETS_CACHE": tmp_path / "datasets"},
    }
    for module, changed in settings.items():
        for name, value in (changed | {"HF_HUB_OFFLINE": False}).items():
            monkeypatch.setattr(module, name, value)
    files = {"export.json": (export("parquet") / "export.json").read_bytes()}  # in vain: it is not looked for
    files |= {f"data/{path.name}": path.read_bytes() for path in export("parquet").rglob("*.parquet")}
    hub.repos["org/labels"] = {"private": False, "commits": [("0" * 40, files)]}
    monkeypatch.chdir(tmp_path)
    try:
        with pytest.raises(FileNotFoundError, match="no directory org/labels; of a dataset on the Hub, name the split"):
            labels_to_learn(tiny(pseudo_labels="org/labels"), cpu)
        pushed = labels_to_learn(tiny(pseudo_labels="org/labels", train_split="train"), cpu).dataset
        with pytest.raises(ValueError, match=CONFIDENCE.format("org/labels")):
            labels_to_learn(tiny(pseudo_labels="org/labels", train_split="train", confidence_weighting=True), cpu)
    finally:
        hub.shutdown()
        hub.server_close()
    written = labels_to_learn(tiny(pseudo_labels=str(export("parquet")), confidence_weighting=True), cpu).dataset
    assert pushed.features == written.features
    assert pushed["image_id"][:] == written["image_id"][:]
    assert [mask.tobytes() for mask in pushed["mask"]] == [mask.tobytes() for mask in written["mask"]]
