"""Peak memory of one subject's step, in a process of its own: python benchmarks/memory.py 'ViT 32×32' 8 16 ours ''

What is measured is the growth of the peak resident set over the state before the first step, with parameters, optimizer state
and batch in place and the libraries warm. Gradients are part of the growth, also where a subject has a buffer for them before.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

from cases import Case

STEPS = 2
ALLOCATOR = {"MALLOC_ARENA_MAX": "2"}  # the same for all subjects


def peak_growth(case: Case, subject: str, budget: int | None = None) -> int:
    """Bytes, measured in a fresh process. ``budget``: see :mod:`subjects`."""
    command = [sys.executable, __file__, case.network, str(case.multiplicity), str(case.rows), subject, str(budget or "")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
    if done.returncode != 0:
        raise RuntimeError(f"memory of {subject} on {case}: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    return int(json.loads(done.stdout.splitlines()[-1]))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory is measured on Linux only")


def _warm() -> None:
    """Loads what any step loads: thread pool, convolution and matrix code, autograd."""
    import torch
    from torch.nn import functional as F

    x, w = torch.randn(2, 8, 8, 8, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    y = F.group_norm(F.conv2d(x, w, padding=1), 2).flatten(2)
    F.scaled_dot_product_attention(y, y, F.linear(y, torch.randn(64, 64))).sum().backward()


def _release() -> None:
    """What making the subject has freed would be used again by its step, and not count as growth."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _measure(case: Case, subject: str, budget: int | None) -> int:
    from subjects import SUBJECTS

    _warm()
    step = SUBJECTS[subject](case, None, budget)
    _release()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    for _ in range(STEPS):
        step()
    return max(0, _status("VmHWM") - before) + getattr(step, "gradient_bytes", 0)


if __name__ == "__main__":
    network, multiplicity, rows, name, budget = sys.argv[1:]
    print(json.dumps(_measure(Case(network, int(multiplicity), int(rows)), name, int(budget) if budget else None)))
