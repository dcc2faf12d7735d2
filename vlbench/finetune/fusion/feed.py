"""Questions in batches: a pure function of the seed and the step.

Every epoch is a shuffle of all questions, drawn from seed and epoch; a batch may end one and begin the next. Neither
the number of loader processes nor a resume changes what a step sees.

Shapes: B questions of a batch, L words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import canonical_json
from vlbench.data.stream import BadTally
from vlbench.finetune.fusion.config import WORDS_STEP
from vlbench.finetune.fusion.heads import Head
from vlbench.finetune.fusion.questions import Questions
from vlbench.finetune.fusion.views import Views
from vlbench.train.batches import Batch, Positions
from vlbench.train.distributed import Ranks

_PREFETCH = 4  # batches that each loader process keeps ready


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
            "texts": _digest(self.data.texts),
            "targets": _digest(canonical_json(_plain(target)) for target in self.data.targets),
        }
        return [{"spec": source.spec, "ids": _digest(source.ids()), **said} for source in self.data.views]

    def batches(self, recipe: Any, config: Any, *, start: int, here: Ranks, pin: bool) -> Iterator[Batch]:
        """The batches of one rank from step ``start`` on; loader processes only where images are decoded."""
        rows, _ = recipe.words(config)(self.data.texts)
        positions = Positions(config, start=start, here=here)
        if not (self.views.decodes and config.workers):
            for chosen in positions:
                batch = self._batch(rows, config.seed, chosen)
                yield {name: part.pin_memory() for name, part in batch.items()} if pin else batch
            return
        loader: DataLoader[Any] = DataLoader(
            _Loaded(self, rows, config.seed),
            sampler=positions,
            batch_size=None,
            num_workers=config.workers,
            multiprocessing_context="fork",  # why: train/batches.py
            prefetch_factor=_PREFETCH,
            pin_memory=pin,
        )
        for found in loader:
            if isinstance(found, UserError):
                raise found
            yield found

    def _batch(self, rows: Sequence[Sequence[int]], seed: int, positions: Sequence[int]) -> Batch:
        chosen = [self._question(seed, position) for position in positions]
        batch = question_batch(rows, self.views, chosen)
        return batch | {"target": self.head.collate([self.data.targets[question] for question in chosen])}

    def _question(self, seed: int, position: int) -> int:
        epoch, place = divmod(position, len(self.data))
        if self._order is None or self._order[0] != (seed, epoch):
            self._order = (seed, epoch), np.random.default_rng([seed, epoch]).permutation(len(self.data))
        return int(self._order[1][place])


class _Loaded(Dataset[Any]):
    """Batches by their positions, for loader processes; an error of the user's comes back as a value."""

    def __init__(self, feed: QuestionFeed, rows: Sequence[Sequence[int]], seed: int) -> None:
        self.feed, self.rows, self.seed = feed, rows, seed

    def __getitem__(self, positions: Any) -> Batch | UserError:
        try:
            return self.feed._batch(self.rows, self.seed, positions)
        except UserError as error:
            return error


def question_batch(rows: Sequence[Sequence[int]], views: Views, chosen: Sequence[int]) -> Batch:
    """The words and images of the chosen questions.

    Args:
        rows: word pieces of every question.
        views: their images.
        chosen: which questions.
    """
    words = [rows[question] for question in chosen]
    length = -(-max(map(len, words)) // WORDS_STEP) * WORDS_STEP
    words_BL = torch.zeros(len(words), length, dtype=torch.long)
    for row_L, pieces in zip(words_BL, words, strict=True):
        row_L[: len(pieces)] = torch.tensor(pieces)
    return {"words_BL": words_BL, **views(chosen)}


def _plain(target: Any) -> Any:
    if isinstance(target, dict):
        return sorted([int(answer), float(score)] for answer, score in target.items())
    return None if target is None else int(target)


def _digest(words: Iterable[str]) -> str:
    total = hashlib.sha256()
    for word in words:
        encoded = word.encode("utf-8", "surrogatepass")
        total.update(len(encoded).to_bytes(8, "little") + encoded)
    return total.hexdigest()[:16]
