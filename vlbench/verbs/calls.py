"""One verb calling another: every setting of ``pretrain`` and ``eval`` with the command line's own defaults.

``demo`` and ``study`` are built of the same two commands that a user types, in one process so that torch is loaded
once. A test holds these defaults against the argument tree.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from vlbench.core.errors import UserError
from vlbench.core.names import unknown

if TYPE_CHECKING:
    from vlbench.train.config import PretrainConfig

PRETRAIN_DEFAULTS = {
    "recipe": None,
    "data": None,
    "preset": "tiny",
    "variant": None,
    "backbone": None,
    "set": (),
    "seed": None,
    "steps": None,
    "checkpoint_every": None,
    "out": None,
    "resume": False,
    "device": None,
    "precision": None,
    "compile": None,
    "debug": False,
}
EVAL_DEFAULTS = {
    "model": None,
    "tasks": None,
    "weights": None,
    "name": None,
    "data": None,
    "data_root": None,
    "set": (),
    "results": "results",
    "batch_size": 128,
    "precision": "fp32",
    "device": None,
    "workers": None,
    "force": False,
    "no_store": False,
    "precision_spread": False,
    "debug": False,
}


def pretrain(**changes: object) -> Path:
    """``vlbench pretrain`` with ``changes`` to its defaults. Returns the checkpoint.

    With ``resume=True`` a run of exactly these settings is gone on with, or used again where it is finished.

    Raises:
        UserError: where the folder's run had others, naming them: two budgets must not meet in one table.
    """
    from vlbench.verbs.pretrain import pretrain as train

    args = _namespace(PRETRAIN_DEFAULTS, changes)
    args.exact = True
    return train(args)


def check_pretrain(**changes: object) -> PretrainConfig:
    """The settings of a run. Raises UserError where ``pretrain`` would refuse them, before it has done anything."""
    from vlbench.verbs.pretrain import check

    return check(_namespace(PRETRAIN_DEFAULTS, changes))


def evaluate(*, skip_unsuitable: bool = False, **changes: object) -> int:
    """``vlbench eval`` with ``changes`` to its defaults. Returns its exit status.

    With ``skip_unsuitable``, a task that the model has not the parts for is skipped though it is named in full.
    """
    from vlbench.verbs.evaluate import run

    args = _namespace(EVAL_DEFAULTS, changes)
    args.skip_unsuitable = skip_unsuitable
    return run(args)


def _namespace(defaults: dict[str, object], changes: dict[str, object]) -> argparse.Namespace:
    for key in changes:
        if key not in defaults:
            raise UserError(unknown("setting", key, defaults))
    return argparse.Namespace(**{**defaults, **changes})
