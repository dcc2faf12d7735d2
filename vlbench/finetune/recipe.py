"""What fine-tuning recipes share: a subclass writes ``build`` and ``loss``, and what else it needs.

It is a ``core.types.Recipe`` like those of pretraining, so that the one loop trains it. What differs: its data come
from a ``train.feed.Feed`` that makes the batches, and it leaves no backbone behind, so that ``export`` gives a card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlbench.core.cards import ModelCard, Preprocess
from vlbench.core.types import Part, Recipe, Sample

_NO_IMAGES = Preprocess(image_size=(1, 1))
"""Of a fine-tuning that reads no pixels: fixed features."""


@dataclass(frozen=True)
class CardOnly:
    """What ``export`` gives: nothing here can be asked for features."""

    card: ModelCard


class FineTuner:
    """The parts of ``core.types.Recipe`` that are the same for all fine-tunings.

    Only what learns belongs to the module that ``build`` makes: a frozen tower would be written with every checkpoint.
    Only a detector keeps its whole backbone, also a frozen one: it looks at images of other sizes, so that there are
    no stored features to read instead.
    The parameters of a backbone that learns stand under ``visual``, which ``backbone_lr`` counts on.
    """

    name: str
    presets: Mapping[str, Any] = {}
    needs: frozenset[Part] = frozenset()
    card: ModelCard | None = None
    """Of the backbone; a subclass sets it, and the checkpoint says it."""

    def needs_of(self, config: Any) -> frozenset[Part]:
        """Nothing: the feed knows what its examples have."""
        return self.needs

    def learn_assets(self, config: Any, data: Any) -> dict[str, bytes]:
        """Nothing."""
        return {}

    def with_assets(self, assets: Mapping[str, bytes]) -> Recipe:
        """The recipe itself."""
        return self

    def build(self, config: Any, classes: Sequence[str]) -> torch.nn.Module:
        """The model, freshly initialised but for what the backbone brings. The caller has seeded torch."""
        raise NotImplementedError

    def collate(self, config: Any, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Never called: a feed collates its own examples."""
        raise NotImplementedError

    def loss(self, model: torch.nn.Module, batch: Mapping[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
        """As ``core.types.Recipe.loss``: each rank returns the value of the whole batch (``train/losses.py``)."""
        raise NotImplementedError

    def after_step(self, model: torch.nn.Module) -> None:
        """Nothing."""

    def export(self, model: torch.nn.Module, config: Any, classes: Sequence[str]) -> Any:
        """The backbone's card under the recipe's name; it provides nothing."""
        base = self.card or ModelCard(id=self.name, loader="native", arch=self.name, preprocess=_NO_IMAGES)
        return CardOnly(base.model_copy(update={"recipe": self.name, "provides": frozenset(), "published": ()}))
