"""Links between the noun phrases of a sentence and the regions of an image.

For every sentence that was retrieved for an image, each region keeps the phrase whose embedding is nearest to that of
its tag, and the cosine: ``objects_cs`` and ``objects_cs_arg`` of the released code. [H:np_object_cos_sim.py]
The released code embeds both with the encoder of the retrieval, and so do we; the paper speaks of word2vec.

P phrases, T tags, D width of the embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from vlbench.data.weak.corpus import Link
from vlbench.data.weak.phrases import Span


class Texts(Protocol):
    """Sentences by their place in the pool."""

    def __getitem__(self, place: int) -> str:
        """The sentence at a place."""


class PhraseBook:
    """The noun phrases of the sentences that were retrieved, and their vectors and those of the tags.

    Args:
        spans: of each sentence by its place in the pool.
        texts: the sentences by place.
        encode: texts to normalised vectors, rows in the order of the texts.
        tags: the vocabulary of tags.
        min_score: links below are left out; one of 0 or less never is a link.
    """

    def __init__(
        self,
        spans: Mapping[int, Sequence[Span]],
        texts: Texts,
        *,
        encode: Callable[[Sequence[str]], Any],
        tags: Sequence[str],
        min_score: float = 0.0,
    ) -> None:
        self._spans = spans
        self._texts = texts
        self._min_score = min_score
        index: dict[str, int] = {}
        self._phrases = {
            place: np.array([index.setdefault(texts[place][a:b], len(index)) for a, b in found], dtype=np.int64)
            for place, found in spans.items()
        }
        self._phrases_PD = encode(list(index)) if index else None
        self._tags_TD = encode(list(tags))

    def links(self, tags: np.ndarray, places: Sequence[int]) -> list[tuple[Link, ...]]:
        """The links of each sentence of one image.

        Args:
            tags: the tag of each region, as an index into the vocabulary.
            places: of the sentences in the pool.
        """
        own, region_tag = np.unique(tags, return_inverse=True)
        numbers = [self._phrases[place] for place in places]
        phrases = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *numbers]))
        if not len(own) or not len(phrases) or self._phrases_PD is None:
            return [() for _ in places]
        similar_TP = self._tags_TD[own] @ self._phrases_PD[phrases].T
        similar_TP = similar_TP if isinstance(similar_TP, np.ndarray) else similar_TP.toarray()
        found: list[tuple[Link, ...]] = []
        for place, mine in zip(places, numbers):
            if not len(mine):
                found.append(())
                continue
            scores_TP = similar_TP[:, np.searchsorted(phrases, mine)]
            best_T = scores_TP.argmax(axis=1)
            score_T = np.minimum(scores_TP.max(axis=1), 1.0)
            found.append(
                tuple(
                    self._link(place, region, int(best_T[tag]), float(np.float32(score_T[tag])))
                    for region, tag in enumerate(region_tag.tolist())
                    if score_T[tag] > 0 and score_T[tag] >= self._min_score
                )
            )
        return found

    def _link(self, place: int, region: int, phrase: int, score: float) -> Link:
        start, end = self._spans[place][phrase]
        return Link(self._texts[place][start:end], start, end, region, score)
