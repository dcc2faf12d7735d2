"""ALIGN: Scaling Up Visual and Vision-Language Representation Learning With Noisy Text Supervision (Jia et al., ICML
2021, 2102.05918).

No code was released. Source tags: [N-ALIGN] detailed notes of the paper, its tables among them; [K:file] the
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
from vlbench.data.transforms import Augment
from vlbench.data.vocabulary import captions_of
from vlbench.data.wordpiece import WordPieceConfig, WordPieceTokenizer, read_wordpiece, train_wordpiece
from vlbench.models.bert import BertConfig
from vlbench.models.text import TextReader
from vlbench.models.two_tower import TwoTower
from vlbench.models.vision import VisualConfig
from vlbench.recipes.base import TINY_RUN, TwoTowerConfig, TwoTowerRecipe
from vlbench.train.config import EvalImages, OptimConfig, ScheduleConfig
from vlbench.train.losses import align_loss
from vlbench.train.templates import named_templates

VOCABULARY = "wordpiece.json"
"""The asset's name: a ``tokenizer.json``."""


class AlignConfig(TwoTowerConfig):
    """ALIGN's settings."""

    text: BertConfig = BertConfig()  # type: ignore[assignment]  # instead of CLIP's text tower
    vocabulary: WordPieceConfig = WordPieceConfig()
    embed_dim: int = 640  # EfficientNet-B7's width; smaller networks get a linear layer to it [N-ALIGN]
    logit_scale_init: float = 0.0
    """-ln sigma, with sigma = 1 at the start [N-ALIGN]. The paper learns sigma itself, which can cross 0."""
    logit_scale_max: float | None = None  # none is named; sigma ends near 1/64 [N-ALIGN]
    label_smoothing: float = Field(
        default=0.1, ge=0, lt=1, description="share of each target that is spread evenly over the batch"
    )  # [N-ALIGN]


# What two CPU cores learn from the embedded world in about two minutes; values found on that world, none published.
# AdamW at the other recipes' rates stands in for LAMB, whose steps are made for batches of thousands.
TINY = AlignConfig(
    **TINY_RUN,
    data=("shapes:pairs",),
    text=BertConfig(width=128, layers=2, heads=4, context_length=32, dropout=0.0),
    vocabulary=WordPieceConfig(size=512),  # its captions have a few dozen words
    embed_dim=128,
    logit_scale_init=math.log(25),  # sigma = 0.04: a few hundred steps are too short to climb from 1
    logit_scale_max=100.0,
)

_SQUARE = {
    "augment": Augment(
        resize_to=346,  # to a square, then a random crop of 289 [N-ALIGN; K:datasets/image_preprocessor.py]
        flip=True,  # captions are not edited [N-ALIGN; K:datasets/image_preprocessor.py]
        interpolation="bilinear",  # tf.image.resize's default [K:datasets/image_preprocessor.py]
    ),
    "eval_images": EvalImages(
        resize="squash",  # the centre 289 of 346 [N-ALIGN; K:datasets/image_preprocessor.py]
        resize_to=346,
        interpolation="bilinear",
        mean=(0.5, 0.5, 0.5),  # x / 127.5 - 1 [K:models/efficientnet.py]
        std=(0.5, 0.5, 0.5),
    ),
}

# LAMB, weight decay 1e-5 [N-ALIGN]; betas and eps are TensorFlow Addons', and of all tensors BatchNorm's alone are
# left out of decay [K:main.py]. The temperature is left out too: its logarithm should not decay towards 0.
_LAMB = OptimConfig(
    name="lamb",
    lr=1e-3,  # [N-ALIGN]
    weight_decay=1e-5,
    betas=(0.9, 0.999),
    eps=1e-6,
    decay_vectors=True,
    no_decay=("logit_scale$", r"\.bn\d\."),
)

# EfficientNet-L2 and BERT-large on 1.8B pairs: 76.4% zero-shot on ImageNet, 58.6 / 45.6 R@1 on COCO [N-ALIGN].
# Not done: BatchNorm over 16 images a core [N-ALIGN], which [K:models/efficientnet.py] imitates on fewer cores by
# virtual_batch_size=16, since larger batches scored lower. Here its batch is that of a rank (and of a part, with
# accumulate): 1,024 ranks of 16 are the paper's.
PAPER = AlignConfig(
    **_SQUARE,
    data=(),  # 1.8B English alt-texts [N-ALIGN], never released
    steps=1_200_000,  # about 12 epochs [N-ALIGN]
    batch_size=16_384,  # 16 on each of 1,024 cores [N-ALIGN]
    optim=_LAMB,
    schedule=ScheduleConfig(kind="linear", warmup=10_000, final=0.0),  # [N-ALIGN]
    visual=VisualConfig(
        arch="timm:tf_efficientnet_l2",  # tf: TensorFlow's padding and BatchNorm constants
        image_size=289,  # [N-ALIGN]
        kwargs={
            "headless": True,  # without the last 1x1 convolution [N-ALIGN; K:models/efficientnet.py]
            "drop_path_rate": 0.2,  # drop_connect_rate of B1 to B7 [K:models/efficientnet.py]; L2's is not named
        },
    ),
    text=BertConfig(width=1024, layers=24, context_length=64),  # BERT-large, 64 tokens [N-ALIGN]
    vocabulary=WordPieceConfig(size=100_000),  # [N-ALIGN]; several languages: 250,000 (unverified) and lower=false
    embed_dim=1376,  # EfficientNet-L2's width [N-ALIGN]
    precision="bf16",  # [K:main.py]
    workers=8,
    checkpoint_every=5000,
    log_every=100,
)

# The paper's larger ablation: 55.4 / 41.7 R@1 on COCO, 69.3 ImageNet 1-NN with all 1.8B pairs [N-ALIGN].
B7_BASE = PAPER.model_copy(
    update={
        "visual": PAPER.visual.model_copy(update={"arch": "timm:tf_efficientnet_b7"}),
        "text": BertConfig(width=768, layers=12, context_length=64),  # BERT-base [N-ALIGN]
        "embed_dim": 640,  # EfficientNet-B7's width: no further layer [N-ALIGN]
    }
)

# EfficientNet-B3 and BERT-mini on CC3M: 22.1 / 17.3 R@1 on COCO, 48.9 ImageNet 1-NN [N-ALIGN]; [K:README] got
# 21.2 / 17.0 / 46.2 with these settings.
B3_MINI_CC3M = PAPER.model_copy(
    update={
        "steps": 100_000,  # [K:conf/cc3m.flags]
        "optim": _LAMB.model_copy(update={"lr": 5e-3}),  # [K:conf/cc3m.flags]
        "visual": PAPER.visual.model_copy(update={"arch": "timm:tf_efficientnet_b3"}),
        "text": BertConfig(width=256, layers=4, context_length=64),  # BERT-mini [N-ALIGN; K:align.py]
        # The size of bert-base-uncased's, which [K:datasets/text_preprocessor.py] takes: vocabulary.file=vocab.txt.
        "vocabulary": WordPieceConfig(size=30_522),
        "embed_dim": 640,  # [K:main.py]
    }
)


class Align(TwoTowerRecipe):
    """Image i belongs to text i, as far as noisy data can be believed: labels are smoothed.

    Args:
        vocabulary: the asset, once it is there.
    """

    name = "align"
    Config = AlignConfig
    presets: Mapping[str, Any] = {"tiny": TINY, "paper": PAPER, "b7_base": B7_BASE, "b3_mini_cc3m": B3_MINI_CC3M}

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
