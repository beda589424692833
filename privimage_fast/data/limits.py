"""How much a file may ask for before it is decoded."""

from __future__ import annotations

from dataclasses import dataclass, fields

from privimage_fast.data.errors import DataError

MIN_RESOLUTION, MAX_RESOLUTION = 8, 64


@dataclass(frozen=True)
class Limits:
    """Bounds that every loader checks on headers, before it decodes. Raise one by passing your own `Limits`.

    The defaults let ImageNet at 32×32 through (1.28 million images, 3.9 GB) and stop what is larger.
    """

    max_images: int = 2_000_000
    min_classes: int = 2  # the query tells classes apart; one is enough where clusters stand for labels
    max_classes: int = 10_000
    max_pixels: int = 64 * 2**20  # of one encoded image, as its header declares them
    max_file_bytes: int = 128 * 2**20  # one encoded image, or dataset.json
    max_total_bytes: int = 4 * 2**30  # an archive on disk, its members together, a decoded array, the loaded set
    max_zip_ratio: int = 200  # uncompressed ÷ compressed, of one image larger than 1 MiB inside a zip

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, int) or value < 1:
                raise DataError(f"Limits.{item.name}: expected a positive integer, found {value!r}")

    def check_set(self, images: int, resolution: int, channels: int, source: str) -> None:
        """Raises `DataError` if a set of this shape is larger than a loaded set may be."""
        if images > self.max_images:
            raise DataError(f"{source}: {images:,} images, limit {self.max_images:,}; raise Limits.max_images")
        size = images * resolution * resolution * channels
        if size > self.max_total_bytes:
            raise DataError(
                f"{source}: {images:,} images of {resolution}×{resolution}×{channels} take {size:,} bytes, "
                f"limit {self.max_total_bytes:,}; raise Limits.max_total_bytes or lower the resolution"
            )


def check_shape(resolution: int, channels: int) -> None:
    """Raises `DataError` unless a loader can give images of this size."""
    if isinstance(resolution, bool) or not isinstance(resolution, int):
        raise DataError(f"resolution: expected an integer, found {resolution!r}")
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise DataError(f"resolution: expected {MIN_RESOLUTION} to {MAX_RESOLUTION} pixels a side, found {resolution}")
    if channels not in (1, 3):
        raise DataError(f"channels: expected 1 (grey) or 3 (RGB), found {channels!r}")
