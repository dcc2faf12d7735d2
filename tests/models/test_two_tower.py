from __future__ import annotations

import math

import pytest
import torch

from vlbench.models.classifier import Classifier
from vlbench.models.text import TextConfig, Tokenizer
from vlbench.models.two_tower import TwoTower
from vlbench.models.vision import VisualConfig

TEXT = TextConfig(width=32, layers=2, heads=2)
RESNET = VisualConfig(arch="timm:test_resnet", image_size=32)
VIT = VisualConfig(
    arch="open_clip:ViT-B-32", image_size=32, kwargs={"layers": 1, "width": 32, "heads": 2, "patch_size": 16}
)


def make(visual: VisualConfig = RESNET, **options) -> TwoTower:
    torch.manual_seed(0)
    return TwoTower(visual, TEXT, embed_dim=24, **options)


@pytest.fixture(scope="module")
def batch():
    images_BCHW = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens_BL = Tokenizer(TEXT.spec())(["red", "blue", "a green circle", "two squares"])
    return images_BCHW, tokens_BL


@pytest.mark.parametrize("visual", [RESNET, VIT])
def test_two_tower_forward_is_unit_norm_and_trains_every_parameter(visual, batch):
    model = make(visual)
    image_BE, text_BE, scale = model(*batch)
    assert image_BE.shape == text_BE.shape == (4, 24)
    torch.testing.assert_close(image_BE.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(text_BE.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(scale, torch.tensor(1 / 0.07))
    (scale * image_BE @ text_BE.T).log_softmax(1).diagonal().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("visual", [RESNET, VIT])
def test_two_tower_features_are_what_it_trains_on(visual, batch):
    model = make(visual).eval()
    images_BCHW, tokens_BL = batch
    with torch.inference_mode():
        image_BE, text_BE, _ = model(images_BCHW, tokens_BL)
        features = model.image_features(images_BCHW)
        raw_text_BE = model.encode_text(tokens_BL)
    torch.testing.assert_close(torch.nn.functional.normalize(features.embed_BE, dim=1), image_BE)
    torch.testing.assert_close(torch.nn.functional.normalize(raw_text_BE, dim=1), text_BE)
    assert features.pooled_BD.shape == (4, model.visual.width)
    assert not torch.allclose(raw_text_BE.norm(dim=1), torch.ones(4)), "the backbone contract is not normalised"


def test_two_tower_clamps_the_scale_at_its_maximum_only():
    model = make(logit_scale_max=100.0)
    model.logit_scale.data.fill_(9.0)
    model.clamp_logit_scale()
    assert model.logit_scale.exp().item() == pytest.approx(100.0, rel=1e-6)
    model.logit_scale.data.fill_(-3.0)
    model.clamp_logit_scale()
    assert model.logit_scale.item() == -3.0
    free = make(logit_scale_init=1.0, logit_scale_max=None)
    free.logit_scale.data.fill_(9.0)
    free.clamp_logit_scale()
    assert free.logit_scale.item() == 9.0


def test_two_tower_refuses_a_maximum_given_as_a_logarithm():
    with pytest.raises(AssertionError, match="above its maximum"):
        make(logit_scale_max=math.log(100))


def test_two_tower_initialises_as_clip():
    model = make()
    assert model.image_projection.bias is None
    assert model.image_projection.weight.std().item() == pytest.approx(model.visual.width**-0.5, rel=0.1)
    net = model.text.net
    assert net.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert net.positional_embedding.std().item() == pytest.approx(0.01, rel=0.1)
    assert net.text_projection.std().item() == pytest.approx(32**-0.5, rel=0.1)


@pytest.mark.parametrize("visual", [RESNET, VIT])
def test_two_tower_projection_std_reaches_both_projections(visual):
    weights = make(visual, projection_std=0.02).projections()
    assert len(weights) == 2
    for weight in weights:
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_classifier_logits_and_gradients(batch):
    torch.manual_seed(0)
    model = Classifier(VIT, 5)
    logits_BC = model(batch[0])
    assert logits_BC.shape == (4, 5)
    logits_BC.logsumexp(1).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
