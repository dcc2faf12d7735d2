from __future__ import annotations

import tracemalloc
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.data.making import encoded, huge_png_header, pixels, png
from vlbench.core.errors import BadExample
from vlbench.core.types import Example
from vlbench.data.images import decode, image_at, inspect, read_file


def kind_of(data: bytes, **options: int) -> str:
    with pytest.raises(BadExample) as caught:
        decode(data, where="a/b.jpg", **options)
    assert caught.value.where == "a/b.jpg"
    assert "\n" not in str(caught.value)
    return caught.value.kind


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_decode_agrees_with_pil(kind):
    data = encoded(pixels(1, 40, 30), kind)
    import io

    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    image = decode(data, where="x")
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), expected)


def test_decode_names_what_is_not_an_image():
    assert kind_of(b"") == "empty file"
    assert kind_of(b"a text file renamed to .jpg\n" * 40) == "not an image"
    assert kind_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n") == "not an image"
    assert kind_of(b"\0" * 500) == "not an image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_decode_refuses_truncated_images(kind, share):
    data = encoded(pixels(2, 64, 64), kind)
    assert kind_of(data[: max(12, int(len(data) * share))]) in ("truncated image", "not an image")
    assert kind_of(data[: int(len(data) * 0.5)]) == "truncated image"


def test_decode_refuses_truncated_images_whatever_the_global_switch(monkeypatch):
    data = encoded(pixels(2, 64, 64), "JPEG")[:-300]
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert kind_of(data) == "truncated image"
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_decode_refuses_a_huge_image_from_its_header():
    data = huge_png_header()
    tracemalloc.start()
    try:
        assert kind_of(data) == "image too large"
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    with pytest.raises(BadExample, match="too large"):
        inspect(data, "x")
    assert kind_of(png(0, 20, 20), max_pixels=399) == "image too large"
    assert decode(png(0, 20, 20), where="x", max_pixels=400).size == (20, 20)


def test_decode_converts_cmyk():
    cmyk = Image.fromarray(pixels(3, 16, 16)).convert("CMYK")
    data = encoded(cmyk, "JPEG", quality=95)
    image = decode(data, where="x")
    # PIL's JPEG writer keeps CMYK as it is, so the colours must come back up to compression.
    difference = np.asarray(image, dtype=int) - np.asarray(cmyk.convert("RGB"), dtype=int)
    assert image.mode == "RGB"
    assert np.abs(difference).mean() < 20
    assert inspect(data, "x").note == "CMYK to RGB"
    assert inspect(data, "x").mode == "CMYK"


def test_decode_scales_sixteen_bits_instead_of_clipping():
    ramp_HW = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    data = encoded(Image.fromarray(ramp_HW))
    grey = np.asarray(decode(data, where="x"))
    np.testing.assert_array_equal(grey[..., 0].ravel(), np.arange(256))
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    assert inspect(data, "x").note == "scaled to 8 bits"


def test_decode_scales_32_bit_integers_and_floats():
    integers = Image.fromarray(np.array([[0, 65535], [131070, 32768]], dtype=np.int32))
    np.testing.assert_array_equal(
        np.asarray(decode(encoded(integers, "TIFF"), where="x"))[..., 0], [[0, 128], [255, 64]]
    )
    floats = Image.fromarray(np.array([[0.0, 1.0], [0.5, np.nan]], dtype=np.float32))
    np.testing.assert_array_equal(np.asarray(decode(encoded(floats, "TIFF"), where="x"))[..., 0], [[0, 255], [128, 0]])


def test_decode_handles_palettes_with_transparency_as_pil_does():
    palette = Image.fromarray(pixels(4, 16, 16)).quantize(8)
    data = encoded(palette, transparency=bytes([0, 128] + [255] * 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = decode(data, where="x")
    np.testing.assert_array_equal(np.asarray(image), np.asarray(palette.convert("RGB")))
    assert inspect(data, "x").note == "transparency dropped"


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P"])
def test_decode_makes_rgb_of_every_mode(mode):
    image = Image.fromarray(pixels(5, 16, 16)).convert(mode)
    decoded = decode(encoded(image), where="x")
    np.testing.assert_array_equal(np.asarray(decoded), np.asarray(image.convert("RGB")))


def test_decode_does_not_turn_by_exif_and_inspect_says_so():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(pixels(6, 8, 16), "JPEG", exif=exif)
    assert decode(data, where="x").size == (16, 8)
    assert inspect(data, "x").note == "EXIF orientation not applied"


def test_inspect_reads_the_header_alone():
    data = encoded(pixels(7, 64, 48), "JPEG")
    info = inspect(data[:700], "x")  # its pixels are cut off
    assert (info.mode, info.width, info.height, info.format, info.note) == ("RGB", 48, 64, "JPEG", "")


def test_read_file_names_the_kind(tmp_path):
    (tmp_path / "zero.jpg").write_bytes(b"")
    for name, kind in (("zero.jpg", "empty file"), ("absent.jpg", "missing file"), (".", "unreadable file")):
        with pytest.raises(BadExample) as caught:
            read_file(tmp_path / name)
        assert caught.value.kind == kind


def test_image_of_a_source_is_told_by_source_and_split_where_it_cannot_be_read():
    examples = [Example("a", image=png(1)), Example("b"), Example("c", image=png(1)[:60])]

    class Source(SimpleNamespace):
        def __getitem__(self, index):
            return examples[index]

    source = Source(spec="wds:x", split="test")
    example, image = image_at(source, 0)
    assert (example.id, image.mode, image.size) == ("a", "RGB", (10, 12))
    for index, kind, where in ((1, "missing image", "wds:x (test): b"), (2, "truncated image", "wds:x (test): c")):
        with pytest.raises(BadExample) as caught:
            image_at(source, index)
        assert (caught.value.kind, caught.value.where) == (kind, where)
