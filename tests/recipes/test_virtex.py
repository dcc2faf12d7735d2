"""VirTex: its settings, its losses against float64, what it makes of a caption; cut or spread, a run is the same."""

from __future__ import annotations

import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.conftest import on_ranks
from tests.train.stopping import Stop, StopAt
from vlbench.core.catalog import RECIPES
from vlbench.core.config import override, parse
from vlbench.core.errors import RunError, UserError
from vlbench.core.types import Example, Region, Sample
from vlbench.data.sources import BaseSource
from vlbench.data.stream import Mixture
from vlbench.data.vocabulary import END, MASK, N_SPECIAL, PAD, START, Vocabulary, learn_vocabulary
from vlbench.models.load import load_backbone
from vlbench.models.weights import read_checkpoint
from vlbench.recipes.virtex import CATEGORIES, RECIPE, VOCABULARY, Virtex, VirtexConfig, mask_tokens
from vlbench.train.batches import Samples
from vlbench.train.distributed import session
from vlbench.train.loop import fit
from vlbench.train.token_losses import set_cross_entropy, token_cross_entropy

CAPTIONS = ("a red ball on the left", "a blue box on the right", "a green cone", "two red boxes, left of a blue ball")
MODEL = learn_vocabulary(CAPTIONS * 20, size=80)
WORDS = Vocabulary(MODEL)
KNOWING = RECIPE.with_assets({VOCABULARY: MODEL, CATEGORIES: b'["ball", "box", "cone"]'})
VARIANTS = ("bicaptioning", "captioning", "token_classification", "multilabel", "masked_lm")


def config_of(*changes: str) -> VirtexConfig:
    return override(RECIPE.presets["tiny"], ["visual.image_size=32", "head=L1_H16", "workers=0", *changes])


def samples(texts: tuple[str | None, ...] = CAPTIONS, **changes: Any) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randint(0, 256, (len(texts), 3, 32, 32), generator=generator, dtype=torch.uint8)
    return [
        Sample(image_CHW, text, -1, seed=number, **changes)
        for number, (image_CHW, text) in enumerate(zip(images_BCHW, texts))
    ]


# ------------------------------------------------------------------------------------------------ settings


def test_presets_survive_json_and_name_the_papers_tables() -> None:
    for preset in RECIPE.presets.values():
        assert parse(VirtexConfig, json.loads(json.dumps(preset.model_dump(mode="json"))), where="x") == preset
    heads = {name: preset.head for name, preset in RECIPE.presets.items() if name.startswith("paper")}
    assert heads["paper"] == "L1_H2048"
    assert [heads[f"paper_h{width}"] for width in (512, 768, 1024)] == ["L1_H512", "L1_H768", "L1_H1024"]
    assert [heads[f"paper_l{depth}"] for depth in (2, 3, 4)] == ["L2_H1024", "L3_H1024", "L4_H1024"]
    assert {RECIPE.presets[f"paper_{name}"].variant for name in VARIANTS[1:]} == set(VARIANTS[1:])
    clip = RECIPES.get("clip").presets["tiny"]
    for field in ("steps", "batch_size", "visual", "augment", "schedule", "seed", "precision"):
        assert getattr(RECIPE.presets["tiny"], field) == getattr(clip, field), "recipes are compared"
    assert RECIPE.presets["tiny"].optim == clip.optim.model_copy(update={"lr_factors": {r"^textual\.": 0.5}})


def test_paper_preset_holds_the_sources_values() -> None:
    paper = RECIPE.presets["paper"]
    assert (paper.batch_size, paper.steps, paper.schedule.warmup) == (256, 500_000, 10_000)
    assert (paper.optim.name, paper.optim.momentum, paper.optim.weight_decay, paper.optim.clip_norm) == (
        "sgd",
        0.9,
        1e-4,
        10.0,
    )
    assert (paper.optim.lookahead_steps, paper.optim.lookahead_alpha) == (5, 0.5)
    assert paper.augment.color_jitter == (0.4, 0.4, 0.4, 0.1)
    assert (paper.augment.jitter_p, paper.augment.flip, paper.augment.crop_scale) == (0.8, True, (0.2, 1.0))
    assert (paper.max_length, paper.vocabulary_size, paper.dropout) == (30, 10_000, 0.1)


