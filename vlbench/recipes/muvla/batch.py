"""mu-VLA's batches: which sentence an image gets, what of it is masked, and how rows become tensors.

Everything is drawn from ``Sample.seed``, so that a batch is the same however many processes make it.

- RT reads an image's tags beside its regions: words of tags and whole regions are masked.
- RN reads a retrieved sentence beside the regions. Only linked phrases or linked regions are masked, never both in one
  row, each with a probability in proportion to the link's similarity; a masked region is to predict a word of its
  phrase.
- IS reads the retrieved sentence, or (half the time) one of another image, masked as BERT masks. As the released code
  has it (``released_rows``) that pair is not masked, and a row of its own (``mlm``) is: the retrieved sentence, whose
  words and regions are masked independently.

Shapes: B batch, L words, R regions, F width of a region's feature.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from vlbench.core.errors import UserError
from vlbench.core.types import Sample
from vlbench.data.regions.features import box_vector
from vlbench.data.weak.corpus import Corpus, Link
from vlbench.data.wordpiece import END, MASK, START, WordPieceTokenizer
from vlbench.models.single_stream import IGNORED
from vlbench.recipes.muvla.grid import cell_boxes

Objective: TypeAlias = Literal["rt", "rn", "is"]
_ANY_LENGTH = 1 << 20
_TRIES = 20  # random ones, for a sentence of another image that is none of this image's own
_ROWS = {
    "rt": ("words", "labels", "owners", "masked", "zeroed"),
    "rn": ("words", "labels", "masked", "zeroed", "region_labels"),
    "is": ("words", "labels"),
    "mlm": ("words", "labels", "masked", "zeroed"),
}


class Vocabulary:
    """Words as numbers.

    Args:
        content: a WordPiece vocabulary, as ``data.wordpiece.train_wordpiece`` gives it.

    Raises:
        UserError: where it lacks a ``[MASK]``.
    """

    def __init__(self, content: bytes) -> None:
        self._tokenizer = WordPieceTokenizer(content, context_length=_ANY_LENGTH)
        self.name = self._tokenizer.spec.tokenizer
        self.size = self._tokenizer.size
        ids: dict[str, int] = json.loads(content)["model"]["vocab"]
        if MASK not in ids:
            raise UserError(f"vocabulary {self.name}: {MASK} is missing; words are masked with it")
        self.mask, self.start, self.end = ids[MASK], ids[START], ids[END]
        special = {index for token, index in ids.items() if token.startswith("[") and token.endswith("]")}
        special -= {ids.get("[", -1), ids.get("]", -1)}
        self.plain = np.array(sorted(set(ids.values()) - special))
        """What may stand in for a masked word: all but the special ones."""

    def encode(self, text: str) -> list[int]:
        """The words of ``text``, without ``[CLS]`` and ``[SEP]``."""
        return self._tokenizer.ids(text)[1:-1]

    def sentence(self, text: str, longest: int) -> list[int]:
        """``[CLS] words [SEP]``, cut to ``longest``."""
        return [self.start, *self.encode(text)[: longest - 2], self.end]


@dataclass(frozen=True)
class Masking:
    """Shares of what is masked."""

    words: float
    """Of sentences."""
    tags: float
    """Of the words of tags."""
    regions: float
    linked: float
    """Of a linked phrase or region whose similarity is 1."""
    linked_only: bool = True
    """RN: mask linked phrases or regions, one modality a row. False: any words, and linked regions beside them."""
    phrase_words: bool = False
    """RN, where not ``linked_only``: of the words, those that occur in a phrase of the sentence; of none, all."""
    hidden: float = 0.8
    """Share of the masked words that become ``[MASK]``."""
    random: float = 0.1
    """Share that become another word; the rest stay as they are."""
    zeroed: float = 0.9
    """Share of the masked regions whose feature becomes zeros."""


@dataclass
class View:
    """The regions of one sample."""

    boxes_R4: np.ndarray
    """Corners in pixels of the view."""
    box_R5: np.ndarray
    tags: list[str]
    places: list[int]
    """Of each region among all that the image has, which is how the corpus counts them."""
    features_RF: np.ndarray | None = None


@dataclass
class Row:
    """One objective's part of one sample."""

    words: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    """RT: the region whose tag a word is of."""
    masked: list[bool] = field(default_factory=list)
    """Regions that are to be predicted, and (``zeroed``) those whose feature the model does not see."""
    zeroed: list[bool] = field(default_factory=list)
    region_labels: list[int] = field(default_factory=list)
    match: bool = False


