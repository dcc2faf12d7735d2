"""The second pass: which rule removes which sample of a shard, the shard without them, and its part of the report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vlbench.core.errors import BadExample
from vlbench.core.files import write_text
from vlbench.data.filters.job import Job
from vlbench.data.filters.near import load_names, load_neighbours
from vlbench.data.filters.scan import Samples
from vlbench.data.filters.settings import PHASH, Rule
from vlbench.data.filters.shards import copy_kept, open_shard, printable, read_pair
from vlbench.data.filters.words import ngrams, words
from vlbench.data.readers.tarindex import TarIndex

EXAMPLES = 3
"""Samples that the report shows of each rule."""
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Counted:
    """What is known once all shards are counted."""

    parts: Mapping[str, int]
    """Table → into how many ranges its keys were cut."""
    floor: int
    """The fewest occurrences of an n-gram that is among the most frequent."""


def judge_shard(job: Job, number: int, counted: Counted) -> None:
    """Write one shard without what the rules remove, then its part of the report, unless that is there."""
    if job.judged(number).is_file():
        return
    verdict = _Verdict(job, number, counted)
    index = open_shard(job.shards[number], allow_truncated=job.config.allow_truncated)
    first_N = verdict.first_rules()
    # Written in the state folder first: a killed call then leaves nothing strange among the shards.
    passing = job.state / "out" / f"{number:06}.tar"
    copy_kept(index, first_N < 0, passing)
    final = job.target / job.shards[number].name
    final.parent.mkdir(parents=True, exist_ok=True)
    passing.replace(final)
    part, removed = _account(verdict, index, first_N)
    if job.removed is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in removed]
        write_text(job.removed_part(number), "".join(lines))
    write_text(job.judged(number), json.dumps(part, ensure_ascii=False))  # last: the mark that the shard is done


class _Verdict:
    """Every rule's own mind about every sample of one shard."""

    def __init__(self, job: Job, number: int, counted: Counted) -> None:
        self.job = job
        self.name = job.shards[number].name
        self.samples = samples = Samples.load(job.scanned(number))
        self.counted = counted
        config = job.config
        usable_N = samples.usable_N
        width_N, height_N = samples.side_N2.astype(np.int64).T
        short_N, long_N = np.minimum(width_N, height_N), np.maximum(width_N, height_N)
        found: dict[Rule, np.ndarray] = {rule: self._with_problem(rule) for rule in ("unreadable", "incomplete")}
        found["small"] = usable_N & (short_N <= config.min_side)
        found["aspect"] = usable_N & (long_N >= config.max_aspect * short_N)
        found["length"] = usable_N & ((samples.words_N < config.min_words) | (samples.words_N > config.max_words))
        if "images" in job.tables:
            found["many-texts"] = usable_N & (self._totals("images", number, samples.image_N) > config.max_texts)
        if "texts" in job.tables:
            found["shared-text"] = usable_N & (self._totals("texts", number, samples.text_N) > config.max_images)
        if "ngrams" in job.tables:
            self.ngram_totals_K = job.tables["ngrams"].totals(number, counted.parts["ngrams"])
            rare_G = self.ngram_totals_K[samples.ngram_G] < counted.floor
            before_G = np.concatenate(([0], np.cumsum(rare_G)))
            found["rare-ngram"] = usable_N & (np.diff(before_G[samples.ngram_starts]) > 0)
        if config.uses("near-duplicate"):
            self.neighbour_N, self.nearness_N = load_neighbours(job, number)
            found["near-duplicate"] = usable_N & (self.neighbour_N >= 0)
        self.rules = config.rules
        self.removed_RN = np.stack([found[rule] for rule in self.rules])

    @cached_property
    def _names(self) -> Sequence[str]:
        return load_names(self.job)

    def first_rules(self) -> np.ndarray:
        """``first_N``: the number of the first rule that removes each sample, -1 for what is kept."""
        return np.where(self.removed_RN.any(axis=0), self.removed_RN.argmax(axis=0), -1)

    def why(self, row: int, rule: Rule, text: str) -> str:
        """What was found about one sample that ``rule`` removes, in a few words."""
        config, samples = self.job.config, self.samples
        if row in samples.problems:
            _, kind, reason = samples.problems[row]
            return f"{kind}: {reason}"
        if rule in ("small", "aspect"):
            return "{} x {} px".format(*samples.side_N2[row])
        if rule == "length":
            return _counted(int(samples.words_N[row]), "word")
        if rule == "many-texts":
            return f"image with more than {config.max_texts:,} texts"
        if rule == "shared-text":
            return f"text of more than {config.max_images:,} images"
        if rule == "near-duplicate":
            near = self.nearness_N[row]
            how = f"{int(near)} bits apart" if config.near_duplicates == PHASH else f"cosine {near:.3f}"
            return f"{self._names[self.neighbour_N[row]]}, {how}"
        assert rule == "rare-ngram", f"a rule without words: {rule}"
        span = slice(*samples.ngram_starts[row : row + 2])
        totals = self.ngram_totals_K[samples.ngram_G[span]]
        rarest = int(totals.argmin())
        return f"{ngrams(words(text))[rarest]!r} occurs {_counted(int(totals[rarest]), 'time')}"

    def _with_problem(self, rule: Rule) -> np.ndarray:
        found_N = np.zeros(len(self.samples), dtype=bool)
        found_N[[row for row, (of, _, _) in self.samples.problems.items() if of == rule]] = True
        return found_N

    def _totals(self, table: str, number: int, key_N: np.ndarray) -> np.ndarray:
        """Of each sample, the total of its key; 0 where it is not usable."""
        usable_N = self.samples.usable_N
        total_N = np.zeros(len(key_N), dtype=np.int64)
        totals_K = self.job.tables[table].totals(number, self.counted.parts[table])
        # The shard's own keys, sorted: the order that totals come in.
        total_N[usable_N] = totals_K[np.unique(key_N[usable_N], return_inverse=True)[1]]
        return total_N


