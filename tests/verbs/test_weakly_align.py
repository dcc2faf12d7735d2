from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlbench.cli import main
from vlbench.data.shapes.world import TINY
from vlbench.data.shapes.write import write_world
from vlbench.data.sources import open_source
from vlbench.data.weak.corpus import open_corpus


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world") / "w", seed=0, sizes=TINY)


@pytest.fixture
def spec(world) -> str:
    return f"shapes:pairs?root={world}"


def align(*words: str) -> int:
    return main(["data", "weakly-align", *words])


def test_the_embedded_world_is_aligned_and_described(spec, tmp_path, capsys):
    out = tmp_path / "deep" / "weak.arrow"
    assert align(spec, "--pool", spec, "--chunker", "tags", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    corpus = open_corpus(out)
    source = open_source(spec)
    assert corpus.ids() == list(source.ids())
    counts = corpus.made_of["counts"]
    assert f"{counts['sentences']:,} sentences for 96 images" in printed
    assert f"{counts['pool']} sentences; {counts['used']} used" in printed
    assert "encoder         tfidf, cosine, exact search by numpy" in printed
    assert "noun phrases by tags v1" in printed
    pool = {text for index in range(96) for text in source[index].texts["en"]}
    hits = 0
    for index in range(96):
        example = source[index]
        assert corpus.tags(example.id) == tuple(region.category for region in example.regions)
        assert len(corpus[example.id]) == 5
        hits += example.regions[0].category in corpus[example.id][0].text
        for aligned in corpus[example.id]:
            assert aligned.text in pool
            assert [link.region for link in aligned.links] == sorted({link.region for link in aligned.links})
    assert counts["names_first_tag"][0] == hits / 96
    assert hits > 80  # every caption of the world is in the pool
    assert f"names 1st tag   {hits / 96:.1%}" in printed


def test_own_captions_can_be_left_out_or_put_in(spec, tmp_path, capsys):
    shares = {}
    for words in ((), ("--exclude-own",), ("--aligned", "0"), ("--aligned", "1")):
        out = tmp_path / "weak"
        assert align(spec, "--pool", spec, "--out", str(out), "--chunker", "tags", *words) == 0
        shares[words] = open_corpus(out).made_of["counts"]["own_found"]
    assert shares[()] > 0.5
    assert shares[("--exclude-own",)] == shares[("--aligned", "0")] == 0
    assert shares[("--aligned", "1")] == 1
    assert "(put first for a share of 1, else left out)" in capsys.readouterr().out


def test_a_text_file_is_a_pool_and_settings_are_kept(spec, tmp_path, capsys):
    pool = tmp_path / "books.txt"
    pool.write_text("a red circle is here\nall is well\na blue square beside the star\n")
    words = ("--k", "2", "--order", "sorted", "--min-link", "0.5", "--seed", "3")
    assert align(spec, "--pool", str(pool), "--chunker", "tags", "--out", str(tmp_path / "w"), *words) == 0
    made_of = open_corpus(tmp_path / "w").made_of
    assert {key: made_of["settings"][key] for key in ("k", "order", "min_link", "seed", "encoder")} == {
        "k": 2,
        "order": "sorted",
        "min_link": 0.5,
        "seed": 3,
        "encoder": "tfidf",
    }
    assert made_of["counts"]["pool"] == 3
    assert made_of["counts"]["own_found"] == 0
    assert json.dumps(made_of)
    assert "images" in capsys.readouterr().out.split("without any")[1].split("\n")[0]


@pytest.mark.parametrize(
    "words, message",
    [
        (("imagefolder:nowhere", "--out", "w"), "say where sentences come from"),
        (("SPEC", "--pool", "SPEC", "--out", "w", "--k", "0"), "weakly-align: k: "),
        (("SPEC", "--pool", "SPEC", "--out", "w", "--aligned", "1.5"), "weakly-align: aligned: "),
        (("SPEC", "--pool", "SPEC", "--out", "w", "--metric", "l2"), "--metric l2 is for sentence encoders"),
        (("SPEC", "--pool", "SPEC", "--out", "w", "--metric", "l3"), "did you mean 'l2'"),
        (("SPEC", "--pool", "SPEC", "--out", "w", "--chunker", "tag"), "did you mean 'tags'"),
        (("SPEC", "--pool", "SPEC", "--out", "w", "--labels", "l.tsv"), "name these with --features FILE.tsv"),
        (("SPEC", "--pool", "SPEC", "--out", "w", "--features", "none"), "neither"),
        (("SPEC", "--pool", "SPEC", "--out", "."), "this is a folder"),
        (("SPEC", "--pool", "nothing.txt", "--out", "w"), "there is no such file or folder"),
        (("SPEC", "--pool", "SPEC"), "--out"),
    ],
)
def test_wrong_words_are_one_line(words, message, spec, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert align(*(spec if word == "SPEC" else word for word in words)) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
