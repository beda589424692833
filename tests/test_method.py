"""The method in Python: :class:`privimage_fast.PrivImage`, and evaluations of a fitted run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from tiny import PRIVATE, PUBLIC, STEPS, TEST, bars, run_all, tiny_config

import privimage_fast as pf
from privimage_fast.config import ConfigError
from privimage_fast.dp.accounting import default_delta
from privimage_fast.dp.ledger import Ledger
from privimage_fast.models.edm import to_float
from privimage_fast.stages import folder as folder_module
from privimage_fast.stages.folder import RunError
from privimage_fast.stages.select import selected_subset


def test_python_api_end_to_end(tmp_path: Path) -> None:
    model = pf.PrivImage(tiny_config(tmp_path))
    with pytest.raises(RunError, match="call fit"):
        model.sample(3)
    assert model.plan(PUBLIC, PRIVATE).steps == STEPS
    model.fit(PUBLIC, PRIVATE, out=tmp_path / "a")
    images = model.sample(7)
    assert images.images.shape == (7, 8, 8, 1) and images.label_names == PRIVATE.label_names
    assert np.array_equal(images.images, model.sample(7).images)
    spent = model.privacy_spent()
    assert spent["epsilon"] == Ledger.read(tmp_path / "a" / "ledger.jsonl").epsilon() <= 5.0
    assert {m["name"] for m in model.evaluate(TEST)["metrics"]} >= {"accuracy, trained on synthetic, tested on real"}
    model.save_pretrained(tmp_path / "saved")
    other = pf.PrivImage.from_pretrained(tmp_path / "saved")
    with pytest.raises(RunError, match=r"a is a run; its model is in .*model"):
        pf.PrivImage.from_pretrained(tmp_path / "a")
    other.config = model.config
    assert np.array_equal(other.sample(7).images, images.images)
    assert other.privacy_spent()["epsilon"] == spent["epsilon"]
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "accuracy, trained and tested on synthetic" in card and "tested on real" not in card and "not private**" not in card
    other.save_pretrained(tmp_path / "again")  # whoever passes it on passes on what it cost
    assert {p.name for p in (tmp_path / "again").iterdir()} == {p.name for p in (tmp_path / "saved").iterdir()}
    for path in (tmp_path / "saved").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(ValueError, match="labels must be"):
        model.sample(2, np.array([0, 9]))
    with pytest.raises(ValueError, match="n must be at least 1, found -1"):
        model.sample(-1)


@pytest.mark.parametrize(
    "model",
    [
        {},
        {
            "family": "gan",
            "gan": {"latent": 4, "generator_channels": 4, "discriminator_channels": 4, "max_mult": 1, "features": 4},
        },
    ],
    ids=["diffusion", "gan"],
)
def test_a_model_of_patches_is_trained_exported_and_drawn_from(tmp_path: Path, model: dict[str, Any]) -> None:
    run = run_all(tmp_path / "a", model={**model, "patch": 2})
    with np.load(run.folder.synthetic) as arrays:
        assert arrays["images"].shape == (36, 8, 8, 1)
    fitted = pf.PrivImage.from_pretrained(run.folder.model)
    described = json.loads((run.folder.model / "config.json").read_text())
    assert described["patch"] == 2 and len(np.unique(fitted.sample(6).images, axis=0)) == 6
    # Models saved before there were patches have none, and are not taken for such.
    described.pop("patch")
    (run.folder.model / "config.json").write_text(json.dumps(described))
    with pytest.raises(RunError, match="does not hold a model of this version"):
        pf.PrivImage.from_pretrained(run.folder.model)


def test_the_scale_of_images_is_that_of_the_chosen_public_ones_throughout(tmp_path: Path) -> None:
    """It is measured without noise, so nothing sensitive may enter it, before or after."""
    run = run_all(tmp_path / "a", model={"patch": 2}, select={"labels_per_class": 1})
    selection = json.loads(run.folder.selection.read_text())
    chosen, _ = selected_subset(selection, PUBLIC, PRIVATE.label_names)
    assert len(chosen) == len(PUBLIC) / 2
    expected = run.model()
    expected.measure(to_float(torch.from_numpy(PUBLIC.images[chosen])))
    assert float(expected.band_mean.abs().max()) > 0.1 and float((expected.band_std - 0.5).abs().min()) > 0.01
    kept = [run.folder.checkpoint(name) for name in ("pretrain", "warmup", "finetune")]
    for path in (*kept, run.folder.model / "model.safetensors"):
        tensors, _ = run.folder.load_tensors(path, "finetune")
        for name in ("band_mean", "band_std"):
            torch.testing.assert_close(tensors[name], getattr(expected, name))
            assert torch.equal(tensors[name], run.folder.load_tensors(kept[0], "pretrain")[0][name])


def test_a_run_of_a_given_scale_is_gone_on_with_where_none_is_given(tmp_path: Path) -> None:
    """Earlier versions had 0.5 for it, which their configuration files do not say."""
    run_all(tmp_path / "a", model={"edm": {"sigma_data": 0.5}})
    again = run_all(tmp_path / "a", resume=True)
    assert again.config.model.edm.sigma_data == 0.5
    with pytest.raises(RunError, match=r"other settings \(model.edm.sigma_data\)"):
        run_all(tmp_path / "a", resume=True, model={"edm": {"sigma_data": 0.4}})


def test_a_patch_that_does_not_fill_the_images_is_refused_before_anything_is_spent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.patch 3 does not divide 8 px into 3 blocks or more; choose one of 1, 2"):
        run_all(tmp_path / "a", model={"patch": 3})
    assert not (tmp_path / "a" / "ledger.jsonl").exists()


def test_a_model_saved_without_patches_is_read_as_before(tmp_path: Path) -> None:
    run = run_all(tmp_path / "a")
    before = pf.PrivImage.from_pretrained(run.folder.model).sample(4).images
    described = json.loads((run.folder.model / "config.json").read_text())
    assert described.pop("patch") == 1
    (run.folder.model / "config.json").write_text(json.dumps(described))
    assert np.array_equal(pf.PrivImage.from_pretrained(run.folder.model).sample(4).images, before)


def test_the_neighbour_sheet_is_written_only_when_asked_for(tmp_path: Path) -> None:
    run = run_all(tmp_path / "a", evaluate={"neighbours": True})
    assert (run.folder.samples / "neighbours-not-private.png").stat().st_size > 100


def test_a_second_set_gets_numbers_of_its_own(tmp_path: Path) -> None:
    """N, δ, σ₂ and steps of the first set would be a promise about the second that nobody made."""
    config = tiny_config(tmp_path, privacy={"delta": None}, finetune={"steps": None, "epochs": 1.0})
    model, larger = pf.PrivImage(config), bars(360, 3, 5, prefix="digit")
    for name, private in (("a", PRIVATE), ("b", larger)):
        model.fit(PUBLIC, private, out=tmp_path / name)
        header = Ledger.read(tmp_path / name / "ledger.jsonl").header
        assert (header.population, header.delta) == (len(private), default_delta(len(private)))
        assert (
            model.plan(PUBLIC, private).steps
            == len(private) // 30
            == Ledger.read(tmp_path / name / "ledger.jsonl").steps_charged("finetune")
        )
    assert model.config == config


def test_another_test_set_is_another_evaluation(tmp_path: Path) -> None:
    model = pf.PrivImage(tiny_config(tmp_path)).fit(PUBLIC, PRIVATE, out=tmp_path / "a")
    blank = pf.ImageSet(np.zeros_like(TEST.images), TEST.labels, TEST.label_names)
    first, second = ({m["name"]: m["value"] for m in model.evaluate(t)["metrics"]} for t in (TEST, blank))
    assert first != second


def test_another_test_set_leaves_the_split_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(tmp_path, data={"holdout": 0.25})
    model = pf.PrivImage(config).fit(PUBLIC, PRIVATE, out=tmp_path / "a")
    model.evaluate(TEST)
    assert model._run is not None and len(model._run.private) == model._run.config.privacy.population < len(PRIVATE)
    assert "N stays" not in caplog.text and "holdout" not in caplog.text


def test_a_model_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no model"):
        pf.PrivImage.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 7}')
    with pytest.raises(RunError, match="format 7"):
        pf.PrivImage.from_pretrained(tmp_path)


def test_a_user_semantic_function(tmp_path: Path) -> None:
    model = pf.PrivImage(tiny_config(tmp_path))
    model.fit(PUBLIC, PRIVATE, out=tmp_path / "a", semantic_function=lambda x: x[:, 0].mean(1)[:, :6])
    query = json.loads((tmp_path / "a" / "query.json").read_text())
    assert query["semantic_function"] == "given by the user"
    # Column c is bright in class c: the user's scores say so, and the noise is small against 40 votes.
    assert all(int(np.argmax(row)) == c for c, row in enumerate(query["counts"]))


def test_a_run_without_test_images_is_finished(tmp_path: Path) -> None:
    """A card for publication that calls itself unfinished makes its ε look unfinished as well."""
    model = pf.PrivImage(tiny_config(tmp_path)).fit(PUBLIC, PRIVATE, out=tmp_path / "a")
    model.save_pretrained(tmp_path / "saved")
    assert "not finished" not in (tmp_path / "saved" / "README.md").read_text()
    run = run_all(tmp_path / "b", test=None)
    assert not any(
        "not finished" in (run.folder.path / name).read_text() for name in ("README.md", "report.html", "model/README.md")
    )


def test_a_disk_that_is_full_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(folder_module, "save_file", full)
    with pytest.raises(RunError, match=r"classifier\.safetensors cannot be written .*No space.*--resume"):
        run_all(tmp_path / "a")


def test_a_fitted_model_draws_what_it_draws_when_it_is_loaded(tmp_path: Path) -> None:
    """With what the run has filled in, plain black here."""
    black = PUBLIC.images.copy()
    black[black < 60] = 0
    public = pf.ImageSet(black, PUBLIC.labels, PUBLIC.label_names)
    model = pf.PrivImage(tiny_config(tmp_path)).fit(public, PRIVATE, out=tmp_path / "a")
    model.save_pretrained(tmp_path / "m")
    loaded = pf.PrivImage.from_pretrained(tmp_path / "m")
    drawn = model.sample(9, labels=[0, 1, 2] * 3).images
    assert loaded.config.sample.sampler.black == 7 and not ((drawn > 0) & (drawn <= 7)).any()
    assert np.array_equal(drawn, loaded.sample(9, labels=[0, 1, 2] * 3).images)
