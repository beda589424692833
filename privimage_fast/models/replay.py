"""What a network does with tensors of one shape, replayed from a CUDA graph: its forward pass, for sampling, which makes dozens
alike, and its gradients, for public training, which makes thousands. Small networks take longer to launch than to compute.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from privimage_fast.dp.graphs import record

logger = logging.getLogger(__name__)

_PATIENCE = 64  # calls: more than the smaller last batch of a set makes


# What is recorded: (module, *tensors) → a tensor or several.
Compute = Callable[..., Any]


class Replayed:
    """``compute(module, *tensors)``, recorded for the first shape it is called with, and anew for another that stays.

    A recording holds as much memory as the computation takes, until :meth:`drop` or the end of the module. Of several results
    the next call overwrites all; one alone is the caller's. On a CPU nothing is recorded.
    """

    def __init__(self, module: nn.Module, compute: Compute | None = None, what: str = "the network is sampled from") -> None:
        self._module, self._compute, self._what = ref(module), compute or _forward, what
        self._key: Any = None
        self._other, self._others = None, 0  # another shape, and how often it came in a row
        self._inputs: list[Tensor] = []
        self._run: Any = None

    def drop(self) -> None:
        """Frees the recording's memory, whoever else still holds this object."""
        self._key, self._run, self._inputs = None, None, []

    def __call__(self, *tensors: Tensor) -> Any:
        module, device = self._module(), tensors[0].device
        assert module is not None
        if not _on_gpu(device):
            return self._compute(module, *tensors)
        # What a graph has frozen: shapes, whether autocast was on, and where the weights lie.
        key = (
            [(t.shape, t.dtype) for t in tensors], torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type), module.training, [p.data_ptr() for p in module.parameters()],
        )  # fmt: skip
        if key != self._key:
            self._others = self._others + 1 if key == self._other else 1
            self._other = key
        else:
            self._other, self._others = None, 0
        if self._key is None or self._others > _PATIENCE:
            self._key, self._run, self._other, self._others = key, None, None, 0
            # Whatever layouts the caller comes with, images lie as tensor cores want them.
            self._inputs = [
                t.clone(memory_format=torch.channels_last if t.dim() == 4 else torch.preserve_format) for t in tensors
            ]
            try:
                self._run = record(self._again, device, warm_up=self._warm_up)
            except RuntimeError as error:
                logger.warning("%s without a CUDA graph, which is slower: %s", self._what, error)
                self._inputs = []
        if self._run is None or key != self._key:
            return self._compute(module, *tensors)
        for to, given in zip(self._inputs, tensors, strict=True):
            to.copy_(given)
        result = self._run()
        return result.clone() if isinstance(result, Tensor) else result  # the next replay overwrites it

    def _warm_up(self) -> None:
        for _ in range(3):  # libraries choose algorithms and workspaces
            self._again()

    def _again(self) -> Any:
        module, kind = self._module(), self._inputs[0].device.type
        assert module is not None
        # No cache of cast weights: it is emptied where autocast ends, and the graph would go on reading it.
        with torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            return self._compute(module, *self._inputs)


def _forward(module: nn.Module, *tensors: Tensor) -> Tensor:
    return module(*tensors)


def replayed_gradients(module: nn.Module, loss: Compute) -> Replayed:
    """(module's parameters as they are) → ``loss(module, *tensors)``, a scalar that draws nothing at random, and its gradients.

    These are in the order of the parameters, and valid until the next call.
    """
    parameters = list(module.parameters())

    def compute(module: nn.Module, *tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
        value = loss(module, *tensors)
        return value.detach(), list(torch.autograd.grad(value, parameters))

    return Replayed(module, compute, "the network is trained on public images")


_recordings: WeakKeyDictionary[nn.Module, Replayed] = WeakKeyDictionary()


def replayed(module: nn.Module) -> Replayed:
    """The forward pass of ``module``, whose recording is kept as long as the module."""
    if module not in _recordings:
        _recordings[module] = Replayed(module)
    return _recordings[module]


def forget(module: nn.Module) -> None:
    """Drops the module's recording and frees its memory, before the weights move or something else needs it."""
    recording = _recordings.pop(module, None)
    if recording is not None:
        recording.drop()


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
