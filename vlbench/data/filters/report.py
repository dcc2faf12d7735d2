"""What a run has done, added up over its shards: ``report.json``, and the list of what was removed.

Nothing in it depends on time, on the number of processes or on how often the run was killed.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from vlbench.core.files import atomic_writer, write_text
from vlbench.core.fingerprint import fingerprint
from vlbench.data.filters.job import REPORT, Job
from vlbench.data.filters.verdict import EXAMPLES, Counted

REPORT_VERSION = 1


def write_report(job: Job, counted: Counted) -> dict[str, Any]:
    """Add up the shards' parts, write ``report.json`` and return what is in it."""
    rules = job.config.rules
    removed: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    kinds: dict[str, Counter[str]] = {rule: Counter() for rule in rules}
    examples: dict[str, list[dict[str, str]]] = {rule: [] for rule in rules}
    samples, damaged = 0, {}
    for number, shard in enumerate(job.shards):
        part = json.loads(job.judged(number).read_text(encoding="utf-8"))
        samples += part["samples"]
        removed.update(part["removed"])
        alone.update(part["alone"])
        for rule in rules:
            kinds[rule].update(part["kinds"][rule])
            examples[rule] = (examples[rule] + part["examples"][rule])[:EXAMPLES]
        if part["damage"]:
            damaged[shard.name] = part["damage"]
    kept = samples - removed.total()
    description = job.description()
    report = {
        "version": REPORT_VERSION,
        "call": job.fingerprint,
        "source": {
            "spec": job.spec,
            "shards": len(job.shards),
            "sizes": fingerprint({name: size for name, (size, _) in description["shards"].items()}),
            "damaged": damaged,
        },
        "settings": description["settings"],
        "against": description["against"],
        "samples": samples,
        "kept": kept,
        "share_kept": kept / samples if samples else None,
        "ngrams": _ngrams(job, counted),
        "rules": {
            rule: {
                "removes": job.config.removes(rule),
                "removed": removed[rule],
                "alone": alone[rule],
                "kinds": dict(sorted(kinds[rule].items())),
                "examples": examples[rule],
            }
            for rule in rules
        },
    }
    write_text(job.target / REPORT, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def write_removed(job: Job) -> Path | None:
    """Join the shards' lists of removed samples, in the form that was asked for; None where none was."""
    if job.removed is None:
        return None
    path = job.target / f"removed.{job.removed}"
    with atomic_writer(path) as out:
        if job.removed == "jsonl":
            for number in range(len(job.shards)):
                out.write(job.removed_part(number).read_bytes())
            return path
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema(
            [(name, pa.string()) for name in ("shard", "key", "rule")]
            + [("rules", pa.list_(pa.string())), ("why", pa.string()), ("text", pa.string())]
        )
        with pq.ParquetWriter(out, schema, compression="zstd") as writer:
            for number in range(len(job.shards)):
                lines = job.removed_part(number).read_bytes().splitlines()
                if lines:
                    writer.write_table(pa.Table.from_pylist([json.loads(line) for line in lines], schema=schema))
    return path


def _ngrams(job: Job, counted: Counted) -> dict[str, int] | None:
    if "ngrams" not in job.tables:
        return None
    histogram = job.tables["ngrams"].histogram(counted.parts["ngrams"])
    kept = sum(size for occurrences, size in histogram.items() if occurrences >= counted.floor)
    return {"different": sum(histogram.values()), "kept": kept, "least_occurrences": counted.floor}
