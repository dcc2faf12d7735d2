"""What is counted while a corpus is made: how much of the pool it uses, and how good its sentences look."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from vlbench.data.weak.corpus import Entry


class Tally:
    """Counts over the entries of a corpus.

    Args:
        k: sentences that were asked for.
        pool: sentences in the pool.
    """

    def __init__(self, k: int, pool: int) -> None:
        self._pool = pool
        self._images = self._empty = self._sentences = self._links = self._linkable = 0
        self._captioned = self._own = 0
        self._score = 0.0
        self._used: set[int] = set()
        self._at_rank = [0] * k
        self._names_any = [0] * k
        self._names_first = [0] * k
        self._patterns: dict[str, re.Pattern[str]] = {}

    def add(self, entry: Entry, own: Sequence[str], places: Sequence[int]) -> None:
        """Count one entry.

        Args:
            entry: as it is written.
            own: the image's own captions, where they are known.
            places: of its sentences; those behind the pool were not retrieved from it.
        """
        self._images += 1
        self._empty += not entry.aligned
        self._sentences += len(entry.aligned)
        self._links += sum(len(aligned.links) for aligned in entry.aligned)
        self._linkable += len(entry.tags) * len(entry.aligned)
        self._score += sum(aligned.score for aligned in entry.aligned)
        self._used.update(place for place in places if place < self._pool)
        if own:
            known = {text.casefold() for text in own}
            self._captioned += 1
            self._own += any(aligned.text.casefold() in known for aligned in entry.aligned)
        for rank, aligned in enumerate(entry.aligned):
            named = [self._names(aligned.text, tag) for tag in dict.fromkeys(entry.tags)]
            self._at_rank[rank] += 1
            self._names_any[rank] += any(named)
            self._names_first[rank] += bool(named) and named[0]

    def counts(self) -> dict[str, Any]:
        """All of it as JSON; shares are None where there was nothing to divide by."""
        return {
            "images": self._images,
            "images_without": self._empty,
            "pool": self._pool,
            "used": len(self._used),
            "coverage": _share(len(self._used), self._pool),
            "sentences": self._sentences,
            "mean_score": _share(self._score, self._sentences),
            "own_found": _share(self._own, self._captioned),
            "links_per_sentence": _share(self._links, self._sentences),
            "regions_linked": _share(self._links, self._linkable),
            "names_first_tag": [_share(n, of) for n, of in zip(self._names_first, self._at_rank)],
            "names_any_tag": [_share(n, of) for n, of in zip(self._names_any, self._at_rank)],
        }

    def _names(self, text: str, tag: str) -> bool:
        """Whether the tag's words stand in the text, next to each other and whole."""
        if tag not in self._patterns:
            self._patterns[tag] = re.compile(rf"(?<!\w){re.escape(tag)}(?!\w)", re.IGNORECASE)
        return self._patterns[tag].search(text) is not None


def _share(part: float, whole: int) -> float | None:
    return part / whole if whole else None
