"""``vlbench data regions SPEC --out DIR``: the regions of images, as mu-VLA's own mode reads them."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from vlbench.core.config import tree
from vlbench.core.errors import UserError
from vlbench.verbs.machine import choose_device, choose_workers
from vlbench.verbs.progress import EncodingProgress

if TYPE_CHECKING:
    from vlbench.data.regions.detector import TorchvisionDetector
    from vlbench.data.regions.extract import Extracted

_SHOWN = 3
_CORPUS = "weak.arrow"


def run(args: argparse.Namespace) -> int:
    """Find the regions that are not there yet, and say how many there are."""
    from vlbench.data.regions.detector import TorchvisionDetector
    from vlbench.data.regions.extract import extract
    from vlbench.data.sources import open_source

    _check(args)
    workers = choose_workers(args.workers)
    sources = [open_source(spec, args.split) for spec in args.spec]
    for source in sources:
        if "image" not in source.provides:
            raise UserError(f"data {source.spec!r} has no images to find regions in")
    detector = TorchvisionDetector(
        args.detector,
        weights=args.weights,
        max_regions=args.max_regions,
        min_score=args.min_score,
        device=choose_device(args.device),
        seed=args.seed,
        **{key: getattr(args, key) for key in ("min_size", "max_size") if getattr(args, key) is not None},
    )
    out, began, progress = Path(args.out).expanduser(), time.monotonic(), EncodingProgress("finding regions in")
    try:
        done = extract(sources, detector, out, batch_size=args.batch_size, workers=workers, progress=progress)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written: {error.strerror or error}") from None
    finally:
        progress.close()
    if not done.written + done.kept:
        raise UserError(f"not one image could be read: {done.bad.summary()}")
    seconds = time.monotonic() - began
    print("\n".join(summary_lines(out, args.spec, detector, done, seconds=seconds, split=args.split)))
    return 0


def summary_lines(
    out: Path,
    specs: list[str],
    detector: TorchvisionDetector,
    done: Extracted,
    *,
    seconds: float,
    split: str | None = None,
) -> list[str]:
    """What was found, as a person reads it, and what to do with it.

    The commands run as they are printed, but for SENTENCES, which is the reader's file. The paper's start, BERT's
    weights, is another such file and can be done without: a vocabulary is learnt instead.
    """
    made_by = detector.identity
    lines = [f"{out}: regions of {done.written + done.kept:,} images, {done.written:,} made in {seconds:,.0f} s"]
    lines += _line("images from", " + ".join(specs))
    lines += _line("detector", f"{made_by['detector']}, weights {made_by['weights']}")
    if done.kept:
        lines += _line("kept", f"{done.kept:,} images that were there before")
    if done.written:
        lines += _line("regions", f"{done.regions:,}; {done.regions / done.written:.1f} an image")
    if done.empty:
        lines += _line("without any", f"{done.empty:,} images")
    for kind, wheres in sorted(done.bad.seen.items()):
        more = ", …" if len(wheres) > _SHOWN else ""
        lines += _line("left out", f"{len(wheres):,} images: {kind}: {', '.join(list(wheres)[:_SHOWN])}{more}")
    if str(made_by["weights"]).startswith("random"):
        lines.append("note: the detector's weights are random: these regions say nothing of the images")
    corpus = ["data", "weakly-align", *specs, *(("--split", split) if split else ()), "--features", str(out)]
    lines.append(f"next: {shlex.join(['vlbench', *corpus, '--pool', 'SENTENCES', '--out', _CORPUS])}")
    training = ["vlbench", "pretrain", "muvla", "--preset", "paper"]
    training += [word for spec in specs for word in ("--data", spec)]
    settings = (f"corpus={_CORPUS}", f"features={_as_value(out)}", f"feature_width={detector.width}", "bert=null")
    training += [word for setting in settings for word in ("--set", setting)]
    lines.append(f"then: {shlex.join(training)}")
    lines.append("      (bert=null starts from nothing; bert=FOLDER, of bert-base-uncased's files, as the paper does)")
    return lines


def _as_value(path: Path) -> str:
    """``path`` as ``--set`` reads it back: ``2024`` would be a number there, ``[a]`` a list."""
    ways = (str(path), json.dumps(str(path)), f"./{path}")
    return next(text for text in ways if isinstance(read := tree([f"x={text}"])["x"], str) and Path(read) == path)


def _line(what: str, text: str) -> list[str]:
    return [f"  {what:<16}{text}"]


def _check(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be."""
    for name in ("max_regions", "min_size", "max_size", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: at least 1")
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers {args.workers}: 0 or more")
    if not 0 <= args.min_score <= 1:
        raise UserError(f"--min-score {args.min_score:g}: from 0 to 1")
