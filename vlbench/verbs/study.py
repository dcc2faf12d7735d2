"""``vlbench study FILE.yaml``: recipes × backbones × seeds at equal budget, and one table.

A study is a list of ``pretrain`` and ``eval`` calls that differ in one thing at a time, so that a difference in its
table is a difference in the recipe. A task that an arm has not the parts for (a text tower, say) is skipped with a
note. Killed, it goes on where it was: a finished run and a stored result are not made again. A run whose settings the
study has changed since is an error, never a row of another budget. The table lies with the results that it is made of,
in ``<results>/studies``, and is made again from them alone with ``--table-only``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from vlbench.core.cards import read_yaml
from vlbench.core.config import Config, parse
from vlbench.core.errors import UserError
from vlbench.core.files import write_text
from vlbench.core.names import nearest, slug, unknown
from vlbench.verbs.calls import check_pretrain, evaluate, pretrain

if TYPE_CHECKING:
    from vlbench.core.types import Result

TABLES = "studies"
"""In the folder of results: each study's table, called after its file."""
_RANDOM = "random"


class Arm(Config):
    """One recipe of a study, with what it needs of its own."""

    recipe: str
    variant: str | None = Field(default=None, description="of the recipe, as for --variant")
    name: str | None = Field(default=None, description="in tables; default: the recipe's name and the variant's")
    data: tuple[str, ...] | None = Field(default=None, description="data specs; default: the preset's")
    set: tuple[str, ...] = Field(default=(), description="further settings, as for --set")

    @property
    def label(self) -> str:
        """What the arm is called."""
        return self.name or "-".join(word for word in (self.recipe, self.variant) if word is not None)


class Study(Config):
    """What to train, for how long, and what to measure."""

    title: str
    arms: tuple[Arm, ...] = Field(min_length=1)
    tasks: str = Field(description="as for `vlbench eval --tasks`")
    preset: str = "tiny"
    backbones: tuple[str, ...] | None = Field(default=None, description="None: the preset's own")
    seeds: tuple[int, ...] = (0, 1, 2)
    set: tuple[str, ...] = Field(default=(), description="settings of every arm; the budget belongs here")
    random: bool | tuple[str, ...] = Field(
        default=True,
        description="measure random weights too, with each seed and backbone: of the last arm's architecture (put one "
        "with a text tower there), or of those of the arms that are named, where they differ in what they can do",
    )
    models: dict[str, str] = Field(
        default_factory=dict,
        description="rows of models that are not trained here: name → what `vlbench eval --model` takes",
    )
    metrics: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="task → metrics to show beside its headline, each a column of its own"
    )
    data_root: str | None = Field(default=None, description="as for `vlbench eval --data-root`")
    eval_data: str | None = Field(default=None, description="as for `vlbench eval --data`: what the kinds are run on")
    notes: tuple[str, ...] = Field(default=(), description="lines under the table: what was left out, and why")

    @model_validator(mode="after")
    def _every_cell_has_its_own_name(self) -> Self:
        for name in self.random if isinstance(self.random, tuple) else ():
            if name not in (labels := [arm.label for arm in self.arms]):
                raise ValueError(f"random: {unknown('arm', name, labels)}")
        seen = {slug(name): "the random-weight rows" for name in self.random_rows}
        for name in self.models:
            if slug(name) in seen:
                raise ValueError(f"models: {name!r} is called as {seen[slug(name)]} is; give it another name")
            seen[slug(name)] = f"model {name!r}"
        for number, arm in enumerate(self.arms, start=1):
            name = arm.label
            if slug(name) in seen:
                raise ValueError(
                    f"arm {number} is called {name!r}, as {seen[slug(name)]} is; give it a `name` of its own"
                )
            seen[slug(name)] = f"arm {number}"
        for what, values in (("seeds", self.seeds), ("backbones", self.backbones or ("",))):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{what}: expected at least one, and none twice, got {list(values)}")
        return self

    @property
    def random_rows(self) -> dict[str, str]:
        """Rows of random weights: name → the arm whose architecture it is."""
        if isinstance(self.random, bool):
            return {_RANDOM: self.arms[-1].label} if self.random else {}
        return {f"{_RANDOM}-{name}": name for name in self.random}

    def settings(self, arm: Arm, backbone: str | None, seed: int) -> dict[str, Any]:
        """What ``pretrain`` is called with for one cell."""
        return {
            "recipe": arm.recipe,
            "data": list(arm.data) if arm.data else None,
            "preset": self.preset,
            "variant": arm.variant,
            "backbone": backbone,
            "set": [*self.set, *arm.set],
            "seed": seed,
        }


