"""Per-sample gradients of a module in a training loop that the user drives: ``loss = …; loss.backward(); optimizer.step()``.

Each call of the module runs in a :class:`~privimage_fast.dp.tracker.Tracker`; the user's own backward pass then brings the uses
of its parameters here, and the optimizer takes them when it steps. What lies between two steps is one batch: row b of every call
belongs to sample b (a discriminator called on real and on fake images), and a sample's gradients of all calls are added before
the norm is taken. What would break that is refused where it can be seen: another number of rows, another batch, a graph from
before the last step.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from privimage_fast.dp.collector import Choice, Collector
from privimage_fast.dp.engine import probe_rows
from privimage_fast.dp.loader import DrawnBatch
from privimage_fast.dp.passes import eagerly
from privimage_fast.dp.rules import Rule, UncoveredParameterError
from privimage_fast.dp.tracker import Tracker, batch_tensors, trainable_parameters
from privimage_fast.dp.uses import Sink, Use

logger = logging.getLogger(__name__)


class _Call:
    """One call of the module: its tracker, its rows, and the batch that was drawn last when it ran."""

    def __init__(self, tracker: Tracker, inputs: Any, out: Any, batch: DrawnBatch | None, step: int) -> None:
        self.tracker, self.rows, self.batch, self.step = tracker, tracker.rows, batch, step
        sizes = {t.shape[0] for t in batch_tensors(inputs) if t.dim()}
        returned = {t.shape[0] for t in _outputs(out) if t.dim()}
        self.unclear = sorted(sizes) if len(sizes) > 1 and self.rows not in returned else []
        self.received = False  # its backward pass has been here


class _UsesOf(Counter[str]):
    """How often each parameter is used in the calls of a list that still grows."""

    def __init__(self, calls: list[_Call]) -> None:
        super().__init__()
        self.calls = calls

    def __missing__(self, name: str) -> int:
        return sum(made.tracker.calls[name] for made in self.calls)


class _CallTracker(Tracker):
    """Refuses activation checkpointing: its second run happens in the user's backward pass, where nobody watches it."""

    def _apply(self, rule: Rule, x: Tensor, *more: Tensor) -> Tensor:
        if _checkpointing():
            raise UncoveredParameterError(
                f"{rule.describe()} is inside activation checkpointing, whose second run cannot be watched when loss.backward() "
                "is called by the training script; switch checkpointing off and cut batches with BatchMemoryManager, or use "
                "pf.PrivateOptimizer or pf.clipped_grad, which cover it"
            )
        return super()._apply(rule, x, *more)


def _checkpointing() -> bool:
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # type: ignore[attr-defined]
    hooks = top(False) if top is not None else None
    return bool(hooks) and "checkpoint" in getattr(hooks[0], "__qualname__", "")


