"""Making a weakly aligned corpus: mu-VLA, section 3.1 of Zhou et al., CVPR 2022 (arXiv 2203.00242).

The tags of an image's objects ask a pool of sentences that nobody paired with images; the ``k`` nearest are kept, and
their noun phrases are linked to the regions. Nothing here looks at a pixel or at which caption belongs to which image,
unless ``exclude_own`` or ``aligned`` asks for the image's own captions in order to leave them out or to put them in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from vlbench.core.config import Config
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Source
from vlbench.data.regions.open import open_regions
from vlbench.data.stream import Mixture
from vlbench.data.weak.corpus import Aligned, Corpus, Entry, write_corpus
from vlbench.data.weak.encoders import Encoder, load_encoder
from vlbench.data.weak.images import TaggedImages, TagOrder, read_images
from vlbench.data.weak.links import PhraseBook
from vlbench.data.weak.parts import Parts
from vlbench.data.weak.phrases import Chunker, Span, load_chunker
from vlbench.data.weak.pools import merge_equal
from vlbench.data.weak.search import Backend, Blocks, Metric, has_faiss, in_blocks, nearest, normalised, pair_scores
from vlbench.data.weak.tally import Tally

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and the total."""

_AT_ONCE = 2048


class AlignSettings(Config):
    """How a corpus is made. For the source tags see the package."""

    k: int = Field(default=5, ge=1, le=1000, description="sentences an image [M: 5 of the stored 10 on CC]")
    encoder: str = Field(default="tfidf", description="tfidf, minilm, or a Sentence-Transformers name or folder")
    chunker: str = Field(default="auto", description="noun phrases by spacy, by tags (rules), or auto")
    metric: Metric = Field(default="cosine", description="cosine: the paper; l2: the released code [H]")
    order: TagOrder = Field(default="given", description="of the tags in a query: given or sorted [H: both]")
    exclude_own: bool = Field(default=False, description="never give an image its own caption [H: it may]")
    aligned: float | None = Field(
        default=None, ge=0, le=1, description="share of the images whose own caption comes first; None: retrieval only"
    )
    min_link: float = Field(default=0.0, ge=0, le=1, description="smallest cosine of a link [H: none]")
    language: str = Field(default="en", description="of the images' own captions")
    seed: int = Field(default=0, ge=0, description="which images the aligned share takes")
    backend: Backend = Field(default="auto", description="auto: FAISS where it is installed; the ranks are the same")
    block: int = Field(default=32_768, ge=1, description="sentences at once")
    queries: int = Field(default=512, ge=1, description="queries at once")

    @property
    def needs_own(self) -> bool:
        """Whether the images' own captions are looked at."""
        return self.exclude_own or self.aligned is not None


@dataclass(frozen=True)
class _Work:
    """What all stages share."""

    images: TaggedImages
    pool: Sequence[str]
    encoder: Encoder
    settings: AlignSettings
    parts: Parts
    progress: Progress

    def vectors(self, texts: Sequence[str]) -> Any:
        """Vectors of texts as the metric compares them."""
        found = self.encoder.encode(texts)
        return normalised(found) if self.settings.metric == "cosine" else found


