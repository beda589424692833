"""Pixels: decoding one file, grey ↔ RGB, and centre-crop + resample. Every format goes through these functions,
so the same picture gives the same bytes whatever container it came in."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from privimage_fast.data.errors import DataError

# Named, because Pillow's full list holds formats that start other programs (EPS) or that nobody trains on.
PILLOW_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "TIFF")
IMAGE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".webp", ".tif", ".tiff"))
_CHUNK_PIXELS = 2**22  # images resampled at a time: 32 MiB of float64


def decode_image(data: bytes, *, max_pixels: int) -> np.ndarray:
    """Encoded image file → uint8 (H, W, C), C = 1 for plain grey files, 3 for the others.

    EXIF orientation is applied; transparency is composited on black; 16-bit grey keeps its high byte; palette,
    CMYK, YCbCr and HSV become RGB by Pillow's fixed formulas (colour profiles are ignored); of an animation the
    first frame is taken. Raises `DataError` with the reason only: the caller knows the path.
    """
    try:
        with _strict_pillow():
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DataError(
                        f"its header declares {width}×{height} = {width * height:,} pixels, limit {max_pixels:,} "
                        "(Limits.max_pixels)"
                    )
                image.verify()
            # verify() leaves the object unusable, so the file is opened again to be read.
            with Image.open(io.BytesIO(data), formats=PILLOW_FORMATS) as image:
                image.load()
                return _to_uint8(ImageOps.exif_transpose(image), image.format)
    except DataError:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own limit, should ours be set above it
        raise DataError(f"its header declares too many pixels ({error})") from error
    except UnidentifiedImageError:
        raise DataError(f"not an image in a known format (expected one of {', '.join(PILLOW_FORMATS)})") from None
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes, SyntaxError included
        raise DataError(f"cannot be decoded, the file is damaged or truncated ({error})") from error


def to_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (…, 1 or 3) → uint8 (…, channels): grey is repeated; RGB becomes ITU-R BT.601 luma, rounded."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    red, green, blue = (images[..., i].astype(np.uint32) for i in range(3))
    # 0.299, 0.587, 0.114 in 16 binary digits that sum to 65,536: grey stored as RGB comes back unchanged.
    return ((red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16).astype(np.uint8)[..., None]


def resample(images: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 (N, H, W, C) → uint8 (N, resolution, resolution, C).

    The centred square is cut out first. Shrinking averages exactly over the area of an output pixel (no ringing
    on line art); enlarging uses Lanczos-3; the same size is returned untouched.
    """
    count, height, width, channels = images.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    images = images[:, top : top + side, left : left + side]
    if side == resolution:
        return np.ascontiguousarray(images)
    weights = _weights(side, resolution)
    out = np.empty((count, resolution, resolution, channels), np.uint8)
    step = max(1, _CHUNK_PIXELS // side**2)
    for start in range(0, count, step):
        for channel in range(channels):
            plane = images[start : start + step, :, :, channel].astype(np.float64)
            out[start : start + step, :, :, channel] = _round(weights @ plane @ weights.T)
    return out


def _round(values: np.ndarray) -> np.ndarray:
    # Ties such as the mean of 1 and 2 are common; the small constant takes them up whatever order BLAS sums in.
    return np.clip(np.floor(values + (0.5 + 1e-6)), 0, 255).astype(np.uint8)


@lru_cache(maxsize=64)
def _weights(source: int, target: int) -> np.ndarray:
    """(target, source) float64 rows that sum to 1: area overlap when shrinking, Lanczos-3 when enlarging."""
    if target < source:
        edges = np.arange(target + 1) * (source / target)
        pixel = np.arange(source)
        overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
        weights = np.clip(overlap, 0, None)
    else:
        centres = (np.arange(target) + 0.5) * (source / target) - 0.5
        distance = centres[:, None] - np.arange(source)
        weights = np.where(np.abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _to_uint8(image: Image.Image, file_format: str | None) -> np.ndarray:
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM")):
        # The high byte, as Pillow itself does with 16-bit RGB. (Older Pillow opens 16-bit grey as 32-bit "I".)
        return (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)[..., None]
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("LA") if image.mode in ("La", "LA") else image.convert("RGBA"), dtype=np.uint32)
        colour, alpha = rgba[..., :-1], rgba[..., -1:]
        return ((colour * alpha + 127) // 255).astype(np.uint8)
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None]
    if image.mode in ("P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"):
        return np.asarray(image.convert("RGB"))
    raise DataError(f"pixel type {image.mode!r} has no fixed range; save it with 8 bits a channel, grey or RGB")


@contextlib.contextmanager
def _strict_pillow() -> Iterator[None]:
    """Truncated files are errors here even where the program has told Pillow to tolerate them."""
    tolerant, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            # Our own pixel limit is checked right after the header; Pillow's fixed one still raises at twice its size.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant
