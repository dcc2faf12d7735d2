"""UniCL's comparisons: each loss against its formula in float64, over ranks, resumed, and that it learns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from tests.recipes.test_recipes import batch_of
from tests.train.conftest import on_ranks
from tests.train.stopping import Stop, StopAt
from vlbench.cli import main
from vlbench.core.config import override
from vlbench.core.errors import UserError
from vlbench.models.load import load_backbone
from vlbench.models.weights import read_checkpoint
from vlbench.recipes import supervised
from vlbench.recipes.unicl import RECIPE, VARIANTS, UniclConfig
from vlbench.recipes.unicl.variants import caption_loss, labelled_cross_entropy
from vlbench.train.distributed import session
from vlbench.train.loop import fit
from vlbench.train.losses import clip_loss

CLASSES = ("ring", "star", "wave")
LABELS_ONLY = ("cross_entropy", "supcon", "label_embedding")
TEXTS = ["a ring", "one ring", "a star", "the first caption", "the second caption", "star", "third", "a wave"]
MIXED, LABELLED = [0, 0, 1, -1, -1, 1, -1, 2], [0, 0, 1, 2, 1, 1, 0, 2]


def config_of(variant: str, *changes: str) -> UniclConfig:
    small = ["visual.image_size=32", "text.width=32", "text.layers=1", "text.heads=2", "embed_dim=16", "workers=0"]
    found = override(RECIPE.presets["tiny"], [f"variant={variant}", *small, *changes])
    assert isinstance(found, UniclConfig)
    return found


def labels_for(variant: str) -> list[int]:
    return LABELLED if variant in LABELS_ONLY else MIXED


def log_softmax(logits: np.ndarray) -> np.ndarray:
    highest = logits.max(axis=1, keepdims=True)
    return logits - highest - np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))


def one_direction(rows: np.ndarray, keys: np.ndarray, classes: list[int], scale: float) -> float:
    log_p, total = log_softmax(scale * rows @ keys.T), 0.0
    for i, mine in enumerate(classes):
        total -= np.mean([log_p[i, j] for j, other in enumerate(classes) if other == mine])
    return total / len(classes)


def expected(variant: str, out: list[np.ndarray], labels: list[int], head_weight: float) -> float:
    """The loss in float64, written from the papers' formulas, row by row."""
    own = [label if label >= 0 else 100 + row for row, label in enumerate(labels)]
    match variant, out:
        case ("unicl", [image, text, scale]) | ("label_embedding", [image, text, scale]):
            return (one_direction(image, text, own, scale) + one_direction(text, image, own, scale)) / 2
        case "image_to_text", [image, text, scale]:
            return one_direction(image, text, own, scale)
        case "cross_entropy", [logits]:
            return -np.mean([row[label] for row, label in zip(log_softmax(logits), labels)])
        case "supcon", [image, scale]:
            found = []
            for i, mine in enumerate(labels):
                others = [j for j in range(len(labels)) if j != i]
                log_p = dict(zip(others, log_softmax(scale * image[[i]] @ image[others].T)[0]))
                if positives := [log_p[j] for j in others if labels[j] == mine]:
                    found.append(-np.mean(positives))
            return float(np.mean(found))
        case "multi_task", [image, text, scale, logits]:
            pairs = [row for row, label in enumerate(labels) if label < 0]
            contrastive = (
                one_direction(image[pairs], text[pairs], pairs, scale)
                + one_direction(text[pairs], image[pairs], pairs, scale)
            ) / 2
            rows = [row for row, label in enumerate(labels) if label >= 0]
            entropy = -np.mean([log_softmax(logits)[row, labels[row]] for row in rows])
            return contrastive + head_weight * entropy
    raise AssertionError(variant)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_loss_is_the_formula_in_float64(variant: str) -> None:
    config = config_of(variant, "head_weight=0.25")
    torch.manual_seed(0)
    model, labels = RECIPE.build(config, CLASSES).eval(), labels_for(variant)
    batch = batch_of(RECIPE, config, TEXTS, labels)
    assert ("tokens_BL" in batch) == (variant not in LABELS_ONLY)
    inputs = [RECIPE.images(batch, config), *([batch["tokens_BL"]] if "tokens_BL" in batch else [])]
    with torch.no_grad():
        out = model(*inputs, batch["labels_B"]) if variant == "label_embedding" else model(*inputs)
        losses = RECIPE.loss(model, batch, config)
    arrays = [part.double().numpy() for part in ([out] if isinstance(out, torch.Tensor) else out)]
    assert losses["loss"].item() == pytest.approx(expected(variant, arrays, labels, 0.25), rel=2e-6)


