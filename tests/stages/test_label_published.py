"""What is published and told of a run whose labels are learned."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from tiny import LABEL, PRIVATE, PUBLIC, SECTIONS, TEST, tiny_config, write_run

import privimage_fast as pf
from privimage_fast.cli import main
from privimage_fast.data import ImageSet
from privimage_fast.data.sheet import class_sheet
from privimage_fast.dp.ledger import Ledger
from privimage_fast.pipeline import Run
from privimage_fast.report import build_report
from privimage_fast.stages import saved as saved_module
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.sample import run_sample
from privimage_fast.stages.saved import load_pretrained, save_pretrained

stage = importlib.import_module("privimage_fast.stages.label")

STEPS = LABEL["steps"]


def test_a_fit_that_is_cut_off_leaves_the_model_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of the second run would go out with the ledger, and so the ε, of the first."""
    model = pf.PrivImage(tiny_config(tmp_path, label=LABEL)).fit(PUBLIC, PRIVATE, out=tmp_path / "a")
    model.save_pretrained(tmp_path / "first")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "label", Mock(side_effect=KeyboardInterrupt))
        model.fit(PUBLIC, PRIVATE, out=tmp_path / "b")
    model.save_pretrained(tmp_path / "again")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir()) and "labeller.safetensors" in names
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_a_model_without_a_labeller_leaves_none_of_an_earlier_one(finished: Run, tmp_path: Path) -> None:
    saved = load_pretrained(finished.folder.model)
    for labeller in (saved.labeller, None):
        save_pretrained(
            saved.model, tmp_path / "m", class_names=saved.class_names, labeller=labeller, ledger="spent", card="card"
        )
    assert load_pretrained(tmp_path / "m").labeller is None and not (tmp_path / "m" / "labeller.safetensors").exists()
    save_pretrained(saved.model, tmp_path / "m", class_names=saved.class_names)
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("at", range(5))
def test_a_half_saved_model_is_none(finished: Run, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else weights of one would be taken for what another's ledger says."""
    saved = load_pretrained(finished.folder.model)
    shutil.copytree(finished.folder.model, tmp_path / "m")
    calls = 0

    def failing(original: Any) -> Any:
        def write(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > at:
                raise OSError("no space left on device")
            return original(*args, **options)

        return write

    for owner, name in ((saved_module, "atomic_write_text"), (RunFolder, "save_tensors"), (RunFolder, "write_json")):
        monkeypatch.setattr(owner, name, failing(getattr(owner, name)))
    with pytest.raises(OSError, match="no space"):
        save_pretrained(
            saved.model, tmp_path / "m", class_names=saved.class_names, labeller=saved.labeller, ledger="spent", card="card"
        )
    with pytest.raises(RunError, match="holds no model"):
        load_pretrained(tmp_path / "m")


def test_a_model_is_not_saved_over_a_run(finished: Run, tmp_path: Path) -> None:
    """Its ledger has the same name."""
    shutil.copytree(finished.folder.path, tmp_path / "a")
    before = (tmp_path / "a" / "ledger.jsonl").read_bytes()
    model = pf.PrivImage.from_pretrained(finished.folder.model)
    for inside in ("", "model", "checkpoints"):
        with pytest.raises(RunError, match="is of a run, whose ledger or model would be replaced; choose another folder"):
            model.save_pretrained(tmp_path / "a" / inside)
    assert (tmp_path / "a" / "ledger.jsonl").read_bytes() == before


def test_a_model_is_not_saved_among_other_files(finished: Run, tmp_path: Path) -> None:
    model = pf.PrivImage.from_pretrained(finished.folder.model)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "0.png").touch()
    with pytest.raises(RunError, match=r"digits holds 0.png, which is no part of a model; choose a folder of its own"):
        model.save_pretrained(tmp_path / "digits")
    with pytest.raises(RunError, match=r"0.png is a file, but a model needs a folder"):
        model.save_pretrained(tmp_path / "digits" / "0.png")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / ".gitattributes").touch()
    for _ in range(2):  # and again over itself
        model.save_pretrained(tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    listed = re.findall(r"^\| [^|]+ \| (\S+) \| covered", card, re.MULTILINE)
    assert sorted(listed) == ["labeller.safetensors", "ledger.jsonl", "model.safetensors"]
    assert all((tmp_path / "m" / name).exists() for name in listed) and "from_pretrained" in card


def test_a_published_model_is_left_alone_where_nothing_changed(
    finished: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    run = Run(tiny_config(tmp_path / "a", label=LABEL), public=PUBLIC, private=PRIVATE, test=TEST)
    with monkeypatch.context() as patch, run.opened(resume=True):
        patch.setattr(Run, "save", Mock(side_effect=AssertionError))
        run.finetune(), run.label()
    ledger = run.folder.model / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))  # of before the last step
    with run.opened(resume=True):
        run.finetune()
    assert ledger.read_bytes() == run.folder.ledger.read_bytes()
    sampled = {"sampler": {"steps": 4}, "per_class": 12, "batch_size": 12}
    run = Run(tiny_config(tmp_path / "a", label=LABEL, sample=sampled), public=PUBLIC, private=PRIVATE, test=TEST)
    with run.opened(resume=True):
        run.finetune()
    assert load_pretrained(run.folder.model).described["sampler"]["steps"] == 4


