"""One fine-tuning in one folder: the loop of pretraining, looks at held-out data on the way, and the choice at the end.

A run judges itself every ``judge_every`` steps and keeps its best weights; with ``search`` there is a run for each
learning rate, and the best of them is taken. Each judgement has a checkpoint of its step: a run that was killed between
the two judges first and goes on then, so that it chooses, bit for bit, what the run that was never stopped chose.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from vlbench.core.errors import RunError, UserError
from vlbench.core.files import atomic_writer, sha256, write_text
from vlbench.core.types import Recipe
from vlbench.finetune.conduct import BEGUN_ANEW, Conduct, current
from vlbench.finetune.config import FinetuneConfig
from vlbench.finetune.folder import (
    ASSETS,
    BEST,
    JUDGED,
    TUNED,
    WEIGHTS,
    held,
    read_assets,
    read_judgements,
    seconds_of,
    write_judgements,
    write_tensors,
)
from vlbench.models.weights import asset_tensors, checkpoint_assets, load_strictly, read_checkpoint, read_weights
from vlbench.train.checkpoint import CHECKPOINT
from vlbench.train.distributed import from_first, ranks
from vlbench.train.feed import Feed
from vlbench.train.loop import Diverged, fit
from vlbench.train.progress import Silent, Watcher
from vlbench.train.run_config import FREE_ON_RESUME

Judge = Callable[[nn.Module], float]
T = TypeVar("T")


@dataclass(frozen=True)
class Tuned:
    """A fine-tuned model, and how it was chosen."""

    module: nn.Module
    """With the chosen weights, in evaluation mode, on the device."""
    learning_rate: float
    """At the peak of the schedule."""
    step: int
    """Steps after which the weights were taken."""
    value: float | None
    """What ``judge`` said of them; None where there was none."""
    seconds: float
    """Spent on training steps, those of the rates that were not chosen and of earlier sessions included."""
    history: tuple[dict[str, Any], ...]
    """Every judgement: learning_rate, step, value."""
    assets: dict[str, bytes]
    """What the recipe learnt of the data."""
    folder: Path

    @property
    def weights(self) -> Path:
        """The file of the chosen weights."""
        return self.folder / WEIGHTS


def finetune(
    recipe: Recipe,
    config: FinetuneConfig,
    *,
    feed: Feed,
    judge: Judge | None,
    folder: Path,
    device: torch.device | str,
    watcher: Watcher | None = None,
) -> Tuned:
    """Train, choose, and return the chosen model; a finished folder is only read.

    Under ``torchrun`` every rank calls it with its own view of the same feed and the same folder; the first judges,
    writes and talks.

    Args:
        recipe: builds the model and has its loss: a ``finetune.recipe.FineTuner``.
        config: resolved settings.
        feed: what is learnt from.
        judge: what the model is worth on held-out data, higher being better. The model is in evaluation mode, without
            gradients; only the first rank calls it. None where there is nothing to choose: ``select`` is last, and
            there is no search.
        folder: of this fine-tuning: ``work_folder``.
        device: where to train.
        watcher: follows the runs; None: as ``conducted`` says.

    Raises:
        UserError: for a folder that is in use, or that holds another fine-tuning.
        RunError: for a loss that is not finite at every learning rate, a judgement that is none, too many bad examples.
    """
    assert judge is not None or (config.select == "last" and not config.search), "who chooses looks at held-out data"
    device, conduct = torch.device(device), current()
    with _claimed(folder, conduct):
        facts = _by_first(lambda: _finished(folder, recipe, config, feed))
        if facts is None:
            work = _Work(recipe, feed, judge, device)
            runs = _train_all(work, config, folder, _watching(config, conduct, watcher))
            facts = _by_first(lambda: _finish(folder, recipe, config, feed, runs))
        if folder not in conduct.folders:
            conduct.folders.append(folder)
        assets = read_assets(folder)
        module = _built(recipe.with_assets(assets), config, feed, device)
        load_strictly(module, read_weights(folder / WEIGHTS), where=str(folder / WEIGHTS))
    chosen = {key: facts[key] for key in ("learning_rate", "step", "value", "seconds")}
    return Tuned(module.eval(), **chosen, history=tuple(facts["history"]), assets=assets, folder=folder)


# ---------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class _Run:
    """One learning rate."""

    config: FinetuneConfig
    folder: Path
    judged: list[dict[str, Any]]
    """step and value of every judgement, in order; without a judge the end alone, whose value is None."""

    def chosen(self) -> dict[str, Any]:
        """The judgement whose weights are kept: the earliest of the best, or the last."""
        return self.judged[-1] if self.config.select == "last" else max(self.judged, key=lambda line: line["value"])


@dataclass(frozen=True)
class _Work:
    """What the runs of a fine-tuning share."""

    recipe: Recipe
    feed: Feed
    judge: Judge | None
    device: torch.device


def _train_all(
    work: _Work,
    config: FinetuneConfig,
    folder: Path,
    watching: Callable[[], contextlib.AbstractContextManager[Watcher]],
) -> list[_Run]:
    """A run for each learning rate. One that diverges is out of the search; where none is left, that is the error."""
    factors = config.search or (1.0,)
    runs: list[_Run] = []
    error: Diverged | None = None
    for number, factor in enumerate(factors, start=1):
        settings = config.at_rate(factor)
        with watching() as watcher:
            if len(factors) > 1:
                watcher.say(f"learning rate {settings.optim.lr:g} ({number} of {len(factors)})")
            try:
                runs.append(_Judging(work, settings, folder / f"lr-{settings.optim.lr:g}", watcher).train())
            except Diverged as diverged:
                if len(factors) == 1:
                    raise
                error = error or diverged
                watcher.say(f"learning rate {settings.optim.lr:g} is out: {diverged}")
    if not runs:
        assert error is not None, "every rate trains or diverges"
        raise error
    return runs


@dataclass
class _Judging:
    """One run and its judgements."""

    work: _Work
    config: FinetuneConfig
    folder: Path
    watcher: Watcher

    def train(self) -> _Run:
        """From wherever the folder stands to the end."""
        _by_first(self._catch_up)
        fit(
            self.work.recipe,
            self.config,
            out=self.folder,
            resume=True,
            device=self.work.device,
            preset=self.config.preset,
            watcher=self.watcher,
            feed=self.work.feed,
            after_save=self._look,
        )
        return _by_first(lambda: _Run(self.config, self.folder, read_judgements(self.folder)))

    def _look(self, step: int, module: nn.Module) -> None:
        if self._is_due(step):
            _by_first(lambda: self._record(step, module))

    def _is_due(self, step: int) -> bool:
        return self.config.judges_at(step) and (self.work.judge is not None or step == self.config.steps)

    def _catch_up(self) -> None:
        """Judge what was saved and not judged, and drop what was judged later than the checkpoint.

        What another number of processes has begun is no beginning of this run: it starts anew.
        """
        path = self.folder / CHECKPOINT
        saved = read_checkpoint(path) if path.is_file() else None
        if saved is not None and "train" in saved and saved["train"]["world"] != ranks().world:
            self.watcher.say(f"{path} was begun by {saved['train']['world']} processes: from the beginning")
            path.unlink()
            saved = None
        if saved is None:
            (self.folder / JUDGED).unlink(missing_ok=True)
            return
        if (self.folder.parent / BEGUN_ANEW).is_file():
            self.watcher.say(f"going on with what was begun anew; to begin at step 0, delete {self.folder.parent}")
        step, lines = saved["step"], read_judgements(self.folder)
        write_judgements(self.folder, [line for line in lines if line["step"] <= step])
        if self._is_due(step) and all(line["step"] != step for line in lines):
            recipe = self.work.recipe.with_assets(checkpoint_assets(saved))
            module = _built(recipe, self.config, self.work.feed, self.work.device)
            load_strictly(module, saved["model"], where=str(path))
            self._record(step, module)

    def _record(self, step: int, module: nn.Module) -> None:
        """Judge, keep the weights where they are the ones to be kept, and note it: in this order."""
        value = self._judged(step, module)
        lines = read_judgements(self.folder)
        best = value is not None and all(value > line["value"] for line in lines)
        if best if self.config.select == "best" else step == self.config.steps:
            write_tensors(self.folder / BEST, module.state_dict(), step=step)
        write_judgements(self.folder, [*lines, {"step": step, "value": value}])
        if value is not None:
            self.watcher.say(f"step {step}: {value:.4f} on held-out data" + (", the best so far" if best else ""))

    def _judged(self, step: int, module: nn.Module) -> float | None:
        if self.work.judge is None:
            return None
        module.eval()
        with torch.no_grad():
            value = float(self.work.judge(module))
        if not math.isfinite(value):
            raise Diverged(f"{self.folder}: the value on held-out data is {value} after {step} steps; lower optim.lr")
        return value


def _built(recipe: Recipe, config: FinetuneConfig, feed: Feed, device: torch.device) -> nn.Module:
    """The model as the loop makes it, so that it computes the same bits."""
    module: nn.Module = recipe.build(config, feed.classes).to(device).to(memory_format=torch.channels_last)
    if config.compile:
        module.compile()
    return module


# ------------------------------------------------------------------------------------------ the folder


def _finish(folder: Path, recipe: Recipe, config: FinetuneConfig, feed: Feed, runs: Sequence[_Run]) -> dict[str, Any]:
    """Choose between the runs, keep the chosen weights, and drop what only a resume needs."""
    best = max(runs, key=lambda run: run.chosen()["value"]) if len(runs) > 1 else runs[0]
    with (best.folder / BEST).open("rb") as source, atomic_writer(folder / WEIGHTS, sync=True) as target:
        shutil.copyfileobj(source, target)
    assets = checkpoint_assets(read_checkpoint(best.folder / CHECKPOINT))
    if assets:
        write_tensors(folder / ASSETS, asset_tensors(assets))
    facts = {
        **_question(recipe, config, feed),
        **best.chosen(),
        "learning_rate": best.config.optim.lr,
        "seconds": round(sum(seconds_of(run.folder) for run in runs), 3),
        "history": [{"learning_rate": run.config.optim.lr, **line} for run in runs for line in run.judged],
        **_digests(folder),
    }
    write_text(folder / TUNED, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    for name in (CHECKPOINT, BEST):
        for path in folder.glob(f"lr-*/{name}"):
            path.unlink()
    return facts


def _finished(folder: Path, recipe: Recipe, config: FinetuneConfig, feed: Feed) -> dict[str, Any] | None:
    """What the finished folder says; None where there is training to do.

    Raises:
        UserError: for the folder of another fine-tuning.
    """
    path = folder / TUNED
    if not path.is_file():
        return None
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        asked = _question(recipe, config, feed)
        changed = [key for key in asked if facts[key] != asked[key]]
        if not changed and all(facts[key] == value for key, value in _digests(folder).items()):
            return facts
    except (ValueError, KeyError, FileNotFoundError):
        changed = []
    if changed:
        raise UserError(f"{folder} holds a fine-tuning with another {' and another '.join(changed)}; delete the folder")
    path.unlink()  # damaged, or its weights are: it is made again
    return None


def _digests(folder: Path) -> dict[str, str | None]:
    """Of what the chosen model is read from."""
    assets = folder / ASSETS
    return {"weights": sha256(folder / WEIGHTS), "assets": sha256(assets) if assets.is_file() else None}


def _question(recipe: Recipe, config: FinetuneConfig, feed: Feed) -> dict[str, Any]:
    """What was asked, as JSON gives it back. Data that were moved are the same data."""
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_ON_RESUME}
    data = [{key: value for key, value in source.items() if key != "spec"} for source in feed.identity()]
    whole: dict[str, Any] = json.loads(json.dumps({"recipe": recipe.name, "config": settings, "data": data}))
    return whole


# ---------------------------------------------------------------------------------- ranks and processes


def _by_first(make: Callable[[], T]) -> T:
    """What the first rank makes, on every rank; where it fails, all fail with its line."""
    value: T | None = None
    error: Exception | None = None
    if ranks().first:
        try:
            value = make()
        except Exception as raised:
            error = raised
    line = f"{type(error).__name__}: {error}" if not isinstance(error, UserError | None) else str(error)
    value, line, diverged = from_first((value, line if error is not None else None, isinstance(error, Diverged)))
    if error is not None:
        raise error
    if line is not None:
        raise (Diverged if diverged else RunError)(line)  # a search goes on without the rate, on every rank
    return value


@contextlib.contextmanager
def _claimed(folder: Path, conduct: Conduct) -> Iterator[None]:
    """The folder, held by the first rank for all against other calls."""
    with contextlib.ExitStack() as stack:
        _by_first(lambda: stack.enter_context(held(folder, conduct)))
        yield


def _watching(
    config: FinetuneConfig, conduct: Conduct, watcher: Watcher | None
) -> Callable[[], contextlib.AbstractContextManager[Watcher]]:
    """Who follows a run: the watcher that was given, a new one of the caller's kind, or nobody."""
    if watcher is None and conduct.watch is not None and ranks().first:
        return partial(conduct.watch, config.steps, config.batch_size)
    return lambda: contextlib.nullcontext(watcher if watcher is not None and ranks().first else Silent())
