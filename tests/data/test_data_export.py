"""What is written loads back bit for bit, with the same bytes each time, and is there whole or not at all."""

from __future__ import annotations

import os
import zipfile

import numpy as np
import pytest
from data_helpers import random_set
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privimage_fast.data import (
    DataError,
    ImageSet,
    atomic_path,
    atomic_write_bytes,
    atomic_write_text,
    export,
    load_image_set,
    save_folder,
    save_npz,
    save_zip,
)
from privimage_fast.data.export import class_folder_names, class_name

SAVERS = {"set.npz": save_npz, "set.zip": save_zip, "set": save_folder}
NAMES = st.text(st.characters(min_codepoint=32, exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip)


def same(a: ImageSet, b: ImageSet) -> None:
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.labels, b.labels)
    assert a.label_names == b.label_names and b.images.dtype == np.uint8 and b.labels.dtype == np.int64


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(sorted(SAVERS)),
    resolution=st.integers(8, 64),
    channels=st.sampled_from([1, 3]),
    count=st.integers(1, 9),
    names=st.lists(NAMES, min_size=2, max_size=4, unique=True),
    seed=st.integers(0, 999),
)
def test_round_trip(tmp_path_factory, file, resolution, channels, count, names, seed):
    made = random_set(count, resolution, channels, tuple(names), seed)
    path = tmp_path_factory.mktemp("round") / file
    try:
        SAVERS[file](made, path)
    except DataError as error:
        # Only a folder may refuse a name, and only where two names cannot be told apart or are too long.
        assert file == "set" and ("told apart" in str(error) or "too long" in str(error))
        assert not path.exists()
        return
    same(made, load_image_set(path, resolution=resolution, channels=channels, progress=False))


@pytest.mark.parametrize("file", SAVERS)
def test_bytes_are_the_same_each_time_and_temporaries_are_gone(tmp_path, file):
    made = random_set(12, 16, 3, ("a", "b"))
    first, second = tmp_path / "1" / file, tmp_path / "2" / file
    SAVERS[file](made, first)
    SAVERS[file](made, second)
    files = [p.relative_to(first.parent) for p in first.parent.rglob("*") if p.is_file()]
    assert files
    for name in files:
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()
    assert os.listdir(first.parent) == [file]
    SAVERS[file](made, first)  # again over its own work
    same(made, load_image_set(first, resolution=16, channels=3))


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("file", SAVERS)
@pytest.mark.parametrize("before", [True, False])
def test_an_interrupted_export_leaves_what_was_there(tmp_path, monkeypatch, file, failure, before):
    old, new = random_set(6, 8, 1, ("a", "b"), seed=1), random_set(6, 8, 1, ("a", "b"), seed=2)
    if before:
        SAVERS[file](old, tmp_path / file)
    calls = []

    def fail(*args, **keywords):
        calls.append(args)
        if len(calls) == 3:
            raise failure
        return real(*args, **keywords)

    owner, name = (np.lib.format, "write_array") if file.endswith("npz") else (export, "encode_png")
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(BaseException) as caught:
        SAVERS[file](new, tmp_path / file)
    assert isinstance(caught.value, failure if isinstance(failure, type) else OSError) and len(calls) == 3
    assert os.listdir(tmp_path) == ([file] if before else [])
    if before:
        same(old, load_image_set(tmp_path / file, resolution=8, channels=1))


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    old = random_set(4, 8, 1, ("a", "b"), seed=1)
    target = save_folder(old, tmp_path / "set")
    real = type(target).rename

    def rename(self, to):
        if to == target and not calls:  # moving the new folder in; the second time it is the old one coming back
            calls.append(self)
            raise OSError("no")
        return real(self, to)

    calls = []
    monkeypatch.setattr(type(target), "rename", rename)
    with pytest.raises(OSError, match="no"):
        save_folder(random_set(4, 8, 1, ("a", "b"), seed=2), target)
    assert calls and os.listdir(tmp_path) == ["set"]
    same(old, load_image_set(target, resolution=8, channels=1))


def test_a_folder_with_other_files_is_not_overwritten(tmp_path):
    made = random_set(4, 8, 1, ("a", "b"))
    (tmp_path / "set").mkdir()
    save_folder(made, tmp_path / "set")  # an empty folder may be filled
    (tmp_path / "set" / "a" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="overwrite=True"):
        save_folder(made, tmp_path / "set")
    assert (tmp_path / "set" / "a" / "notes.txt").read_text() == "mine"
    save_folder(made, tmp_path / "set", overwrite=True)
    assert not (tmp_path / "set" / "a" / "notes.txt").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file or a link"):
        save_folder(made, tmp_path / "file", overwrite=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=5, unique=True))
def test_class_names_become_safe_folders_and_come_back(names):
    try:
        folders = class_folder_names(tuple(names))
    except DataError:
        return
    assert [class_name(folder) for folder in folders] == names
    assert len({folder.casefold() for folder in folders}) == len(names)
    for folder in folders:
        assert not set(folder) & set('/\\:*?"<>|\0') and folder[0] not in ". " and folder[-1] not in ". "


def test_awkward_class_names(tmp_path):
    names = ("..", "a/b", "A", "a", "con", "50%", "x.", "plain name")
    folders = class_folder_names(names)
    assert folders == ("%2E%2E", "a%2Fb", "%41", "a", "%63on", "50%25", "x%2E", "plain name")
    made = random_set(16, 8, 1, names)
    same(made, load_image_set(save_folder(made, tmp_path / "set"), resolution=8, channels=1))
    assert sorted(os.listdir(tmp_path)) == ["set"]
    with pytest.raises(DataError, match="too long"):
        class_folder_names(("x" * 300, "b"))


def test_the_zip_has_the_layout_of_edm(tmp_path):
    path = save_zip(random_set(3, 8, 3, ("a", "b")), tmp_path / "set.zip")
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [*(f"00000/img0000000{i}.png" for i in range(3)), "dataset.json"]
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(save_npz(random_set(3, 8, 3, ("a", "b")), tmp_path / "set.npz"), allow_pickle=False) as arrays:
        assert sorted(arrays) == ["images", "label_names", "labels"] and arrays["images"].shape == (3, 8, 8, 3)


def test_a_name_that_would_not_be_recognised_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"ending in \.npz"):
        save_npz(random_set(3, 8, 3, ("a", "b")), tmp_path / "set.dat")


def test_atomic_writing(tmp_path):
    path = tmp_path / "new" / "a.txt"
    atomic_write_text(path, "één\n")
    atomic_write_bytes(path.with_name("b"), b"\0\1")
    assert path.read_bytes() == "één\n".encode() and path.with_name("b").read_bytes() == b"\0\1"
    with pytest.raises(KeyboardInterrupt), atomic_path(path) as temporary:
        assert temporary.parent == path.parent and temporary.suffix == ".txt"
        temporary.write_text("half")
        assert path.read_text(encoding="utf-8") == "één\n"
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass  # nothing was written
    assert sorted(os.listdir(path.parent)) == ["a.txt", "b"] and path.read_text(encoding="utf-8") == "één\n"
