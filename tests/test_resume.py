"""Stop and go on: what an interruption costs, and that nothing is lost by it."""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import PRIVATE, PUBLIC, SECTIONS, STEPS, TEST, dpsgd, run_all, tiny_config, wait_for_lines, write_run

from privimage_fast.dp.ledger import Ledger
from privimage_fast.pipeline import Run
from privimage_fast.report import epsilon_text
from privimage_fast.stages import finetune as finetune_module
from privimage_fast.stages.folder import RunError, RunFolder


def slow(value: Any) -> Any:
    """A case that the ordinary suite has a like of."""
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "stage",
    [
        "query",
        slow("select"),
        slow("pretrain"),
        slow("warmup"),
        "finetune",
        slow("label"),
        slow("sample"),
        slow("evaluate"),
        slow("report"),
    ],
)
def test_an_error_after_any_stage_loses_nothing(tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = ["query", "select", "pretrain", "warmup", "finetune", "label", "sample", "evaluate", "report"]
    following = dict(pairwise(stages)).get(stage)
    if following is not None:
        with monkeypatch.context() as patch:
            patch.setattr(Run, following, lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run_all(tmp_path / "a")
    run = run_all(tmp_path / "a", resume=following is not None)
    assert [r.stage for r in Ledger.read(run.folder.ledger).records()] == ["query", "warmup"] + ["finetune"] * STEPS


@pytest.mark.parametrize("at", [1, slow(3), slow(5), 8])
def test_interrupted_fine_tuning_charges_replays_and_keeps_the_budget(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step `at`: checkpoints are every 3 steps, so (at − 1) % 3 + 1 steps are run, and paid for, again."""
    original = finetune_module.PrivateOptimizer.step

    def failing(self: Any) -> None:
        if self.steps + 1 == at:
            raise KeyboardInterrupt
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_module.PrivateOptimizer, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            run_all(tmp_path / "a")
    interrupted = Ledger.read(tmp_path / "a" / "ledger.jsonl").steps_charged("finetune")
    assert interrupted == at
    run = run_all(tmp_path / "a", resume=True)
    ledger = Ledger.read(run.folder.ledger)
    kept = (at - 1) // 3 * 3
    taken = int(run.folder.load_tensors(run.folder.checkpoint("finetune"), "x")[1]["steps"])
    assert ledger.steps_charged("finetune") == at + (taken - kept)
    assert ledger.epsilon() <= 5.0
    assert taken < STEPS  # the budget was solved for 8 steps; the repeated ones are paid by the last ones
    assert len({e.noise_multiplier for e in dpsgd(run)}) == 1


@pytest.mark.parametrize(
    ("name", "stages"), [("query.vote", ["query", "query", "warmup"]), ("means.clipped_sums", ["query", "warmup", "warmup"])]
)
def test_a_question_killed_before_its_answer_was_kept_is_paid_twice(
    tmp_path: Path, name: str, stages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"privimage_fast.stages.{name}", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_all(tmp_path / "a")
    run = run_all(tmp_path / "a", resume=True)
    ledger = Ledger.read(run.folder.ledger)
    assert [r.stage for r in ledger.records()][:4] == [*stages, "finetune"]
    assert ledger.epsilon() <= 5.0 and ledger.steps_charged("finetune") == STEPS  # σ was solved for both


@pytest.mark.parametrize("following", [slow("select"), "sample", slow("report"), None])
def test_a_run_without_its_ledger_is_refused(tmp_path: Path, following: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the query, after fine-tuning and at the end: a lost or replaced ledger must not read as ε = 0."""
    with monkeypatch.context() as patch:
        if following:
            patch.setattr(Run, following, lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run_all(tmp_path / "a")
        else:
            run_all(tmp_path / "a")
    (tmp_path / "a" / "ledger.jsonl").unlink()
    with pytest.raises(RunError, match="ledger"):
        run_all(tmp_path / "a", resume=True)
    assert not (tmp_path / "a" / "ledger.jsonl").exists()


def test_a_ledger_with_fewer_steps_than_the_weights_is_refused(tmp_path: Path) -> None:
    ledger = run_all(tmp_path / "a").folder.ledger
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-2]))
    with pytest.raises(RunError, match=f"taken {STEPS} steps, the ledger charges {STEPS - 2}"):
        run_all(tmp_path / "a", resume=True)


def test_pretraining_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_all(tmp_path / "whole", test=None, privacy={"secure": False})
    original = RunFolder.save_tensors

    def failing(self: RunFolder, path: Path, tensors: Any, metadata: dict[str, Any]) -> None:
        original(self, path, tensors, metadata)
        if path.stem == "pretrain-progress" and metadata["steps"] == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "save_tensors", failing)
        with pytest.raises(KeyboardInterrupt):
            run_all(tmp_path / "cut", test=None, privacy={"secure": False})
    cut = run_all(tmp_path / "cut", resume=True, test=None, privacy={"secure": False})
    a, b = (r.folder.load_tensors(r.folder.checkpoint("pretrain"), "x")[0] for r in (whole, cut))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_killed_for_real_and_resumed_by_command(tmp_path: Path) -> None:
    """SIGKILL in the middle of fine-tuning and of sampling; the command with --resume ends the job."""
    command, ledger = write_run(tmp_path, steps=60, checkpoint_steps=20)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_lines(ledger, 30, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    charged = Ledger.read(ledger).steps_charged("finetune")
    assert 0 < charged < 60
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    final = Ledger.read(ledger)
    assert final.epsilon() <= 5.0 and final.steps_charged("finetune") > charged
    assert epsilon_text(final.epsilon()) in done.stdout
    assert (tmp_path / "out" / "synthetic.npz").exists()


def test_a_refused_run_leaves_a_folder_that_binds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither --resume nor another folder is asked for where nothing was charged or finished, even under another promise."""
    with monkeypatch.context() as patch:
        patch.setattr("privimage_fast.stages.query._check_scores", None)  # fails after the ledger's header is written
        with pytest.raises(TypeError):
            run_all(tmp_path / "a")
    folder = RunFolder(tmp_path / "a")
    assert folder.config.exists() and folder.ledger.exists() and not folder.begun
    run = run_all(tmp_path / "a", privacy={"epsilon": 2.0, "delta": 1e-4})
    assert folder.begun and Ledger.read(run.folder.ledger).header.target_epsilon == 2.0
    assert run.config.privacy.delta == 1e-4
    with pytest.raises(RunError, match="already holds a run"):
        run_all(tmp_path / "a")


@pytest.mark.parametrize("name", ["model", "synthetic.npz", "metrics.json", "checkpoints/finetune-progress.safetensors"])
def test_results_without_ledger_and_records_are_still_a_run(tmp_path: Path, name: str) -> None:
    folder = RunFolder(tmp_path)
    folder.create()
    folder.config.write_text("")
    assert not folder.begun
    (tmp_path / name).write_text("")
    assert folder.begun


def test_a_refused_test_mode_leaves_no_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("privimage_fast.stages.query._check_scores", None)
        with pytest.raises(TypeError):
            run_all(tmp_path / "a", privacy={"secure": False})
    run = run_all(tmp_path / "a", test=None)
    assert not Ledger.read(run.folder.ledger).seeded and "NOT PRIVATE" not in (run.folder.path / "README.md").read_text()


def test_a_charge_alone_makes_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("privimage_fast.stages.query.vote", None)
        with pytest.raises(TypeError):
            run_all(tmp_path / "a")
    assert RunFolder(tmp_path / "a").begun
    with pytest.raises(RunError, match=r"other settings \(privacy\.epsilon"):
        run_all(tmp_path / "a", resume=True, privacy={"epsilon": 2.0})


def test_a_set_of_another_size_is_told_when_a_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = run_all(tmp_path / "a")
    assert "N stays" not in caplog.text
    fewer = Run(run.config, public=PUBLIC, private=PRIVATE.subset(range(len(PRIVATE) - 3)), test=TEST)
    with fewer.opened(resume=True):
        assert f"stated N of {len(PRIVATE)} sensitive images; {len(PRIVATE) - 3} were found now" in caplog.text
        assert fewer.config.privacy.population == len(PRIVATE)


def test_a_holdout_beside_test_images_is_told_to_be_unused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = {**SECTIONS["data"], "holdout": 0.5}
    run = Run(tiny_config(tmp_path / "a", data=data), public=PUBLIC, private=PRIVATE, test=TEST)
    assert len(run.private) == len(PRIVATE) and "data.holdout is not used" in caplog.text


def test_a_run_that_goes_on_says_what_was_done_and_nothing_of_labels_it_does_not_learn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run_all(tmp_path / "a", test=None)
    assert "query" in caplog.messages and not any("done before" in m or m.startswith("label") for m in caplog.messages)
    caplog.clear()
    run_all(tmp_path / "a", resume=True, test=None)
    done = [f"{stage}: done before" for stage in ("query", "select", "pretrain", "warmup", "finetune", "sample")]
    assert [m for m in caplog.messages if m.endswith("done before")] == done


@pytest.mark.parametrize("black", [None, 0, 7])
def test_values_that_are_drawn_as_black_are_told_once_where_nobody_asked_for_it(
    black: int | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    images = np.maximum(PUBLIC.images, 60)
    images[:, :, :2] = 0  # a quarter of the values, and none near it
    sampler = {"steps": 3} | ({} if black is None else {"black": black})
    config = tiny_config(tmp_path / "a", sample={"sampler": sampler})
    run = Run(config, public=replace(PUBLIC, images=images), private=PRIVATE)
    run.plan()
    assert "sample.sampler" not in caplog.text
    with run.opened(resume=False):
        pass
    told = [m for m in caplog.messages if "sample.sampler.black is 7: values up to 7 are drawn as 0" in m]
    assert len(told) == (black is None) and "white" not in caplog.text
    assert run.config.sample.sampler.black == (7 if black is None else black)
