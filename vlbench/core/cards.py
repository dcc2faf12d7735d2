"""Cards: what is measured (``tasks/``) and what it is compared with (``reference_models/``), as YAML.

A task card's name is its path: ``tasks/linear/cifar10.yaml`` is ``linear/cifar10``. What all tasks on one data set
share is written once, in ``tasks/datasets/<name>.yaml``; a task card that names its ``dataset`` takes from there every
key that it leaves out. Reading is strict: a malformed card is an error that names file and key, never a task that
silently is not there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator

from vlbench.core.config import Config, parse
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.names import unknown
from vlbench.core.paths import card_dir
from vlbench.core.types import Provides


class Preprocess(Config):
    """How an image becomes a tensor at evaluation. It travels with the weights."""

    image_size: tuple[int, int] = Field(description="height, width of the tensor")
    resize: Literal["shortest", "squash"] = Field(
        default="shortest", description="shortest: keep the aspect, then crop the centre; squash: to a rectangle"
    )
    resize_to: int | None = Field(
        default=None, description="shortest side (or both sides, for squash) after the resize; default: image_size"
    )
    interpolation: Literal["bilinear", "bicubic", "nearest", "lanczos"] = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value


class TextSpec(Config):
    """What the text tower reads."""

    tokenizer: str = Field(description="'open_clip' (its byte-level BPE), 'open_clip:<model>', or a loader's own name")
    context_length: int


class Published(Config):
    """A number that somebody printed."""

    task: str
    metric: str
    value: float = Field(description="as a fraction, like every value here")
    source: str = Field(description="where it was read: paper and table, or repository and file")
    note: str = ""
    comparable: bool = Field(
        default=True, description="false: printed for another protocol, split or feature; shown beside ours, not judged"
    )


class ModelCard(Config):
    """A backbone: what it is, where its weights are, how its images are prepared."""

    id: str
    loader: str = Field(description="key of core.catalog.LOADERS")
    arch: str = Field(description="the loader's own name of the architecture")
    recipe: str | None = None
    weights: str | None = Field(default=None, description="the loader's tag, a hub name or a URL")
    sha256: str | None = Field(default=None, description="of the weights file, where it is known")
    config: dict[str, Any] | None = Field(
        default=None,
        description="of a model on the hub: its config.json, as far as it is not the family's default; a fresh "
        "initialisation then needs no hub",
    )
    preprocess: Preprocess
    text: TextSpec | None = None
    provides: frozenset[Provides] = frozenset({"pooled"})
    feature: str = Field(default="pooled", description="which feature the probes read, in words")
    pretrain_data: tuple[str, ...] | None = Field(default=None, description="None: not disclosed")
    images_seen: int | None = None
    params: int | None = Field(default=None, description="parameters of the image tower")
    licence: str | None = None
    seed: int | None = None
    random: bool = False
    published: tuple[Published, ...] = ()


class Prompts(Config):
    """Class names and templates of a zero-shot task; files under ``tasks/prompts``."""

    templates: str | None = Field(
        default=None, description="file of templates, one a line; None: those beside the data, else the default file"
    )
    classnames: str | None = Field(
        default=None,
        description="file of class names: one a line by label, or 'own name<TAB>class name' for data whose own class "
        "names are folder names or codes; None: the data set's own",
    )


class DatasetCard(Config):
    """One data set: where it may lie, how big it is, how it is scored. Tasks on it are cards of their own."""

    name: str
    title: str
    data: tuple[str, ...] = Field(description="data specs to try in order; relative paths lie under the data root")
    splits: dict[str, str] = Field(
        default_factory=dict,
        description="role (train, val, test) → the data's own split, where they differ; {test: all}: data that are not "
        "divided are all test",
    )
    metric: str | None = Field(default=None, description="the headline of its tasks")
    chance: float | None = Field(default=None, description="what a model that knows nothing scores")
    prompts: Prompts = Prompts()
    how_to_get: str = Field(default="", description="one line for a user who lacks the data")
    source: str = Field(default="", description="who made it, and where split and metric come from")
    sizes: dict[Literal["train", "val", "test", "testA", "testB"], Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="published number of examples by role"
    )
    n_classes: int | None = Field(default=None, ge=2)


class TaskCard(Config):
    """What is measured: data, protocol, metric. The fingerprint covers what moves numbers, prompt files included."""

    name: str
    version: int = Field(ge=1, description="raised by every change that moves numbers")
    title: str
    adapter: str
    dataset: str | None = Field(default=None, description="the data set's card, which gives every key left out here")
    train_from: str | None = Field(
        default=None,
        description="another data set's card, whose training images are learnt from; classes are matched by name, and "
        "answers are the test set's own classes",
    )
    data: tuple[str, ...] = Field(description="data specs to try in order; relative paths lie under the data root")
    splits: dict[str, str] = Field(
        default_factory=dict, description="the adapter's split → the data set's, where they differ"
    )
    metric: str
    chance: float | None = Field(default=None, description="what a model that knows nothing scores")
    protocol: dict[str, Any] = Field(default_factory=dict, description="the adapter's settings, where not the default")
    prompts: Prompts = Prompts()
    how_to_get: str = Field(default="", description="one line for a user who lacks the data")
    source: str = Field(default="", description="where protocol and metric come from")

    @property
    def kind(self) -> str:
        """The first part of the name: ``linear`` of ``linear/cifar10``."""
        return self.name.partition("/")[0]

    @property
    def expected_sizes(self) -> dict[str, int]:
        """The published number of examples by role (``train``, ``test``, …), where the data set's card has it."""
        sizes = dataset_cards()[self.dataset].sizes if self.dataset is not None else {}
        return dict(sizes.items())

    @property
    def expected_classes(self) -> int | None:
        """The published number of classes, where the data set's card has it."""
        return dataset_cards()[self.dataset].n_classes if self.dataset is not None else None

    def fingerprint(self) -> str:
        """Changes with anything that can move a number: protocol, metric, splits, prompts.

        Where the data may lie is left out: their content has a fingerprint of its own, in every result. So is the name
        of the data set's card, whose keys are in the task card by now.
        """
        words = self.model_dump(mode="json", exclude={"title", "how_to_get", "source", "data", "dataset"})
        if self.train_from is None:
            del words["train_from"]  # cards were written before there was this key
        for role in ("templates", "classnames"):
            name = getattr(self.prompts, role)
            words["prompts"][role] = list(prompt_lines(name)) if name else None
        return fingerprint(words)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read safely. Raises UserError naming file and line."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_SAFE_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a mapping of keys to values")
    return values


