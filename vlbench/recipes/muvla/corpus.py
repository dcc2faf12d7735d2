"""Where the sentences come from: the corpus that the settings name, or one made of the data and kept in the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.paths import cache_dir
from vlbench.core.types import Source
from vlbench.data.digests import source_fingerprint
from vlbench.data.sources import open_source
from vlbench.data.spec import parse_spec
from vlbench.data.weak.align import AlignSettings, weakly_align
from vlbench.data.weak.corpus import Corpus, open_corpus
from vlbench.data.weak.images import read_images
from vlbench.data.weak.pools import read_pool
from vlbench.recipes.muvla.features import check_features, missing_images


def find_corpus(config: Any, sources: Sequence[Source]) -> Corpus:
    """The corpus of a run, made now if it is to be made and is not there.

    Sentences are found by TF-IDF in a pool from which all pairing was taken. It lies in the cache under a fingerprint
    of the data's and the pool's content and of the settings, and is made under a lock.

    Raises:
        UserError: where the named corpus cannot be opened, or there are no sentences.
    """
    if config.corpus is not None:
        corpus = open_corpus(Path(config.corpus).expanduser())
        missing = missing_images(sources, frozenset(corpus.ids()))
        if missing:
            raise UserError(
                f"{corpus.path}: {len(missing)} images of the data are not in it, first {missing[0]!r}; make it of "
                "these data with `vlbench data weakly-align`"
            )
        return corpus
    pool = config.pool or config.data
    settings = _settings(config)
    made_of = {
        "sources": [source_fingerprint(source) for source in sources],
        "pool": "their captions" if not config.pool else read_pool(pool),
        "settings": settings.model_dump(mode="json"),
        "ids": fingerprint([list(source.ids()) for source in sources]),
    }
    return _make(cache_dir() / "weak" / f"{fingerprint(made_of)}.arrow", sources, pool, settings)


def corpus_of(config: Any, assets: Mapping[str, bytes]) -> Corpus:
    """The corpus that ``learn_assets`` found, in another process; made again where a cache was emptied since."""
    if config.corpus is not None:
        return open_corpus(Path(config.corpus).expanduser())
    path = Path(assets["corpus"].decode())
    with contextlib.suppress(UserError):
        return open_corpus(path)
    specs = [parse_spec(text) for text in config.data]
    return _make(path, [open_source(spec) for spec in specs], config.pool or config.data, _settings(config))


def tags_of(config: Any, sources: Sequence[Source], corpus: Corpus | None) -> tuple[list[str], list[str]]:
    """All tags, sorted, and all sentences of the corpus."""
    named = check_features(config, sources) if config.features is not None else []
    if corpus is None:
        return named or sorted(read_images(sources).vocabulary), []
    tags: set[str] = set(named)
    texts: list[str] = []
    for entry in corpus:
        tags.update(entry.tags)
        texts.extend(found.text for found in entry.aligned)
    if not texts:
        raise UserError(f"{corpus.path}: there is not a sentence in it")
    return sorted(tags), texts


def _settings(config: Any) -> AlignSettings:
    # Rules rather than spaCy, whether it is installed or not: a run must not depend on that.
    return AlignSettings(k=config.k, encoder="tfidf", chunker="tags", aligned=config.aligned)


def _make(path: Path, sources: Sequence[Source], pool: Sequence[str], settings: AlignSettings) -> Corpus:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        with contextlib.suppress(UserError):  # not there, or written by another version: it is made
            return open_corpus(path)
        return weakly_align(list(sources), read_pool(pool), out=path, settings=settings)
