"""Choosing what is asked such that the words alone do not tell the answer.

Every sentence is asked with each of its possible answers about equally often, and so is every wording. A model that
reads sentences without looking at pictures then knows no more than how many answers there are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlbench.data.shapes.scene import Scene

# How much oftener one answer may have been given than another, to a sentence and to its wording, before it waits.
_SLACK = 1
_SLACK_OF_WORDING = 3


@dataclass(frozen=True, slots=True)
class Asked:
    """A sentence that could be written of a scene, with its answer there.

    ``among`` are the answers that it has over all scenes, which are to be equally frequent; ``wording`` is what
    sentences that differ in their nouns have in common.
    """

    wording: str
    text: str
    answer: str
    among: tuple[str, ...]


Family = Callable[[Scene], list[Asked]]
"""Everything of one kind that can be asked of a scene."""


class Balance:
    """Chooses sentences for one split, picture after picture.

    What it takes for a picture depends on the pictures before it and on none after it.

    Args:
        families: by name.
        shares: how often each is wanted, in proportion.
    """

    def __init__(self, families: Mapping[str, Family], shares: Mapping[str, float]) -> None:
        assert families.keys() == shares.keys(), "each family has a share"
        self._families = families
        self._shares = shares
        self._asked: Counter[str] = Counter()
        self._answered: Counter[tuple[str, str]] = Counter()

    def choose(self, scene: Scene, count: int, rng: np.random.Generator) -> list[Asked]:
        """At most ``count`` sentences of different families, those first that are most behind their share."""
        chosen: list[Asked] = []
        for family in sorted(self._families, key=lambda name: (self._asked[name] + 1) / self._shares[name]):
            if len(chosen) == count:
                break
            asked = self._rarest(self._families[family](scene), rng)
            if asked is not None:
                self._asked[family] += 1
                self._answered[asked.text, asked.answer] += 1
                self._answered[asked.wording, asked.answer] += 1
                chosen.append(asked)
        return chosen

    def _rarest(self, candidates: Sequence[Asked], rng: np.random.Generator) -> Asked | None:
        """The one whose answer its sentence, and then its wording, had least; None where all would tilt the balance."""
        draws = rng.random(len(candidates)).tolist()
        keys = [
            (self._ahead(asked.text, asked), self._ahead(asked.wording, asked), draw, place)
            for place, (asked, draw) in enumerate(zip(candidates, draws, strict=True))
        ]
        fitting = [key for key in keys if key[0] <= _SLACK and key[1] <= _SLACK_OF_WORDING]
        return candidates[min(fitting)[-1]] if fitting else None

    def _ahead(self, words: str, asked: Asked) -> int:
        """How much oftener the answer was given to these words than the rarest one."""
        least = min(self._answered[words, answer] for answer in asked.among)
        return self._answered[words, asked.answer] - least
