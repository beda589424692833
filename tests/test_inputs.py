"""What is wrong with the sets or the settings is found before anything is charged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import PRIVATE, PUBLIC, SECTIONS, TEST, bars, run_all, tiny_config

import privimage_fast as pf
from privimage_fast.cli import main
from privimage_fast.config import ConfigError, build_config, parse_value
from privimage_fast.data import ImageSet, save_folder, save_npz
from privimage_fast.pipeline import Run
from privimage_fast.stages.folder import RunError


@pytest.mark.parametrize("name", ["public", "test"])
def test_the_sensitive_set_as_another_is_refused_before_anything(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Pre-trained on in the clear, it would leave a card that claims ε."""
    sets = {"public": PUBLIC, "private": PRIVATE, "test": TEST}
    relabelled = PRIVATE.relabel(np.zeros(120, np.int64), ("all",)) if name == "public" else PRIVATE
    for copy in (relabelled, PRIVATE.subset(np.arange(7, 90))):
        run = Run(tiny_config(tmp_path / "a"), **{**sets, name: copy})
        with (
            pytest.raises(ConfigError, match=rf"data\.{name} and data\.private have \d+ images in common"),
            run.opened(resume=False),
        ):
            pass
        assert not run.folder.config.exists()
    for count in (1, 2):  # of 120: fewer than one in a hundred, and more
        large = bars(300, sets[name].n_classes, 8, prefix="letter" if name == "public" else "digit")
        images = np.concatenate([large.images, PRIVATE.images[:count]])
        mixed = ImageSet(images, np.append(large.labels, PRIVATE.labels[:count]), large.label_names)
        run = Run(tiny_config(tmp_path / f"{count}"), **{**sets, name: mixed})
        if count == 1:
            with run.opened(resume=False):
                assert f"data.{name} and data.private have 1 images in common" in caplog.text
        else:
            with (
                pytest.raises(ConfigError, match=rf"data\.{name} and data\.private have 2 images in common"),
                run.opened(resume=False),
            ):
                pass


def test_what_evaluation_lacks_is_found_before_anything_is_charged(tmp_path: Path) -> None:
    few = TEST.subset(np.arange(5))
    for test, sections, message in (
        (few, {}, "5 test images are too few"),
        (TEST, {"sample": {"per_class": 1}}, "3 synthetic images are too few"),
        (TEST, {"evaluate": {"network": "lite0"}}, "needs two packages"),
    ):
        run = Run(tiny_config(tmp_path / "a", **sections), public=PUBLIC, private=PRIVATE, test=test)
        with pytest.raises(RunError, match=message), run.opened(resume=False):
            pass
        assert not run.folder.ledger.exists()


def test_a_run_is_described_even_if_it_cannot_be_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Run) -> None:
        raise ArithmeticError("no distance")

    monkeypatch.setattr(Run, "evaluate", broken)
    with pytest.raises(ArithmeticError):
        run_all(tmp_path / "a")
    assert "report.html" in {p.name for p in (tmp_path / "a").iterdir()} >= {"README.md", "synthetic.npz"}


def test_a_run_that_trains_nothing_needs_no_batch(tmp_path: Path) -> None:
    """It was refused for a batch that it never draws, after its query was charged."""
    run = run_all(tmp_path / "a", privacy={"train": False}, finetune={"steps": None, "batch_size": 4096})
    assert run.folder.model.exists() and run.folder.read_json(run.folder.budget, "plan")["sample_rate"] is None


