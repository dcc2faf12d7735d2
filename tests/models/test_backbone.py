from __future__ import annotations

import pytest
import torch
from torch import nn

from vlbench.core.cards import Preprocess
from vlbench.core.errors import UserError
from vlbench.core.types import Backbone, Features
from vlbench.models import wrap
from vlbench.models.backbone import backbone_fingerprint, weights_hash
from vlbench.models.export import export_two_tower, export_visual
from vlbench.models.text import TextConfig
from vlbench.models.two_tower import TwoTower
from vlbench.models.vision import VisualConfig, build_visual

VISUAL = VisualConfig(arch="timm:test_resnet", image_size=32)
PREPROCESS = Preprocess(image_size=32)


@pytest.fixture(scope="module")
def two_tower():
    torch.manual_seed(0)
    model = TwoTower(VISUAL, TextConfig(width=32, layers=1, heads=2), embed_dim=24)
    return model, export_two_tower(model, model_id="m", recipe="clip", preprocess=PREPROCESS, seed=3)


@pytest.fixture(scope="module")
def images_BCHW():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_backbone_gives_what_its_card_provides(two_tower, images_BCHW):
    _, backbone = two_tower
    assert isinstance(backbone, Backbone)
    assert backbone.card.provides == {"pooled", "embed", "tokens", "maps", "text"}
    features = backbone.encode_image(images_BCHW, dense=True)
    assert features.embed_BE.shape == (2, 24)
    assert features.tokens_BND is not None
    assert features.maps is not None
    assert backbone.encode_text(["red", "blue"]).shape == (2, 24)
    assert backbone.card.params == sum(p.numel() for p in two_tower[0].visual.parameters())


def test_backbone_evaluates_and_gives_the_training_mode_back(two_tower, images_BCHW):
    model, backbone = two_tower
    model.train()
    model.visual.net.bn1.eval()  # frozen on purpose
    before = model.visual.net.layer1[0].bn1.running_mean.clone()
    out = backbone.encode_image(images_BCHW)
    assert torch.equal(model.visual.net.layer1[0].bn1.running_mean, before), "BatchNorm moved during evaluation"
    assert model.training
    assert not model.visual.net.bn1.training
    model.eval()
    torch.testing.assert_close(backbone.encode_image(images_BCHW).pooled_BD, out.pooled_BD)
    assert not out.pooled_BD.requires_grad


def test_backbone_without_text_says_so(images_BCHW):
    backbone = export_visual(build_visual(VISUAL), model_id="sup", recipe="supervised", preprocess=PREPROCESS)
    assert "text" not in backbone.card.provides
    assert backbone.encode_image(images_BCHW).embed_BE is None
    with pytest.raises(UserError, match="sup has no text tower"):
        backbone.encode_text(["red"])


def test_backbone_gives_float32_under_autocast(two_tower, images_BCHW):
    _, backbone = two_tower
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = backbone.encode_image(images_BCHW)
    assert features.pooled_BD.dtype == features.embed_BE.dtype == torch.float32


def test_wrap_takes_a_plain_module(images_BCHW):
    module = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    backbone = wrap(module, preprocess=32, name="mine", licence="MIT")
    assert backbone.card.preprocess.image_size == (32, 32)
    assert backbone.card.licence == "MIT"
    assert torch.equal(backbone.encode_image(images_BCHW).pooled_BD, module(images_BCHW))


def test_wrap_takes_a_text_function(images_BCHW):
    class Net(nn.Module):
        def forward(self, images):
            return Features(pooled_BD=images.mean((2, 3)), embed_BE=images.amax((2, 3)))

    backbone = wrap(Net(), preprocess=PREPROCESS, name="mine", text=lambda texts: torch.ones(len(texts), 3))
    assert backbone.encode_text(["a", "b"]).shape == (2, 3)
    assert backbone.card.provides == {"pooled", "embed", "text"}


def test_backbone_names_an_output_that_is_no_feature(images_BCHW):
    with pytest.raises(UserError, match=r"mine: expected a pooled feature .* got a tensor of shape \(8, 3, 32, 32\)"):
        wrap(nn.Identity(), preprocess=32, name="mine").encode_image(images_BCHW)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.arange(12.0).reshape(3, 4))
        self.b = nn.Parameter(torch.ones(4))
        self.scalar = nn.Parameter(torch.tensor(1.5))


def test_weights_hash_is_of_content_names_types_and_shapes():
    base = weights_hash(Two())
    assert len(base) == 16
    assert weights_hash(Two()) == base
    strided = Two()
    strided.a = nn.Parameter(strided.a.detach().T.contiguous().T)
    assert not strided.a.is_contiguous()
    assert weights_hash(strided) == base, "memory layout is not content"
    changes = {"value": lambda m: m.a.data[0, 0].add_(1e-6), "scalar": lambda m: m.scalar.data.neg_()}
    changes["shape"] = lambda m: setattr(m, "a", nn.Parameter(m.a.detach().reshape(4, 3)))
    changes["dtype"] = lambda m: setattr(m, "b", nn.Parameter(m.b.detach().half()))
    changes["name"] = lambda m: (setattr(m, "c", m.b), delattr(m, "b"))
    hashes = {base}
    for change in changes.values():
        module = Two()
        change(module)
        hashes.add(weights_hash(module))
    assert len(hashes) == 1 + len(changes)


def test_weights_hash_ignores_batch_counters():
    counted, fresh = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    counted.num_batches_tracked += 7
    assert weights_hash(counted) == weights_hash(fresh)


def test_weights_hash_handles_half_and_integer_tensors():
    module = nn.Linear(2, 2).to(torch.bfloat16)
    module.register_buffer("steps", torch.tensor(3))
    assert len(weights_hash(module)) == 16


def test_backbone_fingerprint_covers_everything_but_the_name(two_tower):
    _, backbone = two_tower
    base, card = backbone_fingerprint(backbone), backbone.card
    try:
        backbone.card = card.model_copy(update={"id": "renamed", "licence": "x"})
        assert backbone_fingerprint(backbone) == base
        for update in (
            {"arch": "other"},
            {"feature": "other"},
            {"preprocess": card.preprocess.model_copy(update={"interpolation": "bilinear"})},
            {"text": card.text.model_copy(update={"context_length": 20})},
        ):
            backbone.card = card.model_copy(update=update)
            assert backbone_fingerprint(backbone) != base, update
    finally:
        backbone.card = card
