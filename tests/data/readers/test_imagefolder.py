from __future__ import annotations

import pickle
import shutil

import pytest

from tests.data.making import image_folder, png, write_files
from vlbench.core.errors import BadExample, UserError
from vlbench.data.sources import is_present, list_splits, open_source


def test_imagefolder_reads_split_folders(tmp_path):
    folder = image_folder(tmp_path, splits=("train", "validation", "test"))
    assert list_splits(f"imagefolder:{folder}") == ("train", "val", "test")
    source = open_source(f"imagefolder:{folder}", "val")
    assert source.classes == ("cat", "dog")
    assert source.ids() == ["cat/0.png", "cat/1.png", "cat/2.png", "dog/0.png", "dog/1.png", "dog/2.png"]
    assert source.labels() == [0, 0, 0, 1, 1, 1]
    example = source[4]
    assert (example.id, example.label) == ("dog/1.png", 1)
    assert example.image == (folder / "validation/dog/1.png").read_bytes()
    assert source.provides == {"image", "label"}


def test_imagefolder_reads_unsplit_and_nested_folders(tmp_path):
    files = {
        "dog/a.JPG": png(1),
        "dog/deep/er/b.webp": png(2),
        "cat/c.png": png(3),
        "cat/notes.txt": "no image",
        "cat/.hidden.png": b"",
        ".git/x.png": b"",
    }
    source = open_source(f"imagefolder:{write_files(tmp_path, files)}")
    assert list_splits(f"imagefolder:{tmp_path}") == ()
    assert source.split == "all"
    assert source.classes == ("cat", "dog")
    assert source.ids() == ["cat/c.png", "dog/a.JPG", "dog/deep/er/b.webp"]


def test_imagefolder_takes_the_classes_from_train(tmp_path):
    folder = image_folder(tmp_path)
    shutil.rmtree(folder / "test" / "cat")
    source = open_source(f"imagefolder:{folder}", "test")
    assert source.classes == ("cat", "dog")
    assert source.labels() == [1, 1, 1]


def test_imagefolder_refuses_a_class_that_train_lacks(tmp_path):
    folder = image_folder(tmp_path)
    write_files(folder, {"test/cats/0.png": png()})
    with pytest.raises(UserError, match=r"test/cats: this class is missing in .*train; .*did you mean 'cat'"):
        open_source(f"imagefolder:{folder}", "test")
    assert len(open_source(f"imagefolder:{folder}", "train")) == 6


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"readme.txt": ""}, "no class folders"),
        ({"cat/a.txt": "", "dog/b.txt": ""}, "no image in its class folders; looked for jpg"),
        ({"cat/a.png": b"x", "dog/b.txt": ""}, "dog: this class folder holds no image"),
        ({"cat/a.png": b"x", "stray.png": b"x"}, r"stray.png: 1 image\(s\) lie beside the class folders"),
        ({"train/cat/a.png": b"x", "training/cat/a.png": b"x"}, "both mean the train split"),
    ],
)
def test_imagefolder_refuses_folders_that_would_mislead(tmp_path, files, message):
    write_files(tmp_path, files)
    with pytest.raises(UserError, match=message):
        open_source(f"imagefolder:{tmp_path}")


def test_imagefolder_names_an_absent_folder_and_its_neighbour(tmp_path):
    image_folder(tmp_path / "clothing")
    with pytest.raises(UserError, match="did you mean 'clothing'"):
        open_source(f"imagefolder:{tmp_path}/cloting")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_source(f"imagefolder:{tmp_path}/file")


def test_imagefolder_raises_bad_examples_one_by_one(tmp_path):
    folder = image_folder(tmp_path)
    (folder / "train/cat/0.png").write_bytes(b"")
    source = open_source(f"imagefolder:{folder}")
    (folder / "train/cat/1.png").unlink()
    for index, kind in ((0, "empty file"), (1, "missing file")):
        with pytest.raises(BadExample) as caught:
            source[index]
        assert caught.value.kind == kind
        assert caught.value.where.endswith(f"train/cat/{index}.png")
    assert source[2].image
    assert pickle.loads(pickle.dumps(source))[2] == source[2]


def test_imagefolder_is_present_where_class_folders_hold_images(tmp_path):
    write_files(tmp_path, {"shards/train/0.tar": b"x", "table/data/0.parquet": b"x", "loose/1.png": png()})
    assert not any(is_present(f"imagefolder:{tmp_path}/{name}") for name in ("shards", "table", "loose", "nowhere"))
    write_files(tmp_path, {"flat/cat/1.png": png(), "split/val/cat/deep/1.JPEG": png()})
    assert is_present(f"imagefolder:{tmp_path}/flat")
    assert is_present(f"imagefolder:{tmp_path}/split")


def test_imagefolder_reads_real_photographs(real_data):
    spec = f"imagefolder:{real_data}/clothing"
    sizes = {split: len(open_source(spec, split)) for split in list_splits(spec)}
    assert sizes == {"train": 3068, "val": 341, "test": 372}
    assert open_source(spec).classes == (
        "dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt",
    )  # fmt: skip
