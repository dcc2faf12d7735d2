"""``vlbench eval``: measure one backbone on tasks; each result is on disk before the next task starts.

A task whose stored result is about the same weights, task, data and settings is not run again. A failing task does
not stop the others; it is reported at the end and the exit status is 1. Under ``torchrun`` the processes share the
encoding (``verbs.crew``).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlbench.core.cards import dataset_cards, prompt_lines
from vlbench.core.catalog import ADAPTERS
from vlbench.core.config import Config, parse
from vlbench.core.errors import RunError, UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.paths import data_root
from vlbench.core.types import DataRef, Estimate, Result, Rows
from vlbench.report.settings import features_version
from vlbench.store.results import NO_EXAMPLES
from vlbench.verbs import crew as crews
from vlbench.verbs import machine
from vlbench.verbs.precision import bf16_difference, say_difference
from vlbench.verbs.selection import Choice, Selection, Skip, select, with_settings
from vlbench.verbs.serving import serve
from vlbench.verbs.session import Session, open_session
from vlbench.verbs.summary import Done, percent, print_summary

if TYPE_CHECKING:
    from vlbench.adapters.encoder import EncoderStats

DEFAULT_PROMPTS = "simple"
"""Templates for data that bring none of their own."""
OPTIONAL_SPLITS = frozenset({"val", "testA", "testB"})
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
    notes: tuple[str, ...]
    """What there is to say of the data."""


class Unsuitable(UserError):
    """Model, data or machine lack what the task needs: a kind skips it, a full name makes it an error."""


def run(args: argparse.Namespace) -> int:
    """Evaluate as the arguments of ``vlbench eval`` say. Returns 0, or 1 where a task failed."""
    machine.keep_freed_memory()
    with crews.joined(args.device) as crew:
        if not crew.first:
            return serve(args, crew, join_in=_join_in)
        try:
            status = _lead(args, crew)
        except crews.Told:
            return 1
        except crews.Lost:
            raise
        except Exception as error:
            status = 2 if isinstance(error, UserError) and not isinstance(error, RunError) else 1
            with contextlib.suppress(crews.Lost):
                crew.give(crews.Order("end", status=status))
            raise
        crew.give(crews.Order("end", status=status))
        return status


def _lead(args: argparse.Namespace, crew: crews.Crew) -> int:
    """What the first process does: everything, with the others' help where something is to be encoded."""
    with crew.settling():
        if args.precision_spread and args.precision != "fp32":
            raise UserError("--precision-spread compares bf16 with fp32: leave --precision out")
        root = Path(args.data_root).expanduser() if args.data_root else data_root()
        data = [args.data] if isinstance(args.data, str) else list(args.data or ())
        selection = select(args.tasks, data=data, root=root)
        if getattr(args, "set", None):
            choices = tuple(with_settings(choice, args.set) for choice in selection.choices)
            selection = replace(selection, choices=choices)
        lenient = getattr(args, "skip_unsuitable", False)
        if lenient:
            wishes = tuple(replace(choice, named=False) for choice in selection.choices)
            selection = replace(selection, choices=wishes)
        for note in selection.notes:
            print(note)
        for skip in selection.skipped:
            _say_skip(skip)
        session = open_session(args, crew)
    _require_parts(selection.choices, session)
    done, failed = _run_all(selection, session, debug=getattr(args, "debug", False))
    if not done and not failed and not lenient:
        raise UserError(f"nothing could be run: no task of {args.tasks!r} fits this model and these data (see above)")
    print_summary(done, failed, store=session.results, stats=session.encoder.stats)
    return 1 if failed else 0


def _run_all(selection: Selection, session: Session, *, debug: bool) -> tuple[list[Done], list[tuple[str, str]]]:
    """Every task, finished or failed with one line."""
    done: list[Done] = []
    failed: list[tuple[str, str]] = []
    for number, choice in enumerate(selection.choices, start=1):
        place = f"[{number}/{len(selection.choices)}] {choice.card.name}"
        try:
            done.append(_run_one(choice, session, place))
        except crews.Lost:
            raise
        except Unsuitable as error:
            if choice.named:
                failed.append((choice.card.name, str(error)))
                print(f"{place}: FAILED: {error}", file=sys.stderr)
            else:
                _say_skip(Skip(choice.card.name, str(error)))
        except Exception as error:
            line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            failed.append((choice.card.name, line))
            if debug:
                traceback.print_exc()
            print(f"{place}: FAILED: {line}", file=sys.stderr)
    return done, failed