def test_a_model_whose_saving_was_cut_off_says_how_to_save_it_again(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    (tmp_path / "a" / "model" / "config.json").unlink()
    with pytest.raises(RunError, match="holds no whole model: saving it was cut off; `privimage finetune` saves it again"):
        load_pretrained(tmp_path / "a" / "model")


def test_a_fit_that_is_cut_off_says_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "label", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(KeyboardInterrupt) as raised:
        pf.PrivImage(tiny_config(tmp_path, label=LABEL)).fit(PUBLIC, PRIVATE)
    (note,) = raised.value.__notes__
    folder = note.removeprefix("what was charged for is in ").split(";")[0]
    assert Ledger.read(Path(folder) / "ledger.jsonl").steps_charged("finetune") == SECTIONS["finetune"]["steps"]


def test_pages_say_what_is_spent_after_labels_are_learned(tmp_path: Path) -> None:
    """Learned by command in a folder whose page was written before."""
    write_run(tmp_path)
    config = [
        "--config",
        str(tmp_path / "run.yaml"),
        "--label.steps",
        "4",
        "--label.drafts",
        "9",
        "--label.classifier.width",
        "4",
    ]
    for stage_name in ("query", "select", "pretrain", "warmup", "finetune", "report"):
        assert main([stage_name, *config]) == 0
    before = (tmp_path / "out" / "README.md").read_text()
    assert main(["label", *config]) == 0
    after, page = ((tmp_path / "out" / name).read_text() for name in ("README.md", "report.html"))
    assert "| label |" in after and "| label |" not in before and "noised steps of the labels' layer | 4" in after
    assert f"{Ledger.read(tmp_path / 'out' / 'ledger.jsonl').epsilon():.4f}" in page


def test_the_labeller_is_part_of_what_a_model_is_known_by(finished: Run, tmp_path: Path) -> None:
    """Synthetic images that another layer has labelled are drawn anew."""
    saved = load_pretrained(finished.folder.model)
    assert saved.labeller is not None
    saved.labeller.head += 1
    save_pretrained(saved.model, tmp_path / "m", class_names=saved.class_names, labeller=saved.labeller)
    assert load_pretrained(tmp_path / "m").weights != saved.weights


def test_labels_as_they_are_drawn_for_can_be_had(finished: Run) -> None:
    model = pf.PrivImage.from_pretrained(finished.folder.model)
    assert model.sample(36, relabel=False).labels.tolist() == [i % 3 for i in range(36)] != model.sample(36).labels.tolist()


def test_what_was_kept_of_labels_is_not_told_of_images_that_keep_theirs(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    folder, saved = RunFolder(tmp_path / "a"), load_pretrained(finished.folder.model)
    run_sample(folder, finished.config.sample, model=saved.model, class_names=saved.class_names, weights="others", seed=0)
    assert not folder.labels.exists()


def test_a_class_that_no_image_has_stands_in_the_report(finished: Run, tmp_path: Path) -> None:
    shutil.copytree(finished.folder.path, tmp_path / "a")
    with np.load(finished.folder.synthetic) as arrays:
        kept = dict(arrays)
    kept["labels"][kept["labels"] == 2] = 1
    np.savez(tmp_path / "a" / "synthetic.npz", **kept)
    page = build_report(tmp_path / "a").read_text()
    assert re.search(r"<td>digit2</td>\s*<td class=\"n\">0</td>", page)
    assert class_sheet(ImageSet(kept["images"], kept["labels"], PRIVATE.label_names)).height == (
        class_sheet(ImageSet(kept["images"], np.arange(36) % 3, PRIVATE.label_names)).height
    )


def test_a_plan_that_is_written_has_the_labels_in_it(tmp_path: Path) -> None:
    run = Run(tiny_config(tmp_path / "b", label=LABEL), public=PUBLIC, private=PRIVATE, test=TEST)
    plan = run.plan()
    run.config = run._resolved(None)
    run.folder.create()
    run.write_plan(plan)
    budget = json.loads(run.folder.budget.read_text())
    assert (budget["label_steps"], budget["label_noise_multiplier"]) == (STEPS, plan.label_noise_multiplier)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"label": {"share": 0.2}}, "label.share: not used, since label.steps is 0"),
        ({"label": LABEL, "privacy": {"train": False}}, "label.steps is not used: privacy.train is false"),
    ],
)
def test_settings_without_effect_are_told(
    tmp_path: Path, sections: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    with Run(tiny_config(tmp_path / "b", **sections), public=PUBLIC, private=PRIVATE, test=TEST).opened(resume=False):
        assert caplog.text.count(message) == 1
