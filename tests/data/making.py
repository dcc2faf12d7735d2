"""Small files of every kind that the readers meet."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int = 0, height: int = 12, width: int = 10) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(seed: int = 0, height: int = 12, width: int = 10) -> bytes:
    return encoded(pixels(seed, height, width))


def huge_png_header(side: int = 60_000) -> bytes:
    """A PNG that claims ``side`` x ``side`` pixels and carries a few bytes of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def write_tar(path: Path, members: Mapping[str, bytes], *, end: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    if not end:
        data = path.read_bytes()
        path.write_bytes(data.rstrip(b"\0") + b"\0" * (-len(data.rstrip(b"\0")) % 512))
    return path


def write_files(root: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def image_folder(root: Path, *, splits: tuple[str, ...] = ("train", "test"), per_class: int = 3) -> Path:
    """Two classes, different images everywhere."""
    seed = 0
    for split in splits:
        for name in ("cat", "dog"):
            for i in range(per_class):
                seed += 1
                write_files(root, {f"{split}/{name}/{i}.png": png(seed)})
    return root