def weakly_align(
    sources: Source | Mixture | Sequence[Source],
    pool_texts: Sequence[str],
    *,
    out: Path | str,
    settings: AlignSettings | None = None,
    features: Path | str | None = None,
    labels: Path | str | None = None,
    encoder: Encoder | None = None,
    chunker: Chunker | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Make the corpus of some images and write it to ``out``.

    - Equal sentences of the pool are merged (white space and letter case aside) first; their order breaks ties.
    - An image whose tags share nothing with any sentence (``tfidf``), or that has no tag, gets none.
    - ``exclude_own`` leaves out every sentence that says what one of the image's own captions says, letter case and
      white space aside, whichever image it came from.
    - ``aligned=f``: an image is in the aligned share where a hash of ``seed`` and its id falls below ``f``, so that a
      larger share contains a smaller one. There one of its own captions, drawn by the same hash, comes first, with the
      score that it has; ``k - 1`` retrieved sentences follow. All others get ``k`` retrieved sentences. Own captions
      are left out of what is retrieved everywhere: at 0 no image has its own caption, at 1 every one that has captions.

    Work is in parts beside ``out``: a killed run with the same settings and data goes on from them.

    Args:
        sources: images with regions, or any where there are ``features``; their captions decide nothing unless
            ``settings.needs_own``, and are counted.
        pool_texts: the sentences.
        settings: None: the defaults.
        out: the corpus; written whole or not at all.
        features: region features, whose classes are then the tags; an image without any is counted and left out.
        labels: as ``data.regions.open`` takes them.
        encoder: None: the one that the settings name.
        chunker: None: the one that the settings name.
        progress: called now and then.

    Raises:
        UserError: for settings that do not go together, packages that are absent, images without tags or, where they
            are needed, without captions.
    """
    settings = settings if settings is not None else AlignSettings()
    progress = progress if progress is not None else lambda what, done, total: None
    sources = [sources] if isinstance(sources, Source) else sources
    sources = sources.sources if isinstance(sources, Mixture) else sources
    encoder = encoder if encoder is not None else load_encoder(settings.encoder)
    if encoder.sparse and settings.metric == "l2":
        raise UserError(f"--metric l2 is for sentence encoders; {encoder.name} is compared by cosine")
    images = read_images(
        sources,
        features=open_regions(features, labels=labels) if features is not None else None,
        captions="text" in frozenset().union(*(source.provides for source in sources)),
        language=settings.language,
        progress=lambda done, total: progress("reading tags", done, total),
    )
    if settings.needs_own and not images.has_captions:
        raise UserError(
            f"data {sources[0].spec!r} has no captions in {settings.language!r}, which exclude_own and aligned look at"
        )
    pool = merge_equal(pool_texts)
    if not pool:
        raise UserError("the pool has no sentence")
    chunker = chunker if chunker is not None else load_chunker(settings.chunker, images.vocabulary)
    marks = {
        "images": images.fingerprint(),
        "pool": _pool_fingerprint(pool),
        "encoder": encoder.fingerprint(),
        "chunker": chunker.name,
    }
    parts = Parts(Path(out), fingerprint([settings.model_dump(), marks]))
    encoder.fit(pool)
    work = _Work(images, pool, encoder, settings, parts, progress)
    made_of: dict[str, Any] = {"settings": settings.model_dump(), "fingerprints": marks}
    made_of |= {"encoder": encoder.name, "chunker": chunker.name, "data": [source.spec for source in sources]}
    if features is not None:
        made_of["features"] = [str(path) for path in (features, labels) if path is not None]
    made_of["search"] = "faiss" if settings.backend != "numpy" and not encoder.sparse and has_faiss() else "numpy"
    corpus = write_corpus(out, _entries(work, chunker, made_of), ids=images.ids, made_of=made_of)
    parts.remove()
    return corpus


def _retrieve(work: _Work) -> tuple[np.ndarray, Any]:
    """For each image its question's number, and the answers to the questions: ``(place, score)``, best first."""
    numbers: dict[str, int] = {}
    queries = (work.images.query(row, work.settings.order) for row in range(len(work.images)))
    question_N = np.array([numbers.setdefault(query, len(numbers)) for query in queries], dtype=np.int64)
    asked = list(numbers)
    spare = max(len(work.images.own(row)) for row in range(len(work.images))) if work.settings.needs_own else 0
    k = min(work.settings.k + spare, len(work.pool))
    blocks = _pool_blocks(work)
    answers = []
    for first in range(0, len(asked), work.settings.queries):
        block = asked[first : first + work.settings.queries]
        answers.append(work.parts.array(f"found-{first:09d}", partial(_answers, work, block, blocks, k)))
        work.progress("searching", min(first + len(block), len(asked)), len(asked))
    return question_N, np.concatenate(answers)


def _answers(work: _Work, queries: Sequence[str], blocks: Blocks, k: int) -> np.ndarray:
    settings = work.settings
    top = nearest(work.vectors(queries), blocks, k, metric=settings.metric, backend=settings.backend)
    answers = np.empty(top.places_QK.shape, dtype=[("place", "<i8"), ("score", "<f8")])
    answers["place"], answers["score"] = top.places_QK, top.scores_QK
    return answers


def _pool_blocks(work: _Work) -> Blocks:
    """The vectors of the pool: dense ones in parts on disk, sparse ones in memory."""
    size = work.settings.block
    if work.encoder.sparse:
        return in_blocks(work.vectors(work.pool), size)
    starts = range(0, len(work.pool), size)
    encoded = [work.parts.array(f"pool-{first:09d}", partial(_encoded, work, first, first + size)) for first in starts]
    return lambda: iter([(first, np.asarray(block)) for first, block in zip(starts, encoded)])


def _encoded(work: _Work, first: int, end: int) -> Any:
    """The vectors of a stretch of the pool, with a word on progress now and then."""
    found = []
    end = min(end, len(work.pool))
    for start in range(first, end, _AT_ONCE):
        found.append(work.vectors(work.pool[start : min(start + _AT_ONCE, end)]))
        work.progress("encoding the pool", min(start + _AT_ONCE, end), len(work.pool))
    return np.concatenate(found)


class _Texts:
    """Sentences by place: those of the pool, and behind them captions that were put before what was retrieved."""

    def __init__(self, pool: Sequence[str]) -> None:
        self._pool = pool
        self._put: list[str] = []

    def __getitem__(self, place: int) -> str:
        return self._pool[place] if place < len(self._pool) else self._put[place - len(self._pool)]

    def put(self, text: str) -> int:
        """The place of a caption."""
        self._put.append(text)
        return len(self._pool) + len(self._put) - 1


def _chosen(work: _Work, texts: _Texts) -> Callable[[], Iterator[list[tuple[int, float]]]]:
    """Gone through as often as needed: ``(place, score)`` of each image's sentences, an own caption first or left out.

    Chosen anew each time, since three million lists would be the largest thing in memory.
    """
    question_N, answers = _retrieve(work)
    own_first = _own_first(work) if work.settings.aligned is not None else {}
    first = {row: (texts.put(text), score) for row, (text, score) in own_first.items()}

    def chosen() -> Iterator[list[tuple[int, float]]]:
        for row, question in enumerate(question_N.tolist()):
            own = {text.casefold() for text in work.images.own(row)} if work.settings.needs_own else set()
            picked = [first[row]] if row in first else []
            asked = len(work.images.tag_numbers(row)) > 0
            for place, score in answers[question].tolist() if asked else ():
                if place < 0 or len(picked) == work.settings.k:
                    break
                if texts[place].casefold() not in own:
                    picked.append((place, score))
            yield picked

    return chosen


def _own_first(work: _Work) -> dict[int, tuple[str, float]]:
    """The images of the aligned share by row, each with one of its own captions and that caption's score."""
    settings, images = work.settings, work.images
    assert settings.aligned is not None, "there is an aligned share"
    drawn: dict[int, str] = {}
    for row, image_id in enumerate(images.ids):
        own = images.own(row)
        draw = hashlib.sha256(f"{settings.seed}/{image_id}".encode()).digest()
        if own and int.from_bytes(draw[:8]) < settings.aligned * 2**64:
            drawn[row] = own[int.from_bytes(draw[8:16]) % len(own)]
    rows = list(drawn)
    scored: dict[int, tuple[str, float]] = {}
    for start in range(0, len(rows), _AT_ONCE):
        block = rows[start : start + _AT_ONCE]
        queries = work.vectors([images.query(row, settings.order) for row in block])
        captions = work.vectors([drawn[row] for row in block])
        scores = pair_scores(queries, captions, settings.metric)
        scored |= {row: (drawn[row], score) for row, score in zip(block, scores.tolist())}
        work.progress("own captions", start + len(block), len(rows))
    return scored


def _entries(work: _Work, chunker: Chunker, made_of: dict[str, Any]) -> Iterator[Entry]:
    """The rows of the corpus; behind the last, ``made_of["counts"]`` is set."""
    texts = _Texts(work.pool)
    chosen = _chosen(work, texts)
    book = _phrase_book(work, chunker, texts, sorted({place for picked in chosen() for place, _ in picked}))
    tally = Tally(work.settings.k, len(work.pool))
    for row, picked in enumerate(chosen()):
        links = book.links(work.images.tag_numbers(row), [place for place, _ in picked])
        aligned = tuple(
            Aligned(texts[place], float(np.float32(score)), found) for (place, score), found in zip(picked, links)
        )
        entry = Entry(work.images.ids[row], work.images.tags(row), aligned)
        tally.add(entry, work.images.own(row), [place for place, _ in picked])
        work.progress("linking", row + 1, len(work.images))
        yield entry
    made_of["counts"] = tally.counts() | {"unreadable": work.images.tally.counts()}


def _phrase_book(work: _Work, chunker: Chunker, texts: _Texts, places: Sequence[int]) -> PhraseBook:
    spans: dict[int, Sequence[Span]] = {}
    for start in range(0, len(places), _AT_ONCE):
        block = places[start : start + _AT_ONCE]
        spans.update(zip(block, chunker.spans([texts[place] for place in block])))
        work.progress("noun phrases", start + len(block), len(places))
    return PhraseBook(
        spans,
        texts,
        encode=lambda found: normalised(work.encoder.encode(found)),  # links are cosines whatever the metric
        tags=work.images.vocabulary,
        min_score=work.settings.min_link,
    )


def _pool_fingerprint(pool: Sequence[str]) -> str:
    total = hashlib.sha256()
    for text in pool:
        total.update(text.encode("utf-8", "surrogatepass") + b"\n")
    return total.hexdigest()[:16]
