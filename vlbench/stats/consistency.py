"""NLVR2's two numbers: accuracy, and consistency over the image pairs that one sentence is judged on.

The sentence of an identifier ``SPLIT-SET-PAIR-SENTENCE`` is judged on up to four pairs of the same set of images. It is
consistent where every prediction for it is right; consistency is the share of such sentences (Suhr et al., ACL 2019,
1811.00491; lil-lab/nlvr, nlvr2/eval/metrics.py, which forgets PAIR and keeps the rest).

The sampling unit of both numbers is the set of images, ``SPLIT-SET``: both sentences of a set are judged on the same
pairs, so that their values are no more independent than two captions of an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.types import Outcomes

_PARTS = 4


def sentence_group(identifier: str) -> str:
    """``dev-850-2-0`` to ``dev-850-0``: what is equal for all pairs that one sentence is judged on.

    Raises:
        UserError: for an identifier that has not the form ``SPLIT-SET-PAIR-SENTENCE``.
    """
    split, number, _, sentence = _parts(identifier)
    return f"{split}-{number}-{sentence}"


def image_set(identifier: str) -> str:
    """``dev-850-2-0`` to ``dev-850``: the set that its images are from. Raises as ``sentence_group`` does."""
    split, number, _, _ = _parts(identifier)
    return f"{split}-{number}"


def nlvr2_outcomes(identifiers: Sequence[str], right: Sequence[bool]) -> dict[str, Outcomes]:
    """``accuracy`` with a value an example and ``consistency`` with a value a sentence, both clustered by image set.

    Args:
        identifiers: N different identifiers of the form ``SPLIT-SET-PAIR-SENTENCE``.
        right: whether each prediction is right.

    Raises:
        UserError: where there is no example, an identifier has another form, or one occurs twice.
    """
    assert len(identifiers) == len(right), f"{len(identifiers)} identifiers and {len(right)} predictions"
    if not len(identifiers):
        raise UserError("NLVR2 without a single example: there is no accuracy")
    all_right: dict[str, bool] = {}
    set_of: dict[str, str] = {}
    seen: set[str] = set()
    for identifier, is_right in zip(identifiers, right):
        if identifier in seen:
            raise UserError(f"NLVR2 example {identifier!r} occurs twice; each identifier must have one prediction")
        seen.add(identifier)
        group = sentence_group(identifier)
        all_right[group] = all_right.get(group, True) and bool(is_right)
        set_of[group] = image_set(identifier)
    groups = list(all_right)
    return {
        "accuracy": Outcomes(
            list(identifiers),
            np.asarray(right, dtype=np.float64),
            [image_set(identifier) for identifier in identifiers],
            binary=True,
        ),
        "consistency": Outcomes(
            groups,
            np.asarray([all_right[group] for group in groups], dtype=np.float64),
            [set_of[group] for group in groups],
            binary=True,
        ),
    }


def _parts(identifier: str) -> list[str]:
    parts = identifier.split("-")
    if len(parts) != _PARTS or not all(parts):
        raise UserError(f"NLVR2 identifier {identifier!r}: expected SPLIT-SET-PAIR-SENTENCE, for instance dev-850-2-0")
    return parts
