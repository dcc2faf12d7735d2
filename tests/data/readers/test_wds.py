from __future__ import annotations

import io
import json
import pickle

import numpy as np
import pytest

from tests.data.making import png, write_files, write_tar
from vlbench.core.errors import BadExample, UserError
from vlbench.data.sources import list_splits, open_source


def pairs(count: int = 4, start: int = 0) -> dict[str, bytes]:
    members = {}
    for i in range(start, start + count):
        members |= {
            f"{i:05d}.png": png(i),
            f"{i:05d}.txt": f" caption {i}\n".encode(),
            f"{i:05d}.json": b'{"url": "u"}',
        }
    return members


def benchmark(root, *, kind=None, splits=("train", "test"), shards=2):
    for seed, split in enumerate(splits):
        for shard in range(shards):
            members = {}
            for i in range(3):
                key = f"s{shard * 3 + i:07d}"
                members |= {f"{key}.webp": png(seed * 100 + shard * 10 + i), f"{key}.cls": str(i % 2).encode()}
            write_tar(root / split / f"{shard}.tar", members)
        write_files(root, {f"{split}/nshards.txt": f"{shards}\n"})
    write_files(root, {"classnames.txt": "cat\ndog\n", "zeroshot_classification_templates.txt": "a {c}.\n{c}\n"})
    if kind:
        write_files(root, {"dataset_type.txt": kind})
    return root


# ----------------------------------------------------------------------------------------------- img2dataset


def test_wds_reads_training_shards(tmp_path):
    for shard in range(3):
        write_tar(tmp_path / f"{shard:05d}.tar", pairs(4, shard * 4))
    for path in (f"{tmp_path}/{{00000..00002}}.tar", str(tmp_path)):
        source = open_source(f"wds:{path}")
        assert list_splits(f"wds:{path}") == ()
        assert len(source) == 12
        assert source.ids() == [f"{i:05d}" for i in range(12)]
        assert source.provides == {"image", "text"}
        assert source.classes is None
        assert source.labels() is None
        example = source[7]
        assert example.image == png(7)
        assert example.texts == {"en": ("caption 7",)}
        assert example.extra == {"url": "u"}
    assert len(open_source(f"wds:{tmp_path}/00001.tar")) == 4


def test_wds_keeps_a_caption_with_a_line_separator_whole(tmp_path):
    caption = "one\u2028two\x0bthree\u0085four"
    write_tar(tmp_path / "a.tar", {"x.jpg": png(), "x.txt": caption.encode()})
    assert open_source(f"wds:{tmp_path}/a.tar")[0].texts == {"en": (caption,)}
    benchmark(tmp_path / "b", kind="retrieval", splits=("test",), shards=1)
    write_tar(tmp_path / "b/test/0.tar", {"x.png": png(), "x.txt": f"{caption}\nsecond\n".encode()})
    assert open_source(f"wds:{tmp_path}/b")[0].texts == {"en": (caption, "second")}


def test_wds_takes_the_texts_of_every_language_from_json(tmp_path):
    record = {"captions": {"en": ["a", "b"], "de": ["c"], "fr": []}, "key": 3}
    members = {"x.jpg": png(), "x.txt": b"other", "x.json": json.dumps(record).encode()}
    source = open_source(f"wds:{write_tar(tmp_path / 'a.tar', members)}")
    assert source[0].texts == {"en": ("a", "b"), "de": ("c",)}
    assert source[0].extra == {"key": 3}
    del members["x.txt"]
    assert open_source(f"wds:{write_tar(tmp_path / 'b.tar', members)}").provides == {"image", "text"}


def test_wds_reads_the_caption_of_json_where_there_is_no_txt(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"x.jpg": png(), "x.json": b'{"caption": "a cat"}'})
    assert open_source(f"wds:{tar}")[0].texts == {"en": ("a cat",)}


def test_wds_reads_tags_and_boxes_of_json_as_regions(tmp_path):
    record = {"tags": ["red circle", "blue star"], "boxes": [[1, 2, 30, 40], [5.5, 6, 7, 8]]}
    write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.json": json.dumps(record).encode()})
    source = open_source(f"wds:{tmp_path}/0.tar")
    assert source.provides == {"image", "regions"}
    assert [(region.category, region.box_xyxy) for region in source[0].regions] == [
        ("red circle", (1.0, 2.0, 30.0, 40.0)),
        ("blue star", (5.5, 6.0, 7.0, 8.0)),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tags": ["a", "b"], "boxes": [[0, 0, 1, 1]]}, "as many boxes as tags"),
        ({"tags": ["a"], "boxes": [[0, 0, 1]]}, r"left, top, right, bottom.*\[0, 0, 1\]"),
        ({"tags": ["a"], "boxes": [[0, 0, 1, "x"]]}, "left, top, right, bottom"),
    ],
)
def test_wds_names_what_is_no_region(tmp_path, record, message):
    write_tar(tmp_path / "0.tar", {"a.png": png(0), "a.json": json.dumps(record).encode()})
    with pytest.raises(BadExample, match=message):
        open_source(f"wds:{tmp_path}/0.tar")[0]


