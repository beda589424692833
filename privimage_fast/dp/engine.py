"""Sums of clipped per-sample gradients from one backward pass.

Formal guarantee: with ``multiplicity`` K, each sample's gradient g_b — the gradient of the sum of its K per-row losses —
enters the returned sum as c_b·g_b with ‖c_b·g_b‖₂ ≤ max_grad_norm·(1 + 1e-6); a sample whose gradient is not finite
enters as zero. Adding or removing one sample therefore changes the sum by at most that in L2 norm, whatever the other
samples are, provided that the module treats rows independently (see :func:`check_per_sample`).

The method is ghost clipping in one pass (Li et al. 2022; Bu et al. 2023): autograd computes gradients of activations
only, and the engine everything about weights. What it adds: per-sample weight gradients are either *stored* (B·d·p, then
the clipped sum is one weighted read) or *deferred* (norm now, one ordinary weight gradient of c_b·g later).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from privimage_fast import ops
from privimage_fast.dp.rules import MatrixRule, UncoveredParameterError
from privimage_fast.dp.tracker import Tracker, Use, batch_tensors, trainable_parameters

STRATEGIES = ("auto", "store", "gram", "norm-only")

# Deferred layers measure the norm in one computation and contribute through another; both round. Measuring this much
# more than was found keeps the contribution under the bound (relative, on the squared norm).
_DEFERRED_SLACK = 8e-6

LossFunction = Callable[..., Tensor]


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
            raise UncoveredParameterError(
                f"{use.rule.describe()} was applied to shape {tuple(use.x.shape)}, whose first dimension is not a multiple of "
                f"the {self.rows} rows of the batch; rows must stay the first dimension"
            )
        if use.x.dtype == torch.bfloat16 or use.x.dtype == torch.float16:
            use = Use(use.rule, use.x.float(), use.g.float(), tuple(s.float() for s in use.saved))
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
        names = list(self.stored)
        ops.weighted_sum_([sums[n] for n in names], [self.stored[n] for n in names], factors)
        for entry in self.deferred:
            x, g = entry.use.x, entry.use.g
            per_row = factors.repeat_interleave(x.shape[0] // self.samples).view(-1, *([1] * (g.dim() - 1)))
            # Multiplying by zero would let an infinite sample through as NaN; such rows are replaced, input and all.
            kept = per_row != 0
            g = torch.where(kept, g, 0) * per_row
            x = torch.where(kept.view(-1, *([1] * (x.dim() - 1))), x, 0)
            sums[entry.name] += entry.use.rule.weighted_weight_grad(x, g)


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
    collector: _Collector | None = None

    def sink(use: Use) -> None:
        assert collector is not None
        collector(use)

    tracker = Tracker(parameters, args, sink)
    with torch.enable_grad(), tracker:
        losses = loss_fn(module, *args)
    rows = _check_losses(losses, args, multiplicity)
    if rows == 0:
        return torch.zeros(0, dtype=torch.float64, device=losses.device), losses.detach()
    collector = _Collector(rows, multiplicity, strategy, memory_budget, tracker)
    if not losses.requires_grad:
        raise UncoveredParameterError("the losses do not depend on any trainable parameter; was the forward pass detached?")
    leaks = torch.autograd.grad(losses.sum(), [tracker.anchor, *parameters.values()], allow_unused=True)[1:]
    for name, leak in zip(parameters, leaks, strict=True):
        if leak is not None:
            raise UncoveredParameterError(
                f"parameter {name!r} reached the loss by a way the engine cannot see (a custom autograd function?), so its "
                "gradient is not per sample; freeze it with requires_grad_(False) or use it through torch functions"
            )
    sq_norms = collector.total_sq_norms(losses.device)
    collector.add_to(sums, ops.clip_factors(sq_norms, max_grad_norm, sample_weight))
    return sq_norms.sqrt(), losses.detach()


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
        ``(grads, norms, losses)``: {name: fp32 tensor}, (B,) float64 norms before clipping, (B·K,) losses. Norms and
        losses are *not* private.

    Raises:
        UncoveredParameterError: a trainable parameter has no per-sample rule, named with the reason.
        ValueError: losses already reduced, rows not a multiple of K, options out of range.
    """
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trainable_parameters(module).items()}
    if any(p.dtype == torch.float64 for p in module.parameters()):
        sums = {name: s.double() for name, s in sums.items()}
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
    if not 0 < max_grad_norm < float("inf"):
        raise ValueError(f"max_grad_norm must be a positive number, found {max_grad_norm}")
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
