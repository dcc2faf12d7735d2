"""What a run learns from: examples in batches, a pure function of the step.

The loop asks for nothing else, so that pretraining on a mixture and fine-tuning on a task's questions or boxes go
through one loop.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from vlbench.core.types import Recipe
from vlbench.data.stream import BadTally
from vlbench.train.batches import Batch, batches, data_identity, open_mixture
from vlbench.train.config import PretrainConfig
from vlbench.train.distributed import Ranks

_ALONE = Ranks()


class Feed(Protocol):
    """A run's data, as one rank sees them."""

    classes: tuple[str, ...]
    """Handed to ``Recipe.build``; names by label, or none."""
    tally: BadTally
    """The bad examples that this rank met."""
    data: Any
    """Handed to ``Recipe.learn_assets``."""

    def __len__(self) -> int:
        """Examples: an epoch."""

    def identity(self) -> list[dict[str, Any]]:
        """What a resumed run must find again of each source, under ``spec`` and other keys, in plain values."""

    def batches(self, recipe: Recipe, config: Any, *, start: int, here: Ranks, pin: bool) -> Iterator[Batch]:
        """One rank's batches from step ``start`` to the last, ``config.loads`` a step.

        Batch k of a step must not depend on ``start``: a resumed run sees what the whole run would have seen. Ranks
        share a part between them, ``config.batch_size // config.loads // here.world`` examples each.

        Args:
            recipe: the one that has its assets.
            config: of the run.
            start: the first step asked for.
            here: which rank this is, of how many.
            pin: whether batches should lie in page-locked memory, for a GPU.
        """


class MixtureFeed:
    """The mixture of a pretraining run.

    Raises:
        UserError: where the data do not suit the recipe, as ``open_mixture``.
    """

    def __init__(self, recipe: Recipe, config: PretrainConfig, *, here: Ranks = _ALONE) -> None:
        self.data = open_mixture(recipe, config, here=here)
        self.classes = self.data.classes
        self.tally = self.data.tally
        self._config = config

    def __len__(self) -> int:
        return len(self.data)

    def identity(self) -> list[dict[str, Any]]:
        """As ``data_identity``: ids, classes and labels of every source."""
        return data_identity(self._config, self.data)

    def batches(self, recipe: Recipe, config: Any, *, start: int, here: Ranks, pin: bool) -> Iterator[Batch]:
        """Positions of the endless stream, collated by the recipe."""
        return batches(recipe, config, self.data, start=start, here=here, pin=pin)
