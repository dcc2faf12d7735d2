from __future__ import annotations

import pickle

import pytest

from vlbench.core.errors import UserError
from vlbench.data.weak import corpus as corpus_module
from vlbench.data.weak.corpus import Aligned, Entry, Link, open_corpus, write_corpus

TEXT = "a large red circle über a dog"
ENTRIES = [
    Entry(
        "zoo",
        ("red circle", "dog", "dog"),
        (
            Aligned(
                TEXT,
                0.75,
                (Link("a large red circle", 0, 18, 0, 0.5), Link("a dog", 24, 29, 2, 0.25)),
            ),
            Aligned("nothing here", 0.5, ()),
        ),
    ),
    Entry("änderung", ("cat",), ()),
    Entry("apple", (), ()),
]


def written(tmp_path, entries=ENTRIES, **made_of):
    return write_corpus(tmp_path / "weak.arrow", iter(entries), ids=[e.id for e in entries], made_of=made_of)


def test_corpus_gives_back_what_was_written(tmp_path):
    corpus = written(tmp_path, settings={"k": 2})
    assert list(corpus) == ENTRIES
    assert corpus.ids() == ["zoo", "änderung", "apple"]
    assert corpus["zoo"] == ENTRIES[0].aligned
    assert corpus.tags("zoo") == ("red circle", "dog", "dog")
    assert corpus["apple"] == ()
    assert corpus.made_of == {"settings": {"k": 2}}
    link = corpus["zoo"][0].links[1]
    assert TEXT[link.start : link.end] == link.phrase == "a dog"


def test_corpus_travels_by_pickle_as_a_path(tmp_path):
    corpus = written(tmp_path)
    data = pickle.dumps(corpus)
    assert len(data) < 500
    assert pickle.loads(data)["zoo"] == ENTRIES[0].aligned


def test_corpus_finds_every_id_among_several_batches_and_no_other(tmp_path):
    ids = [f"{(i * 7919) % 10007:05d}" for i in range(10007)]
    entries = [Entry(name, (name,), ()) for name in ids]
    corpus = write_corpus(tmp_path / "many", entries, ids=ids, made_of={})
    assert len(corpus) == 10007
    assert all(corpus.tags(name) == (name,) for name in ids)
    assert "00000" in corpus
    for absent in ("", "99999", "0000", "zzz", 3):
        assert absent not in corpus
    with pytest.raises(KeyError, match="knows no image '99999'"):
        corpus["99999"]


def test_corpus_of_nothing_can_be_opened(tmp_path):
    corpus = written(tmp_path, [])
    assert (len(corpus), corpus.ids(), "a" in corpus) == (0, [], False)


def test_corpus_refuses_an_id_twice(tmp_path):
    with pytest.raises(UserError, match="the image id 'zoo' occurs twice"):
        written(tmp_path, [ENTRIES[0], ENTRIES[1], ENTRIES[0]])
    assert not list(tmp_path.iterdir())


def test_a_killed_writer_leaves_the_old_corpus(tmp_path):
    written(tmp_path, settings={"k": 1})

    def dying():
        yield ENTRIES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path / "weak.arrow", dying(), ids=[e.id for e in ENTRIES], made_of={})
    assert [path.name for path in tmp_path.iterdir()] == ["weak.arrow"]
    assert open_corpus(tmp_path / "weak.arrow").made_of == {"settings": {"k": 1}}


def test_half_a_file_and_another_file_are_refused_in_one_line(tmp_path):
    path = written(tmp_path).path
    data = path.read_bytes()
    for bad in (data[: len(data) // 2], data[:-1], b"", b"text " * 40):
        path.write_bytes(bad)
        with pytest.raises(UserError, match="cannot be read as a weakly aligned corpus") as caught:
            open_corpus(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file; make it with"):
        open_corpus(tmp_path / "absent")
    import pyarrow as pa

    with pa.OSFile(str(path), "wb") as handle, pa.ipc.new_file(handle, pa.schema([("id", pa.string())])):
        pass
    with pytest.raises(UserError, match="not a weakly aligned corpus"):
        open_corpus(path)


def test_ids_whose_hashes_collide_are_told_apart(tmp_path, monkeypatch):
    """Every id has one of three keys, over several batches."""
    monkeypatch.setattr(corpus_module, "_key", lambda image_id: len(image_id) % 3)
    monkeypatch.setattr(corpus_module, "_BATCH", 7)
    ids = [f"{'x' * (i % 5)}{i}" for i in range(60)]
    corpus = write_corpus(tmp_path / "many", [Entry(name, (name,), ()) for name in ids], ids=ids, made_of={})
    assert all(corpus.tags(name) == (name,) for name in ids)
    assert not any(name in corpus for name in ("", "x", "xx", "no such id", "zz"))
