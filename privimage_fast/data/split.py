"""Splitting an image set in two: in equal shares for public data, image by image for sensitive data."""

from __future__ import annotations

from hashlib import sha256

import numpy as np

from privimage_fast.data.errors import DataError
from privimage_fast.data.imageset import ImageSet


def holdout_split(imageset: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Splits sensitive images: (kept for training, held out). Each image is decided by a hash of itself and `seed` alone.

    Formal guarantee: adding an image to the set, or removing one, changes neither part otherwise, so neighbouring sets have
    neighbouring training parts. A stratified or shuffled split would move other images across, and with it the guarantee.

    share: expected part held out, in (0, 1); the sizes vary by chance. `DataError` if either part would be empty.
    """
    if not 0 < share < 1:
        raise DataError(f"share: expected a fraction in (0, 1), found {share}")
    prefix = f"privimage holdout {int(seed)}".encode()
    digests = (
        sha256(prefix + int(label).to_bytes(8, "little") + np.ascontiguousarray(image).tobytes()).digest()[:8]
        for image, label in zip(imageset.images, imageset.labels, strict=True)
    )
    coins = np.fromiter((int.from_bytes(d, "little") for d in digests), np.uint64, len(imageset))
    held_out = coins < np.uint64(int(share * 2**64))
    if held_out.all() or not held_out.any():
        raise DataError(f"share: {share} of {len(imageset)} images leaves a part empty")
    return imageset.subset(~held_out), imageset.subset(held_out)


def train_test_split(imageset: ImageSet, test_size: float | int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Splits by class in equal shares: (train, test), each in the order of `imageset`. Deterministic in `seed`.

    test_size: a fraction in (0, 1), or a number of images. Every class with two images or more is in both parts as
    far as `test_size` allows. `DataError` if either part would be empty.
    """
    total = len(imageset)
    if isinstance(test_size, float) and not 0 < test_size < 1:
        raise DataError(f"test_size: expected a fraction in (0, 1) or a number of images, found {test_size}")
    wanted = round(test_size * total) if isinstance(test_size, float) else int(test_size)
    if not 0 < wanted < total:
        raise DataError(f"test_size: {test_size} of {total} images leaves a part empty")
    take = _shares(imageset.class_counts(), wanted)
    rng = np.random.default_rng(seed)
    test = np.zeros(total, dtype=bool)
    for label, count in enumerate(take):
        test[rng.permutation(np.flatnonzero(imageset.labels == label))[:count]] = True
    return imageset.subset(~test), imageset.subset(test)


def _shares(counts: np.ndarray, wanted: int) -> np.ndarray:
    """Whole numbers that sum to `wanted`, in proportion to `counts`, by largest remainder."""
    exact = counts * (wanted / counts.sum())
    take = np.floor(exact + 1e-9).astype(np.int64)
    # Classes that would have no test image come first among those rounded up.
    order = np.lexsort((-(exact - take), (take > 0) | (counts < 2), take >= counts))
    take[order[: wanted - take.sum()]] += 1
    return take
