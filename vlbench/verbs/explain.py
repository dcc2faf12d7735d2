"""``vlbench explain A B``: what differs in the settings behind two models' results, then in their numbers."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlbench.core.errors import UserError
from vlbench.core.names import unknown

if TYPE_CHECKING:
    from vlbench.core.types import Result
    from vlbench.report.explain import Evidence
    from vlbench.store.results import ResultStore


@dataclass(frozen=True)
class Side:
    """What one of the two words of the call names: its results by task, newest version last, and where each lies."""

    name: str
    found: dict[str, dict[int, tuple[Result, Path]]]


def run(args: argparse.Namespace) -> int:
    """Print the explanation. Exit status 0: results that cannot be compared are explained too."""
    from vlbench.report.explain import explain, explanation_blocks
    from vlbench.report.page import markdown
    from vlbench.store.results import ResultStore

    store = ResultStore(args.results)
    a, b = (side_of(word, store) for word in (args.a, args.b))
    if a.name == b.name and a.found == b.found:
        raise UserError(f"both words name the same, {a.name}: name two")
    shared = sorted(a.found.keys() & b.found.keys())
    if args.task is not None:
        if args.task not in shared:
            raise UserError(f"{unknown('task', args.task, shared)} (of those that both have)")
        shared = [args.task]
    if not shared:
        raise UserError(f"no common task: A has {', '.join(sorted(a.found))}; B has {', '.join(sorted(b.found))}")
    pairs = [_pair(a.found[task], b.found[task]) for task in shared]
    explanation = explain(pairs, every_metric=len(pairs) == 1)
    print(markdown(explanation_blocks(explanation, a.name, b.name)), end="")
    if args.task is None:
        for side, letter, other in ((a, "A", b), (b, "B", a)):
            if alone := sorted(side.found.keys() - other.found.keys()):
                print(f"\nOnly {letter} has {', '.join(alone)}.")
    return 0


def side_of(word: str, store: ResultStore) -> Side:
    """The results that ``word`` names: a stored result's file, or a model among those in ``store``.

    Raises:
        UserError: where it is neither, with the nearest model's name.
    """
    from vlbench.store.results import result_in
    from vlbench.verbs.compare import results_of

    path = Path(word)
    if path.suffix == ".json" or path.is_file():
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        result = result_in(path)
        return Side(f"{result.model.name} ({path})", {result.task: {result.task_version: (result, path)}})
    scan = store.scan()
    if not scan.results:
        raise UserError(f"{store.root}: no stored result; `vlbench eval --model MODEL --tasks TASKS` makes one")
    found: dict[str, dict[int, tuple[Result, Path]]] = {}
    for result in results_of(word, scan.results):
        place = store.path(result.model.name, result.task, result.task_version)
        found.setdefault(result.task, {})[result.task_version] = (result, place)
    name = next(iter(next(iter(found.values())).values()))[0].model.name
    return Side(name, found)


def _pair(a: dict[int, tuple[Result, Path]], b: dict[int, tuple[Result, Path]]) -> tuple[Evidence, Evidence]:
    """Both sides of one task: of the newest version that both have, else each side's newest."""
    common = a.keys() & b.keys()
    version_a, version_b = (max(common),) * 2 if common else (max(a), max(b))
    return evidence(*a[version_a]), evidence(*b[version_b])


def evidence(result: Result, path: Path) -> Evidence:
    """``result`` with its rows, which lie beside ``path``; without them where they are absent or damaged."""
    from vlbench.report.explain import Evidence
    from vlbench.store.results import rows_beside
    from vlbench.verbs.outcomes import outcomes_of_rows

    try:
        rows = rows_beside(path, result)
        return Evidence(result, rows.meta, outcomes_of_rows(result, rows, path))
    except UserError as error:
        return Evidence(result, {}, {}, f"no test: {error}")
