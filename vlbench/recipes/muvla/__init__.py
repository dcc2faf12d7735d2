"""mu-VLA: unsupervised pretraining by retrieval-based multi-granular alignment (Zhou et al., CVPR 2022, 2203.00242).

No caption is paired with an image: sentences are retrieved by the tags of its regions (``data.weak``), and a
single-stream transformer is trained on region-tag (RT), region-phrase (RN) and image-sentence (IS) pairs:

    ``L = L_RT + L_RN + L_IS`` in the first ``m = 1`` epochs, then ``L = L_RT + w_ITM (L_RN + L_IS)``,

    ``L_RT = MLM(tags) + MRC + MRFR``, ``L_RN = MLM(phrases) + p-MRTC``, ``L_IS = MLM + ITM``,

where ``w_ITM`` is the ITM head's probability that the sentence matches the image. It weighs each pair by itself, and
no gradient flows through it. In ITM it weighs the retrieved pairs alone, as the released code has it: to weigh
negatives by their probability of matching would forgive the very errors that ITM learns from. Every term is a mean over
what is masked in the whole batch of all ranks, padding left out, and 0 where nothing is. One masked row of IS serves
MLM and ITM; the ``w_ITM`` of RN and IS is read off each row's own [CLS]. Every step trains all objectives.

The released code does otherwise in most of this. Each difference is a setting (rn_masking, rows, mrfr, mrfr_target,
region_mean, itm_weight, stream.modality_embedding, stream.sentence_norm), the preset ``paper_code`` sets them all, and
says what no setting restores. How sentences are retrieved differs too: ``vlbench data weakly-align`` (metric, order).

The paper's mode reads fixed region features (``features``) and trains no visual network: its export can match and
nothing else. OUR ADAPTATION (the ``tiny`` preset; ``features`` unset): the regions' features come from a tower trained
along with the stream (``models.roi``), which is the backbone that frozen tasks score. MRFR is left out there: a target
that the tower makes itself is best met by making all features equal. The tower may also learn what the detector in its
place had learnt before, the classes of regions (``roi.classify``, one more term of the loss: ``roi_tags``): through the
masked words alone, 600 steps teach it colours and no shapes.

Source tags: [N] notes of the paper; [W] its scores on an aggregator's page; [M:file] zmykevin/UVLP at 254e4e5, the
released code; [M@9a8ef56:file] its commit of 2022-04-08, which still holds the configurations that were run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from vlbench.core.config import Config
from vlbench.core.errors import UserError
from vlbench.core.types import Backbone, Part, Sample
from vlbench.data.stream import Mixture
from vlbench.data.wordpiece import WordPieceConfig, read_wordpiece, train_wordpiece
from vlbench.models.export import export_matcher
from vlbench.models.roi import RegionTower
from vlbench.models.single_stream import StreamConfig
from vlbench.models.vision import build_visual
from vlbench.recipes.base import ABOUT_TINY, TINY_RUN, BaseRecipe
from vlbench.recipes.muvla import values
from vlbench.recipes.muvla.batch import Batcher, Masking, Objective, Vocabulary
from vlbench.recipes.muvla.corpus import corpus_of, find_corpus, tags_of
from vlbench.recipes.muvla.features import features_of
from vlbench.recipes.muvla.loss import muvla_loss
from vlbench.recipes.muvla.matching import Matcher
from vlbench.recipes.muvla.model import RegionTextModel
from vlbench.recipes.muvla.start import load_bert
from vlbench.recipes.published import Preset, configs, published
from vlbench.train.config import PretrainConfig


class RoiConfig(Config):
    """Our adaptation: how region features are taken from a trainable tower."""

    strides: tuple[int, ...] = Field(default=(8, 16, 32), min_length=1, description="maps that a region is read from")
    cells: int = Field(default=2, ge=1, description="RoIAlign's bins each way, which are then averaged")
    image_token: bool = Field(
        default=True, description="the tower's pooled feature is one more region, of all the image"
    )
    mask_pixels: bool = Field(
        default=False,
        description="also blank out the pixels of masked regions before the tower, so that nothing of them reaches "
        "their neighbours; one more pass of the tower for RT and for RN",
    )
    classify: bool = Field(
        default=False,
        description="a linear layer names each region's tag from its feature alone: the tower stands where the paper "
        "has a detector, which was trained to do just that",
    )


class MuvlaConfig(PretrainConfig):
    """mu-VLA's settings."""

    objectives: tuple[Objective, ...] = Field(
        default=("rt", "rn", "is"), min_length=1, description="the levels trained"
    )
    corpus: str | None = Field(
        default=None, description="a weakly aligned corpus; None: made of data and pool on first use, by TF-IDF"
    )
    pool: tuple[str, ...] = Field(
        default=(),
        description="where the corpus is made: text files or data specs whose sentences are retrieved from; none: the "
        "captions of the data themselves, shuffled",
    )
    k: int = Field(default=5, ge=1, description="sentences used of each image, the best first")
    aligned: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="where the corpus is made: share of the images whose own caption comes first; None: retrieved only",
    )
    features: str | None = Field(
        default=None, description="fixed region features, the paper's mode; None: from a trainable tower (ours)"
    )
    feature_labels: str | None = Field(
        default=None, description="the .tsv file with the objects of features whose own .tsv has none"
    )
    feature_width: int = Field(default=2048, ge=1, description="leading numbers taken of each fixed feature")
    roi: RoiConfig = RoiConfig()
    stream: StreamConfig = StreamConfig()
    bert: str | None = Field(default=None, description="folder of a BERT whose weights and vocabulary to start from")
    vocabulary: WordPieceConfig = WordPieceConfig()
    max_words: int = Field(default=60, ge=3, description="words of a sentence, or of all tags, that are read")
    max_regions: int = Field(default=100, ge=1, description="regions of an image that are read")
    mask_words: float = Field(default=0.15, ge=0, le=1, description="share of a sentence's words masked, 80/10/10")
    mask_tags: float = Field(default=0.15, ge=0, le=1, description="RT: share of the tags' words masked, 80/10/10")
    mask_regions: float = Field(default=0.15, ge=0, le=1, description="RT: share of regions masked, 90% of them zeroed")
    mask_linked: float = Field(
        default=0.15, ge=0, le=1, description="RN: share of linked phrases or regions masked, times their similarity"
    )
    rn_masking: Literal["linked", "uniform"] = Field(
        default="linked",
        description="linked: linked phrases or linked regions, never both in one row, the paper's; uniform: any word, "
        "and linked regions beside, as the released code's final configuration",
    )
    mrfr: Literal["l2", "smooth_l1"] | None = Field(
        default=None, description="RT's regression of fixed features: l2 the paper's, smooth_l1 the released code's"
    )
    mrfr_target: Literal["feature", "seen"] = Field(
        default="feature",
        description="what MRFR regresses: feature, what was masked; seen, what the stream was shown instead, as the "
        "released code does, which reads its target after masking: zeros for 90% of the regions, so that little is "
        "learnt of it",
    )
    region_mean: Literal["masked", "slots"] = Field(
        default="masked",
        description="what MRC and MRFR are means over: masked, the masked regions; slots, all max_regions places of "
        "every row, empty ones too, times 6.67 (1 / 0.15), as the released code does: the fewer regions, the less",
    )
    rows: Literal["paper", "released"] = Field(
        default="paper",
        description="paper: MRC and MRFR in RT alone, one masked row of IS for MLM and ITM. released: as in that code "
        "RN's rows regress features too; IS reads a retrieved sentence with words and regions masked for MLM, MRC and "
        "MRFR, and apart from it a pair with nothing masked for ITM",
    )
    task_weights: dict[Literal["rt", "rn", "is", "itm"], float] = Field(
        default_factory=dict,
        description="factor on a task's terms (is: without itm), 1 where it is not named. Stands in for the ratios of "
        "the released BookCorpus run, which say how many of the steps each task gets",
    )
    itm_weight: Literal["pair", "batch_mean", "none"] = Field(
        default="pair",
        description="pair: each pair's loss times its own p(match), the paper's; batch_mean: the words' losses, tags "
        "included, times the batch's mean p(match), p-MRTC and regions unweighted, as the released code does; none",
    )
    weigh_itm: bool = Field(
        default=True,
        description="weigh ITM's retrieved pairs too, by their own p(match): L_IS holds ITM in the paper's formula, "
        "and the released code does so. Where the head still knows nothing when the weights begin, it then learns that "
        "nothing matches, which takes RN and IS away with it",
    )
    itm_from_epoch: float = Field(default=1.0, ge=0, description="passes over the data before the weights apply: m")

    @field_validator("objectives")
    @classmethod
    def _each_once(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if len(set(objectives)) < len(objectives):
            raise ValueError(f"each objective once, not {', '.join(objectives)}")
        return objectives

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.features is None and self.mrfr is not None:
            raise ValueError("mrfr regresses fixed features: give features=PATH, or mrfr=null where a tower makes them")
        if self.features is None and self.feature_labels is not None:
            raise ValueError("feature_labels are of fixed features: give features=PATH too")
        if self.features is not None and self.needs_corpus and self.corpus is None:
            raise ValueError("with fixed features the corpus is made beforehand: give corpus=PATH, or objectives=[rt]")
        if self.corpus is not None and (self.pool or self.aligned is not None):
            raise ValueError("corpus was made with its own pool and aligned share; leave pool and aligned out")
        if self.rows == "released" and self.roi.mask_pixels:
            raise ValueError("rows=released masks features, not pixels: leave roi.mask_pixels false, or rows=paper")
        if any(weight < 0 for weight in self.task_weights.values()):
            raise ValueError(f"task_weights {self.task_weights}: a factor is not negative")
        if self.max_words > self.stream.positions:
            raise ValueError(f"max_words {self.max_words} is more than stream.positions {self.stream.positions}")
        return self

    @property
    def needs_corpus(self) -> bool:
        """Whether sentences are read."""
        return "rn" in self.objectives or "is" in self.objectives

    def masking(self) -> Masking:
        """The shares in one."""
        return Masking(
            words=self.mask_words,
            tags=self.mask_tags,
            regions=self.mask_regions,
            linked=self.mask_linked,
            linked_only=self.rn_masking == "linked",
        )


TINY = MuvlaConfig(
    **TINY_RUN,
    data=("shapes:pairs",),
    stream=StreamConfig(width=128, layers=2, heads=4, dropout=0.0, positions=32, init_std=0.08),
    vocabulary=WordPieceConfig(size=200, alphabet=1000),
    max_words=32,
    max_regions=4,
    weigh_itm=False,
    roi=RoiConfig(strides=(16, 32), classify=True),
    mask_linked=0.5,
)

_PAPER = published(MuvlaConfig, values.ABOUT_PAPER, values.PAPER)
_PAPER_CODE = published(_PAPER, values.ABOUT_CODE, values.CODE)
PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(
        TINY,
        ABOUT_TINY + " OUR ADAPTATION: a tower is trained along.",
        {
            "weigh_itm": "ours: three epochs; at the end of the first, ITM knows nothing yet",
            "mask_linked": "ours: a scene has one to three regions, 15% of those linked would be one in four images",
        },
    ),
    "paper": _PAPER,
    "paper_code": _PAPER_CODE,
    "paper_code_bc": published(_PAPER_CODE, values.ABOUT_CODE_BC, values.CODE_BC),
}


