from __future__ import annotations

import gzip
import pickle

import pytest

from tests.data.making import png, write_files
from vlbench.cli import main
from vlbench.core.errors import BadExample, UserError
from vlbench.data.check import check_source
from vlbench.data.sources import is_present, list_splits, open_source

NAMES = "1.png\n2.png\n"


def multi30k(root, inner="", **files):
    own = {
        f"{inner}test_2016_flickr.txt": NAMES,
        f"{inner}test_2016_flickr.en": "a dog\na cat\n",
        f"{inner}test_2016_flickr.de.gz": gzip.compress("ein Hund\neine Kätze\n".encode()),
    }
    return write_files(root, own | {name.replace("__", "."): text for name, text in files.items()})


def test_multi30k_reads_texts_without_images(tmp_path):
    spec = f"multi30k:{multi30k(tmp_path / 'multi30k')}"
    assert not is_present(spec), "no task runs on texts alone"
    assert list_splits(spec) == ("test",)
    source = open_source(spec, "test")
    assert source.provides == {"text"}
    assert (len(source), source.ids(), source.labels()) == (2, ["1.png", "2.png"], None)
    assert source[1].texts == {"en": ("a cat",), "de": ("eine Kätze",)}
    assert source[1].image is None


def test_multi30k_reads_the_repository_s_own_layout_and_flickr_s_images(tmp_path):
    raw, lists = "data/task1/raw", "data/task1/image_splits"
    files = {f"{raw}/{split}.{lang}": "x\n" for split in ("train", "val", "test_2017_flickr") for lang in ("en", "de")}
    files |= {f"{lists}/{split}.txt": f"{split}.png\n" for split in ("train", "val", "test_2017_flickr")}
    write_files(tmp_path / "multi30k", {**files, "README.md": "x", f"{raw}/val.py": ""})
    write_files(tmp_path / "flickr30k/flickr30k-images", {"val.png": png(5)})
    spec = f"multi30k:{tmp_path}/multi30k"
    assert list_splits(spec) == ("train", "val", "test_2017_flickr")
    source = open_source(spec, "val")
    assert source.provides == {"text", "image"}
    assert source[0].image == png(5)
    with pytest.raises(BadExample, match=r"train\.png: missing file"):
        open_source(spec, "train")[0]


def test_multi30k_reads_several_captions_an_image(tmp_path):
    files = {f"val.{n}.{lang}": f"{lang}{n} a\n{lang}{n} b\n" for n in (1, 2, 3) for lang in ("en", "de")}
    write_files(tmp_path, {**files, "image_splits/val_images.txt": NAMES})
    source = open_source(f"multi30k:{tmp_path}", "val")
    assert source[1].texts == {"en": ("en1 b", "en2 b", "en3 b"), "de": ("de1 b", "de2 b", "de3 b")}


def many(root, n=5, present=()):
    """A split of ``n`` images, of which those numbered in ``present`` are there."""
    files = {"val.txt": "".join(f"{i}.png\n" for i in range(n)), "val.en": "a dog\n" * n}
    return write_files(root, files | {f"images/{i}.png": png(i) for i in present})


def test_multi30k_says_how_many_images_are_missing_and_names_the_first_three(tmp_path):
    source = open_source(f"multi30k:{many(tmp_path, present=[1])}", "val")
    assert source[1].image == png(1)
    with pytest.raises(BadExample) as caught:
        source[0]
    assert caught.value.kind == "missing file"
    assert str(caught.value) == (
        f"{tmp_path}/images/0.png: missing file: there is no such file; "
        f"4 of the split's 5 images are missing in {tmp_path}/images: 0.png, 2.png, 3.png, …"
    )
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), BadExample)


def test_multi30k_names_one_missing_image_without_counting(tmp_path):
    source = open_source(f"multi30k:{many(tmp_path, present=[0, 1, 2, 4])}", "val")
    with pytest.raises(BadExample, match=r"3\.png: missing file: there is no such file$"):
        source[3]
    (tmp_path / "images/4.png").write_bytes(b"")
    with pytest.raises(BadExample, match=r"no bytes$"):  # another fault is told as it is
        source[4]


def test_multi30k_counts_an_image_of_several_captions_once(tmp_path):
    files = {
        "test_2017_mscoco.en": "a\nb\nc\n",
        "test_2017_mscoco.txt": "x.png#7\nx.png#8\ny.png#9\n",
        "images/z.png": png(),
    }
    source = open_source(f"multi30k:{write_files(tmp_path, files)}", "test_2017_mscoco")
    with pytest.raises(BadExample, match=r"2 of the split's 2 images are missing in .*: x\.png, y\.png$"):
        source[1]


def test_multi30k_s_missing_images_are_bad_samples_of_a_check(tmp_path):
    report = check_source(open_source(f"multi30k:{many(tmp_path, present=[1])}", "val"))
    assert report.n_bad == report.bad["missing file"].count == 4
    assert len(report.bad["missing file"].examples) == 3


