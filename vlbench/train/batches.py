"""From data specs to batches. Position p of the endless stream is the same sample whoever asks for it.

A step reads the positions ``[step * batch_size, (step + 1) * batch_size)``; each part of an accumulated batch, and each
rank of a part, takes its contiguous share. So neither the number of loader processes nor the number of ranks nor
a resume changes what the model sees; with ``order=shards`` the number of ranks does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
from torch.utils.data import Sampler

from vlbench.core.errors import BadExample, UserError
from vlbench.core.fingerprint import fingerprint_words
from vlbench.core.types import Example, Part, Recipe, Region, Sample, Source
from vlbench.data.images import decode
from vlbench.data.loading import loaded
from vlbench.data.prompting import draw_text
from vlbench.data.shard_order import ByShard, shard_sizes
from vlbench.data.sources import open_source, without_images
from vlbench.data.spec import parse_spec
from vlbench.data.stream import BadTally, Mixture
from vlbench.data.transforms import augment
from vlbench.train.config import PretrainConfig
from vlbench.train.distributed import Ranks
from vlbench.train.run_config import RunConfig
from vlbench.train.templates import named_templates

Batch: TypeAlias = dict[str, torch.Tensor]
S = TypeVar("S")

PREFETCH = 4
"""Batches that each loader process keeps ready."""
_ALONE = Ranks()
_NO_PIXELS = torch.empty(3, 0, 0, dtype=torch.uint8)
_QUESTIONS = frozenset({"question", "pair", "hypothesis", "expression"})


def open_mixture(recipe: Recipe, config: PretrainConfig, *, here: Ranks = _ALONE) -> Mixture:
    """The training data of a run, checked for what the recipe needs.

    The number of ranks counts for ``order=shards`` only, where each rank has its own.

    Raises:
        UserError: where there are no data, or a source lacks a part, naming the source.
    """
    if not config.data:
        raise UserError(f"pretrain {recipe.name}: this preset has no data of its own; give --data SPEC (once or more)")
    needs, learner = recipe.needs_of(config), _learner(recipe, config)
    if "regions" in needs and config.augment.rand_augment is not None:
        raise UserError(
            f"augment.rand_augment={config.augment.rand_augment} turns and shifts images, and boxes stay where they "
            f"are: {learner} learns from regions; leave it out"
        )
    specs = [parse_spec(text) for text in config.data]
    sources = [open_source(spec) for spec in specs]
    for source in sources:
        if source.provides & _QUESTIONS:
            raise UserError(f"data {source.spec!r} asks about images; nothing is pretrained on that: leave it out")
        lacking = _lacking(source, needs)
        if "label" in lacking:
            rest = [f"--data {text}" for text, other in zip(config.data, sources) if other.classes]
            raise UserError(
                f"data {source.spec!r} has no labels, and {learner} learns from labels; leave it out"
                + (f": {' '.join(rest)}" if rest else "")
            )
        if "text" in lacking:
            raise UserError(f"data {source.spec!r} has neither texts nor labels, and {learner} learns from texts")
        if "regions" in lacking:
            raise UserError(f"data {source.spec!r} has no regions, and {learner} learns from them; leave it out")
    mixture = Mixture if needs else _Unread
    return mixture(
        sources,
        [spec.weight for spec in specs],
        config.seed,
        block=config.batch_size,
        max_bad=config.max_bad,
        needs=needs,
        by_shard=_by_shard(config, here) if config.order == "shards" else None,
    )


def usable_data(recipe: Recipe, config: PretrainConfig) -> tuple[str, ...]:
    """Those of ``config.data`` that have the parts needed under these settings; all of them where none has.

    For a variant that needs others than its preset was made for: labels, say, where a part of the data has captions
    alone.
    """
    needs = recipe.needs_of(config)
    usable = tuple(text for text in config.data if not _lacking(open_source(parse_spec(text)), needs))
    return usable or config.data


def _lacking(source: Source, needs: frozenset[Part]) -> frozenset[Part]:
    """What is needed and neither there nor, as a text is from a label, to be made."""
    there = (source.provides - {"label"}) | ({"label", "text"} if source.classes else set())
    return (needs & {"label", "text", "regions"}) - there


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
            "classes": fingerprint_words(source.classes or ()),
            "ids": fingerprint_words(source.ids()),
            "labels": fingerprint_words(map(str, source.labels() or ())),
            "templates": fingerprint_words(named_templates(config.templates, source.templates)),
            **({"shards": fingerprint_words(map(str, shard_sizes(source)))} if config.order == "shards" else {}),
        }
        for source in mixture.sources
    ]


class _Unread(Mixture):
    """A mixture of which nothing but ids is needed: no image is read, nor need it be there.

    Sources that know of their images from a table (csv, coco, karpathy, multi30k, voc) give ids without the files.
    Folders and shards find their images by looking, so there the files must lie; of shards the rest is read along.
    """

    def _read(self, source: int, index: int) -> tuple[Example, int]:
        example = without_images(self.sources[source], index)
        return example, -1 if example.label is None else int(self._labels[source][example.label])


class Samples:
    """The sample at each position of the stream.

    Where the recipe needs nothing of an example, no image is decoded or augmented, and the sample's has no pixel. One
    that reads something else by an example's id may have
    ``regions_of(config, example, size)``: the regions in place of the example's own, in pixels of the image of that
    width and height (None: not decoded). It raises BadExample for an example that the recipe has nothing for.
    """

    def __init__(self, recipe: Recipe, config: PretrainConfig, mixture: Mixture) -> None:
        self.recipe = recipe
        self.config = config
        self.mixture = mixture
        self._needs = recipe.needs_of(config)
        self._regions_of = getattr(recipe, "regions_of", None)
        self._templates = [named_templates(config.templates, source.templates) for source in mixture.sources]

    def __call__(self, position: int) -> tuple[Sample, tuple[BadExample, ...]]:
        """The sample at ``position`` and the bad examples it was reached over. Raises RunError for too many of them."""
        source, _, _ = self.mixture.locate(position)
        return self.mixture.sample(position, partial(self._make, self._templates[source]))

    def _make(self, templates: Sequence[str], example: Example, label: int, rng: np.random.Generator) -> Sample:
        if not self._needs:
            self._regions(example, None)
            return Sample(_NO_PIXELS, None, label, id=example.id, seed=int(rng.integers(2**63)))
        assert example.image is not None, "the mixture checks this"
        side = self.config.visual.image_size
        image = decode(example.image, where=example.id)
        image_CHW, view = augment(image, rng, self.config.augment, (side, side), fill=self.config.eval_images.mean)
        text = self._text(templates, example, label, rng) if "text" in self._needs else None
        regions = self._regions(example, image.size)
        return Sample(
            image_CHW=image_CHW,
            text=text,
            label=label,
            flipped=view.flipped,
            id=example.id,
            regions=view.regions(regions),
            categories=frozenset(region.category for region in regions),
            seed=int(rng.integers(2**63)),
        )

    def _regions(self, example: Example, size: tuple[int, int] | None) -> Sequence[Region]:
        if self._regions_of is not None:
            found: Sequence[Region] = self._regions_of(self.config, example, size)
            return found
        return example.regions if "regions" in self._needs else ()

    def _text(self, templates: Sequence[str], example: Example, label: int, rng: np.random.Generator) -> str:
        classname = self.mixture.classes[label] if label >= 0 else None
        text = draw_text(example, classname, templates, rng, languages=self.config.languages)
        if not text:
            languages = ", ".join(self.config.languages)
            raise BadExample(f"no text in {languages}", example.id, "and no label to make one of")
        return text


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


def batches(
    recipe: Recipe, config: PretrainConfig, mixture: Mixture, *, start: int, here: Ranks, pin: bool
) -> Iterator[Batch]:
    """One rank's batches from step ``start`` on, ``config.loads`` a step. Bad examples go to ``mixture.tally``."""
    return stream(
        Samples(recipe, config, mixture),
        partial(recipe.collate, config),
        config,
        tally=mixture.tally,
        start=start,
        here=here,
        pin=pin,
    )


