"""The ledger: written before the data is touched, composed whole, hard to spoil by accident, deaf to wishes."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from privimage_fast.dp import accounting
from privimage_fast.dp.accounting import DPSGDEvent, GaussianEvent, epsilon
from privimage_fast.dp.ledger import Ledger, LedgerError, OverBudgetError

Q, DELTA = 4096 / 60000, 1e-5
STEP, QUERY = DPSGDEvent(2.0, Q), GaussianEvent(50.0)
PROMISE = {"target_epsilon": None, "delta": DELTA, "population": 60_000}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def filled(path: Path, steps: int = 3) -> list[bytes]:
    with Ledger(path, **PROMISE) as ledger:
        ledger.charge(QUERY, stage="query", note="k=5")
        for _ in range(steps):
            ledger.charge(STEP, stage="finetune")
    return path.read_bytes().splitlines(keepends=True)


def test_round_trip_and_sessions(path: Path) -> None:
    filled(path)
    with Ledger.resume(path) as ledger:  # replays are charged like everything else
        ledger.charge(DPSGDEvent(2.0, Q, 2), stage="finetune")
        assert ledger.steps_charged("finetune") == 5 and ledger.steps_charged("query") == 1
    report = Ledger.read(path)
    assert report.events() == [QUERY, STEP, STEP, STEP, DPSGDEvent(2.0, Q, 2)]
    assert [r.seq for r in report.records()] == [1, 2, 3, 4, 5] and report.records()[0].note == "k=5"
    assert len({r.session for r in report.records()}) == 2
    assert report.header.adjacency == "add_or_remove_one" and report.header.unit == "image"
    assert not report.seeded
    with pytest.raises(LedgerError, match="not open"):
        report.charge(STEP, stage="finetune")


def test_epsilon_is_of_everything_query_included(path: Path) -> None:
    """Peer's fault: the logged ε omitted the query."""
    with Ledger(path, **PROMISE) as ledger:
        ledger.charge(GaussianEvent(1.0), stage="query")
        ledger.charge(DPSGDEvent(2.0, Q, 2200), stage="finetune")
        assert ledger.epsilon() == epsilon(ledger.events(), DELTA) > epsilon([DPSGDEvent(2.0, Q, 2200)], DELTA) + 0.5
        assert ledger.epsilon(1e-6) > ledger.epsilon()


def test_contract_figure_from_a_file(path: Path) -> None:
    with Ledger(path, **PROMISE) as ledger:
        ledger.charge(QUERY, stage="query")
        for steps in (1000, 1199, 1):
            ledger.charge(DPSGDEvent(2.0, Q, steps), stage="finetune")
    assert Ledger.read(path).epsilon() == pytest.approx(8.358, abs=0.01)


def test_the_record_is_on_disk_when_charge_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    pwrite, fsync = os.pwrite, os.fsync
    monkeypatch.setattr(os, "pwrite", lambda *a: calls.append("write") or pwrite(*a))
    monkeypatch.setattr(
        os, "fsync", lambda fd: calls.append("dir" if os.path.isdir(f"/proc/self/fd/{fd}") else "file") or fsync(fd)
    )
    with Ledger(path, **PROMISE) as ledger:
        assert calls == ["write", "file", "dir"]
        ledger.charge(STEP, stage="finetune")
        assert calls[3:] == ["write", "file"]
        assert len(Ledger.read(path).records()) == 1


def test_a_failed_write_grants_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Ledger(path, **PROMISE) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(LedgerError, match="do not touch the data"):
                ledger.charge(STEP, stage="finetune")
        with pytest.raises(LedgerError, match="open the ledger again"):
            ledger.charge(STEP, stage="finetune")
    with Ledger(path, **PROMISE) as ledger:  # the line had reached the file: charged, which is the safe side
        assert len(ledger.records()) == 1
        ledger.charge(STEP, stage="finetune")


def test_kill_in_the_middle_loses_no_charge(tmp_path: Path) -> None:
    path, touched = tmp_path / "ledger.jsonl", tmp_path / "touched"
    code = f"""
        from privimage_fast.dp.accounting import DPSGDEvent
        from privimage_fast.dp.ledger import Ledger
        ledger = Ledger({str(path)!r}, target_epsilon=None, delta=1e-5, population=60000)
        with open({str(touched)!r}, "w") as data:
            for step in range(10**6):
                ledger.charge(DPSGDEvent(2.0, 0.05), stage="finetune")
                print("touched", step, file=data, flush=True)
    """
    child = subprocess.Popen([sys.executable, "-P", "-c", textwrap.dedent(code)])
    try:
        deadline = time.monotonic() + 60
        while not touched.exists() or touched.stat().st_size < 600:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    steps = touched.read_text().count("\n")
    with Ledger.resume(path) as ledger:
        assert steps >= 30 and steps <= ledger.steps_charged("finetune") <= steps + 1
        ledger.charge(STEP, stage="finetune")  # the dead process's lock is gone
    assert len(Ledger.read(path).records()) == len(ledger.records())


