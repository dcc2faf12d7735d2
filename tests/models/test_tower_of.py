"""The tower inside a backbone: the right module with the right weights, and the same maps at its own size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.catalog import RECIPES
from vlbench.core.errors import UserError
from vlbench.core.types import Features
from vlbench.models import wrap
from vlbench.models.export import export_visual
from vlbench.models.load import load_backbone
from vlbench.models.tower_of import _TorchvisionMaps, at_any_size, map_channels, tower_of
from vlbench.models.towers import ClipTimmTower, TorchvisionTower
from vlbench.models.vision import VisualConfig, build_visual

FAMILIES = {
    "timm:test_resnet": ({}, "convolutional"),
    "timm:test_efficientnet": ({}, "convolutional"),
    "timm:convnext_atto": ({"depths": [1, 1, 1, 1]}, "convolutional"),
    "timm:swin_tiny_patch4_window7_224": (
        {"embed_dim": 16, "depths": [2, 2, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 7},
        "windows",
    ),
    "timm:vit_tiny_patch16_224": ({"depth": 1, "embed_dim": 48, "num_heads": 2}, "transformer"),
    "timm:eva02_tiny_patch14_224": ({"depth": 1, "embed_dim": 48, "num_heads": 2}, "transformer"),
    "torchvision:resnet18": ({}, "convolutional"),
    "open_clip:RN50": ({"layers": [1, 1, 1, 1], "width": 8}, "convolutional"),
    "open_clip:ViT-B-32": ({"layers": 2, "width": 32, "heads": 2, "patch_size": 16}, "transformer"),
}
DENSENET = [
    ["conv0", "norm0"],
    ["denseblock1"],
    ["transition1", "denseblock2"],
    ["transition2", "denseblock3"],
    ["transition3", "denseblock4", "norm5"],
]
ONE_STRIDE = {"timm:vit_tiny_patch16_224": 16, "timm:eva02_tiny_patch14_224": 14, "open_clip:ViT-B-32": 16}


def tower(arch: str, size: int = 224) -> nn.Module:
    torch.manual_seed(0)
    return build_visual(VisualConfig(arch=arch, image_size=size, kwargs=FAMILIES[arch][0])).eval()


def exported(arch: str):
    return export_visual(tower(arch), model_id="m", recipe="r", preprocess=Preprocess(image_size=224))


@pytest.mark.parametrize("arch", FAMILIES)
@torch.no_grad()
def test_any_size_gives_the_same_maps_at_its_own_size_and_maps_of_others(arch: str) -> None:
    whole = tower_of(exported(arch))
    free = at_any_size(whole).eval()
    images = torch.randn(2, 3, 224, 224)
    own, found = whole.features(images, dense=True).maps, free(images)
    assert own.keys() == found.keys()
    assert all(torch.allclose(own[s], found[s], atol=1e-5) for s in own)
    assert map_channels(whole, 224) == map_channels(free, 224) == {s: m.shape[1] for s, m in own.items()}
    assert free.kind == FAMILIES[arch][1]
    patch = ONE_STRIDE.get(arch, 32)
    height, width = 3 * patch, 5 * patch
    for stride, map_BCHW in free(torch.randn(1, 3, height, width)).items():
        assert map_BCHW.shape[-2:] == (height // stride, width // stride)
        assert map_BCHW.isfinite().all()


def test_a_tower_of_any_size_is_a_copy() -> None:
    backbone = exported("timm:vit_tiny_patch16_224")
    free, before = at_any_size(tower_of(backbone)), backbone.weights_hash
    with torch.no_grad():
        for parameter in free.parameters():
            parameter.add_(1)
    del backbone.weights_hash  # kept from its first use
    assert backbone.weights_hash == before
    with pytest.raises(AssertionError, match="doesn't match model"):  # of one size, as it was
        backbone.encode_image(torch.zeros(1, 3, 96, 96))


def test_stages_go_from_the_stem_up_and_hold_every_parameter_once() -> None:
    for arch in ("timm:test_resnet", "torchvision:resnet18", "open_clip:RN50"):
        free = at_any_size(tower(arch))
        stages = free.stages()
        names = [name for stage in stages for name in stage]
        assert len(stages) == 5
        assert sorted(names) == sorted(name for name, _ in free.named_parameters())
        assert any("conv1" in name for name in stages[0])
        assert all("layer4" in name for name in stages[4])


@pytest.mark.parametrize(("recipe", "settings"), [("supervised", {}), ("clip", {}), ("virtex", {})])
def test_a_trained_model_gives_its_image_tower_and_nothing_else(recipe: str, settings: dict) -> None:
    made = RECIPES.get(recipe)
    config = made.presets["tiny"]
    if recipe == "virtex":
        pytest.importorskip("vlbench.models.captioner")
        from vlbench.models.captioner import Captioner
        from vlbench.models.export import export_captioner
        from vlbench.models.textual_head import HeadSize

        model = Captioner(config.visual, HeadSize(width=32, layers=1, heads=2, feedforward=32), vocabulary=20)
        backbone = export_captioner(
            model,
            captions_fn=lambda images: [],
            writes="",
            model_id="m",
            recipe=recipe,
            preprocess=config.preprocess(),
        )
    else:
        model = made.build(config, ("a", "b"))
        backbone = made.export(model, config, ("a", "b"))
    assert tower_of(backbone) is model.visual


def test_libraries_models_give_their_image_towers() -> None:
    vit = load_backbone("timm:test_vit", weights="random")
    assert tower_of(vit) is vit.module
    # As open_clip's loader does it: a function that closes over the tower, which is part of the model.
    visual = tower("open_clip:RN50")
    model = nn.ModuleDict({"visual": visual, "text": nn.Linear(2, 2)})
    closed = SimpleNamespace(module=model, _image_fn=lambda images: visual.features(images), card=vit.card)
    assert tower_of(closed) is visual


def test_a_trunk_of_open_clip_has_maps_here() -> None:
    from open_clip.timm_model import TimmModel

    clip = ClipTimmTower(TimmModel("test_resnet", 24, image_size=64), "small", embed_dim=24).eval()
    card = ModelCard(
        id="m", loader="open_clip", arch="small", preprocess=Preprocess(image_size=64), provides=clip.parts
    )
    found = tower_of(SimpleNamespace(module=clip, _image_fn=clip.features, card=card)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        dense = found.features(images, dense=True)
        assert torch.allclose(dense.pooled_BD, clip(images), atol=1e-6)
        assert torch.allclose(dense.embed_BE, clip.features(images).embed_BE, atol=1e-6)
    assert set(dense.maps) >= {4, 8, 16, 32}
    assert at_any_size(found)(images)[4].shape[-1] == 16
    assert {name for name, _ in found.named_parameters()} == {f"net.{name}" for name, _ in clip.named_parameters()}


def test_a_users_module_with_maps_is_a_tower() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 4, stride=4)

        def forward(self, images: torch.Tensor) -> Features:
            map_BCHW = self.conv(images)
            return Features(pooled_BD=map_BCHW.mean((2, 3)), maps={4: map_BCHW})

    own = Own()
    backbone = wrap(own, preprocess=32, name="own", provides=frozenset({"pooled", "maps"}))
    found = tower_of(backbone)
    assert found.width == 6
    assert map_channels(found, 32) == {4: 6}
    at_any_size(found)(torch.randn(1, 3, 64, 32))[4].sum().backward()
    assert found.features(torch.randn(1, 3, 32, 32)).pooled_BD.requires_grad


def test_what_has_no_tower_or_no_maps_says_so() -> None:
    card = ModelCard(id="m", loader="build", arch="x", preprocess=Preprocess(image_size=32), provides={"pooled"})
    with pytest.raises(UserError, match=r"m: a SimpleNamespace cannot be trained; return vlbench\.models\.wrap"):
        tower_of(SimpleNamespace(card=card))
    fixed = card.model_copy(update={"provides": frozenset({"match"})})
    with pytest.raises(UserError, match="no image tower to train"):
        tower_of(SimpleNamespace(card=fixed, module=nn.Linear(1, 1), _image_fn=lambda images: images))
    flat = wrap(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)), preprocess=16, name="flat")
    assert map_channels(tower_of(flat), 16) == {}
    with pytest.raises(UserError, match="has no feature maps"):
        at_any_size(tower_of(flat))
    with pytest.raises(UserError, match=r"vit_b_32.* has no feature maps"):
        at_any_size(build_visual(VisualConfig(arch="torchvision:vit_b_32", image_size=32, kwargs={"image_size": 32})))
    with pytest.raises(UserError, match="one size only"):
        at_any_size(build_visual(VisualConfig(arch="timm:mixer_s32_224", image_size=64)))


def test_looking_at_maps_leaves_modes_and_statistics_alone() -> None:
    whole = tower("timm:test_resnet").train()
    whole.net.layer1.eval()
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    map_channels(whole, 64)
    assert [whole.training, whole.net.layer1.training, whole.net.layer2.training] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("convnext_tiny", [[0], [1], [2, 3], [4, 5], [6, 7]]),
        ("swin_t", [[0], [1], [2, 3], [4, 5], [6, 7]]),
        ("efficientnet_b0", [[0], [1], [2], [3], [4, 5], [6, 7, 8]]),
        ("vgg11_bn", [[0, 1], [4, 5], [8, 9, 11, 12], [15, 16, 18, 19], [22, 23, 25, 26]]),
        ("densenet121", DENSENET),
    ],
)
def test_torchvisions_features_are_stages_by_stride(name: str, parts: list) -> None:
    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None)
    free = _TorchvisionMaps(TorchvisionTower(net, name))
    stages = free.stages()
    assert [list(dict.fromkeys(one.split(".")[2] for one in stage)) for stage in stages] == [
        [str(part) for part in stage] for stage in parts
    ]
    names = [one for stage in stages for one in stage]
    assert sorted(names) == sorted(one for one, _ in free.named_parameters())