def test_paper_preset_gives_rates_and_decay_to_the_right_parameters() -> None:
    """0.2 for the CNN, 1e-3 for the rest; gains and biases of embedding and transformer alone do not decay."""
    from vlbench.train.optim import parameter_groups

    paper = RECIPE.presets["paper"]
    config = paper.model_copy(update={"head": "L1_H64"})
    with torch.device("meta"):
        model = KNOWING.build(config, ())
    of = {id(parameter): group for group in parameter_groups(model, paper.optim) for parameter in group["params"]}
    rates, decays = {}, {}
    for name, parameter in model.named_parameters():
        group = of[id(parameter)]
        rates[name] = round(group["lr_factor"] * paper.optim.lr, 9)
        decays[name] = group["weight_decay"]
    assert {rate for name, rate in rates.items() if name.startswith("visual.")} == {0.2}
    assert {rate for name, rate in rates.items() if not name.startswith("visual.")} == {1e-3}
    decayed = ("visual.net.bn1.weight", "visual.net.bn1.bias", "textual.output_bias", "textual.visual_projection.bias")
    for name in decayed:
        assert decays[name] == 1e-4, name
    free = {name for name, decay in decays.items() if not decay}
    assert all(name.startswith("textual.") and ("norm" in name or name.endswith("bias")) for name in free)
    for name in (
        "textual.embedding.layer_norm.weight",
        "textual.transformer.layers.0.norm2.weight",
        "textual.backward_transformer.layers.0.self_attn.in_proj_bias",
        "textual.backward_transformer.layers.0.linear1.bias",
    ):
        assert name in free, name
    assert "textual.embedding.words.weight" not in free


def test_paper_model_has_the_published_size() -> None:
    """ResNet-50, 91.9M and 67.2M with the paper's 10,000 tokens; every bottleneck ends in a gain of zero."""
    config = RECIPE.presets["paper"]
    with torch.device("meta"):
        model = KNOWING.build(config, ())
    assert sum(parameter.numel() for parameter in model.visual.parameters()) == 23_508_032
    size = sum(parameter.numel() for parameter in model.textual.parameters()) + (10_000 - len(WORDS)) * 2049
    assert size / 1e6 == pytest.approx(91.9 + 67.15, abs=0.05)


# torchvision's own counts, less the classifier's.
RESNET50, RESNET101, WIDE50 = (whole - 2049 * 1000 for whole in (25_557_032, 44_549_160, 68_883_240))


@pytest.mark.parametrize(
    ("preset", "tower", "layers", "width", "directions"),
    [
        ("paper", RESNET50, 1, 2048, 2),
        ("paper_h512", RESNET50, 1, 512, 2),
        ("paper_h768", RESNET50, 1, 768, 2),
        ("paper_h1024", RESNET50, 1, 1024, 2),
        ("paper_l2", RESNET50, 2, 1024, 2),
        ("paper_l3", RESNET50, 3, 1024, 2),
        ("paper_l4", RESNET50, 4, 1024, 2),
        ("paper_w2x", WIDE50, 1, 1024, 2),
        ("paper_r101", RESNET101, 1, 1024, 2),
        ("paper_captioning", RESNET50, 1, 2048, 1),
        ("paper_masked_lm", RESNET50, 1, 2048, 1),
    ],
)
def test_presets_have_the_size_of_their_layers(
    preset: str, tower: int, layers: int, width: int, directions: int
) -> None:
    """A decoder's block: two attentions, a feed-forward of four widths, three norms. Directions share all else."""
    config = RECIPE.presets[preset]
    with torch.device("meta"):
        model = KNOWING.build(config, ())
    attention, feed_forward, norm = 4 * (width**2 + width), 8 * width**2 + 5 * width, 2 * width
    block = 2 * attention + feed_forward + 3 * norm
    shared = (2048 + 1) * width + 30 * width + norm  # the image's projection, positions, the embedding's norm
    tied = width + 1  # a word's embedding, which is its output too, and its bias
    head = layers * directions * block + shared + len(WORDS) * tied
    assert sum(parameter.numel() for parameter in model.visual.parameters()) == tower
    assert sum(parameter.numel() for parameter in model.textual.parameters()) == head
    assert config.vocabulary_size == 10_000


