"""Public data sets in the files that their authors publish. None of these is a pickle."""

from __future__ import annotations

import csv
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from privimage_fast.data.arrays import read_idx, read_npy
from privimage_fast.data.convert import decode_image, resample, to_channels
from privimage_fast.data.errors import DataError, Faults
from privimage_fast.data.imageset import ImageSet
from privimage_fast.data.limits import Limits
from privimage_fast.data.tree import FolderTree, Tree, ZipTree, open_zip

CIFAR10_LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR_ROW = 1 + 3 * 32 * 32


def cifar10(source: Path, split: str) -> ImageSet:
    """CIFAR-10's binary version: cifar-10-binary.tar.gz, or the folder of its .bin files. 32×32 RGB."""
    wanted = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    parts = dict(_cifar_files(source, wanted))
    missing = [name for name in wanted if name not in parts]
    if missing:
        raise DataError(
            f"{source}: no {', '.join(missing)} in it; expected CIFAR-10's *binary* version (the Python version is pickle, "
            "which is never loaded)"
        )
    for name, data in parts.items():
        if len(data) == 0 or len(data) % _CIFAR_ROW:
            raise DataError(f"{source}: {name} has {len(data):,} bytes, expected a multiple of {_CIFAR_ROW}")
    rows = np.frombuffer(b"".join(parts[name] for name in wanted), np.uint8).reshape(-1, _CIFAR_ROW)
    if rows[:, 0].max() > 9:
        raise DataError(f"{source}: label {rows[:, 0].max()} found, expected 0…9; the file is not CIFAR-10's")
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ImageSet(np.ascontiguousarray(images), rows[:, 0].astype(np.int64), CIFAR10_LABELS, "cifar10")


def _cifar_files(source: Path, wanted: list[str]) -> Iterable[tuple[str, bytes]]:
    if source.is_dir():
        for folder in (source, source / "cifar-10-batches-bin"):
            yield from ((name, (folder / name).read_bytes()) for name in wanted if (folder / name).is_file())
        return
    try:
        with tarfile.open(source, "r:gz") as archive:
            for member in archive:
                name = member.name.rpartition("/")[2]
                if name in wanted and member.isfile() and member.size <= 64 * 2**20:
                    file = archive.extractfile(member)
                    assert file is not None
                    yield name, file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{source}: cannot be read as cifar-10-binary.tar.gz ({error})") from error