@pytest.mark.parametrize("variant", ["unicl", "label_embedding"])
def test_sum_of_directions_is_twice_their_mean_and_so_is_its_gradient(variant: str) -> None:
    losses, gradients = [], []
    for directions in ("mean", "sum"):
        config = config_of(variant, f"directions={directions}")
        torch.manual_seed(0)
        model = RECIPE.build(config, CLASSES).eval()
        loss = RECIPE.loss(model, batch_of(RECIPE, config, TEXTS, labels_for(variant)), config)["loss"]
        loss.backward()
        losses.append(loss.item())
        gradients.append(model.logit_scale.grad)
    assert losses[1] == pytest.approx(2 * losses[0], rel=1e-6)
    torch.testing.assert_close(gradients[1], 2 * gradients[0])
    assert config_of(variant).directions == "mean"


def test_caption_loss_of_captions_alone_is_clip_s() -> None:
    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 8), dim=1).requires_grad_() for _ in range(2))
    ours, clips = caption_loss(image, text, torch.full((5,), -1), 9.0), clip_loss(image, text, 9.0)
    torch.testing.assert_close(ours, clips)
    for mine, theirs in zip(torch.autograd.grad(ours, [image, text]), torch.autograd.grad(clips, [image, text])):
        torch.testing.assert_close(mine, theirs)


def test_a_batch_without_captions_or_without_labels_has_no_gradient_from_them() -> None:
    embed = torch.eye(4).requires_grad_()
    loss = caption_loss(embed, embed.detach(), torch.tensor([0, 1, 1, 2]), 5.0)
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, embed)[0], torch.zeros(4, 4))
    logits = torch.randn(3, 2, requires_grad=True)
    loss = labelled_cross_entropy(logits, torch.tensor([-1, -1, -1]))
    assert loss.item() == 0
    assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(3, 2))


def _rank(folder: Path) -> None:
    """Half a batch of every variant on each rank, twice: the second time, what was unused in the first is refused."""
    torch.set_num_threads(1)
    with session("cpu"):
        rank = torch.distributed.get_rank()
        for variant in VARIANTS:
            model, config, batch = _case(variant)
            half = {name: part[4 * rank : 4 * rank + 4] for name, part in batch.items()}
            wrapped = DistributedDataParallel(model)
            for _ in range(2):
                model.zero_grad()
                loss = RECIPE.loss(wrapped, half, config)["loss"]
                loss.backward()
            grads = {name: parameter.grad for name, parameter in model.named_parameters()}
            torch.save({"loss": loss.detach(), "grads": grads}, folder / f"{variant}{rank}.pt")


def _case(variant: str) -> tuple[torch.nn.Module, UniclConfig, dict[str, torch.Tensor]]:
    """A tower without batch statistics: those are each rank's own."""
    config = config_of(variant, "visual.arch=timm:test_vit")
    torch.manual_seed(0)
    return RECIPE.build(config, CLASSES), config, batch_of(RECIPE, config, TEXTS, labels_for(variant))


