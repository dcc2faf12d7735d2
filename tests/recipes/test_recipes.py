"""Every recipe: its settings against their sources, its loss against the formula, and that it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlbench.core.catalog import RECIPES
from vlbench.core.config import override, parse
from vlbench.core.types import Sample
from vlbench.models.load import load_backbone
from vlbench.train.loop import fit
from vlbench.train.losses import clip_loss, unicl_loss

NAMES = ("supervised", "clip", "unicl")


@pytest.mark.parametrize("name", NAMES)
def test_presets_survive_json_and_share_a_budget(name: str) -> None:
    recipe = RECIPES.get(name)
    assert recipe.name == name
    assert set(recipe.presets) >= {"tiny", "paper"}
    for preset in recipe.presets.values():
        assert isinstance(preset, recipe.Config)
        stored = json.loads(json.dumps(preset.model_dump(mode="json")))
        assert parse(type(preset), stored, where="x") == preset
    clip = RECIPES.get("clip").presets["tiny"]
    tiny = recipe.presets["tiny"]
    for field in ("steps", "batch_size", "optim", "schedule", "visual", "augment", "seed", "precision"):
        assert getattr(tiny, field) == getattr(clip, field), f"{name}'s {field} differs: recipes are compared"
    # Captions name sides and colours, so nothing may mirror or tint an image.
    assert not tiny.augment.flip
    assert not any(tiny.augment.color_jitter)


@pytest.mark.parametrize(
    "name, total, visual",
    [("clip", 102_007_137, 38_316_896), ("unicl", None, 27_519_354), ("supervised", 25_557_032, 23_508_032)],
)
def test_paper_presets_build_the_published_architectures(name: str, total: int | None, visual: int) -> None:
    """CLIP RN50 has 102.0M parameters, Swin-T 27.5M without its classifier, ResNet-50 25.6M with 1000 classes."""
    recipe = RECIPES.get(name)
    with torch.device("meta"):
        model = recipe.build(recipe.presets["paper"], [str(label) for label in range(1000)])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.visual.parameters()) == visual
    if total is not None:
        assert count == total
    else:  # Swin-T, CLIP's 12 x 512 text tower, two projections to 512, the logit scale
        text = 49_408 * 512 + 77 * 512 + 12 * (12 * 512**2 + 13 * 512) + 2 * 512
        assert count == visual + text + 768 * 512 + 512 * 512 + 1


def test_paper_presets_hold_the_sources_values() -> None:
    clip, unicl = RECIPES.get("clip").presets["paper"], RECIPES.get("unicl").presets["paper"]
    assert (clip.batch_size, clip.optim.lr, clip.optim.weight_decay, clip.schedule.warmup) == (32768, 5e-4, 0.2, 2000)
    assert (clip.optim.betas, clip.optim.eps, clip.logit_scale_max) == ((0.9, 0.999), 1e-8, 100.0)
    assert math.exp(clip.logit_scale_init) == pytest.approx(1 / 0.07)
    assert clip.steps == 32 * 400_000_000 // 32768
    assert unicl.optim.lr == pytest.approx(5e-4 * unicl.batch_size / 512)
    assert unicl.schedule.start * unicl.optim.lr == pytest.approx(5e-7 * unicl.batch_size / 512)
    assert unicl.schedule.final * unicl.optim.lr == pytest.approx(5e-6 * unicl.batch_size / 512)
    assert (unicl.logit_scale_init, unicl.logit_scale_max, unicl.optim.clip_norm) == (1.0, None, 5.0)


def batch_of(recipe: Any, config: Any, texts: list[str], labels: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    side = config.visual.image_size
    images = torch.randint(0, 256, (len(texts), 3, side, side), generator=generator, dtype=torch.uint8)
    return recipe.collate(config, [Sample(*row) for row in zip(images, texts, labels)])


@pytest.mark.parametrize("name", ["clip", "unicl"])
def test_two_tower_loss_is_the_formula_on_the_models_embeddings(name: str) -> None:
    recipe = RECIPES.get(name)
    config = override(recipe.presets["tiny"], ["visual.image_size=32"])
    torch.manual_seed(0)
    model = recipe.build(config, ())
    labels = [0, 0, 1, -1, -1, 1]
    batch = batch_of(recipe, config, ["a red ring", "a ring", "a star", "one", "two words", "star"], labels)
    assert batch["tokens_BL"].shape == (6, 16)  # not the whole context
    losses = recipe.loss(model, batch, config)
    with torch.no_grad():
        image, text, scale = model(recipe.images(batch, config), batch["tokens_BL"])
    assert scale.item() == pytest.approx(math.exp(config.logit_scale_init))
    expected = clip_loss(image, text, scale)
    if name == "unicl":
        assert unicl_loss(image, text, torch.tensor(labels), scale) != expected
        expected = unicl_loss(image, text, torch.tensor(labels), scale)
    assert losses["loss"].item() == pytest.approx(expected.item(), abs=1e-6)
    # An untrained model knows nothing: about ln(batch size) for distinct pairs.
    assert clip_loss(image, text, 1.0).item() == pytest.approx(math.log(6), abs=0.3)


def test_logit_scale_is_clamped_after_a_step_where_the_recipe_says_so() -> None:
    for name, preset, clamped in (("clip", "tiny", True), ("unicl", "paper", False)):
        recipe = RECIPES.get(name)
        config = override(
            RECIPES.get(name).presets["tiny"],
            [f"logit_scale_max={recipe.presets[preset].logit_scale_max or 'null'}"],
        )
        model = recipe.build(config, ())
        with torch.no_grad():
            model.logit_scale.fill_(7.0)
        recipe.after_step(model)
        assert model.logit_scale.item() == pytest.approx(math.log(100) if clamped else 7.0)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two classes that no single pixel tells apart: upright and level stripes."""
    root = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    for name in ("level", "upright"):
        (root / name).mkdir()
        for number in range(40):
            wave = np.sin(np.arange(32) / rng.uniform(1.2, 2.0) + rng.uniform(0, 6))[:, None, None]
            pixels = np.clip(127 + 90 * wave + rng.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels if name == "level" else pixels.transpose(1, 0, 2)).save(
                root / name / f"{number}.png"
            )
    return f"imagefolder:{root}"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_learns_and_its_checkpoint_is_a_backbone(name: str, stripes: str, tmp_path: Path) -> None:
    recipe = RECIPES.get(name)
    changes = [
        "steps=25",
        "batch_size=16",
        "visual.image_size=32",
        "workers=0",
        "log_every=5",
        "augment.crop_scale=[0.9, 1]",
    ]
    config = override(recipe.presets["tiny"], [*changes, f"data=[{stripes!r}]"])
    path = fit(recipe, config, out=tmp_path / "run")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    # Pairs of two classes cannot be told apart within a class: 16 pairs, about 8 positives each.
    floor = {"supervised": 0.0, "clip": math.log(8), "unicl": math.log(8)}[name]
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["loss"] < floor + 0.45

    backbone = load_backbone(str(path))
    assert backbone.card.recipe == name
    assert backbone.card.images_seen == 400
    assert backbone.card.pretrain_data == (stripes,)
    assert backbone.card.preprocess.image_size == (32, 32)
    from vlbench.data.images import decode
    from vlbench.data.sources import open_source
    from vlbench.data.transforms import eval_transform, normalise

    source, pre = open_source(stripes), backbone.card.preprocess
    transform = eval_transform(pre)
    examples = [source[index] for index in range(80)]
    images = torch.stack([transform(decode(example.image, where=example.id)) for example in examples])
    features = backbone.encode_image(normalise(images, pre))
    assert features.pooled_BD.shape[0] == 80
    assert ("text" in backbone.card.provides) == (name != "supervised")
    if name != "supervised":
        labels = torch.tensor([example.label for example in examples])
        text_BE = backbone.encode_text([f"a photo of a {classname}." for classname in source.classes])
        right = (features.embed_BE @ torch.nn.functional.normalize(text_BE, dim=-1).T).argmax(1) == labels
        assert right.float().mean() > 0.9
