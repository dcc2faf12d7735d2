from __future__ import annotations

import pytest
import torch

from vlbench.core.errors import UserError
from vlbench.models.vision import VisualConfig, build_visual

TINY = {
    "timm-resnet": VisualConfig(arch="timm:test_resnet", image_size=64),
    "timm-vit": VisualConfig(arch="timm:test_vit", image_size=64),
    "timm-efficientnet": VisualConfig(arch="timm:test_efficientnet", image_size=64),
    "timm-efficientnet-headless": VisualConfig(arch="timm:test_efficientnet", image_size=64, kwargs={"headless": True}),
    "timm-swin": VisualConfig(
        arch="timm:swin_tiny_patch4_window7_224",
        image_size=64,
        kwargs={"window_size": 2, "depths": (1, 1, 1, 1), "embed_dim": 12, "num_heads": (1, 1, 1, 1)},
    ),
    "clip-resnet": VisualConfig(
        arch="open_clip:RN50", image_size=64, kwargs={"layers": [1, 1, 1, 1], "width": 8, "heads": 2}
    ),
    "clip-vit": VisualConfig(
        arch="open_clip:ViT-B-32", image_size=64, kwargs={"layers": 2, "width": 32, "heads": 2, "patch_size": 16}
    ),
    "torchvision-resnet": VisualConfig(arch="torchvision:resnet18", image_size=64),
}


def tower(name: str, **options):
    torch.manual_seed(0)
    built = build_visual(TINY[name], **options).eval()
    # Zero-initialised residual branches would hide mistakes: give BatchNorm something to say.
    for module in built.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
    return built


