"""Letters A–Z a–z drawn as MNIST draws its digits: a public set with strokes like handwriting and no digit in it.

Each letter of each typeface is rendered large once per stroke width, then turned, sheared and stretched a little,
then fitted into a 20/28 box and centred by mass while its pixels are averaged down (LeCun et al. 1998, §III-A).
"""

from __future__ import annotations

import re
import string
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from privimage_fast.data.errors import DataError

# The typefaces inside matplotlib that draw every Latin letter as a letter. Left out after looking at each one:
# LastResort (boxes), STIXNonUni and STIXSiz* (no letters), DejaVu*Display (no letters), cmex10 and cmsy10 (symbols).
FACES = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmb10", "cmmi10", "cmr10", "cmss10", "cmti10", "cmtt10",
)  # fmt: skip

_CANVAS = 144  # pixels a side of the large rendering
_EM = 72  # type size in those pixels: the widest letter, a bold W, still fits when turned and stretched
_BOX = 20 / 28  # part of the image that a glyph fills
_MARGIN = 2 / 28  # of the image, kept free all around, but for the faint fringe of a hairline
_MAX_STROKE = 5  # thickening on each side, in pixels of the large rendering
_CHUNK = 256  # letters averaged down at a time


def parse_alphabet(alphabet: str) -> str:
    """'A-Za-z' → 'ABC…xyz': ranges and single ASCII letters, each once. `DataError` on anything else."""
    letters = re.sub(
        r"([A-Z])-([A-Z])|([a-z])-([a-z])",
        lambda m: "".join(map(chr, range(ord(m[1] or m[3]), ord(m[2] or m[4]) + 1))),
        alphabet,
    )
    bad = sorted(set(letters) - set(string.ascii_letters))
    if bad or not letters or len(set(letters)) != len(letters):
        raise DataError(f"alphabet: expected distinct letters or ranges such as 'A-Za-z', found {alphabet!r}")
    return letters


