"""What a source holds and what is wrong with it, found by reading and decoding every example once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from vlbench.core.errors import BadExample
from vlbench.core.fingerprint import digest
from vlbench.core.types import Example, Source
from vlbench.data.images import decode, inspect


@dataclass
class Problem:
    """One kind of bad example: how many there are, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)
    """``where: reason`` of the first few."""


@dataclass(frozen=True)
class Spread:
    """Smallest, median and largest of something."""

    least: float
    median: float
    most: float


@dataclass(frozen=True)
class CheckReport:
    """The state of one split."""

    spec: str
    split: str
    n: int
    """Entries, bad ones included."""
    provides: tuple[str, ...]
    bad: dict[str, Problem]
    """Kind → problem: entries that cannot be used."""
    missing: dict[str, Problem]
    """Part (``text``, ``label``, ``labels``) → entries that lack what the source as a whole promises."""
    modes: dict[str, int]
    formats: dict[str, int]
    notes: dict[str, int]
    """What decoding does beyond the usual (``CMYK to RGB``) → images."""
    width: Spread | None
    height: Spread | None
    classes: dict[str, int] | None
    """Class name → examples, most frequent first; None without labels."""
    languages: dict[str, int]
    """Language → captions."""
    text_length: Spread | None
    """Characters of a caption."""
    regions: int
    duplicates: int
    """Images whose bytes occur before in the split."""
    duplicate_examples: list[str]

    @property
    def n_bad(self) -> int:
        """Entries that cannot be used."""
        return sum(problem.count for problem in self.bad.values())


class _Count:
    """What is gathered while the source is gone through."""

    def __init__(self, source: Source, max_examples: int) -> None:
        self.source = source
        self.max_examples = max_examples
        self.bad: dict[str, Problem] = {}
        self.missing: dict[str, Problem] = {}
        self.modes: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.classes: Counter[int] = Counter()
        self.languages: Counter[str] = Counter()
        self.widths: list[int] = []
        self.heights: list[int] = []
        self.lengths: list[int] = []
        self.regions = 0
        self.first: dict[str, tuple[str, object]] = {}
        """By digest: the first example with this image, and which image of the data set it says it is about."""
        self.duplicates = Problem()

    def note(self, table: dict[str, Problem], kind: str, example: str) -> None:
        self._add(table.setdefault(kind, Problem()), example)

    def add(self, example: Example) -> None:
        """One readable entry. Raises BadExample where its image cannot be decoded.

        A source that is of images and has none of them says why in ``absent["image"]``: then every entry is bad, and
        its texts are counted all the same.
        """
        absent = getattr(self.source, "absent", {})
        if example.image is None and "image" in absent:
            self.note(self.bad, "missing image", f"{example.id}: {absent['image']}")
        if example.image is not None:
            self._image(example.image, example.id, example.extra.get("image_key"))
        elif "image" in self.source.provides:
            raise BadExample("missing image", example.id, "this example has no image")
        if "pair" in self.source.provides and isinstance(example.extra.get("right"), bytes):
            self._image(example.extra["right"], f"{example.id} (right)", (example.extra.get("image_key"), "right"))
        if "text" in self.source.provides and not any(example.texts.values()):
            self.note(self.missing, "text", example.id)
        if "label" in self.source.provides and example.label is None:
            self.note(self.missing, "label", example.id)
        if example.label is not None:
            self.classes[example.label] += 1
        if "labels" in self.source.provides:
            labels = example.extra.get("labels")
            if labels is None:
                self.note(self.missing, "labels", example.id)
            self.classes.update(label for label, value in enumerate(labels if labels is not None else ()) if value == 1)
        for language, texts in example.texts.items():
            self.languages[language] += len(texts)
            self.lengths += [len(text) for text in texts]
        self.regions += len(example.regions)

    def _image(self, data: bytes, name: str, key: object) -> None:
        content = digest(data)
        if key is not None and content in self.first and self.first[content][1] == key:
            return  # another question about one image: seen, and no duplicate
        info = inspect(data, name)
        decode(data, where=name)
        self.modes[info.mode] += 1
        self.formats[info.format] += 1
        self.widths.append(info.width)
        self.heights.append(info.height)
        if info.note:
            self.notes.update(info.note.split("; "))
        first, _ = self.first.setdefault(content, (name, key))
        if first is not name:
            self._add(self.duplicates, f"{name} = {first}")

    def _add(self, problem: Problem, example: str) -> None:
        problem.count += 1
        if len(problem.examples) < self.max_examples:
            problem.examples.append(example)


def check_source(
    source: Source, *, max_examples: int = 3, progress: Callable[[int], None] | None = None
) -> CheckReport:
    """Read and decode every entry of ``source``.

    Args:
        source: what to go through.
        max_examples: how many examples of each problem to keep.
        progress: called with the number of entries done.
    """
    count = _Count(source, max_examples)
    for index in range(len(source)):
        try:
            count.add(source[index])
        except BadExample as error:
            count.note(count.bad, error.kind, f"{error.where}: {error.reason}")
        if progress is not None:
            progress(index + 1)
    return _report(source, count)


def _report(source: Source, count: _Count) -> CheckReport:
    classes = None
    if source.classes is not None:
        named = {name: count.classes.get(label, 0) for label, name in enumerate(source.classes)}
        classes = dict(sorted(named.items(), key=lambda item: (-item[1], item[0])))
    return CheckReport(
        spec=source.spec,
        split=source.split,
        n=len(source),
        provides=tuple(sorted(source.provides)),
        bad=dict(sorted(count.bad.items())),
        missing=dict(sorted(count.missing.items())),
        modes=dict(count.modes.most_common()),
        formats=dict(count.formats.most_common()),
        notes=dict(count.notes.most_common()),
        width=_spread(count.widths),
        height=_spread(count.heights),
        classes=classes,
        languages=dict(sorted(count.languages.items())),
        text_length=_spread(count.lengths),
        regions=count.regions,
        duplicates=count.duplicates.count,
        duplicate_examples=count.duplicates.examples,
    )


def _spread(values: list[int]) -> Spread | None:
    return Spread(min(values), median(values), max(values)) if values else None