def test_multi30k_without_a_folder_of_images_is_bad_samples_and_readable_texts(tmp_path, capsys):
    folder = many(tmp_path / "multi30k")
    report = check_source(open_source(f"multi30k:{folder}", "val"))
    assert report.n_bad == report.bad["missing image"].count == report.n == 5
    assert report.bad["missing image"].examples[0] == (
        "0.png: no folder of images: none of images, flickr30k-images, flickr30k_images beside the texts; "
        "name Flickr30k's with ?images=DIR"
    )
    assert report.languages == {"en": 5}, "the texts are looked at all the same"
    assert main(["data", "check", f"multi30k:{folder}"]) == 1
    out = capsys.readouterr().out
    assert "none\n" not in out
    assert "missing image: 5" in out
    assert "?images=DIR" in out


def test_multi30k_whole_is_a_clean_check(tmp_path):
    report = check_source(open_source(f"multi30k:{many(tmp_path, present=range(5))}", "val"))
    assert (report.n_bad, report.n) == (0, 5)


def test_multi30k_takes_the_images_from_the_option(tmp_path):
    multi30k(tmp_path)
    write_files(tmp_path / "photos", {"1.png": png(1)})
    assert open_source(f"multi30k:{tmp_path}?images=photos", "test")[0].image == png(1)
    assert open_source(f"multi30k:{tmp_path}?images={tmp_path}/photos", "test")[0].image == png(1)
    with pytest.raises(UserError, match="no folder of images"):
        open_source(f"multi30k:{tmp_path}?images=nowhere", "test")


def test_multi30k_names_caption_and_image_of_the_coco_test_set(tmp_path):
    name = "COCO_val2014_1.png"
    files = {"test_2017_mscoco.en": "a\nb\n", "test_2017_mscoco.txt": f"{name}#7\n{name}#8\n", f"images/{name}": png(1)}
    source = open_source(f"multi30k:{write_files(tmp_path, files)}", "test_2017_mscoco")
    assert source.ids() == [f"{name}#7", f"{name}#8"]
    assert source[0].image == source[1].image == png(1)


def test_multi30k_cuts_lines_at_line_feeds_alone(tmp_path):
    multi30k(tmp_path, test_2016_flickr__en="a\u2028dog\x0bruns\na cat\r\n")
    source = open_source(f"multi30k:{tmp_path}", "test")
    assert source[0].texts["en"] == ("a\u2028dog\x0bruns",)
    assert source[1].texts["en"] == ("a cat",)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"test_2016_flickr.en": "a dog\n"}, r"test_2016_flickr\.en: 1 lines, but .*test_2016_flickr\.txt names 2"),
        ({"test_2016_flickr.de": "a\nb\nc\n"}, r"test_2016_flickr\.de: 3 lines, but .* names 2 images"),
        ({"test_2016_flickr.txt": "1.png\n1.png\n"}, r"\.txt: '1.png' stands in line 1 and again in line 2"),
        ({"test_2016_flickr.en": "a dog\n\n"}, r"test_2016_flickr\.en, line 2: it is empty"),
        ({"test_2016_flickr.en": b"\xff\xfe\n\n"}, "not UTF-8"),
        ({"test_2016_flickr.fr.gz": b"not gzip"}, r"\.fr\.gz: cannot be read"),
        ({"test_2016_flickr.fr.gz": gzip.compress(b"a\nb\n")[:-6]}, r"\.fr\.gz: cannot be read"),
        ({"test_2016_flickr.fr": ""}, r"\.fr: it has no lines"),
        ({"test_2016.1.en": "a\nb\n"}, "lie together; keep them apart"),
    ],
)
def test_multi30k_refuses_malformed_files_in_one_line(tmp_path, files, message):
    write_files(multi30k(tmp_path), files)
    with pytest.raises(UserError, match=message) as caught:
        open_source(f"multi30k:{tmp_path}", "test")
    assert "\n" not in str(caught.value)


def test_multi30k_names_what_is_absent(tmp_path):
    multi30k(tmp_path / "multi30k")
    (tmp_path / "multi30k/test_2016_flickr.txt").unlink()
    with pytest.raises(UserError, match=r"no list of image names test_2016_flickr\.txt"):
        open_source(f"multi30k:{tmp_path}/multi30k", "test")
    with pytest.raises(UserError, match="did you mean 'multi30k'"):
        open_source(f"multi30k:{tmp_path}/multi30", "test")
    with pytest.raises(UserError, match=r"there is no SPLIT\.LANG"):
        open_source(f"multi30k:{tmp_path}")
    assert not is_present(f"multi30k:{tmp_path}")


def test_multi30k_reads_the_real_texts_of_2016(real_data):
    folder = real_data / "multi30k"
    if not folder.is_dir():
        pytest.skip(f"no Multi30k texts at {folder}")
    source = open_source(f"multi30k:{folder}", "test")
    assert len(source) == len(set(source.ids())) == 1000
    assert source.ids()[0] == "1007129816.jpg"
    assert source[0].texts["en"] == ("A man in an orange hat starring at something.",)
    assert source[0].texts["cs"] == ("Muž v oranžovém klobouku na něco zírá.",)
    for index in range(1000):
        texts = source[index].texts
        assert set(texts) == {"en", "de", "fr", "cs"}
        assert all(len(captions) == 1 and captions[0] for captions in texts.values())
