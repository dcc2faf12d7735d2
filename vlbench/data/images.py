"""From the bytes of an image file to pixels, or to a clear account of why not.

Orientation tags of EXIF are not applied: torchvision, open_clip and PIL's own ``open`` do not apply them either, so
the published numbers were made without.
"""

from __future__ import annotations

import functools
import io
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from vlbench.core.errors import BadExample
from vlbench.core.types import Example, Source

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "ppm", "pgm", "tif", "tiff")
"""Lower case, without the dot, in the order in which a reader prefers them."""

MAX_PIXELS = 200_000_000

# Named, so that no bytes reach PIL's other plug-ins (EPS would start Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "JPEG2000", "AVIF")
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_16_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N")
_EXIF_ORIENTATION = 0x0112

_strict_lock = threading.Lock()


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image file says."""

    mode: str
    width: int
    height: int
    format: str
    note: str
    """What ``decode`` does beyond plain decoding (``"CMYK to RGB"``), or ``""``."""


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of one file. Raises BadExample ``missing file``, ``unreadable file`` or ``empty file``."""
    try:
        with open(path, "rb", buffering=0) as handle:  # noqa: PTH123 - a Path would cost as much as the read
            data = handle.read()
    except FileNotFoundError:
        raise BadExample("missing file", os.fspath(path), "there is no such file") from None
    except OSError as error:
        raise BadExample("unreadable file", os.fspath(path), error.strerror or str(error)) from None
    return not_empty(data, where=os.fspath(path))


def not_empty(data: bytes, *, where: str) -> bytes:
    """``data``, unless it is empty: then BadExample ``empty file``."""
    if not data:
        raise BadExample("empty file", where, "the image has no bytes")
    return data


def decode(data: bytes, *, where: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode to an RGB image of 8 bits.

    Grey, CMYK, palette and alpha images are converted as ``PIL.Image.convert("RGB")`` does (transparency is dropped,
    not blended). Integer images of more than 8 bits are scaled (65535 → 255) where PIL would clip them to white.

    Args:
        data: the bytes of the file.
        where: how to call it in an error.
        max_pixels: a larger image is refused from its header, before any pixel is decoded. PIL's own limit
            (``2 * Image.MAX_IMAGE_PIXELS``) holds as well.

    Raises:
        BadExample: ``empty file``, ``not an image``, ``truncated image`` or ``image too large``.
    """
    image = _open(data, where=where, max_pixels=max_pixels)
    try:
        with _strict():
            image.load()
            return _to_rgb(image)
    except MemoryError:
        raise BadExample(
            "image too large", where, f"{image.width} x {image.height} pixels do not fit in memory"
        ) from None
    except Exception as error:  # PIL's plug-ins raise a dozen types on damaged data
        raise BadExample("truncated image", where, str(error) or type(error).__name__) from None


def image_at(source: Source, index: int) -> tuple[Example, Image.Image]:
    """The example and its image, decoded. Raises BadExample, also where it has none, naming source and split."""
    example = source[index]
    where = f"{source.spec} ({source.split}): {example.id}"
    if example.image is None:
        raise BadExample("missing image", where, "this example has no image")
    return example, decode(example.image, where=where)


def inspect(data: bytes, where: str, *, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """What the header says, without decoding a pixel. Raises BadExample where it cannot be read."""
    image = _open(data, where=where, max_pixels=max_pixels)
    return ImageInfo(image.mode, image.width, image.height, image.format or "?", _note(image))


def _open(data: bytes, *, where: str, max_pixels: int) -> Image.Image:
    not_empty(data, where=where)
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError as error:
        reason, _, _ = str(error).partition(",")  # the rest of PIL's message speaks of an attack
        raise BadExample("image too large", where, reason) from None
    except Exception as error:  # UnidentifiedImageError for the most part; some plug-ins raise others
        if data.startswith(_MAGIC) or (data.startswith(b"RIFF") and data[8:12] == b"WEBP"):
            raise BadExample("truncated image", where, f"its header is cut or damaged ({len(data)} bytes)") from None
        known = isinstance(error, UnidentifiedImageError)
        reason = "no known image format" if known else f"{type(error).__name__}: {error}"
        raise BadExample("not an image", where, reason) from None
    if image.width * image.height > max_pixels:
        reason = f"{image.width} x {image.height} pixels; the limit is {max_pixels:,}"
        raise BadExample("image too large", where, reason)
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    """The formats of ``_FORMATS`` that this build of PIL can open."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode in _16_BIT_MODES or image.mode in ("I", "F"):
        return _scaled(np.asarray(image))
    # Only the colour of the palette counts; PIL warns about (and then drops) a transparency table.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def _scaled(values_HW: np.ndarray) -> Image.Image:
    """Grey values of more than 8 bits as RGB.

    White is 65535 for integers and 1 for floats, or the largest value where that is larger: a 32-bit image says
    nowhere what its white is.
    """
    usual = 1.0 if np.issubdtype(values_HW.dtype, np.floating) else 65535.0
    values_HW = np.nan_to_num(values_HW.astype(np.float64), posinf=usual, neginf=0.0)
    white = max(usual, float(values_HW.max(initial=0.0)))
    grey_HW = np.clip(np.rint(values_HW * (255.0 / white)), 0, 255).astype(np.uint8)
    return Image.fromarray(grey_HW).convert("RGB")


def _note(image: Image.Image) -> str:
    notes = []
    if image.mode == "CMYK":
        notes.append("CMYK to RGB")
    elif image.mode in _16_BIT_MODES or image.mode in ("I", "F"):
        notes.append("scaled to 8 bits")
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        notes.append("transparency dropped")
    with suppress(Exception):  # damaged tags do not make the pixels unreadable
        if getattr(image, "n_frames", 1) > 1:
            notes.append("first frame of several")
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            notes.append("EXIF orientation not applied")
    return "; ".join(notes)


@contextmanager
def _strict() -> Iterator[None]:
    """Truncated images fail, whatever another library has set PIL's global switch to."""
    if not ImageFile.LOAD_TRUNCATED_IMAGES:
        yield
        return
    with _strict_lock:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = True
