"""NLVR2: whether a sentence is true of two photographs side by side (Suhr et al., ACL 2019, 1811.00491).

Each photograph is read with the sentence by itself; the two pooled outputs, one after the other, go to a classifier of
two classes, as in LXMERT and mu-VLA (2203.00242).

Reported are accuracy and consistency, the share of sentences that are judged right on every pair of images they belong
to. The unit of sampling is the set of images that sentences share (``stats.consistency``).

N pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from vlbench.adapters.common.classification import IMAGE_DIGITS, estimates
from vlbench.adapters.common.questions import Reading, log_frequencies, where_of
from vlbench.adapters.common.sentences import Sentence, judge_sentences, read_sentences
from vlbench.core.errors import UserError
from vlbench.core.types import Estimate, Example, Outcomes, Part, Provides, Rows, Source
from vlbench.data.digests import content_digests
from vlbench.data.sources import BaseSource, Place
from vlbench.finetune.fusion.config import PAPER, TINY, FusionConfig
from vlbench.stats.consistency import image_set, nlvr2_outcomes


class Config(FusionConfig):
    """Settings of NLVR2."""

    PRESETS: ClassVar[Mapping[str, dict[str, Any]]] = {"tiny": TINY, "paper": PAPER["nlvr2"]}


class Side(BaseSource):
    """The left (0) or the right (1) images of a source of pairs."""

    def __init__(self, pairs: Source, place: int) -> None:
        super().__init__(pairs.spec, pairs.split, provides={"image"})
        self._pairs = pairs
        self._place = place
        if place == 0:  # what the task's data were known by already
            self._content_digests = content_digests(pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        example = self._pairs[index]
        image = example.extra.get("right") if self._place else example.image
        if not isinstance(image, bytes):
            raise UserError(f"{where_of(self._pairs)}: {example.id} has no {('left', 'right')[self._place]} image")
        return replace(self._named(example), image=image)

    @property
    def without_images(self) -> Callable[[int], Example]:
        """The pairs', where they have one: it reads no image."""
        look = self._pairs.without_images  # type: ignore[attr-defined]
        return lambda index: self._named(look(index))

    @property
    def image_files(self) -> Callable[[int], Mapping[str, Place]]:
        """The file of the one image, where the pairs know the files of theirs."""
        look, part = self._pairs.image_files, ("image", "right")[self._place]  # type: ignore[attr-defined]

        def own(index: int) -> Mapping[str, Place]:
            files = look(index)
            return {"image": files[part]} if part in files else {}

        return own

    def _named(self, example: Example) -> Example:
        """Its image under the name of its file: so the files of region features name it too."""
        key = f"{example.extra.get('image_key', example.id)}-img{self._place}"
        return replace(example, extra={"image_key": key})

    def ids(self) -> list[str]:
        """The pairs'."""
        return list(self._pairs.ids())

    def labels(self) -> None:
        """None: a label is about both images."""


class Nlvr2:
    """The adapter. Val (the data's dev) chooses, test (test1) is reported."""

    name: ClassVar[str] = "nlvr2"
    Config: ClassVar[type[Config]] = Config
    metric: ClassVar[str] = "accuracy"
    needs: ClassVar[frozenset[Part]] = frozenset({"image", "pair"})
    requires: ClassVar[frozenset[Provides]] = frozenset({"pooled"})
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    trains: ClassVar[bool] = True

    def predict(self, encoder: Any, data: Any, config: Config) -> Rows:
        """One row a pair: ``id, image, right_image, image_id, sentence, label, pred, prediction, truth, p, right``."""
        judged = judge_sentences(encoder, data, config, lambda source: _read(encoder, source))
        commonest = int(log_frequencies(judged.learnt_N.tolist(), len(judged.classes)).argmax())
        blind = nlvr2_outcomes(judged.asked.ids, judged.label_N == commonest)
        right = [own[1][:IMAGE_DIGITS] for own in judged.asked.images]
        chance = {name: float(o.values.mean()) for name, o in blind.items()}
        return judged.rows("sentence", chance=chance, more={"right_image": right})

    def outcomes(self, rows: Rows, config: Config) -> dict[str, Outcomes]:
        """``accuracy`` and ``consistency``."""
        return nlvr2_outcomes([str(name) for name in rows["id"]], np.asarray(rows["right"], dtype=bool).tolist())

    def score(self, rows: Rows, config: Config) -> dict[str, Estimate]:
        """Both metrics with their intervals."""
        return estimates(self.outcomes(rows, config))


def _read(encoder: Any, source: Source) -> Reading[Sentence]:
    groups = tuple(image_set(identifier) for identifier in source.ids())
    return read_sentences(encoder, source, (Side(source, 0), Side(source, 1)), groups=groups)


ADAPTER = Nlvr2()