def prepare(choice: Choice, session: Session) -> Job:
    """Open the task's data and settle its configuration.

    Raises:
        Unsuitable: where model or data lack a part or a split that the adapter needs, or this machine a library.
        UserError: for a wrong key in the card's protocol, or data that cannot be read.
    """
    from vlbench.data.taskdata import class_notes

    card = choice.card
    adapter = ADAPTERS.get(card.adapter)
    missing = adapter.requires - session.encoder.backbone.card.provides
    if missing:
        raise Unsuitable(f"{session.model.name} has no {_what_is_missing(missing)}")
    config = parse(adapter.Config, card.protocol, where=f"task {card.name}, protocol")
    if hasattr(config, "check_start"):  # what is wrong with it is said before an image is read
        config.check_start()
    lack = adapter.lack(config) if hasattr(adapter, "lack") else None
    if lack is not None:
        raise Unsuitable(lack)
    prompted = _reads_prompts(adapter, config)
    with_prompts = prompted or "text" in adapter.requires or bool(card.prompts.templates)
    data = _open_data(choice, session, with_prompts=with_prompts)
    for split in adapter.splits:
        if split not in OPTIONAL_SPLITS and not data.has(split):
            raise Unsuitable(f"{choice.spec} has no {split!r} split")
    if data.drawn and card.expected_sizes.keys() - {"train"}:
        # A shipped card's number is of the published test images; of some others it would be another number.
        raise Unsuitable(f"{choice.spec} has training images alone, and the card's are its test images")
    splits = [split for split in adapter.splits if data.has(split)]
    session.crew.go_to(_place(choice, splits))
    reported = data.split(splits[-1])
    absent = adapter.needs - reported.provides
    other = f"{card.adapter}_multilabel"
    if "label" in absent and "labels" in reported.provides and other in ADAPTERS.names():
        raise Unsuitable(f"{choice.spec} has several labels an image: ask for {other}")
    if absent:
        raise Unsuitable(f"{choice.spec} has no {' and no '.join(sorted(absent))}")
    content = {"data": data.fingerprint(tuple(splits)), "classes": list(reported.classes or ())}
    if prompted:
        content |= {"classes": list(data.classnames), "templates": list(data.templates)}
    files = config.contents() if hasattr(config, "contents") else []
    if files:  # what settings name by a path decides numbers like the data
        content |= {"files": files}
    ref = DataRef(spec=choice.said, split=reported.split, n=len(reported), fingerprint=fingerprint(content))
    sizes = {split: len(data.split(split)) for split in splits}
    counted = (*_size_notes(sizes, card.expected_sizes), *class_notes(data.own_classes, card.expected_classes))
    return Job(choice, adapter, config, data, ref, (*data.notes, *counted))


def measure(job: Job, session: Session) -> tuple[Result, Rows]:
    """Run one task. Nothing is stored."""
    card, encoder = job.choice.card, session.encoder
    before, began = encoder.stats.copy(), time.perf_counter()
    machine.reset_peak_memory(session.settings["device"])
    rows = _with_notes(_predict(job, session, session.settings["precision"]), job.notes)
    predicted = time.perf_counter()
    estimates: dict[str, Estimate] = job.adapter.score(rows, job.config)
    metric = card.metric
    if metric not in estimates and not card.data:
        metric = next(iter(estimates))  # a user's own data: with several labels an image the headline is another
    if metric not in estimates:
        raise UserError(f"task {card.name}: there is no metric {metric!r}; there are {', '.join(estimates)}")
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
        metric=metric,
        chance=card.chance if card.chance is not None else rows.meta.get("chance", {}).get(metric),
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


def _predict(job: Job, session: Session, precision: str) -> Rows:
    """The rows of one task. An adapter that trains is run by all processes, each with its own view of the same.

    So is one that says ``together``: what it asks of the encoder is then dealt out without orders.
    """
    if not (getattr(job.adapter, "trains", False) or getattr(job.adapter, "together", False)):
        rows: Rows = job.adapter.predict(session.encoder_in(precision), job.data, job.config)
        return rows
    if session.crew.first:
        session.crew.give(crews.Order("together", precision=precision, choice=job.choice))
    with session.crew.together():
        return _train_and_predict(job, session, precision)


def _join_in(order: crews.Order, session: Session) -> None:
    """What the other processes do of a task that all do together: all of it, but for storing."""
    with session.crew.together():
        _train_and_predict(prepare(order.choice, session), session, order.precision)


def _train_and_predict(job: Job, session: Session, precision: str) -> Rows:
    from vlbench.finetune.conduct import Conduct, conducted
    from vlbench.train.progress import watch

    encoder = session.encoder_in(precision)
    forgets = not encoder.code_is_known
    conduct = Conduct(
        anew=session.force or forgets,
        forgets=forgets,
        watch=watch if session.crew.first else None,
        folders=session.tuned,  # what --precision-spread asks a second time is not tuned a second time
    )
    with conducted(conduct):
        rows: Rows = job.adapter.predict(encoder, job.data, job.config)
    return rows


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
        "features (another vlbench made them)": features_version(old) != session.settings["features_version"],
        "code (for all that is known)": not session.encoder.code_is_known,
    }
    if differs["data"] and not card.data:  # a folder's name is all that tells the user's own data apart here
        raise UserError(
            f"{store.path(old.model.name, old.task, old.task_version)} is about other data ({old.data.spec}): rename "
            "the folder, name another --results DIR, or replace it with --force"
        )
    changed = [what for what, is_changed in differs.items() if is_changed]
    if not changed and session.spread and "bf16_difference" not in old.settings:
        print("  the stored result does not say what bf16 changes: measured again, replaced")
        return None
    if changed:
        print(f"  the stored result under this name is about other {' and '.join(changed)}: measured again, replaced")
        return None
    return old


