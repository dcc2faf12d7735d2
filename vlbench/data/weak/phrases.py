"""Noun phrases of sentences, as character spans.

- ``spacy``: ``doc.noun_chunks`` of ``en_core_web_sm``, as the released code does. [H:extract_np.py] ``python -m spacy
  download en_core_web_sm`` fetches the model; offline, its wheel is among the releases of explosion/spacy-models.
- ``tags``: a small set of rules around the words of the tag vocabulary, for a machine without that model. It finds
  the phrases that can be linked to a region, and no others: "a large red circle on a dark background" gives one phrase
  where no tag is a background.
- ``auto``: ``spacy`` where the model loads, else ``tags``.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias

from vlbench.core.errors import UserError
from vlbench.core.names import unknown

Span: TypeAlias = tuple[int, int]
CHUNKERS = ("auto", "spacy", "tags")
SPACY_MODEL = "en_core_web_sm"


class Chunker(Protocol):
    """Sentences to the spans of their noun phrases."""

    name: str

    def spans(self, texts: Sequence[str]) -> list[tuple[Span, ...]]:
        """For each text the (start, end) of its noun phrases, left to right, not overlapping."""


def load_chunker(name: str, tags: Iterable[str]) -> Chunker:
    """The chunker called ``name``; ``tags`` is the vocabulary of the images' tags.

    Raises:
        UserError: for an unknown name, or ``spacy`` where it or its model is not installed.
    """
    if name not in CHUNKERS:
        raise UserError(f"--chunker: {unknown('chunker', name, CHUNKERS)}")
    if name != "tags":
        try:
            return SpacyChunker()
        except UserError:
            if name == "spacy":
                raise
    return TagChunker(tags)


class SpacyChunker:
    """Base noun phrases by spaCy's small English model."""

    def __init__(self) -> None:
        try:
            spacy = importlib.import_module("spacy")
            self._nlp: Any = spacy.load(SPACY_MODEL, exclude=["ner", "lemmatizer"])
        except (ImportError, OSError, ValueError) as error:
            # ValueError: a spaCy that was built for another NumPy, or a model of another spaCy.
            reason = str(error).strip().split("\n")[0][:160]
            raise UserError(
                f"--chunker spacy needs spaCy and its model ({reason}): pip install -U spacy, then python -m "
                f"spacy download {SPACY_MODEL} (offline: pip install the model's wheel), or use --chunker tags"
            ) from None
        meta = self._nlp.meta
        self.name = f"spacy {SPACY_MODEL} {meta.get('version', '')}".strip()

    def spans(self, texts: Sequence[str]) -> list[tuple[Span, ...]]:
        """``doc.noun_chunks`` of each text, pronouns included."""
        return [
            tuple((chunk.start_char, chunk.end_char) for chunk in doc.noun_chunks)
            for doc in self._nlp.pipe(texts, batch_size=256)
        ]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_DETERMINERS = _words(
    "a an the this that these those some any every each either neither another no several many few both all half "
    "one two three four five six seven eight nine ten eleven twelve "
    "my your his her its our their"
)
_ATTRIBUTES = _words(
    "red orange yellow green blue purple violet pink brown black white gray grey silver gold golden beige tan dark "
    "light bright pale colorful colourful large big huge giant small little tiny short tall long wide narrow thick "
    "thin old young new modern ancient adult baby male female wooden metal plastic glass stone brick leather striped "
    "checkered spotted plaid round square rectangular oval wet dry dirty clean empty full open closed hot cold fresh "
    "beautiful pretty cute happy sad busy snowy sunny cloudy rainy sandy grassy rocky rusty furry fluffy fancy other "
    "same different single double first second third last left right top bottom front back very"
)
_NEVER_INSIDE = _words(
    "and or but nor of in on at by for from to with without into onto over under above below near behind beside "
    "between through across along around against among off up down out inside outside next as like than while is are "
    "was were be been being am has have had do does did can could will would shall should may might must not who whom "
    "whose which what when where why how there here it he she they we you i him them us me it's that's "
    "then so if because"
)
_IRREGULAR = {
    "man": "men",
    "woman": "women",
    "person": "people",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "mouse": "mice",
    "goose": "geese",
    "leaf": "leaves",
    "knife": "knives",
    "shelf": "shelves",
    "wolf": "wolves",
    "life": "lives",
    "wife": "wives",
    "half": "halves",
    "loaf": "loaves",
}
_REACH = 5


