"""The data of one task: which split plays which role, with class names, templates and a fingerprint.

The rules, where the data lack what a protocol wants:

- no ``test``: ``val`` is reported, and is then no longer there to choose hyper-parameters on;
- no splits at all, or only ``train``: 60% train, 20% val, 20% test, drawn by the content of the images (equal bytes
  always land in one split, so no test image is trained on), in every class alike;
- the task says that undivided data are all test (``splits: {test: all}``): so they are;
- no ``val`` to choose on: adapters hold out part of ``train`` themselves.

``notes`` says in words which of the first two was applied, and warns where the second cannot be honest: a model that
was pretrained on the same unsplit data has seen the test images.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Source
from vlbench.data.digests import image_digests, source_fingerprint
from vlbench.data.prompting import are_numbers, class_names
from vlbench.data.sources import UNSPLIT, Subset, canonical_split, list_splits, open_source
from vlbench.data.spec import local_path, parse_spec
from vlbench.data.transfer import Relabelled, match_classes, unite_classes

_ROLES = ("train", "val", "test")
_LEARNT = ("train", "val")
_HELD_OUT = 0.2
_NUMBERED = (
    "class names are numbers, which say nothing in a prompt: name the folders in words, or give shards a classnames.txt"
)


class TaskData:
    """The splits of one data set in the roles of a task.

    Args:
        spec: a data spec.
        splits: role → the data's own split, where they differ.
        classes: class names that replace the data's own: by label, or ``own name<TAB>class name``.
        templates: prompt templates that replace those beside the data.
        pretrained_on: the data specs that the model to be measured was pretrained on.
    """

    def __init__(
        self,
        spec: str,
        splits: Mapping[str, str] | None = None,
        *,
        classes: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        pretrained_on: Sequence[str] | None = None,
    ) -> None:
        self.spec = spec
        self._notes: tuple[str, ...] = ()
        self._classes = tuple(classes) if classes is not None else None
        self._templates = tuple(templates) if templates is not None else None
        self._pretrained_on = tuple(pretrained_on or ())
        self._made: dict[str, list[int]] = {}
        self._opened: dict[str, Source] = {}
        self._fingerprints: dict[str, str] = {}
        self._training: TaskData | None = None
        self._tested = self
        """What ``learning_from`` was called on; it matters where there are training data."""
        self._plan = self._roles({role: canonical_split(name) for role, name in (splits or {}).items()})

    def with_prompts(self, *, classes: Sequence[str] | None = None, templates: Sequence[str] | None = None) -> TaskData:
        """The same opened data under other class names and templates (None: the data's own)."""
        other = copy.copy(self)  # shares what is opened, divided and digested, now and later
        other._classes = tuple(classes) if classes is not None else None
        other._templates = tuple(templates) if templates is not None else None
        return other

    def learning_from(self, training: TaskData) -> TaskData:
        """The same data as a test set for what is learnt from the train (and val) split of other data."""
        other = copy.copy(self)
        other._training = training
        other._opened, other._fingerprints = {}, {}
        other._tested = self
        return other

    @property
    def told_apart(self) -> int | None:
        """How many classes, the first ones, an answer may be one of; None: all that the splits have."""
        return len(self.own_classes or ()) if self._training is not None else None

    @property
    def own_classes(self) -> tuple[str, ...] | None:
        """The classes of the reported data themselves, by their own names."""
        return self._reported().classes

    def has(self, role: str) -> bool:
        """Whether there is a split for this role (``train``, ``val``, ``test``, or a name of the data's own)."""
        if self._training is not None and canonical_split(role) in _LEARNT:
            return self._training.has(role)
        return canonical_split(role) in self._plan

    def split(self, role: str) -> Source:
        """The source in this role, opened once. Raises UserError where there is none."""
        role = canonical_split(role)
        if self._training is not None:
            return self._matched(role)
        if role not in self._plan:
            raise UserError(f"data {self.spec!r}: there is no {role} split; there is {', '.join(self._plan) or 'none'}")
        if role not in self._opened:
            self._opened[role] = self._open(role)
        return self._opened[role]

    @property
    def notes(self) -> tuple[str, ...]:
        """What there is to say of the division, and of class names that prompts are to be made of."""
        if self._templates is None or self._classes is not None or not are_numbers(self._reported().classes or ()):
            return self._notes
        return (*self._notes, _NUMBERED)

    @property
    def drawn(self) -> bool:
        """Whether the test images are drawn from data that have no split for them."""
        return (self._tested if self._training is not None else self)._plan.get("test", UNSPLIT) is None

    @property
    def classnames(self) -> tuple[str, ...]:
        """Class names by label. Raises UserError for data without labels."""
        own = self._reported().classes
        if own is None:
            raise UserError(f"data {self.spec!r}: they have no class labels")
        if self._classes is None:
            return own
        return class_names(self._classes, own, where=self.spec)

    @property
    def templates(self) -> tuple[str, ...] | None:
        """The given templates, else those beside the data, else None."""
        if self._templates is not None:
            return self._templates
        return self._reported().templates

    def fingerprint(self, roles: Iterable[str]) -> str:
        """One fingerprint of the content of several splits, each in its role."""
        parts = {}
        for role in roles:
            if role not in self._fingerprints:
                self._fingerprints[role] = source_fingerprint(self.split(role))
            parts[role] = self._fingerprints[role]
        return fingerprint(parts)

    def _matched(self, role: str) -> Source:
        """A split under the list of classes that training and test data share."""
        if role not in self._opened:
            assert self._training is not None, "there are no other data to learn from"
            test, learnt = self._tested.split("test"), self._training
            train = learnt.split("train")
            if test.classes is None or train.classes is None:
                raise UserError(f"data {(train if test.classes else test).spec!r}: they have no class labels")
            unions = getattr(test, "unions", None)
            if unions is not None:
                classes, new_labels = unite_classes(test.classes, train.classes, unions, where=self.spec)
            else:
                classes, new_labels = match_classes(
                    test.classes,
                    train.classes,
                    test_names=self._tested.classnames,
                    train_names=learnt.classnames,
                    where=self.spec,
                )
            if role in _LEARNT:
                self._opened[role] = Relabelled(learnt.split(role), classes, new_labels)
            else:
                self._opened[role] = Relabelled(self._tested.split(role), classes, range(len(test.classes)))
        return self._opened[role]

    def _reported(self) -> Source:
        data = self._tested if self._training is not None else self
        return data.split("test" if data.has("test") else next(iter(data._plan)))

    def _roles(self, asked: Mapping[str, str]) -> dict[str, str | None]:
        """Role → the data's split; None for a part of unsplit data, ``all`` for the whole of it."""
        present = list_splits(self.spec)
        if asked.get("test") == UNSPLIT:
            if present in ((), ("train",)):
                return {"test": UNSPLIT}
            asked = {role: name for role, name in asked.items() if role != "test"}
        for role, name in asked.items():
            if name not in present:
                has = ", ".join(present) or "no splits"
                raise UserError(f"data {self.spec!r}: the {role} split is to be {name!r}, but it has {has}")
        if present in ((), ("train",)) and "test" not in asked:
            self._notes += ("the data have no test split: 60% train, 20% val, 20% test, drawn by image content",)
            seen = [spec for spec in self._pretrained_on if _same_data(spec, self.spec)]
            if seen:
                warning = (
                    f"N.B. the model was pretrained on these very images, the test images among them ({seen[0]}): this "
                    "does not measure generalisation; divide the data into train/ and test/ before pretraining"
                )
                self._notes += (warning,)
            return dict.fromkeys(_ROLES)
        plan: dict[str, str | None] = {name: name for name in present}
        plan |= asked
        if "test" not in plan and "val" in plan:
            self._notes += ("the data have no test split: val is reported",)
            plan["test"] = plan.pop("val")
        reported = plan.get("test")
        # Never choose on what is reported: another role may not read the same split.
        return {role: name for role, name in plan.items() if role == "test" or name != reported}

    def _open(self, role: str) -> Source:
        name = self._plan[role]
        if name is not None and name != UNSPLIT:
            return open_source(self.spec, name)
        whole = open_source(self.spec)
        if name == UNSPLIT:
            return whole
        if not self._made:
            self._made.update(content_split(whole))
        return Subset(whole, self._made[role], split=role)


def class_notes(classes: Sequence[str] | None, expected: int | None) -> tuple[str, ...]:
    """A note where data have another number of classes than the data set's card says."""
    if classes is None or expected is None or len(classes) == expected:
        return ()
    return (f"{expected:,} classes expected, {len(classes):,} found",)


def content_split(source: Source) -> dict[str, list[int]]:
    """Train, val and test of unsplit data: role → indices in order.

    Within each class, the distinct images sorted by digest are dealt out 60/20/20; every copy of an image follows it,
    also into another class. A function of the content alone: names and order do not matter.
    """
    digests = image_digests(source)
    names = [_class_name(source, label) for label in source.labels() or [None] * len(source)]
    owner: dict[str, str] = {}
    for image, name in zip(digests, names):
        owner[image] = min(name, owner.get(image, name))
    by_class: defaultdict[str, list[str]] = defaultdict(list)
    for image in sorted(owner):
        by_class[owner[image]].append(image)
    role_of = {image: role for images in by_class.values() for image, role in zip(images, _deal(len(images)))}
    made: dict[str, list[int]] = {role: [] for role in _ROLES}
    for index, image in enumerate(digests):
        made[role_of[image]].append(index)
    empty = [role for role, indices in made.items() if not indices]
    if empty:
        raise UserError(
            f"data {source.spec!r}: too few images ({len(owner)} different ones) to make a {empty[0]} split"
        )
    return made


def _same_data(spec: str, other: str) -> bool:
    """Whether two specs name one place, however it is written."""
    if spec == other:
        return True
    try:
        one, two = parse_spec(spec), parse_spec(other)
    except UserError:  # a reference card says in words what a model was trained on
        return False
    return one.kind == two.kind and local_path(one).resolve() == local_path(two).resolve()


def _deal(n: int) -> list[str]:
    held_out = round(n * _HELD_OUT) or int(n >= len(_ROLES))
    return ["test"] * held_out + ["val"] * held_out + ["train"] * (n - 2 * held_out)


def _class_name(source: Source, label: int | None) -> str:
    return source.classes[label] if source.classes is not None and label is not None else ""
