from __future__ import annotations

import numpy as np
from PIL import Image

from tests.data.making import encoded, huge_png_header, image_folder, pixels, png, write_files, write_tar
from vlbench.data.check import Spread, check_source
from vlbench.data.sources import open_source


def test_check_source_counts_what_is_there(tmp_path):
    folder = image_folder(tmp_path, splits=("train",))
    write_files(folder, {"train/dog/wide.jpg": encoded(pixels(50, 20, 40), "JPEG"), "train/dog/grey.png": grey()})
    report = check_source(open_source(f"imagefolder:{folder}"))
    assert (report.n, report.n_bad, report.split) == (8, 0, "train")
    assert report.modes == {"RGB": 7, "L": 1}
    assert report.formats == {"PNG": 7, "JPEG": 1}
    assert report.width == Spread(10, 10, 40)
    assert report.height == Spread(12, 12, 20)
    assert report.classes == {"dog": 5, "cat": 3}
    assert report.languages == {}
    assert report.text_length is None


def grey() -> bytes:
    return encoded(Image.fromarray(pixels(60)).convert("L"))


def test_check_source_names_bad_samples_by_kind(tmp_path):
    jpeg = encoded(pixels(1, 64, 64), "JPEG")
    files = {
        "cat/a.jpg": jpeg[: len(jpeg) // 2],
        "cat/b.jpg": b"a text file\n" * 20,
        "cat/c.jpg": b"",
        "cat/d.png": huge_png_header(),
        "cat/e.png": png(),
        **{f"cat/zero{i}.jpg": b"" for i in range(4)},
    }
    report = check_source(open_source(f"imagefolder:{write_files(tmp_path, files)}"), max_examples=2)
    assert {kind: problem.count for kind, problem in report.bad.items()} == {
        "truncated image": 1, "not an image": 1, "empty file": 5, "image too large": 1,
    }  # fmt: skip
    assert report.n_bad == 8
    assert len(report.bad["empty file"].examples) == 2
    assert report.bad["empty file"].examples[0].startswith(f"{tmp_path}/cat/c.jpg: ")
    assert report.bad["truncated image"].examples[0].startswith("cat/a.jpg: ")
    assert report.modes == {"RGB": 1}


def test_check_source_lists_conversions_as_notes_not_as_bad(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "cat/cmyk.jpg": encoded(Image.fromarray(pixels(1)).convert("CMYK"), "JPEG"),
        "cat/deep.png": encoded(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16))),
        "cat/clear.png": encoded(Image.fromarray(pixels(2)).convert("RGBA")),
        "cat/turned.jpg": encoded(pixels(3), "JPEG", exif=exif),
    }
    report = check_source(open_source(f"imagefolder:{write_files(tmp_path, files)}"))
    assert report.n_bad == 0
    assert report.notes == {
        "CMYK to RGB": 1, "scaled to 8 bits": 1, "transparency dropped": 1, "EXIF orientation not applied": 1,
    }  # fmt: skip


def test_check_source_finds_missing_texts_and_duplicates(tmp_path):
    members = {"a.png": png(1), "a.txt": b"four", "b.png": png(2), "b.txt": b" \n", "c.png": png(1), "c.txt": b"sixsix"}
    members |= {"d.txt": b"no image", "e.png": png(3), "e.json": b'{"captions": {"de": ["x", "y"]}}'}
    report = check_source(open_source(f"wds:{write_tar(tmp_path / 'a.tar', members)}"))
    assert (report.missing["text"].count, report.missing["text"].examples) == (1, ["b"])
    assert report.bad["missing image"].examples[0].startswith("d: ")
    assert (report.duplicates, report.duplicate_examples) == (1, ["c = a"])
    assert report.languages == {"de": 2, "en": 2}
    assert report.text_length == Spread(1, 2.5, 6)


def test_check_source_counts_a_truncated_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(5)}, end=False)
    report = check_source(open_source(f"wds:{path}"))
    assert report.bad["truncated tar"].count == 1
    assert report.n == 6


def test_check_source_reports_progress(tmp_path):
    done: list[int] = []
    check_source(open_source(f"imagefolder:{image_folder(tmp_path)}"), progress=done.append)
    assert done == list(range(1, 7))
