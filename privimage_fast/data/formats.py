"""`load_image_set`: any supported format on disk → `ImageSet`. Layouts and limits are described in docs/data.md."""

from __future__ import annotations

import os
from pathlib import Path

from privimage_fast.data.arrays import has_idx_pair, is_idx_name, read_idx, read_npz
from privimage_fast.data.errors import DataError, Faults
from privimage_fast.data.imageset import ImageSet
from privimage_fast.data.labelled import read_tree
from privimage_fast.data.limits import Limits, check_shape
from privimage_fast.data.tree import FolderTree, ZipTree

FORMATS = ("auto", "folder", "zip", "npz", "idx")
_PICKLES = frozenset((".pkl", ".pickle", ".pt", ".pth", ".joblib"))


def load_image_set(
    path: str | os.PathLike,
    *,
    resolution: int,
    channels: int,
    format: str = "auto",
    skip_bad: bool = False,
    limits: Limits | None = None,
    progress: bool = True,
) -> ImageSet:
    """Loads labelled images, centre-cropped and resampled to `resolution` pixels a side (8 to 64).

    format: "folder" (a folder per class, or files with a dataset.json), "zip" (the same, zipped), "npz", "idx", or
    "auto" to tell by the name. channels: 1 (grey) or 3 (RGB). skip_bad: list files that cannot be used in
    `.skipped` rather than raise. progress: a bar on stderr for loads longer than a second.

    Raises `DataError` with the path, what was found, what was expected and what to do; faults that make the whole
    source meaningless are raised whatever `skip_bad` says.
    """
    path, limits, faults = Path(path), limits or Limits(), Faults(skip_bad)
    check_shape(resolution, channels)
    if not path.exists():
        where = "" if path.is_absolute() else f"; relative paths count from {Path.cwd()}"
        raise DataError(f"{path}: no such file or folder{where}")
    kind = _detect(path) if format == "auto" else format
    if kind not in FORMATS:
        raise DataError(f"format: expected one of {', '.join(FORMATS)}, found {format!r}")
    if (kind in ("zip", "npz") and not path.is_file()) or (kind == "folder" and not path.is_dir()):
        raise DataError(f"{path}: is {'no folder' if kind == 'folder' else 'no file'}, as format={kind!r} needs")
    if kind in ("npz", "idx"):
        read = read_npz if kind == "npz" else read_idx
        return read(path, resolution=resolution, channels=channels, limits=limits, faults=faults)
    tree = FolderTree(path, limits) if kind == "folder" else ZipTree(path, limits)
    try:
        return read_tree(
            tree, name=path.resolve().name.removesuffix(".zip"), resolution=resolution, channels=channels,
            limits=limits, faults=faults, progress=progress,
        )  # fmt: skip
    finally:
        tree.close()


def _detect(path: Path) -> str:
    if path.is_dir():
        return "idx" if has_idx_pair(path) else "folder"
    if path.suffix.lower() in (".npz", ".zip"):
        return path.suffix.lower()[1:]
    if is_idx_name(path.name):
        return "idx"
    if path.suffix.lower() in _PICKLES:
        raise DataError(f"{path}: a pickle can run any code when opened and is never loaded; save the arrays as npz")
    raise DataError(
        f"{path}: format not recognised by its name (expected a folder, .zip, .npz or …-images-idx3-ubyte[.gz]); "
        f"rename it or pass format={'|'.join(FORMATS[1:])}"
    )
