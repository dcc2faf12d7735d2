"""Pools of sentences that are not paired with any image: text files, and the captions of data sets.

What pairs a caption with its image is thrown away: equal sentences are merged and the order is shuffled, so that
neither a position nor a count says where a sentence came from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from vlbench.core.errors import BadExample, UserError
from vlbench.data.sources import open_source
from vlbench.data.stream import BadTally


def read_pool(
    specs: Sequence[str], *, seed: int = 0, language: str = "en", progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """The sentences of all ``specs``, each once, in an order that ``seed`` draws.

    Args:
        specs: a text file with a sentence a line (its path, or ``text:PATH``), or a data spec whose captions are taken.
        seed: of the order.
        language: of the captions, where a data set has several.
        progress: called with the captioned examples read, and all of them.

    Raises:
        UserError: where a file or data set cannot be read, or there is no sentence at all.
    """
    texts: dict[str, None] = {}
    for spec in specs:
        lines = _lines(spec) if text_file(spec) is not None else _captions(spec, language, progress)
        found = [text for text in map(one_line, lines) if text]
        if not found:
            raise UserError(f"--pool {spec}: there is no sentence in it (language {language!r})")
        texts.update(dict.fromkeys(found))
    pool = list(texts)
    return [pool[place] for place in np.random.default_rng([seed, len(pool)]).permutation(len(pool))]


def merge_equal(texts: Sequence[str]) -> list[str]:
    """``texts`` in their order, blank ones left out; of those that differ in white space and case only, the first."""
    kept: dict[str, str] = {}
    for text in map(one_line, texts):
        if text:
            kept.setdefault(text.casefold(), text)
    return list(kept.values())


def one_line(text: str) -> str:
    """``text`` with every run of white space as one space."""
    return " ".join(text.split())


def text_file(spec: str) -> Path | None:
    """The file that ``spec`` names as plain text, or None where it is a data spec."""
    if spec.startswith("text:"):
        return Path(spec.removeprefix("text:")).expanduser()
    path = Path(spec).expanduser()
    return path if path.is_file() else None


def _lines(spec: str) -> Iterator[str]:
    path = text_file(spec)
    assert path is not None, f"{spec} is no text file"
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as handle:
            for line in handle:
                number += 1
                yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number + 1} or near it is not UTF-8 ({error.reason}); convert it") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def _captions(spec: str, language: str, progress: Callable[[int, int], None] | None) -> Iterator[str]:
    source = open_source(spec)
    if "text" not in source.provides:
        raise UserError(f"--pool {spec}: this data set has no captions")
    tally = BadTally()
    for index in range(len(source)):
        try:
            yield from source[index].texts.get(language, ())
            tally.record(())
        except BadExample as error:
            tally.record([error])
        if progress is not None:
            progress(index + 1, len(source))
