"""How near generated captions are to human ones: BLEU-4 of a set of captions, CIDEr of each.

The counts and scores are those of pycocoevalcap, the COCO caption evaluation (Chen et al., 1504.00325): BLEU (Papineni
et al., ACL 2002) against the reference of the nearest length, and what it calls CIDEr, the variant CIDEr-D of Vedantam
et al. (1411.5726) times ten. Its Penn Treebank tokenizer is a Java program; ``words`` does in Python what that does to
captions, and differs from it in rare cases (abbreviations with periods, times, currencies).

N images, n orders of n-grams.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlbench.core.errors import UserError
from vlbench.stats.ranked import LeftOut

ORDERS = 4
_TINY, _SMALL = 1e-15, 1e-9  # pycocoevalcap's, so that a product without a match is 0 and not undefined

_NEGATION = re.compile(r"(?<=\w)(n't)\b")
_WORD = re.compile(r"n't|'(?:s|re|ve|ll|d|m)\b|\d+(?:[.,:]\d+)+|\w+(?:[-/]\w+)*")


def words(caption: str) -> str:
    """A caption as its words with single blanks between them.

    Lower case; punctuation left out; ``don't`` is ``do n't`` and ``man's`` is ``man 's``; words joined by a hyphen or
    a slash, and numbers with a point or comma inside, stay one.
    """
    text = caption.lower().replace("\u2019", "'")
    return " ".join(_WORD.findall(_NEGATION.sub(r" \1", text)))


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """``(N,)`` CIDEr-D of each caption, from 0 to 10; published tables print their mean times 100.

    How rare an n-gram is is counted over the references of all N images, as everywhere; a subset of the images has
    other scores.

    Args:
        captions: as ``words`` gives them.
        references: of each image, at least one, in the same form.
    """
    _, scores_N = _cider_scorer()().compute_score(*_by_number(captions, references))
    return np.asarray(scores_N, dtype=np.float64)


def bleu_counts(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """``(N, 2 + 2n)`` what BLEU adds up: a caption's length, the nearest reference's, n-grams that match, n-grams."""
    module = _bleu_module()
    rows = []
    for caption, of_image in zip(captions, references, strict=True):
        found = module.cook_test(caption, module.cook_refs(list(of_image), n=ORDERS), eff="closest", n=ORDERS)
        rows.append([found["testlen"], found["reflen"], *found["correct"], *found["guess"]])
    return np.array(rows, dtype=np.float64)


def bleu(counts_NC: np.ndarray) -> LeftOut:
    """BLEU-4 of all captions together, from 0 to 1, and what it is without each image."""
    total_C = counts_NC.sum(axis=0)
    without_N = _bleu_of(total_C - counts_NC) if len(counts_NC) > 1 else _bleu_of(counts_NC)
    return LeftOut(float(_bleu_of(total_C[None])[0]), without_N)


def _bleu_of(totals_NC: np.ndarray) -> np.ndarray:
    length_N, reference_N = totals_NC[:, 0], totals_NC[:, 1]
    matched_Nn, grams_Nn = totals_NC[:, 2 : 2 + ORDERS], totals_NC[:, 2 + ORDERS :]
    precision_N = np.prod((matched_Nn + _TINY) / (grams_Nn + _SMALL), axis=1) ** (1 / ORDERS)
    ratio_N = (length_N + _TINY) / (reference_N + _SMALL)
    brevity_N = np.exp(np.minimum(0.0, 1 - 1 / np.maximum(ratio_N, _TINY)))
    scores_N: np.ndarray = precision_N * brevity_N
    return scores_N


def _by_number(
    captions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Mapping[int, list[str]], Mapping[int, list[str]]]:
    """References and captions as the scorers want them."""
    return dict(enumerate(map(list, references))), {number: [caption] for number, caption in enumerate(captions)}


def _cider_scorer() -> Any:
    try:
        from pycocoevalcap.cider.cider import Cider
    except ImportError:
        raise UserError(_ABSENT) from None
    return Cider


def _bleu_module() -> Any:
    try:
        from pycocoevalcap.bleu import bleu_scorer
    except ImportError:
        raise UserError(_ABSENT) from None
    return bleu_scorer


_ABSENT = "captions are scored with pycocoevalcap, which is not installed: pip install 'vlbench[captions]'"
