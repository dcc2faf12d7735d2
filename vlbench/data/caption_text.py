"""What becomes of a caption before it is cut into tokens: one spelling of each word, and sides that follow the image.

VirTex (2006.06666, appendix; kdexd/virtex, virtex/data): lower case, accents stripped, and where an image is mirrored
the words "left" and "right" change places.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal, TypeAlias

FlipWords: TypeAlias = Literal["words", "substrings"]

_SIDES = {"left": "right", "right": "left"}
_PATTERNS = {"words": re.compile(r"\b(?:left|right)\b"), "substrings": re.compile("left|right")}


def normalise_caption(text: str) -> str:
    """``text`` in lower case, without accents (NFKD, combining marks dropped), its white space single blanks."""
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return " ".join("".join(sign for sign in decomposed if not unicodedata.combining(sign)).split())


def swap_sides(text: str, *, rule: FlipWords = "words") -> str:
    """A normalised English caption of the mirrored image: every "left" becomes "right" and the other way round.

    Args:
        text: in lower case.
        rule: ``words`` takes whole words ("left-hand" too). ``substrings`` is VirTex's released rule, kept for whoever
            wants its numbers: it makes "bleft" of "bright", "upleft" of "upright" and "rightover" of "leftover".
    """
    return _PATTERNS[rule].sub(lambda found: _SIDES[found[0]], text)
