"""``vlbench list`` and ``vlbench show``: what there is, and everything about one of it. ``list`` loads no torch."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import inspect
from pathlib import Path
from typing import Any

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
from vlbench.core.config import Config, difference, flatten
from vlbench.core.errors import UserError
from vlbench.core.names import unknown
from vlbench.core.paths import data_root
from vlbench.core.registry import Registry


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
    match args.what:
        case "task":
            _show_task(_one("task", args.name, task_cards()))
        case "dataset":
            _show_dataset(_one("dataset", args.name, dataset_cards()))
        case "model":
            print(_as_yaml(_one("model", args.name, model_cards())))
        case "recipe":
            _show_recipe(args.name)
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


def _show_recipe(name: str) -> None:
    from vlbench.verbs.pretrain import variants_of  # it imports the embedded world, which takes longer than any list

    recipe = catalog.RECIPES.get(name)
    module = inspect.getmodule(type(recipe))
    print(f"{name}: {inspect.getdoc(module) or ''}\n")
    base_name, base = next(iter(recipe.presets.items()))
    if variants := variants_of(type(base)):
        field, said = type(base).model_fields["variant"], getattr(recipe, "variants", {})
        print(f"variants (--variant NAME), by default {field.default}:")
        lines = [f"{variant}: {said[variant]}" if variant in said else variant for variant in variants]
        print(*(f"  {line}" for line in (lines if said or not field.description else [field.description])), sep="\n")
        print()
    print(f"preset {base_name}:")
    for key, value in flatten(base.model_dump(mode="json")).items():
        print(f"  {key} = {value!r}")
    for preset, config in recipe.presets.items():
        if preset != base_name:
            print(f"\npreset {preset}, where it differs from {base_name}:")
            for key, (_, value) in difference(config, base).items():
                print(f"  {key} = {value!r}")


def _one(what: str, name: str, known: dict[str, Any]) -> Any:
    if name not in known:
        raise UserError(unknown(what, name, known))
    return known[name]


def _as_yaml(card: Config) -> str:
    return _dump(card.model_dump(mode="json"))


def _dump(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110).rstrip()
