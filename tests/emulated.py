"""CPU tensors on the CUDA kernels, emulated on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from privimage_fast.dp import graphs
from privimage_fast.dp.rates import Rates
from privimage_fast.ops import cuda, native

# Measured here, the emulation's own would be the whole process's rates.
RATES = Rates(
    conv3=1e11, conv3_norm=1e11, conv3_sum=1e11, conv=1e11, conv_sum=1e11, linear=1e11, linear_sum=1e11, gram=5e10, bytes=1e10
)  # fmt: skip


def emulate(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Every op that has a CUDA kernel runs on it from here on; the set says which did."""
    used: set[str] = set()

    def supports(op: str, tensors: Sequence[Tensor]) -> bool:
        known = hasattr(cuda, op) and all(t.dtype in native._SUPPORTED.get(op, native._FLOATS) for t in tensors)
        used.update([op] if known else [])
        return known

    on_cpu = native.supports
    monkeypatch.setattr(cuda, "supports", supports)
    monkeypatch.setattr(native, "supports", lambda op, tensors: not hasattr(cuda, op) and on_cpu(op, tensors))
    return used


def replay(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be recorded in a CUDA graph is run again instead of replayed from here on; the list says what was."""
    done: list[str] = []

    def record(run: Callable[[], Any], device: torch.device, *, warm_up: Callable[[], None]) -> Callable[[], Any]:
        warm_up()

        def again() -> Any:
            done.append(run.__name__.strip("_"))
            return run()

        return again

    monkeypatch.setattr(graphs, "record", record)
    return done
