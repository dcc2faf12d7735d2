"""Digests between runs: an image that has not changed is not read, and one that has is, however it was hidden."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.data.making import image_folder, png, write_files, write_tar
from tests.data.readers.test_coco import coco
from tests.data.readers.test_karpathy import flickr
from tests.data.readers.test_multi30k import multi30k
from tests.data.readers.test_objectnet import write_objectnet
from tests.data.readers.test_snli_ve import snli
from tests.data.readers.test_voc import voc
from vlbench.core.errors import BadExample
from vlbench.core.fingerprint import digest
from vlbench.data import remembered
from vlbench.data.digests import content_digests
from vlbench.data.images import IMAGE_EXTENSIONS, read_file
from vlbench.data.readers import annotations, files, objectnet, wds_source
from vlbench.data.readers.tarindex import read_members
from vlbench.data.sources import Subset, open_source
from vlbench.verbs.calls import evaluate


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own, and files that are old enough as soon as they are written."""
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remembered, "MARGIN_NS", 0)
    return tmp_path / "cache" / "digests"


@pytest.fixture
def read(monkeypatch):
    """What was read of images, in order: paths, of a member with its offset."""
    places = []

    def counted(path):
        places.append(str(path))
        return read_file(path)

    def counted_members(path, members):
        places.extend(f"{path}:{offset}" for name, (offset, _) in members.items() if name in IMAGE_EXTENSIONS)
        return read_members(path, members)

    for module in (files, annotations, objectnet):
        monkeypatch.setattr(module, "read_file", counted)
    monkeypatch.setattr(wds_source, "read_members", counted_members)
    return places


def shards(root: Path) -> Path:
    write_tar(root / "0.tar", {"a.png": png(1), "a.cls": b"0", "b.png": png(2), "b.cls": b"1"})
    write_tar(root / "1.tar", {"c.png": png(3), "c.cls": b"1", "c.txt": b"a dog"})
    return root


def table(root: Path) -> Path:
    return write_files(root, {"a.png": png(1), "b/c.png": png(2), "list": "filepath\ttitle\na.png\tx\nb/c.png\ty\n"})


def translated(root: Path) -> Path:
    return multi30k(write_files(root, {"images/1.png": png(1), "images/2.png": png(2)}))


def several_labels(root: Path) -> Path:
    return write_files(voc(root), {"JPEGImages/000007.jpg": png(7)})


FORMATS = {
    "imagefolder": lambda root: (f"imagefolder:{image_folder(root)}", "test"),
    "wds": lambda root: (f"wds:{shards(root)}", None),
    "coco": lambda root: (f"coco:{coco(root)}", "val"),
    "snli_ve": lambda root: (f"snli_ve:{snli(root)}", "test"),
    "karpathy": lambda root: (f"karpathy:{flickr(root)}", "test"),
    "multi30k": lambda root: (f"multi30k:{translated(root)}", "test"),
    "csv": lambda root: (f"csv:{table(root)}/list", None),
    "voc": lambda root: (f"voc:{several_labels(root)}", "train"),
    "objectnet": lambda root: (f"objectnet:{write_objectnet(root)}", None),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_second_opening_reads_no_image_and_finds_the_same(kind, tmp_path, read, cache, monkeypatch):
    opened = FORMATS[kind](tmp_path / "data")
    first = content_digests(open_source(*opened))
    assert len(set(read)) == len(read) == len(set(first.images))
    kept = next(cache.iterdir())
    before = kept.stat()
    read.clear()
    assert content_digests(open_source(*opened)) == first
    assert not read
    assert kept.stat().st_ino == before.st_ino, "nothing is new, nothing is written"
    shutil.rmtree(cache)
    monkeypatch.setattr(remembered, "MARGIN_NS", 10**18)
    assert content_digests(open_source(*opened)) == first, "as without any memory"
    assert not cache.exists()


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "objectnet"])
def test_an_example_without_its_image_is_the_example(kind, tmp_path):
    source = open_source(*FORMATS[kind](tmp_path))
    bare, whole = source.without_images(0), source[0]
    assert bare.image is None
    assert bare.texts == whole.texts
    assert (bare.id, bare.label, bare.regions, bare.extra.keys()) == (
        whole.id,
        whole.label,
        whole.regions,
        whole.extra.keys(),
    )
    place = source.image_files(0)["image"]
    data = read_file(place) if isinstance(place, str) else read_members(place.tar, {"x": place[1:]})["x"]
    assert data == whole.image