def test_a_test_set_may_come_later_unless_a_share_is_held_out(tmp_path: Path) -> None:
    for name, images in (("public", PUBLIC), ("private", PRIVATE), ("test", TEST)):
        save_npz(images, tmp_path / f"{name}.npz")
    data = {**SECTIONS["data"], "public": str(tmp_path / "public.npz"), "private": str(tmp_path / "private.npz")}
    later = {**data, "test": str(tmp_path / "test.npz")}
    for share in (0.0, 0.3):
        with Run(tiny_config(tmp_path / f"{share}", data={**data, "holdout": share})).opened(resume=False) as run:
            run.query()
        again = Run(tiny_config(tmp_path / f"{share}", data={**later, "holdout": share}))
        if not share:
            with again.opened(resume=True):
                assert again.test is not None
            with Run(tiny_config(tmp_path / f"{share}", data=data)).opened(resume=True) as third:
                assert third.test is not None  # and is not forgotten
        else:  # all images would be trained on
            with pytest.raises(RunError, match=r"data\.test"), again.opened(resume=True):
                pass


def test_the_number_of_test_images_is_not_written(tmp_path: Path) -> None:
    stamps = set()
    for count in (30, 24):
        run = run_all(tmp_path / str(count), test=TEST.subset(np.arange(count)), privacy={"secure": False})
        stamps.add(run.folder.fingerprint_of("evaluate"))
    assert len(stamps) == 1


def test_sizes_that_a_preset_does_not_take_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(tmp_path / "a", model={"preset": "small"})
    Run(config, public=PUBLIC, private=PRIVATE).check_inputs()
    assert "model.unet is not used: preset small has sizes of its own" in caplog.text


# ------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("data.private", "same.npz #2", "same.npz #2"),  # of which YAML would keep another file's name
        ("data.private", "*.npz", "*.npz"),
        ("data.private", "@x: {", "@x: {"),
        ("data.private", "12", "12"),
        ("data.private", "null", "null"),
        ("data.test", "null", None),
        ("data.public", "[a, b c]", ["a", "b c"]),
        ("out", "", ""),
        ("privacy.epsilon", "3", 3),
        ("privacy.secure", "false", False),
        ("evaluate.architectures", "[cnn, wrn:16]", ["cnn", "wrn:16"]),
    ],
)
def test_values_of_the_command_line(key: str, text: str, value: object) -> None:
    assert parse_value(key, text) == value


def test_values_that_are_no_yaml_are_refused_by_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", "--data.private", "a", "--data.public", "b", "--privacy.epsilon", "*"]) == 2
    assert "--privacy.epsilon: '*' is not a YAML value" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_bytes(b"out: \xff\xfe")
    assert main(["run", "--config", str(tmp_path / "run.yaml")]) == 2
    assert "run.yaml is not UTF-8 text" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["seed", "public_seed"])
def test_negative_seeds_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must not be negative, found -1"):
        build_config({name: -1})


@pytest.mark.parametrize("out", ["digits", "digits/run", "."])
def test_a_run_is_not_put_among_images(tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sheets would be taken for sensitive images, and these be published with it."""
    save_folder(PRIVATE, tmp_path / "digits")
    save_npz(PUBLIC, tmp_path / "letters.npz")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    sections = {"data": {**SECTIONS["data"], "public": "letters.npz", "private": "digits"}}
    with (
        pytest.raises(ConfigError, match=rf"out is {out}, and data.\w+ is \S+: a run needs a folder of its own"),
        Run(tiny_config(Path(out), **sections)).opened(resume=False),
    ):
        pass
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_pictures_is_no_run_s(tmp_path: Path) -> None:
    save_folder(PRIVATE, tmp_path / "digits")
    with pytest.raises(ConfigError, match=r"which holds digit0 and is no run's folder"):
        run_all(tmp_path / "digits")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "my-notes.txt").touch()  # does no harm
    run_all(tmp_path / "a")


@pytest.mark.parametrize("found", [PRIVATE.images, (PRIVATE.images, PRIVATE.labels)], ids=["array", "pair"])
def test_arrays_are_refused_without_their_pixels(found: Any) -> None:
    with pytest.raises(TypeError, match=r"^private: give a folder, a file or pf.ImageSet\(.*\) .*, found (ndarray|tuple)$"):
        pf.PrivImage().fit(PUBLIC, found)
