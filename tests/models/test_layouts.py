"""Files with the names that their authors gave, made from fresh weights of the same architecture."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torchvision

from vlbench.core.errors import UserError
from vlbench.models.load import load_backbone

SWIN = "swin_tiny_patch4_window7_224"


def others(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.randn(2, 3) for name in names}


def swin_in_its_authors_names(net) -> dict[str, torch.Tensor]:
    """timm begins a stage with the patch merging that the authors end the stage before with; and their buffers."""
    state = {}
    for name, tensor in net.state_dict().items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
        state[name] = tensor
        if name.endswith("relative_position_bias_table"):
            prefix = name.removesuffix("relative_position_bias_table")
            state[f"{prefix}relative_position_index"] = torch.zeros(49, 49, dtype=torch.long)
            if ".blocks.1." in name:
                state[f"{prefix.removesuffix('attn.')}attn_mask"] = torch.zeros(4, 49, 49)
    return state


def test_virtex_file_fills_torchvisions_resnet(tmp_path):
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None).eval()
    tower = {f"visual.cnn.{name}": value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    rest = others("textual.embedding.words.weight", "textual.output.bias", "backward_textual.output.bias")
    torch.save({"model": tower | rest, "optimizer": {"state": {}}, "iteration": 500000}, tmp_path / "virtex.pth")
    images_BCHW = torch.randn(2, 3, 64, 64)
    with pytest.warns(UserWarning, match="read as VirTex's, the image tower without 3 other tensors"):
        backbone = load_backbone("torchvision:resnet50.IMAGENET1K_V1", weights=str(tmp_path / "virtex.pth"))
    with torch.inference_mode():
        logits_BC = net(images_BCHW)
        torch.testing.assert_close(net.fc(backbone.encode_image(images_BCHW).pooled_BD), logits_BC)
    with pytest.warns(UserWarning, match="VirTex"):
        same = load_backbone("timm:resnet50", weights=str(tmp_path / "virtex.pth"))
    torch.testing.assert_close(
        same.encode_image(images_BCHW).pooled_BD, backbone.encode_image(images_BCHW).pooled_BD, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("prefix", "rest", "whose"),
    [
        (
            "image_encoder.",
            ("text_encoder.ln_final.weight", "image_projection", "text_projection", "logit_scale"),
            "UniCL",
        ),
        ("visual.", ("lang_encoder.ln_final.weight", "vision_projection", "text_projection", "logit_scale"), "K-LITE"),
        ("visual.", ("text.ln_final.weight", "vision_projection", "text_projection", "logit_scale"), "K-LITE"),
    ],
)
def test_unicl_file_fills_timms_swin(tmp_path, prefix, rest, whose):
    torch.manual_seed(0)
    net = timm.create_model(SWIN, pretrained=False, num_classes=0).eval()
    tower = {f"{prefix}{name}": value for name, value in swin_in_its_authors_names(net).items()}
    torch.save({"model": tower | others(*rest)}, tmp_path / "unicl.pth")
    with pytest.warns(UserWarning, match=f"read as {whose}'s.* converted by timm"):
        backbone = load_backbone(f"timm:{SWIN}", weights=str(tmp_path / "unicl.pth"))
    assert backbone.card.id.endswith("@unicl")
    images_BCHW = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(backbone.encode_image(images_BCHW).pooled_BD, net(images_BCHW))


def test_swins_own_file_is_converted_by_timm(tmp_path):
    net = timm.create_model(SWIN, pretrained=False)
    state = {name.replace("head.fc.", "head."): value for name, value in swin_in_its_authors_names(net).items()}
    torch.save({"model": state}, tmp_path / "swin.pth")
    with pytest.warns(UserWarning, match="names converted by timm"):
        backbone = load_backbone(f"timm:{SWIN}", weights=str(tmp_path / "swin.pth"))
    loaded = backbone.module.net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in net.state_dict().items() if name in loaded)


VIT = "vit_tiny_patch16_224"


def vit() -> dict[str, torch.Tensor]:
    return timm.create_model(VIT, pretrained=False, num_classes=0).state_dict()


@pytest.mark.filterwarnings("error")
def test_mae_encoder_fits_as_it_is(tmp_path):
    state = vit()
    torch.save({"model": state}, tmp_path / "mae.pth")
    loaded = load_backbone(f"timm:{VIT}", weights=str(tmp_path / "mae.pth")).module.net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("whose", "wrap"),
    [
        ("MAE", lambda state: {"model": state | others("mask_token", "decoder_embed.weight", "decoder_blocks.0.x")}),
        (
            "DINO",
            lambda state: {"teacher": {f"backbone.{k}": v for k, v in state.items()} | others("head.mlp.0.weight")},
        ),
        (
            "DINO",
            lambda state: {
                "student": others("module.backbone.x"),
                "teacher": {f"module.backbone.{k}": v for k, v in state.items()} | others("module.head.last.weight"),
                "epoch": 100,
            },
        ),
    ],
)
def test_self_supervised_files_give_their_encoder(tmp_path, whose, wrap):
    state = vit()
    torch.save(wrap(state), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match=f"read as {whose}'s"):
        loaded = load_backbone(f"timm:{VIT}", weights=str(tmp_path / "w.pth")).module.net.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("arch", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2s_own_file_is_converted_by_timm(tmp_path, arch):
    net = timm.create_model(arch, pretrained=False, num_classes=0)
    state = dict(net.state_dict()) | {"mask_token": torch.zeros(1, 384)}
    class_position = torch.randn(1, 1, 384)
    if "reg_token" in state:  # theirs has a position for the class token, timm's class token holds the sum
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - class_position
        state["pos_embed"] = torch.cat([class_position, state["pos_embed"]], dim=1)
    torch.save(state, tmp_path / "dinov2.pth")
    with pytest.warns(UserWarning, match="names converted by timm"):
        backbone = load_backbone(f"timm:{arch}", weights=str(tmp_path / "dinov2.pth"))
    loaded = backbone.module.net.state_dict()
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, msg=name)


@pytest.mark.filterwarnings("ignore")
def test_file_of_no_known_layout_is_refused_for_its_own_names(tmp_path):
    net = torchvision.models.resnet18(weights=None)
    tower = {f"visual.cnn.{name}": value for name, value in net.state_dict().items()}
    torch.save(tower | others("textual.x", "something.else"), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"unexpected \(visual\.cnn\.conv1\.weight"):
        load_backbone("torchvision:resnet18", weights=str(tmp_path / "w.pth"))
    torch.save(tower | others("textual.x"), tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not fit the architecture"):
        load_backbone("torchvision:resnet50", weights=str(tmp_path / "w.pth"))
