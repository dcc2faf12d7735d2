"""``vlbench eval``: measure one backbone on tasks; each result is on disk before the next task starts.

A task whose stored result is about the same weights, task, data and settings is not run again. A failing task does
not stop the others; it is reported at the end and the exit status is 1.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlbench.core.cards import prompt_lines
from vlbench.core.catalog import ADAPTERS
from vlbench.core.config import Config, parse
from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.paths import data_root
from vlbench.core.types import DataRef, Estimate, ModelRef, Result, Rows
from vlbench.store.features import FeatureStore
from vlbench.store.results import NO_EXAMPLES, ResultStore
from vlbench.verbs import machine
from vlbench.verbs.progress import EncodingProgress
from vlbench.verbs.selection import Choice, Skip, select

if TYPE_CHECKING:
    from vlbench.adapters.encoder import Encoder, EncoderStats

DEFAULT_PROMPTS = "simple"
"""Templates for data that bring none of their own."""
OPTIONAL_SPLITS = frozenset({"val"})
"""Splits that an adapter reads where they exist and does without where they do not."""


@dataclass(frozen=True)
class Job:
    """One task made ready: everything that decides its number is known, nothing is computed yet."""

    choice: Choice
    adapter: Any
    config: Config
    data: Any
    """A ``data.taskdata.TaskData``."""
    data_ref: DataRef


@dataclass
class Session:
    """One call of ``vlbench eval``."""

    model: ModelRef
    encoder: Encoder
    results: ResultStore
    settings: dict[str, Any]
    force: bool
    provenance: dict[str, Any]
    """``versions`` and ``commit`` of the software."""
    data: dict[str, Any] = field(default_factory=dict)
    """Opened task data by spec and splits: tasks on the same data share them."""


@dataclass(frozen=True)
class Done:
    """One finished task."""

    result: Result
    reused: bool
    notes: tuple[str, ...]


class Unsuitable(UserError):
    """The model or the data lack what the task needs: a kind skips it, a full name makes it an error."""


def run(args: argparse.Namespace) -> int:
    """Evaluate as the arguments of ``vlbench eval`` say. Returns 0, or 1 where a task failed."""
    root = Path(args.data_root).expanduser() if args.data_root else data_root()
    data = [args.data] if isinstance(args.data, str) else list(args.data or ())
    selection = select(args.tasks, data=data, root=root)
    for skip in selection.skipped:
        _say_skip(skip)
    session = open_session(args)
    _require_parts(selection.choices, session)
    done: list[Done] = []
    failed: list[tuple[str, str]] = []
    for number, choice in enumerate(selection.choices, start=1):
        place = f"[{number}/{len(selection.choices)}] {choice.card.name}"
        try:
            done.append(_run_one(choice, session, place))
        except Unsuitable as error:
            if choice.named:
                failed.append((choice.card.name, str(error)))
                print(f"{place}: FAILED: {error}", file=sys.stderr)
            else:
                _say_skip(Skip(choice.card.name, str(error)))
        except Exception as error:
            line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            failed.append((choice.card.name, line))
            if getattr(args, "debug", False):
                traceback.print_exc()
            print(f"{place}: FAILED: {line}", file=sys.stderr)
    if not done and not failed:
        raise UserError(f"nothing could be run: no task of {args.tasks!r} fits this model and these data (see above)")
    _print_summary(session, done, failed)
    return 1 if failed else 0


def open_session(args: argparse.Namespace) -> Session:
    """Load the model and prepare stores and encoder."""
    from vlbench.adapters.encoder import Encoder
    from vlbench.models.backbone import backbone_fingerprint
    from vlbench.models.load import load_backbone

    device = machine.choose_device(args.device)
    backbone = load_backbone(args.model, weights=args.weights, name=args.name, device=device)
    card = backbone.card
    model = ModelRef(
        name=card.id,
        spec=args.model if args.weights is None else f"{args.model} --weights {args.weights}",
        weights_hash=backbone.weights_hash,
        backbone_fingerprint=backbone_fingerprint(backbone),
        **{key: getattr(card, key) for key in ("recipe", "arch", "params", "pretrain_data", "images_seen")},
        seed=card.seed,
        random=card.random,
    )
    encoder = Encoder(
        backbone,
        None if args.no_store else FeatureStore(),
        batch_size=args.batch_size,
        precision=args.precision,
        device=device,
        workers=args.workers,
        progress=EncodingProgress(),
    )
    if not encoder.code_is_known:
        print("note: the source of the model's code cannot be read: features are not kept, results not used again")
    settings = {"precision": args.precision, "batch_size": args.batch_size, **machine.describe(device)}
    provenance = {"versions": machine.versions(), "commit": machine.commit()}
    print(f"model: {model.name} ({card.arch}, weights {model.weights_hash}) on {settings['device_name']}")
    return Session(model, encoder, ResultStore(args.results), settings, args.force, provenance)


def prepare(choice: Choice, session: Session) -> Job:
    """Open the task's data and settle its configuration.

    Raises:
        Unsuitable: where model or data lack a part or a split that the adapter needs.
        UserError: for a wrong key in the card's protocol, or data that cannot be read.
    """
    card = choice.card
    adapter = ADAPTERS.get(card.adapter)
    missing = adapter.requires - session.encoder.backbone.card.provides
    if missing:
        raise Unsuitable(f"{session.model.name} has no {_what_is_missing(missing)}")
    config = parse(adapter.Config, card.protocol, where=f"task {card.name}, protocol")
    data = _open_data(choice, session, with_prompts="text" in adapter.requires)
    for split in adapter.splits:
        if split not in OPTIONAL_SPLITS and not data.has(split):
            raise Unsuitable(f"{choice.spec} has no {split!r} split")
    splits = [split for split in adapter.splits if data.has(split)]
    reported = data.split(splits[-1])
    absent = adapter.needs - reported.provides
    if absent:
        raise Unsuitable(f"{choice.spec} has no {' and no '.join(sorted(absent))}")
    content = {"data": data.fingerprint(tuple(splits)), "classes": list(reported.classes or ())}
    if "label" in adapter.needs and "text" in adapter.requires:
        content |= {"classes": list(data.classnames), "templates": list(data.templates)}
    ref = DataRef(spec=choice.said, split=reported.split, n=len(reported), fingerprint=fingerprint(content))
    return Job(choice, adapter, config, data, ref)


def measure(job: Job, session: Session) -> tuple[Result, Rows]:
    """Run one task. Nothing is stored."""
    card, encoder = job.choice.card, session.encoder
    before, began = encoder.stats.copy(), time.perf_counter()
    machine.reset_peak_memory(session.settings["device"])
    rows = _with_notes(job.adapter.predict(encoder, job.data, job.config), job.data.notes)
    predicted = time.perf_counter()
    estimates: dict[str, Estimate] = job.adapter.score(rows, job.config)
    if card.metric not in estimates:
        raise UserError(f"task {card.name}: there is no metric {card.metric!r}; there are {', '.join(estimates)}")
    spent: EncoderStats = encoder.stats.since(before)
    encoding = spent.image_seconds + spent.text_seconds
    seconds = {
        "encode_images": spent.image_seconds,
        "encode_texts": spent.text_seconds,
        "predict": max(0.0, predicted - began - encoding),
        "score": time.perf_counter() - predicted,
    }
    result = Result(
        model=session.model,
        task=card.name,
        task_version=card.version,
        task_fingerprint=card.fingerprint(),
        adapter=card.adapter,
        config=job.config.model_dump(mode="json"),
        metric=card.metric,
        chance=card.chance if card.chance is not None else rows.meta.get("chance", {}).get(card.metric),
        estimates=estimates,
        chosen=dict(rows.meta.get("chosen", {})),
        data=job.data_ref,
        examples=NO_EXAMPLES,
        settings=session.settings,
        **session.provenance,
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        images_per_second=spent.images_per_second,
        peak_memory_mib=machine.peak_memory_mib(session.settings["device"]),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return result, rows


def stored_result(job: Job, session: Session) -> Result | None:
    """The stored result of exactly this measurement, its rows undamaged; None where there is none.

    Raises:
        UserError: where the user's own data have the name of other data that a result is stored about.
    """
    card, store = job.choice.card, session.results
    if not store.path(session.model.name, card.name, card.version).is_file():
        return None
    try:
        old = store.load(session.model.name, card.name, card.version)
        store.rows(old)
    except UserError as error:
        print(f"  stored result not used: {error}", file=sys.stderr)
        return None
    differs = {
        "weights": old.model.backbone_fingerprint != session.model.backbone_fingerprint,
        "task": old.task_fingerprint != card.fingerprint() or old.config != job.config.model_dump(mode="json"),
        "data": old.data.fingerprint != job.data_ref.fingerprint,
        "precision": old.settings.get("precision") != session.settings["precision"],
        "code (for all that is known)": not session.encoder.code_is_known,
    }
    if differs["data"] and not card.data:  # a folder's name is all that tells the user's own data apart here
        raise UserError(
            f"{store.path(old.model.name, old.task, old.task_version)} is about other data ({old.data.spec}): rename "
            "the folder, name another --results DIR, or replace it with --force"
        )
    changed = [what for what, is_changed in differs.items() if is_changed]
    if changed:
        print(f"  the stored result under this name is about other {' and '.join(changed)}: measured again, replaced")
        return None
    return old


def _run_one(choice: Choice, session: Session, place: str) -> Done:
    job = prepare(choice, session)
    old = None if session.force else stored_result(job, session)
    if old is not None:
        print(f"{place}: reused, measured {old.created}")
        return Done(old, True, _say_notes(_with_notes(session.results.rows(old), job.data.notes)))
    print(f"{place}: {job.data_ref.n:,} examples of {job.data_ref.spec}", flush=True)
    try:
        result, rows = measure(job, session)
    finally:
        if session.encoder.progress is not None:
            session.encoder.progress.close()
    result = session.results.save(result, rows)
    notes = _say_notes(rows)
    headline = result.estimates[result.metric]
    print(f"  {result.metric} {_percent(headline)}, {sum(result.seconds.values()):.1f} s", flush=True)
    return Done(result, False, notes)


def _with_notes(rows: Rows, notes: Sequence[str]) -> Rows:
    """``rows`` that carry these notes before their own: what was said of a measurement is stored with it."""
    every = list(dict.fromkeys((*notes, *rows.meta.get("notes", ()))))
    return replace(rows, meta={**rows.meta, "notes": every}) if every else rows


def _say_notes(rows: Rows) -> tuple[str, ...]:
    notes = tuple(rows.meta.get("notes", ()))
    for note in notes:
        print(f"  note: {note}")
    return notes


def _open_data(choice: Choice, session: Session, *, with_prompts: bool) -> Any:
    """The task's data under its prompts; opened and read once for all tasks on the same data and splits."""
    from vlbench.data.taskdata import TaskData

    prompts = choice.card.prompts
    classes = prompt_lines(prompts.classnames) if prompts.classnames else None
    templates = prompt_lines(prompts.templates) if with_prompts and prompts.templates else None
    key = fingerprint([choice.spec, choice.card.splits])
    if key not in session.data:
        opened = TaskData(choice.spec, choice.card.splits, pretrained_on=session.model.pretrain_data)
        session.data[key] = opened
    data = session.data[key].with_prompts(classes=classes, templates=templates)
    if with_prompts and not data.templates:
        data = data.with_prompts(classes=classes, templates=prompt_lines(DEFAULT_PROMPTS))
    return data


