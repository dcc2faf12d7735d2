"""Settings of fusion models, and mu-VLA's per task. This module loads without torch.

``PAPER[task]`` are the settings with which mu-VLA (Zhou et al., CVPR 2022, 2203.00242) was fine-tuned; ``TINY`` suits
the embedded world. An adapter's Config names those of its own task:

    ``class Config(FusionConfig): PRESETS = {"tiny": TINY, "paper": PAPER["vqa"]}``
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from vlbench.core.files import sha256
from vlbench.data.regions.open import stamp
from vlbench.finetune.config import FinetuneConfig
from vlbench.models.stream_config import StreamConfig

# mu-VLA's: what its four fine-tunings share. They read VinVL's regions; here the image side is the backbone's.
_PAPER_RUN: dict[str, Any] = {
    "stream": {},  # BERT-base, 12 x 768 x 12 [M:visual_bert.py]
    "grid": 7,  # ours: mu-VLA reads up to 100 detected regions; 49 cells are what a stride of 32 gives at 224 px
    "levels": 1,  # ours
    "optim": {
        "weight_decay": 0.01,  # not on biases and gains [M:mmf/utils/modeling.py]
        "betas": (0.9, 0.999),  # unverified: PyTorch's default
        "eps": 1e-8,  # [M:mmf/utils/modeling.py]
        "clip_norm": 5.0,  # pretraining's [M:pretrain.yaml]; fine-tuning's own is not known, but for RefCOCO+
        "no_decay": (),
    },
    "precision": "bf16",  # fp16 in pretraining [M:pretrain.yaml]
    "workers": 8,
    "checkpoint_every": 1000,
    "judge_every": 1000,
}

WORDS_STEP = 4
"""Words are padded to a multiple of it, so that there are few different shapes."""


def _paper(*, lr: float, clip_norm: float = 5.0, warmup: int, **values: Any) -> dict[str, Any]:
    optim = _PAPER_RUN["optim"] | {"lr": lr, "clip_norm": clip_norm}
    schedule = {"kind": "linear", "warmup": warmup, "final": 0.0}
    return _PAPER_RUN | {"optim": optim, "schedule": schedule} | values


PAPER: Mapping[str, dict[str, Any]] = {
    # [M@9a8ef56:configs]; the pooler [M@9a8ef56:vqa2/defaults.yaml]. The answers' loss is summed: see heads.py.
    "vqa": _paper(lr=5e-5, steps=28_000, warmup=2_800, batch_size=480, max_words=30, pooler="last_word"),
    # Batch 60, as it was run; today's file says 480 [M:configs]. 128 words [M@9a8ef56:configs].
    "nlvr2": _paper(lr=3e-5, steps=14_000, warmup=1_400, batch_size=60, max_words=128),
    # Judged every 500 steps [M@9a8ef56:configs].
    "entailment": _paper(lr=8e-5, steps=5_000, warmup=500, batch_size=480, max_words=60, judge_every=500),
    # [M:configs: vinvl_defaults]; vinvl_ft_defaults has 1e-4, 25,000 steps and a batch of 64.
    "grounding": _paper(lr=2e-4, clip_norm=2.0, steps=20_000, warmup=2_000, batch_size=256, max_words=60),
}
"""mu-VLA's settings by task."""

TINY: dict[str, Any] = {
    "steps": 1800,
    "batch_size": 32,  # few and large batches end before images and words are related to one another at all
    "grid": 2,  # objects are a third of the image wide; four times the cells learn the same at a third of the speed
    "levels": 2,
    # Wide feed-forward layers and large weights: whether a word fits an image shows in neither of the two alone, and
    # a narrow stream of small weights begins with nothing that depends on both.
    "stream": {"width": 64, "layers": 2, "heads": 4, "hidden": 512, "dropout": 0.0, "positions": 48, "init_std": 0.2},
    "max_words": 48,
    "words": 300,
    "optim": {"lr": 5e-4, "weight_decay": 0.05, "betas": (0.9, 0.98), "eps": 1e-6, "clip_norm": 1.0, "no_decay": ()},
    "schedule": {"kind": "cosine", "warmup": 0.1, "final": 0.0},
    "judge_every": 300,
    "checkpoint_every": 900,
    "workers": 0,
}
"""What one core learns from the embedded world in less than a minute; values found on that world, none published."""


