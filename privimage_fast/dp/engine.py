"""Sums of clipped per-sample gradients from one backward pass.

Formal guarantee: with ``multiplicity`` K, each sample's gradient g_b — the gradient of the sum of its K per-row losses —
enters the returned sum as c_b·g_b with ‖c_b·g_b‖₂ ≤ max_grad_norm·(1 + 1e-6); a sample whose gradient is not finite
enters as zero. Adding or removing one sample therefore changes the sum by at most that in L2 norm, whatever the other
samples are, if what the module and the loss draw at random (dropout, noise levels) is secret or does not depend on a row's
place in the batch. That a module keeps samples apart is looked at on its first calls (``probe_rows``); what gradients cannot show
(samples mixed by detached values) is for :func:`check_per_sample`.

The method is ghost clipping in one pass (Li et al. 2022; Bu et al. 2023): autograd computes gradients of activations
only, and the engine everything about weights. What it adds: per-sample weight gradients are either *stored* (B·d·p, then
the clipped sum is one weighted read) or *deferred* (norm now, one ordinary weight gradient of c_b·g later).
"""

from __future__ import annotations

import functools
import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from privimage_fast import ops
from privimage_fast.dp.collector import Choice, Collector, Pending, fixed, misplaced
from privimage_fast.dp.passes import backward, eagerly
from privimage_fast.dp.planner import Plan, batch_rows, cheapest, device_of, make_plan, take_samples
from privimage_fast.dp.precision import full_precision
from privimage_fast.dp.rules import UncoveredParameterError
from privimage_fast.dp.tracker import Tracker, batch_tensors, trainable_parameters
from privimage_fast.dp.uses import Sink, Use

logger = logging.getLogger(__name__)

STRATEGIES = ("auto", "store", "gram", "norm-only")

# Below, clip factors and what they multiply are denormal floats, whose rounding would pass the bound.
_MIN_GRAD_NORM = 1e-15

LossFunction = Callable[..., Tensor]

# Module → shapes of calls whose rows were seen to be independent, and how often that was tried in vain.
_probed: WeakKeyDictionary[nn.Module, Counter[Any]] = WeakKeyDictionary()
_PROBE_ATTEMPTS = 5
_plans: WeakKeyDictionary[nn.Module, dict[Any, Plan]] = WeakKeyDictionary()


class ClippedGrad(NamedTuple):
    """grads: name → fp32 sum of clipped per-sample gradients; norms (B,) float64 before clipping; losses (B·K,)."""

    grads: dict[str, Tensor]
    norms: Tensor
    losses: Tensor


