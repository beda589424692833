"""Sums of clipped per-sample gradients from one backward pass.

Formal guarantee: with ``multiplicity`` K, each sample's gradient g_b — the gradient of the sum of its K per-row losses —
enters the returned sum as c_b·g_b with ‖c_b·g_b‖₂ ≤ max_grad_norm·(1 + 1e-6); a sample whose gradient is not finite
enters as zero. Adding or removing one sample therefore changes the sum by at most that in L2 norm, whatever the other
samples are. That a module keeps samples apart is looked at on its first calls (``_probe_rows``); what gradients cannot show
(samples mixed by detached values) is for :func:`check_per_sample`.

The method is ghost clipping in one pass (Li et al. 2022; Bu et al. 2023): autograd computes gradients of activations
only, and the engine everything about weights. What it adds: per-sample weight gradients are either *stored* (B·d·p, then
the clipped sum is one weighted read) or *deferred* (norm now, one ordinary weight gradient of c_b·g later).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from privimage_fast import ops
from privimage_fast.dp.rules import MatrixRule, UncoveredParameterError
from privimage_fast.dp.tracker import Tracker, Use, batch_tensors, trainable_parameters

STRATEGIES = ("auto", "store", "gram", "norm-only")

# Deferred layers measure the norm in one computation and contribute through another; both round. Measuring this much
# more than was found keeps the contribution under the bound (relative, on the squared norm).
_DEFERRED_SLACK = 8e-6

# Below, clip factors are denormal floats and no longer precise.
_MIN_GRAD_NORM = 1e-30

LossFunction = Callable[..., Tensor]

# Module → shapes of calls whose rows were seen to be independent, and how often that was tried in vain.
_probed: WeakKeyDictionary[nn.Module, Counter[Any]] = WeakKeyDictionary()
_PROBE_ATTEMPTS = 5


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast and no TF32: a norm of 10-bit products is off by more than the bound allows."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        if matmul != "highest":
            torch.set_float32_matmul_precision("highest")
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if matmul != "highest":
            torch.set_float32_matmul_precision(matmul)
        if device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = cudnn


class ClippedGrad(NamedTuple):
    """grads: name → fp32 sum of clipped per-sample gradients; norms (B,) float64 before clipping; losses (B·K,)."""

    grads: dict[str, Tensor]
    norms: Tensor
    losses: Tensor


@dataclass
class _Deferred:
    """A matrix whose clipped sum is computed after the norms are known."""

    name: str
    use: Use


class _Collector:
    """Receives the uses of one backward pass and keeps each parameter's per-sample gradients or the means to sum them."""

    def __init__(self, rows: int, multiplicity: int, strategy: str, memory_budget: int | None, tracker: Tracker) -> None:
        self.rows, self.multiplicity, self.samples = rows, multiplicity, rows // multiplicity
        self.strategy, self.tracker = strategy, tracker
        self.budget = float("inf") if memory_budget is None else memory_budget
        self.stored: dict[str, Tensor] = {}
        self.sq_norms: dict[str, Tensor] = {}
        self.deferred: list[_Deferred] = []

    def __call__(self, use: Use) -> None:
        rows = use.x.shape[0]
        if use.x.dim() == 0 or rows % self.rows:
            raise UncoveredParameterError(_misplaced(use, self.rows))
        if use.x.dtype == torch.bfloat16 or use.x.dtype == torch.float16:
            use = Use(use.rule, use.x.float(), use.g.float(), tuple(s.float() for s in use.saved))
        with full_precision(use.g.device):
            self._collect(use, rows)

    def _collect(self, use: Use, rows: int) -> None:
        multiplicity = self.multiplicity * (rows // self.rows)
        if self._is_deferred(use):
            self._defer(use, multiplicity)
            return
        for term in use.rule.per_sample(use.x, use.g, use.saved, multiplicity, self.stored):
            # One entry a parameter: a parameter used twice has its gradients added before the norm is taken.
            self.stored[term.name], self.sq_norms[term.name] = term.stored, term.sq_norms
            self.budget -= term.stored.numel() * term.stored.element_size()

    def _is_deferred(self, use: Use) -> bool:
        name = use.rule.names.get("weight")
        if not isinstance(use.rule, MatrixRule) or name is None or self.tracker.calls[name] > 1:
            return False  # the norm of a sum over several calls needs their gradients, not their norms
        if self.strategy == "auto":
            return 4 * self.samples * use.rule.weight_numel() > self.budget
        return self.strategy != "store"

    def _defer(self, use: Use, multiplicity: int) -> None:
        assert isinstance(use.rule, MatrixRule)
        how = "gram" if self.strategy == "gram" else "norm-only"
        name = use.rule.names["weight"]
        self.sq_norms[name] = use.rule.weight_norms(use.x, use.g, multiplicity, how) * (1 + _DEFERRED_SLACK)
        self.deferred.append(_Deferred(name, use))
        for term in use.rule.bias_terms(use.g, multiplicity, self.stored):
            self.stored[term.name], self.sq_norms[term.name] = term.stored, term.sq_norms

    def total_sq_norms(self, device: torch.device) -> Tensor:
        total = torch.zeros(self.samples, dtype=torch.float64, device=device)
        for sq in self.sq_norms.values():
            total += sq.double()
        return total

    def add_to(self, sums: dict[str, Tensor], factors: Tensor) -> None:
        """sums[name] += Σ_b factors_b · gradient_b, for every parameter that took part."""
        deferred = []  # computed first: where one fails, nothing has been added
        for entry in self.deferred:
            x, g = entry.use.x, entry.use.g
            per_row = factors.repeat_interleave(x.shape[0] // self.samples).view(-1, *([1] * (g.dim() - 1)))
            # Multiplying by zero would let an infinite sample through as NaN; such rows are replaced, input and all.
            kept = per_row != 0
            g = torch.where(kept, g, 0) * per_row
            x = torch.where(kept.view(-1, *([1] * (x.dim() - 1))), x, 0)
            assert isinstance(entry.use.rule, MatrixRule)
            deferred.append(entry.use.rule.weighted_weight_grad(x, g))
        names = list(self.stored)
        ops.weighted_sum_([sums[n] for n in names], [self.stored[n] for n in names], factors)
        for entry, grad in zip(self.deferred, deferred, strict=True):
            sums[entry.name] += grad


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
) -> tuple[Tensor, Tensor]:
    """Adds one micro-batch's clipped gradients to ``sums`` (name → fp32, the parameter's shape) in place.

    ``sample_weight`` (B,) is 1 for samples and 0 for padding. Returns (norms, losses); see :func:`clipped_grad`.
    Nothing is added when an error is raised.
    """
    _check_options(max_grad_norm, multiplicity, strategy, memory_budget)
    parameters = trainable_parameters(module)
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no trainable parameter: every requires_grad is False")
    receivers: list[Callable[[Use], None]] = []

    def sink(use: Use) -> None:
        if not receivers:
            raise UncoveredParameterError(
                f"a gradient was taken through {use.rule.describe()} inside loss_fn (a gradient penalty?); the engine forms "
                "per-sample gradients of first-order losses only"
            )
        receivers[-1](use)

    tracker = Tracker(parameters, args, sink)
    versions = {name: buffer._version for name, buffer in module.named_buffers()}
    with torch.enable_grad(), tracker:
        losses = loss_fn(module, *args)
    for name, buffer in module.named_buffers():
        if versions.get(name) != buffer._version:
            raise UncoveredParameterError(
                f"the forward pass changes the buffer {name!r}: statistics of the batch would be kept without noise; turn "
                "running statistics off (track_running_stats=False), or put the layer in eval() mode"
            )
    rows = _check_losses(losses, args, multiplicity)
    if rows == 0:
        return torch.zeros(0, dtype=torch.float64, device=losses.device), losses.detach()
    if not losses.requires_grad:
        raise UncoveredParameterError("the losses do not depend on any trainable parameter; was the forward pass detached?")
    collector = _Collector(rows, multiplicity, strategy, memory_budget, tracker)
    try:
        with torch.autocast(losses.device.type, enabled=False):
            _probe_rows(module, losses, args, multiplicity, tracker, receivers)
            receivers.append(collector)
            leaks = torch.autograd.grad(losses.sum(), [tracker.anchor, *parameters.values()], allow_unused=True)[1:]
    finally:
        # The graph's nodes hold the sink: without this, stored gradients would wait in a cycle for the garbage collector.
        receivers.clear()
    for name, leak in zip(parameters, leaks, strict=True):
        if leak is not None:
            raise UncoveredParameterError(
                f"parameter {name!r} reached the loss by a way the engine cannot see (a custom autograd function?), so its "
                "gradient is not per sample; freeze it with requires_grad_(False) or use it through torch functions"
            )
    for name, function in tracker.without_grad.items():
        if not tracker.calls[name]:
            raise UncoveredParameterError(
                f"parameter {name!r} is used by {function} only where gradients are off (no_grad, or checkpointing with "
                "use_reentrant=True): it would not train; freeze it, or use checkpointing with use_reentrant=False"
            )
    with full_precision(losses.device):
        sq_norms = collector.total_sq_norms(losses.device)
        if sample_weight is not None:
            sample_weight = _checked_weight(sample_weight, collector.samples)
        collector.add_to(sums, ops.clip_factors(sq_norms, max_grad_norm, sample_weight))
    return sq_norms.sqrt(), losses.detach()


def _probe_rows(
    module: nn.Module, losses: Tensor, args: Sequence[Any], multiplicity: int, tracker: Tracker,
    receivers: list[Callable[[Use], None]],
) -> None:  # fmt: skip
    """Sees to it, once for each module and shape, that a sample's rows are where the engine takes them to be.

    The losses of half of the samples are differentiated alone: the output gradients of every call must then be zero on all
    rows of the other samples. Real and fake images concatenated behind each other, a sequence-first layer, positions
    broadcast over the batch and means over it all fail here, whatever their shapes.

    Raises:
        UncoveredParameterError: naming the parameters of the call.
    """
    rows = losses.shape[0]
    samples = rows // multiplicity
    key = (multiplicity, module.training, tuple(tuple(t.shape) for t in batch_tensors(list(args))))
    seen = _probed.setdefault(module, Counter())
    if samples < 2 or seen[key] >= _PROBE_ATTEMPTS:
        return
    chosen = torch.zeros(samples, dtype=torch.bool, device=losses.device)
    chosen[random.SystemRandom().sample(range(samples), samples // 2)] = True  # leaves the user's generators alone
    silent = False

    def receive(use: Use) -> None:
        nonlocal silent
        if use.g.shape[0] % rows:
            raise UncoveredParameterError(_misplaced(use, rows))
        per_sample = use.g.detach().reshape(samples, -1)
        # 0·inf of a sample that is not finite is no evidence.
        found = (per_sample != 0) & per_sample.isfinite()
        if found[~chosen].any():
            raise UncoveredParameterError(
                f"{use.rule.describe()}, applied to shape {tuple(use.x.shape)}, carries one sample's loss in the rows of "
                f"another: the {rows} rows of the batch are not its first dimension, sample after sample, or samples are mixed. "
                "Keep the rows of one sample adjacent (interleave real and fake rather than concatenate them), and rows first"
            )
        silent |= not bool(found.any())

    receivers.append(receive)
    part = losses[chosen.repeat_interleave(multiplicity)].sum()
    torch.autograd.grad(part, [tracker.anchor], allow_unused=True, retain_graph=True)
    receivers.pop()
    # A layer behind a zero-initialised one shows nothing yet: it is looked at again, a few times.
    seen[key] += 1 if silent else _PROBE_ATTEMPTS


def _misplaced(use: Use, rows: int) -> str:
    return (
        f"{use.rule.describe()} was applied to shape {tuple(use.x.shape)}, whose first dimension is not a multiple of "
        f"the {rows} rows of the batch; rows must stay the first dimension"
    )


def _checked_weight(sample_weight: Tensor, samples: int) -> Tensor:
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
) -> ClippedGrad:
    """Sum over samples of clipped per-sample gradients, without noise.

    Args:
        module: any module built of conv1d/conv2d, linear, group_norm, layer_norm and embedding calls (attention is built
            of them); every trainable parameter must be covered.
        loss_fn: ``loss_fn(module, *args)`` → losses (B·K,), one a row, not reduced.
        args: what the loss needs; every tensor of the batch must come in here, rows first.
        max_grad_norm: the L2 bound C on one sample's contribution.
        multiplicity: K adjacent rows belong to one sample and are clipped once, together.
        strategy: "store" | "gram" | "norm-only" for all matrices, or "auto".
        memory_budget: bytes that stored per-sample gradients may take under "auto"; None for no limit.
        sample_weight: (B,), 1 or 0: padding samples contribute nothing.

    Returns:
        ``(grads, norms, losses)``: {name: fp32 tensor (fp64 for a double parameter)}, (B,) float64 norms before
        clipping, (B·K,) losses. Norms and
        losses are *not* private.

    Raises:
        UncoveredParameterError: a trainable parameter has no per-sample rule, named with the reason.
        ValueError: losses already reduced, rows not a multiple of K, options out of range.
    """
    sums = {
        name: torch.zeros_like(p, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
        for name, p in trainable_parameters(module).items()
    }
    norms, losses = accumulate_clipped(
        module, loss_fn, args, sums, max_grad_norm=max_grad_norm, multiplicity=multiplicity, strategy=strategy,
        memory_budget=memory_budget, sample_weight=sample_weight,
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
    if memory_budget is not None and memory_budget < 0:
        raise ValueError(f"memory_budget must be a number of bytes ≥ 0 or None, found {memory_budget}")


def _check_losses(losses: Any, args: Sequence[Any], multiplicity: int) -> int:
    if not isinstance(losses, Tensor) or losses.dim() != 1:
        found = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            f"loss_fn must return one loss a row, shape (B·K,), found {found}; leave the reduction out "
            "(reduction='none', then the mean over everything but the first dimension)"
        )
    rows = losses.shape[0]
    if rows % multiplicity:
        raise ValueError(f"{rows} rows cannot be grouped into samples of multiplicity {multiplicity}: expected a multiple")
    first = next((t for t in batch_tensors(list(args)) if t.dim()), None)
    if first is not None and first.shape[0] != rows:
        raise ValueError(f"loss_fn returned {rows} losses for {first.shape[0]} rows of input; expected one a row")
    return rows
