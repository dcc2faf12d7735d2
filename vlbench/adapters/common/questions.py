"""What the tasks on an image and a sentence share: a split as questions; who is learnt from, chooses, answers.

A protocol reads each split into a ``Reading``. What a model is tuned on is the train split; what its step and learning
rate are chosen on is val where another split is reported, else a share of the training images (``held_out``). Reported
splits are asked once, at the end.

``baseline:constant`` is not tuned: it gives every question the answer that leads the training data, and so shows what
the metric gives to a model that neither looks nor reads.

N questions, A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from vlbench.adapters.common.classification import IMAGE_DIGITS, overlap_note
from vlbench.adapters.common.held_out import learn_and_choose
from vlbench.core.errors import UserError
from vlbench.core.types import Source
from vlbench.data.digests import Content, content_digests
from vlbench.data.sources import Subset
from vlbench.finetune.fusion.questions import Questions

if TYPE_CHECKING:
    from vlbench.finetune.fusion.config import FusionConfig

T = TypeVar("T")

CONSTANT = ("baseline", "constant")
"""Loader and architecture of the model that answers without being tuned."""


class Chosen(Subset):
    """Some entries of a source, one perhaps several times; images that were digested once are not read again for it."""

    @property
    def _content_digests(self) -> Content:
        whole = content_digests(self._source)
        images, examples = ([part[index] for index in self._indices] for part in (whole.images, whole.examples))
        return Content(tuple(images), tuple(examples))


@dataclass(frozen=True)
class Reading(Generic[T]):
    """One split, read."""

    questions: Questions
    ids: tuple[str, ...]
    """N, of the questions."""
    truths: tuple[T, ...]
    """N, what the protocol keeps of each question: the right answer and what goes into the rows."""
    images: tuple[tuple[str, ...], ...]
    """N, the digests of the images that a question is about."""
    groups: tuple[str, ...] | None = None
    """N, what questions share beside images, so that they are held out together: NLVR2's sets."""

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: Sequence[int]) -> Reading[T]:
        """The questions at these places."""
        asked = self.questions
        views = tuple(Chosen(view, chosen, split=view.split) for view in asked.views)
        texts, targets = (tuple(part[index] for index in chosen) for part in (asked.texts, asked.targets))
        return Reading(
            replace(asked, views=views, texts=texts, targets=targets),
            tuple(self.ids[index] for index in chosen),
            tuple(self.truths[index] for index in chosen),
            tuple(self.images[index] for index in chosen),
            None if self.groups is None else tuple(self.groups[index] for index in chosen),
        )

    def image_column(self) -> list[str]:
        """N, the first image of each question in the digits that rows keep."""
        return [own[0][:IMAGE_DIGITS] for own in self.images]


@dataclass(frozen=True)
class Splits(Generic[T]):
    """Who plays which part."""

    learn: Reading[T]
    choose: Reading[T]
    asked: Mapping[str, Reading[T]]
    """By the data's own name of the split."""
    notes: tuple[str, ...]
    key: str
    """The identity of what is learnt and chosen on: part of a tuned model's name."""


def splits_of(
    encoder: Any, data: Any, config: FusionConfig, read: Callable[[Source], Reading[T]], *, reported: Sequence[str]
) -> Splits[T]:
    """Every split, read by ``read``.

    Args:
        encoder: an ``adapters.encoder.Encoder``.
        data: a ``data.taskdata.TaskData`` with train and at least one reported split.
        config: ``held_out`` is the share of the training images where val does not choose.
        read: of one source.
        reported: the roles that are reported, those that the data lack left out.

    Raises:
        UserError: where no training image can be held out.
    """
    learn, choose, roles, notes = learn_and_choose(
        data,
        config.held_out,
        read=read,
        take=lambda train, chosen: train.take(chosen),
        images=lambda train: train.images,
        groups=lambda train: train.groups,
        unit=f"examples: {config.held_out:g} of the images",
    )
    asked = {}
    for role in reported:
        if data.has(role):
            source = data.split(role)
            asked[source.split] = read(source)
    tested = dict.fromkeys(image for reading in asked.values() for own in reading.images for image in own)
    seen = {image for reading in (learn, choose) for own in reading.images for image in own}
    return Splits(learn, choose, asked, (*notes, *overlap_note(seen, list(tested))), data.fingerprint(roles))


@dataclass(frozen=True)
class Answers:
    """What a model says to every question of the reported splits."""

    logits: Mapping[str, list[np.ndarray]]
    """By split; one array of scores for each question: over the answers, or over its regions."""
    chosen: dict[str, Any]
    notes: tuple[str, ...]


def answer(
    encoder: Any,
    splits: Splits[T],
    config: FusionConfig,
    *,
    head: Callable[[], Any],
    judge: Callable[[Reading[T], Sequence[np.ndarray]], float],
    constant: Callable[[Reading[T]], list[np.ndarray]],
) -> Answers:
    """Tune the encoder's backbone on what is learnt, and ask it.

    Args:
        encoder: an ``adapters.encoder.Encoder``.
        splits: of ``splits_of``.
        config: of the protocol.
        head: makes a head of ``finetune.fusion.heads``.
        judge: how good scores are, higher is better: what step and learning rate are chosen by.
        constant: the scores of the answer that leads the training data, for ``baseline:constant``.
    """
    card = encoder.backbone.card
    if (card.loader, card.arch) == CONSTANT:
        return Answers({name: constant(reading) for name, reading in splits.asked.items()}, {}, splits.notes)
    from vlbench.adapters.common.fusion import tune_and_answer

    found = tune_and_answer(
        encoder,
        head(),
        train=splits.learn.questions,
        held_out=splits.choose.questions,
        asked={name: reading.questions for name, reading in splits.asked.items()},
        judge=lambda logits: judge(splits.choose, logits),
        config=config,
        data_key=splits.key,
    )
    for name, reading in splits.asked.items():
        assert len(found.logits[name]) == len(reading), f"{len(found.logits[name])} answers to {len(reading)} questions"
    return Answers(found.logits, found.chosen, (*splits.notes, *found.notes))


def sentence_of(example: Any, where: str) -> str:
    """The one English sentence of an example. Raises UserError where there is none."""
    texts = example.texts.get("en", ())
    if len(texts) != 1:
        raise UserError(f"{where}: {example.id}: one sentence expected, {len(texts)} found")
    return str(texts[0])


def log_frequencies(labels: Sequence[int], n_classes: int) -> np.ndarray:
    """Scores whose softmax is how often each class occurs, ``(n_classes,)``; one that never does is last."""
    counts = np.bincount(np.asarray(labels, dtype=np.int64), minlength=n_classes)
    scores: np.ndarray = np.log(np.maximum(counts, 1e-6) / max(len(labels), 1))
    return scores


def softmax(logits_NA: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float64."""
    logits_NA = np.asarray(logits_NA, dtype=np.float64)
    p_NA: np.ndarray = np.exp(logits_NA - logits_NA.max(axis=-1, keepdims=True))
    return p_NA / p_NA.sum(axis=-1, keepdims=True)


def where_of(source: Source) -> str:
    """What a split is called in an error line."""
    return f"{source.spec} ({source.split})"
