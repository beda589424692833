"""Where gpu.py runs, how it times there, and what a row of its tables is."""

from __future__ import annotations

import gc
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from privimage_fast.dp.planner import free_cuda_bytes

ROOT = Path(__file__).resolve().parents[1]
Row = dict[str, Any]


def provenance(arguments: Sequence[str]) -> Row:
    """When, of which code, and by which command; the commit is None outside of a git checkout."""

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    return {
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"), "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "command": shlex.join(["python", "benchmarks/gpu.py", *arguments]),
    }  # fmt: skip


@dataclass
class Machine:
    """Where the script runs, how large its problems are, and how long it may take."""

    device: torch.device
    rehearsal: bool
    seconds_left: float = 600.0

    def __post_init__(self) -> None:
        self._until = time.perf_counter() + self.seconds_left

    def left(self) -> float:
        return self._until - time.perf_counter()

    def scale(self, real: int, toy: int) -> int:
        return toy if self.rehearsal else real

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], Any], rounds: int = 9, repeat: int = 1) -> dict[str, float]:
        """Median and quartiles of ``rounds`` timings of ``repeat`` calls, per call, after two that do not count."""
        rounds, repeat = self.scale(rounds, 3), self.scale(repeat, 1)
        times = []
        for i in range(rounds + 2):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(repeat):
                run()
            self.synchronize()
            if i >= 2:
                times.append((time.perf_counter() - start) / repeat)
        quarter = statistics.quantiles(times, n=4)
        return {"median": statistics.median(times), "q1": quarter[0], "q3": quarter[2]}

    def peak_bytes(self, run: Callable[[], Any]) -> int | None:
        """Most memory in use at once while ``run`` runs; None where torch does not count it."""
        if self.device.type != "cuda":
            run()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()

    def held_bytes(self) -> int | None:
        """The most that torch's allocator has held since `peak_bytes` began: a graph's pool is in it, of which no allocation
        tells."""
        return torch.cuda.max_memory_reserved() if self.device.type == "cuda" else None

    def free_bytes(self) -> int | None:
        return free_cuda_bytes(self.device) if self.device.type == "cuda" else None

    def forget(self) -> None:
        """Gives back what the last measurement held, cycles and all."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def attempt(row: Callable[[], Row], what: str) -> Row:
    """The row, or what kept it from being measured; the others of its part still are."""
    try:
        return {"what": what, **row()}
    except Exception as error:
        return {"what": what, "failed": f"{type(error).__name__}: {error}"[:800]}
