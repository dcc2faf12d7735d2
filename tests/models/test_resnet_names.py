"""ResNet weights under torchvision's and detectron2's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
import torchvision

from vlbench.core.errors import UserError
from vlbench.models.load import load_backbone
from vlbench.models.resnet_names import ResNetPlan, from_detectron2, plan_of, to_detectron2


def weights_of(name: str) -> dict[str, torch.Tensor]:
    """A fresh network without its classifier; on ``meta``, for names and shapes are all that is looked at."""
    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None)
    return {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2"])
def test_round_trip_gives_the_same_tensors(name: str) -> None:
    state = weights_of(name)
    there = to_detectron2(state)
    back = from_detectron2(there)
    assert list(back) == list(state)
    assert all(back[key] is state[key] for key in state)
    assert len(there) == len(state)
    assert to_detectron2(back) == there


def test_names_are_detectron2s() -> None:
    # The anchors: five names that its R-50 configurations load.
    there = to_detectron2(weights_of("resnet50"))
    assert there["stem.conv1.weight"].shape == (64, 3, 7, 7)
    assert there["stem.conv1.norm.running_var"].shape == (64,)
    assert there["res2.0.shortcut.weight"].shape == (256, 64, 1, 1)
    assert there["res2.0.shortcut.norm.bias"].shape == (256,)
    assert there["res5.2.conv3.weight"].shape == (2048, 512, 1, 1)
    assert not any(key.startswith(("layer", "bn", "conv1")) for key in there)


def test_classifier_goes_along_as_linear() -> None:
    state = torchvision.models.resnet18(num_classes=7).state_dict()
    there = to_detectron2(state)
    assert there["linear.weight"] is state["fc.weight"]
    assert from_detectron2(there)["fc.bias"] is state["fc.bias"]


@pytest.mark.parametrize("name", ["resnet18", "resnet26", "resnet50", "resnext50_32x4d"])
def test_timms_plain_resnets_have_torchvisions_names(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    assert from_detectron2(to_detectron2(state)).keys() == state.keys()


def test_resnet_inside_a_whole_detectron2_model_is_taken() -> None:
    state = weights_of("resnet18")
    whole = {f"backbone.bottom_up.{key}": value for key, value in to_detectron2(state).items()}
    whole |= {"backbone.fpn_lateral2.weight": torch.zeros(1), "roi_heads.mask_head.predictor.bias": torch.zeros(1)}
    assert from_detectron2(whole).keys() == state.keys()


def test_plan_is_the_architectures() -> None:
    wide = (64, 128, 256, 512)
    assert plan_of(weights_of("resnet18")) == ResNetPlan(64, (2, 2, 2, 2), wide, wide, 1, bottleneck=False)
    outer = (256, 512, 1024, 2048)
    assert plan_of(weights_of("resnet101")) == ResNetPlan(64, (3, 4, 23, 3), wide, outer, 1, bottleneck=True)
    assert plan_of(weights_of("resnext50_32x4d")) == ResNetPlan(
        64, (3, 4, 6, 3), (128, 256, 512, 1024), outer, 32, bottleneck=True
    )


@pytest.mark.parametrize(
    "name",
    [
        "conv1.weight",
        "bn1.running_mean",
        "layer1.1.conv2.weight",
        "layer3.2.bn3.running_var",
        "layer1.0.downsample.0.weight",  # its block widens 64 to 256 channels
        "layer4.0.downsample.1.bias",
    ],
)
def test_missing_tensor_is_named(name: str) -> None:
    state = weights_of("resnet50")
    del state[name]
    with pytest.raises(UserError, match=rf"^r50\.pth: .*{name} missing"):
        to_detectron2(state, where="r50.pth")
    there = to_detectron2(weights_of("resnet50"))
    back = dict(zip(weights_of("resnet50"), there, strict=True))
    del there[back[name]]
    with pytest.raises(UserError, match=f"{name} missing"):
        from_detectron2(there)


def test_missing_stage_is_named() -> None:
    state = {key: value for key, value in weights_of("resnet18").items() if not key.startswith("layer4")}
    with pytest.raises(UserError, match=r"layer4\.0\.conv1\.weight and 14 more missing"):
        to_detectron2(state)


def test_first_block_without_projection_is_whole() -> None:
    # ResNet-18's first stage keeps its channels and stride: no shortcut is missing there.
    assert not any("res2.0.shortcut" in key for key in to_detectron2(weights_of("resnet18")))


@pytest.mark.parametrize("name", ["seresnet18", "resnet18d", "skresnet18"])
def test_other_networks_are_refused_by_name(name: str) -> None:
    with torch.device("meta"):
        state = timm.create_model(name, num_classes=0).state_dict()
    with pytest.raises(UserError, match="is no part of a plain ResNet"):
        to_detectron2(state)


def test_detectron2_names_given_as_torchvisions_are_refused() -> None:
    there = to_detectron2(weights_of("resnet18"))
    with pytest.raises(UserError, match=r"stem\.conv1\.weight is no part"):
        to_detectron2(there)
    with pytest.raises(UserError, match=r"conv1\.weight is no part"):
        from_detectron2(weights_of("resnet18"))


@pytest.mark.parametrize("whole", [True, False])
def test_weights_of_a_detectron2_detector_load_into_torchvisions_and_timms_resnet(tmp_path: Path, whole: bool) -> None:
    torch.manual_seed(0)
    net = torchvision.models.resnet18(weights=None).eval()
    net.fc = torch.nn.Identity()
    there = to_detectron2(net.state_dict())
    if whole:
        there = {f"backbone.bottom_up.{key}": value for key, value in there.items()}
        there |= {"backbone.fpn_output2.bias": torch.zeros(4), "roi_heads.box_head.fc1.bias": torch.zeros(4)}
    torch.save({"model": there, "iteration": 9}, tmp_path / "model_final.pth")
    images_BCHW = torch.randn(2, 3, 64, 64)
    for name in ("torchvision:resnet18", "timm:resnet18"):
        with pytest.warns(UserWarning, match="names of its ResNet converted, right where .* STRIDE_IN_1X1: False"):
            backbone = load_backbone(name, weights=str(tmp_path / "model_final.pth"))
        with torch.inference_mode():
            torch.testing.assert_close(backbone.encode_image(images_BCHW).pooled_BD, net(images_BCHW))
