"""Labels from a privately trained layer in a run: budget, interruptions, resuming."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from tiny import LABEL, PRIVATE, PUBLIC, SECTIONS, TEST, dpsgd, run_all, tiny_config

import privimage_fast as pf
from privimage_fast.config import ConfigError
from privimage_fast.dp.accounting import epsilon
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey, Stream
from privimage_fast.dp.optimizer import PrivateOptimizer
from privimage_fast.pipeline import Run
from privimage_fast.report import build_report
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.label import embedded
from privimage_fast.stages.sample import run_sample
from privimage_fast.stages.saved import load_pretrained

stage = importlib.import_module("privimage_fast.stages.label")

STEPS = LABEL["steps"]


def test_fine_tuning_leaves_what_the_labels_cost(finished: Run) -> None:
    ledger = Ledger.read(finished.folder.ledger)
    stages = [r.stage for r in ledger.records()]
    assert stages == ["query", "warmup"] + ["finetune"] * SECTIONS["finetune"]["steps"] + ["label"] * STEPS
    assert 4.97 < ledger.epsilon() <= 5.0
    without = [r.event for r in ledger.records() if r.stage != "label"]
    assert epsilon(without, 1e-3) < 4.9  # what was kept for them was not trained with
    budget = json.loads(finished.folder.budget.read_text())
    labels = [r.event for r in ledger.records() if r.stage == "label"]
    assert (budget["label_steps"], budget["label_noise_multiplier"]) == (STEPS, labels[0].noise_multiplier)
    assert finished.config.label.noise_multiplier == labels[0].noise_multiplier


def test_the_synthetic_images_have_its_labels_and_the_published_model_gives_them(finished: Run, tmp_path: Path) -> None:
    with np.load(finished.folder.synthetic) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    model = pf.PrivImage.from_pretrained(finished.folder.model)
    assert model._labeller is not None and np.array_equal(model._labeller.labels(images), labels)
    kept = json.loads(finished.folder.labels.read_text())
    wanted = np.repeat(np.arange(3), 12)
    assert kept["kept"] == pytest.approx(np.mean(wanted == labels)) and kept["kept"] < 1
    assert kept["kept_of_class"] == [pytest.approx(np.mean(labels[wanted == c] == c)) for c in range(3)]
    again = model.sample(9)
    model.save_pretrained(tmp_path / "again")
    assert np.array_equal(pf.PrivImage.from_pretrained(tmp_path / "again").sample(9).labels, again.labels)
    assert np.array_equal(model._labeller.labels(again.images), again.labels)
    (tmp_path / "again" / "labeller.safetensors").unlink()
    with pytest.raises(RunError, match=r"labeller.safetensors is missing"):
        pf.PrivImage.from_pretrained(tmp_path / "again")


def test_going_on_with_a_finished_run_charges_nothing_and_keeps_the_labels(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    before = (tmp_path / "a" / "synthetic.npz").read_bytes(), (tmp_path / "a" / "ledger.jsonl").read_bytes()
    run = run_all(tmp_path / "a", resume=True, label=LABEL)
    assert before == (run.folder.synthetic.read_bytes(), run.folder.ledger.read_bytes())
    with run.opened(resume=True):
        run.finetune()  # alone, it publishes the model anew
    assert pf.PrivImage.from_pretrained(run.folder.model)._labeller is not None
    # Otherwise drawn images are labelled by the same layer.
    run = Run(tiny_config(tmp_path / "a", label=LABEL, sample={"per_class": 4}), public=PUBLIC, private=PRIVATE, test=TEST)
    with run.opened(resume=True):
        assert len(run.sample()) == 12
    assert before[1] == run.folder.ledger.read_bytes()


def test_the_python_way_labels_as_well(tmp_path: Path) -> None:
    model = pf.PrivImage(tiny_config(tmp_path, label=LABEL)).fit(PUBLIC, PRIVATE, out=tmp_path / "a")
    drawn, found = model.sample(30), pf.PrivImage.from_pretrained(tmp_path / "a" / "model")
    assert model._labeller is not None and found._labeller is not None
    assert np.array_equal(drawn.labels, found._labeller.labels(drawn.images))
    assert model.privacy_spent()["epsilon"] == found.privacy_spent()["epsilon"] <= 5.0


def test_a_stage_left_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Run, "label", lambda self: None)
        with pytest.raises(RunError, match=r"its labels are not learned yet, .*; run `privimage label` first"):
            run_all(tmp_path / "a", label=LABEL)
    run_all(tmp_path / "a", resume=True, label=LABEL)
    with pytest.raises(RunError, match=r"started with other settings \(label.steps\)"):
        run_all(tmp_path / "a", resume=True, label={**LABEL, "steps": 7})


def test_a_gan_is_labelled_alike(tmp_path: Path) -> None:
    sizes = {"latent": 4, "generator_channels": 4, "discriminator_channels": 4, "max_mult": 1, "features": 4}
    run = run_all(tmp_path / "a", label=LABEL, model={"family": "gan", "gan": sizes}, finetune={"multiplicity": 1})
    assert Ledger.read(run.folder.ledger).steps_charged("label") == STEPS and run.folder.labels.exists()


SEEDED: dict[str, Any] = {"label": LABEL, "privacy": {"secure": False}}


@contextmanager
def pressed_in_step(at: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ctrl-C in a step of the layer, after its charge; the block ends in KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    original = NoiseKey.gaussian

    def pressed(self: NoiseKey, shape: Any, *, step: int, stream: Stream, rank: int = 0) -> np.ndarray:
        if stream == Stream.LABELS and step + 1 == at:
            signal.raise_signal(signal.SIGINT)
        return original(self, shape, step=step, stream=stream, rank=rank)

    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(NoiseKey, "gaussian", pressed)
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_all(tmp_path_factory.mktemp("seeded") / "a", **SEEDED)


@pytest.mark.parametrize("at", [1, 2, STEPS])
def test_an_interrupted_step_is_finished_and_never_repeated(
    uninterrupted: Run, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes out is to the last bit what comes out without an interruption."""
    with pressed_in_step(at, monkeypatch):
        run_all(tmp_path / "a", **SEEDED)
    assert Ledger.read(tmp_path / "a" / "ledger.jsonl").steps_charged("label") == at
    run = run_all(tmp_path / "a", resume=True, **SEEDED)
    assert Ledger.read(run.folder.ledger).steps_charged("label") == STEPS
    (made, described), (expected, _) = (r.folder.load_tensors(r.folder.checkpoint("label"), "x") for r in (run, uninterrupted))
    assert described["steps"] == STEPS and made.keys() == expected.keys()
    assert all(torch.equal(made[name], expected[name]) for name in expected)
    assert not run.folder.checkpoint("label-progress").exists() and not run.folder.checkpoint("label-features").exists()


