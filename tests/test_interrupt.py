"""Ctrl-C in the middle of a step: what is paid for is finished and saved, and going on repeats nothing."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import STEPS, run_all, wait_for_lines, write_run

from privimage_fast.dp.ledger import Ledger
from privimage_fast.models.edm import PublicDenoising
from privimage_fast.report import summary_table
from privimage_fast.stages import finetune as finetune_module
from privimage_fast.stages.interrupt import interrupts_held, terminating_interrupts


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Whoever runs the suite in the background may have SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("at", [2, STEPS])  # the last one is of no progress file, but of the stage's own
def test_an_interrupted_step_is_finished_and_never_repeated(
    tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints are every 3 steps; the signal comes in step ``at``, before its noise is drawn."""
    original = finetune_module.PrivateOptimizer.step

    def pressed(self: Any) -> None:
        if self.steps + 1 == at:
            signal.raise_signal(signal.SIGINT)
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(finetune_module.PrivateOptimizer, "step", pressed)
        with pytest.raises(KeyboardInterrupt):
            run_all(tmp_path / "a", test=None)
    assert "finished and saved" in capfd.readouterr().err
    ledger = tmp_path / "a" / "ledger.jsonl"
    assert Ledger.read(ledger).steps_charged("finetune") == at
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run = run_all(tmp_path / "a", resume=True, test=None)
    assert Ledger.read(ledger).steps_charged("finetune") == STEPS
    assert run.folder.load_tensors(run.folder.checkpoint("finetune"), "x")[1]["steps"] == STEPS
    assert not run.folder.checkpoint("finetune-progress").exists()


@pytest.mark.parametrize(("name", "stage"), [("query.vote", "query"), ("means.clipped_sums", "warmup")])
def test_an_interrupted_question_is_answered_and_not_asked_twice(
    tmp_path: Path, name: str, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, function = name.split(".")
    original = getattr(importlib.import_module(f"privimage_fast.stages.{module}"), function)

    def pressed(*args: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(f"privimage_fast.stages.{name}", pressed)
        with pytest.raises(KeyboardInterrupt):
            run_all(tmp_path / "a", test=None)
    ledger = tmp_path / "a" / "ledger.jsonl"
    assert Ledger.read(ledger).records()[-1].stage == stage
    run = run_all(tmp_path / "a", resume=True, test=None)
    assert [r.stage for r in Ledger.read(ledger).records()] == ["query", "warmup"] + ["finetune"] * STEPS
    assert "not run yet" not in summary_table(run.folder.path)


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def pressed(self: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)

    monkeypatch.setattr(finetune_module.PrivateOptimizer, "step", pressed)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "a")
    assert reached == [1]


def test_public_training_goes_on_where_it_was_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sections: dict[str, Any] = {
        "privacy": {"secure": False}, "pretrain": {"steps": 6, "batch_size": 16, "checkpoint_seconds": 1e9}, "test": None,
    }  # fmt: skip
    whole, original, steps = run_all(tmp_path / "whole", **sections), PublicDenoising.step, []

    def pressed(self: Any, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            signal.raise_signal(signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(PublicDenoising, "step", pressed)
    with pytest.raises(KeyboardInterrupt):
        run_all(tmp_path / "cut", **sections)
    cut = run_all(tmp_path / "cut", resume=True, **sections)
    assert len(steps) == 6  # warming up steps otherwise
    a, b = (r.folder.load_tensors(r.folder.checkpoint("pretrain"), "x")[0] for r in (whole, cut))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)


def test_the_end_that_a_system_asks_for_several_times_is_waited_for() -> None:
    """Of a group of processes each gets SIGTERM from the system, and workers once more from their parent."""
    done = []
    with terminating_interrupts(), pytest.raises(KeyboardInterrupt), interrupts_held("…") as interrupted:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        done.append(interrupted())
    assert done == [True]


def test_an_error_after_the_signal_does_not_swallow_it() -> None:
    """`compare` goes on with the next run after an error, and must not after this."""
    with pytest.raises(KeyboardInterrupt) as found, interrupts_held("…"):
        signal.raise_signal(signal.SIGINT)
        raise RuntimeError("out of memory")
    assert isinstance(found.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="of memory"), interrupts_held("…"):
        raise RuntimeError("out of memory")


def test_signals_of_others_and_other_threads_are_left_alone() -> None:
    def own(number: int, frame: Any) -> None:
        found.append(number)

    found: list[int] = []
    before = signal.signal(signal.SIGINT, own)
    try:
        with interrupts_held("…") as interrupted, terminating_interrupts():
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
            signal.raise_signal(signal.SIGINT)
            assert found == [signal.SIGINT] and not interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    answers: list[bool] = []

    def elsewhere() -> None:
        with interrupts_held("…") as interrupted, terminating_interrupts():
            answers.append(interrupted())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert answers == [False]


def test_a_terminated_command_has_saved_its_step(tmp_path: Path) -> None:
    """SIGTERM, as batch systems send it, in the middle of fine-tuning: --resume charges what was planned and no step more."""
    command, ledger = write_run(tmp_path, steps=40, checkpoint_steps=1000)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for_lines(ledger, 10, process)
    os.kill(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume goes on" in said
    assert 0 < Ledger.read(ledger).steps_charged("finetune") < 40
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Ledger.read(ledger).steps_charged("finetune") == 40