@pytest.mark.parametrize(
    ("preset", "outputs"), [("paper_token_classification", len(WORDS)), ("paper_multilabel", 1 + 3)]
)
def test_presets_without_a_decoder_are_a_network_and_a_linear_layer(preset: str, outputs: int) -> None:
    config = RECIPE.presets[preset]
    with torch.device("meta"):
        model = KNOWING.build(config, ())
    assert sum(parameter.numel() for parameter in model.parameters()) == RESNET50 + (2048 + 1) * outputs
    assert config.vocabulary_size == 10_000


def test_every_published_size_is_tested() -> None:
    of = [test_presets_have_the_size_of_their_layers, test_presets_without_a_decoder_are_a_network_and_a_linear_layer]
    tested = {row[0] for test in of for mark in test.pytestmark for row in mark.args[1]}  # type: ignore[attr-defined]
    assert tested == set(RECIPE.presets) - {"tiny"}


def test_impossible_settings_are_one_clear_line() -> None:
    for change, words in (
        ("head=H16", "write it as L<layers>_H<width>"),
        ("mask_random=0.3", "their sum is at most 1"),
        ("variant=captions", "bicaptioning"),
        ("vocabulary_size=5", "greater than or equal to 6"),
    ):
        with pytest.raises(UserError, match=words):
            config_of(change)
    with pytest.raises(UserError, match="changes left and right in English captions only"):
        config_of("augment.flip=true", "languages=[en, de]")


# ------------------------------------------------------------------------------------------------ a batch


def test_sequences_are_the_sheets() -> None:
    """Forward from [SOS] to [EOS]; backward the whole list reversed; one cut at its right has no end."""
    batch = KNOWING.collate(config_of("max_length=8"), samples())
    for text, forward, backward in zip(CAPTIONS, batch["tokens_BL"].tolist(), batch["backward_BL"].tolist()):
        whole = [START, *WORDS.encode(text), END]
        cut = whole[:8]
        assert [token for token in forward if token != PAD] == cut
        assert [token for token in backward if token != PAD] == cut[::-1]
        assert (backward[0] == END) == (len(whole) <= 8)
        assert [token for token in backward if token != PAD][-1] == START
    assert batch["tokens_BL"].shape[1] == 8
    short = KNOWING.collate(config_of(), samples(("a green cone",)))
    assert short["tokens_BL"].tolist() == [[START, *WORDS.encode("a green cone"), END]]


def test_caption_of_a_mirrored_image_changes_sides() -> None:
    (row,) = KNOWING.collate(config_of(), samples(("A Red ball on the LEFT",), flipped=True))["tokens_BL"].tolist()
    assert WORDS.decode(row) == "a red ball on the right"
    config = config_of("flip_words=substrings")
    (row,) = KNOWING.collate(config, samples(("a bright ball",), flipped=True))["tokens_BL"].tolist()
    assert WORDS.decode(row) == WORDS.decode(WORDS.encode("a bleft ball"))


def test_token_classification_has_each_token_once_and_survives_empty_captions() -> None:
    config = config_of("variant=token_classification")
    batch = KNOWING.collate(config, samples(("a red red ball, a ball", "", CAPTIONS[1])))
    first = [token for token in batch["targets_BK"][0].tolist() if token]
    assert first == sorted(set(WORDS.encode("a red red ball, a ball")))
    assert not batch["targets_BK"][1].any()
    model = KNOWING.build(config, ())
    losses = KNOWING.loss(model, batch, config)
    assert torch.isfinite(losses["loss"])
    assert KNOWING.loss(model, KNOWING.collate(config, samples(("", ""))), config)["loss"].item() == 0


