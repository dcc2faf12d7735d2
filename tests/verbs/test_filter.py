"""``vlbench data filter`` as it is called."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.data.filters.planting import (
    OPTIONS,
    Planted,
    evaluation_images,
    flat_image,
    members_of,
    plant,
    smooth_image,
    tree,
)
from tests.data.filters.test_run import die_at_rename, in_a_process
from tests.data.making import encoded, write_files, write_tar
from vlbench.cli import main
from vlbench.data.filters.settings import RULES
from vlbench.data.sources import open_source
from vlbench.verbs.filter import nearest

SHARDS = 5


@pytest.fixture(scope="module")
def planted() -> Planted:
    planted = plant(5000 - 331)
    assert len(planted.samples) == 5000
    return planted


@pytest.fixture(scope="module")
def places(planted, tmp_path_factory) -> tuple[Path, str]:
    """The dirty shards, and the spec of the test set."""
    folder = tmp_path_factory.mktemp("dirty")
    return planted.write(folder / "src", SHARDS), evaluation_images(folder / "evaluation")


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> tuple[Planted, Path]:
    """A small dirty set, for what does not need many."""
    planted = plant(100)
    return planted, planted.write(tmp_path_factory.mktemp("few"), 3)


def call(source: object, target: object, *words: str) -> int:
    return main(["data", "filter", f"wds:{source}", str(target), *map(str, words)])


def rows_of(target: Path) -> list[dict]:
    return [json.loads(line) for line in (target / "removed.jsonl").read_text().splitlines()]


def test_exactly_what_was_planted_is_removed_each_under_its_rule(planted, places, tmp_path, capsys):
    source, against = places
    target = tmp_path / "out"
    top = planted.frequent_ngrams()
    words = ["--top-ngrams", str(top), "--against", against, "--list-removed", "jsonl", "--workers", "2"]
    assert call(source, target, *OPTIONS, *words) == 0

    rows = rows_of(target)
    assert {row["key"]: row["rule"] for row in rows} == planted.rules
    for shard in range(SHARDS):
        before, after = (members_of(folder / f"{shard:05}.tar") for folder in (source, target))
        assert after == [member for member in before if member[0].partition(".")[0] not in planted.rules]
    assert sorted(tree(target)) == [*(f"{i:05}.tar" for i in range(SHARDS)), "removed.jsonl", "report.json"]

    report = json.loads((target / "report.json").read_text())
    assert (report["samples"], report["kept"]) == (5000, 5000 - len(planted.rules))
    assert list(report["rules"]) == list(RULES)
    for rule, found in report["rules"].items():
        assert found["removed"] == sum(planted.rules[key] == rule for key in planted.rules) > 0
        assert found["alone"] == sum(rule in row["rules"] for row in rows)
        assert len(found["examples"]) == 3
    kinds = report["rules"]["unreadable"]["kinds"]
    assert kinds == {"bad JSON": 20, "bad text": 20, "not an image": 20, "truncated image": 20}
    assert report["rules"]["incomplete"]["kinds"] == {"missing image": 20, "missing text": 40}
    assert report["ngrams"]["kept"] == top

    out = capsys.readouterr().out
    assert f"5,000 samples in 5 shards, {report['kept']:,} kept ({report['kept'] / 5000:.1%})" in out
    assert "rare-ngram                20          20   a word or pair of words outside" in out
    assert "'a red zq" in out
    assert "bits apart" in out


def called_until_rename(number: int, source: Path, target: Path, words: list[str]) -> None:
    die_at_rename(number)
    assert call(source, target, *words) == 0


def test_killed_again_and_again_it_removes_the_same(planted, places, tmp_path):
    """All 5,000 pairs, and every restart is a call of its own that comes a few files further than the last."""
    source, against = places
    words = [*OPTIONS, "--top-ngrams", str(planted.frequent_ngrams()), "--against", against]
    words += ["--list-removed", "jsonl", "--workers", "1"]
    assert call(source, tmp_path / "whole", *words) == 0
    kills, steps, target = 0, set(), tmp_path / "out"
    while in_a_process(called_until_rename, 7, source, target, words) == -signal.SIGKILL:
        kills += 1
        steps |= {path.name for path in target.glob(".*/*") if path.is_dir()}
        assert kills < 50
    assert kills > 5, steps
    assert steps >= {"scan", "merged", "near", "judged"}
    assert {row["key"]: row["rule"] for row in rows_of(target)} == planted.rules
    assert tree(target) == tree(tmp_path / "whole")


def test_the_output_is_read_by_the_same_reader(few, tmp_path):
    assert call(few[1], tmp_path / "out", *OPTIONS, "--skip", "rare-ngram") == 0
    source = open_source(f"wds:{tmp_path}/out")
    assert source.provides >= {"image", "text"}
    assert len(source) >= 100
    assert all(example.image and example.texts["en"] for example in source)


def test_every_rule_but_two_can_be_switched_off(few, places, tmp_path):
    (planted, source), against = few, places[1]
    skips = [word for rule in list(RULES)[2:] for word in ("--skip", rule)]
    assert call(source, tmp_path / "out", *OPTIONS, *skips, "--against", against, "--decode") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["rules"]) == ["unreadable", "incomplete"]
    assert report["samples"] - report["kept"] == sum(
        rule in ("unreadable", "incomplete") for rule in planted.rules.values()
    )


def small(folder: Path, texts: dict[str, str]) -> Path:
    """A shard of flat images 250 pixels wide, with these texts by key."""
    members: dict[str, bytes] = {}
    for number, (key, text) in enumerate(texts.items()):
        members |= {f"{key}.png": flat_image(number, 250, 250), f"{key}.txt": text.encode()}
    write_tar(folder / "0.tar", members)
    return folder


def test_defaults_are_the_papers(tmp_path):
    members = {}
    sizes = {"a": (201, 201), "b": (200, 400), "c": (603, 201), "d": (602, 201)}
    for number, (key, (width, height)) in enumerate(sizes.items()):
        members |= {f"{key}.png": flat_image(number, width, height), f"{key}.txt": b"a small red car"}
    members |= {"e.png": flat_image(9, 250, 250), "e.txt": b"two words"}
    members |= {"f.png": flat_image(10, 250, 250), "f.txt": b" ".join([b"word"] * 21)}
    members |= {"g.png": flat_image(11, 250, 250), "g.txt": b" ".join([b"word"] * 20)}
    members |= {"h.png": flat_image(12, 250, 250), "h.txt": b"just three words"}
    for number in range(11):
        members |= {f"i{number}.png": flat_image(20 + number, 250, 250), f"i{number}.txt": b"shared by eleven images"}
    for number in range(10):
        members |= {f"j{number}.png": flat_image(40 + number, 250, 250), f"j{number}.txt": b"shared by ten images"}
    for key, number in (("k", 1001), ("l", 1000)):
        image = flat_image(ord(key), 250, 250)
        for n in range(number):
            members |= {f"{key}{n}.png": image, f"{key}{n}.txt": f"{key} number {n}".encode()}
    write_tar(tmp_path / "src" / "0.tar", members)
    assert call(tmp_path / "src", tmp_path / "out", "--list-removed", "jsonl") == 0
    removed: dict[str, set[str]] = {}
    for row in rows_of(tmp_path / "out"):
        removed.setdefault(row["rule"], set()).add(row["key"])
    assert removed == {
        "small": {"b"},
        "aspect": {"c"},
        "many-texts": {f"k{number}" for number in range(1001)},
        "shared-text": {f"i{number}" for number in range(11)},
        "length": {"e", "f"},
    }


def test_the_same_image_under_the_same_text_counts_once(tmp_path):
    members = {}
    for number in range(30):
        members |= {f"{number}.png": flat_image(1), f"{number}.txt": b"a small red car"}
    write_tar(tmp_path / "src" / "0.tar", members)
    assert call(tmp_path / "src", tmp_path / "out", "--min-side", "1", "--max-texts", "1", "--max-images", "1") == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["kept"] == 30


def test_removed_samples_as_parquet(few, tmp_path):
    import pyarrow.parquet as pq

    for form in ("jsonl", "parquet"):
        assert call(few[1], tmp_path / form, *OPTIONS, "--list-removed", form) == 0
    assert pq.read_table(tmp_path / "parquet" / "removed.parquet").to_pylist() == rows_of(tmp_path / "jsonl")


def test_flat_images_are_near_duplicates_only_of_their_own_bytes(tmp_path):
    against = evaluation_images(tmp_path / "evaluation")
    write_files(tmp_path / "evaluation", {"test/a/flat.png": flat_image(1)})
    members = {
        f"{n}.{kind}": data for n in (1, 2) for kind, data in (("png", flat_image(n)), ("txt", b"a small red car"))
    }
    write_tar(tmp_path / "src" / "0.tar", members)
    words = ["--min-side", "16", "--against", against, "--list-removed", "jsonl"]
    assert call(tmp_path / "src", tmp_path / "out", *words) == 0
    found = [(row["key"], row["rule"], row["why"]) for row in rows_of(tmp_path / "out")]
    assert found == [("1", "near-duplicate", f"{against} (test): a/flat.png, 0 bits apart")]


def test_near_duplicates_by_a_model(tmp_path):
    members = {}
    for number in range(6):
        copy = encoded(smooth_image(1000 + number), "JPEG", quality=95) if number < 4 else encoded(smooth_image(number))
        members |= {f"{number}.jpg": copy, f"{number}.txt": b"a small red car"}
    members |= {"6.png": b"broken", "6.txt": b"a small red car"}
    write_tar(tmp_path / "src" / "0.tar", members)
    against = evaluation_images(tmp_path / "evaluation")
    words = ["--min-side", "16", "--against", against, "--near-duplicates", "tests.verbs.conv_backbone:build"]
    words += ["--min-cosine", "0.9999", "--list-removed", "jsonl", "--device", "cpu", "--workers", "1"]
    assert call(tmp_path / "src", tmp_path / "out", *words) == 0
    rows = {row["key"]: row for row in rows_of(tmp_path / "out")}
    assert {key: row["rule"] for key, row in rows.items()} == dict.fromkeys("0123", "near-duplicate") | {
        "6": "unreadable"
    }
    for number in range(4):
        assert f"a/{1000 + number}.png, cosine " in rows[str(number)]["why"]


def test_nearest_is_the_largest_cosine_over_blocks(monkeypatch):
    monkeypatch.setattr("vlbench.verbs.filter._BLOCK", 7)
    rng = np.random.default_rng(0)
    query, wanted = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in rng.normal(size=(2, 40, 5)))
    wanted[30:] = wanted[:10]  # the first of equals
    index, cosine = nearest(query.astype(np.float32), wanted.astype(np.float32), device="cpu")
    assert (index == (query @ wanted[:30].T).argmax(axis=1)).all()
    np.testing.assert_allclose(cosine, (query @ wanted.T).max(axis=1), rtol=1e-5)


def refusal(capsys, *words: object) -> str:
    assert main(["data", "filter", *map(str, words)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize(
    "words, line",
    [
        (["--min-side", "-3"], "min_side: Input should be greater than or equal to 0 (got -3)"),
        (["--max-aspect", "0.5"], "max_aspect: Input should be greater than 1 (got 0.5)"),
        (["--max-aspect", "nan"], "max_aspect"),
        (["--max-aspect", "inf"], "--skip aspect switches the rule off"),
        (["--min-cosine", "1.5"], "min_cosine: Input should be less than 1"),
        (["--max-distance", "40"], "max_distance: Input should be less than or equal to 16"),
        (["--top-ngrams", "0"], "top_ngrams: Input should be greater than or equal to 1"),
        (["--min-words", "9", "--max-words", "4"], "min_words is 9, more than max_words, 4"),
        (["--min-words", "few"], "argument --min-words: invalid int value: 'few'"),
        (["--skip", "smal"], "unknown rule 'smal'; did you mean 'small'?"),
        (["--skip", "unreadable"], "unknown rule 'unreadable'; "),
        (["--memory", "0"], "--memory 0: at least 1 MiB"),
        (["--workers", "0"], "--workers 0: at least 1"),
        (["--min-sides", "3"], "unknown option --min-sides; did you mean --min-side?"),
        (["--against", "wds:nowhere"], "data 'wds:nowhere': there is no nowhere"),
        (["--near-duplicates", "timn:resnet50", "--against", "SAME"], "did you mean timm:resnet50?"),
    ],
)
def test_nonsense_is_one_clear_line(tmp_path, capsys, words, line):
    source = small(tmp_path / "src", {"a": "a small red car"})
    words = [word.replace("SAME", f"wds:{source}") for word in words]
    assert line in refusal(capsys, f"wds:{source}", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_places_that_will_not_do_are_one_clear_line(tmp_path, capsys):
    source = small(tmp_path / "src", {"a": "a small red car"})
    (tmp_path / "empty").mkdir()
    write_files(tmp_path / "full", {"mine.txt": "mine"})
    write_files(tmp_path, {"file": ""})
    write_tar(tmp_path / "split" / "train" / "0.tar", {"a.txt": b"text"})
    spec = f"wds:{source}"
    assert "no .tar file in" in refusal(capsys, f"wds:{tmp_path}/empty", tmp_path / "out")
    assert "only webdataset shards" in refusal(capsys, f"imagefolder:{source}", tmp_path / "out")
    assert "divided into splits (train); name one" in refusal(capsys, f"wds:{tmp_path}/split", tmp_path / "out")
    assert "source and destination are the same folder" in refusal(capsys, spec, source)
    assert "source and destination are the same folder" in refusal(capsys, f"{spec}/0.tar", source)
    assert "full: not empty, and not begun by this command" in refusal(capsys, spec, tmp_path / "full")
    assert "file: a file; name a folder" in refusal(capsys, spec, tmp_path / "file")
    assert sorted(tree(tmp_path)) == ["file", "full/mine.txt", "split/train/0.tar", "src/0.tar"]
    path = source / "0.tar"
    path.write_bytes(path.read_bytes()[:700])
    assert "0.tar: truncated tar: " in refusal(capsys, spec, tmp_path / "out")


def test_help_shows_every_rule_and_a_real_example(capsys):
    with pytest.raises(SystemExit):
        main(["data", "filter", "--help"])
    out = capsys.readouterr().out
    assert f"rules, in order: {', '.join(RULES)}" in out
    assert "vlbench data filter wds:" in out