def draw_letters(
    letters: str, *, resolution: int, variants: int, seed: int, faces: tuple[str, ...] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """White letters on black: uint8 (len(letters)·faces·variants, resolution, resolution, 1) and int64 labels.

    faces: matplotlib's by default, or paths of font files from `faces_below`.

    Sorted by letter, then face, then variant. The same arguments give the same bytes (with one FreeType version).
    """
    faces = faces or _usable_faces()
    labels, face_of = (a.ravel() for a in np.meshgrid(
        np.arange(len(letters)), np.repeat(np.arange(len(faces)), variants), indexing="ij"))  # fmt: skip
    count = len(labels)
    rng = np.random.default_rng(seed)
    maps = _random_maps(rng, count)
    target = rng.uniform(1.9, 3.3, count)  # mean stroke, in pixels of a 28×28 image: MNIST's own range
    size = rng.uniform(0.92, 1.0, count) * _BOX
    shift = rng.uniform(-0.6, 0.6, (count, 2)) / 28
    out = np.empty((count, resolution, resolution, 1), np.uint8)
    for start in range(0, count, _CHUNK):
        rows = range(start, min(start + _CHUNK, count))
        large = np.stack([
            _turned(faces[face_of[i]], letters[labels[i]], float(target[i]), maps[i]) for i in rows
        ])  # fmt: skip
        out[rows.start : rows.stop, ..., 0] = _fit(large, resolution, size[rows], shift[rows])
    return out, labels.astype(np.int64)


def _random_maps(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2, 2) maps from output to input offsets: rotation, shear and stretch of a hasty hand."""
    angle = np.deg2rad(rng.uniform(-12, 12, count))
    shear = rng.uniform(-0.2, 0.2, count)
    stretch = np.exp(rng.uniform(-0.15, 0.15, count))
    cos, sin, zero, one = np.cos(angle), np.sin(angle), np.zeros(count), np.ones(count)
    turn = np.stack([cos, sin, -sin, cos], axis=-1).reshape(-1, 2, 2)
    lean = np.stack([one, shear, zero, one], axis=-1).reshape(-1, 2, 2)
    wide = np.stack([stretch, zero, zero, 1 / stretch], axis=-1).reshape(-1, 2, 2)
    return turn @ lean @ wide


def _turned(face: str, letter: str, target: float, matrix: np.ndarray) -> np.ndarray:
    """uint8 (canvas, canvas): the large letter, thickened towards `target` pixels of mean stroke at 28×28."""
    scale, stroke = _proportions(face, letter)
    width = int(np.clip(round((target / scale - stroke) / 2), 0, _MAX_STROKE))
    centre = np.full(2, _CANVAS / 2)
    offset = centre - matrix @ centre
    coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
    glyph = _glyph(face, letter, width)
    return np.asarray(glyph.transform(glyph.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR))


@lru_cache(maxsize=4096)
def _proportions(face: str, letter: str) -> tuple[float, float]:
    """28×28 pixels per large pixel once the letter is fitted; its mean stroke (2·area/perimeter) in large pixels."""
    ink = np.asarray(_glyph(face, letter, 0), np.float64) / 255
    rows, columns = np.flatnonzero(ink.max(axis=1) > 0.5), np.flatnonzero(ink.max(axis=0) > 0.5)
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1
    along_y, along_x = np.gradient(ink)
    perimeter = np.hypot(along_y, along_x).sum()
    return 28 * _BOX / extent, 2 * ink.sum() / perimeter


@lru_cache(maxsize=8192)
def _glyph(face: str, letter: str, stroke_width: int) -> Image.Image:
    return _drawn(face, letter, stroke_width)


def _drawn(face: str, letter: str, stroke_width: int) -> Image.Image:
    """The letter in grey, thickened by `stroke_width` on each side, in the middle of the canvas."""
    image = Image.new("L", (_CANVAS, _CANVAS), 0)
    middle = (_CANVAS // 2, _CANVAS // 2)
    ImageDraw.Draw(image).text(middle, letter, 255, _font(face), anchor="mm", stroke_width=stroke_width)
    return image


def _fit(large: np.ndarray, resolution: int, size: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """uint8 (n, canvas, canvas) → uint8 (n, resolution, resolution), area-averaged: the longer side of each glyph
    fills `size` of the image, its centre of mass is in the middle plus `shift` (n, 2; fractions of the image)."""
    ink = large.astype(np.float32)
    position = np.arange(_CANVAS, dtype=np.float32) + 0.5
    mass = ink.sum(axis=(1, 2))
    spans = []
    for axis in (1, 2):
        profile = ink.max(axis=3 - axis) > 127
        first, last = profile.argmax(axis=1), _CANVAS - profile[:, ::-1].argmax(axis=1)
        spans.append((first, last, ink.sum(axis=3 - axis) @ position / mass))
    frame = np.maximum(*(last - first for first, last, _ in spans)) / size  # large pixels that the image spans
    weights = []
    for axis, (first, last, centre) in enumerate(spans):
        # Where the mass of an F or a j lies far to one side, centring must not push the other side out of the image.
        place = np.clip(0.5 + shift[:, axis], _MARGIN + (centre - first) / frame, 1 - _MARGIN - (last - centre) / frame)
        edges = np.linspace(0, 1, resolution + 1)[:, None]
        weights.append(_overlap(centre + (edges - place) * frame))
    down, across = weights
    averaged = down @ ink @ across.transpose(0, 2, 1)
    return np.clip(np.floor(averaged + np.float32(0.501)), 0, 255).astype(np.uint8)


def _overlap(edges: np.ndarray) -> np.ndarray:
    """Pixel edges (resolution + 1, n) on the canvas → (n, resolution, canvas) float32 weights of an area average."""
    edges = edges.T.astype(np.float32)[:, :, None]
    start = np.arange(_CANVAS, dtype=np.float32)
    overlap = np.clip(np.minimum(edges[:, 1:], start + 1) - np.maximum(edges[:, :-1], start), 0, None)
    return overlap / (edges[:, 1:] - edges[:, :-1])


@lru_cache(maxsize=64)
def _font(face: str) -> ImageFont.FreeTypeFont:
    path = Path(face)
    if not path.suffix:
        import matplotlib  # the package that carries the typefaces; its plotting parts are not loaded

        path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf")
    # Basic layout, because the other engine is an optional library and places glyphs differently.
    return ImageFont.truetype(path, _EM, layout_engine=ImageFont.Layout.BASIC)


@lru_cache(maxsize=1)
def _usable_faces() -> tuple[str, ...]:
    """The `FACES` that this matplotlib carries with an outline of its own for every letter."""
    usable = tuple(face for face in FACES if _draws(face, string.ascii_letters))
    if not usable:
        raise DataError("letters: matplotlib carries none of the typefaces they are drawn with; reinstall matplotlib")
    return usable


def _draws(face: str, letters: str) -> bool:
    """Whether the face can be read and has an outline of its own for each of the letters."""
    try:
        masks = {_font(face).getmask(letter).getbbox() and bytes(_font(face).getmask(letter)) for letter in letters}
    except OSError:
        return False
    return None not in masks and len(masks) == len(letters)


def faces_below(folder: Path, letters: str) -> tuple[str, ...]:
    """The TrueType and OpenType fonts below a folder that draw every letter apart, in sorted order. `DataError` if none does.

    Many display faces have one shape for both cases of a letter: give `letters` of one case to take them too.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".ttf", ".otf") and p.is_file())
    usable = tuple(str(p) for p in files if _draws(str(p), letters) and all(_solid(str(p), letter) for letter in letters))
    if not usable:
        raise DataError(f"{folder}: none of its {len(files)} fonts draws each of {letters!r} as a shape of its own")
    return usable


def _solid(face: str, letter: str) -> bool:
    """Whether a letter keeps a stroke that can be measured, and fits the canvas it is turned on."""
    ink = np.asarray(_drawn(face, letter, 0))
    edge = max(ink[0].max(), ink[-1].max(), ink[:, 0].max(), ink[:, -1].max())
    return bool((ink > 127).sum() >= 20 and edge == 0)
