"""Contact sheets: a picture of many small pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from privimage_fast.data.errors import DataError
from privimage_fast.data.imageset import ImageSet

_GROUND, _INK = 128, 255


def image_sheet(
    images: np.ndarray,
    rows: int,
    columns: int,
    *,
    pad: int = 2,
    scale: int = 1,
    row_labels: Sequence[str] | None = None,
) -> Image.Image:
    """uint8 (N, H, W, 1 or 3) → a picture of rows × columns of them, row by row (one row a class, say).

    pad: pixels between images; scale: whole-number enlargement, pixels kept square; row_labels: text before each row.
    Cells beyond N stay empty. Raises `DataError` on more than rows·columns images or other dtypes and shapes.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise DataError(f"image_sheet wants uint8 (N, H, W, 1 or 3), found {images.dtype} {images.shape}")
    if min(rows, columns, scale) < 1 or pad < 0 or len(images) > rows * columns:
        raise DataError(f"image_sheet: {len(images)} images do not fit {rows}×{columns} (scale {scale}, pad {pad})")
    if row_labels is not None and len(row_labels) != rows:
        raise DataError(f"image_sheet: {len(row_labels)} row labels for {rows} rows")
    _, height, width, channels = images.shape
    height, width = height * scale, width * scale
    font = ImageFont.load_default()
    margin = max((int(font.getlength(text)) + 2 * pad + 2 for text in row_labels or ()), default=0)
    canvas = np.full((rows * (height + pad) + pad, margin + columns * (width + pad) + pad, channels), _GROUND, np.uint8)
    for i, image in enumerate(images):
        top, left = pad + i // columns * (height + pad), margin + pad + i % columns * (width + pad)
        canvas[top : top + height, left : left + width] = image.repeat(scale, axis=0).repeat(scale, axis=1)
    sheet = Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
    draw = ImageDraw.Draw(sheet)
    for row, text in enumerate(row_labels or ()):
        middle = pad + row * (height + pad) + height // 2
        draw.text((pad, middle), text, font=font, fill=_INK if channels == 1 else (_INK,) * 3, anchor="lm")
    return sheet


def class_sheet(images: ImageSet, *, columns: int = 12, max_rows: int = 20) -> Image.Image:
    """The first images of each class, a class a row with its name beside it, empty if it has none; small images are enlarged to
    about 48 px. Of more than ``max_rows`` classes those without images are left out first.
    """
    rows = [(name, np.flatnonzero(images.labels == c)[:columns]) for c, name in enumerate(images.label_names)]
    if len(rows) > max_rows:
        rows = [row for row in rows if len(row[1])][:max_rows]
    columns = max(len(picks) for _, picks in rows)
    blank = np.zeros((1, *images.images.shape[1:]), np.uint8)
    cells = [np.concatenate([images.images[picks], np.repeat(blank, columns - len(picks), 0)]) for _, picks in rows]
    scale = max(1, 48 // images.resolution)
    return image_sheet(np.concatenate(cells), len(rows), columns, scale=scale, row_labels=[name for name, _ in rows])