class Recorder:
    """What a module's calls left since the last optimizer step.

    Args:
        module: watched from :meth:`attach` to :meth:`detach`.
        multiplicity: K adjacent rows of every call belong to one sample.
        choose: decides how each weight gradient is had (see :mod:`privimage_fast.dp.planner`).
        store_dtype: what weights' gradients are stored in (:class:`~privimage_fast.dp.collector.Collector`).
    """

    def __init__(self, module: nn.Module, *, multiplicity: int, choose: Choice, store_dtype: torch.dtype = torch.float32) -> None:
        self.module, self.multiplicity, self._choose, self._store_dtype = module, multiplicity, choose, store_dtype
        self.batch: DrawnBatch | None = None  # the one handed out last; set by the optimizer
        self._step = 0  # counts optimizer steps, those that only add up too
        self._calls: list[_Call] = []
        self._collector: Collector | None = None
        self._collected_batch: DrawnBatch | None = None
        self._refusal: str | None = None
        self._running = False
        self._hooks = WeakIdKeyDictionary()  # parameter → handle
        self._probed_silently = False

    # --- the module's calls

    def run(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``call(*args, **kwargs)``, watched if gradients are on."""
        if self._running or not torch.is_grad_enabled() or not trainable_parameters(self.module):
            return call(*args, **kwargs)
        self._running = True
        try:
            if _rows((args, kwargs)) == 0:
                return self._run_without_rows(call, args, kwargs)
            return self._run_watched(call, args, kwargs)
        finally:
            self._running = False

    def _run_watched(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._hook_parameters()
        sink = Sink()
        tracker = _CallTracker(self.module, (args, kwargs), sink)
        if tracker.rows % self.multiplicity:
            raise ValueError(
                f"the module was called with {tracker.rows} rows, which cannot be grouped into samples of multiplicity "
                f"{self.multiplicity}"
            )
        with eagerly(self.module), tracker:
            out = call(*args, **kwargs)
        tracker.check_buffers()
        tracker.check_gradients({})
        self._probe(out, (args, kwargs), tracker, sink)
        made = _Call(tracker, (args, kwargs), out, self.batch, self._step)
        self._calls.append(made)
        sink.receiver = functools.partial(self._receive, made)
        return out

    def _run_without_rows(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An empty batch: the module sees one sample of zeros (``view(len(x), -1)`` fails on none) and its rows are cut off."""

        def stand_in(t: Tensor) -> Tensor:
            return t.new_zeros(self.multiplicity, *t.shape[1:]) if t.dim() and t.shape[0] == 0 else t

        def cut(t: Tensor) -> Tensor:
            t = t[:0] if t.dim() else t
            # The script's loss.backward() needs something to differentiate; it reaches no parameter.
            return t * torch.ones((), dtype=t.dtype, device=t.device, requires_grad=True) if t.is_floating_point() else t

        with torch.no_grad(), eagerly(self.module):
            out = call(*_mapped(args, stand_in), **_mapped(kwargs, stand_in))
        return _mapped(out, cut)

    def _probe(self, out: Any, inputs: Any, tracker: Tracker, sink: Sink) -> None:
        """Looks once for each kind of input whether the module keeps rows apart, by a backward pass from half of its output."""
        rows = tracker.rows
        outputs = [t for t in _outputs(out) if t.requires_grad and t.dim() and t.shape[0] % rows == 0]
        if not outputs:
            if not self._probed_silently:
                logger.warning(
                    "%s returns no tensor with one row a sample, so that it keeps samples apart is not checked",
                    type(self.module).__name__,
                )
            self._probed_silently = True
            return

        def part_of(keep: Tensor) -> Tensor:
            total = torch.zeros((), device=outputs[0].device)
            for t in outputs:
                # Weights, because some sums are constant (softmax). Their own generator leaves the user's alone.
                weights = torch.randn(t.shape, generator=torch.Generator().manual_seed(0)).to(t.device)
                chosen = keep.repeat_interleave(t.shape[0] // rows).to(t.device)
                total = total + (t.float() * weights)[chosen].sum()
            return total

        with torch.autocast(outputs[0].device.type, enabled=False), eagerly(self.module):
            key = ("calls", *((t.dtype, t.shape[1:]) for t in batch_tensors(inputs)))  # Poisson batches differ in rows
            probe_rows(self.module, part_of, inputs, rows, self.multiplicity, tracker, sink, key=key)

    def _receive(self, made: _Call, use: Use) -> None:
        if made.step != self._step:
            raise RuntimeError(
                "loss.backward() reached a call of the private module that was made before the last optimizer.step(); the "
                "weights have changed since. Call the module again, or detach its output"
            )
        if not made.received:
            made.received = True
            made.tracker.check_unchanged()
            if not any(made is other for other in self._calls):  # differentiated once more, after zero_grad
                self._calls.append(made)
        if self._refusal is None:
            self._refusal = self._why_not(made)
        if self._refusal is None:
            with torch.no_grad():
                if self._collector is None:
                    self._collector = Collector(
                        made.rows, self.multiplicity, _UsesOf(self._calls), self._choose, self._store_dtype
                    )
                    self._collected_batch = made.batch
                self._collector(use)

    def _why_not(self, made: _Call) -> str | None:
        """Why gradients of a call cannot join those of the step. Said when the optimizer steps: ``zero_grad`` may come first, as
        after a generator's backward pass through its discriminator.
        """
        batch, k = made.batch, self.multiplicity
        if batch is None and made.unclear:
            return (
                f"the private module was called with tensors of {' and '.join(map(str, made.unclear))} rows, on a batch that is "
                "not of the private data loader: which of them counts the samples is not known. Iterate the loader that "
                "make_private returned"
            )
        if batch is not None and made.rows != batch.samples * k:
            return (
                f"the private module was called with {made.rows} rows on a batch of {batch.samples} samples"
                + (f" and multiplicity {k}" if k > 1 else "")
                + ": rows could not be told apart by sample. Call it with all rows of the batch, once for each kind (real, "
                "fake); where a sample has K rows, keep them adjacent and give make_private multiplicity=K"
            )
        if self._collector is None:
            return None
        if batch is not self._collected_batch:
            return (
                "gradients of two batches came together without an optimizer.step() or zero_grad() between them: their samples "
                "would be clipped as one. Step after every batch; BatchMemoryManager cuts large ones"
            )
        if made.rows != self._collector.rows:
            return (
                f"the private module was called with {self._collector.rows} and with {made.rows} rows in one step; row b of "
                "every call has to belong to sample b. Make as many fake rows as there are real ones"
            )
        return None

    # --- the optimizer's side

    @property
    def pending(self) -> bool:
        """Whether the module was called, watched, since the last step."""
        return bool(self._calls)

    def take(self) -> Collector | None:
        """The per-sample gradients received since the last step; None if there are none. The next batch begins.

        Raises:
            RuntimeError: gradients came that cannot be told apart by sample.
        """
        collector, calls, refusal = self._collector, self._calls, self._refusal
        self._calls, self._collector, self._refusal = [], None, None
        self._step += 1
        if refusal is not None:
            raise RuntimeError(refusal)
        if collector is not None:
            derived = {key: t for made in calls for key, t in made.tracker.derived.items()}
            collector.pull_back(derived, trainable_parameters(self.module))
        return collector

    def forget(self) -> None:
        """Drops the gradients received so far, as ``zero_grad`` does; calls whose backward pass is still to come stay."""
        self._collector = self._refusal = None
        done = [made for made in self._calls if made.received]
        self._calls[:] = [made for made in self._calls if not made.received]
        for made in done:
            made.received = False

    # --- the module itself

    def attach(self) -> nn.Module:
        """Makes the module run under this recorder from now on; it stays the same object of a subclass of its class."""
        module = self.module
        # torch.compile of the private module then leaves its calls as written. (torch.optim has loaded the compiler already.)
        self.run = torch.compiler.disable(self.run)  # type: ignore[method-assign]
        _recorders[module] = self
        object.__setattr__(module, "__class__", _watched_class(type(module)))
        return module

    def detach(self) -> nn.Module:
        """Makes the module an ordinary one again."""
        module = self.module
        _recorders.pop(module, None)
        if isinstance(module, _Watched):
            object.__setattr__(module, "__class__", type(module).__mro__[2])
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()
        self._calls, self._collector = [], None
        return module

    def _hook_parameters(self) -> None:
        for name, p in trainable_parameters(self.module).items():
            if p not in self._hooks:
                self._hooks[p] = p.register_post_accumulate_grad_hook(functools.partial(_refuse_gradient, name))


def _refuse_gradient(name: str, parameter: Tensor) -> None:
    """Autograd itself found a gradient: summed over samples, by a way that no rule saw."""
    parameter.grad = None
    raise UncoveredParameterError(
        f"parameter {name!r} of the private module reached the loss by a way the engine cannot see, so its gradient is not per "
        "sample: it was used outside the module's call (a penalty on weights, module.forward() or a part of the module called "
        "directly) or in a custom autograd function. Use it inside the module's call only, or freeze it with "
        "requires_grad_(False); weight decay belongs to the optimizer"
    )


# --- modules that run under a recorder

_recorders: WeakKeyDictionary[nn.Module, Recorder] = WeakKeyDictionary()
_classes: WeakKeyDictionary[type, type] = WeakKeyDictionary()


class _Watched:
    """Mixed into the class of a private module. The recorder is looked up, not stored: a copy of the module is an ordinary "
    "one."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        recorder = _recorders.get(self)  # type: ignore[call-overload]
        call = super().__call__  # type: ignore[misc]
        return call(*args, **kwargs) if recorder is None else recorder.run(call, args, kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        recorder = _recorders.get(self)  # type: ignore[call-overload]
        if recorder is not None:
            recorder.forget()
        super().zero_grad(set_to_none)  # type: ignore[misc]

    def to_standard_module(self) -> Any:
        """Opacus' name: the module without privacy."""
        recorder = _recorders.get(self)  # type: ignore[call-overload]
        return self if recorder is None else recorder.detach()

    def __reduce_ex__(self, protocol: Any) -> Any:
        # Copies and pickles are of the user's own class. (pickle insists on the object's own class after copyreg.__newobj__.)
        _, _, *rest = super().__reduce_ex__(protocol)
        return object.__new__, (type(self).__mro__[2],), *rest


def _watched_class(cls: type) -> type:
    if issubclass(cls, _Watched):
        return cls
    if cls not in _classes:
        members: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        if not hasattr(cls, "_module"):  # Opacus' wrapper holds the user's module there
            members["_module"] = property(lambda self: self)
        _classes[cls] = type(cls.__name__, (_Watched, cls), members)
    return _classes[cls]


def recorder_of(module: nn.Module) -> Recorder | None:
    """The recorder a module runs under; None for an ordinary module."""
    return _recorders.get(module)


# --- nested structures


def _rows(tree: Any) -> int | None:
    first = next((t for t in batch_tensors(tree) if t.dim()), None)
    return None if first is None else first.shape[0]


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        new = copy.copy(tree)
        for key, value in tree.items():
            new[key] = _mapped(value, change)  # type: ignore[index]
        return new
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_mapped(value, change) for value in tree))
    if isinstance(tree, list | tuple):
        return type(tree)(_mapped(value, change) for value in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return dataclasses.replace(tree, **{f.name: _mapped(getattr(tree, f.name), change) for f in dataclasses.fields(tree)})
    return tree


def _outputs(tree: Any) -> Iterator[Tensor]:
    if dataclasses.is_dataclass(tree) and not isinstance(tree, Mapping | type):
        for f in dataclasses.fields(tree):
            yield from batch_tensors(getattr(tree, f.name))
    else:
        yield from batch_tensors(tree)
