"""VQA: questions about images, answered by choosing among the frequent answers of the training data (VQA v2).

The backbone's features and the question's word pieces go through one small single-stream transformer. Its head scores
each answer that leads ``min_count`` training questions or more, 3,129 of them for VQA v2's train and val; it learns the
share of a point that each answer would get, by a sigmoid and binary cross-entropy each (Teney et al., CVPR 2018,
1708.02711; mu-VLA, 2203.00242). The highest score answers.

What is reported is VQA's own accuracy with its own spelling rules (``stats.vqa``): over all questions, by
type of answer, and by type of question as ``accuracy/question/TYPE``. The unit of sampling is the image.

N questions, A answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from vlbench.adapters.common.classification import estimates
from vlbench.adapters.common.questions import Reading, answer, splits_of, where_of
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Outcomes, Part, Provides, Rows, Source
from vlbench.data.sources import without_images
from vlbench.finetune.fusion.config import PAPER, TINY, FusionConfig
from vlbench.finetune.fusion.questions import Questions
from vlbench.stats.vqa import MIN_COUNT, accuracy, answer_vocabulary, soft_targets, vqa_outcomes

_RARE = 1e-6
"""What a constant answer's sigmoid is at least, where the training data never give an answer a point."""


class Config(FusionConfig):
    """Settings of VQA."""

    PRESETS: ClassVar[Mapping[str, dict[str, Any]]] = {"tiny": TINY, "paper": PAPER["vqa"]}

    min_count: int = Field(
        default=MIN_COUNT, ge=1, description="training questions that an answer must lead to be in the vocabulary"
    )


@dataclass(frozen=True)
class _Truth:
    """What is known of one question."""

    question: str
    question_type: str
    answer_type: str
    answers: tuple[str, ...]
    leading: str
    image_id: str


class Vqa:
    """The adapter. Reports test, which a card may say is the data's val."""

    name: ClassVar[str] = "vqa"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "accuracy"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "question"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    trains: ClassVar[bool] = True

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """One row a question: ``id, image, image_id, question, …, answers, prediction, p, accuracy``."""
        vocabulary = answer_vocabulary(_leading(data.split("train")), min_count=config.min_count)
        place_of = {text: place for place, text in enumerate(vocabulary)}

        def read(source: Source) -> Reading[_Truth]:
            return _read(encoder, source, place_of)

        def head() -> Any:
            from vlbench.finetune.fusion.heads import AnswerHead

            return AnswerHead(len(vocabulary), names=vocabulary)

        splits = splits_of(encoder, data, config, read, reported=("test",))
        prior_A = _prior(splits.learn, len(vocabulary))
        found = answer(
            encoder,
            splits,
            config,
            head=head,
            judge=lambda reading, logits: float(_accuracies(reading, _said(logits, vocabulary)).mean()),
            constant=lambda reading: [prior_A] * len(reading),
        )
        ((split, asked),) = splits.asked.items()
        said, logits = _said(found.logits[split], vocabulary), found.logits[split]
        common = [vocabulary[int(prior_A.argmax())]] * len(asked)
        covered = float(np.mean([bool(set(target)) for target in asked.questions.targets]))
        meta = {
            "vocabulary": list(vocabulary),
            "train_questions": len(splits.learn),
            "answerable": covered,
            "chance": {name: float(o.values.mean()) for name, o in _outcomes(_rows(asked, common)).items()},
            "chosen": found.chosen,
            "notes": list(found.notes),
        }
        p_N = 1 / (1 + np.exp(-np.array([scores.max() for scores in logits], dtype=np.float64)))
        return Rows({**_rows(asked, said), "p": p_N.astype(np.float32)}, meta)

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``accuracy``, ``accuracy/ANSWER TYPE`` and ``accuracy/question/QUESTION TYPE``."""
        return _outcomes(rows)

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Every metric with its interval."""
        return estimates(self.outcomes(rows, config))


def _leading(source: Source) -> list[str]:
    """The answer that most people gave to each training question."""
    known = getattr(source, "leading_answers", None)
    if known is not None:
        return list(known())
    return [_annotated(without_images(source, index), source)["multiple_choice_answer"] for index in range(len(source))]


def _annotated(example: Any, source: Source) -> Mapping[str, Any]:
    extra: Mapping[str, Any] = example.extra
    if "answers" not in extra:
        raise UserError(
            f"{where_of(source)}: question {example.id} has no answers; put its annotations beside its questions"
        )
    return extra


def _read(encoder: Any, source: Source, place_of: Mapping[str, int]) -> Reading[_Truth]:
    truths, targets = [], []
    for index in range(len(source)):
        extra = _annotated(without_images(source, index), source)
        truths.append(
            _Truth(
                extra["question"],
                extra["question_type"],
                extra["answer_type"],
                tuple(extra["answers"]),
                extra["multiple_choice_answer"],
                extra["image_key"],
            )
        )
        targets.append(soft_targets(truths[-1].answers, place_of))
    return Reading(
        Questions((source,), tuple(truth.question for truth in truths), tuple(targets)),
        tuple(source.ids()),
        tuple(truths),
        tuple((image,) for image in encoder.image_digests(source)),
    )


def _prior(learn: Reading[_Truth], n_answers: int) -> np.ndarray:
    """Logits ``(A,)`` whose sigmoids are the points that each answer would get on average over the training data."""
    points_A = np.zeros(n_answers)
    for target in learn.questions.targets:
        for place, value in target.items():
            points_A[place] += value
    share_A = np.clip(points_A / max(len(learn), 1), _RARE, 1 - _RARE)
    logits_A: np.ndarray = np.log(share_A / (1 - share_A))
    return logits_A


def _said(logits: Sequence[np.ndarray], vocabulary: Sequence[str]) -> list[str]:
    return [vocabulary[int(scores_A.argmax())] for scores_A in logits]


def _accuracies(reading: Reading[_Truth], said: Sequence[str]) -> np.ndarray:
    pairs = zip(said, reading.truths, strict=True)
    return np.array([accuracy(prediction, truth.answers) for prediction, truth in pairs], dtype=np.float64)


def _rows(asked: Reading[_Truth], said: Sequence[str]) -> dict[str, Any]:
    """The columns that outcomes are made of, and what there is to read beside them."""
    return {
        "id": list(asked.ids),
        "image": asked.image_column(),
        "image_id": [truth.image_id for truth in asked.truths],
        "question": [truth.question for truth in asked.truths],
        "question_type": [truth.question_type for truth in asked.truths],
        "answer_type": [truth.answer_type for truth in asked.truths],
        "answers": [list(truth.answers) for truth in asked.truths],
        "prediction": list(said),
        "accuracy": _accuracies(asked, said),
    }


def _outcomes(rows: Mapping[str, Any] | Rows) -> dict[str, Outcomes]:
    known = {"images": list(rows["image"])}
    ids, values = list(rows["id"]), np.asarray(rows["accuracy"], dtype=np.float64)
    by_answer = vqa_outcomes(ids, values, **known, answer_types=list(rows["answer_type"]))
    by_question = vqa_outcomes(ids, values, **known, answer_types=[f"question/{t}" for t in rows["question_type"]])
    return by_answer | by_question


ADAPTER = Vqa()