def stream(
    sample_at: Callable[[int], tuple[S, Sequence[BadExample]]],
    collate: Callable[[Sequence[S]], Batch],
    config: RunConfig,
    *,
    tally: BadTally,
    start: int,
    here: Ranks,
    pin: bool,
) -> Iterator[Batch]:
    """One rank's batches from step ``start`` on.

    Args:
        sample_at: the sample at a position of the stream, and the bad examples it was reached over.
        collate: samples to a batch. Both are called in loader processes.
        config: of the run.
        tally: counts the bad examples of every batch before it is yielded, and may stop the run.
        start: the first step.
        here: which rank this is, of how many.
        pin: whether batches should lie in page-locked memory.
    """
    positions = Positions(config, start=start, here=here)
    drawn = config.batch_size // config.loads // here.world
    for batch, bad in loaded(_Collated(sample_at, collate), positions, workers=config.workers, ahead=PREFETCH, pin=pin):
        tally.record(bad, drawn=drawn)
        yield batch


@dataclass(frozen=True)
class _Collated(Generic[S]):
    """The batch of several positions, with the bad examples that were met."""

    sample_at: Callable[[int], tuple[S, Sequence[BadExample]]]
    collate: Callable[[Sequence[S]], Batch]

    def __call__(self, positions: Sequence[int]) -> tuple[Batch, list[BadExample]]:
        found = [self.sample_at(position) for position in positions]
        return self.collate([sample for sample, _ in found]), [error for _, bad in found for error in bad]