def accumulate_clipped(
    module: nn.Module,
    loss_fn: LossFunction,
    args: Sequence[Any],
    sums: dict[str, Tensor],
    *,
    max_grad_norm: float,
    multiplicity: int = 1,
    strategy: str = "auto",
    memory_budget: int | None = None,
    sample_weight: Tensor | None = None,
    store_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Adds one batch's clipped gradients to ``sums`` (name → fp32, the parameter's shape) in place.

    ``sample_weight`` (B,) is 1 for samples and 0 for padding. Returns (norms, losses); see :func:`clipped_grad`.
    Nothing is added when an error is raised.
    """
    norms, losses, _ = _accumulate_in_parts(
        module, loss_fn, args, sums, max_grad_norm=max_grad_norm, multiplicity=multiplicity, strategy=strategy,
        memory_budget=memory_budget, sample_weight=sample_weight, store_dtype=store_dtype, keep=False,
    )  # fmt: skip
    return norms, losses


def accumulate_pending(
    module: nn.Module, loss_fn: LossFunction, args: Sequence[Any], sums: dict[str, Tensor], **options: Any
) -> tuple[Tensor, Tensor, Pending | None]:
    """:func:`accumulate_clipped`, whose ``options`` it takes, but for what was stored last: its sum is not formed yet.

    Returns (norms, losses, pending). ``pending`` holds the stored gradients until the caller has added it to ``sums``, or dropped
    it; None where there is nothing more to add.
    """
    return _accumulate_in_parts(module, loss_fn, args, sums, keep=True, **options)


def _accumulate_in_parts(
    module: nn.Module, loss_fn: LossFunction, args: Sequence[Any], sums: dict[str, Tensor], *, max_grad_norm: float,
    multiplicity: int = 1, strategy: str = "auto", memory_budget: int | None = None, sample_weight: Tensor | None = None,
    store_dtype: torch.dtype = torch.float32, keep: bool,
) -> tuple[Tensor, Tensor, Pending | None]:  # fmt: skip
    _check_options(max_grad_norm, multiplicity, strategy, memory_budget)
    check_store_dtype(store_dtype)
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "clipped gradients were asked for under torch.inference_mode(), where nothing has a gradient; leave it"
        )
    rows = batch_rows(args)
    options: dict[str, Any] = {"max_grad_norm": max_grad_norm, "multiplicity": multiplicity, "store_dtype": store_dtype}
    if memory_budget is None or rows < multiplicity:
        choose = cheapest(device_of(module), store_dtype) if strategy == "auto" else fixed(strategy)
        return _accumulate(module, loss_fn, args, sums, choose=choose, sample_weight=sample_weight, keep=keep, **options)
    _check_rows(rows, multiplicity)
    samples = rows // multiplicity
    plan = plan_for(
        module, loss_fn, args, multiplicity=multiplicity, strategy=strategy, memory_budget=memory_budget, store_dtype=store_dtype
    )
    if sample_weight is not None:
        sample_weight = checked_weight(sample_weight, samples)
    if plan.physical_batch_size >= samples:
        return _accumulate(module, loss_fn, args, sums, choose=plan.choice(), sample_weight=sample_weight, keep=keep, **options)
    before = {name: s.clone() for name, s in sums.items()}  # a later part may be refused
    norms, losses = [], []
    try:
        for start in range(0, samples, plan.physical_batch_size):
            index = range(start, min(samples, start + plan.physical_batch_size))
            part = take_samples(args, rows, multiplicity, index)
            weight = None if sample_weight is None else sample_weight[index.start : index.stop]
            part_norms, part_losses, pending = _accumulate(
                module, loss_fn, part, sums, choose=plan.choice(), sample_weight=weight, keep=keep and index.stop == samples,
                **options,
            )  # fmt: skip
            norms.append(part_norms)
            losses.append(part_losses)
    except BaseException:
        for name, s in sums.items():
            s.copy_(before[name])
        raise
    return torch.cat(norms), torch.cat(losses), pending


def plan_for(
    module: nn.Module, loss_fn: LossFunction, args: Sequence[Any], *, multiplicity: int, strategy: str = "auto",
    memory_budget: int | None = None, store_dtype: torch.dtype = torch.float32,
) -> Plan:  # fmt: skip
    """:func:`planner.make_plan`, made once for each module, budget and shape of a batch."""
    shapes = tuple(tuple(t.shape) for t in batch_tensors(list(args)))
    kind = device_of(module).type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key = (multiplicity, strategy, memory_budget, store_dtype, module.training, shapes, torch.get_num_threads(), kind, autocast)
    plans = _plans.setdefault(module, {})
    if key not in plans:
        plans[key] = make_plan(
            module, loss_fn, args, multiplicity=multiplicity, strategy=strategy, memory_budget=memory_budget,
            store_dtype=store_dtype,
        )  # fmt: skip
    return plans[key]


def _accumulate(
    module: nn.Module, loss_fn: LossFunction, args: Sequence[Any], sums: dict[str, Tensor], *, choose: Choice,
    max_grad_norm: float, multiplicity: int, sample_weight: Tensor | None, store_dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor, Pending | None]:  # fmt: skip
    parameters = trainable_parameters(module)
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no trainable parameter: every requires_grad is False")
    first = next((t for t in batch_tensors(list(args)) if t.dim()), None)
    if first is not None and first.shape[0] == 0:  # an empty draw; many modules do not run on no rows
        device = next(iter(parameters.values())).device
        return torch.zeros(0, dtype=torch.float64, device=device), torch.zeros(0, device=device), None
    sink = Sink()
    tracker = Tracker(module, args, sink)
    with torch.enable_grad(), eagerly(module), tracker:
        losses = loss_fn(module, *args)
    tracker.check_buffers()
    tracker.check_unchanged()
    rows = _check_losses(losses, args, multiplicity)
    if rows == 0:
        return torch.zeros(0, dtype=torch.float64, device=losses.device), losses.detach(), None
    if not losses.requires_grad:
        raise UncoveredParameterError("the losses do not depend on any trainable parameter; was the forward pass detached?")
    collector = Collector(rows, multiplicity, sink.calls, choose, store_dtype)
    try:
        with torch.enable_grad(), torch.autocast(losses.device.type, enabled=False), eagerly(module):
            shapes = tuple(tuple(t.shape) for t in batch_tensors(list(args)))
            probe_rows(
                module, lambda keep: losses[keep.to(losses.device)].sum(), args, rows, multiplicity, tracker, sink,
                key=(_code_of(loss_fn), shapes),
            )  # fmt: skip
            sink.receiver = collector
            leaks = backward(tracker, losses.sum(), [tracker.anchor, *parameters.values()])[1:]
            tracker.check_gradients(dict(zip(parameters, leaks, strict=True)))
            collector.pull_back(tracker.derived, parameters)
    finally:
        # The graph's nodes hold the sink: without this, stored gradients would wait in a cycle for the garbage collector.
        sink.receiver = None
    with full_precision(losses.device):
        sq_norms = collector.total_sq_norms(losses.device)
        if sample_weight is not None:
            sample_weight = checked_weight(sample_weight, collector.samples)
        factors = ops.clip_factors(sq_norms, max_grad_norm, sample_weight)
        pending = collector.add_deferred_to(sums, factors) if keep else collector.add_to(sums, factors)
    return sq_norms.sqrt(), losses.detach(), pending


def _code_of(loss_fn: Any) -> Any:
    """What tells two losses apart, but not a function from its like made anew in every step."""
    while isinstance(loss_fn, functools.partial):
        loss_fn = loss_fn.func
    loss_fn = getattr(loss_fn, "__func__", loss_fn)
    return getattr(loss_fn, "__code__", type(loss_fn))


def probe_rows(
    module: nn.Module, part_of: Callable[[Tensor], Tensor], args: Any, rows: int, multiplicity: int, tracker: Tracker, sink: Sink,
    key: Any = None,
) -> None:  # fmt: skip
    """Sees to it, once for each module, loss and shape, that a sample's rows are where the engine takes them to be.

    ``part_of(keep)`` is a scalar that depends on the rows in ``keep`` only, if rows are independent; ``keep`` (rows,) is True on
    half of the samples, then on the other half. Differentiated alone, it must leave the output gradients of every call zero on
    all rows of the other samples. Real and fake images concatenated behind each other, a sequence-first layer, positions
    broadcast over the batch and means over it all fail here, whatever their shapes. ``key`` is what counts as one shape; the
    shapes of ``args`` unless given. Where the tracker took a tensor for the batch's because it has as many rows, each number of
    rows is a shape of its own: at another it may not be. Where values of the batch decided something that a graph does not show
    (rows that were chosen and put back, Python that branches), every call is looked at.

    Raises:
        UncoveredParameterError: naming the parameters of the call.
    """
    samples = rows // multiplicity
    key = (multiplicity, module.training, key or tuple(tuple(t.shape) for t in batch_tensors(args)), tracker.by_number and rows)
    seen = _probed.setdefault(module, Counter())
    if samples < 2 or (seen[key] >= _PROBE_ATTEMPTS and not tracker.by_values):
        return
    chosen = torch.zeros(samples, dtype=torch.bool)
    chosen[random.SystemRandom().sample(range(samples), samples // 2)] = True  # leaves the user's generators alone
    silent = False

    def receive(use: Use) -> None:
        nonlocal silent
        if use.incoming.shape[0] % rows:
            raise UncoveredParameterError(misplaced(use, rows))
        per_sample = use.incoming.detach().reshape(samples, -1)
        # 0·inf of a sample that is not finite is no evidence.
        found = ((per_sample != 0) & per_sample.isfinite()).any(1).cpu()
        if found[~chosen].any():
            raise UncoveredParameterError(
                f"{use.rule.describe()}, applied to shape {tuple(use.x.shape)}, carries one sample's loss in the rows of "
                f"another: the {rows} rows of the batch are not its first dimension, sample after sample, or samples are mixed. "
                "Keep the rows of one sample adjacent (interleave real and fake rather than concatenate them), and rows first"
            )
        silent |= not bool(found.any())

    sink.receiver = receive
    try:
        for _ in range(2):  # one half and the other: a sample that depends on earlier ones only may show in one alone
            backward(tracker, part_of(chosen.repeat_interleave(multiplicity)), [tracker.anchor], retain_graph=True)
            chosen = ~chosen
    finally:
        sink.receiver = None
    # A layer behind a zero-initialised one shows nothing yet: it is looked at again, a few times.
    again = seen[key] >= _PROBE_ATTEMPTS
    seen[key] += 1 if silent else _PROBE_ATTEMPTS
    if silent and seen[key] >= _PROBE_ATTEMPTS and not again:
        logger.warning(
            "%s: some layers have shown no gradient in %d calls, so that they keep samples apart was not seen; check_per_sample "
            "on stand-in data, with weights that are not zero, can tell", type(module).__name__, _PROBE_ATTEMPTS,
        )  # fmt: skip


def checked_weight(sample_weight: Tensor, samples: int) -> Tensor:
    """``sample_weight``, (samples,) of 0 and 1; ValueError for anything else."""
    if sample_weight.shape != (samples,):
        raise ValueError(f"sample_weight must have shape ({samples},), found {tuple(sample_weight.shape)}")
    if sample_weight.device.type == "cpu" and not ((sample_weight == 0) | (sample_weight == 1)).all():
        raise ValueError("sample_weight may hold 0 and 1 only: another weight would scale the clip bound")
    # On a GPU looking at the values would wait for it; the clamp keeps the bound whatever they are.
    return sample_weight.nan_to_num(0.0).clamp(0, 1)


def clipped_grad(
    module: nn.Module,
    loss_fn: LossFunction,
    args: Sequence[Any],
    *,
    max_grad_norm: float,
    multiplicity: int = 1,
    strategy: str = "auto",
    memory_budget: int | None = None,
    sample_weight: Tensor | None = None,
    store_dtype: torch.dtype = torch.float32,
) -> ClippedGrad:
    """Sum over samples of clipped per-sample gradients, without noise.

    Args:
        module: any module whose rows are independent. Linear, convolution, normalisation, embedding and attention layers,
            broadcast parameters and derived weights have fast rules; other functions a slower general one.
        loss_fn: ``loss_fn(module, *args)`` → losses (B·K,), one a row, not reduced.
        args: what the loss needs; every tensor of the batch must come in here, rows first.
        max_grad_norm: the L2 bound C on one sample's contribution.
        multiplicity: K adjacent rows belong to one sample and are clipped once, together.
        strategy: "store" | "gram" | "norm-only" for all matrices, or "auto": the cheapest for each (see ``planner``).
        memory_budget: bytes by which the call may let resident memory grow: layers take leaner ways, and the batch is done in
            parts where it must be; None for no limit.
        sample_weight: (B,), 1 or 0: padding samples contribute nothing.
        store_dtype: torch.bfloat16 halves what stored weight gradients take. They are rounded before their norms are taken, so
            the bound holds as for float32; what is summed is the rounded gradients, each element off by up to 2⁻⁹ of itself.

    Returns:
        ``(grads, norms, losses)``: {name: fp32 tensor (fp64 for a double parameter)}, (B,) float64 norms before
        clipping, (B·K,) losses. Norms and
        losses are *not* private.

    Raises:
        UncoveredParameterError: a trainable parameter has no per-sample rule, named with the reason.
        MemoryBudgetError: the budget does not hold one sample; says what would.
        ValueError: losses already reduced, rows not a multiple of K, options out of range.
    """
    sums = {
        name: torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
        for name, p in trainable_parameters(module).items()
    }
    norms, losses = accumulate_clipped(
        module, loss_fn, args, sums, max_grad_norm=max_grad_norm, multiplicity=multiplicity, strategy=strategy,
        memory_budget=memory_budget, sample_weight=sample_weight, store_dtype=store_dtype,
    )  # fmt: skip
    return ClippedGrad(sums, norms, losses)


def check_per_sample(
    module: nn.Module, loss_fn: LossFunction, args: Sequence[Any], *, multiplicity: int = 1, tolerance: float = 1e-3
) -> None:
    """Checks that a sample's gradient is the same alone as in the batch; the clip bound rests on it.

    Catches what no rule can see: a model that mixes samples, or moves the rows out of the first dimension. ``args`` should
    be stand-in data (B ≥ 2 samples), and ``loss_fn`` deterministic.

    Raises:
        UncoveredParameterError: naming the sample and by how much its gradient norm differs.
    """
    together = clipped_grad(module, loss_fn, args, max_grad_norm=1.0, multiplicity=multiplicity)
    rows = together.losses.shape[0]
    for b in range(rows // multiplicity):
        part = slice(b * multiplicity, (b + 1) * multiplicity)
        alone_args = [a[part] if isinstance(a, Tensor) and a.dim() and a.shape[0] == rows else a for a in args]
        alone = clipped_grad(module, loss_fn, alone_args, max_grad_norm=1.0, multiplicity=multiplicity)
        expected, found = float(alone.norms[0]), float(together.norms[b])
        if abs(found - expected) > tolerance * max(expected, 1e-6):
            raise UncoveredParameterError(
                f"sample {b}'s gradient norm is {expected:.6g} alone but {found:.6g} in a batch of {rows // multiplicity}: the "
                "model mixes samples or moves the rows out of the first dimension, so clipping cannot bound one sample"
            )


def _check_options(max_grad_norm: float, multiplicity: int, strategy: str, memory_budget: int | None) -> None:
    if not _MIN_GRAD_NORM <= max_grad_norm < float("inf"):
        raise ValueError(f"max_grad_norm must be a positive number of at least {_MIN_GRAD_NORM:g}, found {max_grad_norm}")
    if not (isinstance(multiplicity, int) and multiplicity >= 1):
        raise ValueError(f"multiplicity must be a whole number ≥ 1, found {multiplicity!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, found {strategy!r}")
    if memory_budget is not None and not (isinstance(memory_budget, int) and memory_budget > 0):
        raise ValueError(f"memory_budget must be a number of bytes > 0 or None, found {memory_budget!r}")


def check_store_dtype(store_dtype: torch.dtype) -> None:
    if store_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"store_dtype must be torch.float32 or torch.bfloat16, found {store_dtype!r}")


def _check_rows(rows: int, multiplicity: int) -> None:
    if rows % multiplicity:
        raise ValueError(f"{rows} rows cannot be grouped into samples of multiplicity {multiplicity}: expected a multiple")


def _check_losses(losses: Any, args: Sequence[Any], multiplicity: int) -> int:
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss_fn must return one loss a row, shape (B·K,), found {found}; leave the reduction out "
            "(reduction='none', then the mean over everything but the first dimension)"
        )
    rows = losses.shape[0]
    _check_rows(rows, multiplicity)
    first = next((t for t in batch_tensors(list(args)) if t.dim()), None)
    if first is not None and first.shape[0] != rows:
        raise ValueError(f"loss_fn returned {rows} losses for {first.shape[0]} rows of input; expected one a row")
    return rows