def _run_one(choice: Choice, session: Session, place: str) -> Done:
    job = prepare(choice, session)
    old = None if session.force else stored_result(job, session)
    if old is not None:
        print(f"{place}: reused, measured {old.created}")
        rows = session.results.rows(old)
        _say_notes(_with_notes(rows, job.notes))
        _say_shown(old, rows, job, session)
        return Done(old, reused=True)
    print(f"{place}: {job.data_ref.n:,} examples of {job.data_ref.spec}", flush=True)
    session.tuned = []
    with _showing_progress(session):
        result, rows = measure(job, session)
    result = session.results.save(result, rows)
    _say_notes(rows)
    for folder in session.tuned:  # said and not stored: a place on this machine is no part of a result
        print(f"  note: the fine-tuned model is in {folder}")
    headline = result.estimates[result.metric]
    print(f"  {result.metric} {percent(headline)}, {sum(result.seconds.values()):.1f} s", flush=True)
    _say_shown(result, rows, job, session)
    if session.spread:
        result = _with_spread(result, rows, job, session)
    return Done(result, reused=False)


def _with_spread(result: Result, rows: Rows, job: Job, session: Session) -> Result:
    """``result``, stored once more with what bf16 changes; as it is, and one note, where bf16 fails."""
    try:
        with _showing_progress(session):
            difference = bf16_difference(result, rows, job, _predict(job, session, "bf16"))
    except crews.Lost:
        raise
    except Exception as error:
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        print(f"  note: what bf16 changes is not known, the fp32 result is stored: {line}", flush=True)
        return result
    settings = {**result.settings, "bf16_difference": difference}
    result = session.results.save(result.model_copy(update={"settings": settings}), rows)
    say_difference(result)
    return result


@contextlib.contextmanager
def _showing_progress(session: Session) -> Iterator[None]:
    """What is shown of the encoding ends with the block, finished or not."""
    try:
        yield
    finally:
        if session.encoder.progress is not None:
            session.encoder.progress.close()


def _reads_prompts(adapter: Any, config: Config) -> bool:
    """Whether class names and templates decide the number; an adapter that it depends on says so itself."""
    if hasattr(adapter, "reads_prompts"):
        return bool(adapter.reads_prompts(config))
    return bool(adapter.needs & {"label", "labels"}) and "text" in adapter.requires


def _size_notes(found: Mapping[str, int], expected: Mapping[str, int]) -> list[str]:
    """A note for each split that is not of its published size."""
    return [
        f"{expected[role]:,} {role} images expected, {count:,} found"
        for role, count in found.items()
        if expected.get(role, count) != count
    ]


def _with_notes(rows: Rows, notes: Sequence[str]) -> Rows:
    """``rows`` that carry these notes before their own: what was said of a measurement is stored with it."""
    every = list(dict.fromkeys((*notes, *rows.meta.get("notes", ()))))
    return replace(rows, meta={**rows.meta, "notes": every}) if every else rows


def _say_notes(rows: Rows) -> None:
    for note in rows.meta.get("notes", ()):
        print(f"  note: {note}")


def _say_shown(result: Result, rows: Rows, job: Job, session: Session) -> None:
    """What the adapter shows of the rows themselves, if anything, and where all of them are."""
    if not hasattr(job.adapter, "shown"):
        return
    for line in job.adapter.shown(rows):
        print(f"  {line}")
    folder = session.results.path(result.model.name, result.task, result.task_version).parent
    print(f"  all {len(rows):,}: {folder / result.examples.file} (columns {', '.join(rows.columns)})", flush=True)


def _open_data(choice: Choice, session: Session, *, with_prompts: bool) -> Any:
    """The task's data under its prompts."""
    prompts = choice.card.prompts
    classes = prompt_lines(prompts.classnames) if prompts.classnames else None
    templates = prompt_lines(prompts.templates) if with_prompts and prompts.templates else None
    data = session.opened(choice.spec, choice.card.splits).with_prompts(classes=classes, templates=templates)
    if with_prompts and not data.templates:
        data = data.with_prompts(classes=classes, templates=prompt_lines(DEFAULT_PROMPTS))
    if choice.card.train_from is None:
        return data
    learnt = dataset_cards()[choice.card.train_from]
    names = prompt_lines(learnt.prompts.classnames) if learnt.prompts.classnames else None
    return data.learning_from(session.opened(choice.train, learnt.splits).with_prompts(classes=names))


def _place(choice: Choice, roles: Sequence[str]) -> crews.Place:
    """Where the images of a task are, for the other processes of the call."""
    if choice.card.train_from is None or choice.train is None:
        return crews.Place(choice.spec, tuple(choice.card.splits.items()), tuple(roles))
    splits = dataset_cards()[choice.card.train_from].splits
    learnt = crews.Place(choice.train, tuple(splits.items()), tuple(role for role in roles if role != "test"))
    return crews.Place(choice.spec, tuple(choice.card.splits.items()), ("test",), learnt)


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
