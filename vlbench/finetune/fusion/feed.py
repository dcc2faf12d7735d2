"""Questions in batches: a pure function of the seed and the step.

Every epoch is a shuffle of all questions, drawn from seed and epoch; a batch may end one and begin the next. Neither
the number of loader processes nor a resume changes what a step sees.

Shapes: B questions of a batch, L words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from vlbench.core.fingerprint import canonical_json, fingerprint_words
from vlbench.data.loading import loaded
from vlbench.data.stream import BadTally
from vlbench.finetune.fusion.config import WORDS_STEP
from vlbench.finetune.fusion.heads import Head
from vlbench.finetune.fusion.questions import Questions
from vlbench.finetune.fusion.views import Views
from vlbench.models.padding import padded_ids
from vlbench.train.batches import PREFETCH, Batch, Positions
from vlbench.train.distributed import Ranks


class QuestionFeed:
    """What a fusion model learns from.

    A question whose image cannot be read stops the run: what is frozen was read beforehand, and a training set with a
    hole would be another one.

    Args:
        questions: with their targets.
        views: their images.
        head: what makes targets of a batch.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, questions: Questions, views: Views, head: Head) -> None:
        self.data = questions
        self.views, self.head = views, head
        self.tally = BadTally(0.0)
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.data)

    def identity(self) -> list[dict[str, Any]]:
        """Ids of every view in their order, and the texts and targets."""
        said = {
            "examples": len(self.data),
            "texts": fingerprint_words(self.data.texts),
            "targets": fingerprint_words(canonical_json(_plain(target)) for target in self.data.targets),
        }
        return [{"spec": source.spec, "ids": fingerprint_words(source.ids()), **said} for source in self.data.views]

    def batches(self, recipe: Any, config: Any, *, start: int, here: Ranks, pin: bool) -> Iterator[Batch]:
        """The batches of one rank from step ``start`` on; loader processes only where images are decoded."""
        rows, _ = recipe.words(config)(self.data.texts)
        return loaded(
            partial(self._batch, rows, config.seed),
            Positions(config, start=start, here=here),
            workers=config.workers if self.views.decodes else 0,
            ahead=PREFETCH,
            pin=pin,
        )

    def _batch(self, rows: Sequence[Sequence[int]], seed: int, positions: Sequence[int]) -> Batch:
        chosen = [self._question(seed, position) for position in positions]
        batch = question_batch(rows, self.views, chosen)
        return batch | {"target": self.head.collate([self.data.targets[question] for question in chosen])}

    def _question(self, seed: int, position: int) -> int:
        epoch, place = divmod(position, len(self.data))
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(len(self.data))
        return int(self._order[1][place])


def question_batch(rows: Sequence[Sequence[int]], views: Views, chosen: Sequence[int]) -> Batch:
    """The words and images of the chosen questions.

    Args:
        rows: word pieces of every question.
        views: their images.
        chosen: which questions.
    """
    return {"words_BL": padded_ids([rows[question] for question in chosen], step=WORDS_STEP), **views(chosen)}


def _plain(target: Any) -> Any:
    if isinstance(target, dict):
        return sorted([int(answer), float(score)] for answer, score in target.items())
    return None if target is None else int(target)
