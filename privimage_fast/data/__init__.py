"""Image sets: loading, saving, the embedded ones, and atomic writing. Imports no torch."""

from privimage_fast.data.atomic import atomic_path, atomic_write_bytes, atomic_write_text
from privimage_fast.data.embedded import (
    EMBEDDED,
    digits_mnist,
    digits_sklearn,
    embedded_set,
    letters,
    open_image_set,
)
from privimage_fast.data.errors import DataError, SkippedFile
from privimage_fast.data.export import save_folder, save_npz, save_zip
from privimage_fast.data.formats import FORMATS, load_image_set
from privimage_fast.data.imageset import ImageSet, join
from privimage_fast.data.limits import Limits
from privimage_fast.data.overlap import images_in_both
from privimage_fast.data.sheet import class_sheet, image_sheet
from privimage_fast.data.split import holdout_split, train_test_split

__all__ = [
    "EMBEDDED",
    "FORMATS",
    "DataError",
    "ImageSet",
    "Limits",
    "SkippedFile",
    "atomic_path",
    "atomic_write_bytes",
    "atomic_write_text",
    "class_sheet",
    "digits_mnist",
    "digits_sklearn",
    "embedded_set",
    "holdout_split",
    "image_sheet",
    "images_in_both",
    "join",
    "letters",
    "load_image_set",
    "open_image_set",
    "save_folder",
    "save_npz",
    "save_zip",
    "train_test_split",
]
