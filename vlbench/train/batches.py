"""From data specs to batches. Position p of the endless stream is the same sample whoever asks for it.

A step reads the positions ``[step * batch_size, (step + 1) * batch_size)``; each part of an accumulated batch, and each
rank of a part, takes its contiguous share. So neither the number of loader processes nor the number of ranks nor
a resume changes what the model sees; with ``order=shards`` the number of ranks does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vlbench.core.errors import BadExample, UserError
from vlbench.core.types import Example, Recipe, Region, Sample
from vlbench.data.images import decode
from vlbench.data.prompting import draw_text
from vlbench.data.shard_order import ByShard, shard_sizes
from vlbench.data.sources import open_source
from vlbench.data.spec import parse_spec
from vlbench.data.stream import BadTally, Mixture
from vlbench.data.transforms import View, augment
from vlbench.train.config import PretrainConfig
from vlbench.train.distributed import Ranks
from vlbench.train.run_config import RunConfig
from vlbench.train.templates import named_templates

Batch: TypeAlias = dict[str, torch.Tensor]
Item: TypeAlias = tuple[Sample, tuple[BadExample, ...]]

_PREFETCH = 4  # batches that each loader process keeps ready
_ALONE = Ranks()
_QUESTIONS = frozenset({"question", "pair", "hypothesis", "expression"})


def open_mixture(recipe: Recipe, config: PretrainConfig, *, here: Ranks = _ALONE) -> Mixture:
    """The training data of a run, checked for what the recipe needs.

    The number of ranks counts for ``order=shards`` only, where each rank has its own.

    Raises:
        UserError: where there are no data, or a source lacks a part, naming the source.
    """
    if not config.data:
        raise UserError(f"pretrain {recipe.name}: this preset has no data of its own; give --data SPEC (once or more)")
    specs = [parse_spec(text) for text in config.data]
    sources = [open_source(spec) for spec in specs]
    needs, learner = recipe.needs_of(config), _learner(recipe, config)
    for source in sources:
        if source.provides & _QUESTIONS:
            raise UserError(f"data {source.spec!r} asks about images; nothing is pretrained on that: leave it out")
        if "label" in needs and not source.classes:
            rest = [f"--data {text}" for text, other in zip(config.data, sources) if other.classes]
            raise UserError(
                f"data {source.spec!r} has no labels, and {learner} learns from labels; leave it out"
                + (f": {' '.join(rest)}" if rest else "")
            )
        if "text" in needs and not source.classes and "text" not in source.provides:
            raise UserError(f"data {source.spec!r} has neither texts nor labels, and {learner} learns from texts")
        if "regions" in needs and "regions" not in source.provides:
            raise UserError(f"data {source.spec!r} has no regions, and {learner} learns from them; leave it out")
    return Mixture(
        sources,
        [spec.weight for spec in specs],
        config.seed,
        block=config.batch_size,
        max_bad=config.max_bad,
        needs=needs,
        by_shard=_by_shard(config, here) if config.order == "shards" else None,
    )


def _by_shard(config: PretrainConfig, here: Ranks) -> ByShard:
    return ByShard(here.world, config.batch_size // config.loads // here.world, config.open_shards)


def _learner(recipe: Recipe, config: PretrainConfig) -> str:
    """What to call the recipe: its name, and the variant's where it is not the recipe's own."""
    field = type(config).model_fields.get("variant")
    variant = getattr(config, "variant", None)
    return f"{recipe.name} (variant {variant})" if field is not None and variant != field.default else recipe.name


def data_identity(config: PretrainConfig, mixture: Mixture) -> list[dict[str, Any]]:
    """What a resumed run must find again of each source, in plain values.

    Ids and labels in their order, which the order of training is an order of. Images are not read: that would take
    as long as an epoch.
    """
    return [
        {
            "spec": source.spec,
            "examples": len(source),
            "classes": _digest(source.classes or ()),
            "ids": _digest(source.ids()),
            "labels": _digest(map(str, source.labels() or ())),
            "templates": _digest(named_templates(config.templates, source.templates)),
            **({"shards": _digest(map(str, shard_sizes(source)))} if config.order == "shards" else {}),
        }
        for source in mixture.sources
    ]


def _digest(words: Iterable[str]) -> str:
    total = hashlib.sha256()
    for word in words:
        encoded = word.encode("utf-8", "surrogatepass")
        total.update(len(encoded).to_bytes(8, "little") + encoded)
    return total.hexdigest()[:16]


class Samples(Dataset[Item | UserError]):
    """The stream as a torch data set: index = position."""

    def __init__(self, recipe: Recipe, config: PretrainConfig, mixture: Mixture) -> None:
        self.recipe = recipe
        self.config = config
        self.mixture = mixture
        self._needs = recipe.needs_of(config)
        self._templates = [named_templates(config.templates, source.templates) for source in mixture.sources]

    def __getitem__(self, position: int) -> Item | UserError:
        """The sample at ``position`` and the bad examples it was reached over.

        An error of the user's comes back as a value: raised in a loader process, it would arrive as a traceback.
        """
        source, _, _ = self.mixture.locate(position)
        try:
            return self.mixture.sample(position, partial(self._make, self._templates[source]))
        except UserError as error:
            return error

    def _make(self, templates: Sequence[str], example: Example, label: int, rng: np.random.Generator) -> Sample:
        assert example.image is not None, "the mixture checks this"
        side = self.config.visual.image_size
        image = decode(example.image, where=example.id)
        image_CHW, view = augment(image, rng, self.config.augment, (side, side))
        text = self._text(templates, example, label, rng) if "text" in self._needs else None
        return Sample(
            image_CHW=image_CHW,
            text=text,
            label=label,
            flipped=view.flipped,
            id=example.id,
            regions=_in_view(example.regions, view) if "regions" in self._needs else (),
            seed=int(rng.integers(2**63)),
        )

    def _text(self, templates: Sequence[str], example: Example, label: int, rng: np.random.Generator) -> str:
        classname = self.mixture.classes[label] if label >= 0 else None
        text = draw_text(example, classname, templates, rng, languages=self.config.languages)
        if not text:
            languages = ", ".join(self.config.languages)
            raise BadExample(f"no text in {languages}", example.id, "and no label to make one of")
        return text


def _in_view(regions: Sequence[Region], view: View) -> tuple[Region, ...]:
    """The regions of which the view shows at least a pixel each way; their masks stay behind."""
    moved = (replace(region, box_xyxy=view.box(region.box_xyxy), segmentation=None) for region in regions)
    return tuple(region for region in moved if _sides(region.box_xyxy) >= 1)


def _sides(box_xyxy: Sequence[float]) -> float:
    return min(box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1])


class Positions(Sampler[list[int]]):
    """The stream positions of one rank, a list for each part of each step."""

    def __init__(self, config: RunConfig, *, start: int, here: Ranks) -> None:
        self._config = config
        self._start = start
        self._here = here

    def __len__(self) -> int:
        return (self._config.steps - self._start) * self._config.loads

    def __iter__(self) -> Iterator[list[int]]:
        part_size = self._config.batch_size // self._config.loads
        share = part_size // self._here.world
        for part in range(self._start * self._config.loads, self._config.steps * self._config.loads):
            first = part * part_size + self._here.rank * share
            yield list(range(first, first + share))


class _Collate:
    """Items to a batch, with the bad examples that were met; it travels to the loader processes."""

    def __init__(self, recipe: Recipe, config: PretrainConfig) -> None:
        self.recipe = recipe
        self.config = config

    def __call__(self, items: Sequence[Item | UserError]) -> tuple[Batch, list[BadExample]] | UserError:
        samples, bad = [], []
        for item in items:
            if isinstance(item, UserError):
                return item
            samples.append(item[0])
            bad.extend(item[1])
        try:
            return self.recipe.collate(self.config, samples), bad
        except UserError as error:
            return error


def batches(
    recipe: Recipe, config: PretrainConfig, mixture: Mixture, *, start: int, here: Ranks, pin: bool
) -> Iterator[Batch]:
    """One rank's batches from step ``start`` on, ``config.loads`` a step. Bad examples go to ``mixture.tally``."""
    return stream(
        Samples(recipe, config, mixture),
        _Collate(recipe, config),
        config,
        tally=mixture.tally,
        start=start,
        here=here,
        pin=pin,
    )


def stream(
    samples: Dataset[Any],
    collate: Callable[[Sequence[Any]], tuple[Batch, list[BadExample]] | UserError],
    config: RunConfig,
    *,
    tally: BadTally,
    start: int,
    here: Ranks,
    pin: bool,
) -> Iterator[Batch]:
    """One rank's batches of ``samples``, which are indexed by stream position, from step ``start`` on.

    An error of the user's comes out of ``collate`` as a value: raised in a loader process, it would arrive as a
    traceback. It is raised here.
    """
    loader: DataLoader[Any] = DataLoader(
        samples,
        batch_sampler=Positions(config, start=start, here=here),
        collate_fn=collate,
        num_workers=config.workers,
        # Forked: a spawned process would import torch and open the data again, about ten seconds each.
        multiprocessing_context="fork" if config.workers else None,
        prefetch_factor=_PREFETCH if config.workers else None,
        pin_memory=pin,
    )
    drawn = config.batch_size // config.loads // here.world
    for collated in loader:
        if isinstance(collated, UserError):
            raise collated
        batch, bad = collated
        tally.record(bad, drawn=drawn)
        yield batch
