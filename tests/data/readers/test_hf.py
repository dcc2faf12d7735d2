from __future__ import annotations

import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.making import png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.data.sources import is_present, list_splits, open_source
from vlbench.data.taskdata import TaskData

datasets = pytest.importorskip("datasets")


def table(count: int = 6, **columns):
    rows = {"image": [{"bytes": png(i), "path": f"{i}.png"} for i in range(count)]}
    features = {"image": datasets.Image()}
    made = datasets.Dataset.from_dict(rows | columns)
    return made.cast_column("image", features["image"])


def parquet(root, *, splits=("train", "test"), **columns):
    root.mkdir(parents=True, exist_ok=True)
    for split in splits:
        table(**columns).to_parquet(str(root / f"{split}-00000-of-00001.parquet"))
    return root


def test_hf_reads_a_folder_of_parquet_files(tmp_path):
    labels = datasets.ClassLabel(names=["cat", "dog"])
    for split in ("train", "validation"):
        data = table(id=[f"{split}/{i}" for i in range(6)], label=[0, 1, 0, 1, 1, -1]).cast_column("label", labels)
        data.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    assert list_splits(f"hf:{tmp_path}") == ("train", "val")
    source = open_source(f"hf:{tmp_path}", "val")
    assert source.provides == {"image", "label"}
    assert source.classes == ("cat", "dog")
    assert source.ids()[1] == "validation/1"
    assert source.labels() == [0, 1, 0, 1, 1, None]  # -1 is the hub's hidden label
    assert source[1].image == png(1)
    assert (source[1].id, source[1].label) == ("validation/1", 1)
    assert pickle.loads(pickle.dumps(source))[3] == source[3]


def test_hf_test_split_of_hidden_labels_is_no_test_split(tmp_path):
    """ImageNet's 100,000 test images on the hub are all labelled -1; its validation images are what is reported."""
    labels = datasets.ClassLabel(names=["cat", "dog"])
    for split, values in {"train": [0, 1, 0], "validation": [1, 0, 1], "test": [-1, -1, -1]}.items():
        data = table(3, label=values).cast_column("label", labels)
        data.to_parquet(str(tmp_path / f"{split}-00000-of-00001.parquet"))
    assert list_splits(f"hf:{tmp_path}") == ("train", "val", "test (labels hidden)")
    data = TaskData(f"hf:{tmp_path}")
    assert list(data.split("test").labels()) == [1, 0, 1]
    assert open_source(f"hf:{tmp_path}", "test (labels hidden)").labels() == [None] * 3


def test_hf_table_that_says_each_row_s_split_is_divided_by_it(tmp_path):
    """Flickr30k on the hub: all rows in one split, Karpathy's division in a column."""
    said = ["train", "val", "test", "train", "test", "train"]
    data = table(6, caption=[[f"caption {i}"] for i in range(6)], split=said)
    data.to_parquet(str(tmp_path / "test-00000-of-00001.parquet"))
    assert list_splits(f"hf:{tmp_path}") == ("train", "val", "test")
    source = open_source(f"hf:{tmp_path}", "test")
    assert [example.texts["en"] for example in source] == [("caption 2",), ("caption 4",)]
    assert [example.image for example in source] == [png(2), png(4)]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


@pytest.mark.parametrize("values", [["a", "b"] * 3, ["train", None] * 3, [1, 2] * 3])
def test_hf_column_split_that_says_something_else_divides_nothing(tmp_path, values):
    table(6, split=values).to_parquet(str(tmp_path / "test-00000-of-00001.parquet"))
    assert list_splits(f"hf:{tmp_path}") == ("test",)
    assert len(open_source(f"hf:{tmp_path}", "test")) == 6


def test_hf_sorts_the_class_names_of_word_labels_over_all_splits(tmp_path):
    table(label=["dog"] * 3 + ["ant"] * 3).to_parquet(str(tmp_path / "train.parquet"))
    table(label=["cat"] * 6).to_parquet(str(tmp_path / "test.parquet"))
    train, test = (open_source(f"hf:{tmp_path}", split) for split in ("train", "test"))
    assert train.classes == test.classes == ("ant", "cat", "dog")
    assert train.labels() == [2, 2, 2, 0, 0, 0]
    assert test.labels() == [1] * 6


def test_hf_reads_captions(tmp_path):
    captions = [["a cat", " a pet "], ["b"], [], ["c\u2028d"], ["e"], ["f"]]
    parquet(tmp_path / "lists", caption=captions)
    source = open_source(f"hf:{tmp_path}/lists")
    assert source.provides == {"image", "text"}
    assert source[0].texts == {"en": ("a cat", "a pet")}
    assert source[2].texts == {}
    assert source[3].texts == {"en": ("c\u2028d",)}
    parquet(tmp_path / "languages", caption=[{"en": "a", "de": "b"}] * 6)
    assert open_source(f"hf:{tmp_path}/languages")[0].texts == {"en": ("a",), "de": ("b",)}


def test_hf_takes_columns_and_split_from_the_options(tmp_path):
    parquet(tmp_path, fine=[0, 1, 2, 0, 1, 2], coarse=[0, 0, 1, 0, 0, 1], alt=list("abcdef"))
    assert open_source(f"hf:{tmp_path}").provides == {"image"}
    source = open_source(f"hf:{tmp_path}?label=fine&text=alt&split=test")
    assert source.split == "test"
    assert list_splits(f"hf:{tmp_path}?split=test") == ("test",)
    assert source.classes == ("0", "1", "2")
    assert source[5].texts == {"en": ("f",)}
    assert open_source(f"hf:{tmp_path}?label=coarse").classes == ("0", "1")
    with pytest.raises(UserError, match="did you mean 'coarse'"):
        open_source(f"hf:{tmp_path}?label=coarce")
    with pytest.raises(UserError, match="unknown split 'tset'; did you mean 'test'"):
        open_source(f"hf:{tmp_path}?split=tset")


