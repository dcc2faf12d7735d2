from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import digest
from vlbench.store import features
from vlbench.store.features import FeatureStore, FeatureTable


def names(count: int, prefix: str = "image") -> list[str]:
    return [digest(f"{prefix} {i}".encode()) for i in range(count)]


def vectors(digests: list[str], width: int = 3) -> np.ndarray:
    """A feature that can be told from its digest."""
    return np.array([[int(d[:6], 16) + k for k in range(width)] for d in digests], dtype=np.float32)


@pytest.fixture
def table(tmp_path: Path) -> FeatureTable:
    return FeatureStore(tmp_path).table("key")


def test_gather_returns_the_order_asked(table: FeatureTable) -> None:
    digests = names(50)
    for start in range(0, 50, 7):
        part = digests[start : start + 7]
        table.append(part, {"pooled": vectors(part), "embed": vectors(part, 2)})
    order = np.random.default_rng(0).integers(0, 50, 120)
    asked = [digests[i] for i in order]
    found = table.gather(asked, ["embed", "pooled"])
    assert found["pooled"].dtype == np.float32
    assert np.array_equal(found["pooled"], vectors(asked))
    assert np.array_equal(found["embed"], vectors(asked, 2))
    assert table.columns == {"pooled": 3, "embed": 2}


def test_missing_names_each_absent_digest_once_in_order(table: FeatureTable) -> None:
    digests = names(6)
    assert table.missing([digests[3], digests[1], digests[3]]) == [digests[3], digests[1]]
    table.append(digests[:3], {"pooled": vectors(digests[:3])})
    assert table.missing([digests[5], digests[0], digests[4], digests[5]]) == [digests[5], digests[4]]
    assert table.missing([]) == []


def test_missing_counts_a_lacking_column(table: FeatureTable) -> None:
    digests = names(4)
    table.append(digests[:2], {"pooled": vectors(digests[:2]), "embed": vectors(digests[:2])})
    table.append(digests[2:], {"pooled": vectors(digests[2:])})
    assert table.missing(digests, ["pooled"]) == []
    assert table.missing(digests, ["embed"]) == digests[2:]
    assert table.missing(digests) == digests[2:]
    assert table.missing(digests, ["tokens"]) == digests


def test_gather_of_an_absent_digest_is_an_error(table: FeatureTable) -> None:
    digests = names(3)
    table.append(digests[:1], {"pooled": vectors(digests[:1])})
    with pytest.raises(UserError, match="2 of 3 asked features"):
        table.gather(digests, ["pooled"])
    with pytest.raises(UserError, match="2 of 2"):
        table.gather(digests[1:], ["pooled"])


def test_table_is_found_again_by_its_key_alone(tmp_path: Path) -> None:
    digests = names(5)
    FeatureStore(tmp_path).table("a", {"weights": "1234"}).append(digests, {"pooled": vectors(digests)})
    assert FeatureStore(tmp_path).table("a").missing(digests) == []
    assert FeatureStore(tmp_path).table("b").missing(digests) == digests
    assert (tmp_path / "a" / "meta.json").read_text() == '{"weights":"1234"}\n'


def test_a_shard_of_another_table_object_is_seen(tmp_path: Path) -> None:
    mine, theirs = FeatureStore(tmp_path).table("a"), FeatureStore(tmp_path).table("a")
    digests = names(4)
    assert mine.missing(digests) == digests
    theirs.append(digests, {"pooled": vectors(digests)})
    assert mine.missing(digests) == []


def test_default_root_is_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path))
    assert FeatureStore().root == tmp_path / "features"
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_append_refuses_features_that_are_not_finite(table: FeatureTable, bad: float) -> None:
    digests = names(4)
    values = vectors(digests)
    values[2, 1] = bad
    with pytest.raises(UserError, match=rf"1 of 4 inputs are NaN or infinite \(first: digest {digests[2]}"):
        table.append(digests, {"pooled": values})
    assert table.missing(digests) == digests


def test_append_of_nothing_writes_nothing(table: FeatureTable) -> None:
    table.append([], {"pooled": np.zeros((0, 3))})
    assert not table.folder.exists()


def test_append_refuses_another_width(table: FeatureTable) -> None:
    digests = names(4)
    table.append(digests[:2], {"pooled": vectors(digests[:2])})
    with pytest.raises(AssertionError, match="width 2"):
        table.append(digests[2:], {"pooled": vectors(digests[2:], 2)})


