from __future__ import annotations

from pathlib import Path

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


def test_torchvision_preprocess_of_every_published_weight_can_be_followed():
    from vlbench.models.loaders.torchvision import torchvision_preprocess

    for name in torchvision.models.list_models(module=torchvision.models):
        for entry in torchvision.models.get_model_weights(name):
            transform, pre = entry.transforms(), torchvision_preprocess(entry)
            assert pre.image_size == (transform.crop_size[0],) * 2, entry
            assert len(transform.resize_size) == 1, entry


@pytest.mark.parametrize("ref", ["resnet50.IMAGENET1K_V2", "vit_b_16.IMAGENET1K_SWAG_LINEAR_V1", "swin_t"])
def test_torchvision_pixels_are_those_of_the_weights_own_transform(ref):
    import numpy as np
    from PIL import Image

    from vlbench.data.transforms import eval_transform, normalise
    from vlbench.models.loaders.torchvision import torchvision_preprocess

    name, _, tag = ref.partition(".")
    entries = torchvision.models.get_model_weights(name)
    entry = entries[tag] if tag else entries.DEFAULT
    pre = torchvision_preprocess(entry)
    for size in ((311, 273), (120, 401)):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8))
        ours_CHW = normalise(eval_transform(pre)(image)[None], pre)[0]
        torch.testing.assert_close(ours_CHW, entry.transforms()(image), rtol=1e-5, atol=1e-6)


def test_torchvision_takes_weights_that_were_put_in_their_place_by_hand(monkeypatch, tmp_path):
    def no_network(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"put it at .* or pass it with --weights") as error:
        loader.load("resnet18.IMAGENET1K_V1")
    place = Path(str(error.value).partition("put it at ")[2].partition(" or pass")[0])
    place.parent.mkdir(parents=True)
    net = torchvision.models.resnet18(weights=None)
    torch.save(net.state_dict(), place)
    backbone = loader.load("resnet18.IMAGENET1K_V1")
    assert backbone.card.weights == "IMAGENET1K_V1"
    assert torch.equal(backbone.module.net.conv1.weight, net.conv1.weight)
    place.write_bytes(place.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{place}: truncated"):
        loader.load("resnet18.IMAGENET1K_V1")
