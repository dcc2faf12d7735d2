"""Learn from one data set, be tested on another: ImageNet's training images, ImageNet-A's photographs.

The two name their classes each in their own way, and the test set may have some of the training set's only. Classes
are matched by the data's own names where the training set has them all (WordNet ids, which name the folders), else by
the names of both class tables. All sources then share one list of classes: the test set's, in its order, followed by
those that only the training set has. A test class may unite several of the training set's (ObjectNet's); they are
learnt as one. ``TaskData.told_apart`` says how many stand first: a classifier learns all classes
and answers with one of these, as the field measures ImageNet-A and -R.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.types import Example, Source
from vlbench.data.digests import content_digests
from vlbench.data.sources import BaseSource

IMAGENET_CLASSES = 1000


def match_classes(
    test: Sequence[str], train: Sequence[str], *, test_names: Sequence[str], train_names: Sequence[str], where: str
) -> tuple[list[str], list[int]]:
    """One list of classes for both, and for each training class its place in it.

    Args:
        test: the test set's own class names by label.
        train: the training set's.
        test_names: the test set's class names in words.
        train_names: the training set's.
        where: what to call the test data in an error.

    Raises:
        UserError: for a test class that the training set lacks, or that has the name of two.
    """
    if not set(test) <= set(train):
        tested, learnt = Counter(test_names), Counter(train_names)
        unclear = [name for name in test_names if learnt[name] > 1 and tested[name] != learnt[name]]
        if unclear:
            raise UserError(
                f"data {where!r}: class {unclear[0]!r} is the name of {learnt[unclear[0]]} classes of the training "
                "data; name the folders as the training data do"
            )
        test, train = _numbered(test_names), _numbered(train_names)
    missing = [name for name in test if name not in set(train)]
    if missing:
        raise UserError(
            f"data {where!r}: {len(missing)} of {len(test)} classes are not in the training data, for instance "
            f"{missing[0]!r}"
        )
    place = {name: label for label, name in enumerate(test)}
    assert len(place) == len(test), "a source's class names differ"
    classes, new_labels = list(test), []
    for name in train:
        if name in place:
            new_labels.append(place[name])
        else:
            new_labels.append(len(classes))
            classes.append(name)
    return classes, new_labels


def unite_classes(
    test: Sequence[str], train: Sequence[str], unions: Sequence[Sequence[int]], *, where: str
) -> tuple[list[str], list[int]]:
    """As ``match_classes``, where each test class unites some of the training classes.

    Args:
        test: the test set's own class names by label.
        train: the training set's, ImageNet-1k's in the order of their WordNet ids.
        unions: for each test class, labels of training classes.
        where: what to call the test data in an error.

    Raises:
        UserError: where the training set has not the classes of ImageNet-1k, or two test classes share one.
    """
    if len(train) != IMAGENET_CLASSES:
        raise UserError(
            f"data {where!r}: its classes are unions of ImageNet-1k's {IMAGENET_CLASSES:,}, and the training data have "
            f"{len(train):,} classes"
        )
    place: dict[int, int] = {}
    for label, united in enumerate(unions):
        for one in united:
            if one in place:
                raise UserError(
                    f"data {where!r}: {test[place[one]]!r} and {test[label]!r} both take {train[one]!r} of the "
                    "training data"
                )
            place[one] = label
    classes, new_labels = list(test), []
    for number, name in enumerate(_numbered(train)):
        if number in place:
            new_labels.append(place[number])
        else:
            new_labels.append(len(classes))
            classes.append(f"{name} (training data)" if name in test else name)
    return classes, new_labels


def _numbered(names: Sequence[str]) -> list[str]:
    """Names that occur again, told apart by how often they came before: CLIP's for ImageNet have two "missile"."""
    seen: Counter[str] = Counter()
    told = []
    for name in names:
        told.append(f"{name} ({seen[name] + 1})" if seen[name] else name)
        seen[name] += 1
    return told


class Relabelled(BaseSource):
    """A source under another list of classes, those of its objects and its several labels an image included.

    Args:
        source: what is read.
        classes: the class names.
        new_labels: for each label of the source, its place among them.
    """

    def __init__(self, source: Source, classes: Sequence[str], new_labels: Sequence[int]) -> None:
        super().__init__(
            source.spec, source.split, provides=source.provides, classes=classes, templates=source.templates
        )
        self._source = source
        self._new_labels = tuple(new_labels)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        extra = example.extra
        if "categories" in extra:  # of its objects: COCO's reader
            extra = {**extra, "categories": tuple(self._new_labels[label] for label in extra["categories"])}
        if "labels" in extra:
            extra = {**extra, "labels": self._new_truth(np.asarray(extra["labels"]))}
        return replace(example, label=self._new(example.label), extra=extra)

    def ids(self) -> Sequence[str]:
        """The source's."""
        return self._source.ids()

    def labels(self) -> Sequence[int | None] | None:
        """The source's, in the new list."""
        labels = self._source.labels()
        return None if labels is None else [self._new(label) for label in labels]

    @property
    def _content_digests(self) -> Any:
        # The source's own: reading a million training images again for another list of their classes would be a waste.
        return content_digests(self._source)

    def _new_truth(self, labels_K: np.ndarray) -> np.ndarray:
        """``labels_C`` int8: of the source's K labels, in the new list.

        A class that the source does not know is not counted (-1). Of one that unites several, one that is present makes
        it present, and else one that is not counted makes it so.
        """
        labels_C = np.full(len(self.classes or ()), -1, dtype=np.int8)
        places_K = np.array(self._new_labels, dtype=np.int64)
        for value in (0, -1, 1):  # a later one stands above an earlier one
            labels_C[places_K[labels_K == value]] = value
        return labels_C

    def _new(self, label: int | None) -> int | None:
        return None if label is None else self._new_labels[label]