def test_a_second_evaluation_on_stored_features_reads_no_image(tmp_path, read):
    image_folder(tmp_path / "folder")
    rows = "".join(f"{number}.png\tone of {number}\n" for number in range(20))
    images = {f"table/{number}.png": png(number) for number in range(20)}
    write_files(tmp_path, images | {"table/list.csv": f"filepath\ttitle\n{rows}"})
    call = {"model": "tests.verbs.toy_backbone:build", "device": "cpu", "workers": 0, "force": True}
    for is_read in (True, False):
        for task, spec in (("knn", f"imagefolder:{tmp_path}/folder"), ("retrieval", f"csv:{tmp_path}/table/list.csv")):
            read.clear()
            assert evaluate(tasks=task, data=spec, results=str(tmp_path / "results"), **call) == 0
            assert bool(read) == is_read, task


def later(path: Path, before: os.stat_result) -> None:
    """Give the file its old times back, once the clock of the file system has gone on."""
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def other_bytes(data: bytes) -> bytes:
    """As many, the last one another."""
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize("how", ["in place", "by rename"])
def test_an_image_of_the_old_size_and_time_is_read_anew(how, tmp_path, read):
    folder = image_folder(tmp_path / "data")
    first = content_digests(open_source(f"imagefolder:{folder}", "test"))
    image = folder / "test/dog/1.png"
    before, changed = image.stat(), other_bytes(image.read_bytes())
    read.clear()
    if how == "in place":
        with image.open("r+b") as handle:
            handle.write(changed)
    else:
        (folder / "new.part").write_bytes(changed)
        (folder / "new.part").replace(image)
    later(image, before)
    found = content_digests(open_source(f"imagefolder:{folder}", "test"))
    assert read == [str(image)], "and no other"
    assert [a == b for a, b in zip(found.images, first.images)] == [True] * 4 + [False, True]
    assert found.images[4] == digest(changed)
    assert found.examples[4] != first.examples[4]


def test_a_tar_of_the_old_size_and_time_is_read_anew(tmp_path, read):
    root = shards(tmp_path / "data")
    first = content_digests(open_source(f"wds:{root}"))
    tar = root / "0.tar"
    before = tar.stat()
    write_tar(tar, {"a.png": png(1), "a.cls": b"0", "b.png": other_bytes(png(2)), "b.cls": b"1"})
    later(tar, before)
    read.clear()
    found = content_digests(open_source(f"wds:{root}"))
    assert len(read) == 2, "both of this tar, none of the other"
    assert [a == b for a, b in zip(found.images, first.images)] == [True, False, True]
    assert found.images[1] == digest(other_bytes(png(2)))


@pytest.mark.parametrize("kind", ["imagefolder", "wds"])
def test_a_file_that_was_written_just_now_is_not_remembered(kind, tmp_path, read, cache, monkeypatch):
    monkeypatch.setattr(remembered, "MARGIN_NS", 1000 * 10**9)
    opened, now = FORMATS[kind](tmp_path / "data"), time.time_ns

    def reads(seconds):
        """Whether images are read so many seconds after they were written."""
        monkeypatch.setattr(time, "time_ns", lambda: now() + seconds * 10**9)
        read.clear()
        found = content_digests(open_source(*opened))
        assert len(read) in (0, len(found.images))
        return bool(read)

    assert reads(0)
    assert reads(500)
    assert not cache.exists()
    assert reads(1200)
    assert not reads(1200)
    assert reads(500), "what is remembered is not believed of a file that may change unseen"
    assert reads(-5000), "nor of one from the future"
    assert not reads(2000)