def run(args: argparse.Namespace) -> int:
    """Run the study in ``args.file``. Returns 1 where a task failed.

    With ``--table-only`` nothing is trained or measured and the table is made of what is stored; with ``--check`` it is
    not written either, and 1 says that it is not the stored one.
    """
    from vlbench.verbs import leaderboard

    study = read_study(Path(args.file))
    cells = list(itertools.product(study.backbones or (None,), study.seeds, study.arms))
    budgets = _budgets(study, cells, args.file)  # a mistake in the last arm is better known before the first is trained
    notes = [*study.notes, *budgets]
    if args.table_only or args.check:
        return _tabulate(study, args, notes)
    _check_tasks(study, args.file)
    out = Path(args.out) if args.out else Path("runs") / Path(args.file).stem
    measured: dict[str, Any] = {
        "tasks": study.tasks,
        "data": study.eval_data,
        "data_root": study.data_root,
        "results": args.results,
        "skip_unsuitable": True,  # arms differ in what they can do
    }
    status = 0
    for number, (backbone, seed, arm) in enumerate(cells, start=1):
        name = model_name(study, arm.label, backbone, seed)
        print(f"\n[study] {number}/{len(cells)} {name}")
        checkpoint = pretrain(**study.settings(arm, backbone, seed), out=str(out / slug(name)), resume=True)
        status |= evaluate(model=str(checkpoint), name=name, **measured)
        for label, of in study.random_rows.items():
            if of == arm.label:
                random = model_name(study, label, backbone, seed)
                status |= evaluate(model=str(checkpoint), name=random, weights=f"random:{seed}", **measured)
    for name, spec in study.models.items():
        print(f"\n[study] {name}: {spec}")
        status |= evaluate(model=spec, name=name, **measured)
    print()
    status |= leaderboard.run(argparse.Namespace(results=args.results, check=False))
    return status | _tabulate(study, args, notes)


def _tabulate(study: Study, args: argparse.Namespace, notes: Sequence[str]) -> int:
    """Print the study's table and write it, or say whether the written one is current."""
    table = _table(study, args.results, notes)
    path = Path(args.results) / TABLES / f"{Path(args.file).stem}.md"
    if args.check:
        current = path.is_file() and path.read_bytes() == table.encode("utf-8")
        again = f"run: vlbench study {args.file} --table-only --results {args.results}"
        print(f"{path}: {'current' if current else f'stale or missing; {again}'}")
        return int(not current)
    write_text(path, table)
    print(f"\n{table}\n[study] {path}")
    return 0


def _check_tasks(study: Study, file: str) -> None:
    """Refuse what ``eval`` would."""
    from vlbench.core.paths import data_root
    from vlbench.verbs.selection import select

    try:
        root = Path(study.data_root).expanduser() if study.data_root else data_root()
        select(study.tasks, data=_data(study), root=root)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def _data(study: Study) -> list[str]:
    return [study.eval_data] if study.eval_data else []


def _budgets(study: Study, cells: Sequence[tuple[str | None, int, Arm]], file: str) -> list[str]:
    """What there is to say of the budgets. Refuses what ``pretrain`` would."""
    budgets: dict[tuple[str, str], list[str]] = {}
    for backbone, seed, arm in cells:
        try:
            config = check_pretrain(**study.settings(arm, backbone, seed))
        except UserError as error:
            raise UserError(f"{file}: arm {arm.label}: {error}") from None
        if seed == study.seeds[0]:
            tower = f"{config.visual.identity()} at {config.visual.image_size} px"
            label = arm.label if len(study.backbones or ()) < 2 else f"{arm.label} on {backbone}"
            budgets.setdefault((f"{config.steps * config.batch_size:,}", tower), []).append(label)
    if len(budgets) == 1:
        ((images, tower),) = budgets
        return [f"Every arm saw {images} images through {tower}."]
    said = (f"{', '.join(names)}: {images} through {tower}" for (images, tower), names in budgets.items())
    return [f"Images seen and image towers differ: {'; '.join(said)}."]


def _table(study: Study, results: str, notes: Sequence[str]) -> str:
    """All arms over their seeds on the study's own tasks, as Markdown."""
    from vlbench.report.arms import Arm as Row
    from vlbench.report.arms import Wanted, arms_page
    from vlbench.report.page import markdown
    from vlbench.store.results import ResultStore
    from vlbench.verbs.outcomes import outcomes_from, sound_results
    from vlbench.verbs.selection import is_meant

    store = ResultStore(results)
    outcomes_of = outcomes_from(store)
    labels = [*(arm.label for arm in study.arms), *study.random_rows]
    rows = [
        Row(_row_name(study, label, backbone), tuple(model_name(study, label, backbone, seed) for seed in study.seeds))
        for backbone in study.backbones or (None,)
        for label in labels
    ]
    rows += [Row(name, (name,)) for name in study.models]
    names = {name for row in rows for name in row.models}
    mine = [
        result
        for result in store.scan().results
        if result.model.name in names and is_meant(result.task, study.tasks, data=_data(study))
    ]
    sound, problems = sound_results(mine, outcomes_of)

    def chance_of(result: Result, metric: str) -> float | None:
        known = outcomes_of.meta(result).get("chance", {})
        return result.chance if metric == result.metric else known.get(metric)

    wanted = Wanted(study.metrics, chance_of)
    problems += _absent_metrics(study, sound)
    return markdown(arms_page(study.title, rows, sound, outcomes_of, notes=[*notes, *problems], wanted=wanted))


def _absent_metrics(study: Study, results: Sequence[Result]) -> list[str]:
    """A line for each metric that a study wants shown and no result has."""
    has = {(result.task, metric) for result in results for metric in result.estimates}
    wanted = [(task, metric) for task, metrics in study.metrics.items() for metric in metrics]
    return [f"{task} has no metric {metric!r}." for task, metric in wanted if (task, metric) not in has]


def _row_name(study: Study, label: str, backbone: str | None) -> str:
    return f"{label}, {backbone}" if backbone and len(study.backbones or ()) > 1 else label


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
