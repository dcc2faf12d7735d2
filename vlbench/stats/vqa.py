"""VQA accuracy as the official evaluation computes it, and the answers that a classifier chooses among.

Ten people answered each question. An answer is worth ``min(1, matches / 3)`` against nine of them, and its accuracy
is the mean over the ten ways of leaving one person out (Antol et al., ICCV 2015, 1505.00468; Goyal et al., CVPR 2017,
1612.00837). So an answer that 0, 1, 2, 3, 4 or more of the ten gave has accuracy 0, 0.3, 0.6, 0.9, 1.

The rules of spelling are those of the evaluation code that goes with VQA v2 (GT-Vision-Lab/VQA, vqaEval.py at
a013f00), which is Python 2. What surprises in it is kept, since every published number has it:

- Where all ten answers are equal, neither they nor the prediction are normalised: ``Yes`` is then wrong against ten
  ``yes``.
- A mark of punctuation goes without a trace where it stands beside a space anywhere in the answer, or where the
  answer has a comma between two digits; otherwise it becomes a space. The first such comma decides for every mark of
  the answer.
- A period goes unless a digit follows, whatever stands before it, and only the first 32 do.
- ``none`` is the number 0, and a digit is one of 0 to 9.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes
from vlbench.stats.contractions import CONTRACTIONS
from vlbench.stats.grouped import by_group

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
MIN_COUNT = 9
"""Questions of the training data that an answer must lead to be in the vocabulary: 3,129 answers of VQA v2's train
and val (Teney et al., CVPR 2018, 1708.02711; hengyuan-hu/bottom-up-attention-vqa, compute_softscore.py)."""

_COMMA_IN_NUMBER = re.compile("[0-9],[0-9]")
_PERIOD = re.compile(r"\.(?![0-9])")
_MOST_PERIODS = 32  # the official call hands a flag of that value to the parameter "count"
_COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}
_ENOUGH = 3  # matches among nine that make an answer wholly right


@lru_cache(maxsize=1 << 17)
def normalise(answer: str) -> str:
    """An answer in the spelling in which answers are compared."""
    return _words(_without_punctuation(_one_line(answer)))


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The accuracy of one prediction against the answers that people gave to its question, ten of them in VQA.

    Raises:
        UserError: where there are fewer than two answers, so that none can be left out.
    """
    if len(answers) < 2:
        raise UserError(f"VQA accuracy leaves out one answer after the other; this question has {len(answers)} of them")
    given, said = [_one_line(answer) for answer in answers], _one_line(prediction)
    if len(set(given)) > 1:
        given, said = [normalise(answer) for answer in given], normalise(said)
    return _leave_one_out(given.count(said), len(given))


def vqa_outcomes(
    ids: Sequence[str],
    accuracies: Sequence[float],
    *,
    images: Sequence[str],
    answer_types: Sequence[str],
) -> dict[str, Outcomes]:
    """``accuracy`` and ``accuracy/TYPE`` for each type of answer (``yes/no``, ``number``, ``other``).

    Args:
        ids: N question ids.
        accuracies: N values of ``accuracy``.
        images: the image of each question, which is the sampling unit.
        answer_types: the annotation's ``answer_type`` of each question (or its ``question_type``).
    """
    whole = Outcomes(list(ids), np.asarray(accuracies, dtype=np.float64), list(images), binary=False)
    return by_group("accuracy", whole, answer_types)


def answer_vocabulary(leading: Iterable[str], *, min_count: int = MIN_COUNT) -> tuple[str, ...]:
    """The answers that a classifier chooses among, the most frequent first, equal ones by text.

    Args:
        leading: for each question of the training data, the answer that most people gave: ``multiple_choice_answer`` of
            the annotations.
        min_count: questions that it must lead.

    Raises:
        UserError: where no answer is that frequent.
    """
    counts = Counter(normalise(answer) for answer in leading)
    chosen = sorted((answer for answer, count in counts.items() if count >= min_count), key=lambda a: (-counts[a], a))
    if not chosen:
        raise UserError(
            f"no answer leads {min_count} questions or more of these {sum(counts.values()):,}; lower min_count"
        )
    return tuple(chosen)


def soft_targets(answers: Sequence[str], place_of: Mapping[str, int]) -> dict[int, float]:
    """Place in the vocabulary to target for one question: 0.3, 0.6, 0.9 or 1, the accuracy that the answer would have.

    Answers outside the vocabulary have no target; {} is a question that cannot be learnt from. Answers are normalised
    here even where all ten agree, since the vocabulary is.
    """
    counts = Counter(normalise(answer) for answer in answers)
    return {
        place_of[answer]: _leave_one_out(count, len(answers)) for answer, count in counts.items() if answer in place_of
    }


def _leave_one_out(matches: int, n: int) -> float:
    """The mean over those left out: one of the ``matches`` leaves one match fewer, any other leaves them all."""
    worth = matches * min(_ENOUGH, matches - 1) + (n - matches) * min(_ENOUGH, matches)
    return worth / (_ENOUGH * n)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    in_number = _COMMA_IN_NUMBER.search(text) is not None
    table = {
        ord(mark): "" if in_number or f"{mark} " in text or f" {mark}" in text else " "
        for mark in PUNCTUATION
        if mark in text
    }
    return _PERIOD.sub("", text.translate(table), count=_MOST_PERIODS)


def _words(text: str) -> str:
    """Lower case, numbers as digits, no articles, contractions with their apostrophes, one space between words."""
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