class TagChunker:
    """Noun phrases that end in a word of a tag.

    - A head is the last word of a tag, in singular or plural; heads in a row are one phrase ("traffic light pole").
    - To its left belong known attribute words: a list of common ones, and every word before the last of a tag (the
      "red" of "red circle").
    - If a determiner, numeral or possessive stands at most five words to the left, all between belongs to the phrase
      ("an extremely muddy dog"), unless a head, a comma or a word that cannot be inside a noun phrase (a preposition,
      conjunction, pronoun or auxiliary) lies there; a word in -ing may, right behind the determiner ("a sleeping dog",
      but not "the cat chasing dogs").

    Args:
        tags: the vocabulary.
    """

    name = "tags v1"

    def __init__(self, tags: Iterable[str]) -> None:
        self._heads: set[str] = set()
        self._attributes: set[str] = set(_ATTRIBUTES)
        for tag in tags:
            *before, head = [match.group().lower() for match in _WORD.finditer(tag)] or [""]
            self._attributes.update(before)
            self._heads.update((head, *_plurals(head)))
        self._heads -= {"", *_NEVER_INSIDE, *_DETERMINERS}

    def spans(self, texts: Sequence[str]) -> list[tuple[Span, ...]]:
        """The phrases of each text."""
        return [tuple(self._spans(text)) for text in texts]

    def _spans(self, text: str) -> Iterable[Span]:
        matches = list(_WORD.finditer(text))
        words = [match.group().lower() for match in matches]
        free = 0  # the first word that no earlier phrase holds
        place = 0
        while place < len(words):
            if not self._is_head(words, place, text, matches):
                place += 1
                continue
            last = place
            while last + 1 < len(words) and words[last + 1] in self._heads and _adjoin(text, matches, last):
                last += 1
            first = self._first(text, matches, words, place, free)
            yield matches[first].start(), matches[last].end()
            free = place = last + 1

    def _is_head(self, words: list[str], place: int, text: str, matches: list[re.Match[str]]) -> bool:
        """A head, and not only an attribute of one that follows ("an orange plastic cup")."""
        if words[place] not in self._heads or words[place] not in self._attributes:
            return words[place] in self._heads
        after = place + 1
        while after < len(words) and _adjoin(text, matches, after - 1) and words[after] not in self._heads:
            if words[after] not in self._attributes:
                return True
            after += 1
        return after == place + 1 or after == len(words) or not _adjoin(text, matches, after - 1)

    def _first(self, text: str, matches: list[re.Match[str]], words: list[str], head: int, free: int) -> int:
        """The index of the phrase's first word."""
        first = head
        while first > free and words[first - 1] in self._attributes and _adjoin(text, matches, first - 1):
            first -= 1
        for place in range(first - 1, max(free, head - 1 - _REACH) - 1, -1):
            word = words[place]
            if not _adjoin(text, matches, place) or word in _NEVER_INSIDE:
                break
            if word in _DETERMINERS:
                return place
            if word.endswith("ing") and (place == 0 or words[place - 1] not in _DETERMINERS):
                break
        return first


def _adjoin(text: str, matches: list[re.Match[str]], place: int) -> bool:
    """Whether only spaces lie between a word and the next."""
    return text[matches[place].end() : matches[place + 1].start()].isspace()


def _plurals(noun: str) -> tuple[str, ...]:
    if noun in _IRREGULAR:
        return (_IRREGULAR[noun],)
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return (noun + "es",)
    if noun.endswith("y") and noun[-2:-1] not in set("aeiou"):
        return (noun[:-1] + "ies",)
    return (noun + "s", noun + "es") if noun.endswith("o") else (noun + "s",)
