"""Pixels: exact resampling, grey ↔ RGB, and each kind of image file."""

from __future__ import annotations

import io

import numpy as np
import pytest
from data_helpers import bomb_png, png
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from privimage_fast.data import DataError
from privimage_fast.data.convert import decode_image, resample, to_channels

LIMIT = 2**20


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@settings(max_examples=25, deadline=None)
@given(factor=st.integers(2, 6), target=st.integers(8, 20), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_shrinking_by_a_whole_factor_is_the_block_mean(factor, target, channels, seed):
    side = factor * target
    images = np.random.default_rng(seed).integers(0, 256, (2, side, side, channels), dtype=np.uint8)
    blocks = images.reshape(2, target, factor, target, factor, channels).astype(np.int64).sum(axis=(2, 4))
    expected = (2 * blocks + factor**2) // (2 * factor**2)  # the mean, halves taken up, in whole numbers
    np.testing.assert_array_equal(resample(images, target), expected)


@settings(max_examples=30, deadline=None)
@given(source=st.integers(8, 64), target=st.integers(8, 64), level=st.integers(0, 255))
def test_a_flat_image_stays_flat_at_every_size(source, target, level):
    out = resample(np.full((1, source, source, 3), level, np.uint8), target)
    assert out.shape == (1, target, target, 3) and (out == level).all()


def test_shrinking_keeps_the_mean_and_the_place():
    image = np.zeros((1, 28, 28, 1), np.uint8)
    image[0, 5:12, 14:21] = 200  # a patch that is exactly 4×4 output pixels wide at 16: 28/16 = 7/4
    out = resample(image, 16).astype(float)
    assert abs(out.mean() - image.mean()) < 0.5
    assert out[0, 4:6, 9:11, 0].min() == 200 and out[0, :, :7].max() == 0


def test_the_centre_square_is_kept():
    image = np.zeros((1, 10, 16, 1), np.uint8)
    image[0, :, 3:13] = 77
    assert (resample(image, 10) == 77).all() and (resample(image.transpose(0, 2, 1, 3), 10) == 77).all()


def test_enlarging_is_lanczos_and_does_not_wrap_around():
    image = np.zeros((1, 8, 8, 1), np.uint8)
    image[0, :, 4:] = 255
    out = resample(image, 32)[0, 16, :, 0].astype(int)
    assert out[0] < 10 and out[-1] > 245 and (np.diff(out[12:20]) >= 0).all()
    assert 0 < out[15] < out[16] < 255


def test_grey_survives_the_way_to_rgb_and_back():
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    rgb = to_channels(grey, 3)
    assert rgb.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(to_channels(rgb, 1), grey)
    assert to_channels(np.array([[[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]], np.uint8), 1).ravel().tolist() == [
        76,
        150,
        29,
    ]


def test_sixteen_bit_grey_keeps_the_high_byte():
    values = np.array([[0, 255, 256, 65535]], np.uint16).repeat(2, axis=0)
    assert decode_image(encode(Image.fromarray(values), "PNG"), max_pixels=LIMIT)[0, :, 0].tolist() == [0, 0, 1, 255]


def test_alpha_is_composited_on_black():
    rgba = np.array([[[200, 100, 50, 255], [200, 100, 50, 128], [200, 100, 50, 0]]], np.uint8)
    out = decode_image(png(rgba), max_pixels=LIMIT)[0].tolist()
    assert out == [[200, 100, 50], [100, 50, 25], [0, 0, 0]]
    la = Image.fromarray(np.array([[[200, 0], [200, 255]]], np.uint8), "LA")
    assert decode_image(encode(la, "PNG"), max_pixels=LIMIT)[0].tolist() == [[0], [200]]


def test_palette_with_transparency_cmyk_and_bilevel():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert decode_image(encode(palette, "PNG"), max_pixels=LIMIT)[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    clear = decode_image(encode(palette, "PNG", transparency=0), max_pixels=LIMIT)
    assert clear[0].tolist() == [[0, 0, 0], [40, 50, 60]]
    cmyk = decode_image(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 255)), "TIFF"), max_pixels=LIMIT)
    assert cmyk.shape == (8, 8, 3) and (cmyk == 0).all()
    assert decode_image(encode(Image.new("1", (3, 2), 1), "PNG"), max_pixels=LIMIT).tolist() == [[[255]] * 3] * 2


def test_exif_orientation_is_applied():
    image = Image.fromarray(np.array([[0, 255], [0, 255]], np.uint8).repeat(8, 0).repeat(8, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90° to view
    out = decode_image(encode(image, "JPEG", exif=exif, quality=95), max_pixels=LIMIT)
    assert out[:6].max() < 30 and out[-6:].min() > 225


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_every_format_is_read_and_its_truncation_noticed(kind, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # what a careless program may have set
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    data = encode(Image.fromarray(pixels), kind)
    assert decode_image(data, max_pixels=LIMIT).shape == (32, 32, 3)
    with pytest.raises(DataError, match=r"damaged or truncated|not an image"):
        decode_image(data[: len(data) // 2], max_pixels=LIMIT)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_a_damaged_png_and_other_bytes_are_refused():
    data = bytearray(png(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)))
    for place in (60, len(data) - 13):  # within the pixels; in their checksum, which loading alone does not look at
        data[place] ^= 0xFF
        with pytest.raises(DataError, match="damaged"):
            decode_image(bytes(data), max_pixels=LIMIT)
        data[place] ^= 0xFF
    assert decode_image(bytes(data), max_pixels=LIMIT).shape == (16, 16, 1)
    for other in (b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"):
        with pytest.raises(DataError, match="not an image in a known format"):
            decode_image(other, max_pixels=LIMIT)


@pytest.mark.parametrize("side", [2_000, 50_000])
def test_a_bomb_is_refused_by_its_header(side):
    data = bomb_png(side, side)
    assert len(data) < 100
    with pytest.raises(DataError, match="its header declares"):
        decode_image(data, max_pixels=LIMIT)


def test_unbounded_pixel_types_are_refused():
    with pytest.raises(DataError, match=r"'F' has no fixed range"):
        decode_image(encode(Image.new("F", (8, 8)), "TIFF"), max_pixels=LIMIT)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow remarks on some damage
def test_damage_anywhere_is_a_data_error_or_an_image(data):
    kind = data.draw(st.sampled_from(["PNG", "GIF", "BMP", "PPM", "JPEG", "TIFF"]))
    raw = bytearray(encode(Image.new("RGB", (9, 8), (1, 2, 3)), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        out = decode_image(bytes(raw), max_pixels=LIMIT)
    except DataError:
        return
    assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] in (1, 3)
