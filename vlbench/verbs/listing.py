"""``vlbench list`` and ``vlbench show``: what there is, and everything about one of it. ``list`` loads no torch."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlbench.core import catalog
from vlbench.core.cards import (
    DatasetCard,
    ModelCard,
    TaskCard,
    dataset_cards,
    model_cards,
    prompt_lines,
    suites,
    task_cards,
)
from vlbench.core.config import Config, flatten
from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.paths import data_root
from vlbench.core.registry import Registry

if TYPE_CHECKING:
    from vlbench.recipes.published import Preset

_WIDTH = 120
"""Columns of what is shown of a recipe."""


def run_list(args: argparse.Namespace) -> int:
    """Print one kind of thing, one a line."""
    match args.what:
        case "tasks":
            rows = _task_rows(_root(args))
        case "datasets":
            rows = [_dataset_row(card, _root(args)) for card in dataset_cards().values()]
        case "suites":
            rows = [(name, ", ".join(tasks)) for name, tasks in suites().items()]
        case "models":
            rows = [_model_row(card) for card in model_cards().values()]
        case what:
            registry: Registry = getattr(catalog, what.upper())
            rows = [(name, _summary(registry.target(name))) for name in registry.names()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if not rows:
        print(f"no {args.what}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    """Print one recipe, task, data set or model in full."""
    preset = getattr(args, "preset", None)
    if preset is not None and args.what != "recipe":
        raise UserError(f"--preset is of recipes; leave it out of vlbench show {args.what} {args.name}")
    match args.what:
        case "task":
            _show_task(_one("task", args.name, task_cards()))
        case "dataset":
            _show_dataset(_one("dataset", args.name, dataset_cards()))
        case "model":
            print(_as_yaml(_one("model", args.name, model_cards())))
        case "recipe":
            _show_recipe(args.name, preset)
    return 0


# ---------------------------------------------------------------------------------------------------- list


def _task_rows(root: Path) -> list[tuple[str, ...]]:
    from vlbench.verbs.selection import find_data

    rows: list[tuple[str, ...]] = []
    there: dict[tuple[Any, ...], bool] = {}  # looked for once, not once a task
    for card in task_cards().values():
        places = (card.data, card.train_from)
        if places not in there:
            there[places] = find_data(card, root) is not None
        chance = "" if card.chance is None else f"chance {100 * card.chance:.1f}%"
        present = "ready" if there[places] else "no data"
        rows.append((card.name, f"@v{card.version}", card.metric, chance, present, card.title))
    return rows


def _dataset_row(card: DatasetCard, root: Path) -> tuple[str, ...]:
    from vlbench.verbs.selection import find_data

    classes = f"{card.n_classes:,} classes" if card.n_classes else ""
    sizes = " / ".join(f"{role} {count:,}" for role, count in card.sizes.items())
    return (card.name, classes, sizes, card.metric or "", find_data(card, root) or "no data", card.title)


def _root(args: argparse.Namespace) -> Path:
    return Path(args.data_root) if args.data_root else data_root()


def _model_row(card: ModelCard) -> tuple[str, ...]:
    size = f"{card.params / 1e6:.1f}M" if card.params else ""
    data = ", ".join(card.pretrain_data) if card.pretrain_data else "data not disclosed"
    tag = f".{card.weights}" if card.weights and "/" not in card.weights else ""  # a URL tells nobody which weights
    return (card.id, f"{card.loader}:{card.arch}{tag}", size, data)


def _summary(target: str) -> str:
    """The first line of the docstring of the module behind ``target``, read from its source: nothing is imported."""
    module = target.partition(":")[0]
    try:
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            return f"({module} is not installed)"
        text = ast.get_docstring(ast.parse(Path(found.origin).read_text(encoding="utf-8")))
    except (ImportError, OSError, SyntaxError) as error:
        return f"(broken: {error})"
    return (text or "").partition("\n")[0]


# ---------------------------------------------------------------------------------------------------- show


def _show_task(card: TaskCard) -> None:
    adapter = catalog.ADAPTERS.get(card.adapter)
    settings = {**adapter.Config().model_dump(mode="json"), **card.protocol}
    print(_as_yaml(card))
    print(f"fingerprint: {card.fingerprint()}")
    print(f"# the {card.adapter} adapter's settings for this task")
    print(_dump({"settings": settings}))
    _show_prompts(card)


def _show_dataset(card: DatasetCard) -> None:
    print(_as_yaml(card))
    _show_prompts(card)
    tasks = [task.name for task in task_cards().values() if task.dataset == card.name]
    print(f"# {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}: {', '.join(tasks)}")


def _show_prompts(card: TaskCard | DatasetCard) -> None:
    for role, name in (("templates", card.prompts.templates), ("class names", card.prompts.classnames)):
        if name:
            lines = [" = ".join(line.split("\t")) for line in prompt_lines(name)]
            print(f"# {len(lines)} {role} in prompts/{name}.txt, the first: {'; '.join(lines[:3])}")


def _show_recipe(name: str, wanted: str | None) -> None:
    """The paper's preset (or ``wanted``) in full; unless one is wanted, the others by what they differ in."""
    from vlbench.verbs.pretrain import variants_of  # it imports the embedded world, which takes longer than any list

    recipe = catalog.RECIPES.get(name)
    presets: Mapping[str, Config] = recipe.presets
    if wanted is not None and wanted not in presets:
        raise UserError(f"recipe {name}: {unknown('preset', wanted, presets)}")
    first = wanted or ("paper" if "paper" in presets else next(iter(presets)))
    base = presets[first]
    print(f"recipe {name}\n\n{inspect.getdoc(inspect.getmodule(type(recipe))) or ''}\n")
    if variants := variants_of(type(base)):
        field, said = type(base).model_fields["variant"], getattr(recipe, "variants", {})
        print(f"variants (--variant NAME), by default {field.default}:")
        lines = [f"{variant}: {said[variant]}" if variant in said else variant for variant in variants]
        for line in lines if said or not field.description else [field.description]:
            _paragraph(line, indent=2)
        print()
    described = getattr(recipe, "described", {})
    _title(f"preset {first}:", described.get(first))
    _show_preset(base, described.get(first))
    for preset, config in presets.items():
        if wanted is None and preset != first:
            print()
            _title(f"preset {preset}, where it differs from {first}:", described.get(preset))
            _show_difference(config, base, described.get(preset), described.get(first))
    if wanted is None and len(presets) > 1:
        print(f"\nvlbench show recipe {name} --preset NAME shows one of them in full")


def _show_preset(config: Config, preset: Preset | None) -> None:
    """Every setting: its value, what it does, where the value was read."""
    group = None
    for key, value in flatten(config.model_dump(mode="json")).items():
        _paragraph(f"{key} = {value!r}", indent=2)
        if words := _description(type(config), key):
            _paragraph(words, indent=6)
        group = _show_source(preset, key, group)


def _show_difference(config: Config, base: Config, preset: Preset | None, base_preset: Preset | None) -> None:
    mine, theirs = flatten(config.model_dump(mode="json")), flatten(base.model_dump(mode="json"))
    group = None
    for key, value in mine.items():
        if key not in theirs or theirs[key] != value:
            _paragraph(f"{key} = {value!r}", indent=2)
            if preset is not None and (base_preset is None or preset.source(key) != base_preset.source(key)):
                group = _show_source(preset, key, group)
    for key in theirs:
        if key not in mine and not any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in mine):
            _paragraph(f"{key}: left out", indent=2)


def _show_source(preset: Preset | None, key: str, group: str | None) -> str | None:
    """Print the source of ``key``, unless it is that of ``group``, which was printed before; returns of what it is."""
    found = preset.source(key) if preset is not None else None
    if found is None:
        return None
    of, words = found
    if of == key:
        _paragraph(f"source: {words}", indent=6)
    elif of != group:
        _paragraph(f"source of {of}: {words}", indent=6)
    return of


def _title(title: str, preset: Preset | None) -> None:
    print(title)
    if preset is not None:
        _paragraph(preset.about, indent=2)
        print()


def _description(kind: Any, key: str) -> str | None:
    """What the setting at the dotted ``key`` does; of the keys of an open mapping, what the mapping does."""
    words = None
    for part in key.split("."):
        field = getattr(kind, "model_fields", {}).get(part)
        if field is None:
            return words
        # A class that gives a setting another default leaves its description to the class that has it.
        parents = (getattr(parent, "model_fields", {}).get(part) for parent in kind.__mro__)
        words = next((one.description for one in parents if one is not None and one.description), None)
        kind = field.annotation
    return words


def _paragraph(text: str, *, indent: int) -> None:
    more = " " * (indent + 4)
    print(textwrap.fill(text, _WIDTH, initial_indent=" " * indent, subsequent_indent=more, break_on_hyphens=False))


def _one(what: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise UserError(unknown(what, name, known))
    return known[name]


def _as_yaml(card: Config) -> str:
    return _dump(card.model_dump(mode="json"))


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110).rstrip()
