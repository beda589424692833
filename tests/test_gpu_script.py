"""benchmarks/gpu.py runs through: at toy sizes here, so that the one run on a GPU is not its first."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="not a source checkout")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False)


def test_rehearsal_runs_every_measuring_part(tmp_path: Path) -> None:
    parts = ["sanitize", "ceilings", "kernels", "steps", "memory"]
    done = _run("--rehearse", "--parts", ",".join(parts), "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["rehearsal"] and list(written["parts"]) == parts
    rows = {row["what"]: row for part in written["parts"].values() for row in part}
    assert rows["copy"]["GB/s"] > 0 and rows["noise + Adam + EMA"]["share of copy"] > 0 and rows["DP, K=8"]["÷ plain"] > 0
    assert all(f"## {part}" in done.stdout for part in parts)


def test_a_part_that_does_not_exist_is_refused() -> None:
    done = _run("--parts", "ceilings,kernel")
    assert done.returncode == 2 and "no part is called kernel; there are build, tests" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = _run("--parts", "ceilings")
    assert done.returncode == 2 and "torch finds no GPU, so nothing was measured" in done.stderr
