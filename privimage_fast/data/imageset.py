"""`ImageSet`: labelled images in memory, the one type that all stages exchange."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from privimage_fast.data.convert import resample, to_channels
from privimage_fast.data.errors import DataError, SkippedFile
from privimage_fast.data.limits import check_shape


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """Labelled square images, checked when built (`DataError`).

    images: uint8 (N, H, W, C), H = W, C = 1 or 3, N ≥ 1. labels: int64 (N,), 0 ≤ label < len(label_names) (other
    integer types are converted). label_names: distinct, non-empty. skipped: what `skip_bad=True` left out.
    Arrays are shared, not copied: treat them as read-only.
    """

    images: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    name: str = "images"
    skipped: tuple[SkippedFile, ...] = ()

    def __post_init__(self) -> None:
        _check_images(self.images, self.name)
        object.__setattr__(self, "label_names", check_label_names(self.label_names, self.name))
        object.__setattr__(self, "labels", _check_labels(self.labels, len(self.images), self.label_names, self.name))
        object.__setattr__(self, "skipped", tuple(SkippedFile(*item) for item in self.skipped))

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        # Shape only: an image set may be the sensitive one, and reprs end up in logs.
        shape = "×".join(str(n) for n in self.images.shape)
        return f"ImageSet({self.name!r}, {shape}, {self.n_classes} classes)"

    @property
    def n_classes(self) -> int:
        return len(self.label_names)

    @property
    def resolution(self) -> int:
        """Pixels a side."""
        return self.images.shape[1]

    @property
    def channels(self) -> int:
        """1 (grey) or 3 (RGB)."""
        return self.images.shape[3]

    def subset(self, indices: np.ndarray | Sequence[int]) -> ImageSet:
        """The images at integer `indices`, in that order, or where a bool (N,) mask holds. Classes stay the same."""
        index = np.asarray(indices)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iub"):
            raise DataError(f"{self.name}: subset wants a 1-d integer or bool array, found {index.dtype} {index.shape}")
        if index.dtype == bool and len(index) != len(self):
            raise DataError(f"{self.name}: mask of {len(index)} entries for {len(self)} images")
        if index.size == 0 or (index.dtype == bool and not index.any()):
            raise DataError(f"{self.name}: an empty subset was asked for; an image set holds at least one image")
        if index.dtype != bool and (index.min() < 0 or index.max() >= len(self)):
            raise DataError(f"{self.name}: index {index.min()}…{index.max()} outside 0…{len(self) - 1}")
        return replace(self, images=self.images[index], labels=self.labels[index])

    def relabel(self, labels: np.ndarray, names: Sequence[str]) -> ImageSet:
        """The same images under other labels (N,) and class names."""
        return replace(self, labels=labels, label_names=tuple(names))

    def class_counts(self) -> np.ndarray:
        """int64 (n_classes,): images of each class. Of a sensitive set these counts are not private."""
        return np.bincount(self.labels, minlength=self.n_classes)

    def with_resolution(self, resolution: int, channels: int | None = None) -> ImageSet:
        """Resampled to `resolution` pixels a side (area average down, Lanczos-3 up) and, if given, `channels`."""
        channels = self.channels if channels is None else channels
        check_shape(resolution, channels)
        return replace(self, images=resample(to_channels(self.images, channels), resolution))


def join(sets: Sequence[ImageSet]) -> ImageSet:
    """Several sets as one, one after the other; classes are called set/class. `DataError` if shapes or names do not fit.

    Sets of the same name are numbered: letters/A, letters-2/A.
    """
    if not sets:
        raise DataError("join: expected at least one image set")
    shapes = {s.images.shape[1:] for s in sets}
    if len(shapes) > 1:
        raise DataError(f"join: expected sets of one shape, found {sorted(shapes)}; bring them to one with with_resolution")
    names: list[str] = []
    for s in sets:
        same = sum(name == s.name or name.startswith(f"{s.name}-") for name in names)
        names.append(f"{s.name}-{same + 1}" if same else s.name)
    offsets = np.cumsum([0, *(s.n_classes for s in sets)])
    return ImageSet(
        np.concatenate([s.images for s in sets]),
        np.concatenate([s.labels + offset for s, offset in zip(sets, offsets[:-1], strict=True)]),
        tuple(f"{name}/{label}" for name, s in zip(names, sets, strict=True) for label in s.label_names),
        "+".join(names),
        tuple(item for s in sets for item in s.skipped),
    )


def check_label_names(names: Sequence[str], source: str) -> tuple[str, ...]:
    """Class names as a tuple; `DataError` unless they are distinct, non-empty strings without control characters."""
    if isinstance(names, str) or not isinstance(names, Sequence | np.ndarray):
        raise DataError(f"{source}: label_names must be a sequence of strings, found {type(names).__name__}")
    if len(names) == 0:
        raise DataError(f"{source}: label_names is empty; at least one class is needed")
    for position, name in enumerate(names):
        # Control characters and lone surrogates do not survive every format.
        if not isinstance(name, str) or not name.strip() or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
            raise DataError(f"{source}: class name {position} is {name!r}; expected printable, non-empty text")
    result = tuple(str(name) for name in names)
    if len(set(result)) != len(result):
        twice = [name for name, times in Counter(result).items() if times > 1]
        raise DataError(f"{source}: class names must be distinct, found more than once: {twice[:5]}")
    return result


def _check_images(images: np.ndarray, source: str) -> None:
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        found = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else type(images).__name__
        raise DataError(f"{source}: images must be a numpy uint8 array (N, H, W, C), found {found}")
    count, height, width, channels = images.shape
    if count == 0 or height != width or height == 0 or channels not in (1, 3):
        raise DataError(f"{source}: images must be N ≥ 1 squares with 1 or 3 channels last, found {images.shape}")


def _check_labels(labels: np.ndarray, count: int, names: tuple[str, ...], source: str) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        raise DataError(f"{source}: labels must be integers of shape (N,), found {labels.dtype} {labels.shape}")
    if len(labels) != count:
        raise DataError(f"{source}: {len(labels)} labels for {count} images")
    bad = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(bad):
        raise DataError(
            f"{source}: label {labels[bad[0]]} of image {bad[0]} is outside 0…{len(names) - 1} "
            f"({len(bad)} such; {len(names)} class names)"
        )
    return np.ascontiguousarray(labels, dtype=np.int64)