def test_multilabel_needs_regions_and_numbers_categories_from_one() -> None:
    config = config_of("variant=multilabel")
    assert KNOWING.needs_of(config) == {"image", "regions"}
    assert KNOWING.needs_of(config_of()) == {"image", "text"}
    rows = samples((None, None, None))
    box = (1.0, 1.0, 9.0, 9.0)
    rows[0].regions = (Region("cone", box), Region("ball", box), Region("cone", box))
    rows[2].regions = (Region("box", box),)
    batch = KNOWING.collate(config, rows)
    assert batch["targets_BK"].tolist() == [[1, 3], [0, 0], [2, 0]]
    model = KNOWING.build(config, ())
    assert model.head.out_features == 4, "three categories and the background"


def test_multilabel_takes_what_the_crop_has_left_or_all_of_the_image() -> None:
    """An image whose left half is a ball and whose right half a cone: a crop of a tenth loses one of them, mostly."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 32)).save(buffer, "png")
    regions = (Region("ball", (0, 0, 20, 32)), Region("cone", (44, 0, 64, 32)))

    class Halves(BaseSource):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Example:
            return Example("x", buffer.getvalue(), regions=regions)

        def ids(self) -> list[str]:
            return ["x"]

    source = Halves("halves", None, provides={"image", "regions"})
    targets = {}
    for which in ("view", "image"):
        config = config_of("variant=multilabel", f"multilabel_regions={which}", "augment.crop_scale=[0.1, 0.1]")
        sample_at = Samples(KNOWING, config, Mixture([source], None, 0, needs=KNOWING.needs_of(config)))
        rows = [sample_at(position)[0] for position in range(16)]
        left = [sorted({{"ball": 1, "cone": 3}[region.category] for region in row.regions}) for row in rows]
        targets[which] = [sorted(set(row) - {0}) for row in KNOWING.collate(config, rows)["targets_BK"].tolist()]
    assert targets["view"] == left
    assert any(len(row) < 2 for row in left), "the crop took something"
    assert targets["image"] == [[1, 3]] * 16
    assert config_of().multilabel_regions == "view"


def test_masks_are_the_sheets_and_a_function_of_the_seed() -> None:
    config = config_of("variant=masked_lm")
    tokens = [START, *range(10, 30), END]
    chosen, replaced, randomised, n = 0, 0, 0, 3000
    for seed in range(n):
        seen, targets = mask_tokens(tokens, np.random.default_rng(seed), config=config, vocabulary=60)
        assert (seen, targets) == mask_tokens(tokens, np.random.default_rng(seed), config=config, vocabulary=60)
        assert (seen[0], seen[-1], targets[0], targets[-1]) == (START, END, PAD, PAD)
        masked = [place for place, token in enumerate(seen) if token == MASK]
        assert masked == [place for place, target in enumerate(targets) if target != PAD], "only [MASK] has a loss"
        assert all(targets[place] == tokens[place] for place in masked)
        changed = [place for place, token in enumerate(seen) if token != tokens[place]]
        assert len(changed) <= 3, "ceil(0.15 * 20)"
        assert all(token >= N_SPECIAL or token in (START, END, MASK) for token in seen)
        replaced += len(masked)
        randomised += len(changed) - len(masked)
        chosen += 3
    assert replaced / chosen == pytest.approx(0.85, abs=0.015)
    assert randomised / chosen == pytest.approx(0.10 * 54 / 55, abs=0.012)  # one in 55 draws the token itself


def test_a_single_chosen_token_is_always_masked_and_nothing_is_chosen_of_nothing() -> None:
    config = config_of("variant=masked_lm")
    for seed in range(50):
        seen, targets = mask_tokens([START, 9, 10, END], np.random.default_rng(seed), config=config, vocabulary=60)
        assert seen.count(MASK) == 1
        assert sum(target != PAD for target in targets) == 1
    assert mask_tokens([START, END], np.random.default_rng(0), config=config, vocabulary=60) == (
        [START, END],
        [PAD, PAD],
    )
    first = KNOWING.collate(config, samples())
    again = KNOWING.collate(config, samples())
    assert all(torch.equal(first[name], again[name]) for name in first)


# ------------------------------------------------------------------------------------------------ losses


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_token_cross_entropy_is_a_mean_over_tokens_not_captions() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (3, 4, 7))
    targets = np.array([[3, 4, 2, 0], [5, 0, 0, 0], [0, 0, 0, 0]])
    log_p = log_softmax(logits)
    expected = -np.mean([log_p[b, t, targets[b, t]] for b in range(3) for t in range(4) if targets[b, t]])
    found = token_cross_entropy(torch.tensor(logits), torch.tensor(targets))
    assert found.item() == pytest.approx(expected, abs=1e-12)
    assert token_cross_entropy(torch.tensor(logits), torch.zeros(3, 4, dtype=torch.long)).item() == 0


def test_set_cross_entropy_is_the_divergence_from_a_k_hot_target() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 3, (4, 9))
    sets = [[1, 5, 8], [2], [], [3, 4]]
    log_p = log_softmax(logits)
    expected = np.mean([-np.mean(log_p[b, classes]) for b, classes in enumerate(sets) if classes])
    targets = torch.tensor([row + [0] * (3 - len(row)) for row in sets])
    assert set_cross_entropy(torch.tensor(logits), targets).item() == pytest.approx(expected, abs=1e-12)
    best = torch.full((1, 9), -1e4)
    best[0, [1, 5, 8]] = 0.0
    assert set_cross_entropy(best, targets[:1]).item() == pytest.approx(math.log(3), abs=1e-6), "its floor is ln K"


@pytest.mark.parametrize("variant", ["bicaptioning", "captioning", "masked_lm"])
def test_loss_is_the_formula_on_the_models_logits(variant: str) -> None:
    config = config_of(f"variant={variant}", "dropout=0")
    torch.manual_seed(0)
    model = KNOWING.build(config, ())
    batch = KNOWING.collate(config, samples())
    losses = KNOWING.loss(model, batch, config)
    images = KNOWING.images(batch, config)
    backward = batch.get("backward_BL")
    with torch.no_grad():
        logits = [part.double().numpy() for part in model(images, batch["tokens_BL"], backward)]
    tokens = [batch["tokens_BL"].numpy(), None if backward is None else backward.numpy()][: len(logits)]
    expected = 0.0
    for part, row in zip(logits, tokens):
        if variant == "masked_lm":
            asked, part = batch["targets_BL"].numpy(), log_softmax(part)
        else:
            asked, part = row[:, 1:], log_softmax(part[:, :-1])  # position t is asked about token t + 1
        b, t = np.nonzero(asked)
        expected += -part[b, t, asked[b, t]].mean()
    assert losses["loss"].item() == pytest.approx(expected, abs=1e-5)
    if variant == "bicaptioning":
        assert losses["loss"].item() == pytest.approx((losses["loss_forward"] + losses["loss_backward"]).item())


def test_untrained_loss_is_ln_v_and_a_permutation_changes_nothing() -> None:
    config = config_of("dropout=0", "head_std=0.02")
    torch.manual_seed(0)
    model = KNOWING.build(config, ()).eval()
    rows = samples()
    loss = KNOWING.loss(model, KNOWING.collate(config, rows), config)["loss"].item()
    assert loss == pytest.approx(2 * math.log(len(WORDS)), abs=0.6)
    turned = KNOWING.loss(model, KNOWING.collate(config, rows[::-1]), config)["loss"].item()
    assert turned == pytest.approx(loss, abs=1e-5)


def test_second_decoder_reads_the_reversed_caption() -> None:
    """With the blocks of both decoders equal, a palindrome has the same loss both ways, another caption has not."""
    config = config_of("dropout=0", "variant=bicaptioning", "head_std=0.3")
    torch.manual_seed(0)
    model = KNOWING.build(config, ()).eval()
    model.textual.backward_transformer.load_state_dict(model.textual.transformer.state_dict())
    ids = WORDS.encode("a red ball")
    images = samples(("a",))[0].image_CHW[None]
    for inner, equal in ((ids + ids[::-1], True), (ids, False)):
        # Start and end are one token here, so that the whole sequence is a palindrome.
        forward = torch.tensor([[START, *inner, START]])
        batch = {"images_BCHW": images, "tokens_BL": forward, "backward_BL": forward.flip(1)}
        found = KNOWING.loss(model, batch, config)
        same = found["loss_forward"].item() == pytest.approx(found["loss_backward"].item(), abs=1e-5)
        assert same == equal


def test_tower_is_trained_by_every_variant() -> None:
    rows = samples()
    for row in rows:
        row.regions = (Region("ball", (0.0, 0.0, 9.0, 9.0)),)
    for variant in VARIANTS:
        config = config_of(f"variant={variant}")
        model = KNOWING.build(config, ())
        KNOWING.loss(model, KNOWING.collate(config, rows), config)["loss"].backward()
        assert all(parameter.grad is not None for parameter in model.parameters()), variant
        assert model.visual.net.conv1[0].weight.grad.any(), variant


def test_eight_images_are_learnt_by_heart_and_described() -> None:
    """The loss falls to nearly its floor of 0, and the captions come back word for word."""
    things = ("ball", "box", "cone", "ball, left")
    texts = tuple(f"a {colour} {thing}" for colour in ("red", "blue") for thing in things)
    config = config_of("dropout=0", "head=L1_H32", "head_std=0.15")
    torch.manual_seed(0)
    model = KNOWING.build(config, ()).train()
    batch = KNOWING.collate(config, samples(texts))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(120):
        optimizer.zero_grad()
        loss = KNOWING.loss(model, batch, config)["loss"]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    images = KNOWING.images(batch, config)
    with torch.no_grad():
        for _ in range(40):  # batch norm's running statistics come to what they are in training
            model.cells(images)
    backbone = KNOWING.export(model, config, ())
    assert backbone.card.provides >= {"pooled", "maps", "captions"}
    assert backbone.describe(images) == list(texts)
    assert backbone.describe(images.flip(0)) == list(texts)[::-1]
    assert model.training


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Captioned and boxed one-colour images in COCO's format; their size and grey differ, so that ids are no cue."""
    root = tmp_path_factory.mktemp("pictures")
    colours = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (20, 30, 220), "grey": (128, 128, 128)}
    rng = np.random.default_rng(0)
    images, captions, objects = [], [], []
    for number in range(48):
        name = list(colours)[number % 4]
        pixels = np.clip(np.array(colours[name]) + rng.normal(0, 30, (24, 24, 3)), 0, 255).astype(np.uint8)
        (root / "train").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(root / "train" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": 24, "height": 24})
        for text in (f"a {name} picture", f"this one is {name}", f"something {name}, left and right"):
            captions.append({"id": len(captions), "image_id": number, "caption": text})
        box = {"id": number, "image_id": number, "category_id": number % 4 + 1, "bbox": [2, 2, 20, 20], "iscrowd": 0}
        objects.append(box | {"area": 400, "segmentation": [[2, 2, 22, 2, 22, 22]]})
    kinds = [{"id": number + 1, "name": name} for number, name in enumerate(colours)]
    (root / "annotations").mkdir()
    (root / "annotations" / "captions_train.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (root / "annotations" / "instances_train.json").write_text(
        json.dumps({"images": images, "annotations": objects, "categories": kinds})
    )
    return f"coco:{root}"


def run_of(pictures: str, *changes: str) -> VirtexConfig:
    settings = (
        f"data=[{pictures!r}]",
        "steps=8",
        "batch_size=8",
        "visual.arch=timm:test_vit",  # without batch norm, whose statistics belong to a rank
        "checkpoint_every=3",
        "log_every=1",
        "augment.flip=true",
        "optim.lr=0.002",
        "vocabulary_size=40",
    )
    return config_of(*settings, *changes)


def log_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_loads(variant: str, pictures: str, tmp_path: Path) -> None:
    path = fit(RECIPE, run_of(pictures, f"variant={variant}", "visual.arch=timm:test_resnet"), out=tmp_path)
    losses = [record["loss"] for record in log_of(path)]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert set(read_checkpoint(path)["assets"]) == {CATEGORIES if variant == "multilabel" else VOCABULARY}
    backbone = load_backbone(str(path))
    writes = variant in ("bicaptioning", "captioning")
    assert ("captions" in backbone.card.provides) == writes
    images = torch.randn(3, 3, 32, 32)
    assert backbone.encode_image(images).pooled_BD.shape == (3, 96)
    assert set(backbone.encode_image(images, dense=True).maps) >= {8, 16, 32}
    if writes:
        assert all(isinstance(caption, str) for caption in backbone.describe(images))
    else:
        with pytest.raises(UserError, match="writes no captions"):
            backbone.describe(images)


@pytest.mark.parametrize("variant", ["bicaptioning", "masked_lm"])
def test_stopped_and_resumed_gives_the_same_bits(variant: str, pictures: str, tmp_path: Path) -> None:
    """With dropout, masks, flips, SGD with LookAhead; the vocabulary comes from the checkpoint."""
    more = (f"variant={variant}", "dropout=0.1", "optim.name=sgd", "optim.lookahead_steps=2", "optim.lr=0.05")
    whole = read_checkpoint(fit(RECIPE, run_of(pictures, *more), out=tmp_path / "whole"))
    with pytest.raises(Stop):
        fit(RECIPE, run_of(pictures, *more), out=tmp_path / "cut", watcher=StopAt(5))
    torch.manual_seed(99)

    class Forgetful(Virtex):
        """A resumed run must not learn its vocabulary again."""

        def learn_assets(self, config: Any, data: Any) -> dict[str, bytes]:
            raise AssertionError("the assets are in the checkpoint")

    cut = read_checkpoint(fit(Forgetful(), run_of(pictures, *more, "workers=1"), out=tmp_path / "cut", resume=True))
    assert all(torch.equal(cut["model"][name], whole["model"][name]) for name in whole["model"])
    assert all(torch.equal(cut["assets"][name], whole["assets"][name]) for name in whole["assets"])


@pytest.mark.parametrize("variant", ["bicaptioning", "token_classification", "masked_lm"])
def test_two_ranks_equal_one_process(variant: str, pictures: str, tmp_path: Path) -> None:
    """Captions of unlike length on the two ranks: the mean of the ranks' own means would be another number."""
    more = (f"variant={variant}", "dropout=0", "steps=3")
    one = fit(RECIPE, run_of(pictures, *more), out=tmp_path / "one")

    def rank() -> None:
        with session("cpu") as device:
            fit(RECIPE, run_of(pictures, *more), out=tmp_path / "two", device=device)

    on_ranks(rank)
    single, spread = read_checkpoint(one), read_checkpoint(tmp_path / "two" / "ckpt.pt")
    for name, value in single["model"].items():
        torch.testing.assert_close(spread["model"][name], value, rtol=0, atol=2e-5, msg=name)
    for mine, theirs in zip(log_of(tmp_path / "two" / "ckpt.pt"), log_of(one), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert all(torch.equal(spread["assets"][name], single["assets"][name]) for name in single["assets"])


def test_vocabulary_may_be_given(pictures: str, tmp_path: Path) -> None:
    (tmp_path / "words.model").write_bytes(MODEL)
    config = run_of(pictures, f"vocabulary={tmp_path / 'words.model'}", "steps=1")
    path = fit(RECIPE, config, out=tmp_path / "run")
    (tmp_path / "words.model").unlink()
    with pytest.warns(UserWarning, match=r"a vocabulary of \d+ pieces: the captions of coco:\S+ in en have no more"):
        fit(RECIPE, run_of(pictures, "vocabulary_size=5000", "steps=1"), out=tmp_path / "many")
    assert read_checkpoint(path)["assets"][VOCABULARY].numpy().tobytes() == MODEL
    assert load_backbone(str(path)).describe(torch.zeros(1, 3, 32, 32))  # the file is no longer needed
    with pytest.raises(UserError, match=r"vocabulary \S+words\.model: cannot be read"):
        fit(RECIPE, config, out=tmp_path / "again")


def test_vocabulary_of_labelled_images_learns_their_prompts(tmp_path: Path) -> None:
    for name in ("hot_dog", "ice cream"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((16, 16, 3), 40 * number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{number}.png")
    config = run_of(f"imagefolder:{tmp_path / 'data'}", "steps=1", "batch_size=4", "vocabulary_size=200")
    checkpoint = read_checkpoint(fit(RECIPE, config, out=tmp_path / "run"))
    words = Vocabulary(checkpoint["assets"][VOCABULARY].numpy().tobytes())
    for text in ("a photo of a hot dog", "ice cream"):
        assert words.decode(words.encode(text)) == text


def test_images_without_what_is_learnt_are_counted(pictures: str, tmp_path: Path) -> None:
    """Multilabel: an image without a box is replaced and counted; data without boxes are refused."""
    import shutil

    root = Path(pictures.removeprefix("coco:"))
    shutil.copytree(root, tmp_path / "data")
    file = tmp_path / "data" / "annotations" / "instances_train.json"
    content = json.loads(file.read_text())
    content["annotations"] = [row for row in content["annotations"] if row["image_id"] not in (0, 1)]
    file.write_text(json.dumps(content))
    more = ("variant=multilabel", "max_bad=2")
    path = fit(RECIPE, run_of(f"coco:{tmp_path / 'data'}", *more), out=tmp_path / "run")
    assert log_of(path)[-1]["bad_examples"] == 2
    with pytest.raises(RunError, match="missing regions"):
        fit(RECIPE, run_of(f"coco:{tmp_path / 'data'}", "variant=multilabel", "max_bad=1"), out=tmp_path / "strict")
    file.unlink()
    with pytest.raises(UserError, match=r"has no regions, and virtex \(variant multilabel\) learns from them"):
        fit(RECIPE, run_of(f"coco:{tmp_path / 'data'}", *more), out=tmp_path / "none")


def test_recipe_with_assets_travels_to_loader_processes() -> None:
    again = pickle.loads(pickle.dumps(KNOWING))
    config = config_of()
    assert torch.equal(again.collate(config, samples())["tokens_BL"], KNOWING.collate(config, samples())["tokens_BL"])
    assert again.categories == ("ball", "box", "cone")


def test_backbone_says_what_decides_its_captions() -> None:
    """Another vocabulary or beam with the same weights is another model."""
    from vlbench.models.backbone import backbone_fingerprint

    def identity(recipe: Any, *changes: str) -> str:
        torch.manual_seed(0)
        config = config_of(*changes)
        return backbone_fingerprint(recipe.export(recipe.build(config, ()), config, ()))

    small, as_small = (
        Virtex({VOCABULARY: learn_vocabulary(texts, size=30)}) for texts in (CAPTIONS * 20, (*CAPTIONS, "a blue box"))
    )
    assert len(small.vocabulary) == len(as_small.vocabulary) == 30
    recipes = (KNOWING, small, as_small)
    found = [*map(identity, recipes), identity(KNOWING, "beams=1"), identity(KNOWING, "head=L1_H16_A2")]
    assert len(set(found)) == len(found)
    assert identity(KNOWING) == found[0]
