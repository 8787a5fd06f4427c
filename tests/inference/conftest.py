"""Networks that say something."""

import pytest
import torch

from cosa_hf import CoSAConfig, CoSAForWeaklySupervisedSegmentation


@pytest.fixture(scope="module", params=["test_vit", "test_resnet"])
def model(request):
    torch.manual_seed(0)
    config = CoSAConfig(backbone=request.param, aux_layer=-2, num_labels=4, decoder_channels=8)
    model = CoSAForWeaklySupervisedSegmentation(config).eval()
    # Fresh classifiers say next to nothing; make maps that differ from scale to scale.
    with torch.no_grad():
        for head in (model.classifier, model.aux_classifier):
            head.weight.mul_(50)
        # ReLU maps of a random decoder are faint: bring the segmentation to the order of the CAMs.
        sample = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        model.decoder.conv8.weight.div_(model(sample).logits.std())
    return model


@pytest.fixture(scope="module", params=["features", "attention"])
def spreading(request):
    torch.manual_seed(0)
    config = CoSAConfig(
        backbone="test_vit", aux_layer=-2, num_labels=4, decoder_channels=8, affinity=request.param,
        affinity_layer=-3, affinity_blocks=[-3, -2],
    )  # fmt: skip
    network = CoSAForWeaklySupervisedSegmentation(config).eval()
    with torch.no_grad():
        # What hardly varies would be stretched, rounding and all.
        for head in (network.classifier, network.aux_classifier, network.decoder.conv8):
            head.weight.mul_(50)
        network.classifier.weight[0].neg_()  # so that one class is recognised, and not all
    return network
