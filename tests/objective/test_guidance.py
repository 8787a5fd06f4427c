import numpy as np
import pytest
import torch

from cosa_hf.objective.guidance import mask_probabilities, seg2cam_target
from cosa_hf.objective.pseudo_labels import segmentation_pseudo_labels

LABELS = torch.tensor([[1, 0, 1], [0, 1, 0], [0, 0, 0]])


@pytest.mark.parametrize("source", ["spl", "none"])
@pytest.mark.parametrize("temperature", [(), (0.3,)], ids=["the paper's", "another"])
def test_the_method_is_eq_7(source, temperature):
    seg_logits = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    target = seg2cam_target(source, seg_logits, LABELS, *temperature)
    assert torch.equal(target, segmentation_pseudo_labels(seg_logits, LABELS, *temperature))


def test_noise_is_uniform_over_background_and_tags_and_new_every_time():
    torch.manual_seed(0)
    seg_logits = torch.zeros(3, 4, 60, 60)
    noise, again = (seg2cam_target("noise", seg_logits, LABELS) for _ in range(2))
    for image, possible in enumerate([{0, 1, 3}, {0, 2}, {0}]):
        counts = noise[image].argmax(dim=0).flatten().bincount(minlength=4) / 3600
        for label in range(4):
            expected = 1 / len(possible) if label in possible else 0
            assert counts[label].item() == pytest.approx(expected, abs=0.03)
    assert not torch.equal(noise[0], again[0])


def test_true_masks_become_shares_of_what_is_known():
    rng = np.random.default_rng(0)
    masks = rng.choice([0, 1, 2, 3, 255], size=(2, 12, 20))
    masks[0, :4, :4] = 255
    target = mask_probabilities(torch.tensor(masks), 4, torch.Size((3, 5))).numpy()
    for image, y, x in np.ndindex(2, 3, 5):
        cell = masks[image, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        known = cell[cell != 255]
        for label in range(4):
            expected = (known == label).mean() if known.size else 0
            assert target[image, label, y, x] == pytest.approx(expected, abs=1e-6)
    assert torch.equal(
        torch.tensor(target), seg2cam_target("gt", torch.randn(2, 4, 3, 5), LABELS[:2], masks=torch.tensor(masks))
    )
