"""Which tasks a call means: cards by full name, kinds, suites, and a user's own data.

- A card's full name (``linear/cifar10``) is a demand: absent data or a model without the parts is an error.
- A kind (``linear``) or a suite is a wish: what cannot run is skipped, and said.
- With ``--data`` a kind runs on those data with the adapter's own settings, under the name ``<kind>/<folder>``. Where
  they have several labels an image, it stands for ``<kind>_multilabel``, which ``Selection.notes`` says.

``find_data`` is read by ``vlbench list tasks`` too, so nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vlbench.core.cards import DatasetCard, TaskCard, dataset_cards, suites, task_cards
from vlbench.core.catalog import ADAPTERS
from vlbench.core.config import tree
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.names import slug, unknown

_SHOWN = 4  # places named where data are absent
_LONGEST = 60  # letters of settings in a task's name, which is a file's name


@dataclass(frozen=True)
class Choice:
    """One task to run."""

    card: TaskCard
    spec: str
    """Where its data are, as a data spec that needs no further root."""
    said: str
    """The same as the card or the user wrote it: what a result records."""
    named: bool
    """Asked for by its full name: it must not be skipped."""
    train: str | None = None
    """Where the other data are that it learns from (the card's ``train_from``)."""
    asked: str = ""
    """The kind that was asked for, where the data's several labels an image made it another; else empty."""


@dataclass(frozen=True)
class Skip:
    """One task of a kind or suite that cannot run, and why."""

    task: str
    reason: str


@dataclass(frozen=True)
class Selection:
    """What a call asks for, in its order, each task once."""

    choices: tuple[Choice, ...]
    skipped: tuple[Skip, ...]

    @property
    def notes(self) -> tuple[str, ...]:
        """For each of the user's own data whose labels made kinds others than those asked for: one line."""
        changed = [choice for choice in self.choices if choice.asked]
        said = []
        for spec in dict.fromkeys(choice.spec for choice in changed):
            here = [choice for choice in changed if choice.spec == spec]
            asked, run = ", ".join(choice.asked for choice in here), ", ".join(choice.card.adapter for choice in here)
            said.append(f"{spec} has several labels an image: {asked} stand{'s' * (len(here) == 1)} for {run}")
        return tuple(said)


def select(names: str | Sequence[str], *, data: Sequence[str], root: Path) -> Selection:
    """The tasks behind ``--tasks``.

    Args:
        names: task, kind and suite names; a string is cut at commas.
        data: the user's own data specs (``--data``); empty: the cards' data under ``root``.
        root: the data root.

    Raises:
        UserError: for an unknown name (with the nearest one), a named task without its data, or nothing left to run.
    """
    words = _words(names)
    if not words:
        raise UserError("--tasks names no task; for instance --tasks zeroshot,linear (see `vlbench list tasks`)")
    choices: dict[str, Choice] = {}
    skipped: dict[str, Skip] = {}
    several = cache(_has_several_labels)  # kinds share what is found out of the data, and calls do not
    for word in words:
        for item in _own(word, data, root, several) if data else _shipped(word, root):
            if isinstance(item, Skip):
                skipped[item.task] = item
            elif item.card.name not in choices or item.named:
                choices[item.card.name] = item
    if not choices:
        raise UserError(_nothing(list(skipped.values())))
    return Selection(tuple(choices.values()), tuple(skip for name, skip in skipped.items() if name not in choices))


def _nothing(skipped: Sequence[Skip]) -> str:
    """Why nothing can be run: of many tasks the first one's reason, which is as a rule that of all."""
    first = f"nothing to run: {skipped[0].task}: {skipped[0].reason}"
    if len(skipped) == 1:
        return first
    return f"{first}; and {len(skipped) - 1} more such tasks (`vlbench list tasks` says which data are there)"


def is_meant(task: str, names: str | Sequence[str], *, data: Sequence[str]) -> bool:
    """Whether ``task``, as results name it, is one that ``select`` takes ``names`` for, its data here or not."""
    from vlbench.data.spec import parse_spec

    cards, words = task_cards(), _words(names)
    if task in cards and task in words:
        return True
    if data:
        asked = [word for word in words if word not in cards]
        kinds = [kind for word in asked for kind in (word, _with_several_labels(word)) if kind]
        return any(own_card(kind, parse_spec(spec).bare).name == task for kind in kinds for spec in data)
    return task in cards and any(word == cards[task].kind or task in suites().get(word, ()) for word in words)


def find_data(card: TaskCard | DatasetCard, root: Path) -> str | None:
    """The first of the card's data that is on this machine, as a data spec, or None. Makes nothing, opens nothing.

    None too, where a task's other data are absent, those that it learns from.
    """
    if isinstance(card, TaskCard):
        choice = _choose(card, root, named=False)
        return choice.spec if choice is not None else None
    place = _find(card, root)
    return place[0] if place else None


def with_settings(choice: Choice, assignments: Sequence[str]) -> Choice:
    """The choice under other settings of its adapter (``--set``), and another name: it is another column of a table."""
    card = choice.card
    protocol = _merged(card.protocol, tree(assignments))
    said = slug("-".join(assignments))
    name = f"{card.name}-{said if len(said) <= _LONGEST else fingerprint(list(assignments))}"
    title = f"{card.title}, {', '.join(assignments)}"
    return replace(choice, card=card.model_copy(update={"name": name, "title": title, "protocol": protocol}))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``above`` over ``below``, group of settings by group."""
    whole = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(whole.get(key), Mapping)
        whole[key] = _merged(whole[key], value) if both else value
    return whole


def own_card(kind: str, spec: str) -> TaskCard:
    """A card for a user's own data: the adapter's own settings and headline metric, no chance level known beforehand.

    The spec is no part of it, so that a folder that moved is the same task; the data's fingerprint tells data apart.
    """
    adapter: Any = ADAPTERS.get(kind)
    name = f"{kind}/{_folder_name(spec)}"
    if name in task_cards():
        name = f"{kind}/own-{_folder_name(spec)}"  # a shipped card's name promises its protocol and its data
    return TaskCard(name=name, version=1, title=f"{kind} on {spec}", adapter=kind, data=(), metric=adapter.metric)


def _with_several_labels(kind: str) -> str | None:
    """The kind that does the same where images have several labels; None where there is none."""
    other = f"{kind}_multilabel"
    return other if other in ADAPTERS.names() else None


def _has_several_labels(spec: str) -> bool:
    """Whether the images that a task reports have several labels each. Data that cannot be read have not: what is wrong
    with them is said where the task reads them.
    """
    from vlbench.data.sources import list_splits, open_source

    try:
        splits = list_splits(spec)
        split = next((name for name in ("test", "val", *splits) if name in splits), None)
        provides = open_source(spec, split).provides
    except Exception:  # of libraries too
        return False
    return "labels" in provides and "label" not in provides


def _words(names: str | Sequence[str]) -> list[str]:
    words = [word.strip() for word in (names.split(",") if isinstance(names, str) else names)]
    return [word for word in words if word]


def _shipped(word: str, root: Path) -> Iterable[Choice | Skip]:
    cards = task_cards()
    kinds = {card.kind for card in cards.values()}
    if word in cards:
        choice = _choose(cards[word], root, named=True)
        if choice is None:
            raise UserError(f"task {word}: {_absent(cards[word], root)}")
        return [choice]
    if word in kinds:
        wanted = [card for card in cards.values() if card.kind == word]
    elif word in suites():
        wanted = [cards[name] for name in suites()[word]]
    else:
        raise UserError(unknown("task", word, {*cards, *kinds, *suites()}) + " (see `vlbench list tasks`)")
    return [_choose(card, root, named=False) or Skip(card.name, _absent(card, root)) for card in wanted]


def _choose(card: TaskCard, root: Path, *, named: bool) -> Choice | None:
    """The card on the first of its data that is on this machine."""
    place, train = _find(card, root), _training_data(card, root)
    if place is None or (card.train_from is not None and train is None):
        return None
    return Choice(card, *place, named=named, train=train)


def _training_data(card: TaskCard, root: Path) -> str | None:
    """Where the other data are that a task learns from; None where it has none, or they are absent."""
    return find_data(dataset_cards()[card.train_from], root) if card.train_from is not None else None


def _find(card: TaskCard | DatasetCard, root: Path) -> tuple[str, str] | None:
    """The first of a card's data that are there: with its place, and as it was written.

    Where several are, the first that has the split which is reported: training images alone, say, that were downloaded
    before, do not stand in the way of the whole set beside them.
    """
    found = [place for place in _places(card, root) if _is_there(place[0])]
    if len(found) < 2:  # no split is looked up in vain: `vlbench list tasks` asks for every card
        return found[0] if found else None
    return next((place for place in found if _has_reported(place[0], card.splits.get("test", "test"))), found[0])


def _places(card: TaskCard | DatasetCard, root: Path) -> Iterable[tuple[str, str]]:
    """Where under ``root`` something lies that may be the card's data, and how the card has it."""
    from vlbench.data.spec import local_path, parse_spec, rebase

    for text in card.data:
        spec = rebase(text, root)
        if spec.startswith("hf:") and spec == text:
            continue  # not under the root; a hub data set that happens to have this name is not what the card means
        parsed = parse_spec(spec)
        # What plainly is not there is settled before its reader is imported: `vlbench list tasks` asks for every card.
        if parsed.kind == "shapes" or "{" in parsed.path or local_path(parsed).exists():
            yield spec, text


def _is_there(spec: str) -> bool:
    from vlbench.data.sources import is_present

    return spec.partition(":")[0] == "shapes" or is_present(spec)  # the embedded world is made on first use


def _has_reported(spec: str, split: str) -> bool:
    """Whether the data have the split that a task reports; ``val`` stands in for a missing ``test``."""
    from vlbench.data.sources import UNSPLIT, canonical_split, list_splits

    try:
        present = list_splits(spec)
    except UserError:
        return False
    wanted = canonical_split(split)
    return wanted == UNSPLIT or wanted in present or (wanted == "test" and "val" in present)


def _own(word: str, data: Sequence[str], root: Path, several: Callable[[str], bool]) -> Iterable[Choice]:
    from vlbench.data.spec import parse_spec

    specs = list(dict.fromkeys(parse_spec(spec).bare for spec in data))
    cards = task_cards()
    if word in cards:
        if len(specs) > 1:
            raise UserError(f"task {word}: one --data says where its data are; {len(specs)} were given")
        train, learnt = _training_data(cards[word], root), cards[word].train_from
        if learnt is not None and train is None:
            raise UserError(f"task {word}: {_absent(dataset_cards()[learnt], root)}")
        return [Choice(cards[word], specs[0], said=specs[0], named=True, train=train)]
    if word in suites():
        raise UserError(f"suite {word!r} names its own data; with --data, ask for kinds: {', '.join(ADAPTERS.names())}")
    if word not in ADAPTERS.names():
        raise UserError(unknown("kind of task", word, {*ADAPTERS.names(), *cards}))
    choices: dict[str, Choice] = {}
    other = _with_several_labels(word)
    for spec in specs:
        kind, asked = (other, word) if other and several(spec) else (word, "")
        choice = Choice(own_card(kind, spec), spec, said=spec, named=False, asked=asked)
        if choice.card.name in choices:
            raise UserError(
                f"--data {choices[choice.card.name].spec} and --data {spec}: both would be stored as "
                f"{choice.card.name}, after the folder's name; rename one, or run them apart with --results DIR"
            )
        choices[choice.card.name] = choice
    return list(choices.values())


def _absent(card: TaskCard | DatasetCard, root: Path) -> str:
    if isinstance(card, TaskCard) and card.train_from is not None and _find(card, root):
        return f"it learns from {card.train_from}: {_absent(dataset_cards()[card.train_from], root)}"
    paths = ", ".join(card.data[:_SHOWN]) + (f" and {len(card.data) - _SHOWN} more" if len(card.data) > _SHOWN else "")
    how = f"; to get it: {card.how_to_get}" if card.how_to_get else ""
    near = next((place for place, _ in _places(card, root)), None)
    lies = f"; what lies at {near} is not the whole of it: its images, say, are missing" if near else ""
    return f"no data under {root} (looked for {paths}){lies}{how}; or name the folder with --data-root"


def _folder_name(spec: str) -> str:
    """What a user calls the data: the last part of the path that is not a pattern."""
    from vlbench.data.spec import parse_spec

    parsed = parse_spec(spec)
    if parsed.kind == "shapes":
        return slug(f"shapes_{parsed.path}" if parsed.path else "shapes")
    path = Path(parsed.path).expanduser()
    if path.name in ("", ".", ".."):
        path = path.resolve()
    while any(sign in path.name for sign in "{}*") and path.parent != path:
        path = path.parent
    return slug(path.stem if path.is_file() else path.name)