def _account(verdict: _Verdict, index: TarIndex, first_N: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The shard's part of the report, and a row of each removed sample where these are listed."""
    rules, listed = verdict.rules, verdict.job.removed is not None
    examples: dict[str, list[dict[str, str]]] = {rule: [] for rule in rules}
    kinds: dict[str, Counter[str]] = {rule: Counter() for rule in rules}
    removed = []
    for row in np.flatnonzero(first_N >= 0).tolist():
        rule = rules[first_N[row]]
        if row in verdict.samples.problems:
            kinds[rule][verdict.samples.problems[row][1]] += 1
        if not listed and len(examples[rule]) == EXAMPLES:
            continue
        key, text = printable(index.keys[row]), _text(index, row)
        why = verdict.why(row, rule, text)
        if len(examples[rule]) < EXAMPLES:
            shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
            examples[rule].append({"sample": f"{verdict.name}/{key}", "why": why, "text": shown})
        if listed:
            also = [name for name, found_N in zip(rules, verdict.removed_RN) if found_N[row]]
            place = {"shard": verdict.name, "key": key}
            removed.append({**place, "rule": rule, "rules": also, "why": why, "text": text})
    part = {
        "samples": len(first_N),
        "removed": {rule: int((first_N == place).sum()) for place, rule in enumerate(rules)},
        "alone": {rule: int(found_N.sum()) for rule, found_N in zip(rules, verdict.removed_RN)},
        "kinds": {rule: dict(sorted(counts.items())) for rule, counts in kinds.items()},
        "examples": examples,
        "damage": verdict.samples.damage,
    }
    return part, removed


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _text(index: TarIndex, row: int) -> str:
    """The sample's text, or ``""`` where it cannot be read."""
    try:
        return printable(read_pair(index, row).text or "")
    except BadExample:
        return ""
