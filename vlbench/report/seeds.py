"""Spread over seeds: a source of variance of its own, which no interval over examples contains."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from vlbench.core.types import ModelRef
from vlbench.report.columns import Column
from vlbench.report.page import Block, Table, Text, table_parts
from vlbench.report.tables import MISSING, percent


@dataclass(frozen=True)
class SeedGroup:
    """Rows that differ in their seed alone."""

    name: str
    labels: tuple[str, ...]
    seeds: tuple[int, ...]


def seed_groups(columns: Sequence[Column]) -> tuple[list[SeedGroup], list[str]]:
    """Groups of two or more seeds, and the labels left out because a seed occurs twice among otherwise equal models.

    Models belong together that agree in recipe, architecture, parameters, pretraining data, images seen, random or
    trained, and in their name once the seed is taken out of it (``unicl-tiny-s0`` and ``unicl-tiny-s1``).
    """
    models: dict[str, ModelRef] = {}
    for column in columns:
        models |= {label: result.model for label, result in column.results.items()}
    grouped: dict[tuple[object, ...], list[str]] = {}
    for label in sorted(models):
        model = models[label]
        if model.seed is not None:
            key = (model.recipe, model.arch, model.params, model.pretrain_data, model.images_seen, model.random)
            grouped.setdefault((*key, _stem(model)), []).append(label)
    groups, ambiguous = [], []
    for labels in grouped.values():
        seeds = [models[label].seed or 0 for label in labels]
        if len(set(seeds)) < len(seeds):
            ambiguous.extend(labels)
        elif len(seeds) > 1:
            first = models[labels[0]]
            name = _stem(first) or ", ".join(filter(None, [first.recipe, first.arch])) or first.name
            groups.append(SeedGroup(name + (" (random weights)" if first.random else ""), tuple(labels), tuple(seeds)))
    return sorted(groups, key=lambda group: (group.name, group.labels)), sorted(ambiguous)


def seed_blocks(columns: Sequence[Column]) -> list[Block]:
    """Mean, spread and count over seeds beside what the examples alone leave open; nothing where no two seeds are."""
    groups, ambiguous = seed_groups(columns)
    tables: list[Block] = []
    for part in table_parts(len(columns)):
        rows = []
        for group in groups:
            cells = [_seed_cell(columns[i], group) for i in part]
            if any(text != MISSING for text in cells):
                rows.append((group.name, ", ".join(str(seed) for seed in sorted(group.seeds)), *cells))
        if rows:
            header = ("Over seeds", "Seeds", *(columns[i].title for i in part))
            tables.append(Table(header, tuple(rows), left=2))
    if not tables:
        return []
    note = (
        "Mean over seeds ± standard deviation between seeds (number of seeds); after the semicolon the median "
        "half-width of one seed's 95% interval over examples. The deviation is what another training run changes."
    )
    if ambiguous:
        note += f" Left out, since a seed occurs twice among otherwise equal models: {', '.join(ambiguous)}."
    return [*tables, Text(note)]


def _seed_cell(column: Column, group: SeedGroup) -> str:
    results = [column.results[label] for label in group.labels if label in column.results]
    if len(results) < 2:
        return MISSING
    estimates = [result.estimates[result.metric] for result in results]
    values = [estimate.value for estimate in estimates]
    half = statistics.median((estimate.hi - estimate.lo) / 2 for estimate in estimates)
    spread = statistics.stdev(values)
    return f"{percent(statistics.fmean(values))} ± {percent(spread)} ({len(values)}); ±{percent(half)}"


def _stem(model: ModelRef) -> str:
    """The name with its seed taken out, or nothing where the name does not carry it."""
    pattern = rf"(?<![A-Za-z0-9])(s|seed|seed-|seed_|random:){model.seed}(?![0-9])"
    stem, found = re.subn(pattern, r"\1*", model.name)
    return stem if found else ""