@pytest.mark.parametrize("seconds", [-(10**6), 10**6])
def test_neither_time_of_a_file_hides_that_it_is_young(seconds, tmp_path, read, monkeypatch):
    folder = image_folder(tmp_path / "data")
    when = time.time_ns() + seconds * 10**9
    for image in folder.rglob("*.png"):
        os.utime(image, ns=(when, when))
    if seconds < 0:  # then what tells is when that was said
        monkeypatch.setattr(remembered, "MARGIN_NS", 100 * 10**9)
    for _ in range(2):
        read.clear()
        content_digests(open_source(f"imagefolder:{folder}", "test"))
        assert len(read) == 6


def test_what_changes_while_it_is_read_is_not_remembered(tmp_path, cache, monkeypatch):
    folder, root = image_folder(tmp_path / "a"), shards(tmp_path / "b")
    changing = {str(folder / "test/cat/1.png"), str(root / "0.tar")}

    def touching(function):
        def reading(path, *members):
            data = function(path, *members)
            if str(path) in changing:
                later(Path(path), Path(path).stat())
            return data

        return reading

    for module, name in ((files, "read_file"), (wds_source, "read_members")):
        monkeypatch.setattr(module, name, touching(getattr(module, name)))
    for spec, split, unchanged in ((f"imagefolder:{folder}", "test", 5), (f"wds:{root}", None, 1)):
        content_digests(open_source(spec, split))
        (kept,) = cache.iterdir()
        with np.load(kept) as arrays:
            assert arrays["states"].shape == (unchanged, 16), spec
        kept.unlink()


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "other arrays", "pickled", "a folder"])
def test_a_damaged_file_is_made_again(damage, tmp_path, read, cache):
    folder = image_folder(tmp_path / "data")
    first = content_digests(open_source(f"imagefolder:{folder}", "test"))
    kept = next(cache.iterdir())
    data = kept.read_bytes()
    if damage == "a folder":
        kept.unlink()
        kept.mkdir()
    elif damage in ("other arrays", "pickled"):
        states = np.zeros((3, 15), np.uint8) if damage == "other arrays" else np.array([{}], dtype=object)
        with kept.open("wb") as handle:
            np.savez(handle, states=states, digests=np.zeros((3, 16), np.uint8))
    else:
        middle = len(data) // 3
        flipped = data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1 :]
        kept.write_bytes({"empty": b"", "cut": data[: len(data) // 2], "flipped": flipped}[damage])
    read.clear()
    assert content_digests(open_source(f"imagefolder:{folder}", "test")) == first
    assert len(read) == 6
    if damage != "a folder":
        assert kept.read_bytes() == data


def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(tmp_path, read, monkeypatch):
    write_files(tmp_path, {"no-folder": "x"})
    monkeypatch.setenv("VLBENCH_CACHE", str(tmp_path / "no-folder"))
    folder = image_folder(tmp_path / "data")
    for _ in range(2):
        read.clear()
        content_digests(open_source(f"imagefolder:{folder}", "test"))
        assert len(read) == 6


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "wds"])
def test_an_image_that_is_gone_is_an_error_as_before(kind, tmp_path, read, monkeypatch):
    opened = FORMATS[kind](tmp_path / "data")
    for state in ("missing file", "empty file", "unreadable file"):
        monkeypatch.setattr(remembered, "MARGIN_NS", 0)
        content_digests(open_source(*opened))
        sources = [open_source(*opened) for _ in range(2)]
        gone = Path(read[-1])
        data = gone.read_bytes()
        gone.unlink()
        if state == "empty file":
            gone.write_bytes(b"")
        if state == "unreadable file":
            gone.mkdir()
        lines = []
        for source, margin in zip(sources, (0, 10**18)):
            monkeypatch.setattr(remembered, "MARGIN_NS", margin)
            with pytest.raises(BadExample, match=state) as caught:
                content_digests(source)
            lines.append(str(caught.value))
        assert str(gone) in lines[0]
        assert lines[0] == lines[1], "as without any memory"
        gone.rmdir() if gone.is_dir() else gone.unlink(missing_ok=True)
        gone.write_bytes(data)


def test_a_tar_that_is_gone_is_an_error_as_before(tmp_path):
    root = shards(tmp_path / "data")
    content_digests(open_source(f"wds:{root}"))
    source = open_source(f"wds:{root}")
    (root / "1.tar").unlink()
    with pytest.raises(BadExample, match=r"1\.tar: unreadable file"):
        content_digests(source)


def test_wrong_annotations_are_errors_also_where_images_are_remembered(tmp_path):
    tar = write_tar(tmp_path / "0.tar", {"a.png": png(1), "a.cls": b"0"})
    content_digests(open_source(f"wds:{tar}"))
    before = tar.stat()
    write_tar(tar, {"a.png": png(1), "a.cls": b"x"})
    later(tar, before)
    for _ in range(2):
        with pytest.raises(BadExample, match="bad label"):
            content_digests(open_source(f"wds:{tar}"))


def test_a_moved_folder_has_the_same_digests_and_is_read_again(tmp_path, read):
    link = tmp_path / "link"
    image_folder(tmp_path / "a")
    found = []
    for name, other in (("a", "b"), ("b", "c")):
        link.symlink_to(tmp_path / name)
        for spec in (f"imagefolder:{tmp_path / name}", f"imagefolder:{link}"):
            read.clear()
            found.append(content_digests(open_source(spec, "test")))
            assert len(read) == 6, "under its own name and under the same"
        (tmp_path / name).rename(tmp_path / other)
        link.unlink()
    assert found == found[:1] * 4


def test_only_what_a_source_has_is_kept_of_it(tmp_path, read, cache):
    folder = image_folder(tmp_path / "data")

    def kept():
        content_digests(open_source(f"imagefolder:{folder}", "test"))
        with np.load(next(cache.iterdir())) as arrays:
            return {name: array.shape for name, array in arrays.items()}

    assert kept() == {"states": (6, 16), "digests": (6, 16)}
    for name in ("cat/0.png", "cat/1.png"):
        (folder / "test" / name).unlink()
    write_files(folder, {"test/dog/9.png": png(99)})
    assert kept() == {"states": (5, 16), "digests": (5, 16)}
    assert len(list(cache.iterdir())) == 1


def test_a_part_of_a_source_shares_what_is_kept_of_the_whole(tmp_path, read):
    spec = f"imagefolder:{image_folder(tmp_path / 'data')}/test"

    def digested(*indices):
        read.clear()
        source = open_source(spec)
        found = content_digests(Subset(Subset(source, range(6), split="all"), indices, split="part"))
        assert list(found.images) == [
            digest(Path(source.image_files(index)["image"]).read_bytes()) for index in indices
        ]
        return len(read)

    assert digested(0, 1) == 2
    assert digested(4, 1) == 1, "one is new"
    assert digested(0, 1, 4) == 0, "and the others are still there"
    read.clear()
    content_digests(open_source(spec))
    assert len(read) == 3
    assert digested(5, 2, 3) == 0


def test_what_was_read_before_an_error_is_remembered(tmp_path, read):
    folder = image_folder(tmp_path / "data")
    (folder / "test/dog/2.png").write_bytes(b"")
    with pytest.raises(BadExample, match="empty file"):
        content_digests(open_source(f"imagefolder:{folder}", "test"))
    (folder / "test/dog/2.png").write_bytes(png(7))
    read.clear()
    content_digests(open_source(f"imagefolder:{folder}", "test"))
    assert read == [str(folder / "test/dog/2.png")]


def test_one_state_has_one_image(tmp_path):
    """Links, names below one folder and members of a tar: what differs in its bytes differs in its state."""
    folder = image_folder(tmp_path / "data", splits=("test",))
    write_files(tmp_path, {"else/x.png": png(50)})
    (folder / "test/cat/link.png").symlink_to(tmp_path / "else/x.png")
    with suppress(OSError):
        os.link(folder / "test/dog/0.png", folder / "test/dog/hard.png")
    for _ in range(2):
        source = open_source(f"imagefolder:{folder}/test")
        read = [digest(Path(folder, "test", name).read_bytes()) for name in source.ids()]
        assert list(content_digests(source).images) == read
    (tmp_path / "else/x.png").write_bytes(other_bytes(png(50)))
    source = open_source(f"imagefolder:{folder}/test")
    assert digest(other_bytes(png(50))) in content_digests(source).images
