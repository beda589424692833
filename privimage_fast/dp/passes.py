"""The two halves of a watched pass: running a module's code as written, and the backward pass through its calls."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from privimage_fast.dp.rules import UncoveredParameterError
from privimage_fast.dp.tracker import Tracker

logger = logging.getLogger(__name__)

_told: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def backward(
    tracker: Tracker, output: Tensor, inputs: Sequence[Tensor], *, retain_graph: bool = False
) -> Sequence[Tensor | None]:
    """Gradients of the scalar ``output`` with the tracker active, so that checkpointed parts run through it once more."""
    tracker.recording = False
    try:
        with tracker:  # torch.autograd.grad would suspend the mode, so the engine is called directly
            return torch.autograd.Variable._execution_engine.run_backward(  # type: ignore[attr-defined]
                (output,), (torch.ones_like(output),), retain_graph, False, tuple(inputs), True, accumulate_grad=False
            )
    finally:
        tracker.recording = True


@contextmanager
def eagerly(module: nn.Module) -> Iterator[None]:
    """Runs compiled parts of ``module`` as written: what is inside compiled code cannot be watched."""
    compiled = next((name or "the module" for name, m in module.named_modules() if is_compiled(m)), None)
    if compiled is None:
        yield
        return
    if not hasattr(torch.compiler, "set_stance"):  # torch < 2.6
        raise UncoveredParameterError(
            f"{compiled!r} is compiled by torch.compile, and its calls cannot be seen; pass the module that was compiled"
        )
    if module not in _told:
        _told[module] = True
        logger.warning(
            "%s is compiled by torch.compile; per-sample gradients need its calls one by one, so it runs eagerly", compiled
        )
    with torch.compiler.set_stance("force_eager"):
        yield


def is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