def test_images_are_not_drawn_before_their_labels_are_learned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the last step was taken, and only publishing the layer was cut off."""
    with pressed_in_step(STEPS, monkeypatch):
        run_all(tmp_path / "a", label=LABEL)
    run = Run(tiny_config(tmp_path / "a", label=LABEL), public=PUBLIC, private=PRIVATE, test=TEST)
    with run.opened(resume=True):
        with pytest.raises(RunError, match="run `privimage label` first"):
            run.sample()
        assert not run.folder.synthetic.exists()
        assert run.label() is not None and len(run.sample()) == 36


def test_steps_that_the_ledger_does_not_charge_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pressed_in_step(2, monkeypatch):
        run_all(tmp_path / "a", label=LABEL)
    ledger = tmp_path / "a" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match=r"label-progress.safetensors has taken 2 steps, the ledger charges 1"):
        run_all(tmp_path / "a", resume=True, label=LABEL)


def test_a_step_may_be_tried_again_in_the_same_open_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a full memory, say; with noise of its own, since the charge before it counts."""
    run = Run(tiny_config(tmp_path / "a", label=LABEL), public=PUBLIC, private=PRIVATE, test=TEST)
    with run.opened(resume=False):
        for made in (run.query, run.select, run.pretrain, run.warmup, run.finetune):
            made()
        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(stage, "_descended", Mock(side_effect=torch.OutOfMemoryError))
            run.label()
        run.label()
        assert run.ledger.steps_charged("label") == STEPS and run.ledger.epsilon() <= 5.0