@dataclass(frozen=True)
class Sentence:
    """A sentence of an image with its links to regions of the view."""

    text: str
    links: tuple[tuple[Link, int], ...]
    phrases: tuple[Link, ...] = ()
    """All links of the sentence, whether their regions are in the view or not."""


class Batcher:
    """Samples to batches.

    Args:
        vocabulary: of words.
        tags: class of a region by its tag.
        objectives: which rows to make.
        masking: what to mask.
        corpus: the weakly aligned sentences; None where RT alone is asked for.
        k: how many sentences of an image are used, the best first.
        longest: words of a row at most, ``[CLS]`` and ``[SEP]`` included.
        most_regions: regions of an image at most.
        features: fixed features of an image's regions, instead of its pixels.
        grid: cells each way that stand in for regions, whatever regions there are; None: the regions.
        released_rows: whether MLM and ITM of IS have rows of their own.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        tags: Mapping[str, int],
        *,
        objectives: Sequence[Objective],
        masking: Masking,
        corpus: Corpus | None,
        k: int,
        longest: int,
        most_regions: int,
        features: Callable[[str], View] | None = None,
        grid: int | None = None,
        released_rows: bool = False,
    ) -> None:
        self.vocabulary, self.tags = vocabulary, tags
        self.objectives, self.masking = objectives, masking
        self.corpus, self.k = corpus, k
        self.longest, self.most_regions = longest, most_regions
        self.features = features
        self.cells_R4 = None if grid is None else cell_boxes(grid)
        self.released_rows = released_rows

    def __call__(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """The batch: what is read of the images, and each objective's rows under names that begin with it."""
        views = [self._view(sample) for sample in samples]
        rows: dict[str, list[Row]] = {objective: [] for objective in self.objectives}
        if "is" in rows and self.released_rows:
            rows["mlm"] = []
        for sample, view in zip(samples, views, strict=True):
            rng = np.random.default_rng(sample.seed)
            if "rt" in rows:
                rows["rt"].append(self._tag_row(view, rng))
            if "rn" in rows or "is" in rows:
                sentence = self._sentence(sample.id, view, rng)
                if "rn" in rows:
                    rows["rn"].append(self._phrase_row(sentence, view, rng))
                if "is" in rows:
                    rows["is"].append(self._match_row(sample.id, sentence, rng))
                if "mlm" in rows:
                    rows["mlm"].append(self._sentence_row(sentence, view, rng))
        batch = self._regions(views)
        if self.features is None:
            batch["images_BCHW"] = torch.stack([sample.image_CHW for sample in samples])
        for objective, found in rows.items():
            for name in _ROWS[objective]:
                fill: Any = False if name in ("masked", "zeroed") else IGNORED if "labels" in name else 0
                batch[f"{objective}_{name}"] = _padded([getattr(row, name) for row in found], fill)
        if "is" in rows:
            batch["is_match"] = torch.tensor([row.match for row in rows["is"]])
        return batch

    # ------------------------------------------------------------------------------------------------ images

    def _view(self, sample: Sample) -> View:
        if self.features is not None:
            view = self.features(sample.id)
            view.places = self._places(sample.id, view.tags)
        elif self.cells_R4 is not None:  # of the crop, and none is left out
            _, height, width = sample.image_CHW.shape
            boxes_R4 = self.cells_R4 * np.array([width, height, width, height], dtype=np.float32)
            return View(boxes_R4, box_vector(self.cells_R4, 1, 1), [""] * len(boxes_R4), [])
        else:
            boxes_R4 = np.array([region.box_xyxy for region in sample.regions], dtype=np.float32).reshape(-1, 4)
            _, height, width = sample.image_CHW.shape
            box_R5 = box_vector(boxes_R4, width, height)
            tags = [region.category for region in sample.regions]
            view = View(boxes_R4, box_R5, tags, self._places(sample.id, tags))
        n = self.most_regions
        features = None if view.features_RF is None else view.features_RF[:n]
        return View(view.boxes_R4[:n], view.box_R5[:n], view.tags[:n], view.places[:n], features)

    def _places(self, image_id: str, tags: Sequence[str]) -> list[int]:
        """Where the regions that a crop has left stand among all: they keep their order, so the first that fits is it.

        Of two regions with one tag the crop may have taken the first; the corpus says the same of both.
        """
        if self.corpus is None or image_id not in self.corpus or not any(tags):
            return list(range(len(tags)))
        whole, places, at = [" ".join(tag.split()) for tag in self.corpus.tags(image_id)], [], 0
        for tag in tags:
            try:
                at = whole.index(" ".join(tag.split()), at)
            except ValueError:
                raise UserError(
                    f"{self.corpus.path}: image {image_id!r} has no region {tag!r} there: it was made of other data"
                ) from None
            places.append(at)
            at += 1
        return places

    def _regions(self, views: Sequence[View]) -> dict[str, torch.Tensor]:
        batch = {
            "box_BR5": _padded([view.box_R5.tolist() for view in views], 0.0, [0.0] * 5),
            "valid_BR": _padded([[True] * len(view.tags) for view in views], False),
            "tags_BR": _padded([[self.tags.get(tag, IGNORED) for tag in view.tags] for view in views], IGNORED),
        }
        if self.features is None:
            batch["boxes_BR4"] = _padded([view.boxes_R4.tolist() for view in views], 0.0, [0.0, 0.0, 1.0, 1.0])
        else:
            found = [view.features_RF for view in views]
            assert all(part is not None for part in found), "fixed features of every region"
            width = next(part.shape[1] for part in found if part is not None)
            features_BRF = torch.zeros(*batch["valid_BR"].shape, width)
            for row_RF, part in zip(features_BRF, found, strict=True):
                row_RF[: len(part)] = torch.from_numpy(np.array(part, dtype=np.float32))  # a copy: it may be read-only
            batch["features_BRF"] = features_BRF
        return batch

    # --------------------------------------------------------------------------------------------- sentences

    def _sentence(self, image_id: str, view: View, rng: np.random.Generator) -> Sentence | None:
        """One of the image's ``k`` sentences, or None where nothing was found for it."""
        assert self.corpus is not None, "sentences need a corpus"
        if image_id not in self.corpus:
            raise UserError(f"{self.corpus.path}: knows no image {image_id!r}: it was made of other data; make it anew")
        found = self.corpus[image_id][: self.k]
        if not found:
            return None
        chosen = found[int(rng.integers(len(found)))]
        here = {place: region for region, place in enumerate(view.places)}
        links = tuple((link, here[link.region]) for link in chosen.links if link.region in here)
        return Sentence(chosen.text, links, chosen.links)

    def _other(self, image_id: str, rng: np.random.Generator) -> str:
        """A sentence retrieved for a random other image and not for this one."""
        assert self.corpus is not None, "sentences need a corpus"
        own = {found.text for found in self.corpus[image_id]}
        for row in self._rows_drawn(rng):
            entry = self.corpus.entry(row)
            texts = [found.text for found in entry.aligned[: self.k] if found.text not in own]
            if entry.id != image_id and texts:
                return texts[int(rng.integers(len(texts)))]
        raise UserError(
            f"{self.corpus.path}: there is no sentence of another image that {image_id!r} does not have too"
        )

    def _rows_drawn(self, rng: np.random.Generator) -> Iterator[int]:
        """Rows of the corpus at random and then, where images share most sentences, all in turn from a random one."""
        assert self.corpus is not None, "sentences need a corpus"
        rows = len(self.corpus)
        for _ in range(_TRIES):
            yield int(rng.integers(rows))
        first = int(rng.integers(rows))
        for step in range(rows):
            yield (first + step) % rows

    # ----------------------------------------------------------------------------------------------- masking

    def _tag_row(self, view: View, rng: np.random.Generator) -> Row:
        """RT: words of tags, each with its region; words and regions masked independently."""
        pairs = [(word, region) for region, tag in enumerate(view.tags) for word in self.vocabulary.encode(tag)]
        row = Row(words=[word for word, _ in pairs[: self.longest]], owners=[at for _, at in pairs[: self.longest]])
        self._mask_words(row, rng.random(len(row.words)) < self.masking.tags, rng)
        self._mask_regions(row, rng.random(len(view.tags)) < self.masking.regions, rng)
        return row

    def _phrase_row(self, sentence: Sentence | None, view: View, rng: np.random.Generator) -> Row:
        """RN: a linked phrase or a linked region is masked with probability ``linked * similarity``.

        Nothing is linked with the cells of a grid: phrases that tags have found are masked in every row, and no cell.
        """
        text, links = (sentence.text, sentence.links) if sentence is not None else ("", ())
        on_grid = self.cells_R4 is not None
        if on_grid and sentence is not None:
            links = tuple((link, -1) for link in sentence.phrases)
        words, spans = self._spans(text, [link for link, _ in links])
        row = Row(words=words, region_labels=[IGNORED] * len(view.tags))
        in_words, linked = rng.random() < 0.5 or on_grid, self.masking.linked
        masked_L = np.zeros(len(words), dtype=bool)
        masked_R = np.zeros(len(view.tags), dtype=bool)
        if not self.masking.linked_only:
            masked_L[1:-1] = rng.random(len(words) - 2) < self.masking.words
            if self.masking.phrase_words and sentence is not None and sentence.phrases:
                known = [word for link in sentence.phrases for word in self.vocabulary.encode(link.phrase)]
                masked_L &= np.isin(words, known)
        elif in_words:
            likeness: dict[tuple[int, int], float] = {}  # two regions may share a phrase, which is then drawn once
            for (link, _), span in zip(links, spans, strict=True):
                likeness[span] = max(likeness.get(span, 0.0), link.score)
            for (start, stop), score in sorted(likeness.items()):
                masked_L[start:stop] |= rng.random() < linked * score
        if not on_grid and not (self.masking.linked_only and in_words):
            for (link, region), (start, stop) in zip(links, spans, strict=True):
                if stop > start and rng.random() < linked * link.score:
                    masked_R[region] = True
                    row.region_labels[region] = words[int(rng.integers(start, stop))]
        self._mask_words(row, masked_L, rng)
        self._mask_regions(row, masked_R, rng)
        return row

    def _match_row(self, image_id: str, sentence: Sentence | None, rng: np.random.Generator) -> Row:
        """IS: both kinds of pair are masked alike, or masks would tell them apart; only matching ones have labels."""
        match = bool(rng.random() < 0.5) and sentence is not None
        text = sentence.text if match and sentence is not None else self._other(image_id, rng)
        row = Row(words=self.vocabulary.sentence(text, self.longest), match=match)
        if not self.released_rows:
            self._mask_sentence(row, rng)
        if not match or self.released_rows:
            row.labels = [IGNORED] * len(row.words)
        return row

    def _sentence_row(self, sentence: Sentence | None, view: View, rng: np.random.Generator) -> Row:
        """MLM of IS in the released code: the retrieved sentence, words and regions masked independently."""
        row = Row(words=self.vocabulary.sentence(sentence.text if sentence is not None else "", self.longest))
        self._mask_sentence(row, rng)
        self._mask_regions(row, rng.random(len(view.tags)) < self.masking.regions, rng)
        return row

    def _mask_sentence(self, row: Row, rng: np.random.Generator) -> None:
        masked_L = rng.random(len(row.words)) < self.masking.words
        masked_L[[0, -1]] = False
        self._mask_words(row, masked_L, rng)

    def _spans(self, text: str, links: Sequence[Link]) -> tuple[list[int], list[tuple[int, int]]]:
        """The words of a sentence, and where among them each link's phrase stands; empty where it was cut off."""
        words, found, at = [self.vocabulary.start], {}, 0
        for start, end in sorted({(link.start, link.end) for link in links}):
            if start < at:  # a phrase within another
                continue
            words += self.vocabulary.encode(text[at:start])
            phrase = self.vocabulary.encode(text[start:end])
            found[start, end] = (len(words), len(words) + len(phrase))
            words, at = words + phrase, end
        words += self.vocabulary.encode(text[at:])
        last = min(len(words), self.longest - 1)
        spans = [found.get((link.start, link.end), (last, last)) for link in links]
        return [*words[:last], self.vocabulary.end], [(min(start, last), min(stop, last)) for start, stop in spans]

    def _mask_words(self, row: Row, masked_L: np.ndarray, rng: np.random.Generator) -> None:
        """BERT's rule: most of the masked become ``[MASK]``, some another word, some stay; all have a label."""
        row.labels = [word if masked else IGNORED for word, masked in zip(row.words, masked_L)]
        fate_L, other_L = rng.random(len(row.words)), rng.choice(self.vocabulary.plain, len(row.words))
        for place in np.flatnonzero(masked_L).tolist():
            if fate_L[place] < self.masking.hidden:
                row.words[place] = self.vocabulary.mask
            elif fate_L[place] < self.masking.hidden + self.masking.random:
                row.words[place] = int(other_L[place])

    def _mask_regions(self, row: Row, masked_R: np.ndarray, rng: np.random.Generator) -> None:
        row.masked = masked_R.tolist()
        row.zeroed = (masked_R & (rng.random(len(masked_R)) < self.masking.zeroed)).tolist()


def _padded(rows: Sequence[Sequence[Any]], fill: Any, filler: Any = None) -> torch.Tensor:
    """Rows of unequal length as one tensor of at least one column; ``filler`` is what a missing entry is."""
    filler = fill if filler is None else filler
    longest = max(1, max(map(len, rows)))
    dtype = torch.bool if isinstance(fill, bool) else torch.float32 if isinstance(fill, float) else torch.int64
    return torch.tensor([[*row, *[filler] * (longest - len(row))] for row in rows], dtype=dtype)
