"""``vlbench compare A B``: paired tests of two stored models on every task that they share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlbench.core.errors import UserError
from vlbench.core.names import slug, unknown

if TYPE_CHECKING:
    from vlbench.core.types import Result


def run(args: argparse.Namespace) -> int:
    """Print the comparison. Exit status 1 where a stored file was damaged and so left out."""
    from vlbench.report.compare import compare_models, render_comparison
    from vlbench.store.results import ResultStore
    from vlbench.verbs.outcomes import outcomes_from, sound_results

    store = ResultStore(args.results)
    scan = store.scan()
    for problem in scan.problems:
        print(problem, file=sys.stderr)
    if not scan.results:
        raise UserError(f"{store.root}: no stored result; `vlbench eval --model MODEL --tasks TASKS` makes one")
    a, b = (results_of(name, scan.results) for name in (args.a, args.b))
    if a[0].model.name == b[0].model.name:
        raise UserError(f"both names are the same model, {a[0].model.name}: name two")
    outcomes_of = outcomes_from(store)
    damaged: list[str] = []
    sides = []
    for results in (a, b):
        sound, problems = sound_results(results, outcomes_of)
        damaged += problems
        sides.append(sound)
    for problem in damaged:
        print(problem, file=sys.stderr)
    if not all(sides):
        raise UserError("nothing is left to compare: see the damaged files above")
    found = compare_models(sides[0], sides[1], outcomes_of, metric=args.metric, notes_of=outcomes_of.notes)
    print(render_comparison(found), end="")
    return 1 if damaged or scan.problems else 0


def results_of(name: str, results: Sequence[Result]) -> list[Result]:
    """The results of the model called ``name``, by its name or by its folder's."""
    names = {result.model.name for result in results}
    if name not in names:
        folders = {slug(known): known for known in names}
        if slug(name) not in folders:
            raise UserError(unknown("model", name, names))
        name = folders[slug(name)]
    return [result for result in results if result.model.name == name]
