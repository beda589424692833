"""Every kind of bad input: named in the error with path and reason, listed with `skip_bad` where the rest is usable."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
from data_helpers import bomb_png, grey, idx, manifest, png, random_set, write_folder, write_idx, write_zip

from privimage_fast.data import DataError, Limits, load_image_set, save_npz

GOOD = {"cat/1.png": grey(10), "cat/2.png": grey(20), "dog/1.png": grey(30)}
LISTED = [["cat/1.png", 0], ["cat/2.png", 0], ["dog/1.png", 1]]
TRUNCATED = png(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))[:120]


def load(path, **options):
    return load_image_set(path, **{"resolution": 8, "channels": 1, "progress": False, **options})


def write(kind, tmp_path, files):
    return write_folder(tmp_path / "set", files) if kind == "folder" else write_zip(tmp_path / "set.zip", files)


def refused_and_skipped(path, culprit, reason, *, left, **options):
    """The load names `culprit` and `reason`; with skip_bad it has `left` images and lists just that file."""
    with pytest.raises(DataError) as caught:
        load(path, **options)
    assert culprit in str(caught.value) and reason in str(caught.value) and "skip_bad=True" in str(caught.value)
    made = load(path, skip_bad=True, **options)
    assert len(made) == left and len(made.skipped) == 1
    assert culprit in made.skipped[0].path and reason in made.skipped[0].reason
    return made


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("culprit", "data", "reason"),
    [
        ("cat/3.png", TRUNCATED, "damaged or truncated"),
        ("cat/3.png", b"no image", "not an image in a known format"),
        ("cat/3.png", b"", "not an image in a known format"),
        ("cat/3.png", bomb_png(40_000, 40_000), "pixels"),
        ("cat/notes.txt", b"hello", "not an image (expected"),
        ("cat/deep/3.png", grey(3), "inside a class folder"),
        ("stray.png", grey(3), "beside the class folders"),
        ("README.md", b"hello", "beside the class folders"),
    ],
)
def test_class_folders_with_one_bad_file(tmp_path, kind, culprit, data, reason):
    path = write(kind, tmp_path, {**GOOD, culprit: data})
    made = refused_and_skipped(path, culprit, reason, left=3)
    assert made.label_names == ("cat", "dog") and made.labels.tolist() == [0, 0, 1]
    assert made.images[:, 0, 0, 0].tolist() == [10, 20, 30]


def test_files_without_class_folders_are_told_what_is_missing(tmp_path):
    """And not that they may be skipped."""
    path = write_folder(tmp_path / "set", {"1.png": grey(1), "2.png": grey(2)})
    for skip_bad in (False, True):
        with pytest.raises(DataError, match="no class folders; put the images of each class into a folder") as caught:
            load(path, skip_bad=skip_bad)
        assert "skip" not in str(caught.value)


def test_an_empty_class_folder(tmp_path):
    path = write_folder(tmp_path / "set", GOOD)
    (path / "bird").mkdir()
    made = refused_and_skipped(path, "bird", "holds no image", left=3)
    assert made.label_names == ("cat", "dog")


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_one_class_and_no_class(tmp_path, kind):
    path = write(kind, tmp_path, {"wrapped/1.png": grey(1)})
    for skip_bad in (False, True):
        with pytest.raises(DataError, match="only one class, 'wrapped'"):
            load(path, skip_bad=skip_bad)
    with pytest.raises(DataError, match="no class folder"):
        load(write(kind, tmp_path / "empty", {}) if kind == "zip" and (tmp_path / "empty").mkdir() is None
             else write_folder(tmp_path / "empty", {"x": b""}), skip_bad=True)  # fmt: skip


def test_a_class_of_which_nothing_can_be_read_is_an_error_even_when_skipping(tmp_path):
    path = write_folder(tmp_path / "set", {**GOOD, "emu/1.png": b"x", "emu/2.png": b"y"})
    with pytest.raises(DataError, match="'emu' not one of 2 images"):
        load(path, skip_bad=True)


def test_hidden_and_system_files_are_no_fault(tmp_path):
    path = write_folder(tmp_path / "set", {**GOOD, ".DS_Store": b"", "cat/Thumbs.db": b"", ".git/x": b""})
    assert len(load(path)) == 3
    path = write_zip(tmp_path / "set.zip", {**GOOD, "__MACOSX/cat/._1.png": b"", "cat/.DS_Store": b""})
    assert len(load(path)) == 3


def test_pipes_and_looping_links_do_not_hang(tmp_path):
    path = write_folder(tmp_path / "set", GOOD)
    os.mkfifo(path / "cat" / "pipe.png")
    refused_and_skipped(path, "cat/pipe.png", "not a regular file", left=3)
    (path / "cat" / "up").symlink_to(path, target_is_directory=True)
    with pytest.raises(DataError, match="nested more than"):
        load(path)


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("labels", "names", "culprit", "reason", "left"),
    [
        ([*LISTED, ["gone.png", 1]], None, "gone.png", "no such file", 3),
        ([*LISTED, ["cat/1.png", 1]], None, "cat/1.png", "listed twice", 3),
        ([*LISTED, ["../../etc/passwd", 1]], None, "../../etc/passwd", "leads out", 3),
        ([*LISTED, ["/etc/passwd", 1]], None, "/etc/passwd", "leads out", 3),
        ([*LISTED, "dog/2.png"], None, "dataset.json", "entry 3 of labels", 3),
        ([*LISTED[1:], ["cat/1.png", 2]], ["a", "b"], "cat/1.png", "label 2 is outside 0…1 (2 label_names)", 2),
        ([*LISTED[1:], ["cat/1.png", -1]], None, "cat/1.png", "label -1 is outside", 2),
        ([*LISTED[1:], ["cat/1.png", 10**9]], None, "cat/1.png", "Limits.max_classes", 2),
        ([*LISTED[1:], ["cat/1.png", 0.5]], None, "cat/1.png", "0.5; expected an integer", 2),
        ([*LISTED[1:], ["cat/1.png", True]], None, "cat/1.png", "True; expected an integer", 2),
        ([*LISTED[1:], ["cat/1.png", None]], None, "cat/1.png", "None; expected an integer", 2),
        (LISTED[1:], None, "cat/1.png", "has no label in dataset.json", 2),
    ],
)
def test_dataset_json_with_one_fault(tmp_path, kind, labels, names, culprit, reason, left):
    more = {} if names is None else {"label_names": names}
    path = write(kind, tmp_path, {**GOOD, "dataset.json": manifest(labels, **more)})
    made = refused_and_skipped(path, culprit, reason, left=left)
    assert made.label_names == (("a", "b") if names else ("0", "1"))


@pytest.mark.parametrize("kind", ["folder", "zip"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"labels": [', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "expected .*labels"),
        (b'{"labels": null}', "found labels None"),
        (manifest([["cat/1.png", 0], ["cat/2.png", 0], ["dog/1.png", 2]]), "no image has label 1"),
        (manifest(LISTED, label_names=["a", "a"]), "more than once"),
        (manifest(LISTED, label_names="ab"), "sequence of strings"),
        (manifest(LISTED, label_names=["a", 3]), "class name 1 is 3"),
    ],
)
def test_a_meaningless_dataset_json_is_an_error_even_when_skipping(tmp_path, kind, content, message):
    path = write(kind, tmp_path, {**GOOD, "dataset.json": content})
    with pytest.raises(DataError, match=message) as caught:
        load(path, skip_bad=True)
    assert "dataset.json" in str(caught.value)


def test_zip_members_with_bad_names_or_twins(tmp_path):
    for name in ("../evil/1.png", "/abs/1.png", "C:/x/1.png", "cat/../1.png"):
        refused_and_skipped(write_zip(tmp_path / "set.zip", {**GOOD, name: grey(1)}), name, "malformed", left=3)
    path = write_zip(tmp_path / "set.zip", GOOD)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("cat/1.png", grey(99))
    made = refused_and_skipped(path, "cat/1.png", "two files of this name", left=3)
    assert made.images[0, 0, 0, 0] == 10


def test_a_zip_bomb_is_refused_by_its_directory(tmp_path):
    bomb = {**GOOD, "cat/bomb.bmp": b"BM" + bytes(4 * 2**20)}
    path = write_zip(tmp_path / "set.zip", bomb, zipfile.ZIP_DEFLATED)
    refused_and_skipped(path, "cat/bomb.bmp", "Limits.max_zip_ratio", left=3)
    small = Limits(max_file_bytes=2**20)
    refused_and_skipped(path, "cat/bomb.bmp", "Limits.max_file_bytes", left=3, limits=small)
    with pytest.raises(DataError, match=r"uncompressed, limit 1,048,576"):
        load(path, limits=Limits(max_total_bytes=2**20), skip_bad=True)


def test_damaged_encrypted_and_unusual_zip_members(tmp_path):
    path = write_zip(tmp_path / "set.zip", GOOD)
    data = bytearray(path.read_bytes())
    data[data.index(b"IHDR") + 6] ^= 1
    path.write_bytes(data)
    refused_and_skipped(path, "cat/1.png", "archive is damaged", left=2)
    data = bytearray(write_zip(path, GOOD).read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    refused_and_skipped(path, "cat/1.png", "encrypted", left=2)
    write_zip(path, GOOD)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_LZMA) as archive:
        archive.writestr("cat/3.png", grey(3))
    refused_and_skipped(path, "cat/3.png", "expected stored or deflate", left=3)
    data = bytearray(write_zip(path, GOOD).read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 2**20)  # the uncompressed size it claims
    path.write_bytes(data)
    refused_and_skipped(path, "cat/1.png", "which is impossible", left=2)


@pytest.mark.parametrize("name", ["set.zip", "set.npz"])
def test_archives_that_are_none(tmp_path, name):
    path = tmp_path / name
    whole = write_zip(path, GOOD).read_bytes()
    for data in (b"", b"not a zip at all", whole[: len(whole) // 2], whole[:-30]):
        path.write_bytes(data)
        with pytest.raises(DataError, match="not a readable zip archive") as caught:
            load(path, skip_bad=True)
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    with pytest.raises(DataError, match="limit 100;"):
        load(path, limits=Limits(max_total_bytes=100))
    end = bytearray(whole)
    struct.pack_into("<I", end, end.rindex(b"PK\x05\x06") + 12, 2**31)
    path.write_bytes(end)
    with pytest.raises(DataError, match="its directory alone takes 2,147,483,648 bytes"):
        load(path)


def test_counts_beyond_the_limits(tmp_path):
    folder, archive = write_folder(tmp_path / "set", GOOD), write_zip(tmp_path / "set.zip", GOOD)
    listed = write_zip(tmp_path / "json.zip", {**GOOD, "dataset.json": manifest(LISTED)})
    arrays = save_npz(random_set(3, 8, 1, ("a", "b")), tmp_path / "set.npz")
    pair = write_idx(tmp_path / "idx", idx(np.zeros((3, 8, 8))), idx(np.array([0, 1, 0])))
    for path in (folder, archive, listed, arrays, pair):
        assert len(load(path, limits=Limits(max_images=3))) == 3
        with pytest.raises(DataError, match="max_images"):
            load(path, limits=Limits(max_images=2), skip_bad=True)
        with pytest.raises(DataError, match="max_total_bytes"):
            load(path, limits=Limits(max_total_bytes=64 * 64 * 2), resolution=64)
    with pytest.raises(DataError, match="max_classes"):
        load(folder, limits=Limits(max_classes=1))
    refused_and_skipped(write_folder(folder, {"cat/3.png": grey(0, 40)}), "cat/3.png", "1,600 pixels, limit 1,599",
                        left=3, limits=Limits(max_pixels=1599))  # fmt: skip


def npz(path, **arrays):
    np.savez(path, **arrays)
    return path


IMAGES, LABELS = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8), np.array([0, 1, 1, 0])


def test_npz_layouts(tmp_path):
    path = tmp_path / "set.npz"
    assert load(npz(path, images=IMAGES, labels=LABELS.astype(np.uint8))).label_names == ("0", "1")
    fortran = np.asfortranarray(np.stack([IMAGES] * 3, -1))
    made = load(npz(path, images=fortran, labels=LABELS, label_names=np.array(["x", "y", "never"])), channels=3)
    np.testing.assert_array_equal(made.images, fortran)
    assert made.label_names == ("x", "y", "never") and made.class_counts().tolist() == [2, 2, 0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "array 'labels', found the arrays"),
        ({"x": IMAGES, "y": LABELS}, r"array 'images', found the arrays \['x', 'y'\]"),
        ({"images": IMAGES / 255, "labels": LABELS}, "images are float64, expected uint8"),
        ({"images": IMAGES[0], "labels": LABELS}, r"images have shape \(8, 8\)"),
        ({"images": IMAGES[..., None].repeat(4, -1), "labels": LABELS}, r"shape \(4, 8, 8, 4\)"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, r"shape \(0, 8, 8, 1\)"),
        ({"images": IMAGES, "labels": LABELS[:3]}, "3 labels for 4 images"),
        ({"images": IMAGES, "labels": LABELS / 1}, "labels are float64"),
        ({"images": IMAGES, "labels": np.eye(4, dtype=int)}, r"labels are int64 \(4, 4\)"),
        ({"images": IMAGES, "labels": LABELS == 1}, "labels are bool"),
        ({"images": IMAGES, "labels": LABELS * 2}, "no image has label 1"),
        ({"images": IMAGES, "labels": LABELS * 0}, "only one class, '0'"),
        ({"images": IMAGES, "labels": LABELS - 9}, "not one image with a usable label"),
        ({"images": IMAGES, "labels": LABELS, "label_names": np.array([1, 2])}, "label_names are int64"),
        ({"images": IMAGES, "labels": LABELS, "label_names": np.array(["a", "a"])}, "more than once"),
    ],
)
def test_meaningless_npz(tmp_path, arrays, message):
    path = npz(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load(path, skip_bad=True)
    assert str(path) in str(caught.value)


def test_npz_with_one_label_out_of_range(tmp_path):
    names = np.array(["x", "y"])
    path = npz(tmp_path / "set.npz", images=IMAGES, labels=np.array([0, 1, 7, 0]), label_names=names)
    made = refused_and_skipped(path, "set.npz[2]", "label 7 is outside 0…1", left=3)
    np.testing.assert_array_equal(made.images[..., 0], IMAGES[[0, 1, 3]])
    path = npz(tmp_path / "set.npz", images=IMAGES, labels=np.array([0, 1, -1, 0]))
    refused_and_skipped(path, "set.npz[2]", "label -1 is outside", left=3)


class Marks:
    """Unpickling it leaves a mark."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("key", ["images", "labels", "label_names"])
