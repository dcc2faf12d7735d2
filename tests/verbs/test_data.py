from __future__ import annotations

import argparse
import json
import re

import pytest

from tests.data.making import image_folder, png, write_files
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
        return argparse.Namespace(spec=spec, out=str(out), size=size, language=language, kind=kind, cased=False)

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
