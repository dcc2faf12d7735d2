"""``vlbench data filter SRC DST``: ALIGN's filters over webdataset shards, with a report of what they removed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlbench.core.config import parse
from vlbench.core.errors import UserError
from vlbench.core.types import Example, Part
from vlbench.data.filters import near
from vlbench.data.filters.job import REPORT, Job
from vlbench.data.filters.run import Neighbours, run_filter
from vlbench.data.filters.scan import Samples
from vlbench.data.filters.settings import PHASH, FilterConfig
from vlbench.data.filters.shards import open_shard, read_pair, source_shards
from vlbench.data.sources import BaseSource
from vlbench.verbs.machine import choose_device, choose_workers
from vlbench.verbs.progress import EVERY_SECONDS

if TYPE_CHECKING:
    from vlbench.adapters.encoder import Encoder
    from vlbench.core.types import Source
    from vlbench.data.readers.tarindex import TarIndex

_SETTINGS = tuple(FilterConfig.model_fields)
_BLOCK = 1 << 16
"""Evaluation images compared with a shard's at once."""


def run(args: argparse.Namespace) -> int:
    """Filter, and print the report."""
    given = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    config = parse(FilterConfig, given, where="vlbench data filter")
    if args.memory < 1:
        raise UserError(f"--memory {args.memory}: at least 1 MiB; 512 serves most")
    workers = choose_workers(args.workers)
    if workers < 1:
        raise UserError(f"--workers {workers}: at least 1")
    near_by_model = config.uses("near-duplicate") and config.near_duplicates != PHASH
    job = Job(
        spec=args.src,
        shards=source_shards(args.src),
        target=Path(args.dst).expanduser(),
        config=config,
        memory=args.memory << 20,
        removed=args.list_removed,
        against=tuple(near.evaluation_set(spec) for spec in config.against) if config.uses("near-duplicate") else (),
    )
    report = run_filter(
        job,
        workers=workers,
        keep_state=args.keep_state,
        progress=_Progress(),
        # Loaded now, so that a misspelt name is known before the shards are read.
        neighbours=_by_model(config.near_duplicates, args) if near_by_model else None,
    )
    print("\n".join(report_lines(report)))
    print(f"\nthe kept samples: wds:{job.target}; the report: {job.target / REPORT}")
    return 0


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report as a person reads it: how much is kept, what each rule removed, examples of each."""
    samples, source = report["samples"], report["source"]
    share = f" ({report['kept'] / samples:.1%})" if samples else ""
    lines = [f"{source['spec']}: {samples:,} samples in {source['shards']:,} shards, {report['kept']:,} kept{share}"]
    for each in report["against"]:
        lines += [f"compared with {each['spec']}, split {each['split']}: {each['size']:,} images"]
    if report["ngrams"] is not None:
        counts = report["ngrams"]
        lines.append(
            f"{counts['different']:,} different words and pairs of words; the {counts['kept']:,} that occur at least "
            f"{counts['least_occurrences']:,} time{'s' * (counts['least_occurrences'] != 1)} count as frequent"
        )
    lines += [f"damaged: {name}: {damage}" for name, damage in source["damaged"].items()]
    lines += ["", f"{'rule':<16}{'removed':>12}{'alone':>12}   what it removes"]
    for rule, found in report["rules"].items():
        lines += [f"{rule:<16}{found['removed']:>12,}{found['alone']:>12,}   {found['removes']}"]
        lines += [f"{f'  {kind}':<16}{count:>12,}" for kind, count in found["kinds"].items()]
    lines += ["removed: charged to the first rule that removes a sample; alone: what the rule would remove by itself"]
    shown = {rule: found["examples"] for rule, found in report["rules"].items() if found["examples"]}
    for rule, examples in shown.items():
        lines += ["", f"{rule}, for instance"]
        lines += [
            f"  {each['sample']}: {each['why']}" + f"; {each['text']!r}" * bool(each["text"]) for each in examples
        ]
    return lines


class _Progress:
    """A plain line for each step as it ends, and now and then before. On stderr, so that the report can be piped."""

    def __init__(self) -> None:
        self._what = ""
        self._last = self._began = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._last, self._began = what, now, now
        if done < total and now - self._last < EVERY_SECONDS:
            return
        self._last = now
        left = (now - self._began) / done * (total - done)
        rest = f", {left:,.0f} s left" if done < total else ""
        print(f"  {what}: {done:,} of {total:,}{rest}", file=sys.stderr)


def _by_model(spec: str, args: argparse.Namespace) -> Neighbours:
    """Near-duplicates by the cosine of a model's pooled features."""
    from vlbench.adapters.encoder import Encoder
    from vlbench.models.load import load_backbone

    device = choose_device(args.device)
    backbone = load_backbone(spec, device=device)

    def encoder() -> Encoder:
        # A new one for each source: it keeps the features of all that it has seen.
        return Encoder(backbone, None, batch_size=args.batch_size, device=device, workers=choose_workers(args.workers))

    def find(job: Job, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        wanted_ME = np.concatenate([_unit(encoder(), near.open_set(each)) for each in job.against])
        for number in numbers:
            usable = np.flatnonzero(Samples.load(job.scanned(number)).usable_N)
            index = open_shard(job.shards[number], allow_truncated=job.config.allow_truncated)
            index_N, cosine_N = np.full(len(index), -1), np.zeros(len(index))
            if len(usable):
                own_QE = _unit(encoder(), _ShardImages(index, usable.tolist()))
                best_Q, cosine_Q = nearest(own_QE, wanted_ME, device=device)
                index_N[usable] = np.where(cosine_Q > job.config.min_cosine, best_Q, -1)
                cosine_N[usable] = cosine_Q
            near.save_neighbours(job, number, index_N, cosine_N)

    return find


def nearest(query_QE: np.ndarray, wanted_ME: np.ndarray, *, device: str) -> tuple[np.ndarray, np.ndarray]:
    """``(index_Q, cosine_Q)``: of each unit vector the nearest of ``wanted_ME``, all compared, the first of equals."""
    import torch

    queries_QE = torch.as_tensor(query_QE, device=device)
    best_Q = torch.zeros(len(query_QE), dtype=torch.int64, device=device)
    cosine_Q = torch.full((len(query_QE),), -2.0, device=device)
    for start in range(0, len(wanted_ME), _BLOCK):
        found_Q, place_Q = (queries_QE @ torch.as_tensor(wanted_ME[start : start + _BLOCK], device=device).T).max(dim=1)
        better_Q = found_Q > cosine_Q
        best_Q = torch.where(better_Q, place_Q + start, best_Q)
        cosine_Q = torch.where(better_Q, found_Q, cosine_Q)
    return best_Q.cpu().numpy(), cosine_Q.cpu().numpy()


def _unit(encoder: Encoder, source: Source) -> np.ndarray:
    """Pooled features of a source's images, of length one."""
    pooled_ND = encoder.images(source).pooled_ND
    unit_ND: np.ndarray = pooled_ND / np.maximum(np.linalg.norm(pooled_ND, axis=1, keepdims=True), 1e-12)
    return unit_ND


class _ShardImages(BaseSource):
    """Some images of one shard, as an encoder reads them."""

    def __init__(self, index: TarIndex, rows: Sequence[int]) -> None:
        parts: set[Part] = {"image"}
        super().__init__(index.path, None, provides=parts)
        self._index, self._rows = index, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Example:
        row = self._rows[index]
        return Example(id=self._index.keys[row], image=read_pair(self._index, row).image)

    def ids(self) -> Sequence[str]:
        """The samples' keys."""
        return [self._index.keys[row] for row in self._rows]

    def labels(self) -> None:
        """None: pairs have no labels."""
        return
