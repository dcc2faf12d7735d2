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
from vlbench.data.regions.open import stamp
from vlbench.data.sources import open_source
from vlbench.data.spec import parse_spec
from vlbench.data.weak.align import AlignSettings, weakly_align
from vlbench.data.weak.corpus import Corpus, open_corpus
from vlbench.data.weak.encoders import Encoder, load_encoder
from vlbench.data.weak.images import read_images
from vlbench.data.weak.pools import read_pool
from vlbench.recipes.muvla.features import check_features, missing_images


def find_corpus(config: Any, sources: Sequence[Source]) -> Corpus:
    """The corpus of a run, made now if it is to be made and is not there.

    Sentences are found by their words (TF-IDF), or by the encoder that is named, in a pool from which all pairing was
    taken; a pool of the data's own captions may give an image its own one back, unless ``exclude_own``. The corpus lies
    in the cache under a fingerprint of the data's and the pool's content, of the settings and of the encoder's weights,
    and is made under a lock.

    Raises:
        UserError: where the named corpus cannot be opened, the encoder cannot be loaded, there are no sentences, or
            (``exclude_own``, ``aligned``) no own captions to look at.
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
    encoder = None
    if settings.encoder != "tfidf":  # which has no weights, and whose key is what it was before there were others
        encoder = load_encoder(settings.encoder)
        made_of["encoder"] = encoder.fingerprint()
    if config.boxes is not None:
        made_of["boxes"] = stamp(config.boxes)
    path = cache_dir() / "weak" / f"{fingerprint(made_of)}.arrow"
    return _make(path, sources, pool, settings, encoder, boxes=config.boxes)


def corpus_of(config: Any, assets: Mapping[str, bytes]) -> Corpus:
    """The corpus that ``learn_assets`` found, in another process; made again where a cache was emptied since."""
    if config.corpus is not None:
        return open_corpus(Path(config.corpus).expanduser())
    path = Path(assets["corpus"].decode())
    with contextlib.suppress(UserError):
        return open_corpus(path)
    specs = [parse_spec(text) for text in config.data]
    sources = [open_source(spec) for spec in specs]
    return _make(path, sources, config.pool or config.data, _settings(config), boxes=config.boxes)


def tags_of(config: Any, sources: Sequence[Source], corpus: Corpus | None) -> tuple[list[str], list[str]]:
    """All tags, sorted, and all sentences of the corpus."""
    stored = config.features or config.boxes
    named = check_features(config, sources) if stored is not None else []
    if config.boxes is not None and not named and corpus is None:
        raise UserError(f"{stored}: it names no classes, and region tags are all that is to be learnt")
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


def own_line(counts: Mapping[str, Any]) -> str:
    """In words: what share of the images that have captions found an own one among their sentences."""
    share = counts["own_found"]
    if share is None:
        return "corpus: no image has a caption of its own to find"
    return f"corpus: own caption among the sentences of {share:.1%} of the images that have captions"


def _settings(config: Any) -> AlignSettings:
    # Rules rather than spaCy, whether it is installed or not: a run must not depend on that.
    return AlignSettings(
        k=config.k,
        encoder=config.encoder,
        chunker="tags",
        exclude_own=config.exclude_own,
        aligned=config.aligned,
    )


def _make(
    path: Path,
    sources: Sequence[Source],
    pool: Sequence[str],
    settings: AlignSettings,
    encoder: Encoder | None = None,
    *,
    boxes: str | None = None,
) -> Corpus:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        with contextlib.suppress(UserError):  # not there, or written by another version: it is made
            return open_corpus(path)
        return weakly_align(
            list(sources), read_pool(pool), out=path, settings=settings, features=boxes, encoder=encoder
        )
