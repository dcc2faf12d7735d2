from __future__ import annotations

import pytest
import torch
import torchvision

from vlbench.core.errors import UserError
from vlbench.models.loaders import torchvision as loader


def test_torchvision_weights_file_gives_the_last_linear_layers_input(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    # As in torchvision's own older files, without the batch counters.
    state = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    backbone = loader.load("resnet18", weights=str(tmp_path / "w.pth"))
    images_BCHW = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits_BC = net(images_BCHW)
        pooled_BD = backbone.encode_image(images_BCHW).pooled_BD
        torch.testing.assert_close(net.fc(pooled_BD), logits_BC)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "convnext_tiny", "shufflenet_v2_x0_5", "mnasnet0_5"])
def test_torchvision_networks_of_other_families_are_read_before_their_classifier(name):
    backbone = loader.load(name, weights="random")
    features = backbone.encode_image(torch.randn(2, 3, 64, 64), dense=True)
    assert features.pooled_BD.shape == (2, backbone.module.width)
    assert features.pooled_BD.shape[1] != 1000
    assert backbone.card.provides == {"pooled"}
    assert features.maps is None


def test_torchvision_network_without_linear_layer_is_refused():
    with pytest.raises(UserError, match="squeezenet1_1: it does not end in a linear layer"):
        loader.load("squeezenet1_1", weights="random")


def test_torchvision_preprocessing_follows_the_tag():
    v1, v2, default = (
        loader.load(f"resnet50{tag}", weights="random").card.preprocess
        for tag in (".IMAGENET1K_V1", ".IMAGENET1K_V2", "")
    )
    assert (v1.resize_to, v2.resize_to) == (256, 232)
    assert default == v2
    assert v1.interpolation == "bilinear"


def test_torchvision_downloads_without_unpickling_code(monkeypatch):
    asked = {}

    def fetch(url, **options):
        asked.update(options, url=url)
        return torchvision.models.resnet18(weights=None).state_dict()

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", fetch)
    backbone = loader.load("resnet18")
    assert asked["weights_only"]
    assert asked["check_hash"]
    assert backbone.card.id == "torchvision:resnet18.IMAGENET1K_V1"
