"""``vlbench leaderboard``: the table of everything stored, written beside it."""

from __future__ import annotations

import argparse
import sys

from vlbench.core.errors import UserError
from vlbench.core.files import write_text


def run(args: argparse.Namespace) -> int:
    """Write ``<results>/LEADERBOARD.md``; with ``--check`` only say whether it is current.

    Exit status 1 where the table is stale (``--check``) or a stored file is damaged; the others are tabulated.
    """
    from vlbench.report.leaderboard import render
    from vlbench.store.results import ResultStore
    from vlbench.verbs.outcomes import outcomes_from, sound_results

    store = ResultStore(args.results)
    scan = store.scan()
    if not scan.results and not scan.problems:
        raise UserError(f"{store.root}: no stored result; `vlbench eval --model MODEL --tasks TASKS` makes one")
    outcomes_of = outcomes_from(store)
    results, damaged = sound_results(scan.results, outcomes_of)
    problems = [*scan.problems, *damaged]
    # The page must not depend on how the folder was named in the call.
    shown = [problem.replace(f" --results {store.root}", "").replace(f"{store.root}/", "") for problem in problems]
    page = render(results, outcomes_of, problems=shown)
    path = store.root / "LEADERBOARD.md"
    for problem in problems:
        print(problem, file=sys.stderr)
    if args.check:
        current = path.is_file() and path.read_bytes() == page.encode("utf-8")
        if not current:
            state = "stale" if path.is_file() else "missing"
            print(f"{path}: {state}; run: vlbench leaderboard --results {store.root}", file=sys.stderr)
        elif not problems:
            print(f"{path}: current ({len(results)} results)")
        return 0 if current and not problems else 1
    write_text(path, page)
    print(f"{path}: {len(results)} results of {len({result.model.name for result in results})} models")
    return 1 if problems else 0
