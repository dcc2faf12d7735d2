"""mu-VLA's settings."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from vlbench.core.config import Config
from vlbench.data.wordpiece import WordPieceConfig
from vlbench.models.single_stream import StreamConfig
from vlbench.recipes.muvla.batch import Masking, Objective
from vlbench.train.config import PretrainConfig


class RoiConfig(Config):
    """Our adaptation: how region features are taken from a trainable tower."""

    strides: tuple[int, ...] = Field(default=(8, 16, 32), min_length=1, description="maps that a region is read from")
    cells: int = Field(default=2, ge=1, description="RoIAlign's bins each way, which are then averaged")
    image_token: bool = Field(
        default=True, description="the tower's pooled feature is one more region, of all the image"
    )
    grid: int | None = Field(
        default=None,
        ge=1,
        description="no boxes: the tower's last map, averaged over grid x grid cells, stands in for the regions. Cells "
        "have no tags: RN masks words of phrases alone, RT and classify are not to be had",
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
        default=("rt", "rn", "is"), description="the levels trained; none: what roi.classify asks for alone"
    )
    corpus: str | None = Field(
        default=None, description="a weakly aligned corpus; None: made of data and pool on first use"
    )
    pool: tuple[str, ...] = Field(
        default=(),
        description="where the corpus is made: text files or data specs whose sentences are retrieved from; none: the "
        "captions of the data themselves, shuffled, which an image may get its own one back from: see exclude_own",
    )
    encoder: str = Field(
        default="tfidf",
        description="where the corpus is made: tfidf, minilm, or a Sentence-Transformers name or folder",
    )
    exclude_own: bool = Field(
        default=False,
        description="where the corpus is made: never give an image its own caption, nor another that says the same; "
        "the released code may give it",
    )
    k: int = Field(default=5, ge=1, description="sentences used of each image, the best first")
    aligned: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="where the corpus is made: share of the images whose own caption comes first, the others having "
        "none of their own; None: what is retrieved, which may be an own caption unless exclude_own",
    )
    features: str | None = Field(
        default=None, description="fixed region features, the paper's mode; None: from a trainable tower (ours)"
    )
    boxes: str | None = Field(
        default=None,
        description="ours: boxes and tags of the images' regions, as features has them (`vlbench data regions`), at "
        "which the tower is read; None: the data's own",
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
    rn_masking: Literal["linked", "uniform", "phrases"] = Field(
        default="linked",
        description="linked: linked phrases or linked regions, never both in one row, the paper's; uniform: any word, "
        "and linked regions beside, as the released code's final configuration; phrases: as uniform, but of the words "
        "only those that occur in a linked phrase of the sentence, wherever they stand, and all where there is none, "
        "as its ablation of RN alone, which knows the sentence's other noun phrases too",
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
        if self.boxes is not None and (self.features is not None or self.augment.rand_augment is not None):
            raise ValueError(
                "boxes are where a tower is read, and stay there: give neither features nor augment.rand_augment "
                "(which turns and shifts images)"
            )
        if self.features is not None and self.needs_corpus and self.corpus is None:
            raise ValueError("with fixed features the corpus is made beforehand: give corpus=PATH, or objectives=[rt]")
        if not self.objectives and (self.features is not None or not self.roi.classify or self.bert is not None):
            raise ValueError(
                "no objectives train a tower to name regions' tags and nothing else: give roi.classify=true, neither "
                "features nor bert, or objectives, for instance objectives=[rt]"
            )
        if self.corpus is not None and (self.pool or self.aligned is not None):
            raise ValueError("corpus was made with its own pool and aligned share; leave pool and aligned out")
        if self.corpus is not None and (self.exclude_own or self.encoder != "tfidf"):
            raise ValueError(
                "corpus was made with its own encoder and rule for own captions; leave encoder and exclude_own out "
                "(`vlbench data weakly-align` has both)"
            )
        if self.rows == "released" and self.roi.mask_pixels:
            raise ValueError("rows=released masks features, not pixels: leave roi.mask_pixels false, or rows=paper")
        if any(weight < 0 for weight in self.task_weights.values()):
            raise ValueError(f"task_weights {self.task_weights}: a factor is not negative")
        if self.max_words > self.stream.positions:
            raise ValueError(f"max_words {self.max_words} is more than stream.positions {self.stream.positions}")
        return self

    @model_validator(mode="after")
    def _cells_have_what_is_read(self) -> Self:
        if self.roi.grid is None:
            return self
        if self.features is not None or self.boxes is not None:
            raise ValueError("roi.grid reads cells of a tower's map and no boxes: leave features and boxes out")
        if "rt" in self.objectives or self.roi.classify or self.rows == "released" or self.roi.mask_pixels:
            raise ValueError(
                "roi.grid: its cells have no tags, which rt, roi.classify and rows=released read, nor masked boxes for "
                "roi.mask_pixels: give objectives=[rn,is], roi.classify=false, rows=paper, roi.mask_pixels=false"
            )
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
            phrase_words=self.rn_masking == "phrases",
        )
