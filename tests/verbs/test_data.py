from __future__ import annotations

import argparse
import json
import random
import re

import pytest

from tests.data.making import image_folder, png, write_files
from vlbench.cli import main
from vlbench.core.errors import UserError
from vlbench.verbs.data import run_check, run_make, run_vocab


def check(spec: str, split: str | None = None) -> int:
    return run_check(argparse.Namespace(spec=spec, split=split))


def test_check_prints_every_split_and_ends_well(tmp_path, capsys):
    assert check(f"imagefolder:{image_folder(tmp_path)}") == 0
    out = capsys.readouterr().out
    assert "split train: 6 examples with image, label" in out
    assert "split test: 6 examples" in out
    assert "classes         2; examples a class: 3 / 3 / 3 (least / median / most)" in out
    assert out.count("bad samples     none") == 2


def test_check_of_one_split_leaves_the_others(tmp_path, capsys):
    folder = image_folder(tmp_path)
    write_files(folder, {"train/cat/0.png": b""})
    assert check(f"imagefolder:{folder}", "test") == 0
    assert "split train" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no split 'val'"):
        check(f"imagefolder:{folder}", "val")


def test_check_names_bad_samples_and_ends_with_one(tmp_path, capsys):
    folder = image_folder(tmp_path, per_class=6)
    write_files(folder, {f"train/cat/{i}.png": b"" for i in range(5)} | {"train/dog/0.png": b"text " * 30})
    assert check(f"imagefolder:{folder}") == 1
    lines = capsys.readouterr().out.split("\n")
    at = lines.index("  bad samples     6")
    assert lines[at + 1] == "    empty file: 5"
    assert lines[at + 2] == f"      {folder}/train/cat/0.png: the image has no bytes"
    assert lines[at + 5] == "      … and 2 more"
    assert lines[at + 6 : at + 8] == ["    not an image: 1", "      dog/0.png: no known image format"]


def test_check_goes_on_after_a_split_that_cannot_be_opened(tmp_path, capsys):
    folder = image_folder(tmp_path)
    write_files(folder, {"train/bird/notes.txt": ""})
    assert check(f"imagefolder:{folder}") == 1
    captured = capsys.readouterr()
    assert captured.err == (
        f"split train: {folder}/train/bird: this class folder holds no image; add some or remove the folder\n"
    )
    assert "split test: 6 examples" in captured.out


def test_make_writes_a_world_that_check_accepts(tmp_path, capsys, monkeypatch):
    from vlbench.data.shapes import world, write

    monkeypatch.setattr(write, "Sizes", lambda: world.TINY)
    args = argparse.Namespace(world="shapes", dir=str(tmp_path / "world"), seed=1)
    assert run_make(args) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/world: the world" in out
    assert "seed 1" in out
    for part in ("pairs", "labels", "classes", "retrieval", "coco"):
        assert part in out
        assert check(f"shapes:{part}?root={tmp_path}/world&seed=1") == 0
    assert run_make(args) == 0  # a second call finds it there


def test_vocab_writes_a_vocabulary_and_says_how_large_it_is(tmp_path, capsys):
    from vlbench.data.vocabulary import Vocabulary

    rows = [f"{i}.png\ta {word} square\n" for i, word in enumerate(["red", "blue"] * 9)]
    write_files(tmp_path, {f"{i}.png": png(i) for i in range(18)})
    (tmp_path / "list.csv").write_text("filepath\ttitle\n" + "".join(rows))
    out = tmp_path / "new" / "words.model"

    def args(size, language=None, kind="sentencepiece"):
        spec = [f"csv:{tmp_path / 'list.csv'}"]
        given = {"size": size, "language": language, "kind": kind}
        return argparse.Namespace(spec=spec, out=str(out), cased=False, alphabet=None, **given)

    assert run_vocab(args(25)) == 0
    said = capsys.readouterr().out
    assert f"{out}: 25 pieces, 5 of them special, from 18 captions" in said
    assert "note" not in said
    assert run_vocab(args(10_000)) == 0
    assert "note: 10,000 were asked for; these captions have no more different words" in capsys.readouterr().out
    words = Vocabulary(out.read_bytes())
    assert words.decode(words.encode("a red square")) == "a red square"
    with pytest.raises(UserError, match=r"the captions of csv:\S+ in de: there is no text"):
        run_vocab(args(25, ["de"]))
    assert run_vocab(args(20, kind="wordpiece")) == 0
    said = capsys.readouterr().out
    assert re.search(rf"{out}: \d+ pieces, 5 of them special, from 18 captions", said)
    assert f"vlbench pretrain align --set vocabulary.file={out}" in said
    assert json.loads(out.read_text())["model"]["type"] == "WordPiece"
    out.unlink()
    out.mkdir()
    with pytest.raises(UserError, match="a folder; name the file to write"):
        run_vocab(args(25))


def test_vocab_of_many_characters_loses_none_and_a_small_alphabet_is_warned_of(tmp_path, capsys):
    """2,500 different Han characters, each a word of its own: more than the thousand that one language has."""
    rng = random.Random(0)
    han = [chr(0x4E00 + number) for number in range(2500)]
    texts = ["".join(han[start : start + 10]) for start in range(0, 2500, 10)] + ["".join(rng.choices(han, k=8))] * 20
    write_files(tmp_path, {"0.png": png(0)})
    (tmp_path / "zh.csv").write_text("filepath\ttitle\n" + "".join(f"0.png\t{text}\n" for text in texts))

    def learn(*more):
        words = ["data", "vocab", f"csv:{tmp_path / 'zh.csv'}", "--kind", "wordpiece", "--cased"]
        status = main([*words, "--out", str(tmp_path / "zh.json"), *more])
        return status, *capsys.readouterr()

    status, out, err = learn("--size", "250000")
    assert status == 0
    assert ": 5,005 pieces, 5 of them special, from 270 captions\n[UNK]: 0.000% of the tokens" in out
    assert "note: 250,000 were asked for; these captions have no more different words or parts of words\n" in out
    assert err == ""
    _, out, err = learn("--size", "250000", "--alphabet", "1000")
    assert ": 2,005 pieces" in out
    assert re.search(r"\[UNK\]: 5\d\.\d{3}% of the tokens", out)
    assert "no more different words or parts of words, but for those that are [UNK]\n" in out
    assert re.match(r"warning: 5\d\.\d% of the tokens are \[UNK\].*give a larger --alphabet or --size\n$", err)
    _, out, err = learn("--size", "4000")
    assert ": 2,001 pieces" in out, "five special ones, and two of each of 998 characters: half of the vocabulary"
    assert re.match(r"warning: .* give a larger --size\n$", err)
    status, _, err = learn("--alphabet", "0")
    assert status == 2
    assert err == (
        "vlbench: error: --alphabet 0: a number of characters, 1 or more, for --kind wordpiece; sentencepiece knows "
        "every character\n"
    )
    status, _, err = learn("--alphabet", "2000", "--kind", "sentencepiece")
    assert status == 2
    assert "sentencepiece knows every character" in err