def test_pickle_is_never_loaded(tmp_path, key):
    mark = tmp_path / "mark"
    arrays = {"images": IMAGES, "labels": LABELS, "label_names": np.array(["x", "y"])}
    arrays[key] = np.array([Marks(mark), 2], dtype=object)
    path = npz(tmp_path / "set.npz", **arrays)
    with pytest.raises(DataError, match=f"'{key}': holds Python objects, that is pickle"):
        load(path, skip_bad=True)
    pickled = tmp_path / "set.pkl"
    pickled.write_bytes(pickle.dumps(Marks(mark)))
    for options in ({}, {"format": "npz"}, {"format": "zip"}):
        with pytest.raises(DataError, match=r"never loaded|not a readable zip"):
            load(pickled, **options)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Marks(mark))).close()
    assert mark.exists()  # the trap does work


def npy(array, shape):
    """A .npy whose header declares `shape`, whatever the array holds."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + array.tobytes()


@pytest.mark.parametrize("shape", [(5, 8, 8), (3, 8, 8), (2**40, 8, 8), (-4, 8, 8), (2**62, 8, 8)])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_npz_header_that_lies(tmp_path, shape, compression):
    labels = io.BytesIO()
    np.save(labels, LABELS)
    path = write_zip(tmp_path / "set.npz", {"images.npy": npy(IMAGES, shape), "labels.npy": labels.getvalue()}, compression)
    with pytest.raises(DataError, match=r"'images': its header declares uint8 .* but 256 are there"):
        load(path, skip_bad=True)


def test_other_damaged_npz(tmp_path):
    path = tmp_path / "set.npz"
    for data in (b"", b"\x93NUMPY\x01\x00\xff\xff", b"\x93NUMPY\x03\x00" + bytes(100), b"GIF89a"):
        with pytest.raises(DataError, match="array 'images'"):
            load(write_zip(path, {"images.npy": data, "labels.npy": data}))
    flat = IMAGES * 0
    np.savez_compressed(path, images=flat, labels=LABELS)
    assert len(load(path)) == 4
    whole = bytearray(npz(path, images=IMAGES, labels=LABELS).read_bytes())
    whole[300] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match="damaged"):
        load(path)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_pairs(tmp_path, packed):
    train = write_idx(tmp_path / "set", idx(IMAGES), idx(LABELS), packed=packed)
    write_idx(tmp_path / "set", idx(IMAGES[::-1]), idx(LABELS[::-1]), stem="t10k", packed=packed)
    made = load(train)
    np.testing.assert_array_equal(made.images[..., 0], IMAGES)
    assert made.labels.tolist() == LABELS.tolist() and made.label_names == ("0", "1")
    test = load(tmp_path / "set" / f"t10k-images-idx3-ubyte{'.gz' if packed else ''}", channels=3)
    np.testing.assert_array_equal(test.images[..., 2], IMAGES[::-1])
    dotted = tmp_path / "set" / "odd-images.idx3-ubyte"
    dotted.write_bytes(idx(IMAGES))
    dotted.with_name("odd-labels.idx1-ubyte").write_bytes(idx(LABELS))
    assert len(load(dotted)) == 4


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (idx(IMAGES)[:-1], idx(LABELS), "images-idx3.*but only 255 are there"),
        (idx(IMAGES) + b"x", idx(LABELS), "images-idx3.*but more are there"),
        (idx(IMAGES)[:10], idx(LABELS), "images-idx3.*starts with"),
        (b"", idx(LABELS), "images-idx3.*starts with nothing"),
        (idx(LABELS), idx(LABELS), "images-idx3.*starts with 00000801; expected 00000803"),
        (struct.pack(">4I", 0x0803, 2**31, 2**31, 2**31), idx(LABELS), "images-idx3.*declares"),
        (struct.pack(">4I", 0x0803, 2**20, 8, 8), idx(LABELS), "images-idx3.*are there"),
        (idx(IMAGES), idx(LABELS[:3]), "3 labels for 4 images"),
        (idx(IMAGES), idx(LABELS)[:-2], "labels-idx1.*only 2"),
        (idx(IMAGES), idx(LABELS * 3), "no image has label 1"),
    ],
)
def test_bad_idx(tmp_path, images, labels, message, packed):
    path = write_idx(tmp_path / "set", images, labels, packed=packed)
    if not packed:
        message = message.replace("but only 255", "but 255").replace("but more", "but 257").replace("only 2", "but 2")
    with pytest.raises(DataError, match=message):
        load(path, skip_bad=True)


def test_idx_files_that_are_missing_or_damaged(tmp_path):
    path = write_idx(tmp_path / "set", idx(IMAGES), idx(LABELS), stem="t10k")
    with pytest.raises(DataError, match=r"give the images file itself, one of \['t10k-images-idx3-ubyte'\]"):
        load(path)
    with pytest.raises(DataError, match="these are the labels"):
        load(path / "t10k-labels-idx1-ubyte")
    (path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"labels were not found beside it; expected t10k-labels-idx1-ubyte"):
        load(path / "t10k-images-idx3-ubyte")
    packed = gzip.compress(idx(IMAGES), mtime=0)
    for data in (packed[:-12], packed[:-8] + b"\0" * 8, b"\x1f\x8b" + bytes(30), b"plain"):
        write_idx(tmp_path / "gz", b"", idx(LABELS), packed=True)
        (tmp_path / "gz" / "train-images-idx3-ubyte.gz").write_bytes(data)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz: cannot be read, damaged or truncated"):
            load(tmp_path / "gz")


def test_sources_that_are_not_recognised(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        load(tmp_path / "nowhere")
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match="format not recognised"):
        load(tmp_path / "x.tar")
    with pytest.raises(DataError, match="format: expected one of"):
        load(tmp_path / "x.tar", format="tar")
    with pytest.raises(DataError, match="is no folder"):
        load(tmp_path / "x.tar", format="folder")
    with pytest.raises(DataError, match="is no file"):
        load(tmp_path, format="npz")
    for options in ({"resolution": 7}, {"resolution": 65}, {"channels": 2}, {"channels": 4}):
        with pytest.raises(DataError, match=r"resolution|channels"):
            load(write_folder(tmp_path / "set", GOOD), **options)


def test_mixed_sizes_and_channels_become_one_shape(tmp_path):
    colour = png(np.full((30, 20, 3), (10, 200, 30), np.uint8))
    path = write_folder(tmp_path / "set", {"a/1.png": colour, "b/1.jpg": grey(9, 64), "b/2.png": grey(9, 3)})
    made = load(path, resolution=13, channels=3)
    assert made.images.shape == (3, 13, 13, 3)
    assert (made.images[0] == (10, 200, 30)).all() and (made.images[1:] == 9).all()
    assert (load(path, channels=1).images[0] == (10 * 299 + 200 * 587 + 30 * 114 + 500) // 1000).all()
