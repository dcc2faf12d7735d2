"""Texts as word pieces of a fixed greatest length, and how many had to be cut for it."""

from __future__ import annotations

from collections.abc import Iterable

from vlbench.data.wordpiece import WordPieceTokenizer

_ANY_LENGTH = 1 << 20


class Words:
    """A vocabulary: texts to word pieces, ``[CLS] ... [SEP]``.

    Args:
        content: as ``data.wordpiece`` gives it.
        longest: pieces that are kept of a text, the two included; ``[SEP]`` stays.
    """

    def __init__(self, content: bytes, longest: int) -> None:
        self._tokenizer = WordPieceTokenizer(content, context_length=_ANY_LENGTH)
        self.size = self._tokenizer.size
        self.longest = longest

    def __call__(self, texts: Iterable[str]) -> tuple[list[list[int]], int]:
        """The pieces of each text, and how many texts were too long and are cut."""
        rows, cut = [], 0
        known: dict[str, list[int]] = {}
        for text in texts:
            row = known.get(text)
            if row is None:
                row = known[text] = self._tokenizer.ids(text)
            cut += len(row) > self.longest
            rows.append(row if len(row) <= self.longest else [*row[: self.longest - 1], row[-1]])
        return rows, cut