def _require_parts(choices: Sequence[Choice], session: Session) -> None:
    """Refuse at once what was asked for by name and this model cannot do."""
    for choice in choices:
        missing = ADAPTERS.get(choice.card.adapter).requires - session.encoder.backbone.card.provides
        if missing and choice.named:
            raise UserError(f"task {choice.card.name}: {session.model.name} has no {_what_is_missing(missing)}")


def _what_is_missing(parts: frozenset[str]) -> str:
    if parts <= {"embed", "text"}:
        return "text tower in its joint space; it can be probed (linear, knn), not prompted"
    return " and no ".join(sorted(parts))


def _say_skip(skip: Skip) -> None:
    print(f"skipped {skip.task}: {skip.reason}")


def _print_summary(session: Session, done: Sequence[Done], failed: Sequence[tuple[str, str]]) -> None:
    from tabulate import tabulate

    if done:
        rows = [_table_row(item, session.results) for item in done]
        headers = ("task", "metric", "value [95%]", "chance", "n", "s", "stored")
        print()
        aligned = ("left", "left", "left", "right", "right", "right", "left")
        print(tabulate(rows, headers, colalign=aligned, disable_numparse=True))
    stats = session.encoder.stats
    rate = f" at {stats.images_per_second:,.0f} images/s" if stats.images_per_second else ""
    print(f"\nimages: {stats.images_encoded:,} encoded{rate}, {stats.images_reused:,} from the feature store")
    if stats.texts_encoded or stats.texts_reused:
        print(f"texts: {stats.texts_encoded:,} encoded, {stats.texts_reused:,} from the feature store")
    for task, line in failed:
        print(f"FAILED {task}: {line}", file=sys.stderr)


def _table_row(item: Done, store: ResultStore) -> tuple[str, ...]:
    result = item.result
    headline = result.estimates[result.metric]
    chance = "" if result.chance is None else f"{100 * result.chance:.1f}"
    path = store.path(result.model.name, result.task, result.task_version)
    seconds = "reused" if item.reused else f"{sum(result.seconds.values()):.1f}"
    return (result.task, result.metric, _percent(headline), chance, f"{headline.n:,}", seconds, str(path))


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} [{100 * estimate.lo:.1f}, {100 * estimate.hi:.1f}]"