def test_hf_ids_fall_back_to_paths_where_the_column_repeats(tmp_path):
    parquet(tmp_path, id=["a", "a", "b", "c", "d", "e"])
    source = open_source(f"hf:{tmp_path}")
    assert source.ids() == [f"{i}.png" for i in range(6)]
    assert source.ids() is source.ids()
    assert source[2].id == "2.png"


@pytest.mark.parametrize("path", ["same.png", None])
def test_hf_ids_fall_back_to_content_and_follow_the_image(tmp_path, path):
    def ids(seeds, name):
        rows = datasets.Dataset.from_dict({"image": [{"bytes": png(seed), "path": path} for seed in seeds]})
        rows.cast_column("image", datasets.Image()).to_parquet(str(tmp_path / name))
        source = open_source(f"hf:{tmp_path / name}")
        assert [source[i].id for i in range(len(source))] == list(source.ids())
        return list(source.ids())

    one, two, three = ids([1, 2, 3], "a.parquet")
    assert all(len(name) == 16 for name in (one, two, three))
    assert ids([3, 1, 1, 2, 1], "b.parquet") == [three, one, f"{one}-2", two, f"{one}-3"]


def test_hf_reads_what_save_to_disk_wrote(tmp_path):
    both = datasets.DatasetDict({"train": table(label=list("aabbcc")), "test": table(label=list("abcabc"))})
    both.save_to_disk(str(tmp_path / "both"))
    assert open_source(f"hf:{tmp_path}/both", "test").labels() == [0, 1, 2, 0, 1, 2]
    chosen = table(label=list("aabbcc")).select([5, 0])  # rows by an index table
    chosen.save_to_disk(str(tmp_path / "one"))
    source = open_source(f"hf:{tmp_path}/one")
    assert [source[i].image for i in range(2)] == [png(5), png(0)]
    assert source.labels() == [1, 0]


def test_hf_reads_one_parquet_file(tmp_path):
    path = tmp_path / "a.parquet"
    table().to_parquet(str(path))
    assert len(open_source(f"hf:{path}")) == 6


def test_hf_names_broken_rows(tmp_path):
    # By pyarrow: the library refuses to write such rows, and a file may come without its metadata.
    images = [(b"", None), (None, None), (None, "/absent.jpg"), None, (png(), "x.png")]
    images = [image and dict(zip(("bytes", "path"), image)) for image in images]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(images, kind)}), tmp_path / "train.parquet")
    source = open_source(f"hf:{tmp_path}")
    assert source[4].image == png()
    for index, kind in enumerate(("empty file", "missing image", "missing file", "missing image")):
        with pytest.raises(BadExample) as caught:
            source[index]
        assert caught.value.kind == kind


def test_hf_says_in_one_line_what_cannot_be_read(tmp_path):
    with pytest.raises(
        UserError, match=r"download its Parquet files by hand into a folder and write hf:FOLDER"
    ) as caught:
        open_source("hf:nobody/nothing")
    assert "\n" not in str(caught.value)
    assert not is_present("hf:nobody/nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no .parquet or .arrow file"):
        open_source(f"hf:{tmp_path}/empty")
    write_files(tmp_path, {"bad/train.parquet": b"PAR1 not really"})
    with pytest.raises(UserError, match="the files cannot be read") as caught:
        open_source(f"hf:{tmp_path}/bad")
    assert "\n" not in str(caught.value)
    (tmp_path / "words").mkdir()
    datasets.Dataset.from_dict({"x": [1, 2]}).to_parquet(str(tmp_path / "words" / "train.parquet"))
    with pytest.raises(UserError, match=r"which column is the image\? Add \?image=COLUMN; it has x"):
        open_source(f"hf:{tmp_path}/words")


def test_hf_is_present_where_there_are_tables(tmp_path):
    write_files(tmp_path, {"shards/train/0.tar": b"x", "data/data/train-0.parquet": b"x", "disk/state.json": "{}"})
    assert not is_present(f"hf:{tmp_path}/shards")
    assert is_present(f"hf:{tmp_path}/data")
    assert is_present(f"hf:{tmp_path}/disk")
    assert is_present(f"hf:{tmp_path}/data/data/train-0.parquet")


def test_hf_leaves_the_progress_bars_as_they_were(tmp_path, capfd):
    from datasets.utils import are_progress_bars_disabled

    parquet(tmp_path)
    capfd.readouterr()
    before = are_progress_bars_disabled()
    open_source(f"hf:{tmp_path}")
    assert are_progress_bars_disabled() == before
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_hf_works_in_forked_processes(tmp_path):
    import torch

    source = open_source(f"hf:{parquet(tmp_path, label=list('aabbcc'))}")
    assert source[0].image == png(0)
    loader = torch.utils.data.DataLoader(source, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert [(example.image, example.label) for example in loader] == [(png(i), i // 2) for i in range(6)]


def test_hf_reads_real_photographs(real_data):
    spec = f"hf:{real_data}/cifar10"
    train, test = (open_source(spec, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (20_000, 10_000)
    assert train.classes[:3] == ("airplane", "automobile", "bird")
    assert [test.labels().count(label) for label in range(10)] == [1000] * 10
    assert len(set(train.ids())) == 20_000
    assert test[0].id == "test/truck/0770.jpg"
    assert test.classes[test[0].label] == "truck"
    assert test[0].image.startswith(b"\xff\xd8")
