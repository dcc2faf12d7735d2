"""ALIGN: Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision (Jia et al., ICML
2021, 2102.05918).

No code was released.

Not done: BatchNorm over 16 images a core [N-ALIGN], which [K:models/efficientnet.py] imitates on fewer cores by
virtual_batch_size=16, since larger batches scored lower there. Here its batch is that of a rank (and of a part, with
accumulate): 1,024 ranks of 16 are the paper's.

Source tags: [N-ALIGN] detailed notes of the paper, its tables among them; [K:file] the
re-implementation kakaobrain/coyo-align at 14bdf5a.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from pydantic import Field

from vlbench.core.types import Recipe, Source
from vlbench.data.prompting import clean_classname, render
from vlbench.data.sources import Subset
from vlbench.data.vocabulary import captions_of
from vlbench.data.wordpiece import WordPieceConfig, WordPieceTokenizer, read_wordpiece, train_wordpiece
from vlbench.models.bert import BertConfig
from vlbench.models.text import TextReader
from vlbench.models.two_tower import TwoTower
from vlbench.recipes.base import ABOUT_TINY, TINY_RUN, TwoTowerConfig, TwoTowerRecipe
from vlbench.recipes.published import OURS, Preset, configs, published
from vlbench.train.losses import align_loss
from vlbench.train.templates import named_templates

VOCABULARY = "wordpiece.json"
"""The asset's name: a ``tokenizer.json``."""


class AlignConfig(TwoTowerConfig):
    """ALIGN's settings."""

    text: BertConfig = BertConfig()  # type: ignore[assignment]  # instead of CLIP's text tower
    vocabulary: WordPieceConfig = WordPieceConfig()
    embed_dim: int = 640
    logit_scale_init: float = Field(
        default=0.0,
        description="-ln sigma, with sigma the temperature at the start. Its logarithm is what is learnt; the paper "
        "learns sigma itself, which can cross 0",
    )
    logit_scale_max: float | None = None
    label_smoothing: float = Field(
        default=0.1, ge=0, lt=1, description="share of each target that is spread evenly over the batch"
    )


TINY = Preset(
    AlignConfig(
        **TINY_RUN,
        data=("shapes:pairs",),
        text=BertConfig(width=128, layers=2, heads=4, context_length=32, dropout=0.0),
        vocabulary=WordPieceConfig(size=512, alphabet=1000),
        embed_dim=128,
        logit_scale_init=math.log(25),
        logit_scale_max=100.0,
    ),
    ABOUT_TINY + " AdamW stands in for LAMB, whose steps are made for batches of thousands.",
    {
        "vocabulary.size": "ours: its captions have a few dozen words",
        "logit_scale_init": "ours: sigma = 0.04, a few hundred steps are too short to climb from 1",
    },
)