def test_gather_opens_only_the_shards_it_needs(table: FeatureTable, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = names(40)
    for start in range(0, 40, 10):
        table.append(digests[start : start + 10], {"pooled": vectors(digests[start : start + 10])})
    opened: list[Path] = []
    read = features._read_array
    monkeypatch.setattr(features, "_read_array", lambda path, name: opened.append(path) or read(path, name))
    table.missing(digests[10:15], ["pooled"])
    assert len(set(opened)) == 1
    opened.clear()
    table.gather(digests[12:25], ["pooled"])
    assert len(set(opened)) == 2


# ---------------------------------------------------------------------------------------------- damage and kills


def only_shard(table: FeatureTable) -> Path:
    (path,) = table.folder.glob("shard-*.npz")
    return path


def test_a_damaged_shard_is_said_and_not_used(table: FeatureTable, caplog: pytest.LogCaptureFixture) -> None:
    digests = names(20)
    table.append(digests[:10], {"pooled": vectors(digests[:10])})
    path = only_shard(table)
    table.append(digests[10:], {"pooled": vectors(digests[10:])})
    data = bytearray(path.read_bytes())
    where = data.index(vectors(digests[4:5]).tobytes())
    data[where] ^= 1
    path.write_bytes(data)
    fresh = FeatureTable(table.folder)
    with caplog.at_level(logging.WARNING):
        assert fresh.missing(digests, ["pooled"]) == digests[:10]
    assert len(fresh.damaged) == 1
    assert str(path) in fresh.damaged[0]
    assert "damaged" in caplog.text
    fresh.append(digests[:10], {"pooled": vectors(digests[:10])})
    assert np.array_equal(fresh.gather(digests, ["pooled"])["pooled"], vectors(digests))


def test_a_digest_in_a_damaged_shard_is_taken_from_another(table: FeatureTable) -> None:
    digests = names(5)
    for _ in range(3):
        table.append(digests, {"pooled": vectors(digests)})
    for path in sorted(table.folder.glob("shard-*.npz"))[:2]:
        path.write_bytes(path.read_bytes()[:-200] + bytes(200))
    fresh = FeatureTable(table.folder)
    assert fresh.missing(digests) == []
    assert np.array_equal(fresh.gather(digests, ["pooled"])["pooled"], vectors(digests))
    assert len(fresh.damaged) == 2


def test_every_flipped_byte_and_every_cut_is_noticed_or_harmless(tmp_path: Path) -> None:
    digests = names(4)
    table = FeatureTable(tmp_path / "good")
    table.append(digests, {"pooled": vectors(digests)})
    good = only_shard(table).read_bytes()
    logging.getLogger(features.__name__).setLevel(logging.ERROR)
    noticed = 0
    folder = tmp_path / "bad"
    folder.mkdir()
    versions = [
        good[:position] + bytes([good[position] ^ 0x15]) + good[position + 1 :] for position in range(len(good))
    ]
    versions += [good[:length] for length in range(0, len(good), 9)]
    for version in versions:
        (folder / "shard-0.npz").write_bytes(version)
        again = FeatureTable(folder)
        if again.missing(digests, ["pooled"]):
            noticed += 1
        else:
            assert np.array_equal(again.gather(digests, ["pooled"])["pooled"], vectors(digests))
    logging.getLogger(features.__name__).setLevel(logging.NOTSET)
    print(f"{noticed} of {len(versions)} damaged shards noticed, the others harmless")
    assert noticed > 0.5 * len(versions)


def test_no_pickle_is_ever_loaded(table: FeatureTable, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    table.folder.mkdir(parents=True)
    np.savez(table.folder / "shard-evil.npz", digests=np.array([Bomb()], dtype=object))
    assert table.missing(names(1)) == names(1)
    assert len(table.damaged) == 1
    assert not (tmp_path / "exploded").exists()


WRITER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.store.test_features import names, vectors
from vlbench.store.features import FeatureTable
table = FeatureTable(Path(sys.argv[1]))
digests = names(int(sys.argv[3]), sys.argv[2])
size = int(sys.argv[4])
for start in range(0, len(digests), size):
    if start == size:
        print("ready", flush=True)
    part = digests[start:start + size]
    table.append(part, {{"pooled": vectors(part, 64)}})
"""


def start_writer(folder: Path, prefix: str, count: int, size: int) -> subprocess.Popen[bytes]:
    code = WRITER.format(root=str(Path(__file__).parents[2]))
    words = [sys.executable, "-c", code, str(folder), prefix, str(count), str(size)]
    return subprocess.Popen(words, stdout=subprocess.PIPE)


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    writers = [start_writer(folder, prefix, 200, 5) for prefix in ("one", "two", "one")]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    digests = names(200, "one") + names(200, "two")
    table = FeatureTable(folder)
    assert table.missing(digests) == []
    assert np.array_equal(table.gather(digests, ["pooled"])["pooled"], vectors(digests, 64))
    assert not table.damaged


def test_a_killed_writer_leaves_only_whole_shards(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    digests = names(100_000, "killed")
    for delay in (0.02, 0.11, 0.25):
        writer = start_writer(folder, "killed", len(digests), 1000)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
        writer.wait(60)
        table = FeatureTable(folder)
        missing = set(table.missing(digests))
        kept = [d for d in digests if d not in missing]
        assert len(kept) % 1000 == 0
        assert not table.damaged
        assert np.array_equal(table.gather(kept, ["pooled"])["pooled"], vectors(kept, 64)) if kept else True
    assert kept


def test_leftovers_of_a_killed_writer_are_ignored(table: FeatureTable) -> None:
    digests = names(3)
    table.append(digests, {"pooled": vectors(digests)})
    (table.folder / ".shard-dead.npz.x1.tmp").write_bytes(only_shard(table).read_bytes()[:100])
    fresh = FeatureTable(table.folder)
    assert fresh.missing(digests) == []
    assert not fresh.damaged


def test_shards_are_plain_npz_that_numpy_reads(table: FeatureTable) -> None:
    digests = names(3)
    table.append(digests, {"pooled": vectors(digests)})
    assert zipfile.is_zipfile(only_shard(table))
    with np.load(only_shard(table), allow_pickle=False) as shard:
        assert np.array_equal(shard["pooled"], vectors(digests))
