"""VirTex: Learning Visual Representations from Textual Annotations (Desai & Johnson, CVPR 2021, 2006.06666).

A convolutional network is trained by a transformer that writes the image's caption from its last map, left to right
and right to left; the transformer is thrown away afterwards. The paper's other tasks are variants of the same recipe.

Where the released code differs, a setting says so (flip_words, multilabel_regions). No setting restores these: padding
has an id of its own (there it is that of unknown pieces, which so have neither loss nor embedding); a loss is the mean
over the tokens of all ranks (there each rank's own, then averaged); a resumed run keeps LookAhead's slow weights.

Source tags: [V:file] kdexd/virtex at ae67b23; [V:zoo] its docs/virtex/usage/model_zoo.rst.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from vlbench.core.errors import BadExample, UserError
from vlbench.core.fingerprint import digest
from vlbench.core.types import Backbone, Part, Recipe, Sample
from vlbench.data.caption_text import FlipWords, normalise_caption, swap_sides
from vlbench.data.prompting import clean_classname, render
from vlbench.data.vocabulary import (
    END,
    MASK,
    N_SPECIAL,
    PAD,
    START,
    UNKNOWN,
    Vocabulary,
    captions_of,
    learn_vocabulary,
    read_vocabulary,
)
from vlbench.models.captioner import Captioner
from vlbench.models.classifier import Classifier
from vlbench.models.export import export_captioner, export_visual
from vlbench.models.textual_head import HeadSize
from vlbench.recipes.base import ABOUT_TINY, IMAGENET_MEAN, IMAGENET_STD, TINY_RUN, BaseRecipe
from vlbench.recipes.published import OURS, Preset, configs, published
from vlbench.train.config import PretrainConfig
from vlbench.train.templates import named_templates
from vlbench.train.token_losses import set_cross_entropy, token_cross_entropy

VOCABULARY, CATEGORIES = "vocabulary.model", "categories.json"
"""Names of the two assets."""
NEVER_WRITTEN = (PAD, UNKNOWN, START, MASK)


class VirtexConfig(PretrainConfig):
    """VirTex's settings."""

    variant: Literal["bicaptioning", "captioning", "token_classification", "multilabel", "masked_lm"] = Field(
        default="bicaptioning", description="what is learnt of a caption, or of regions: see the recipe's variants"
    )
    head: str = Field(
        default="L1_H2048",
        description="the textual head: L<layers>_H<width>, with _A<heads> (default: width/64) and _F<feed-forward "
        "width> (default: 4 widths) where they are other",
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="of the textual head")
    head_std: float = Field(
        default=0.02,
        gt=0,
        description="standard deviation of the textual head's initial weights; narrow heads learn faster with 0.9 over "
        "the root of their width, which is 0.02 at 2048",
    )
    max_length: int = Field(
        default=30, ge=3, description="longest caption in tokens, start and end included; a longer one loses its end"
    )
    vocabulary: str | None = Field(
        default=None, description="a file made by vlbench data vocab; None: learnt from the training captions"
    )
    vocabulary_size: int = Field(
        default=10_000,
        ge=N_SPECIAL + 1,
        description="the most pieces of a vocabulary that is learnt, 5 special ones "
        "included; captions of few different words give fewer",
    )
    flip_words: FlipWords = Field(
        default="words",
        description="how left and right change places in the caption of a mirrored image: whole words; substrings: as "
        "the released code does it, which also makes bleft of bright",
    )
    grid_stride: int | None = Field(
        default=None,
        ge=1,
        description="pixels between the cells that captions are written from, checked against the tower's last map; "
        "None: whatever that has",
    )
    multilabel_regions: Literal["view", "image"] = Field(
        default="view",
        description="multilabel: the categories that the crop has left, which the network can see; image: all of the "
        "image's, cropped away or not, as the released code does it, of which the published 86.2 (VOC07) and 46.2 "
        "(ImageNet-1k linear) are [V:zoo]",
    )
    mask_share: float = Field(default=0.15, gt=0, le=1, description="masked_lm: tokens chosen in a caption, rounded up")
    mask_replaced: float = Field(
        default=0.85, ge=0, le=1, description="masked_lm: chosen tokens that become [MASK]; only these have a loss"
    )
    mask_random: float = Field(default=0.10, ge=0, le=1, description="masked_lm: that become another piece")
    beams: int = Field(default=5, ge=1, description="beam search, when the trained model describes images")
    beam_proposals: int | None = Field(
        default=2, ge=1, description="tokens that a beam proposes at a step; None: as many as there are beams"
    )

    @field_validator("head")
    @classmethod
    def _is_a_size(cls, name: str) -> str:
        HeadSize.parse(name)
        return name

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        if self.mask_replaced + self.mask_random > 1 + 1e-9:
            raise ValueError("mask_replaced and mask_random are shares of the same tokens: their sum is at most 1")
        if self.augment.flip and self.variant != "multilabel" and self.languages != ("en",):
            raise ValueError("augment.flip changes left and right in English captions only: set it false, or languages")
        return self


