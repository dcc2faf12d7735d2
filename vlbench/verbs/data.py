"""``vlbench data check SPEC``, ``vlbench data make shapes DIR`` and ``vlbench data vocab SPEC --out FILE``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vlbench.core.errors import UserError

if TYPE_CHECKING:
    from vlbench.data.check import CheckReport, Problem, Spread

_CLASSES_SHOWN = 5
_MOST_UNKNOWN = 1e-3  # of the tokens of the captions that a vocabulary was learnt from


def run_check(args: argparse.Namespace) -> int:
    """Report on every split, or on ``args.split``. Exit status 1 where there are bad samples."""
    from vlbench.data.check import check_source
    from vlbench.data.sources import list_splits, open_source

    splits = (args.split,) if args.split else list_splits(args.spec) or (None,)
    bad = 0
    for number, split in enumerate(splits):
        try:
            source = open_source(args.spec, split)
        except UserError as error:
            if len(splits) == 1:
                raise
            print(f"split {split}: {error}", file=sys.stderr)  # the other splits are still worth a look
            bad += 1
            continue
        with _progress(source.split, len(source)) as progress:
            report = check_source(source, progress=progress)
        if number:
            print()
        print("\n".join(report_lines(report)))
        bad += report.n_bad
    return 1 if bad else 0


def run_make(args: argparse.Namespace) -> int:
    """Write the embedded world to a folder, or say what lies there already."""
    from vlbench.data.shapes.write import read_manifest, write_world

    root = write_world(Path(args.dir).expanduser(), seed=args.seed)
    manifest = read_manifest(root)
    assert manifest is not None, "a world has a manifest"
    print(f"{root}: the world {manifest['version']}, seed {manifest['seed']}")
    print("\n".join(f"  {what:<16}{count:,}" for what, count in manifest["sizes"].items()))
    print(f"read it with --data 'shapes:PART?root={root}&seed={args.seed}'")
    return 0


def run_vocab(args: argparse.Namespace) -> int:
    """Learn a vocabulary from the captions of ``args.spec`` and write it."""
    from vlbench.core.files import atomic_writer
    from vlbench.data.sources import open_source
    from vlbench.data.vocabulary import N_SPECIAL, Vocabulary, captions_of, learn_vocabulary

    if args.alphabet is not None and (args.kind != "wordpiece" or args.alphabet < 1):
        raise UserError(
            f"--alphabet {args.alphabet}: a number of characters, 1 or more, for --kind wordpiece; sentencepiece knows "
            "every character"
        )
    sources = [open_source(spec) for spec in args.spec]
    languages = tuple(args.language or ("en",))
    captions = list(captions_of(sources, languages))
    where = f"the captions of {', '.join(args.spec)} in {', '.join(languages)}"
    if args.kind == "wordpiece":
        from vlbench.data.wordpiece import SPECIAL, WordPieceTokenizer, train_wordpiece, unknown_share

        wanted, special, setting = args.size or 100_000, len(SPECIAL), "align --set vocabulary.file"
        model = train_wordpiece(captions, wanted, lower=not args.cased, alphabet=args.alphabet)
        size, unknown = WordPieceTokenizer(model, context_length=3).size, unknown_share(model, captions)
    else:
        wanted, special, setting = args.size or 10_000, N_SPECIAL, "virtex --set vocabulary"
        model = learn_vocabulary(captions, size=wanted, where=where)
        size, unknown = len(Vocabulary(model)), 0.0
    out = Path(args.out).expanduser()
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; name the file to write")
    with atomic_writer(out) as handle:
        handle.write(model)
    print(f"{args.out}: {size:,} pieces, {special} of them special, from {len(captions):,} captions")
    if args.kind == "wordpiece":
        print(f"[UNK]: {unknown:.3%} of the tokens of these captions")
    if size < wanted:
        rest = ", but for those that are [UNK]" if unknown else ""
        print(f"note: {wanted:,} were asked for; these captions have no more different words or parts of words{rest}")
    if unknown > _MOST_UNKNOWN:
        more = "--size" if args.alphabet is None else "--alphabet or --size"
        print(
            f"warning: {unknown:.1%} of the tokens are [UNK]: words with a character that is left out, or of more than "
            f"100; for more characters give a larger {more}",
            file=sys.stderr,
        )
    print(f"use it with vlbench pretrain {setting}={args.out}")
    return 0


def report_lines(report: CheckReport) -> list[str]:
    """The report as a person reads it: what there is, then what is wrong."""
    lines = [f"{report.spec}, split {report.split}: {report.n:,} examples with {', '.join(report.provides)}"]
    lines += _line("formats", _counts(report.formats))
    lines += _line("modes", _counts(report.modes))
    if report.width is not None and report.height is not None:
        lines += _line("width", _spread(report.width) + " px (least / median / most)")
        lines += _line("height", _spread(report.height) + " px")
    if report.classes is not None:
        lines += _line("classes", _classes(report.classes))
    if report.languages:
        lines += _line("captions", _counts(report.languages))
    if report.text_length is not None:
        lines += _line("caption length", _spread(report.text_length) + " characters")
    if report.regions:
        lines += _line("regions", f"{report.regions:,}")
    lines += _line("conversions", _counts(report.notes))
    if report.duplicates:
        lines += _line("duplicates", f"{report.duplicates:,} images have the bytes of an earlier one")
        lines += [f"      {example}" for example in report.duplicate_examples]
    lines += _problems({f"without {part}": problem for part, problem in report.missing.items()})
    lines += _line("bad samples", f"{report.n_bad:,}" if report.n_bad else "none")
    lines += _problems(report.bad)
    return lines


def _problems(problems: Mapping[str, Problem]) -> list[str]:
    lines = []
    for kind, problem in problems.items():
        lines += [f"    {kind}: {problem.count:,}"]
        lines += [f"      {example}" for example in problem.examples]
        if problem.count > len(problem.examples):
            lines += [f"      … and {problem.count - len(problem.examples):,} more"]
    return lines


def _classes(classes: Mapping[str, int]) -> str:
    counts = sorted(classes.values())
    middle = counts[len(counts) // 2] if counts else 0
    names = list(classes)
    text = f"{len(classes)}"
    if counts:
        text += f"; examples a class: {counts[0]:,} / {middle:,} / {counts[-1]:,} (least / median / most)"
    if counts and counts[0] != counts[-1]:
        text += f"; most: {_named(classes, names[:_CLASSES_SHOWN])}; least: {_named(classes, names[-_CLASSES_SHOWN:])}"
    return text


def _named(classes: Mapping[str, int], names: list[str]) -> str:
    return ", ".join(f"{name} {classes[name]:,}" for name in names)


def _line(what: str, text: str) -> list[str]:
    return [f"  {what:<16}{text}"] if text else []


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _spread(spread: Spread) -> str:
    return f"{spread.least:g} / {spread.median:g} / {spread.most:g}"


@contextmanager
def _progress(split: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A line with rate and time left on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"checking {split}", total=total)
        step = max(1, total // 1000)
        yield lambda done: bar.update(task, completed=done) if done % step == 0 or done == total else None
