"""``vlbench verify [MODEL ...]``: stored results against the numbers that were published of reference models."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlbench.core.errors import UserError
from vlbench.core.names import unknown

if TYPE_CHECKING:
    from vlbench.core.cards import ModelCard


def run(args: argparse.Namespace) -> int:
    """Print a verdict on every published number. Exit status 1 where one is off, or a stored file is damaged.

    A number that differs while another source's of the same task and metric is reproduced is not off: the sources
    disagree, which is printed and leaves the exit status 0.
    """
    from vlbench.core.cards import model_cards, task_cards
    from vlbench.core.files import write_text
    from vlbench.report.verify import as_json, render_verdicts, verify
    from vlbench.store.results import ResultStore

    if not (math.isfinite(args.tolerance) and 0 <= args.tolerance < 1):
        raise UserError(f"--tolerance {args.tolerance:g}: write a fraction, for instance 0.005 for half a point")
    store = ResultStore(args.results)
    scan = store.scan()
    for problem in scan.problems:
        print(problem, file=sys.stderr)
    stored = {result.model.name for result in scan.results}
    cards = choose(args.model, model_cards(), stored, every=args.all)
    verdicts = verify(cards, scan.results, task_cards(), tolerance=args.tolerance)
    if args.json is not None:
        write_text(Path(args.json), json.dumps(as_json(verdicts, args.tolerance), indent=2, ensure_ascii=False) + "\n")
    if not cards:
        print(
            f"{store.root}: none of its {len(stored)} models is a reference model: nothing was published of them. "
            "`vlbench eval --model CARD --tasks TASKS` measures one (vlbench list models); --all lists what there is"
        )
    elif not verdicts:
        print(f"no number is known to be published of {', '.join(card.id for card in cards)}")
    else:
        print(render_verdicts(verdicts, every=args.all), end="")
    return 1 if scan.problems or any(verdict.status == "off" for verdict in verdicts) else 0


def choose(asked: Sequence[str], cards: Mapping[str, ModelCard], stored: set[str], *, every: bool) -> list[ModelCard]:
    """The reference cards that were asked for; with none asked for, those with a stored result, or ``every`` one."""
    for name in asked:
        if name not in cards and name in stored:
            raise UserError(f"{name} is no reference model: nothing is known to be published of it")
        if name not in cards:
            raise UserError(unknown("reference model", name, cards))
    if asked:
        return [cards[name] for name in dict.fromkeys(asked)]
    # <card>@<file>: other weights in the card's architecture. They are no attempt, and that is worth saying.
    measured = {name.partition("@")[0] for name in stored}
    return [card for name, card in sorted(cards.items()) if every or name in measured]