TINY = Preset(
    VirtexConfig(
        **TINY_RUN | {"optim": TINY_RUN["optim"].model_copy(update={"lr_factors": {r"^textual\.": 0.5}})},
        data=("shapes:pairs",),
        head="L1_H128",
        head_std=0.08,
        dropout=0.0,
        vocabulary_size=150,
    ),
    ABOUT_TINY + " The paper's SGD with LookAhead is in its own presets. 68% of the shapes by a linear probe; 61% with "
    "the head at a quarter of the tower's rate and a dropout of 0.1; with weights of 0.02 as well it is no better than "
    "random.",
    {
        "head_std": "ours: the width's share of the paper's 0.02 at 2048",
        "vocabulary_size": "ours: every word is one piece",
    },
)

PAPER = published(
    VirtexConfig,
    "ResNet-50 under L1_H2048: VOC07 88.7 mAP, ImageNet-1k linear 53.8% [V:zoo].",
    {
        "data": (
            (),
            "COCO Captions train2017, 118k images of five captions [V:docs/virtex/usage/setup_dependencies.rst]",
        ),
        "steps": (500_000, "[V:config.py]"),
        "batch_size": (256, "[V:config.py]"),
        "optim.name": ("sgd", "[V:config.py]"),
        "optim.lr": (1e-3, "everything but the CNN [V:config.py]"),
        "optim.lr_factors": ({r"^visual\.": 200.0}, "the CNN: 0.2 [V:config.py]"),
        "optim.momentum": (0.9, "[V:config.py]"),
        "optim.weight_decay": (1e-4, "[V:config.py]"),
        "optim.decay_vectors": (True, "batch norms and the output's bias decay too [V:config.py]"),
        "optim.no_decay": ((r"^textual\.(embedding|(backward_)?transformer).*(norm|bias)",), "[V:config.py]"),
        "optim.lookahead_steps": (5, "[V:config.py]"),
        "optim.lookahead_alpha": (0.5, "[V:config.py]"),
        "optim.clip_norm": (10.0, "[V:scripts/pretrain_virtex.py]"),
        "schedule.kind": ("cosine", "[V:optim/lr_scheduler.py]"),
        "schedule.warmup": (10_000, "[V:config.py]"),
        "schedule.final": (0.0, "[V:optim/lr_scheduler.py]"),
        "visual.arch": ("torchvision:resnet50", "[V:virtex/modules/visual_backbones.py]"),
        "visual.image_size": (224, "[V:config.py]"),
        "visual.kwargs.zero_init_residual": (True, "[V:virtex/modules/visual_backbones.py]"),
        "grid_stride": (32, "7 x 7 cells [V:virtex/modules/visual_backbones.py]"),
        "head": ("L1_H2048", "the best of the paper's table of widths [V:zoo]"),
        "head_std": (
            0.02,
            "[V:virtex/modules/textual_heads.py], where biases keep PyTorch's own start; its docstring says 0",
        ),
        "dropout": (0.1, "[V:config.py]"),
        "max_length": (30, "[V:config.py]"),
        "vocabulary_size": (10_000, "[V:config.py]"),
        "mask_share": (0.15, "[V:virtex/data/datasets/masked_lm.py]"),
        "mask_replaced": (0.85, "[V:config.py]; the class's own default is 0.80"),
        "mask_random": (0.10, "[V:virtex/data/datasets/masked_lm.py]"),
        "augment.crop_scale": ((0.2, 1.0), "[V:virtex/factories.py]"),
        "augment.crop_ratio": ((0.75, 4 / 3), "[V:virtex/factories.py]"),
        "augment.flip": (True, "with the words left and right [V:virtex/factories.py]"),
        "augment.color_jitter": (
            (0.4, 0.4, 0.4, 0.1),
            "the hue's is small since captions name colours [V:virtex/factories.py]",
        ),
        "augment.jitter_p": (0.8, "[V:virtex/factories.py]"),
        "augment.interpolation": ("bilinear", "unverified"),
        "eval_images.resize_to": (256, "downstream; 224 in its own validation [V:virtex/factories.py]"),
        "eval_images.interpolation": ("bilinear", "unverified"),
        "eval_images.mean": (IMAGENET_MEAN, "[V:virtex/factories.py]"),
        "eval_images.std": (IMAGENET_STD, "[V:virtex/factories.py]"),
        "precision": ("bf16", "there fp16 with a scaled loss [V:scripts/pretrain_virtex.py]"),
        "workers": (8, OURS),
        "checkpoint_every": (2000, "[V:scripts/pretrain_virtex.py]"),
        "log_every": (100, OURS),
    },
)