def emnist_letters(folder: Path, split: str) -> ImageSet:
    """EMNIST's letters in its IDX files, gzip or not: 26 classes, 28×28, upright (the files hold them transposed)."""
    stem = folder / f"emnist-letters-{split}-images-idx3-ubyte"
    path = next((p for p in (stem, stem.with_name(stem.name + ".gz")) if p.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: no {stem.name}(.gz) in it")
    found = read_idx(path, resolution=28, channels=1, limits=Limits(), faults=Faults(False), first_label=1)
    images = np.ascontiguousarray(found.images.transpose(0, 2, 1, 3))
    return ImageSet(images, found.labels, tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), "letters")


def imagenet32(source: Path, split: str) -> ImageSet:
    """Downsampled ImageNet (Chrabaszcz et al. 2017): a folder with train_data_batch_1…10.npz or val_data.npz; 1,000 classes."""
    names = [f"train_data_batch_{i}.npz" for i in range(1, 11)] if split == "train" else ["val_data.npz"]
    missing = [name for name in names if not (source / name).is_file()]
    if missing:
        raise DataError(f"{source}: no {', '.join(missing)} in it; expected the npz version of ImageNet 32×32")
    images, labels = [], []
    for name in names:
        with open_zip(source / name, Limits()) as archive:
            data, label = (read_npy(archive, key, source / name, Limits()) for key in ("data", "labels"))
        label = label.ravel()
        if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072 or len(label) != len(data):
            raise DataError(f"{source / name}: data {data.dtype} {data.shape}, expected uint8 (N, 3072) and N labels")
        images.append(data)
        labels.append(label.astype(np.int64) - 1)  # published from 1 to 1000
    flat = np.concatenate(images)
    del images
    pixels = np.ascontiguousarray(flat.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ImageSet(pixels, np.concatenate(labels), tuple(f"{i:04d}" for i in range(1000)), "imagenet32")


def celeba(source: Path, split: str, *, resolution: int, attribute: str = "Male") -> ImageSet:
    """CelebA, aligned: img_align_celeba (folder or .zip) beside list_attr_celeba.txt and list_eval_partition.txt.

    Classes: an attribute absent or present. Split train, or test.
    """
    attributes = _table(source / "list_attr_celeba.txt", skip=1)
    header = attributes[0]
    if attribute not in header:
        raise DataError(f"{source}: CelebA has no attribute {attribute!r}; there are {', '.join(header)}")
    column = header.index(attribute) + 1
    partition = {row[0]: row[1] for row in _table(source / "list_eval_partition.txt", skip=0) if len(row) == 2}
    wanted = "0" if split == "train" else "2"
    listed = [(row[0], int(row[column] == "1")) for row in attributes[1:] if partition.get(row[0]) == wanted]
    tree, prefix = _celeba_tree(source)
    try:
        return _decoded(
            tree, [(prefix + name, label) for name, label in listed], (f"not {attribute}", attribute), "celeba", resolution
        )
    finally:
        tree.close()


def _celeba_tree(source: Path) -> tuple[Tree, str]:
    folder, archive = source / "img_align_celeba", source / "img_align_celeba.zip"
    if folder.is_dir():
        inner = folder / "img_align_celeba"  # some archives unpack to a folder in a folder
        return FolderTree(inner if inner.is_dir() else folder, Limits()), ""
    if archive.is_file():
        return ZipTree(archive, Limits()), "img_align_celeba/"
    raise DataError(f"{source}: neither img_align_celeba nor img_align_celeba.zip is in it")


def camelyon17(source: Path, split: str, *, resolution: int) -> ImageSet:
    """Camelyon17 of WILDS 1.0: metadata.csv and patches/ in a folder; classes normal and tumour.

    Split train: the training centres; test: the centre of WILDS' test set.
    """
    path = source / "metadata.csv"
    if not path.is_file():
        raise DataError(f"{source}: no metadata.csv in it; expected the folder camelyon17_v1.0 of WILDS")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    needed = {"patient", "node", "x_coord", "y_coord", "tumor", "center", "split"}
    if not rows or not needed <= set(rows[0]):
        raise DataError(f"{path}: expected the columns {', '.join(sorted(needed))}")
    test_centre, validation_centre = "2", "1"  # as WILDS splits by centre
    keep: Callable[[dict[str, str]], bool] = (
        (lambda r: r["center"] not in (test_centre, validation_centre) and r["split"] == "0")
        if split == "train"
        else (lambda r: r["center"] == test_centre)
    )
    listed = []
    for r in filter(keep, rows):
        place = f"patient_{int(r['patient']):03d}_node_{int(r['node'])}"
        listed.append((f"{place}/patch_{place}_x_{r['x_coord']}_y_{r['y_coord']}.png", int(r["tumor"])))
    return _decoded(FolderTree(source / "patches", Limits()), listed, ("normal", "tumour"), "camelyon17", resolution)


def _table(path: Path, skip: int) -> list[list[str]]:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    text = path.read_text(encoding="utf-8", errors="replace")
    return [line.split() for line in text.splitlines()[skip:] if line.strip()]


def _decoded(tree: Tree, listed: list[tuple[str, int]], names: tuple[str, ...], name: str, resolution: int) -> ImageSet:
    """The listed files as RGB images; the first that cannot be read ends it."""
    if not listed:
        raise DataError(f"{tree.path}: the lists name no image of this split")
    limits = Limits()
    limits.check_set(len(listed), resolution, 3, tree.path)
    images = np.empty((len(listed), resolution, resolution, 3), np.uint8)
    for row, (member, _) in enumerate(listed):
        try:
            pixels = decode_image(tree.read(member), max_pixels=limits.max_pixels)
        except DataError as error:
            raise DataError(f"{tree.path}/{member}: {error}") from error
        images[row] = resample(to_channels(pixels[None], 3), resolution)[0]
    return ImageSet(images, np.array([label for _, label in listed]), names, name)
