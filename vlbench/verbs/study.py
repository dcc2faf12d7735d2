"""``vlbench study FILE.yaml``: recipes × backbones × seeds at equal budget, and one table.

A study is a list of ``pretrain`` and ``eval`` calls that differ in one thing at a time, so that a difference in its
table is a difference in the recipe. Killed, it goes on where it was: a finished run and a stored result are not made
again. A run whose settings the study has changed since is an error, never a row of another budget.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from vlbench.core.cards import read_yaml
from vlbench.core.config import Config, parse
from vlbench.core.errors import UserError
from vlbench.core.names import nearest, slug
from vlbench.verbs.calls import check_pretrain, evaluate, pretrain


class Arm(Config):
    """One recipe of a study, with what it needs of its own."""

    recipe: str
    name: str | None = Field(default=None, description="in tables; default: the recipe's name")
    data: tuple[str, ...] | None = Field(default=None, description="data specs; default: the preset's")
    set: tuple[str, ...] = Field(default=(), description="further settings, as for --set")


class Study(Config):
    """What to train, for how long, and what to measure."""

    title: str
    arms: tuple[Arm, ...] = Field(min_length=1)
    tasks: str = Field(description="as for `vlbench eval --tasks`")
    preset: str = "tiny"
    backbones: tuple[str, ...] | None = Field(default=None, description="None: the preset's own")
    seeds: tuple[int, ...] = (0, 1, 2)
    set: tuple[str, ...] = Field(default=(), description="settings of every arm; the budget belongs here")
    random: bool = Field(default=True, description="measure random weights of each architecture too, with each seed")
    data_root: str | None = Field(default=None, description="as for `vlbench eval --data-root`")
    eval_data: str | None = Field(default=None, description="as for `vlbench eval --data`: what the kinds are run on")

    @model_validator(mode="after")
    def _every_cell_has_its_own_name(self) -> Self:
        seen = {slug("random"): "the random-weight rows"} if self.random else {}
        for number, arm in enumerate(self.arms, start=1):
            name = arm.name or arm.recipe
            if slug(name) in seen:
                raise ValueError(
                    f"arm {number} is called {name!r}, as {seen[slug(name)]} is; give it a `name` of its own"
                )
            seen[slug(name)] = f"arm {number}"
        for what, values in (("seeds", self.seeds), ("backbones", self.backbones or ("",))):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{what}: expected at least one, and none twice, got {list(values)}")
        return self

    def settings(self, arm: Arm, backbone: str | None, seed: int) -> dict[str, Any]:
        """What ``pretrain`` is called with for one cell."""
        return {
            "recipe": arm.recipe,
            "data": list(arm.data) if arm.data else None,
            "preset": self.preset,
            "backbone": backbone,
            "set": [*self.set, *arm.set],
            "seed": seed,
        }


def run(args: argparse.Namespace) -> int:
    """Run the study in ``args.file``. Returns 1 where a task failed."""
    from vlbench.verbs import leaderboard

    study = read_study(Path(args.file))
    out = Path(args.out) if args.out else Path("runs") / Path(args.file).stem
    cells = list(itertools.product(study.backbones or (None,), study.seeds, study.arms))
    for backbone, seed, arm in cells:  # a mistake in the last arm is better known before the first is trained
        try:
            check_pretrain(**study.settings(arm, backbone, seed))
        except UserError as error:
            raise UserError(f"{args.file}: arm {arm.name or arm.recipe}: {error}") from None
    status = 0
    for number, (backbone, seed, arm) in enumerate(cells, start=1):
        name = model_name(study, arm.name or arm.recipe, backbone, seed)
        print(f"\n[study] {number}/{len(cells)} {name}")
        checkpoint = pretrain(**study.settings(arm, backbone, seed), out=str(out / slug(name)), resume=True)
        measured = {
            "tasks": study.tasks,
            "data": study.eval_data,
            "data_root": study.data_root,
            "results": args.results,
        }
        status |= evaluate(model=str(checkpoint), name=name, **measured)
        if study.random and arm is study.arms[-1]:
            # The last arm's architecture: put one with a text tower there and the random row has every task.
            random = model_name(study, "random", backbone, seed)
            status |= evaluate(model=str(checkpoint), name=random, weights=f"random:{seed}", **measured)
    print()
    return status | leaderboard.run(argparse.Namespace(results=args.results, check=False))


def read_study(path: Path) -> Study:
    """The study in ``path``. Raises UserError naming the file and the key."""
    if not path.is_file():
        guess = (
            nearest(path.name, [other.name for other in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else None
        )
        raise UserError(f"there is no file {path}" + (f"; did you mean {path.with_name(guess)}?" if guess else ""))
    return parse(Study, read_yaml(path), where=str(path))


def model_name(study: Study, arm: str, backbone: str | None, seed: int) -> str:
    """``clip-s0``, or ``clip-timm-resnet18-s0`` where the study has several backbones."""
    middle = f"-{slug(backbone)}" if backbone and len(study.backbones or ()) > 1 else ""
    return f"{arm}{middle}-s{seed}"