@pytest.fixture(scope="module")
def images_BCHW() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TINY)
def test_tower_features_have_the_shapes_that_it_announces(name, images_BCHW):
    net = tower(name, embed_dim=24)
    with torch.inference_mode():
        plain, dense = net.features(images_BCHW), net.features(images_BCHW, dense=True)
        pooled_BD = net(images_BCHW)
    assert pooled_BD.shape == (3, net.width)
    assert torch.equal(plain.pooled_BD, pooled_BD)
    torch.testing.assert_close(dense.pooled_BD, pooled_BD, rtol=1e-6, atol=1e-6)
    assert plain.tokens_BND is None
    assert plain.maps is None
    assert {"tokens", "maps"} <= net.parts
    for stride, map_BCHW in dense.maps.items():
        assert map_BCHW.shape[0] == 3
        assert map_BCHW.shape[2:] == (64 // stride, 64 // stride), f"stride {stride} is not what it says"
    coarsest = dense.maps[max(dense.maps)]
    assert dense.tokens_BND.shape[:2] == (3, coarsest.shape[2] * coarsest.shape[3])
    has_embedding = name.startswith("clip")
    assert (dense.embed_BE is not None) == has_embedding == ("embed" in net.parts)
    if has_embedding:
        assert dense.embed_BE.shape == (3, 24)


@pytest.mark.parametrize("name", ["timm-resnet", "clip-resnet", "torchvision-resnet", "timm-swin"])
def test_tower_tokens_lie_where_their_pixels_lie(name):
    net = tower(name)
    with torch.inference_mode():
        blank = net.features(torch.zeros(1, 3, 64, 64), dense=True)
        image = torch.zeros(1, 3, 64, 64)
        image[:, :, -8:, :8] = 5.0  # bottom left
        marked = net.features(image, dense=True)
    change = (marked.tokens_BND - blank.tokens_BND).abs().mean(-1)[0]
    side = int(change.numel() ** 0.5)
    grid = change.reshape(side, side)
    assert grid[-1, 0] == grid.max()
    map_change = (marked.maps[32] - blank.maps[32]).abs().mean(1)[0]
    assert map_change[-1, 0] == map_change.max()


def test_tower_pooled_is_the_mean_of_tokens_for_a_channels_last_network(images_BCHW):
    # Swin's forward_features is NHWC: read as NCHW, tokens would be rows of pixels.
    with torch.inference_mode():
        features = tower("timm-swin").features(images_BCHW, dense=True)
    torch.testing.assert_close(features.tokens_BND.mean(1), features.pooled_BD, rtol=1e-5, atol=1e-6)


def test_tower_of_clip_vit_embeds_through_its_projection(images_BCHW):
    net = tower("clip-vit", embed_dim=24)
    with torch.inference_mode():
        features = net.features(images_BCHW)
        torch.testing.assert_close(features.embed_BE, features.pooled_BD @ net.proj)


@pytest.mark.parametrize("name", TINY)
def test_tower_leaves_no_parameter_without_gradient(name, images_BCHW):
    # A parameter that never gets a gradient stops distributed training.
    net = tower(name).train()
    net(images_BCHW).square().sum().backward()
    assert [key for key, parameter in net.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", ["timm-resnet", "timm-vit", "clip-resnet", "clip-vit"])
def test_tower_says_the_same_of_an_image_whatever_its_batch(name):
    net = tower(name)
    images_BCHW = torch.randn(64, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        whole = net(images_BCHW)
        sevens = torch.cat([net(part) for part in images_BCHW.split(7)])
        ones = torch.cat([net(part) for part in images_BCHW[:5].split(1)])
    torch.testing.assert_close(sevens, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ones, whole[:5], rtol=1e-5, atol=1e-5)


def test_build_visual_is_a_function_of_the_seed():
    first, second = (tower("timm-resnet").state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_identity_tells_apart_what_the_weights_cannot():
    two = TINY["clip-vit"]
    four = two.model_copy(update={"kwargs": two.kwargs | {"heads": 4}})
    shapes = [{k: v.shape for k, v in build_visual(config).state_dict().items()} for config in (two, four)]
    assert shapes[0] == shapes[1]
    assert two.identity() != four.identity()
    assert "heads=2" in two.identity()


@pytest.mark.parametrize(
    ("arch", "kwargs", "message"),
    [
        ("timm:test_resnt", {}, "did you mean 'test_resnet'"),
        ("open_clip:ViT-B-23", {}, "did you mean 'ViT-B-32'"),
        ("torchvision:resnet_18", {}, "did you mean 'resnet18'"),
        ("tim:test_resnet", {}, "did you mean 'timm'"),
        ("resnet50", {}, "timm:resnet50"),
        ("open_clip:ViT-B-32", {"widht": 32}, "did you mean 'width'"),
        ("open_clip:ViT-B-32", {"width": 32, "heads": 5}, "5 heads"),
        ("open_clip:convnext_base", {}, "timm:convnext_base"),
        ("torchvision:resnet18", {"zero_init": True}, "zero_init"),
    ],
)
def test_build_visual_names_the_mistake(arch, kwargs, message):
    with pytest.raises(UserError) as error:
        build_visual(VisualConfig(arch=arch, image_size=64, kwargs=kwargs))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_build_visual_refuses_a_size_that_modified_resnet_cannot_take():
    with pytest.raises(UserError, match="multiple of 32"):
        build_visual(VisualConfig(arch="open_clip:RN50", image_size=48))


def test_headless_efficientnet_ends_after_its_last_block(images_BCHW):
    config = VisualConfig(arch="timm:tf_efficientnet_b0", image_size=64, kwargs={"headless": True})
    torch.manual_seed(0)
    net = build_visual(config).eval()
    whole = build_visual(VisualConfig(arch="timm:tf_efficientnet_b0", image_size=64))
    with torch.inference_mode():
        last_BCHW = net.net.blocks(net.net.bn1(net.net.conv_stem(images_BCHW)))
        assert torch.equal(net.net.forward_features(images_BCHW), last_BCHW)
        torch.testing.assert_close(net(images_BCHW), last_BCHW.mean((2, 3)))
        dense = net.features(images_BCHW, dense=True)
    assert torch.equal(dense.maps[32], last_BCHW)
    assert torch.equal(dense.tokens_BND, last_BCHW.flatten(2).transpose(1, 2))
    assert (net.width, whole.width) == (320, 1280)
    counts = [sum(parameter.numel() for parameter in tower.parameters()) for tower in (whole, net)]
    assert counts[0] - counts[1] == 320 * 1280 + 2 * 1280  # the convolution and its BatchNorm
    assert net.arch != whole.arch


@pytest.mark.parametrize(
    "name, width",
    [("b1", 1.0), ("b2", 1.1), ("b3", 1.2), ("b4", 1.4), ("b5", 1.6), ("b6", 1.8), ("b7", 2.0), ("l2", 4.3)],
)
def test_headless_efficientnet_has_the_width_of_the_scaling_rule(name, width):
    """Tan & Le 2019: the last block's 320 channels times the width coefficient, to a multiple of 8. B7 640, L2 1376."""
    with torch.device("meta"):
        net = build_visual(VisualConfig(arch=f"timm:tf_efficientnet_{name}", kwargs={"headless": True}))
        assert net.width == int(320 * width + 4) // 8 * 8
        assert net(torch.zeros(1, 3, 64, 64)).shape == (1, net.width)


def test_headless_is_for_efficientnets():
    with pytest.raises(UserError, match="only EfficientNets can be headless; leave headless out"):
        build_visual(VisualConfig(arch="timm:test_resnet", image_size=64, kwargs={"headless": True}))
