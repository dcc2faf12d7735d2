from __future__ import annotations

import pytest
import timm
import torch

from vlbench.core.errors import UserError
from vlbench.models.loaders import timm as loader
from vlbench.models.loaders.timm import timm_preprocess


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_timm_weights_file_gives_the_networks_own_features(tmp_path, name):
    torch.manual_seed(0)
    net = timm.create_model(name, pretrained=False).eval()  # with its classifier, as files have it
    torch.save(net.state_dict(), tmp_path / "w.pt")
    backbone = loader.load(name, weights=str(tmp_path / "w.pt"))
    images_BCHW = torch.randn(2, 3, 160, 160)
    with torch.inference_mode():
        expected_BD = net.forward_head(net.forward_features(images_BCHW), pre_logits=True)
    assert torch.equal(backbone.encode_image(images_BCHW).pooled_BD, expected_BD)
    assert backbone.card.params == sum(p.numel() for n, p in backbone.module.named_parameters())


def test_timm_weights_of_another_network_are_refused(tmp_path):
    torch.save(timm.create_model("test_vit", pretrained=False).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match=r"w\.pt in timm:test_resnet: does not fit .* missing \(conv1"):
        loader.load("test_resnet", weights=str(tmp_path / "w.pt"))


def test_timm_default_tag_is_spelt_out_and_preprocessing_follows_the_tag():
    by_tag = {tag: loader.load(f"resnet18.{tag}", weights="random").card for tag in ("a1_in1k", "tv_in1k")}
    assert by_tag["a1_in1k"].preprocess.interpolation == "bicubic"
    assert by_tag["tv_in1k"].preprocess.interpolation == "bilinear"
    assert by_tag["tv_in1k"].preprocess.resize_to == 256


def test_timm_preprocess_is_timms_own_transform():
    import numpy as np
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config

    data = pytest.importorskip("vlbench.data.transforms")
    net = timm.create_model("test_vit", pretrained=False, num_classes=0)
    pixels = np.random.default_rng(0).integers(0, 256, (211, 173, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    theirs_CHW = create_transform(**resolve_model_data_config(net), is_training=False)(image)
    pre = timm_preprocess(net)
    ours_CHW = data.normalise(data.eval_transform(pre)(image)[None], pre)[0]
    torch.testing.assert_close(ours_CHW, theirs_CHW, rtol=1e-5, atol=1e-5)