def test_wds_ids_name_the_shard_where_keys_repeat(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", pairs(2))
    source = open_source(f"wds:{tmp_path}")
    assert source.ids() == ["0/00000", "0/00001", "1/00000", "1/00001"]
    write_tar(tmp_path / "more/1.tar", pairs(2))
    source = open_source(f"wds:{tmp_path}/{{1,more/1}}.tar")
    assert len(set(source.ids())) == 4


def test_wds_sorts_shards_by_number(tmp_path):
    for shard in (0, 2, 10):
        write_tar(tmp_path / f"{shard}.tar", pairs(1, shard))
    assert open_source(f"wds:{tmp_path}").ids() == ["00000", "00002", "00010"]


def test_wds_labels_without_class_names_are_numbers(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"x.jpg": png(), "x.cls": b"2", "y.jpg": png(1), "y.cls": b"0\n"})
    source = open_source(f"wds:{tar}")
    assert source.classes == ("0", "1", "2")
    assert source.labels() == [2, 0]
    assert source[0].label == 2


def test_wds_names_the_broken_part_of_a_sample(tmp_path):
    members = {
        "a.jpg": b"", "a.txt": b"x",
        "b.jpg": png(), "b.json": b"{not json",
        "c.jpg": png(), "c.txt": b"\xff\xfe",
        "d.jpg": png(), "d.json": b"[1]",
        "e.jpg": png(), "e.json": b'{"captions": {"en": [1]}}',
        "f.txt": b"no image",
    }  # fmt: skip
    source = open_source(f"wds:{write_tar(tmp_path / 'a.tar', members)}")
    for index, kind in enumerate(("empty file", "bad JSON", "bad text", "bad JSON", "bad JSON")):
        with pytest.raises(BadExample) as caught:
            source[index]
        assert caught.value.kind == kind
        assert caught.value.where == f"{tmp_path}/a.tar/{'abcde'[index]}"
    assert source[5].image is None


def test_wds_keeps_the_readable_part_of_a_truncated_tar(tmp_path):
    whole = write_tar(tmp_path / "0.tar", pairs(6)).read_bytes()
    (tmp_path / "0.tar").write_bytes(whole[: whole.find(b"00004.txt") + 100])
    write_tar(tmp_path / "1.tar", pairs(2, 6))
    source = open_source(f"wds:{tmp_path}")
    assert len(source) == 4 + 1 + 2
    assert source[3].texts == {"en": ("caption 3",)}
    with pytest.raises(BadExample) as caught:
        source[4]
    assert (caught.value.kind, caught.value.where) == ("truncated tar", f"{tmp_path}/0.tar")
    assert source[5].id == "00006"
    assert len(source.ids()) == len(source)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{00..03}.tar", "03.tar; 1 of 4 are missing"),
        ("1.tar", "did you mean '01.tar'"),
        ("{00..", "unbalanced braces"),
        ("empty", "no .tar file"),
    ],
)
def test_wds_names_missing_shards(tmp_path, path, message):
    for shard in range(3):
        write_tar(tmp_path / f"{shard:02d}.tar", pairs(1))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        open_source(f"wds:{tmp_path}/{path}")


# -------------------------------------------------------------------------------------------- CLIP_benchmark


def test_wds_reads_the_benchmark_layout(tmp_path):
    benchmark(tmp_path)
    assert list_splits(f"wds:{tmp_path}") == ("train", "test")
    source = open_source(f"wds:{tmp_path}", "test")
    assert source.classes == ("cat", "dog")
    assert source.templates == ("a {}.", "{}")
    assert source.provides == {"image", "label"}
    assert source.labels() == [0, 1, 0, 0, 1, 0]
    assert [source[i].label for i in range(6)] == source.labels()
    assert source.ids()[5] == "s0000005"


def npy(values, **options) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(values), **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [np.float32, np.int64, np.bool_])
def test_wds_reads_multilabel_sets(tmp_path, kind):
    benchmark(tmp_path, kind="multilabel", splits=("test",), shards=1)
    truth = [0, 1] if kind is np.bool_ else [-1, 1]
    write_tar(tmp_path / "test/0.tar", {"x.webp": png(), "x.npy": npy(np.array(truth, dtype=kind))})
    source = open_source(f"wds:{tmp_path}")
    assert source.provides == {"image", "labels"}
    assert (source.classes, source.labels(), source[0].label) == (("cat", "dog"), None, None)
    assert source[0].extra["labels"].tolist() == truth
    assert source[0].extra["labels"].dtype == np.int8
    (tmp_path / "classnames.txt").unlink()
    assert open_source(f"wds:{tmp_path}").classes == ("0", "1")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (npy(np.array([{}], dtype=object), allow_pickle=True), "cannot be read"),
        (b"no numpy", "cannot be read"),
        (npy([0, 1, 1]), "3 labels for 2 classes"),
        (npy([[0, 1]]), "not one number"),
        (npy([0, 2]), "not one number"),
        (npy([0.5, 1]), "not one number"),
        (npy(["0", "1"]), "not one number"),
    ],
)
def test_wds_names_what_is_no_multilabel_truth(tmp_path, data, message):
    benchmark(tmp_path, kind="multilabel", splits=("test",), shards=1)
    write_tar(tmp_path / "test/0.tar", {"x.webp": png(), "x.npy": data})
    with pytest.raises(BadExample, match=f"bad labels: .*{message}"):
        open_source(f"wds:{tmp_path}")[0]


