"""`ImageSet` checks what it is given; contact sheets put images where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from data_helpers import random_set

from privimage_fast.data import DataError, ImageSet, Limits, image_sheet
from privimage_fast.data.sheet import class_sheet

IMAGES = np.zeros((4, 8, 8, 1), np.uint8)
LABELS = np.array([0, 1, 1, 0])


@pytest.mark.parametrize(
    ("images", "labels", "names", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, ("a", "b"), "uint8 array .* found float32"),
        (IMAGES[..., 0], LABELS, ("a", "b"), r"\(N, H, W, C\), found uint8 \(4, 8, 8\)"),
        (IMAGES[:, :6], LABELS, ("a", "b"), r"squares .* found \(4, 6, 8, 1\)"),
        (IMAGES.repeat(2, -1), LABELS, ("a", "b"), "1 or 3 channels"),
        (IMAGES[:0], LABELS[:0], ("a", "b"), "N ≥ 1"),
        (IMAGES, LABELS[:3], ("a", "b"), "3 labels for 4 images"),
        (IMAGES, LABELS * 1.0, ("a", "b"), "labels must be integers .* float64"),
        (IMAGES, LABELS + 1, ("a", "b"), r"label 2 of image 1 is outside 0…1 \(2 such"),
        (IMAGES, LABELS - 1, ("a", "b"), "label -1 of image 0"),
        (IMAGES, LABELS, ("a", "a"), r"more than once: \['a'\]"),
        (IMAGES, LABELS, ("a", " "), "class name 1 is ' '"),
        (IMAGES, LABELS, ("a", "b\0"), "class name 1"),
        (IMAGES, LABELS, "ab", "sequence of strings"),
        (IMAGES, LABELS, (), "label_names is empty"),
    ],
)
def test_bad_sets_are_refused(images, labels, names, message):
    with pytest.raises(DataError, match=message):
        ImageSet(images, labels, names, "mine")


def test_properties_and_derived_sets():
    made = random_set(9, 12, 3, ("x", "y", "z"), seed=3)
    assert (len(made), made.n_classes, made.resolution, made.channels) == (9, 3, 12, 3)
    assert made.class_counts().tolist() == [3, 3, 3]
    part = made.subset([7, 0])
    np.testing.assert_array_equal(part.images, made.images[[7, 0]])
    np.testing.assert_array_equal(part.labels, made.labels[[7, 0]])
    assert part.label_names == made.label_names and part.class_counts().shape == (3,)
    assert len(made.subset(made.labels == 1)) == 3
    other = made.relabel(np.zeros(9, np.int32), ["only"])
    assert other.label_names == ("only",) and other.labels.dtype == np.int64
    small = made.with_resolution(8, channels=1)
    assert small.images.shape == (9, 8, 8, 1)
    assert "×" in repr(made) and "[" not in repr(made)  # no pixel or label of a sensitive set in a log


@pytest.mark.parametrize("indices", [[], [9], [-1], [0.5], [[0]], [True, False]])
def test_bad_indices_are_refused(indices):
    with pytest.raises(DataError):
        random_set(9, 8, 1, ("x", "y")).subset(indices)


@pytest.mark.parametrize("resolution", [7, 65, 16.0])
def test_bad_resolutions_are_refused(resolution):
    with pytest.raises(DataError, match="resolution"):
        random_set(4, 8, 1, ("x", "y")).with_resolution(resolution)


def test_limits_are_checked():
    with pytest.raises(DataError, match="max_images"):
        Limits(max_images=0)


def test_sheet_places_images_row_by_row():
    images = np.stack([np.full((4, 4, 1), 10 * i, np.uint8) for i in range(5)])
    sheet = np.asarray(image_sheet(images, 2, 3, pad=1, scale=2))
    assert sheet.shape == (2 * 9 + 1, 3 * 9 + 1)
    assert [sheet[5, 5], sheet[5, 23], sheet[14, 5], sheet[14, 14]] == [0, 20, 30, 40]
    assert (sheet[10:18, 19:27] == sheet[0, 0]).all()  # the cell beyond the last image
    labelled = image_sheet(images.repeat(3, -1), 5, 1, row_labels=["a", "b", "c", "d", "eeee"])
    assert labelled.mode == "RGB" and labelled.width > 4 + 2 * 2


def test_sheet_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="do not fit"):
        image_sheet(IMAGES, 1, 3)
    with pytest.raises(DataError, match="row labels"):
        image_sheet(IMAGES, 2, 2, row_labels=["a"])


def test_a_sheet_of_more_classes_than_rows_shows_those_with_images() -> None:
    names = tuple(str(c) for c in range(30))
    images = np.full((3, 8, 8, 1), 200, np.uint8)
    late = ImageSet(images, np.full(3, 25), names)  # the only class that has any is none of the first twenty
    assert np.asarray(class_sheet(late)).max() >= 200
    assert class_sheet(late).height < class_sheet(ImageSet(images, np.array([0, 1, 2]), names[:20])).height
