"""Weight gradients of small linear layers wait for each other on a GPU, where one launch then does several.

The projections of an attention block (q, k, v, out, or a packed in_proj) and other small layers each fill a part of a GPU only,
and a launch costs as much as reading some megabytes. Values and their order are those of one launch a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from privimage_fast import ops
from privimage_fast.dp.rules import MatrixRule, Term
from privimage_fast.dp.uses import Use

MOST_USES = 12  # as many as one launch takes
# x and g of a use, and of all that wait: they stay alive longer than the backward pass would keep them.
USE_BYTES, QUEUE_BYTES = 16 * 2**20, 64 * 2**20


@dataclass
class _Waiting:
    rule: MatrixRule
    x: Tensor
    g: Tensor


class LinearQueue:
    """Uses of linear layers and 1×1 convolutions, until :meth:`run`. All have one multiplicity, device and stream.

    Args:
        store_dtype: of the gradients, as in :func:`ops.linear_weight_grad`.
    """

    def __init__(self, store_dtype: torch.dtype = torch.float32) -> None:
        self._store_dtype = store_dtype
        self._waiting: dict[str, _Waiting] = {}  # by the weight's name
        self._storages: dict[int, int] = {}  # address → bytes
        self._where: tuple[Any, ...] = ()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, name: str) -> bool:
        return name in self._waiting

    def add(self, use: Use, multiplicity: int) -> list[Term] | None:
        """Queues the use's weight gradient; None where it is not one to wait.

        Returns the terms of uses that could wait no longer: those of another multiplicity or stream, or all where the queue is
        full now.
        """
        name, rule = use.rule.names.get("weight"), use.rule
        if name is None or not isinstance(rule, MatrixRule) or not ops.has_cuda_kernel("linear_weight_grads", use.x, use.g):
            return None
        linear = rule.as_linear(use.x, use.g)
        if linear is None:
            return None
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in linear)}
        if sum(storages.values()) > USE_BYTES:
            return None
        where = (multiplicity, linear[0].device, _stream(linear[0].device))
        done = self.run() if self._waiting and where != self._where else []
        self._where = where
        self._waiting[name] = _Waiting(rule, *linear)
        self._storages |= storages
        if len(self._waiting) == MOST_USES or sum(self._storages.values()) > QUEUE_BYTES:
            done += self.run()
        return done

    def run(self) -> list[Term]:
        """The terms of all that waits, in order. Should that fail, all keep waiting."""
        if not self._waiting:
            return []
        multiplicity, device, stream = self._where
        with torch._C.DisableTorchFunction(), nullcontext() if stream is None else torch.cuda.stream(stream):
            found = ops.linear_weight_grads(
                [(w.x, w.g) for w in self._waiting.values()], multiplicity=multiplicity, store_dtype=self._store_dtype
            )
        now = _stream(device)
        if now != stream:
            now.wait_stream(stream)  # whoever reads the terms does so on this one
            for t in (t for pair in found for t in pair if t is not None):
                t.record_stream(now)
        terms = []
        for (name, w), (sq_norms, stored) in zip(self._waiting.items(), found, strict=True):
            assert w.rule.weight is not None and stored is not None
            terms.append(Term(name, sq_norms, stored.view(stored.shape[0], *w.rule.weight.shape)))
        self._waiting, self._storages = {}, {}
        return terms


def _stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def at_end_of_pass(call: Callable[[], None]) -> None:
    """Calls once the backward pass that is running ends; at once if there is none."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(call)  # type: ignore[attr-defined]
    except RuntimeError:
        call()
