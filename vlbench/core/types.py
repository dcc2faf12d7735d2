"""The words of vlbench. Read this file first.

Data flow::

    Source ──Example──► Recipe ──► checkpoint ──► Backbone ──Features──► Adapter.predict ──► Rows
                                                      Rows ──► Adapter.score ──► Estimate, in the tables
                                                      Rows ──► Adapter.outcomes ──► paired tests

Tensor names end in a shape suffix: B batch, C channels or classes, H height, W width, N tokens or examples,
D width of the pooled feature, E width of the joint image-text space.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

from pydantic import Field

from vlbench.core.config import Config

if TYPE_CHECKING:  # never at run time: this module must load without torch
    import numpy as np
    import torch

    from vlbench.core.cards import ModelCard

RESULT_SCHEMA_VERSION: Final = 1

Part: TypeAlias = Literal["image", "text", "label", "labels", "regions", "question", "pair", "hypothesis", "expression"]
"""What an example may carry. ``labels`` is ``extra["labels"]``: int8 by class, 1 present, 0 absent, -1 not counted.

The last four are tasks on an image and a sentence (the readers ``vqa``, ``nlvr2``, ``snli_ve``, ``refcoco``). Sentences
are no captions there, and labels no classes of an image: such a source provides neither ``text`` nor ``label``."""

Provides: TypeAlias = Literal["pooled", "embed", "tokens", "maps", "text", "captions", "match"]
"""What a backbone may offer. The first four: see Features. ``text``: it embeds texts; ``captions``: it describes images
(``describe``); ``match``: it scores image-text pairs together (``match``), as a single-stream model does."""


# ------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True, slots=True)
class Region:
    """One object in an image: its category, box and mask."""

    category: str
    box_xyxy: tuple[float, float, float, float]
    """Corners in pixels of the stored image: left, top, right, bottom."""
    segmentation: Any = None
    """COCO's own forms: a list of polygons, or a run-length encoding ``{"size": [H, W], "counts": ...}``."""
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Example:
    """One entry of a data set. Every part but ``id`` may be absent.

    The image stays encoded until a transform needs its pixels: its bytes are its identity in the feature store.
    """

    id: str
    """Stable and unique within its source and split: from the data set, never a row number."""
    image: bytes | None = None
    texts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Captions by language code; a source that does not say is ``"en"``."""
    label: int | None = None
    """Index into the source's ``classes``."""
    regions: tuple[Region, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Source(Protocol):
    """One split of one data set, with random access. Opened by ``vlbench.data.sources.open_source``."""

    spec: str
    split: str
    classes: tuple[str, ...] | None
    """Class names by label, or None for data without labels."""
    templates: tuple[str, ...] | None
    """Prompt templates that lie beside the data (``"a photo of a {}."``), or None."""
    provides: frozenset[Part]

    def __len__(self) -> int:
        """The number of entries, broken ones included."""

    def __getitem__(self, index: int) -> Example:
        """The entry at ``index``. Raises BadExample where it cannot be read."""

    def ids(self) -> Sequence[str]:
        """All ids in order, without reading an image."""

    def labels(self) -> Sequence[int | None] | None:
        """All labels in order without reading an image, or None for data without labels."""


# ---------------------------------------------------------------------------------------------- backbones


@dataclass(frozen=True, slots=True)
class Features:
    """What a backbone says of a batch of images. Parts that it does not provide are None."""

    pooled_BD: torch.Tensor
    """The pooled feature that probes read. For CLIP-like ViTs: before the projection, as the paper probes it."""
    embed_BE: torch.Tensor | None = None
    """The embedding in the joint image-text space, not normalised."""
    tokens_BND: torch.Tensor | None = None
    """Patch or grid tokens, without class tokens."""
    maps: Mapping[int, torch.Tensor] | None = None
    """Feature maps ``(B, C, H, W)`` by stride."""


@runtime_checkable
class Backbone(Protocol):
    """The whole contract of a model to be measured.

    ``card`` says what it is and how its images must be prepared; ``weights_hash`` is the fingerprint of its weights,
    so that two files with the same numbers are one model.
    """

    card: ModelCard
    weights_hash: str

    def encode_image(self, images_BCHW: torch.Tensor) -> Features:
        """Features of preprocessed float images. No gradient, evaluation mode."""

    def encode_text(self, texts: Sequence[str]) -> torch.Tensor:
        """``text_BE``: embeddings in the joint space, not normalised. Raises UserError where there is no text tower."""


# ------------------------------------------------------------------------------------------------ recipes


@dataclass(slots=True)
class Sample:
    """One augmented training example, before batching."""

    image_CHW: torch.Tensor
    text: str | None
    label: int
    """-1 where the example has no label."""
    flipped: bool = False
    """Whether the image was mirrored, for recipes whose text must follow."""
    id: str = ""
    """The example's id, for recipes that keep something else by it."""
    regions: tuple[Region, ...] = ()
    """What of the example's regions the crop has left, boxes in pixels of ``image_CHW``; for recipes that need them."""
    categories: frozenset[str] = frozenset()
    """Of all the example's regions, whether the crop has left them or not; for the same recipes."""
    seed: int = 0
    """For what ``collate`` draws (masked words): a function of seed and position alone, as the image is."""


class Recipe(Protocol):
    """One way of pretraining: one paper, one module. ``config`` is always an instance of the recipe's own Config."""

    name: str
    presets: Mapping[str, Any]
    """Config by preset name; every recipe has ``tiny`` and ``paper``."""
    needs: frozenset[Part]
    """The parts an example must have. A missing ``text`` may be made from the label by a prompt template."""

    def needs_of(self, config: Any) -> frozenset[Part]:
        """``needs`` under these settings: a variant may do without texts, say."""

    def learn_assets(self, config: Any, data: Any) -> dict[str, bytes]:
        """What must be made from the training data before training: a vocabulary, say. Usually nothing.

        Called once, by the first rank; ``data`` is a ``data.stream.Mixture``. The same data give the same bytes. They
        are kept in the checkpoint.
        """

    def with_assets(self, assets: Mapping[str, bytes]) -> Recipe:
        """The recipe that has its assets: its other methods are called on what this returns."""

    def build(self, config: Any, classes: Sequence[str]) -> torch.nn.Module:
        """A freshly initialised model. The caller has seeded torch."""

    def collate(self, config: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """A batch from samples, tokenised; called in loader processes."""

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """``{"loss": scalar, ...}``; further scalars are logged. Exact over ranks: see ``train/losses.py``.

        ``batch`` is what ``collate`` made and ``epoch``, a scalar: passes over the data before this step.
        """

    def after_step(self, model: torch.nn.Module) -> None:
        """What must hold after every optimizer step: CLIP's clamp of the logit scale, say. Usually nothing."""

    def export(self, model: torch.nn.Module, config: Any, classes: Sequence[str]) -> Backbone:
        """The backbone to be measured, sharing the model's weights."""


# ----------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Rows:
    """Per-example predictions: one column each, all of one length, stored as Parquet.

    ``meta`` holds what belongs to the prediction as a whole (a chosen hyper-parameter, say); it must be JSON.
    """

    columns: Mapping[str, Any]
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()))) if self.columns else 0

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns)

    def __getitem__(self, name: str) -> Any:
        return self.columns[name]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """One metric as values per unit, so that two models can be compared on the same units.

    The metric is ``sum(weights * values) / sum(weights)``; where there are ``strata``, the plain mean of their means.
    """

    ids: Sequence[str]
    """What a value belongs to (an image, a caption); the same in both models' outcomes."""
    values: np.ndarray
    clusters: Sequence[str]
    """The independent sampling unit behind each value (the image behind a caption)."""
    binary: bool
    """Right or wrong only: exact McNemar and Wilson apply where each cluster has one value."""
    weights: np.ndarray | None = None
    strata: np.ndarray | None = None
    """The group each value is averaged in before the groups are averaged (a class, for mean per-class recall); never
    together with weights. Fixed weights of one over the class's size give the same number but not the same error: how
    many examples of a class a sample holds would move the metric, so that the spread between classes would count as
    sampling error."""
    pseudo: bool = False
    """Jackknife pseudo-values of a metric that is no mean (``stats.ranked``): one alone may lie outside [0, 1]."""


