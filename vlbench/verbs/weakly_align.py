"""``vlbench data weakly-align SPEC --pool POOL --out FILE``: mu-VLA's corpus for images that no sentence belongs to."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlbench.core.config import parse
from vlbench.core.errors import UserError

if TYPE_CHECKING:
    from vlbench.data.weak.corpus import Corpus

_EVERY_SECONDS = 10.0
_EXAMPLES = 3
_DEFAULT_POOL = "shapes:pairs"
_SETTINGS = ("k", "encoder", "chunker", "metric", "order", "exclude_own", "aligned", "min_link", "language", "seed")


def run(args: argparse.Namespace) -> int:
    """Make the corpus and print what it is like."""
    from vlbench.data.sources import open_source
    from vlbench.data.spec import parse_spec
    from vlbench.data.weak.align import AlignSettings, weakly_align
    from vlbench.data.weak.pools import read_pool

    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    settings = parse(AlignSettings, given, where="weakly-align")
    if args.labels is not None and args.features is None:
        raise UserError(f"--labels {args.labels}: labels are of region features; name these with --features FILE.tsv")
    pools = args.pool
    if not pools:
        if any(parse_spec(spec).kind != "shapes" for spec in args.spec):
            raise UserError("say where sentences come from: --pool FILE.txt, or --pool with a data spec")
        pools = [_DEFAULT_POOL]
    out = Path(args.out).expanduser()
    if out.is_dir():
        raise UserError(f"--out {out}: this is a folder; name a file in it")
    show = _Shown()
    sources = [open_source(spec, args.split) for spec in args.spec]
    sentences = read_pool(
        pools,
        seed=settings.seed,
        language=settings.language,
        progress=lambda done, total: show("reading the pool", done, total),
    )
    began = time.monotonic()
    corpus = weakly_align(
        sources,
        sentences,
        out=out,
        settings=settings,
        features=args.features,
        labels=args.labels,
        progress=show,
    )
    print("\n".join(summary_lines(corpus, pools, seconds=time.monotonic() - began)))
    return 0


def summary_lines(corpus: Corpus, pools: Sequence[str], *, seconds: float | None = None) -> list[str]:
    """What a corpus is like, as a person reads it."""
    made_of = corpus.made_of
    counts, settings = made_of["counts"], made_of["settings"]
    took = f", made in {seconds:,.0f} s" if seconds is not None else ""
    lines = [f"{corpus.path}: {counts['sentences']:,} sentences for {counts['images']:,} images{took}"]
    lines += _line("images from", " + ".join(made_of["data"]))
    lines += _line("tags from", " + ".join(made_of.get("features", ())))
    lines += _line("sentences from", " + ".join(pools))
    lines += _line("encoder", f"{made_of['encoder']}, {settings['metric']}, exact search by {made_of['search']}")
    lines += _line("noun phrases by", made_of["chunker"])
    lines += _line("pool", f"{counts['pool']:,} sentences; {counts['used']:,} used, {_percent(counts['coverage'])}")
    if counts["images_without"]:
        lines += _line("without any", f"{counts['images_without']:,} images")
    lines += _line("mean score", _number(counts["mean_score"]))
    lines += _line("own caption", _own(counts["own_found"], settings))
    linked = f"{_number(counts['links_per_sentence'])} a sentence; {_percent(counts['regions_linked'])} of the regions"
    lines += _line("links", linked)
    lines += _line("names 1st tag", _ranks(counts["names_first_tag"]))
    lines += _line("names any tag", _ranks(counts["names_any_tag"]))
    for kind, count in counts["unreadable"].items():
        lines += _line("left out", f"{count:,} images: {kind}")
    shown = (corpus.entry(row) for row in range(0, len(corpus), max(1, len(corpus) // _EXAMPLES)))
    for _, entry in zip(range(_EXAMPLES), shown):
        lines.append(f"  {entry.id}: {', '.join(entry.tags)}")
        for aligned in entry.aligned[:2]:
            links = "; ".join(f"{link.phrase} = {entry.tags[link.region]} {link.score:.2f}" for link in aligned.links)
            lines.append(f"      {aligned.score:.3f} {aligned.text}" + (f"  [{links}]" if links else ""))
    return lines


def _own(found: float | None, settings: dict[str, Any]) -> str:
    if found is None:
        return "not known: these images have no captions"
    why = ""
    if settings["aligned"] is not None:
        why = f" (put first for a share of {settings['aligned']:g}, else left out)"
    elif settings["exclude_own"]:
        why = " (left out)"
    return f"among the sentences of {_percent(found)} of the images that have captions{why}"


def _ranks(shares: Sequence[float | None]) -> str:
    shown = " ".join(_percent(share) for share in shares[:10] if share is not None)
    return f"{shown} of the sentences, by rank" if shown else ""


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _line(what: str, text: str) -> list[str]:
    return [f"  {what:<16}{text}"] if text else []


class _Shown:
    """A line on stderr now and then: what is being done, how much of it, and the time left."""

    def __init__(self) -> None:
        self._what = ""
        self._began = self._last = time.monotonic()
        self._first = 0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._began, self._first = what, now, done
            self._last = max(self._last, now - _EVERY_SECONDS / 2)
        if now - self._last < _EVERY_SECONDS:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        left = f", {(total - done) / rate:,.0f} s left" if rate > 0 else ""
        print(f"  {what}: {done:,} of {total:,}{left}", file=sys.stderr)
