"""Malformed input through the command line: one clear line each, the right exit status, and nothing else lost."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlbench.cli import main

GOOD = ("cat", "dog")


def image_bytes(seed: int, mode: str = "RGB", fmt: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, fmt)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with train and test, four good images a class and split."""
    for split in ("train", "test"):
        for label, name in enumerate(GOOD):
            for number in range(4):
                path = tmp_path / "images" / split / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(image_bytes(100 * label + 10 * (split == "test") + number))
    return tmp_path / "images"


def huge_png_header() -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000)))


def sixteen_bit_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray((np.arange(144, dtype=np.uint16) * 400).reshape(12, 12)).save(buffer, "PNG")
    return buffer.getvalue()


BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "text.jpg": (b"this is no picture\n", "not an image"),
    "zero.jpg": (b"", "empty file"),
    "cut.jpg": (image_bytes(1)[:-80], "truncated image"),
    "huge.png": (huge_png_header(), "image too large"),
}


@pytest.mark.parametrize("name", sorted(BAD_IMAGES))
def test_bad_image_is_named_and_counted_once(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, kind = BAD_IMAGES[name]
    (folder / "train" / "cat" / name).write_bytes(data)
    assert main(["data", "check", f"imagefolder:{folder}"]) == 1
    out = capsys.readouterr().out
    assert f"{kind}: 1" in out
    assert name in out
    assert "RGB 8" in out  # the eight good ones of this split are there all the same


@pytest.mark.parametrize("name", sorted(BAD_IMAGES))
def test_bad_test_image_fails_the_task_by_name(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, kind = BAD_IMAGES[name]
    (folder / "test" / "cat" / name).write_bytes(data)
    words = ["eval", "--model", "tests.verbs.toy_backbone:build", "--tasks", "knn", "--data", f"imagefolder:{folder}"]
    assert main([*words, "--results", str(folder.parent / "results"), "--workers", "0"]) == 1
    error = capsys.readouterr().err
    assert kind in error
    assert name in error


@pytest.mark.parametrize(
    ("name", "data", "note"),
    [("cmyk.jpg", image_bytes(2, "CMYK"), "CMYK"), ("deep.png", sixteen_bit_png(), "I;16")],
    ids=["cmyk", "16-bit"],
)
def test_odd_mode_is_converted_and_said(
    name: str, data: bytes, note: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train" / "dog" / name).write_bytes(data)
    assert main(["data", "check", f"imagefolder:{folder}"]) == 0
    out = capsys.readouterr().out
    assert note in out
    assert "conversions" in out


def test_truncated_tar_keeps_what_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w") as tar:
        for number in range(5):
            for suffix, content in (("jpg", image_bytes(number)), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[:6_000])
    assert main(["data", "check", f"wds:{cut}"]) == 1
    out = capsys.readouterr().out
    assert "truncated tar: 1" in out
    assert "cut.tar" in out
    assert "RGB" in out


def test_missing_class_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "test" / "bird").mkdir()
    (folder / "test" / "bird" / "0.jpg").write_bytes(image_bytes(7))
    assert main(["data", "check", f"imagefolder:{folder}"]) == 1
    assert "bird" in capsys.readouterr().err


def test_empty_folder_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nothing").mkdir()
    assert main(["data", "check", f"imagefolder:{tmp_path / 'nothing'}"]) == 2
    assert "nothing" in one_line(capsys)


class _Evil:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        import os

        return (os.system, (f"touch {self.trace}",))


def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, trace = tmp_path / "model.pt", tmp_path / "it-ran"
    path.write_bytes(pickle.dumps({"model": _Evil(trace)}))
    assert main(["eval", "--model", str(path), "--tasks", "linear/shapes"]) == 2
    assert "model.pt" in one_line(capsys)
    assert not trace.exists()


def test_unreadable_checkpoint_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ckpt.pt"
    path.write_bytes(b"PK\x03\x04 cut short")
    assert main(["eval", "--model", str(path), "--tasks", "linear/shapes"]) == 2
    assert "ckpt.pt" in one_line(capsys)


def test_unknown_key_in_a_study_names_file_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("title: t\narms: [{recipe: clip}]\ntasks: linear\nseed: [0]\n")
    assert main(["study", str(path)]) == 2
    line = one_line(capsys)
    assert "mine.yaml" in line
    assert "did you mean 'seeds'?" in line


def test_missing_file_names_its_neighbour(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ckpt.pt").write_bytes(b"")
    assert main(["eval", "--model", str(tmp_path / "ckpt.tp"), "--tasks", "linear/shapes"]) == 2
    assert "ckpt.pt" in one_line(capsys)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error
    assert len(error.splitlines()) == 1, error
    return error