def _paper(voc: float, imagenet: float, **changes: tuple[Any, str]) -> Preset:
    """``PAPER`` but for ``changes``, with which the zoo has these two scores."""
    return published(PAPER, f"VOC07 {voc} mAP, ImageNet-1k linear {imagenet}% [V:zoo].", changes)


def _variant(voc: float, imagenet: float, name: str) -> Preset:
    return _paper(voc, imagenet, variant=(name, "[V:zoo]"))


def _head(voc: float, imagenet: float, name: str) -> Preset:
    return _paper(voc, imagenet, head=(name, "[V:zoo]"))


def _tower(voc: float, imagenet: float, arch: str) -> Preset:
    return _paper(voc, imagenet, **{"head": ("L1_H1024", "[V:zoo]"), "visual.arch": (arch, "[V:zoo]")})


PRESETS: Mapping[str, Preset] = {
    "tiny": TINY,
    "paper": PAPER,
    "paper_captioning": _variant(88.6, 50.8, "captioning"),
    "paper_token_classification": _variant(88.8, 48.6, "token_classification"),
    "paper_multilabel": _paper(
        86.2,
        46.2,
        variant=("multilabel", "[V:configs/task_ablations]; the two scores are of multilabel_regions=image"),
        max_bad=(0.03, "ours: 0.9% of the images have no box, and a short run may draw more than the default allows"),
    ),
    "paper_masked_lm": _variant(86.4, 46.7, "masked_lm"),
    "paper_h512": _head(88.4, 51.8, "L1_H512"),
    "paper_h768": _head(88.3, 52.3, "L1_H768"),
    "paper_h1024": _head(88.3, 53.2, "L1_H1024"),
    "paper_l2": _head(88.8, 53.8, "L2_H1024"),
    "paper_l3": _head(88.7, 53.9, "L3_H1024"),
    "paper_l4": _head(88.7, 53.9, "L4_H1024"),
    "paper_w2x": _tower(88.5, 52.9, "torchvision:wide_resnet50_2"),
    "paper_r101": _tower(88.7, 52.1, "torchvision:resnet101"),
}


