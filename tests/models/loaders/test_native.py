from __future__ import annotations

import pytest
import torch

from vlbench.core.catalog import RECIPES
from vlbench.core.errors import UserError
from vlbench.models.load import load_backbone
from vlbench.models.text import TextConfig
from vlbench.models.vision import VisualConfig

CLASSES = ["circle", "square"]
VISUAL = VisualConfig(arch="timm:test_resnet", image_size=32)
TEXT = TextConfig(width=32, layers=1, heads=2, context_length=16)


@pytest.fixture
def checkpoint(tmp_path):
    """Writes what the trainer writes. Returns the path, the model and what was written."""

    def write(recipe_name: str, folder: str = "run", **changes):
        recipe = RECIPES.get(recipe_name)
        update = {"visual": VISUAL} | ({"text": TEXT, "embed_dim": 24} if recipe_name != "supervised" else {})
        config = recipe.presets["tiny"].model_copy(update=update)
        torch.manual_seed(11)
        model = recipe.build(config, CLASSES)
        content = {
            "format": "vlbench.checkpoint",
            "version": 1,
            "recipe": recipe_name,
            "config": config.model_dump(mode="json"),
            "classes": CLASSES,
            "card": {"pretrain_data": ["shapes:pairs"], "seed": 11},
            "model": model.state_dict(),
            "step": 5,
            "samples_seen": 640,
            **changes,
        }
        path = tmp_path / folder / "ckpt.pt"
        path.parent.mkdir(exist_ok=True)
        torch.save(content, path)
        return path, model, recipe, config

    return write


@pytest.mark.parametrize("recipe_name", ["clip", "unicl", "supervised"])
def test_native_checkpoint_comes_back_as_it_was_trained(checkpoint, recipe_name):
    path, model, recipe, config = checkpoint(recipe_name)
    expected = recipe.export(model, config, CLASSES)
    images_BCHW = torch.randn(2, 3, 32, 32)
    for spec in (str(path), str(path.parent)):
        backbone = load_backbone(spec)
        found, wanted = backbone.encode_image(images_BCHW), expected.encode_image(images_BCHW)
        assert torch.equal(found.pooled_BD, wanted.pooled_BD)
        assert backbone.weights_hash == expected.weights_hash
        if recipe_name != "supervised":
            assert torch.equal(found.embed_BE, wanted.embed_BE)
            assert torch.equal(backbone.encode_text(["red"]), expected.encode_text(["red"]))
    card = backbone.card
    assert (card.id, card.recipe, card.loader) == ("run", recipe_name, "native")
    assert (card.pretrain_data, card.seed, card.images_seen) == (("shapes:pairs",), 11, 640)
    assert card.preprocess.image_size == (32, 32)


def test_native_random_is_the_same_architecture_drawn_again(checkpoint):
    path, *_ = checkpoint("clip")
    trained, random = load_backbone(str(path)), load_backbone(str(path), weights="random:3")
    assert random.card.arch == trained.card.arch
    assert random.card.preprocess == trained.card.preprocess
    assert random.card.random
    assert random.card.id == "run-random-s3"
    assert random.card.pretrain_data == ()
    assert random.weights_hash != trained.weights_hash
    assert random.weights_hash == load_backbone(str(path), weights="random:3").weights_hash


def test_native_takes_the_weights_of_another_file(checkpoint):
    path, *_ = checkpoint("clip")
    other, model, *_ = checkpoint("clip", folder="other")
    with torch.no_grad():
        model.image_projection.weight.zero_()
    torch.save({"model": model.state_dict()}, other.parent / "w.pt")
    backbone = load_backbone(str(path), weights=str(other.parent / "w.pt"))
    assert backbone.card.id == "run@w"
    assert not backbone.encode_image(torch.randn(1, 3, 32, 32)).embed_BE.any()


def test_native_preprocessing_travels_with_the_weights(checkpoint):
    stored = {"image_size": [32, 32], "interpolation": "nearest", "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    path, *_ = checkpoint("clip", card={"id": "mine", "preprocess": stored})
    card = load_backbone(str(path)).card
    assert card.id == "mine"
    assert card.preprocess.interpolation == "nearest"
    assert card.preprocess.mean == (0.1, 0.2, 0.3)


def test_native_mistakes_are_named(checkpoint):
    def error_of(**changes) -> str:
        path, *_ = checkpoint("clip", **changes)
        with pytest.raises(UserError) as error:
            load_backbone(str(path))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "did you mean 'clip'" in error_of(recipe="clipp")
    good = checkpoint("clip")[3].model_dump(mode="json")
    assert "unknown key 'setps'" in error_of(config=good | {"setps": 3})
    assert "missing" in error_of(model={"logit_scale": torch.tensor(1.0)})
    assert "version 7" in error_of(version=7)
    assert "card" in error_of(card={"preprocess": {"image_size": 32, "interpolation": "magic"}})
