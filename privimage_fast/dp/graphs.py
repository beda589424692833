"""The private step recorded once, as CUDA graphs, and replayed: thousands of small launches without Python between them.

Micro-batches have one shape whatever the Poisson draw, so one recording serves all. Two graphs: ``accumulate`` of a micro-batch,
and the noised step. Everything stays on the device: norms, clip factors, samples that are not finite.

Formal guarantee: that of :mod:`privimage_fast.dp.optimizer`. A graph repeats the arguments of its launches, so none of them may
decide about privacy unseen. The step's key, place, noise and constants are armed anew before each replay (``ops.ArmedStep``; a
step that was not armed makes NaN). What is frozen (the clip bound, multiplicity, the module's mode, where tensors lie) is
compared before each replay: noise scaled to a new bound must not meet sums clipped to an old one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from privimage_fast import ops
from privimage_fast.dp.engine import LossFunction, checked_weight
from privimage_fast.dp.optimizer import PrivateOptimizer
from privimage_fast.dp.rules import UncoveredParameterError

logger = logging.getLogger(__name__)

R = TypeVar("R")

_WARM_UPS = 3  # cuDNN and cuBLAS choose algorithms and workspaces; the engine looks whether rows are independent


class CapturedStep:
    """``accumulate`` and ``step`` of a :class:`PrivateOptimizer` for micro-batches of one shape.

    Where nothing is captured (CPUs, or a capture that failed) the same calls run eagerly.

    Args:
        optimizer: its sums, parameters and state are what the graphs work on.
        loss_fn: as in :meth:`PrivateOptimizer.accumulate`. All that it draws at random has to come with the batch.
        stand_in: arguments of the loss in the shape, dtype, layout and device of every micro-batch to come, with made-up content:
            a few passes on it come before the capture, and their sums are dropped. Never sensitive data.
        autocast: dtype in which the loss may compute; None for float32.
        capture: None captures on a GPU, and runs eagerly, with a warning, where that fails; True raises instead.

    Attributes:
        captured: whether graphs are replayed.
    """

    def __init__(
        self, optimizer: PrivateOptimizer, loss_fn: LossFunction, stand_in: Sequence[Tensor], *,
        autocast: torch.dtype | None = None, capture: bool | None = None,
    ) -> None:  # fmt: skip
        self.optimizer, self._loss_fn, self._autocast = optimizer, loss_fn, autocast
        self._device = optimizer.flat.data.device
        self._inputs = [torch.empty_like(t, device=self._device).copy_(t) for t in stand_in]  # laid out as the stand-in
        rows = self._inputs[0].shape[0] if self._inputs and self._inputs[0].dim() else 0
        if rows == 0 or rows % optimizer.multiplicity:
            raise ValueError(f"stand_in has {rows} rows; expected at least one sample of {optimizer.multiplicity} adjacent rows")
        self._weight = torch.ones(rows // optimizer.multiplicity, device=self._device)
        # Recorded ones; None runs eagerly. (Bound methods of its own would keep the optimizer until the garbage collector comes.)
        self._run_accumulate: Callable[[], tuple[Tensor, Tensor]] | None = None
        self._run_step: Callable[[], Any] | None = None
        self._armed: ops.ArmedStep | None = None
        if capture or (capture is None and _on_gpu(self._device)):
            try:
                self._capture()
            except UncoveredParameterError:
                raise  # the module is refused, captured or not
            except RuntimeError as error:
                if capture:
                    raise
                logger.warning("the private step runs without CUDA graphs, which is slower: %s", error)
                self._run_accumulate, self._run_step, self._armed = None, None, None
        self._frozen = self._settings()

    @property
    def captured(self) -> bool:
        return self._armed is not None

    @property
    def samples(self) -> int:
        """Samples of a micro-batch, padding included."""
        return self._weight.shape[0]

    def accumulate(self, args: Sequence[Tensor], sample_weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Adds a micro-batch's clipped gradients; returns (norms, losses), not private, valid until the next call.

        Args:
            args: as ``stand_in``, on any device. sample_weight: (samples,), 0 for padding; None for no padding.

        Raises:
            ValueError: another shape or dtype than the stand-in's; nothing is added.
            RuntimeError: something that a graph has frozen was changed.
        """
        self._check_frozen()
        if len(args) != len(self._inputs):
            raise ValueError(f"the loss was given {len(args)} tensors, expected {len(self._inputs)}, as in the stand-in batch")
        for i, (to, given) in enumerate(zip(self._inputs, args, strict=True)):
            if given.shape != to.shape or given.dtype != to.dtype:
                raise ValueError(
                    f"args[{i}] is {tuple(given.shape)} {given.dtype}, expected {tuple(to.shape)} {to.dtype}, as in the stand-in "
                    "batch; fill a smaller micro-batch up with rows of weight 0"
                )
        weight = torch.ones(self.samples) if sample_weight is None else checked_weight(sample_weight, self.samples)
        for to, given in zip((*self._inputs, self._weight), (*args, weight), strict=True):
            to.copy_(given, non_blocking=not given.is_pinned())  # the caller may write over a pinned batch
        if self._armed is not None:
            self.optimizer.sum_pending()  # an eager micro-batch before this one; a replay does not look
        return (self._run_accumulate or self._accumulate)()

    def step(self) -> None:
        """:meth:`PrivateOptimizer.step`: noise, update, EMA. An error drops what was accumulated."""
        try:
            self._check_frozen()
            if self._armed is not None:
                self.optimizer.sum_pending()  # or the graph would leave it to the next step, and another batch's charge
                self._armed.arm(**self.optimizer.next_step())
            (self._run_step or self.optimizer.step)()
        except BaseException:
            self.optimizer.discard()  # a next step would add them to another batch, and count a sample twice
            raise

    def _accumulate(self) -> tuple[Tensor, Tensor]:
        dtype = self._autocast
        # No cache of cast weights: one made in a graph would be read outside of it.
        with torch.autocast(self._device.type, dtype, enabled=dtype is not None, cache_enabled=False):
            return self.optimizer.accumulate(self._loss_fn, self._inputs, self._weight)

    # --- capture

    def _capture(self) -> None:
        armed = self.optimizer.armed_step()
        self._run_accumulate = record(self._accumulate, self._device, warm_up=self._warm_up)
        self._run_step = record(armed.launch, self._device, warm_up=self._load_step)
        self._armed = armed

    def _warm_up(self) -> None:
        """Passes on the stand-in batch that leave no trace.

        With weights a little off: behind a layer that begins at zero, rows could not be seen to be independent, and the engine
        would look again within the capture.
        """
        flat = self.optimizer.flat.data
        weights, before, states = flat.clone(), self.optimizer.grad_sum.clone(), _random_states(self._device)
        buffers = {b: b.clone() for b in self.optimizer.module.buffers()}
        try:
            flat += 0.01 * torch.randn(flat.shape, generator=torch.Generator().manual_seed(0)).to(flat)
            for _ in range(_WARM_UPS):
                self._accumulate()
        finally:
            flat.copy_(weights)
            self.optimizer.grad_sum.copy_(before)
            for buffer, content in buffers.items():
                buffer.copy_(content)
        if any(not torch.equal(a, b) for a, b in zip(states, _random_states(self._device), strict=True)):
            raise RuntimeError(
                "the loss draws random numbers of its own (dropout in training mode?), which a graph would take from torch's "
                "generator; draw them in secret and pass them with the batch, or call eval() on such modules"
            )

    def _load_step(self) -> None:
        """One step elsewhere: the first launch of a kernel loads it, which a capture may not."""
        update = self.optimizer.update
        state = [torch.zeros(8, device=self._device) for _ in range(5)]
        momentum = bool(update.momentum)
        step = ops.ArmedStep(*state, optimizer=update.name, momentum=momentum)
        step.launch()

    def _settings(self) -> dict[str, Any]:
        o = self.optimizer
        state = (o.flat.data, o.exp_avg, o.exp_avg_sq, o.ema)
        return {
            "max_grad_norm": o.max_grad_norm,
            "multiplicity": o.multiplicity,
            "strategy": o.strategy,
            "memory_budget": o.memory_budget,
            "store_dtype": o.store_dtype,
            "the update rule": (o.update.name, bool(o.update.momentum)),
            "the module's training mode": tuple(m.training for m in o.module.modules()),
            "the optimizer's state": tuple(t if t is None else t.data_ptr() for t in state),
            "the place of a buffer": {name: b.data_ptr() for name, b in o.module.named_buffers()},
        }

    def _check_frozen(self) -> None:
        self.optimizer.flat.check(self.optimizer.module)
        for name, value in self._settings().items():
            if value != self._frozen[name]:
                found = f" from {self._frozen[name]!r} to {value!r}" if isinstance(value, int | float | str) else ""
                raise RuntimeError(f"{name} was changed{found} after the step was captured; make a new CapturedStep")


def record(run: Callable[[], R], device: torch.device, *, warm_up: Callable[[], None]) -> Callable[[], R]:
    """Captures ``run`` in a CUDA graph; the result replays it and returns the same tensors with their new values.

    On CPUs everything else of this module is tested with this function replaced; on a GPU, tests/dp/test_cuda_step.py calls it.
    """
    with torch.cuda.device(device):
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            warm_up()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

    def replay() -> R:
        graph.replay()
        return result

    return replay


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _random_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
