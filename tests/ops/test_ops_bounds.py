"""No CPU kernel reads or writes beside its tensors, at sizes that are multiples of nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("bounds_check.py")


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made by Linux' mmap")
def test_kernels_stay_within_their_tensors(isa: str) -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), isa], capture_output=True, text=True, check=False)
    last = done.stdout.splitlines()[-1:] or ["nothing"]
    assert done.returncode == 0 and last == ["all within bounds"], f"rc {done.returncode} after: {last[0]}\n{done.stderr[-2000:]}"