# --------------------------------------------------------------------------------------------------------- the file


def test_a_line_cut_off_while_written_is_left_out_then_replaced(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = filled(path)
    for cut in (1, 20, len(lines[-1]) - 2):
        damaged = b"".join(lines[:-1]) + lines[-1][:cut]
        path.write_bytes(damaged)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            assert len(Ledger.read(path).records()) == 3
            assert "line 5" in caplog.text
        assert path.read_bytes() == damaged  # reading changes nothing
        with Ledger(path, **PROMISE) as ledger:
            assert path.read_bytes() == damaged  # nor does opening
            ledger.charge(STEP, stage="finetune")
        assert len(Ledger.read(path).records()) == 4


def test_a_whole_record_without_newline_is_kept(path: Path) -> None:
    """An editor may strip the last newline; a charge too many is safe, a lost one is not."""
    lines = filled(path)
    path.write_bytes(b"".join(lines)[:-1])
    with Ledger(path, **PROMISE) as ledger:
        assert len(ledger.records()) == 4
        ledger.charge(STEP, stage="finetune")
    assert len(Ledger.read(path).records()) == 5


def edit(line: bytes, **changes: object) -> bytes:
    return json.dumps({**json.loads(line), **changes}).encode() + b"\n"


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda x: [*x[:2], b'{"seq": 2, oops\n', *x[3:]], 3),
        (lambda x: [*x[:2], x[2][:30] + b"\n", *x[3:]], 3),
        (lambda x: [*x[:2], *x[3:]], 3),  # a record removed
        (lambda x: [*x[:3], x[2], *x[3:]], 4),  # doubled
        (lambda x: [x[0], x[2], x[1], *x[3:]], 2),  # swapped
        (lambda x: [edit(x[0], delta=1e-3), *x[1:]], 1),
        (lambda x: [edit(x[0], target_epsilon=100.0), *x[1:]], 1),
        (lambda x: [edit(x[0], population=10), *x[1:]], 1),
        (lambda x: [*x[:4], edit(x[4], event={"kind": "gaussian", "noise_multiplier": 1e5})], 5),
        (lambda x: [*x[:4], edit(x[4], seeded=True)], 5),
        (lambda x: [*x, b"\n"], 6),
        (lambda x: [*x, b"[]\n"], 6),
        (lambda x: [*x, b"\xff\xfe\n"], 6),
        (lambda x: [*x, b"[" * 100_000 + b"\n"], 6),
        (lambda x: [*x, b'{"seq": NaN}\n'], 6),
        (lambda x: x[1:], 1),  # header gone
    ],
)
def test_any_other_damage_is_refused_with_its_line_and_left_alone(path: Path, spoil, line: int) -> None:
    damaged = b"".join(spoil(filled(path)))
    path.write_bytes(damaged)
    for open_it in (Ledger.read, lambda p: Ledger(p, **PROMISE)):
        with pytest.raises(LedgerError, match=f"line {line}:"):
            open_it(path)
    assert path.read_bytes() == damaged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"event": {"kind": "laplace", "noise_multiplier": 1.0}}, "laplace"),
        ({"seq": 9}, "seq is 9"),
        ({"extra": 1}, "extra"),
        ({"seeded": 1}, "wrong type"),
    ],
)
def test_well_digested_nonsense_is_refused_too(path: Path, changes: dict, message: str) -> None:
    from privimage_fast.dp import ledger as module

    lines = filled(path)
    last = {k: v for k, v in json.loads(lines[4]).items() if k != "digest"} | changes
    path.write_bytes(b"".join(lines[:4]) + module._encode(last, json.loads(lines[3])["digest"])[0] + b"\n")
    with pytest.raises(LedgerError, match=f"line 5: .*{message}"):
        Ledger.read(path)


def test_an_empty_file_is_no_ledger(path: Path) -> None:
    path.touch()
    with pytest.raises(LedgerError, match="empty"):
        Ledger(path, **PROMISE)
    with pytest.raises(FileNotFoundError):
        Ledger.resume(path.with_name("absent"))


def test_a_second_writer_is_refused_and_a_reader_is_not(path: Path) -> None:
    with Ledger(path, **PROMISE) as ledger:
        ledger.charge(STEP, stage="finetune")
        code = f"from privimage_fast.dp.ledger import Ledger; Ledger.resume({str(path)!r})"
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode and "in use by another run" in done.stderr
        assert len(Ledger.read(path).records()) == 1
    Ledger.resume(path).close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_may_not_charge(path: Path) -> None:
    with Ledger(path, **PROMISE) as ledger:
        child = os.fork()
        if child == 0:
            try:
                ledger.charge(STEP, stage="finetune")
                os._exit(0)
            except LedgerError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert Ledger.read(path).records() == []