def read_task_card(path: Path, name: str) -> TaskCard:
    """The card in ``path`` under ``name``, with every key that it leaves out from its data set's card."""
    values = read_yaml(path)
    dataset = values.get("dataset")
    if dataset is not None:
        if not isinstance(dataset, str) or dataset not in dataset_cards():
            raise UserError(f"{path}: {unknown('dataset', str(dataset), dataset_cards())}")
        values = _inherited(dataset_cards()[dataset], name) | values
    learnt = values.get("train_from")
    if learnt is not None and learnt not in dataset_cards():
        raise UserError(f"{path}: train_from: {unknown('dataset', str(learnt), dataset_cards())}")
    return parse(TaskCard, {"name": name, **values}, where=str(path))


def _inherited(dataset: DatasetCard, task: str) -> dict[str, Any]:
    """The keys of a task card that a data set's card can give."""
    kind = task.partition("/")[0]
    values = {key: getattr(dataset, key) for key in _INHERITED if getattr(dataset, key) is not None}
    return values | {"title": f"{dataset.title}, {_KIND_TITLES.get(kind, kind)}"}


@cache
def dataset_cards() -> dict[str, DatasetCard]:
    """Every data set's card by name."""
    cards = {}
    for path in sorted((card_dir("tasks") / "datasets").glob("*.yaml")):
        cards[path.stem] = parse(DatasetCard, {"name": path.stem, **read_yaml(path)}, where=str(path))
    return cards


@cache
def task_cards() -> dict[str, TaskCard]:
    """Every shipped task card by name."""
    root = card_dir("tasks")
    special = {"datasets", "prompts", "suites"}
    cards = {}
    for path in sorted(root.rglob("*.yaml")):
        relative = path.relative_to(root)
        if relative.parts[0] not in special:
            name = relative.with_suffix("").as_posix()
            cards[name] = read_task_card(path, name)
    return cards


@cache
def suites() -> dict[str, tuple[str, ...]]:
    """Suite name → the task names in it."""
    found = {}
    for path in sorted((card_dir("tasks") / "suites").glob("*.yaml")):
        values = read_yaml(path)
        tasks = values.get("tasks")
        if not isinstance(tasks, list) or set(values) - {"title", "tasks"}:
            raise UserError(f"{path}: a suite has the keys 'title' and 'tasks' (a list of task names)")
        for task in tasks:
            if task not in task_cards():
                raise UserError(f"{path}: {unknown('task', str(task), task_cards())}")
        found[path.stem] = tuple(tasks)
    return found


@cache
def model_cards() -> dict[str, ModelCard]:
    """Every shipped reference card by id."""
    cards = {}
    for path in sorted(card_dir("reference_models").rglob("*.yaml")):
        cards[path.stem] = parse(ModelCard, {"id": path.stem, **read_yaml(path)}, where=str(path))
    return cards


def prompt_lines(name: str) -> tuple[str, ...]:
    """The lines of ``tasks/prompts/<name>.txt``, blank lines and ``#`` comments left out."""
    path = card_dir("tasks") / "prompts" / f"{name}.txt"
    if not path.is_file():
        known = [other.stem for other in path.parent.glob("*.txt")]
        raise UserError(unknown("prompt file", name, known))
    # Only "\n" ends a line: str.splitlines would also cut at U+2028 and make two prompts of one.
    lines = (line.strip() for line in path.read_text(encoding="utf-8").split("\n"))
    return tuple(line for line in lines if line and not line.startswith("#"))


_INHERITED = ("data", "splits", "metric", "chance", "prompts", "how_to_get")
_KIND_TITLES = {
    "captioning": "captions",
    "zeroshot": "zero-shot",
    "linear": "linear probe",
    "knn": "nearest neighbours",
    "fewshot": "few-shot linear probe",
    "elevater_probe": "ELEVATER's linear probe",
    "svm": "linear SVM",
    "retrieval": "both directions",
    "vqa": "answers",
    "nlvr2": "true or false of two images",
    "entailment": "entailment",
    "grounding": "referring expressions",
}
"""What a kind is called in a title that is made."""

# libyaml's loader where PyYAML was built with it (about eight times faster): ``vlbench list`` reads every card.
_SAFE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
