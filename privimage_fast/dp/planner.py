"""Which way to take for each layer, and how many samples at a time: from a memory budget and costs measured on this machine.

A layer's weight W_b (d inputs × p outputs, T positions, K rows a sample) can be had in three ways (see ``collector``):

- store: 2KTdp operations, 4dp bytes a sample (2dp in bfloat16) kept until the clip factors are known, then read once;
- gram: (KT)²(d'+p) operations for the norm (d' channels; half of it, by symmetry), and an ordinary weight gradient later;
- norm-only: the operations of store, and an ordinary weight gradient later. Both keep x and g instead of W_b.

Times come from rates measured once a process on this machine's CPU or GPU (see :mod:`rates`). Bytes are counted, not modelled: a
forward and backward pass on one and on two samples, with every tensor's storage watched, gives what one sample more costs at
every point of the backward pass; what a way keeps is then added from the point on where it is kept.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from privimage_fast.dp.collector import Choice, rank_one
from privimage_fast.dp.grouping import QUEUE_BYTES
from privimage_fast.dp.passes import backward, eagerly
from privimage_fast.dp.rates import Rates, machine_rates, pairs
from privimage_fast.dp.rules import ConvRule, LinearRule, MatrixRule, like
from privimage_fast.dp.tracker import Tracker, batch_tensors
from privimage_fast.dp.uses import Sink, Use

WAYS = ("store", "gram", "norm-only")

# Resident memory is more than live tensors: holes of the C library's allocator (a share), and packing buffers of the kernels,
# of oneDNN's and its generated code (a constant). Both from runs like those of the test that measures a child process.
_MARGIN, _SCRATCH = 1.45, 20 * 2**20
# On a GPU: work space of cuDNN and cuBLAS, and what waits to share a launch. Not measured.
_CUDA_SCRATCH = 256 * 2**20 + QUEUE_BYTES

# Calls that a deferred layer makes for one of a stored layer: its norm, what rounding may add to it, and its clipped sum.
_DEFERRED_CALLS = 6

# What is left of a GPU's free memory for fragments and for whatever else runs there.
_SHARE_OF_FREE = 0.9
DEFAULT_BUDGET = 2**30  # on a CPU


class MemoryBudgetError(ValueError):
    """The memory budget does not hold one sample, whatever way is taken. ``needed``: bytes that would."""

    def __init__(self, message: str, needed: int) -> None:
        super().__init__(message)
        self.needed = needed


# --- costs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One sample's share of a layer: positions T·K, inputs d (with the kernel's offsets) and outputs p, its channels."""

    kind: str  # "conv3" | "conv" | "linear", as in Rates
    positions: int
    inputs: int
    outputs: int
    channels: int  # input channels
    weights: int
    kept_bytes: int  # x and g
    element_bytes: int = 4  # of what is stored
    dtype: torch.dtype = torch.float32  # in which x and g are multiplied

    @classmethod
    def of(cls, rule: MatrixRule, x: Tensor, g: Tensor, multiplicity: int, store_dtype: torch.dtype = torch.float32) -> Shape:
        samples = x.shape[0] // multiplicity
        kept = (x.numel() * x.element_size() + g.numel() * g.element_size()) // samples
        weights, element = rule.weight_numel(), store_dtype.itemsize
        dtype = torch.bfloat16 if x.dtype == g.dtype == torch.bfloat16 else torch.float32
        if isinstance(rule, LinearRule):
            positions = multiplicity * math.prod(x.shape[1:-1])
            return cls("linear", positions, x.shape[-1], g.shape[-1], x.shape[-1], weights, kept, element, dtype)
        assert isinstance(rule, ConvRule)
        groups = rule.options["groups"]
        inside, outside = rule.contraction(x, g)
        positions = multiplicity * math.prod(outside.shape[2:])
        outputs = outside.shape[1]
        plain = rule.weight.shape[2:] == (3, 3) and not {*rule.options["stride"], *rule.options["dilation"]} - {1}
        kind = "conv3" if plain else "conv"
        return cls(kind, positions, weights // outputs, outputs, inside.shape[1] // groups, weights, kept, element, dtype)

    @property
    def operations(self) -> float:
        return 2.0 * self.positions * self.weights

    def seconds(self, rates: Rates, samples: int | None = None) -> dict[str, float]:
        """Way → seconds a sample; with ``samples``, each with its share of what calls for so many cost however small they are."""

        def filled(n: int, side: int) -> int:
            return -(-n // side) * side

        operations = (
            2.0 * filled(self.positions, rates.depth) * filled(self.inputs, rates.tile) * filled(self.outputs, rates.tile)
        )
        once, again = (operations / getattr(rates, kind) for kind in (self.kind, f"{self.kind}_sum"))
        gram = 2.0 * pairs(self.positions, rates.tile) * ((self.inputs if rates.unfolds else self.channels) + self.outputs)
        if self.kind != "linear" and not rates.unfolds:  # the sums over kernel offsets
            gram += self.positions * self.positions * (self.inputs / self.channels)
        alone = operations / rates.conv3_norm if self.kind == "conv3" else once
        call = rates.call / samples if samples else 0.0
        return {
            "store": once + 2 * self.element_bytes * self.weights / rates.bytes + call,
            "gram": gram / rates.gram + again + _DEFERRED_CALLS * call,
            "norm-only": alone + again + _DEFERRED_CALLS * call,
        }

    @property
    def scratch_bytes(self) -> int:
        """What a thread keeps besides: sums of transformed products, where Winograd's algorithm is taken, 36 for each 3×3 kernel;
        a gradient before it is rounded, and in double for its norm."""
        winograd = min(4 * 36 * self.channels * self.outputs, 64 * 2**20) if self.kind == "conv3" else 0
        return winograd + (12 * self.weights if self.element_bytes < 4 else 0)

    def bytes_kept(self, way: str) -> int:
        return self.element_bytes * self.weights if way == "store" else self.kept_bytes


@functools.lru_cache(maxsize=4096)  # every layer asks in every micro-batch
def _fastest(shape: Shape, rates: Rates, samples: int) -> str:
    seconds = shape.seconds(rates, samples)
    return min(WAYS, key=seconds.__getitem__)


def cheapest(device: torch.device, store_dtype: torch.dtype = torch.float32) -> Choice:
    """The fastest way for each call, whatever it keeps."""

    def choose(rule: MatrixRule, x: Tensor, g: Tensor, multiplicity: int) -> str:
        if x.dtype == torch.float64 or device.type not in ("cpu", "cuda"):
            return "store"
        if device.type == "cpu" and rank_one(rule, x, multiplicity):
            return "gram"
        shape = Shape.of(rule, x, g, multiplicity, store_dtype)
        return _fastest(shape, machine_rates(device, torch.get_num_threads(), shape.dtype), x.shape[0] // multiplicity)

    return choose


# --- what a pass keeps ------------------------------------------------------------------------------------------------


class MemoryMeter(TorchDispatchMode):
    """Counts the bytes of live tensor storages made on ``device`` (its kind) while it is active; ``take`` reads the peak since it
    was last read.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Wrapping the method for the compiler would import it: 70 MiB that a memory budget does not have."""
        return False

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__()
        self.device = device or torch.device("cpu")
        self.live = self._peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        before = {id(t.untyped_storage()) for t in batch_tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for t in batch_tensors(out):
            storage = t.untyped_storage()
            if t.device.type != self.device.type or id(storage) in before or storage in self._seen:
                continue
            size = storage.nbytes()
            self._seen.add(storage)
            self.live += size
            weakref.finalize(storage, self._freed, size).atexit = False
        self._peak = max(self._peak, self.live)
        return out

    def _freed(self, size: int) -> None:
        self.live -= size

    def take(self) -> int:
        peak, self._peak = self._peak, self.live
        return peak


@dataclass(frozen=True)
class Layer:
    """A matrix call as a profile saw it."""

    name: str
    function: str
    shape: Shape
    shared: bool  # used more than once, or through a derived weight: always stored
    point: int  # its place in the backward pass


@dataclass(frozen=True)
class Profile:
    """Layers in the order of the backward pass, and bytes at each point of it: of no sample, and of each sample more."""

    layers: tuple[Layer, ...]
    fixed: tuple[float, ...]
    slope: tuple[float, ...]
    other_bytes: int  # per-sample gradients of everything that is no matrix, a sample
    parameter_bytes: int
    on_gpu: bool = False


def take_samples(args: Sequence[Any], rows: int, multiplicity: int, index: Sequence[int]) -> list[Any]:
    """The rows of the given samples of every batch tensor in ``args`` (nested tuples, lists and dicts too)."""
    wanted = [b * multiplicity + k for b in index for k in range(multiplicity)]

    def take(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            if not tree.dim() or tree.shape[0] != rows:
                return tree
            if wanted and wanted == list(range(wanted[0], wanted[-1] + 1)):
                return tree[wanted[0] : wanted[-1] + 1]
            return tree[torch.tensor(wanted, device=tree.device, dtype=torch.int64)]
        if isinstance(tree, dict):
            return {key: take(value) for key, value in tree.items()}
        return like(tree, (take(value) for value in tree)) if isinstance(tree, list | tuple) else tree

    return [take(a) for a in args]


def batch_rows(args: Sequence[Any]) -> int:
    first = next((t for t in batch_tensors(list(args)) if t.dim()), None)
    return 0 if first is None else first.shape[0]


def profile(
    module: nn.Module, loss_fn: Callable[..., Tensor], args: Sequence[Any], multiplicity: int, at_most: int | None = None,
    store_dtype: torch.dtype = torch.float32,
) -> Profile:  # fmt: skip
    """Watches a pass on one sample and on two; their gradients are dropped. Random states are left as they were.

    ``at_most``: bytes. Where two samples would take more, one is all there is to plan for, and two are not tried.
    """
    rows = batch_rows(args)
    if rows < multiplicity:
        raise ValueError(f"a plan needs one sample ({multiplicity} rows) to look at, found {rows} rows")
    points: list[list[int]] = []
    layers: list[Layer] = []
    other = 0
    device = device_of(module)
    for samples in (1, 2):
        if samples == 2 and at_most is not None and _MARGIN * 2 * max(points[0]) + _scratch(device.type == "cuda") > at_most:
            points.append([2 * bytes_ for bytes_ in points[0]])
            break
        part = take_samples(args, rows, multiplicity, [0] * samples)
        sink, meter, seen = Sink(), MemoryMeter(device), []
        layers, other, own_rows = [], 0, samples * multiplicity

        def receive(use: Use) -> None:
            nonlocal other
            rule, name = use.rule, use.rule.names.get("weight")
            k = multiplicity * (use.x.shape[0] // own_rows)  # noqa: B023
            if isinstance(rule, MatrixRule) and name is not None:
                shape = Shape.of(rule, use.x, use.g, k, store_dtype)
                layers.append(Layer(name, rule.function, shape, sink.calls[name] > 1, len(seen)))  # noqa: B023
            other += sum(4 * w.numel() for w in (rule.weight, rule.bias) if w is not None and not isinstance(rule, MatrixRule))
            seen.append(meter.take())  # noqa: B023

        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), meter:
            tracker = Tracker(module, part, sink)
            with torch.enable_grad(), eagerly(module), tracker:
                losses = loss_fn(module, *part)
            seen.append(meter.take())
            sink.receiver = receive
            try:
                with torch.autocast(losses.device.type, enabled=False), eagerly(module):
                    backward(tracker, losses.sum(), [tracker.anchor])
            finally:
                sink.receiver = None
            del losses, tracker
        points.append([*seen, meter.take()])
    one, two = points
    if len(one) != len(two):
        raise ValueError("the number of layer calls depends on the batch; give physical_batch_size instead of a memory budget")
    slope = tuple(max(0.0, b - a) for a, b in zip(one, two, strict=True))
    fixed = tuple(max(0.0, a - s) for a, s in zip(one, slope, strict=True))
    parameter_bytes = sum(4 * p.numel() for p in module.parameters() if p.requires_grad)
    return Profile(tuple(layers), fixed, slope, other, parameter_bytes, device.type == "cuda")


def device_of(module: nn.Module) -> torch.device:
    """Where the trainable parameters are; the CPU for a module without any."""
    return next((p.device for p in module.parameters() if p.requires_grad), torch.device("cpu"))


def default_memory_budget(device: torch.device, free_bytes: Callable[[torch.device], int] | None = None) -> int:
    """Bytes for a micro-batch where the user names none: of a GPU most of what is free now, else 1 GiB."""
    if device.type != "cuda":
        return DEFAULT_BUDGET
    return int(_SHARE_OF_FREE * (free_bytes or free_cuda_bytes)(device))


def free_cuda_bytes(device: torch.device) -> int:
    """What the driver has left, and what torch's allocator holds without using it."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _scratch(on_gpu: bool) -> int:
    return _CUDA_SCRATCH if on_gpu else _SCRATCH


# --- plans ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedLayer:
    """A layer and the way chosen for it; bytes and seconds are a sample's."""

    layer: Layer
    way: str
    kept_bytes: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class Plan:
    """How one micro-batch is done: a way for each matrix, and the number of samples at a time.

    ``peak_bytes`` is what the pass is predicted to allocate beyond parameters, optimizer state and the batch itself.
    """

    layers: tuple[PlannedLayer, ...]
    physical_batch_size: int
    multiplicity: int
    peak_bytes: int
    memory_budget: int | None

    @property
    def ways(self) -> dict[str, str]:
        return {p.layer.name: p.way for p in self.layers}

    def choice(self) -> Choice:
        ways = self.ways
        return lambda rule, x, g, multiplicity: ways.get(rule.names["weight"], "store")

    def table(self) -> str:
        """The plan as aligned text: a line a layer (of one micro-batch), then the totals."""
        n = self.physical_batch_size
        head = ("layer", "function", "T·K", "inputs", "outputs", "way", "GFLOP", "kept MiB", "ms")
        body = [
            (
                p.layer.name.split(" at ")[0], p.layer.function, str(s.positions), str(s.inputs), str(s.outputs), p.way,
                f"{n * s.operations / 1e9:.3f}", f"{n * p.kept_bytes / 2**20:.2f}", f"{n * p.seconds[p.way] * 1e3:.2f}",
            )
            for p in self.layers
            for s in (p.layer.shape,)
        ]  # fmt: skip
        widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(c.ljust(w) if i in (0, 1, 5) else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
                 for row in (head, *body)]  # fmt: skip
        counts = Counter(p.way for p in self.layers)
        budget = "no limit" if self.memory_budget is None else f"of {self.memory_budget / 2**20:.0f} MiB"
        lines.append(
            f"micro-batch {n} samples × {self.multiplicity} rows, peak about {self.peak_bytes / 2**20:.0f} MiB ({budget}); "
            f"weight gradients {n * sum(p.seconds[p.way] for p in self.layers) * 1e3:.0f} ms, "
            f"kept {n * sum(p.kept_bytes for p in self.layers) / 2**20:.0f} MiB; "
            + ", ".join(f"{counts[w]} {w}" for w in WAYS if counts[w])
        )
        return "\n".join(line.rstrip() for line in lines)


def _peak(found: Profile, ways: Sequence[str], samples: int, parts: bool) -> int:
    """Predicted peak of one micro-batch in bytes; with ``parts``, of a batch done in several."""
    kept, peak, at = 0.0, 0.0, 0
    for point, (fixed, slope) in enumerate(zip(found.fixed, found.slope, strict=True)):
        while at < len(ways) and found.layers[at].point < point:
            kept += samples * found.layers[at].shape.bytes_kept(ways[at])
            at += 1
        peak = max(peak, fixed + samples * slope + kept)
    # After the pass: everything kept, and for a deferred layer g once more with its factors and one weight gradient.
    deferred = [layer.shape for layer, way in zip(found.layers, ways, strict=True) if way != "store"]
    again = max((samples * s.kept_bytes + 4 * s.weights for s in deferred), default=0)
    everything = sum(samples * layer.shape.bytes_kept(way) for layer, way in zip(found.layers, ways, strict=True))
    peak = max(peak, everything + again + sum(4 * s.weights for s in deferred))
    # The sums; and as they were, should a later part fail.
    sums = found.parameter_bytes * (2 if parts else 1)
    if found.on_gpu:  # copies of x and g with channels innermost
        scratch = samples * max((layer.shape.kept_bytes for layer in found.layers), default=0)
    else:
        scratch = torch.get_num_threads() * max((layer.shape.scratch_bytes for layer in found.layers), default=0)
    return int(_MARGIN * (peak + samples * found.other_bytes + sums)) + scratch + _scratch(found.on_gpu)


def _choose(
    found: Profile, rates: Callable[[Layer], Rates], strategy: str, samples: int, parts: bool, budget: int | None
) -> tuple[list[str], bool]:
    """The fastest ways that fit, and True; or those that keep least, and False."""

    def allowed(layer: Layer) -> Sequence[str]:
        return ("store",) if layer.shared else WAYS if strategy == "auto" else (strategy,)

    def seconds(layer: Layer, way: str) -> float:
        return layer.shape.seconds(rates(layer), samples)[way]

    ways = [min(allowed(layer), key=lambda w, layer=layer: seconds(layer, w)) for layer in found.layers]  # type: ignore[misc]

    def fits() -> bool:
        return budget is None or _peak(found, ways, samples, parts) <= budget

    # Layer by layer, the change that saves most for its time.
    changes = []
    for i, layer in enumerate(found.layers):
        least = min(allowed(layer), key=lambda w, layer=layer: (layer.shape.bytes_kept(w), seconds(layer, w)))  # type: ignore[misc]
        saved = layer.shape.bytes_kept(ways[i]) - layer.shape.bytes_kept(least)
        if saved > 0:
            changes.append((max(0.0, seconds(layer, least) - seconds(layer, ways[i])) / saved, i, least))
    for _, i, least in sorted(changes):
        if fits():
            break
        ways[i] = least
    return ways, fits()


def make_plan(
    module: nn.Module, loss_fn: Callable[..., Tensor], args: Sequence[Any], *, multiplicity: int = 1, strategy: str = "auto",
    memory_budget: int | None = None, batch_size: int | None = None, store_dtype: torch.dtype = torch.float32,
) -> Plan:  # fmt: skip
    """A plan for micro-batches like ``args`` (one sample of it is enough to look at).

    Args:
        memory_budget: bytes by which resident memory may grow beyond parameters, optimizer state and the batch; None for no
            limit.
        batch_size: samples of the largest micro-batch wanted; default: those in ``args``.
        store_dtype: of stored weight gradients.

    Raises:
        MemoryBudgetError: the budget does not hold one sample; says what would.
    """
    found = profile(module, loss_fn, args, multiplicity, memory_budget, store_dtype)
    most = batch_size or batch_rows(args) // multiplicity
    device = device_of(module)

    def rates(layer: Layer) -> Rates:
        return machine_rates(device, torch.get_num_threads(), layer.shape.dtype)

    for samples in sorted({-(-most // n) for n in range(1, most + 1)}, reverse=True):  # equal parts, as few as may be
        parts = samples < most
        ways, fits = _choose(found, rates, strategy, samples, parts, memory_budget)
        peak = _peak(found, ways, samples, parts)
        if fits:
            break
    else:
        assert memory_budget is not None
        raise MemoryBudgetError(
            f"memory_budget is {memory_budget / 2**20:.1f} MiB, but one sample ({multiplicity} rows) needs about "
            f"{peak / 2**20:.1f} MiB: raise it to {peak} bytes or more, lower the multiplicity, or train fewer parameters",
            needed=peak,
        )
    layers = tuple(
        PlannedLayer(layer, way, layer.shape.bytes_kept(way), layer.shape.seconds(rates(layer), samples))
        for layer, way in zip(found.layers, ways, strict=True)
    )
    return Plan(layers, samples, multiplicity, peak, memory_budget)
