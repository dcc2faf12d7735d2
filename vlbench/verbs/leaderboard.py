"""``vlbench leaderboard``: the table of everything stored, written beside it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from vlbench.core.errors import UserError
from vlbench.core.files import write_text

if TYPE_CHECKING:
    from vlbench.core.types import Result
    from vlbench.report.legend import Background
    from vlbench.verbs.outcomes import StoredOutcomes


def run(args: argparse.Namespace) -> int:
    """Write ``<results>/LEADERBOARD.md``; with ``--check`` only say whether it is current.

    ``--html FILE`` writes the same tables as one HTML page too. Exit status 1 where the table is stale (``--check``)
    or a stored file is damaged; the others are tabulated.
    """
    from vlbench.report.html import html_page
    from vlbench.report.leaderboard import page_of
    from vlbench.report.page import markdown
    from vlbench.store.results import ResultStore
    from vlbench.verbs.outcomes import outcomes_from, sound_results

    html = getattr(args, "html", None)
    if html is not None and args.check:
        raise UserError("--check writes nothing, and --html FILE does: name one of the two")
    store = ResultStore(args.results)
    scan = store.scan()
    if not scan.results and not scan.problems:
        raise UserError(f"{store.root}: no stored result; `vlbench eval --model MODEL --tasks TASKS` makes one")
    outcomes_of = outcomes_from(store)
    results, damaged = sound_results(scan.results, outcomes_of)
    problems = [*scan.problems, *damaged]
    # The page must not depend on how the folder was named in the call.
    shown = [problem.replace(f" --results {store.root}", "").replace(f"{store.root}/", "") for problem in problems]
    blocks = page_of(results, outcomes_of, problems=shown, background=background_of(results, outcomes_of))
    page = markdown(blocks)
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
    if html is not None:
        write_text(Path(html), html_page(blocks, title="vlbench leaderboard"))
        print(f"{html}: the same tables, sortable, in one file")
    return 1 if problems else 0


def background_of(results: Iterable[Result], outcomes: StoredOutcomes) -> Background:
    """Task cards, the defaults of every adapter among ``results`` and whose protocol it is, and their notes."""
    from vlbench.core.cards import task_cards
    from vlbench.report.legend import Background
    from vlbench.verbs.outcomes import adapter_defaults, adapter_peer

    names = sorted({result.adapter for result in results})
    peers = {name: peer for name in names if (peer := adapter_peer(name)) is not None}
    return Background(task_cards(), {name: adapter_defaults(name) for name in names}, outcomes.notes, peers)
