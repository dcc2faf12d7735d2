from __future__ import annotations

from pathlib import Path

import pytest

from vlbench.core.files import atomic_writer, write_text
from vlbench.core.fingerprint import canonical_json, digest, digest_all, fingerprint


def test_atomic_writer_leaves_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_text(path, "old")

    def fail() -> None:
        with atomic_writer(path) as handle:
            handle.write(b"half of the n")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_fingerprint_ignores_key_order_and_refuses_nan() -> None:
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json({"a": float("nan")})


def test_digest_all_ignores_order_and_counts_repeats() -> None:
    one, two = digest(b"1"), digest(b"2")
    assert digest_all([one, two]) == digest_all([two, one])
    assert digest_all([one, two]) != digest_all([one, two, two])