def test_drafts_may_be_drawn_otherwise_when_they_are_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(stage, "train_classifier", lambda *args, **options: 1 / 0)
        run_all(tmp_path / "a", label=LABEL)
    assert len(list((tmp_path / "a" / "checkpoints").glob("label-drafts-*"))) == 1
    run = run_all(tmp_path / "a", resume=True, label=LABEL, sample={"batch_size": 5})
    assert not list((run.folder.path / "checkpoints").glob("label-drafts-*"))
    assert Ledger.read(run.folder.ledger).steps_charged("label") == STEPS


def test_drafts_are_other_images_than_the_synthetic_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts, original = [], stage.draw_resumably

    def drawn(*args: Any, **options: Any) -> np.ndarray:
        drafts.append(original(*args, **options))
        return drafts[-1]

    monkeypatch.setattr(stage, "draw_resumably", drawn)
    run = run_all(tmp_path / "a", label=LABEL)
    with np.load(run.folder.synthetic) as arrays:
        synthetic = {image.tobytes() for image in arrays["images"]}
    assert len(drafts) == 1 and len(drafts[0]) == 27 and not synthetic & {image.tobytes() for image in drafts[0]}


def test_a_lost_layer_is_taken_from_the_published_model(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    (tmp_path / "a" / "checkpoints" / "label.safetensors").unlink()
    names = ["ledger.jsonl", "synthetic.npz", "model/config.json", "model/model.safetensors", "model/labeller.safetensors"]
    before = [(tmp_path / "a" / name).read_bytes() for name in names]
    run = run_all(tmp_path / "a", resume=True, label=LABEL)
    assert pf.PrivImage.from_pretrained(run.folder.model)._labeller is not None
    assert before == [(tmp_path / "a" / name).read_bytes() for name in names]


@pytest.mark.parametrize("lost", ["unlinked", "another model's"])
def test_a_lost_layer_that_the_budget_cannot_pay_for_again_is_an_error(
    finished: Run, tmp_path: Path, lost: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It has to be learned anew, and all of its budget is charged: no layer without a private step passes for one."""
    shutil.copytree(finished.folder.path, tmp_path / "a")
    run = Run(tiny_config(tmp_path / "a", label=LABEL), public=PUBLIC, private=PRIVATE, test=TEST)
    for layer in (run.folder.checkpoint("label"), run.folder.model / "labeller.safetensors"):
        tensors, described = run.folder.load_tensors(layer, "x")
        layer.unlink() if lost == "unlinked" else run.folder.save_tensors(layer, tensors, {**described, "weights": "others"})
    ledger = run.folder.ledger.read_bytes()
    with run.opened(resume=True):
        run.finetune()  # publishes the model anew, and no labeller as its own that is not
        with pytest.raises(RunError, match=f"allows no step of the layer .*: {STEPS} are charged.* go on with --label.steps 0"):
            run.label()
    assert pf.PrivImage.from_pretrained(run.folder.model)._labeller is None
    card = (run.folder.model / "README.md").read_text()
    assert "a classifier labels" not in card and "labels' layer" not in card
    # The way out:
    run = run_all(tmp_path / "a", resume=True, label={**LABEL, "steps": 0})
    with np.load(run.folder.synthetic) as arrays:
        assert arrays["labels"].tolist() == np.repeat(np.arange(3), 12).tolist()
    assert run.folder.ledger.read_bytes() == ledger and not run.folder.labels.exists()
    card = run.folder.card.read_text()
    assert "a classifier labels" not in card and re.search(rf"\| label \|.*\| {STEPS} \|", card)


def test_without_a_budget_a_lost_layer_is_learned_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sections: dict[str, Any] = {"label": LABEL, "privacy": {"epsilon": float("inf")}}
    run = run_all(tmp_path / "a", **sections)
    for layer in (run.folder.checkpoint("label"), run.folder.model / "labeller.safetensors"):
        layer.unlink()
    run_all(tmp_path / "a", resume=True, **sections)
    assert Ledger.read(run.folder.ledger).steps_charged("label") == 2 * STEPS
    assert f"label: of the steps in the ledger {STEPS} are of no layer that is kept" in caplog.text


def test_the_published_layer_is_charged_as_well(finished: Run, tmp_path: Path) -> None:
    """A ledger of before the labels would be published with a layer that learned from sensitive images after it."""
    shutil.copytree(finished.folder.path, tmp_path / "a")
    (tmp_path / "a" / "checkpoints" / "label.safetensors").unlink()
    ledger = tmp_path / "a" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-STEPS]))
    published = {path: path.read_bytes() for path in (tmp_path / "a" / "model").iterdir()}
    with pytest.raises(RunError, match=rf"labeller.safetensors has taken {STEPS} steps, the ledger charges 0"):
        run_all(tmp_path / "a", resume=True, label=LABEL)
    assert published == {path: path.read_bytes() for path in (tmp_path / "a" / "model").iterdir()}


@pytest.mark.parametrize("stages", [["sample"], ["label", "sample"]])
def test_each_stage_gives_labels_up(finished: Run, tmp_path: Path, stages: list[str]) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    given_up = tiny_config(tmp_path / "a", label={**LABEL, "steps": 0})
    run = Run(given_up, public=PUBLIC, private=PRIVATE, test=TEST)
    with run.opened(resume=True):
        for stage_name in stages:
            getattr(run, stage_name)()
    with np.load(run.folder.synthetic) as arrays:
        assert arrays["labels"].tolist() == np.repeat(np.arange(3), 12).tolist()
    assert (load_pretrained(run.folder.model).labeller is None) == ("label" in stages)


def test_labels_may_be_given_up_and_what_they_cost_stays_charged(
    finished: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    run = run_all(tmp_path / "a", resume=True)  # without any of its keys
    assert run.spent()["epsilon"] == finished.spent()["epsilon"]
    assert pf.PrivImage.from_pretrained(run.folder.model)._labeller is None
    assert f"label.steps {STEPS} takes them up again" in caplog.text
    for text in (run.folder.card.read_text(), (run.folder.path / "report.html").read_text()):
        assert "was charged for: they were given up" in text and "still to do" not in text
    # And taken up again, at no charge.
    run = run_all(tmp_path / "a", resume=True, label=LABEL)
    assert run.folder.ledger.read_bytes() == finished.folder.ledger.read_bytes()
    with np.load(run.folder.synthetic) as arrays, np.load(finished.folder.synthetic) as expected:
        assert np.array_equal(arrays["labels"], expected["labels"])
    assert "they were given up" not in run.folder.card.read_text()


def test_labels_cannot_be_had_of_a_run_that_kept_nothing_for_them(tmp_path: Path) -> None:
    run_all(tmp_path / "a", label={"drafts": 9})
    run_all(tmp_path / "a", resume=True)  # what is not used may be left out
    with pytest.raises(RunError, match=r"started with other settings \(.*label.steps"):
        run_all(tmp_path / "a", resume=True, label=LABEL)


def test_a_layer_that_tells_nothing_is_told_of(finished: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    saved = load_pretrained(finished.folder.model)
    assert saved.labeller is not None
    saved.labeller.head.zero_()
    run_sample(
        RunFolder(tmp_path / "a"), finished.config.sample, model=saved.model, class_names=saved.class_names, weights="others",
        seed=0, labeller=saved.labeller,
    )  # fmt: skip
    assert "only 33 % of the synthetic images kept the label that they were drawn for, and 33 % would by chance" in caplog.text


def test_a_killed_step_is_paid_for_by_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between its charge and its saving: what is charged stays so, and the budget is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(
            stage, "embedded", lambda found, images, *rest, **out: embedded(found, images) if len(images) < 100 else 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            run_all(tmp_path / "a", label=LABEL)
    run = run_all(tmp_path / "a", resume=True, label=LABEL)
    ledger = Ledger.read(run.folder.ledger)
    assert ledger.steps_charged("label") == STEPS and ledger.epsilon() <= 5.0
    assert run.folder.load_tensors(run.folder.checkpoint("label"), "x")[1]["steps"] == STEPS - 1
    assert "1 step repeated" not in build_report(run.folder.path).read_text()  # none more than was planned


def test_replays_of_fine_tuning_leave_the_labels_their_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = PrivateOptimizer.step

    def failing(self: PrivateOptimizer) -> None:
        if self.steps == 5:
            raise ZeroDivisionError
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(PrivateOptimizer, "step", failing)
        with pytest.raises(ZeroDivisionError):
            run_all(tmp_path / "a", label=LABEL)
    run = run_all(tmp_path / "a", resume=True, label=LABEL)
    ledger = Ledger.read(run.folder.ledger)
    taken = int(run.folder.load_tensors(run.folder.checkpoint("finetune"), "x")[1]["steps"])
    assert taken < SECTIONS["finetune"]["steps"]  # what was repeated is paid for by fine-tuning itself
    assert ledger.steps_charged("label") == STEPS and ledger.epsilon() <= 5.0


def test_a_layer_that_the_ledger_does_not_charge_is_refused(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    ledger = tmp_path / "a" / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    with pytest.raises(RunError, match=f"label.safetensors has taken {STEPS} steps, the ledger charges {STEPS - 1}"):
        run_all(tmp_path / "a", resume=True, label=LABEL)


@pytest.mark.parametrize("sections", [{"label": {**LABEL, "steps": 0}}, {"label": LABEL, "privacy": {"train": False}}])
def test_where_no_labels_are_asked_for_images_keep_theirs(tmp_path: Path, sections: dict[str, Any]) -> None:
    run = run_all(tmp_path / "a", **sections)
    assert Ledger.read(run.folder.ledger).steps_charged("label") == 0 and not run.folder.labels.exists()
    with np.load(run.folder.synthetic) as arrays:
        assert arrays["labels"].tolist() == np.repeat(np.arange(3), 12).tolist()


def test_without_noise_it_is_told_to_be_none(tmp_path: Path) -> None:
    run = run_all(tmp_path / "a", label=LABEL, privacy={"epsilon": float("inf")})
    assert [r.event.noise_multiplier for r in Ledger.read(run.folder.ledger).records() if r.stage == "label"] == [0.0] * STEPS
    assert run.spent()["epsilon"] == "inf"
    with pytest.raises(ConfigError, match=r"label.noise_multiplier is 0: without noise nothing is private"):
        run_all(tmp_path / "b", label={**LABEL, "noise_multiplier": 0.0})


def test_labels_that_leave_nothing_are_refused_before_anything_is_spent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"label.share .*label.steps 0 the labels"):
        run_all(tmp_path / "a", label={**LABEL, "share": 0.99})
    assert not (tmp_path / "a" / "ledger.jsonl").exists() or not Ledger.read(tmp_path / "a" / "ledger.jsonl").records()


def test_plan_agrees_with_the_run(finished: Run, tmp_path: Path) -> None:
    plan = Run(replace(tiny_config(tmp_path / "b", label=LABEL)), public=PUBLIC, private=PRIVATE, test=TEST).plan()
    assert plan.noise_multiplier == dpsgd(finished)[0].noise_multiplier
    assert plan.label_noise_multiplier == finished.config.label.noise_multiplier
    assert f"σ₃ = {plan.label_noise_multiplier:.4g} in each of {STEPS} steps" in plan.table() and "drafts" in plan.table()


def test_the_report_says_what_was_asked(finished: Run) -> None:
    page = finished.report().read_text()
    assert "labels: steps" in page and "% of the images kept the label that they were drawn for" in page
    assert "DIFFERS" not in page and "FEWER CHARGED" not in page and "DISAGREE" not in page
    assert "labels.json" in page and "which a classifier labels" in finished.folder.card.read_text()
    times = json.loads(finished.folder.stages.read_text())
    assert "seconds" not in times["label"]  # it reads sensitive images