class FusionConfig(FinetuneConfig):
    """Settings of a fusion model."""

    PRESETS: ClassVar[Mapping[str, dict[str, Any]]] = {"tiny": TINY, "paper": PAPER["vqa"]}

    grid: int = Field(default=7, ge=1, description="the image is read at grid x grid cells; not where boxes are given")
    levels: int = Field(
        default=1, ge=1, description="the deepest feature maps that a cell or box is read from, one after the other"
    )
    cells: int = Field(default=2, ge=1, description="RoIAlign's bins each way, whose mean is a cell's or box's feature")
    image_token: bool = Field(default=True, description="the backbone's pooled feature is one more token")
    scale_features: bool = Field(
        default=True,
        description="bring each map's part of a feature, and the pooled feature, to mean 0 and variance 1, and then "
        "each channel over the training batches, before they are projected: one learning rate suits all backbones",
    )
    features: str | None = Field(
        default=None,
        description="fixed region features (VinVL's .tsv, F.tsv?labels=L.tsv with its objects in a second file, or a "
        "folder of .npz) instead of the backbone's: mu-VLA's way",
    )
    feature_width: int = Field(default=2048, ge=1, description="leading numbers taken of each fixed feature")
    max_regions: int = Field(default=100, ge=1, description="boxes or fixed regions of an image that are read")
    stream: StreamConfig = StreamConfig()
    pooler: Literal["cls", "last_word"] = Field(
        default="cls",
        description="what a pooled head reads: [CLS] through BERT's tanh layer, or the output at the last word, which "
        "stands before [SEP]",
    )
    max_words: int = Field(default=60, ge=3, description="words that are read, [CLS] and [SEP] included")
    words: int = Field(
        default=30_522, ge=100, description="tokens of the vocabulary that is learnt from the training texts, at most"
    )
    init: str | None = Field(
        default=None, description="run folder or checkpoint of mu-VLA: its vocabulary, and of its stream what fits"
    )
    bert: str | None = Field(default=None, description="folder of a BERT whose weights and vocabulary to start from")

    @model_validator(mode="after")
    def _read_together(self) -> Self:
        if self.init is not None and self.bert is not None:
            raise ValueError("init and bert are two starts; give one")
        padded = -(-self.max_words // WORDS_STEP) * WORDS_STEP
        if padded > self.stream.positions:
            raise ValueError(
                f"max_words {self.max_words}, padded to {padded}, is more than stream.positions {self.stream.positions}"
            )
        if self.features is not None and self.backbone == "trained":
            raise ValueError("features are fixed: nothing of a backbone is read that could be trained; leave one out")
        if self.max_bad not in (0, type(self).model_fields["max_bad"].default):
            raise ValueError(
                "max_bad: a question whose image cannot be read stops the run, so that all models of a table learn "
                "from the same questions; leave it out"
            )
        return self

    def check_start(self) -> None:
        """Refuse an ``init`` or ``bert`` that cannot be read or does not fit.

        Quick beside the images, before which it should be called. Only where there is a start, torch is loaded.

        Raises:
            UserError: with the setting to change.
        """
        if self.init is not None or self.bert is not None:
            from vlbench.finetune.fusion.start import check_start

            check_start(self)

    def contents(self) -> list[str]:
        """What lies in the files that a model begins with and reads: a path alone does not say it.

        Region features are too large to be digested: their files' sizes and times stand for them. What is not there is
        an error of whoever reads it.
        """
        found: list[str] = []
        if self.features is not None:
            found.append(stamp(self.features))
        for start in (self.init, self.bert):
            path = Path(start).expanduser() if start is not None else None
            if path is not None and path.is_dir():
                found += [sha256(file) for file in sorted(path.glob("*")) if _decides(file)]
            elif path is not None and path.is_file():
                found.append(sha256(path))
        return found


def _decides(file: Path) -> bool:
    """Whether a file of a model's folder moves its numbers: weights, and what texts are cut by."""
    return file.suffix in (".pt", ".bin", ".safetensors") or file.name in ("vocab.txt", "tokenizer.json")