class Muvla(BaseRecipe):
    """Regions, their tags, and sentences that were never paired with the image.

    Args:
        assets: the vocabulary (``words``), the tags (``tags``) and where the corpus lies (``corpus``), once known.
    """

    name = "muvla"
    Config = MuvlaConfig
    presets: Mapping[str, Any] = configs(PRESETS)
    described = PRESETS
    needs: frozenset[Part] = frozenset({"image", "regions"})

    def __init__(self, assets: Mapping[str, bytes] | None = None) -> None:
        self.assets = dict(assets or {})
        self._batcher: tuple[MuvlaConfig, Batcher] | None = None
        self._vocabulary: Vocabulary | None = None

    def __getstate__(self) -> dict[str, Any]:
        # What is opened is opened again where it is needed.
        return self.__dict__ | {"_batcher": None, "_vocabulary": None}

    def needs_of(self, config: Any) -> frozenset[Part]:
        """Images and regions; images alone where the regions come with fixed features."""
        return self.needs if config.features is None else frozenset({"image"})

    def learn_assets(self, config: Any, data: Mixture) -> dict[str, bytes]:
        """The vocabulary of words, the tags that regions are classified by, and where the corpus lies."""
        corpus = find_corpus(config, data.sources) if config.needs_corpus else None
        tags, texts = tags_of(config, data.sources, corpus)
        assets = {"words": _words(config, [*tags, *texts]), "tags": json.dumps(tags, ensure_ascii=False).encode()}
        return assets if corpus is None else assets | {"corpus": str(corpus.path.resolve()).encode()}

    def with_assets(self, assets: Mapping[str, bytes]) -> Muvla:
        """The recipe that knows its words and tags."""
        return Muvla(assets)

    @property
    def vocabulary(self) -> Vocabulary:
        """The words."""
        assert "words" in self.assets, "mu-VLA is built after its assets are known"
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(self.assets["words"])
        return self._vocabulary

    @property
    def tags(self) -> dict[str, int]:
        """Class of a region by its tag."""
        return {tag: number for number, tag in enumerate(json.loads(self.assets["tags"]))}

    def build(self, config: Any, classes: Sequence[str]) -> RegionTextModel:
        """A fresh model; on BERT's weights where ``bert`` names a folder that is here."""
        visual = None
        if config.features is None:
            side = config.visual.image_size
            tower = build_visual(config.visual)
            visual = RegionTower(tower, strides=config.roi.strides, cells=config.roi.cells, image_size=side)
        model = RegionTextModel(
            config.stream,
            objectives=config.objectives,
            words=self.vocabulary.size,
            tags=len(self.tags),
            visual=visual,
            feature_width=config.feature_width,
            regress=config.mrfr is not None,
            regress_seen=config.mrfr_target == "seen",
            released_rows=config.rows == "released",
            image_token=config.roi.image_token,
            mask_pixels=config.roi.mask_pixels,
            classify=config.roi.classify,
        )
        # ``learn_assets`` has refused a folder that is not there; a checkpoint needs none.
        if config.bert is not None and Path(config.bert).expanduser().is_dir():
            load_bert(model, Path(config.bert).expanduser())
        return model

    def collate(self, config: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Regions, and each objective's words and masks."""
        if self._batcher is None or self._batcher[0] != config:
            self._batcher = (config, self._make_batcher(config))
        return self._batcher[1](samples)

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """The sum over the objectives, and every term by name."""
        images_BCHW = self.images(batch, config) if "images_BCHW" in batch else None
        return muvla_loss(
            model(batch, images_BCHW),
            itm_weight=config.itm_weight,
            weigh_itm=config.weigh_itm,
            weighted=batch["epoch"] >= config.itm_from_epoch,
            mrfr=config.mrfr,
            slots=len(batch["valid_BR"]) * config.max_regions if config.region_mean == "slots" else None,
            task_weights=config.task_weights,
        )

    def export(self, model: torch.nn.Module, config: Any, classes: Sequence[str]) -> Backbone:
        """The tower, where there is one, and the matching of images with sentences, where IS was trained."""
        assert isinstance(model, RegionTextModel), "mu-VLA trains a RegionTextModel"
        roi = f", roi {'+'.join(map(str, config.roi.strides))} cells={config.roi.cells}, an adaptation of mu-VLA"
        return export_matcher(
            model,
            tower=model.visual.tower if model.visual is not None else None,
            match=Matcher(model, self.vocabulary, config) if "is" in config.objectives else None,
            described=f"{config.stream.identity()} {self.vocabulary.name}{roi if model.visual is not None else ''}",
            model_id=self.name,
            recipe=self.name,
            preprocess=config.preprocess(),
            pretrain_data=config.data,
        )

    def _make_batcher(self, config: MuvlaConfig) -> Batcher:
        corpus = corpus_of(config, self.assets) if config.needs_corpus else None
        return Batcher(
            self.vocabulary,
            self.tags,
            objectives=config.objectives,
            masking=config.masking(),
            corpus=corpus,
            k=config.k,
            longest=config.max_words,
            most_regions=config.max_regions,
            features=features_of(config, corpus) if config.features is not None else None,
            released_rows=config.rows == "released",
        )


def _words(config: MuvlaConfig, texts: Sequence[str]) -> bytes:
    """The vocabulary: BERT's, a file's, or one learnt from sentences and tags."""
    words = config.vocabulary
    file = words.file
    if config.bert is not None and file is None:
        folder = Path(config.bert).expanduser()
        found = [folder / name for name in ("tokenizer.json", "vocab.txt") if (folder / name).is_file()]
        if not found:
            raise UserError(f"bert {folder}: no folder with a vocab.txt or tokenizer.json; give --set bert=FOLDER")
        file = str(found[0])
    if file is not None:
        return read_wordpiece(file, lower=words.lower, strip_accents=words.strip_accents)
    return train_wordpiece(
        texts, words.size, lower=words.lower, strip_accents=words.strip_accents, alphabet=words.alphabet
    )


RECIPE = Muvla()