PAPER = published(
    AlignConfig,
    "EfficientNet-L2 and BERT-large on 1.8B pairs: 76.4% zero-shot on ImageNet, 58.6 / 45.6 R@1 on COCO [N-ALIGN]. "
    "873,407,157 parameters where the paper says 820M, which are the two networks as they were published (480M and, "
    "with 30,522 tokens, 335M): the vocabulary of 100,000 adds 71M and the text's projection 1M, and what is not there "
    "(classifier, head convolution, pooler, positions beyond 64) takes 15M.",
    {
        "data": ((), "1.8B English alt-texts [N-ALIGN], never released"),
        "steps": (1_200_000, "about 12 epochs [N-ALIGN]"),
        "batch_size": (16_384, "16 on each of 1,024 cores [N-ALIGN]"),
        "optim.name": ("lamb", "[N-ALIGN]"),
        "optim.lr": (1e-3, "[N-ALIGN]"),
        "optim.weight_decay": (1e-5, "[N-ALIGN]"),
        "optim.betas": ((0.9, 0.999), "TensorFlow Addons' [K:main.py]"),
        "optim.eps": (1e-6, "TensorFlow Addons' [K:main.py]"),
        "optim.decay_vectors": (True, "[K:main.py]"),
        "optim.no_decay": (
            ("logit_scale$", r"\.bn\d\."),
            "BatchNorm's alone [K:main.py]; ours: the temperature too, whose logarithm should not decay to 0",
        ),
        "schedule.kind": ("linear", "[N-ALIGN]"),
        "schedule.warmup": (10_000, "[N-ALIGN]"),
        "schedule.final": (0.0, "[N-ALIGN]"),
        "visual.arch": (
            "timm:tf_efficientnet_l2",
            "[N-ALIGN]; tf: TensorFlow's padding and BatchNorm constants (not its batches of 16: see above)",
        ),
        "visual.image_size": (289, "[N-ALIGN]"),
        "visual.kwargs.headless": (True, "without the last 1x1 convolution [N-ALIGN; K:models/efficientnet.py]"),
        "visual.kwargs.drop_path_rate": (
            0.2,
            "drop_connect_rate of B1 to B7 [K:models/efficientnet.py]; L2's is not named",
        ),
        "text.width": (1024, "BERT-large [N-ALIGN]"),
        "text.layers": (24, "BERT-large [N-ALIGN]"),
        "text.context_length": (64, "[N-ALIGN]"),
        "vocabulary.size": (100_000, "[N-ALIGN]; several languages: 250,000 (unverified) and lower=false"),
        "embed_dim": (1376, "EfficientNet-L2's width; smaller networks get a linear layer to 640 [N-ALIGN]"),
        "logit_scale_init": (0.0, "sigma = 1 [N-ALIGN]"),
        "logit_scale_max": (None, "none is named; sigma ends near 1/64 [N-ALIGN]"),
        "label_smoothing": (0.1, "[N-ALIGN]"),
        "augment.resize_to": (
            346,
            "to a square, then a random crop of 289 [N-ALIGN; K:datasets/image_preprocessor.py]",
        ),
        "augment.flip": (True, "captions are not edited [N-ALIGN; K:datasets/image_preprocessor.py]"),
        "augment.interpolation": ("bilinear", "tf.image.resize's default [K:datasets/image_preprocessor.py]"),
        "eval_images.resize": ("squash", "the centre 289 of 346 [N-ALIGN; K:datasets/image_preprocessor.py]"),
        "eval_images.resize_to": (346, "[N-ALIGN; K:datasets/image_preprocessor.py]"),
        "eval_images.interpolation": ("bilinear", "tf.image.resize's default [K:datasets/image_preprocessor.py]"),
        "eval_images.mean": ((0.5, 0.5, 0.5), "x / 127.5 - 1 [K:models/efficientnet.py]"),
        "eval_images.std": ((0.5, 0.5, 0.5), "x / 127.5 - 1 [K:models/efficientnet.py]"),
        "precision": ("bf16", "[K:main.py]"),
        "workers": (8, OURS),
        "checkpoint_every": (5000, OURS),
        "log_every": (100, OURS),
    },
)

PRESETS: Mapping[str, Preset] = {
    "tiny": TINY,
    "paper": PAPER,
    "b7_base": published(
        PAPER,
        "The paper's larger ablation: 55.4 / 41.7 R@1 on COCO, 69.3 ImageNet 1-NN with all 1.8B pairs [N-ALIGN].",
        {
            "visual.arch": ("timm:tf_efficientnet_b7", "[N-ALIGN]"),
            "text.width": (768, "BERT-base [N-ALIGN]"),
            "text.layers": (12, "BERT-base [N-ALIGN]"),
            "embed_dim": (640, "EfficientNet-B7's width: no further layer [N-ALIGN]"),
        },
    ),
    "b3_mini_cc3m": published(
        PAPER,
        "EfficientNet-B3 and BERT-mini on CC3M: 22.1 / 17.3 R@1 on COCO, 48.9 ImageNet 1-NN [N-ALIGN]; [K:README] got "
        "21.2 / 17.0 / 46.2 with these settings, and with bert-base-uncased's vocabulary: vocabulary.file=vocab.txt.",
        {
            "steps": (100_000, "[K:conf/cc3m.flags]"),
            "optim.lr": (5e-3, "[K:conf/cc3m.flags]"),
            "visual.arch": ("timm:tf_efficientnet_b3", "[N-ALIGN]"),
            "text.width": (256, "BERT-mini [N-ALIGN; K:align.py]"),
            "text.layers": (4, "BERT-mini [N-ALIGN; K:align.py]"),
            "vocabulary.size": (30_522, "bert-base-uncased's size [K:datasets/text_preprocessor.py]"),
            "embed_dim": (640, "[K:main.py]"),
        },
    ),
}