def test_wds_leaves_numpy_members_of_other_sets_alone(tmp_path):
    tar = write_tar(tmp_path / "a.tar", {"x.jpg": png(), "x.txt": b"a", "x.npy": npy([[1.5]]), "x.json": b'{"k": 1}'})
    assert open_source(f"wds:{tar}")[0].extra == {"k": 1}


def test_wds_keeps_a_class_with_an_empty_name(tmp_path):
    """CLIP_benchmark's clevr_closest_object_distance has one: without it every later label would be another class."""
    benchmark(tmp_path, splits=("test",), shards=1)
    write_files(tmp_path, {"classnames.txt": "near\n\nfar\n"})
    assert open_source(f"wds:{tmp_path}").classes == ("near", "", "far")
    write_files(tmp_path, {"classnames.txt": "near\n\nfar\n\n"})
    assert open_source(f"wds:{tmp_path}").classes == ("near", "", "far")


def test_wds_reads_a_set_with_only_a_test_split_as_the_hub_client_leaves_it(tmp_path):
    benchmark(tmp_path, splits=("test",), kind="Classification\n")
    write_files(tmp_path, {"README.md": "x", ".gitattributes": "x", ".cache/huggingface/download/0.tar.metadata": "x"})
    assert list_splits(f"wds:{tmp_path}") == ("test",)
    assert len(open_source(f"wds:{tmp_path}", "test")) == 6


def test_wds_names_what_the_benchmark_layout_lacks(tmp_path):
    benchmark(tmp_path)
    (tmp_path / "test/1.tar").unlink()
    with pytest.raises(UserError, match=r"test/1.tar: this shard is missing \(.*nshards.txt promises 2\)"):
        open_source(f"wds:{tmp_path}", "test")
    write_files(tmp_path, {"test/nshards.txt": "many"})
    with pytest.raises(UserError, match=r"nshards.txt: expected the number of shards, got 'many'"):
        open_source(f"wds:{tmp_path}", "test")
    write_files(tmp_path, {"test/nshards.txt": "1", "dataset_type.txt": "retreival"})
    with pytest.raises(UserError, match="did you mean 'retrieval'"):
        open_source(f"wds:{tmp_path}", "test")
    write_files(tmp_path, {"dataset_type.txt": "", "zeroshot_classification_templates.txt": "a photo\n"})
    with pytest.raises(UserError, match=r"a template needs \{c\}"):
        open_source(f"wds:{tmp_path}", "test")


def test_wds_names_a_label_without_a_class(tmp_path):
    benchmark(tmp_path, splits=("test",), shards=1)
    write_tar(tmp_path / "test/0.tar", {"x.webp": png(), "x.cls": b"7", "y.webp": png(), "y.cls": b"dog"})
    source = open_source(f"wds:{tmp_path}")
    with pytest.raises(BadExample, match=r"0.tar/x: missing class: label 7, but classnames.txt has 2"):
        source[0]
    with pytest.raises(BadExample, match=r"bad label: its \.cls holds b'dog'"):
        source[1]
    assert source.labels() == [None, None]


def test_wds_refuses_a_truncated_test_set(tmp_path):
    benchmark(tmp_path)
    for split in ("train", "test"):
        path = tmp_path / split / "1.tar"
        path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"test/1.tar: truncated tar: .*; a test set must be whole"):
        open_source(f"wds:{tmp_path}", "test")
    assert len(open_source(f"wds:{tmp_path}", "train")) > 3


# ------------------------------------------------------------------------------------------------- processes


def test_wds_reads_shards_that_webdataset_wrote(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "00000.tar")) as writer:
        for i in range(5):
            writer.write({"__key__": f"{i:06d}", "png": png(i), "txt": f"caption {i}", "json": {"n": i}, "cls": i % 2})
    source = open_source(f"wds:{tmp_path}/00000.tar")
    for i in range(5):
        assert source[i].id == f"{i:06d}"
        assert source[i].image == png(i)
        assert source[i].texts == {"en": (f"caption {i}",)}
        assert (source[i].label, source[i].extra) == (i % 2, {"n": i})


def test_webdataset_reads_the_same_samples_as_wds(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = write_tar(tmp_path / "00000.tar", pairs(5))
    source = open_source(f"wds:{path}")
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in theirs] == list(source.ids())
    assert [sample["png"] for sample in theirs] == [source[i].image for i in range(5)]


def test_wds_works_in_forked_and_spawned_processes(tmp_path):
    import torch

    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", pairs(8, shard * 8))
    source = open_source(f"wds:{tmp_path}")
    assert source[0].id == "00000"  # whatever is opened lazily is open before the fork
    loader = torch.utils.data.DataLoader(source, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [example.image for example in loader] == [png(i) for i in range(16)]
    assert pickle.loads(pickle.dumps(source))[9] == source[9]
