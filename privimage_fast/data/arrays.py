"""Sets stored as whole arrays: npz and IDX. Declared shapes are compared with the bytes there before any are read."""

from __future__ import annotations

import gzip
import math
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from privimage_fast.data.convert import resample, to_channels
from privimage_fast.data.errors import DataError, Faults
from privimage_fast.data.imageset import ImageSet, check_label_names
from privimage_fast.data.labelled import label_fault, number_classes, require_classes
from privimage_fast.data.limits import Limits
from privimage_fast.data.tree import check_member, open_zip

_IDX_IMAGES = re.compile(r"images([-.])idx3([-.])ubyte(\.gz)?$")
_NPY_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def read_npz(path: Path, *, resolution: int, channels: int, limits: Limits, faults: Faults) -> ImageSet:
    """`images` uint8 (N, H, W) or (N, H, W, C), `labels` integers (N,), optional `label_names` text (classes,)."""
    with open_zip(path, limits) as archive:
        images = read_npy(archive, "images", path, limits)
        labels = read_npy(archive, "labels", path, limits)
        names = read_npy(archive, "label_names", path, limits) if "label_names.npy" in archive.namelist() else None
    return _assemble(images, labels, names, path, resolution, channels, limits, faults)


def read_idx(
    path: Path, *, resolution: int, channels: int, limits: Limits, faults: Faults, first_label: int = 0
) -> ImageSet:  # fmt: skip
    """A pair of IDX files, plain or gzip. `path`: the images file, or a folder, whose training pair is then read.

    first_label: the label in the file that is class 0; EMNIST's letters count from 1.
    """
    images_path = _idx_images(path)
    stem, separators = _IDX_IMAGES.sub("", images_path.name), _IDX_IMAGES.search(images_path.name)
    if separators is None:
        raise DataError(f"{images_path}: expected a name like train-images-idx3-ubyte or train-images-idx3-ubyte.gz")
    first, second, _ = separators.groups()
    plain = images_path.with_name(f"{stem}labels{first}idx1{second}ubyte")
    labels_path = next((p for p in (plain, plain.with_name(plain.name + ".gz")) if p.is_file()), None)
    if labels_path is None:
        raise DataError(f"{images_path}: its labels were not found beside it; expected {plain.name} or {plain.name}.gz")
    images = _read_idx_array(images_path, 3, limits)
    labels = _read_idx_array(labels_path, 1, limits).astype(np.int64) - first_label
    return _assemble(images, labels, None, images_path, resolution, channels, limits, faults)


def has_idx_pair(folder: Path) -> bool:
    """Whether a folder holds a file named like the images of an IDX pair."""
    return any(_IDX_IMAGES.search(entry.name) for entry in folder.iterdir())


def is_idx_name(name: str) -> bool:
    """Whether a file is named like either half of an IDX pair."""
    return re.search(r"idx[13][-.]ubyte(\.gz)?$", name) is not None


def _assemble(
    images: np.ndarray, labels: np.ndarray, names: np.ndarray | None, path: Path,
    resolution: int, channels: int, limits: Limits, faults: Faults,
) -> ImageSet:  # fmt: skip
    if images.dtype != np.uint8:
        raise DataError(f"{path}: images are {images.dtype}, expected uint8 (0 to 255); scale and round them first")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise DataError(f"{path}: images have shape {images.shape}, expected (N, H, W) or (N, H, W, 1 or 3)")
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{path}: labels are {labels.dtype} {labels.shape}, expected integers of shape (N,)")
    if len(labels) != len(images):
        raise DataError(f"{path}: {len(labels)} labels for {len(images)} images; every image needs one")
    if names is not None and (names.dtype.kind != "U" or names.ndim != 1):
        raise DataError(f"{path}: label_names are {names.dtype} {names.shape}, expected text of shape (classes,)")
    given = None if names is None else check_label_names(names.tolist(), str(path))
    limits.check_set(len(images), resolution, channels, str(path))
    top = len(given) if given is not None else limits.max_classes
    bad = (labels < 0) | (labels >= top)
    for row in np.flatnonzero(bad):
        faults.report(f"{path}[{row}]", str(label_fault(int(labels[row]), limits, given)))
    if bad.all():
        raise DataError(f"{path}: not one image with a usable label")
    if bad.any():
        images, labels = images[~bad], labels[~bad]
    found = given if given is not None else number_classes(labels, str(path))
    require_classes(found, str(path), limits)
    images = resample(to_channels(images, channels), resolution)
    return ImageSet(images, labels, found, path.name.split(".")[0], tuple(faults.skipped))