class Estimate(Config):
    """A number with its uncertainty. ``value``, ``lo`` and ``hi`` are fractions (0.62), not percentages."""

    value: float = Field(allow_inf_nan=False)
    lo: float = Field(allow_inf_nan=False, description="lower end of the 95% interval")
    hi: float = Field(allow_inf_nan=False, description="upper end of the 95% interval")
    se: float = Field(allow_inf_nan=False, ge=0, description="standard error")
    n: int = Field(ge=1, description="values averaged")
    n_clusters: int = Field(ge=1, description="independent units among them")
    method: str = Field(description="how the interval was made: 'wilson', 'cluster bootstrap B=2000', ...")


BEST_ON_TEST_GAP = "best_on_test_gap"
"""The estimate by which a number would be higher if something, the epoch say, were chosen by the test set itself."""


class Adapter(Protocol):
    """One protocol of measurement. ``predict`` needs the model; the rest is numpy and can run for ever after.

    ``config`` is always an instance of the adapter's own Config. Four more attributes may be there: ``peer``, a word
    for whose own protocol it is (tables mark it), ``reads_prompts(config)``, whether class names and templates decide
    the number, where that depends on the settings, ``lack(config)``, which library these settings want and this
    machine has not, as a line that says how to get it, or None, and ``shown(rows)``, lines of the predictions
    themselves for a person to read under the number.
    """

    name: str
    Config: type[Any]
    metric: str
    """The headline where no task card names one: a user's own data."""
    needs: frozenset[Part]
    """What the data must carry."""
    requires: frozenset[Provides]
    """What the backbone must provide."""
    splits: tuple[str, ...]
    """The splits it reads; the last is the one it reports."""

    def predict(self, encoder: Any, data: Any, config: Any) -> Rows:
        """One row per test example, from an ``adapters.encoder.Encoder`` and a ``data.taskdata.TaskData``."""

    def outcomes(self, rows: Rows, config: Any) -> dict[str, Outcomes]:
        """Every metric as values per unit."""

    def score(self, rows: Rows, config: Any) -> dict[str, Estimate]:
        """Every metric with its interval."""