# ------------------------------------------------------------------------------------------------------ the promise


@pytest.mark.parametrize("change", [{"target_epsilon": 50.0}, {"delta": 1e-4}, {"population": 70_000}])
def test_the_promise_is_kept_once_there_are_records(path: Path, change: dict) -> None:
    Ledger(path, **PROMISE).close()
    Ledger(path, **{**PROMISE, **change}).close()  # nothing spent yet: still open to change
    assert Ledger.read(path).header.population == change.get("population", 60_000)
    Ledger(path, **PROMISE).close()
    filled(path)
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="holds records"):
        Ledger(path, **{**PROMISE, **change})
    assert path.read_bytes() == before
    Ledger(path, **PROMISE).close()


@pytest.mark.parametrize("change", [{"target_epsilon": -1.0}, {"target_epsilon": math.inf}, {"delta": 0.0}, {"population": 0}])
def test_a_bad_promise_makes_no_file(path: Path, change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Ledger(path, **{**PROMISE, **change})
    assert not path.exists()


def test_other_adjacency_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(path)
    monkeypatch.setattr(accounting, "ADJACENCY", "replace_one")
    with pytest.raises(LedgerError, match="line 1: adjacency"):
        Ledger.read(path)


def test_seeded_mode_is_marked_for_good(path: Path) -> None:
    filled(path)
    with Ledger.resume(path, seeded=True) as ledger:
        assert not ledger.seeded
        ledger.charge(STEP, stage="finetune")
        assert ledger.seeded
    with Ledger.resume(path) as ledger:
        ledger.charge(STEP, stage="finetune")
    report = Ledger.read(path)
    assert report.seeded and [r.seeded for r in report.records()][-2:] == [True, False]


def test_records_tell_no_timing(path: Path) -> None:
    """The time between two steps shows the realised batch size, which is not private."""
    with Ledger(path, **PROMISE) as ledger:
        ledger.charge(STEP, stage="finetune")
        time.sleep(1.1)
        ledger.charge(STEP, stage="finetune")
    first, second = Ledger.read(path).records()
    assert first.time == second.time and first.time.endswith("+00:00")


# ------------------------------------------------------------------------------------------------------- the budget


def test_it_refuses_to_pass_the_target_and_writes_nothing_then(path: Path) -> None:
    promise = {**PROMISE, "target_epsilon": 1.0}
    step = DPSGDEvent(1.0, Q)
    with Ledger(path, **promise) as ledger:
        ledger.charge(QUERY, stage="query")
        with pytest.raises(OverBudgetError):
            for _ in range(100):
                ledger.charge(step, stage="finetune")
        spent, size = ledger.events(), path.stat().st_size
        assert epsilon(spent, DELTA) <= 1.0 < epsilon([*spent, step], DELTA)
        with pytest.raises(OverBudgetError, match=r"target_epsilon 1\.0"):
            ledger.charge(GaussianEvent(1.0), stage="query")
        with pytest.raises(OverBudgetError):
            ledger.charge(GaussianEvent(0.0), stage="query")
        assert path.stat().st_size == size and ledger.events() == spent
    with Ledger(path, **promise) as ledger, pytest.raises(OverBudgetError):  # nor after a resume
        ledger.charge(step, stage="finetune")


def test_one_check_clears_many_steps_and_other_events_void_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    solve = accounting.affordable_steps
    monkeypatch.setattr(accounting, "affordable_steps", lambda **kw: solved.append(1) or solve(**kw))
    with Ledger(path, **{**PROMISE, "target_epsilon": 5.0}) as ledger:
        for _ in range(20):
            ledger.charge(STEP, stage="finetune")
        assert len(solved) == 1
        ledger.charge(GaussianEvent(1.0), stage="query")  # takes most of the budget
        with pytest.raises(OverBudgetError):
            for _ in range(40):
                ledger.charge(DPSGDEvent(2.0, Q, 50), stage="finetune")
        assert len(solved) >= 2 and ledger.epsilon() <= 5.0
        assert epsilon([*ledger.events(), DPSGDEvent(2.0, Q, 50)], DELTA) > 5.0


@pytest.mark.parametrize(("stage", "note"), [("", None), ("two words", None), ("x" * 41, None), ("query", "y" * 201)])
def test_bad_labels_are_refused(path: Path, stage: str, note: str | None) -> None:
    with Ledger(path, **PROMISE) as ledger, pytest.raises(LedgerError):
        ledger.charge(STEP, stage=stage, note=note)


def test_what_is_no_event_is_refused(path: Path) -> None:
    with Ledger(path, **PROMISE) as ledger:
        with pytest.raises(ValueError, match="not an event"):
            ledger.charge({"kind": "gaussian"}, stage="query")
        assert ledger.records() == []