class Virtex(BaseRecipe):
    """The network is what the words of a caption can be read from.

    Args:
        assets: what ``learn_assets`` gave; without them no model can be built.
    """

    name = "virtex"
    Config = VirtexConfig
    presets: Mapping[str, Any] = configs(PRESETS)
    described = PRESETS
    needs: frozenset[Part] = frozenset({"image", "text"})
    variants: Mapping[str, str] = {
        "bicaptioning": "captions written left to right and right to left",
        "captioning": "left to right alone",
        "token_classification": "the set of a caption's tokens, from the pooled feature",
        "multilabel": "the categories of the image's regions (which regions: multilabel_regions)",
        "masked_lm": "masked tokens, seen from both sides",
    }

    def __init__(self, assets: Mapping[str, bytes] | None = None) -> None:
        assets = assets or {}
        self.vocabulary = Vocabulary(assets[VOCABULARY]) if VOCABULARY in assets else None
        self.categories: tuple[str, ...] = tuple(json.loads(assets[CATEGORIES])) if CATEGORIES in assets else ()

    def needs_of(self, config: Any) -> frozenset[Part]:
        """Regions where their categories are what is learnt, texts elsewhere."""
        return frozenset({"image", "regions"}) if config.variant == "multilabel" else self.needs

    def learn_assets(self, config: Any, data: Any) -> dict[str, bytes]:
        """The vocabulary of the training captions, or the categories of the training regions. Reads every example.

        Of data with labels and no captions, the vocabulary learns each class in each template once.
        """
        if config.variant == "multilabel":
            return {CATEGORIES: json.dumps(_categories(data.sources)).encode("utf-8")}
        if config.vocabulary is not None:
            return {VOCABULARY: read_vocabulary(config.vocabulary)}
        texts = [*captions_of(data.sources, config.languages)]
        for source in data.sources:
            if "text" not in source.provides:
                templates = named_templates(config.templates, source.templates)
                texts += [render(line, clean_classname(name)) for name in source.classes or () for line in templates]
        where = f"the captions of {', '.join(config.data)} in {', '.join(config.languages)}"
        model = learn_vocabulary(texts, size=config.vocabulary_size, where=where)
        if (size := len(Vocabulary(model))) < config.vocabulary_size:
            warnings.warn(f"a vocabulary of {size:,} pieces: {where} have no more different words", stacklevel=2)
        return {VOCABULARY: model}

    def with_assets(self, assets: Mapping[str, bytes]) -> Recipe:
        """The recipe that knows its vocabulary or its categories."""
        return Virtex(assets)

    def build(self, config: Any, classes: Sequence[str]) -> torch.nn.Module:
        """A fresh tower under a textual head, or under a linear one over tokens or categories."""
        if config.variant == "multilabel":
            assert self.categories, "with_assets brings the categories"
            return Classifier(config.visual, 1 + len(self.categories))  # 0: the background, which nothing is [V]
        if config.variant == "token_classification":
            return Classifier(config.visual, len(self._words()))
        return Captioner(
            config.visual,
            HeadSize.parse(config.head),
            vocabulary=len(self._words()),
            max_length=config.max_length,
            dropout=config.dropout,
            causal=config.variant != "masked_lm",
            backward=config.variant == "bicaptioning",
            std=config.head_std,
            grid_stride=config.grid_stride,
        )

    def collate(self, config: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Images, and what the variant is to predict, filled up with 0 to the longest of the batch.

        ``tokens_BL`` with start and end; ``backward_BL``, the same reversed, so that it starts with the end;
        ``targets_BL`` of the masked tokens; ``targets_BK``, an image's different tokens or categories.
        """
        batch = {"images_BCHW": torch.stack([sample.image_CHW for sample in samples])}
        if config.variant == "multilabel":
            number = {name: index for index, name in enumerate(self.categories, start=1)}
            whole = config.multilabel_regions == "image"
            named = [sample.categories if whole else {part.category for part in sample.regions} for sample in samples]
            found = [sorted(number[category] for category in categories) for categories in named]
            return batch | {"targets_BK": _filled(found)}
        tokens = [self._tokens(sample, config) for sample in samples]
        if config.variant == "token_classification":
            return batch | {"targets_BK": _filled([sorted({t for t in row if t >= N_SPECIAL}) for row in tokens])}
        if config.variant == "masked_lm":
            masked = [
                mask_tokens(row, np.random.default_rng(sample.seed), config=config, vocabulary=len(self._words()))
                for row, sample in zip(tokens, samples, strict=True)
            ]
            seen, targets = zip(*masked, strict=True)
            return batch | {"tokens_BL": _filled(seen), "targets_BL": _filled(targets)}
        batch["tokens_BL"] = _filled(tokens)
        if config.variant == "bicaptioning":
            batch["backward_BL"] = _filled([row[::-1] for row in tokens])
        return batch

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """Cross-entropy of the next token, both directions summed; of the masked tokens; or of the set of classes."""
        images_BCHW = self.images(batch, config)
        if "targets_BK" in batch:
            return {"loss": set_cross_entropy(model(images_BCHW), batch["targets_BK"], pad=PAD)}
        if config.variant == "masked_lm":
            (logits_BLV,) = model(images_BCHW, batch["tokens_BL"])
            return {"loss": token_cross_entropy(logits_BLV, batch["targets_BL"], pad=PAD)}
        names = ("tokens_BL", "backward_BL")[: 1 + (config.variant == "bicaptioning")]
        sequences = [batch[name] for name in names]
        parts = [
            token_cross_entropy(logits_BLV[:, :-1], tokens_BL[:, 1:], pad=PAD)
            for logits_BLV, tokens_BL in zip(model(images_BCHW, *sequences), sequences, strict=True)
        ]
        if len(parts) == 1:
            return {"loss": parts[0]}
        return {"loss": parts[0] + parts[1], "loss_forward": parts[0], "loss_backward": parts[1]}

    def export(self, model: torch.nn.Module, config: Any, classes: Sequence[str]) -> Backbone:
        """The tower; where the head can write, ``describe`` too, so that one can see what it has learnt."""
        common = {
            "model_id": self.name,
            # Models of two variants are no seeds of one: reports group by this.
            "recipe": self.name if config.variant == "bicaptioning" else f"{self.name} ({config.variant})",
            "preprocess": config.preprocess(),
            "pretrain_data": config.data,
        }
        if config.variant not in ("bicaptioning", "captioning"):
            return export_visual(model.visual, **common)
        assert isinstance(model, Captioner), "captions are written by a Captioner"
        words = self._words()
        return export_captioner(
            model,
            captions_fn=partial(_describe, model, words, config),
            writes=f"{config.beams} beams of {config.beam_proposals}, vocabulary {digest(words.model)[:8]}",
            **common,
        )

    def _words(self) -> Vocabulary:
        assert self.vocabulary is not None, "with_assets brings the vocabulary"
        return self.vocabulary

    def _tokens(self, sample: Sample, config: VirtexConfig) -> list[int]:
        """Start, caption, end; cut at the right, so that a caption that is too long has no end."""
        assert sample.text is not None, "virtex needs texts"
        text = normalise_caption(sample.text)
        if sample.flipped:
            text = swap_sides(text, rule=config.flip_words)
        return [START, *self._words().encode(text), END][: config.max_length]


def mask_tokens(
    tokens: Sequence[int], rng: np.random.Generator, *, config: VirtexConfig, vocabulary: int
) -> tuple[list[int], list[int]]:
    """What masked LM sees of a caption, and the targets: 0 but where [MASK] stands.

    ``ceil(mask_share * n)`` of the n tokens between start and end are chosen. Each becomes [MASK], another piece, or
    stays; unlike in BERT only the first kind has a loss. Where one token alone is chosen it always becomes [MASK].
    """
    seen, targets = list(tokens), [PAD] * len(tokens)
    inner = [place for place, token in enumerate(tokens) if token not in (START, END)]
    if not inner:
        return seen, targets
    chosen = rng.choice(inner, size=math.ceil(config.mask_share * len(inner)), replace=False)
    for place in sorted(chosen.tolist()):
        draw, other = rng.random(), int(rng.integers(N_SPECIAL, vocabulary))
        if len(chosen) == 1 or draw < config.mask_replaced:
            seen[place], targets[place] = MASK, tokens[place]
        elif draw < config.mask_replaced + config.mask_random:
            seen[place] = other
    return seen, targets


def _describe(model: Captioner, words: Vocabulary, config: VirtexConfig, images_BCHW: torch.Tensor) -> list[str]:
    tokens = model.describe(
        images_BCHW, start=START, end=END, beams=config.beams, per_beam=config.beam_proposals, never=NEVER_WRITTEN
    )
    return [words.decode(row) for row in tokens]


def _filled(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Rows of unequal length as one int64 tensor, filled up with 0; at least one column."""
    filled = torch.full((len(rows), max(1, *map(len, rows))), PAD)
    for row, values in zip(filled, rows, strict=True):
        row[: len(values)] = torch.tensor(values, dtype=torch.long)
    return filled


def _categories(sources: Sequence[Any]) -> list[str]:
    """Every category of the regions of ``sources``, sorted. Raises UserError where there is none."""
    found: set[str] = set()
    for source in sources:
        for index in range(len(source)):
            try:
                found |= {region.category for region in source[index].regions}
            except BadExample:
                continue  # training will name it
    if not found:
        raise UserError(f"data {', '.join(source.spec for source in sources)}: no region has a category to learn")
    return sorted(found)


RECIPE = Virtex()