class ModelRef(Config):
    """Which model a result is about."""

    name: str
    spec: str = Field(description="what was asked for, e.g. 'runs/a/ckpt.pt' or 'timm:resnet50'")
    weights_hash: str
    backbone_fingerprint: str = Field(description="weights, architecture, chosen feature and preprocessing together")
    recipe: str | None = None
    arch: str | None = None
    params: int | None = Field(default=None, description="parameters of the image tower")
    pretrain_data: tuple[str, ...] | None = Field(default=None, description="None: not disclosed")
    images_seen: int | None = None
    seed: int | None = None
    random: bool = Field(default=False, description="random weights: a baseline, not a trained model")


class DataRef(Config):
    """Which data a result is about."""

    spec: str
    split: str
    n: int = Field(description="examples reported on")
    fingerprint: str = Field(description="content of the images and annotations of every split that was read")


class ExamplesRef(Config):
    """The per-example rows behind a result."""

    file: str = Field(description="file name beside the result")
    sha256: str
    rows: int


class Result(Config):
    """One model on one task, as stored in ``results/<model>/<task>@v<version>.json``."""

    schema_version: Literal[1] = RESULT_SCHEMA_VERSION
    model: ModelRef
    task: str
    task_version: int
    task_fingerprint: str
    adapter: str
    config: dict[str, Any] = Field(description="the adapter's resolved settings")
    metric: str = Field(description="the headline metric, a key of estimates")
    chance: float | None = None
    estimates: dict[str, Estimate]
    chosen: dict[str, Any] = Field(default_factory=dict, description="hyper-parameters chosen on held-out data")
    data: DataRef
    examples: ExamplesRef
    settings: dict[str, Any] = Field(description="precision, batch size, device, threads")
    versions: dict[str, str]
    commit: str | None = None
    seconds: dict[str, float] = Field(description="wall time by phase")
    images_per_second: float | None = Field(default=None, description="None where every feature came from the store")
    peak_memory_mib: float | None = None
    created: str = Field(description="UTC, ISO 8601")