class Align(TwoTowerRecipe):
    """Image i belongs to text i, as far as noisy data can be believed: labels are smoothed.

    Args:
        vocabulary: the asset, once it is there.
    """

    name = "align"
    Config = AlignConfig
    presets: Mapping[str, Any] = configs(PRESETS)
    described = PRESETS

    def __init__(self, vocabulary: bytes | None = None) -> None:
        self.vocabulary = vocabulary

    def learn_assets(self, config: AlignConfig, data: Any) -> dict[str, bytes]:
        """The WordPiece vocabulary: that of the settings' file, else one learnt from captions and prompts."""
        wanted = config.vocabulary
        if wanted.file is not None:
            content = read_wordpiece(wanted.file, lower=wanted.lower, strip_accents=wanted.strip_accents)
        else:
            content = train_wordpiece(
                _texts(config, data.sources),
                wanted.size,
                lower=wanted.lower,
                strip_accents=wanted.strip_accents,
                alphabet=wanted.alphabet,
            )
        return {VOCABULARY: content}

    def with_assets(self, assets: Mapping[str, bytes]) -> Recipe:
        """The recipe with its vocabulary."""
        return Align(assets[VOCABULARY])

    def tokenizer(self, config: AlignConfig) -> TextReader:
        """The run's own WordPiece."""
        assert self.vocabulary is not None, "learn_assets comes first"
        return _tokenizer(self.vocabulary, config.text.context_length)

    def build(self, config: AlignConfig, classes: Sequence[str]) -> TwoTower:
        """Two fresh towers. Without a vocabulary yet, one of the size that is asked for is assumed."""
        size = config.vocabulary.size
        if self.vocabulary is not None:
            size = _tokenizer(self.vocabulary, config.text.context_length).size
        return TwoTower(
            config.visual,
            config.text,
            embed_dim=config.embed_dim,
            vocabulary_size=size,
            project_equal=False,
            logit_scale_init=config.logit_scale_init,
            logit_scale_max=config.logit_scale_max,
            projection_std=config.projection_std,
        )

    def loss(
        self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: AlignConfig
    ) -> dict[str, torch.Tensor]:
        """Both towers, then ``contrast``. The log has the temperature sigma."""
        losses = super().loss(model, batch, config)
        return {"loss": losses["loss"], "temperature": 1 / losses["logit_scale"].detach()}

    def contrast(
        self,
        image_BE: torch.Tensor,
        text_BE: torch.Tensor,
        logit_scale: torch.Tensor,
        batch: Mapping[str, torch.Tensor],
        config: AlignConfig,
    ) -> torch.Tensor:
        """The sum of both directions' smoothed cross-entropies over the whole batch of all ranks."""
        return align_loss(image_BE, text_BE, 1 / logit_scale, config.label_smoothing, block=config.loss_block)


def _texts(config: AlignConfig, sources: Sequence[Source]) -> Iterator[str]:
    """What training may read: every caption, and every class name in every template. No image is decoded."""
    most = config.vocabulary.max_examples
    for source in sources:
        count = len(source)
        chosen = source
        if most is not None and most < count:
            indices = [number * count // most for number in range(most)]
            chosen = Subset(source, indices, split=source.split)
        yield from captions_of([chosen], config.languages)
        templates = named_templates(config.templates, source.templates)
        for classname in source.classes or ():
            yield from (render(template, clean_classname(classname)) for template in templates)


@cache
def _tokenizer(vocabulary: bytes, context_length: int) -> WordPieceTokenizer:
    return WordPieceTokenizer(vocabulary, context_length=context_length)


RECIPE = Align()
