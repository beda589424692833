"""A night's log is read by somebody: bars must not fill it, and be lines."""

from __future__ import annotations

import io
import sys
import time
from types import ModuleType

import pytest

from privimage_fast import progress


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    for _ in progress.progress_bar(range(300), desc="steps", disable=False):
        time.sleep(0.001)
    return capsys.readouterr().err


def test_a_terminal_sees_a_bar_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = shown(capsys, monkeypatch, terminal=True)
    assert found.count("steps:") >= 2 and "\r" in found


def test_so_does_a_notebook(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert shown(capsys, monkeypatch, terminal=False).count("steps:") >= 2


def test_a_log_has_no_line_of_what_is_done_soon(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(capsys, monkeypatch, terminal=False) == ""


def test_a_log_has_few_lines_of_what_takes_long(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_IN_A_LOG", 0.12)  # of at least 0.3 seconds
    began = time.perf_counter()
    found = shown(capsys, monkeypatch, terminal=False)
    lines = found.splitlines()
    assert 1 <= len(lines) <= (time.perf_counter() - began) / 0.12 + 1
    assert all(line.startswith("steps:") for line in lines) and "\r" not in found and found.endswith("\n")


def test_any_stream_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain:
        write, flush = io.StringIO().write, staticmethod(lambda: None)

    monkeypatch.setattr(sys, "stderr", Plain())
    assert list(progress.progress_bar(range(3))) == [0, 1, 2]