def test_two_ranks_give_the_loss_and_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    """The halves hold different numbers of captions, labels and positives."""
    on_ranks(_rank, tmp_path)
    for variant in VARIANTS:
        model, config, batch = _case(variant)
        loss = RECIPE.loss(model, batch, config)["loss"]
        loss.backward()
        for rank in (0, 1):
            found: Mapping[str, Any] = torch.load(tmp_path / f"{variant}{rank}.pt", weights_only=True)
            torch.testing.assert_close(found["loss"], loss.detach())
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None, f"{variant}: {name} is unused"
                torch.testing.assert_close(found["grads"][name], parameter.grad, atol=2e-6, rtol=1e-4)


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Level and upright stripes: a folder a class, and a table with a caption each."""
    root, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    lines = ["filepath\ttitle"]
    for name in ("level", "upright"):
        (root / name).mkdir()
        for number in range(24):
            wave = np.sin(np.arange(32) / rng.uniform(1.2, 2.0) + rng.uniform(0, 6))[:, None, None]
            pixels = np.clip(127 + 90 * wave + rng.normal(0, 20, (32, 32, 3)), 0, 255).astype(np.uint8)
            file = root / name / f"{number}.png"
            Image.fromarray(pixels if name == "level" else pixels.transpose(1, 0, 2)).save(file)
            lines.append(f"{file}\t{name} stripes")
    (root / "captions.csv").write_text("\n".join(lines) + "\n")
    return f"imagefolder:{root}", f"csv:{root / 'captions.csv'}"


# Embeddings that tell the classes apart and nothing else: what is left is ln of the positives there are to choose from.
FLOORS = {
    "image_to_text": math.log(8),
    "cross_entropy": 0.0,
    "supcon": math.log(7),
    "multi_task": math.log(4),
    "label_embedding": math.log(8),
}


@pytest.mark.parametrize("variant", list(FLOORS))
def test_variant_learns_resumes_to_the_bit_and_leaves_a_backbone(
    variant: str, stripes: tuple[str, str], tmp_path: Path
) -> None:
    labels, captions = stripes
    data = [f"{labels}@1", f"{captions}@1"] if variant == "multi_task" else [labels]
    changes = ["steps=24", "batch_size=16", "checkpoint_every=12", "log_every=4", "augment.crop_scale=[0.9, 1]"]
    config = config_of(variant, *changes, f"data={json.dumps(data)}")
    whole = fit(RECIPE, config, out=tmp_path / "whole")
    with pytest.raises(Stop):
        fit(RECIPE, config, out=tmp_path / "stopped", watcher=StopAt(14))
    resumed = read_checkpoint(fit(RECIPE, config, out=tmp_path / "stopped", resume=True))["model"]
    weights = read_checkpoint(whole)["model"]
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)

    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < min(log[0]["loss"], FLOORS[variant] + 0.45), variant
    assert any(name.startswith("text.") for name in weights) == (variant not in LABELS_ONLY)
    backbone = load_backbone(str(whole))
    assert backbone.card.recipe == f"unicl ({variant})"
    assert ("text" in backbone.card.provides) == (variant not in LABELS_ONLY)
    assert torch.isfinite(backbone.encode_image(torch.randn(2, 3, 32, 32)).pooled_BD).all()


def test_cross_entropy_is_the_supervised_recipe_to_the_bit(stripes: tuple[str, str], tmp_path: Path) -> None:
    changes = ["steps=3", "batch_size=8", f"data={json.dumps([stripes[0]])}"]
    mine = config_of("cross_entropy", *changes)
    theirs = override(supervised.RECIPE.presets["tiny"], ["visual.image_size=32", "workers=0", *changes])
    found = [
        read_checkpoint(fit(recipe, config, out=tmp_path / recipe.name))["model"]
        for recipe, config in ((RECIPE, mine), (supervised.RECIPE, theirs))
    ]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("variant", "parts", "answer"),
    [
        *((variant, (0, 1), rf"has no labels, and unicl \(variant {variant}\).* leave it out: --data imagefolder:")
          for variant in LABELS_ONLY),
        ("multi_task", (0,), r"there are no captions in imagefolder:.*; add --data with captions$"),
        ("multi_task", (1,), r"there are no labels in csv:.*; add --data with labels$"),
    ],
)  # fmt: skip
def test_data_that_a_variant_has_no_use_for_are_refused(
    variant: str, parts: tuple[int, ...], answer: str, stripes: tuple[str, str], tmp_path: Path
) -> None:
    config = config_of(variant, f"data={json.dumps([stripes[part] for part in parts])}")
    with pytest.raises(UserError, match=answer) as error:
        fit(RECIPE, config, out=tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("variant", [*LABELS_ONLY, "multi_task"])
@pytest.mark.parametrize("word", ["--variant", "--set"])
def test_a_variant_takes_of_the_presets_data_what_it_can_use(
    variant: str,
    word: str,
    stripes: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With nothing else said, and for as many images; data that are named stay as they are named."""
    labels, captions = f"{stripes[0]}@1", f"{stripes[1]}@4"
    preset = config_of("unicl", "batch_size=4", "steps=2", f"data={json.dumps([labels, captions])}")
    monkeypatch.setattr(type(RECIPE), "presets", {"tiny": preset})
    named = ["--variant", variant] if word == "--variant" else ["--set", f"variant={variant}"]
    words = ["pretrain", "unicl", *named, "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    said = capsys.readouterr().out
    stored = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    if variant == "multi_task":
        assert stored["data"] == [labels, captions]
        assert "has no use for" not in said
    else:
        assert stored["data"] == [labels]
        assert f"  data: {labels}\n    of the preset's; unicl (variant {variant}) has no use for {captions}\n" in said
    assert (stored["steps"], stored["batch_size"]) == (2, 4)
    assert main([*words, "--resume"]) == 0
    assert "this run is finished" in capsys.readouterr().err
    if variant != "multi_task":
        for explicit in (["--data", labels, "--data", captions], ["--set", f"data={json.dumps([labels, captions])}"]):
            assert main([*words[:-1], str(tmp_path / "refused"), *explicit]) == 2
            assert f"has no labels, and unicl (variant {variant}) learns from labels" in capsys.readouterr().err


def test_variants_are_named_on_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert set(RECIPE.variants) == set(VARIANTS)
    assert main(["show", "recipe", "unicl"]) == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())  # long lines are broken
    assert all(f" {name}: {line} " in words for name, line in RECIPE.variants.items())
    for words, answer in (
        (["unicl", "--variant", "supcom"], "recipe unicl: unknown variant 'supcom'; did you mean 'supcon'?"),
        (["clip", "--variant", "supcon"], "recipe clip has no variants; leave --variant out"),
    ):
        assert main(["pretrain", *words, "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err.splitlines() == [f"vlbench: error: {answer}"]


def test_variant_on_the_command_line_is_the_setting(
    stripes: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["pretrain", "unicl", "--variant", "supcon", "--data", stripes[0], "--steps", "1", "--device", "cpu"]
    assert main([*words, "--set", "batch_size=4", "--set", "visual.image_size=32", "--set", "workers=0"]) == 0
    stored = json.loads(Path("runs/unicl-supcon-tiny-s0/config.json").read_text())
    assert stored["config"]["variant"] == "supcon"
    assert "--tasks linear,knn\n" in capsys.readouterr().out
