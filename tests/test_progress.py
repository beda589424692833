"""A night's log is read by somebody: bars must not fill it."""

from __future__ import annotations

import sys
import time

import pytest

from privimage_fast import progress


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, terminal: bool) -> str:
    monkeypatch.setenv("TQDM_DISABLE", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    for _ in progress.progress_bar(range(300), desc="steps", disable=False):
        time.sleep(0.001)
    return capsys.readouterr().err


def test_a_terminal_sees_a_bar_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(capsys, monkeypatch, terminal=True).count("steps:") >= 2


def test_a_log_has_no_line_of_what_is_done_soon(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "steps:" not in shown(capsys, monkeypatch, terminal=False)


def test_a_log_has_few_lines_of_what_takes_long(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_SECONDS_IN_A_LOG", 0.12)  # of at least 0.3 seconds
    found = shown(capsys, monkeypatch, terminal=False).count("steps:")
    assert 1 <= found <= 10
