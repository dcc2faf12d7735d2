"""The words of an alt-text and their pairs, as the filters count them.

ALIGN's paper does not say how it cut texts into unigrams; this is one simple, stable rule: compatibility forms are
composed (NFKC), letters lower-cased; a web address is one word; else a word is a run of letters, digits, underscores
and combining marks, with apostrophes inside it (``don't``). All else separates. A script that is written without
spaces gives one long word a phrase, so that the length rule is of no use there.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata


def words(text: str) -> list[str]:
    """The unigrams of ``text``, in order."""
    return _pattern().findall(unicodedata.normalize("NFKC", text).lower())


def ngrams(unigrams: list[str]) -> list[str]:
    """Unigrams, then bigrams as two words with a space between; no word holds a space, so the two never meet."""
    return unigrams + [f"{first} {second}" for first, second in itertools.pairwise(unigrams)]


@functools.cache
def _pattern() -> re.Pattern[str]:
    # `\w` of Python's re lacks combining marks, without which Indic words fall apart.
    marks = "".join(chr(code) for code in range(0x10000) if unicodedata.category(chr(code)).startswith("M"))
    letter = rf"[\w{re.escape(marks)}]"
    return re.compile(rf"(?:https?://|www\.)\S+|{letter}+(?:['’]{letter}+)*")
