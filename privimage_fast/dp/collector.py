"""Per-sample gradients of one micro-batch: received call by call during the backward pass, summed once clip factors are known.

A weight's per-sample gradients are *stored* (B·d·p floats, then the clipped sum is one weighted read), or *deferred*: their
norms are taken now ("gram", "norm-only") and x, g kept for one ordinary weight gradient of c_b·g later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from privimage_fast import ops
from privimage_fast.dp.grouping import LinearQueue, at_end_of_pass
from privimage_fast.dp.precision import full_precision
from privimage_fast.dp.rules import LinearRule, MatrixRule, Term, UncoveredParameterError, squared_norms
from privimage_fast.dp.uses import Use

# A deferred layer measures the norm in one computation and contributes through another; both round, and where the positions of a
# sample cancel (W_b = Σ_t g_t a_tᵀ before a normalisation, say) that is much against ‖W_b‖. So, of W_b as it is contributed:
# - with many positions it is computed once more, sample by sample, and shortened where it is longer than was measured;
# - with few, one product over the whole batch is faster, and the measured norm is raised by what that can be off: relative to
#   ‖W_b‖, and for each position relative to ‖a‖·‖g‖.
FEW_POSITIONS = 64
DEFERRED_SLACK, SUM_ROUNDING = 4e-6, 2.0**-26
# Below, squares are denormal floats and a norm is less than its elements.
_LEAST_NORM = 1e-15

# What decides how a call's weight gradient is had: (rule, x, g, multiplicity) → "store" | "gram" | "norm-only".
Choice = Callable[[MatrixRule, Tensor, Tensor, int], str]


@dataclass
class _Deferred:
    """A matrix whose clipped sum is computed after the norms are known."""

    use: Use
    multiplicity: int
    alone: bool  # sample by sample

    def __post_init__(self) -> None:
        self._versions = self._now()

    def _now(self) -> tuple[int, int]:
        return self.use.x._version, self.use.g._version

    def check_unchanged(self) -> None:
        """What was measured is what is summed.

        Raises:
            RuntimeError: x or g was written over since: a gradient of other values may be longer than its clip factor knows.
        """
        if self._now() != self._versions:
            raise RuntimeError(
                f"the input of {self.use.rule.describe()} was changed in place between backward pass and step, which sums "
                "gradients of it: write the next batch into a tensor of its own, or give strategy='store'"
            )

    def sum_alone(self, factors: Tensor, sq_norms: Tensor) -> Tensor:
        """Σ_b factors_b · W_b; no W_b is longer than ``sq_norms`` says."""
        use, k = self.use, self.multiplicity
        assert use.rule.weight is not None
        out = torch.zeros_like(use.rule.weight, dtype=torch.float64 if use.g.dtype == torch.float64 else torch.float32)
        # A few at a time are faster than one; but no more bytes than the copy of x or g that the other way would make.
        kept = min(use.x.numel(), use.g.numel()) // out.numel()
        step = torch.get_num_threads() * max(1, min(4, kept // torch.get_num_threads()))
        for b in range(0, len(factors), step):
            rows = slice(b * k, (b + step) * k)
            (term,) = use.rule.per_sample(use.x[rows], use.g[rows], (), k, {})
            shorter = (sq_norms[b : b + step] / term.sq_norms).sqrt().clamp(max=1).nan_to_num(1.0)  # 0/0 is no reason
            whole = term.sq_norms.isfinite() & (factors[b : b + step] != 0)
            ops.weighted_sum_(out, term.stored, torch.where(whole, factors[b : b + step] * shorter, 0).float())
        return out


@dataclass
class Pending:
    """What a micro-batch stored, and the clip factors: a clipped sum that is still to be formed."""

    stored: dict[str, Tensor]
    factors: Tensor

    def add_to(self, sums: Mapping[str, Tensor]) -> None:
        ops.weighted_sum_([sums[name] for name in self.stored], list(self.stored.values()), self.factors)


class Collector:
    """Receives the uses of the backward passes of one micro-batch.

    Args:
        rows: rows of the batch; sample b owns rows b·K … b·K+K−1.
        multiplicity: K.
        calls: how often each parameter was called, complete before the first use arrives (or as far as known: a parameter
            called again after it was deferred is stored after all).
        choose: decides between storing and deferring.
        store_dtype: float32, or bfloat16: weights' gradients are rounded as they are stored, their norms taken after that. Double
            ones stay double.
    """

    def __init__(
        self, rows: int, multiplicity: int, calls: Counter[str], choose: Choice, store_dtype: torch.dtype = torch.float32
    ) -> None:
        self.rows, self.multiplicity, self.samples = rows, multiplicity, rows // multiplicity
        self._calls, self._choose, self._store_dtype = calls, choose, store_dtype
        self._queue = LinearQueue(store_dtype)
        self._stored: dict[str, Tensor] = {}
        self._sq_norms: dict[str, Tensor] = {}
        self._deferred: dict[str, _Deferred] = {}

    @property
    def stored(self) -> dict[str, Tensor]:
        """Parameter → (B, *parameter) per-sample gradients, of all that is not deferred."""
        self._run_waiting()
        return self._stored

    @property
    def sq_norms(self) -> dict[str, Tensor]:
        """Parameter → (B,) float64."""
        self._run_waiting()
        return self._sq_norms

    def _keep(self, terms: Iterable[Term]) -> None:
        for term in terms:
            # One entry a parameter: a parameter used twice has its gradients added before the norm is taken.
            self._stored[term.name], self._sq_norms[term.name] = term.stored, term.sq_norms

    def _run_waiting(self) -> None:
        self._keep(self._queue.run())

    def __call__(self, use: Use) -> None:
        rows = use.x.shape[0]
        if use.x.dim() == 0 or rows % self.rows:
            raise UncoveredParameterError(misplaced(use, self.rows))
        with full_precision(use.g.device):
            self._collect(use, self.multiplicity * (rows // self.rows))

    def _collect(self, use: Use, multiplicity: int) -> None:
        name = use.rule.names.get("weight")
        if any(n in self._queue for n in use.rule.names.values()):
            self._run_waiting()  # what follows adds to it
        if isinstance(use.rule, MatrixRule) and name is not None:
            if name in self._deferred:  # called once more: the norm of a sum needs the gradients
                first = self._deferred.pop(name)
                self._store(first.use, first.multiplicity)
            elif name not in self._stored and self._calls[name] <= 1:
                how = self._choose(use.rule, use.x, use.g, multiplicity)
                if how != "store":
                    self._defer(use, multiplicity, how)
                    return
        self._store(use, multiplicity)

    def _store(self, use: Use, multiplicity: int) -> None:
        if use.x.dtype == torch.float16 or use.g.dtype == torch.float16:
            use = _in_float(use)
        name = use.rule.names.get("weight")
        if name is not None and name not in self._stored and isinstance(use.rule, MatrixRule):
            done = self._queue.add(use, multiplicity)
            if done is not None:
                self._keep(use.rule.bias_terms(use.g, multiplicity, self._stored))
                if name in self._queue:
                    # Its place among the norms: their sum has the same bits, whether or not it waits.
                    self._stored[name] = self._sq_norms[name] = use.g.new_empty(0)
                    if len(self._queue) == 1:
                        at_end_of_pass(self._run_waiting)
                self._keep(done)
                return
        rounded = isinstance(use.rule, MatrixRule) and torch.float64 not in (use.x.dtype, use.g.dtype)
        options = {"store_dtype": self._store_dtype} if rounded else {}
        self._keep(use.rule.per_sample(use.x, use.g, use.saved, multiplicity, self._stored, **options))

    def _defer(self, use: Use, multiplicity: int, how: str) -> None:
        assert isinstance(use.rule, MatrixRule)
        if use.g.device.type == "cpu" or torch.float16 in (use.x.dtype, use.g.dtype):
            use = _in_float(use)  # on a GPU bfloat16 stays: half the memory, and its norm is one matrix product
        name = use.rule.names["weight"]
        self._sq_norms[name] = use.rule.weight_norms(use.x, use.g, multiplicity, how)
        positions = multiplicity * use.rule.positions(use.x, use.g)
        alone = positions > FEW_POSITIONS and use.g.device.type == "cpu"
        if not alone:
            # Infinite where x or g are beyond 1e19: factors times g would be denormal, and such a sample contributes zero.
            scale = use.rule.offsets() ** 0.5 * _norms(use.x, self.samples) * _norms(use.g, self.samples)
            rounding = SUM_ROUNDING * min(positions, FEW_POSITIONS) * scale
            self._sq_norms[name] = (self._sq_norms[name].sqrt() * (1 + DEFERRED_SLACK) + rounding).square()
        self._keep(use.rule.bias_terms(use.g, multiplicity, self._stored))
        self._deferred[name] = _Deferred(Use(use.rule.without_bias(), use.x, use.g, ()), multiplicity, alone)

    def pull_back(self, derived: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        """Turns per-sample gradients of derived tensors into those of the parameters they are computed from."""
        found = [key for key in derived if key in self.stored]
        if not found:
            return
        targets = dict(parameters)
        outputs, grads = [derived[key] for key in found], [self.stored[key] for key in found]
        with full_precision(grads[0].device), torch.enable_grad():
            pulled = _vector_jacobian_products(outputs, list(targets.values()), grads, self.samples)
        for key in found:
            del self.stored[key], self.sq_norms[key]
        for name, grad in zip(targets, pulled, strict=True):
            if grad is None:
                continue
            if name in self._deferred:  # by an earlier backward pass: the norm of the sum needs its gradients too
                first = self._deferred.pop(name)
                self._store(first.use, first.multiplicity)
            self.stored[name] = self.stored[name].add_(grad) if name in self.stored else grad
            self.sq_norms[name] = squared_norms(self.stored[name])

    def forget(self, names: Iterable[str]) -> None:
        """Leaves out parameters that are not trained: they count neither in norms nor in sums."""
        for name in list(names):
            for kept in (self.stored, self.sq_norms, self._deferred):
                kept.pop(name, None)

    def total_sq_norms(self, device: torch.device) -> Tensor:
        total = torch.zeros(self.samples, dtype=torch.float64, device=device)
        if device.type != "cpu" and self.sq_norms:  # one launch instead of one a parameter
            return torch.stack([sq.to(total) for sq in self.sq_norms.values()]).sum(0)
        for sq in self.sq_norms.values():
            total += sq.double()
        return total

    def add_to(self, sums: dict[str, Tensor], factors: Tensor | Mapping[str, Tensor]) -> None:
        """sums[name] += Σ_b factors_b · gradient_b, for every parameter that took part; ``factors`` may be given by name."""

        def of(name: str) -> Tensor:
            return factors if isinstance(factors, Tensor) else factors[name]

        deferred = self._deferred_sums(of)  # first: where one fails, nothing has been added
        if isinstance(factors, Tensor):
            Pending(self.stored, factors).add_to(sums)
        else:
            for name, stored in self.stored.items():
                ops.weighted_sum_([sums[name]], [stored], factors[name])
        for name, grad in deferred.items():
            sums[name] += grad

    def add_deferred_to(self, sums: Mapping[str, Tensor], factors: Tensor) -> Pending:
        """:meth:`add_to` of all that is not stored; the rest of the sum is left to whoever takes the step."""
        for name, grad in self._deferred_sums(lambda name: factors).items():
            sums[name] += grad
        return Pending(self.stored, factors)

    def _deferred_sums(self, of: Callable[[str], Tensor]) -> dict[str, Tensor]:
        deferred = {}
        for name, entry in self._deferred.items():
            assert isinstance(entry.use.rule, MatrixRule)
            entry.check_unchanged()
            if entry.alone:
                with full_precision(entry.use.g.device):
                    deferred[name] = entry.sum_alone(of(name), self.sq_norms[name])
                continue
            clipped = entry.use.rule.clipped_sum(entry.use.x, entry.use.g, of(name), entry.multiplicity)
            if clipped is not None:
                deferred[name] = clipped
                continue
            entry.use = _in_float(entry.use)
            x, g = entry.use.x, entry.use.g
            per_row = of(name).repeat_interleave(x.shape[0] // self.samples).view(-1, *([1] * (g.dim() - 1)))
            # Multiplying by zero would let an infinite sample through as NaN; such rows are replaced, input and all.
            kept = per_row != 0
            if g.device.type != "cpu" or not bool(kept.all()):  # looking at the values would wait for a GPU
                g = torch.where(kept, g, 0) * per_row
                x = torch.where(kept.view(-1, *([1] * (x.dim() - 1))), x, 0)
            else:
                g = g * per_row
            with full_precision(g.device):
                deferred[name] = entry.use.rule.weighted_weight_grad(x, g)
        return deferred


def _norms(t: Tensor, samples: int) -> Tensor:
    """‖t_b‖ over all rows of a sample, (B,) float64; inf where a square passes the range of float32."""
    rows = torch.linalg.vector_norm(t, dim=tuple(range(1, t.dim())))
    return torch.linalg.vector_norm(rows.view(samples, -1), dim=1, dtype=torch.float64).clamp(min=_LEAST_NORM)


def _in_float(use: Use) -> Use:
    if use.g.dtype in (torch.float32, torch.float64):
        return use
    return Use(use.rule, use.x.float(), use.g.float(), tuple(s.float() for s in use.saved))


def _vector_jacobian_products(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], grads: Sequence[Tensor], samples: int
) -> list[Tensor | None]:
    """For each sample, Σ_i grads_i[b]ᵀ ∂outputs_i/∂inputs: (B, *input) each, None where an input takes no part."""
    grads = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
    rows: list[tuple[Tensor | None, ...]] = [
        torch.autograd.grad(outputs, inputs, [g[b] for g in grads], retain_graph=True, allow_unused=True) for b in range(samples)
    ]
    return [
        None if column[0] is None else torch.stack([c for c in column if c is not None]).to(
            torch.float64 if column[0].dtype == torch.float64 else torch.float32
        )
        for column in zip(*rows, strict=True)
    ]  # fmt: skip


def misplaced(use: Use, rows: int) -> str:
    return (
        f"{use.rule.describe()} was applied to shape {tuple(use.x.shape)}, whose first dimension is not a multiple of "
        f"the {rows} rows of the batch; rows must stay the first dimension"
    )


def fixed(strategy: str) -> Choice:
    """The same way for every matrix."""
    return lambda rule, x, g, multiplicity: strategy


def rank_one(rule: MatrixRule, x: Tensor, multiplicity: int) -> bool:
    """One position a sample: the norm is ‖a‖·‖g‖, and storing the outer product would cost more than it saves."""
    return isinstance(rule, LinearRule) and multiplicity == 1 and x.dim() == 2