def read_npy(archive: zipfile.ZipFile, key: str, path: Path, limits: Limits) -> np.ndarray:
    """One array of an npz, its header checked against the member's size before memory is asked for."""
    held = [name.removesuffix(".npy") for name in archive.namelist()]
    if held.count(key) != 1:
        raise DataError(f"{path}: expected exactly one array {key!r}, found the arrays {held[:10]}")
    info = archive.getinfo(f"{key}.npy")
    try:
        check_member(info)
        with archive.open(info) as file:
            version = np.lib.format.read_magic(file)
            if version not in _NPY_READERS:
                raise DataError(f"npy format version {version} (expected 1.0 or 2.0)")
            shape, _, dtype = _NPY_READERS[version](file)
            if dtype.hasobject:
                raise DataError("holds Python objects, that is pickle, which is never loaded; save plain arrays")
            header = file.tell()
        size = math.prod(shape) * dtype.itemsize
        if any(n < 0 for n in shape) or header + size != info.file_size:
            raise DataError(f"its header declares {dtype} {shape} = {size:,} bytes, but {info.file_size - header:,} are there")
        if size > limits.max_total_bytes or (shape and shape[0] > limits.max_images):
            raise DataError(
                f"{dtype} {shape} = {size:,} bytes, limits {limits.max_total_bytes:,} bytes and "
                f"{limits.max_images:,} images (Limits.max_total_bytes, Limits.max_images)"
            )
        with archive.open(info) as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except DataError as error:
        raise DataError(f"{path}: array {key!r}: {error}") from error
    except Exception as error:  # zlib, zipfile and numpy's header parser each have errors of their own
        raise DataError(f"{path}: array {key!r} cannot be read, the file is damaged ({error})") from error


def _idx_images(path: Path) -> Path:
    if path.is_dir():
        options = [path / f"train-images{a}idx3{b}ubyte{c}" for c in ("", ".gz") for a in "-." for b in "-."]
        found = next((option for option in options if option.is_file()), None)
        if found is None:
            others = sorted(entry.name for entry in path.iterdir() if _IDX_IMAGES.search(entry.name))
            raise DataError(f"{path}: no train-images-idx3-ubyte(.gz) in it; give the images file itself, one of {others}")
        return found
    if re.search(r"labels[-.]idx1[-.]ubyte(\.gz)?$", path.name):
        raise DataError(f"{path}: these are the labels of an IDX pair; give the path of its images file")
    return path


def _read_idx_array(path: Path, dimensions: int, limits: Limits) -> np.ndarray:
    """uint8 array of an IDX file. The bytes must be exactly as many as the header's shape says."""
    compressed = path.suffix == ".gz"
    expected = bytes((0, 0, 8, dimensions))
    try:
        if path.stat().st_size > limits.max_total_bytes:
            raise DataError(f"{path.stat().st_size:,} bytes, limit {limits.max_total_bytes:,} (Limits.max_total_bytes)")
        with gzip.open(path, "rb") if compressed else path.open("rb") as file:
            magic, header = file.read(4), file.read(4 * dimensions)
            if magic != expected or len(header) != 4 * dimensions:
                raise DataError(f"starts with {magic.hex() or 'nothing'}; expected {expected.hex()}, unsigned bytes in "
                                f"{dimensions} dimension(s)")  # fmt: skip
            shape = tuple(int(n) for n in np.frombuffer(header, ">u4"))
            size = math.prod(shape)
            if size > limits.max_total_bytes or shape[0] > limits.max_images:
                raise DataError(
                    f"its header declares {shape} = {size:,} bytes, limits {limits.max_total_bytes:,} bytes and "
                    f"{limits.max_images:,} images (Limits.max_total_bytes, Limits.max_images)"
                )
            if not compressed and path.stat().st_size != 4 + len(header) + size:
                found = path.stat().st_size - 4 - len(header)
                raise DataError(f"its header declares {shape} = {size:,} bytes, but {found:,} are there")
            data = file.read(size)
            # Reading on to the end also makes gzip check its checksum.
            if len(data) != size or file.read(1):
                more = "more" if len(data) == size else f"only {len(data):,}"
                raise DataError(f"its header declares {shape} = {size:,} bytes, but {more} are there")
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read, damaged or truncated ({error})") from error
    return np.frombuffer(data, np.uint8).reshape(shape)
