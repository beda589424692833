"""Saving image sets. Every writer is atomic and gives the same bytes for the same set; what is written loads back
bit for bit with `load_image_set`."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from PIL import Image

from privimage_fast.data.atomic import atomic_path, temporary_beside
from privimage_fast.data.errors import DataError
from privimage_fast.data.imageset import ImageSet
from privimage_fast.data.labelled import MANIFEST

_WRITER = "privimage-fast"
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date zip knows: file times would make equal sets differ
_RESERVED = frozenset(("con", "prn", "aux", "nul", *(f"{p}{i}" for p in ("com", "lpt") for i in range(1, 10))))
_MAX_NAME_BYTES = 200


def save_npz(imageset: ImageSet, path: str | os.PathLike) -> Path:
    """Writes `images` uint8 (N, H, W, C), `labels` int64 (N,), `label_names` text, compressed; replaces `path`."""
    arrays = {
        "images": np.ascontiguousarray(imageset.images),
        "labels": imageset.labels,
        "label_names": np.array(imageset.label_names, dtype=np.str_),
    }
    path = _with_suffix(path, ".npz")
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for key, array in arrays.items():
            # numpy's own savez would do, but fixes neither dates nor modes across its versions.
            with archive.open(_member(f"{key}.npy", zipfile.ZIP_DEFLATED), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, version=(1, 0), allow_pickle=False)
    return path


def save_zip(imageset: ImageSet, path: str | os.PathLike) -> Path:
    """Writes PNGs in the layout of EDM and StyleGAN, and a `dataset.json` with `label_names` too; replaces `path`."""
    names = [f"{row // 1000:05d}/img{row:08d}.png" for row in range(len(imageset))]
    path = _with_suffix(path, ".zip")
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, pixels in zip(names, imageset.images, strict=True):
            archive.writestr(_member(name, zipfile.ZIP_STORED), encode_png(pixels))
        archive.writestr(_member(MANIFEST, zipfile.ZIP_DEFLATED), _manifest(imageset, names))
    return path


def save_folder(imageset: ImageSet, path: str | os.PathLike, *, overwrite: bool = False) -> Path:
    """Writes a folder per class, and a `dataset.json` with the order, the labels and the class names verbatim.

    Folder names are the class names, escaped by `class_folder_names`. An existing folder is replaced if it is empty
    or holds exactly what this function wrote; any other raises `DataError` unless `overwrite=True`, which deletes
    all that is in it. The whole folder appears at once, by a rename.
    """
    path = Path(path)
    folders = class_folder_names(imageset.label_names)
    names = [f"{folders[label]}/img{row:08d}.png" for row, label in enumerate(imageset.labels)]
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise DataError(f"{path}: is a file or a link, not a folder; give the name of a new folder")
    if path.is_dir() and not overwrite and any(path.iterdir()) and not _wrote(path):
        raise DataError(f"{path}: holds files that save_folder did not write; pass overwrite=True to delete them")
    with _atomic_folder(path) as temporary:
        for folder in sorted({name.split("/")[0] for name in names}):
            (temporary / folder).mkdir()
        for name, pixels in zip(names, imageset.images, strict=True):
            (temporary / name).write_bytes(encode_png(pixels))
        (temporary / MANIFEST).write_bytes(_manifest(imageset, names))
    return path


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 1 or 3) → PNG bytes, without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def class_folder_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """A safe, distinct folder name for each class name; `class_name` turns it back.

    Letters, digits and ``-_+=,()@.`` and inner spaces stay; all else is percent-encoded, so are capitals where two
    names differ by case only ("A" and "a" are one folder on some systems). `DataError` if a name cannot be one.
    """
    folded = Counter(_fold(name) for name in names)
    result = tuple(_escape(name, clash=folded[_fold(name)] > 1) for name in names)
    for name, folder in zip(names, result, strict=True):
        if len(folder.encode()) > _MAX_NAME_BYTES:
            raise DataError(f"class name {name[:40]!r}…: too long for a folder name; shorten it, or use save_zip")
    again = Counter(_fold(folder) for folder in result)
    clash = [name for name, folder in zip(names, result, strict=True) if again[_fold(folder)] > 1]
    if clash:
        raise DataError(f"class names {clash[:4]} cannot be told apart as folders; rename them, or use save_zip")
    return result


def class_name(folder: str) -> str:
    """The class name that `class_folder_names` escaped."""
    return unquote(folder, errors="strict")


def _escape(name: str, *, clash: bool) -> str:
    plain = unicodedata.is_normalized("NFC", name) and name.casefold() not in _RESERVED
    stem = name.split(".")[0].casefold()
    out = []
    for position, char in enumerate(name):
        edge = position == 0 or position == len(name) - 1
        keep = char.isalnum() or char in "-_+=,()@" or (char in ". " and not edge)
        if clash and (char.casefold() != char or not char.isascii()):
            keep = False
        if (not plain and not char.isascii()) or (position == 0 and stem in _RESERVED):
            keep = False
        # Not urllib.parse.quote: it leaves letters alone even when asked not to.
        out.append(char if keep else "".join(f"%{byte:02X}" for byte in char.encode()))
    return "".join(out)


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def _manifest(imageset: ImageSet, names: list[str]) -> bytes:
    content = {
        "labels": [[name, int(label)] for name, label in zip(names, imageset.labels, strict=True)],
        "label_names": list(imageset.label_names),
        "written_by": _WRITER,
    }
    return json.dumps(content, indent=None, separators=(",", ":")).encode()


def _wrote(folder: Path) -> bool:
    """Whether `folder` holds a manifest of ours and nothing that is not in it: a user's own file must not be lost."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        if content["written_by"] != _WRITER:
            return False
        listed = {MANIFEST, *(name for name, _ in content["labels"])}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()} <= listed


@contextlib.contextmanager
def _atomic_folder(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = temporary_beside(path), temporary_beside(path)
    try:
        temporary.mkdir()
        yield temporary
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except BaseException:
            if old.exists():
                old.rename(path)
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _member(name: str, compression: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type, info.create_system, info.external_attr = compression, 3, 0o644 << 16
    return info


def _with_suffix(path: str | os.PathLike, suffix: str) -> Path:
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise DataError(f"{path}: expected a name ending in {suffix}, by which it is recognised when loaded")
    return path
