"""The oracle: each sample's gradient by autograd, alone, in double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import privimage_fast as pf


def per_sample_loop(
    module: nn.Module, loss_fn: Callable[..., Tensor], args: Sequence[Any], *, max_grad_norm: float, multiplicity: int = 1,
    dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, Tensor], Tensor]:  # fmt: skip
    """(clipped sums, norms) in float64, one backward pass a sample, in ``dtype``."""
    module = copy.deepcopy(module).to(dtype)
    # In plain order: torch's own instance norm of one channels-last image has a wrong gradient (2.13).
    args = [a.to(dtype).contiguous() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    rows = next(a.shape[0] for a in args if isinstance(a, Tensor))
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
    norms = []
    for b in range(rows // multiplicity):
        part = slice(b * multiplicity, (b + 1) * multiplicity)
        own = [a[part] if isinstance(a, Tensor) and a.shape[0] == rows else a for a in args]
        grads = torch.autograd.grad(loss_fn(module, *own).sum(), list(parameters.values()), allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g.double() for g, p in zip(grads, parameters.values(), strict=True)]
        norm = torch.sqrt(sum((g.square().sum() for g in grads), torch.zeros((), dtype=torch.float64)))
        norms.append(norm)
        factor = min(1.0, max_grad_norm / float(norm)) if norm > 0 else 1.0
        for name, g in zip(parameters, grads, strict=True):
            sums[name] += factor * g
    return sums, torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)


def assert_matches_loop(
    module: nn.Module, loss_fn: Callable[..., Tensor], args: Sequence[Any], *, multiplicity: int = 1, strategy: str = "auto",
    tolerance: float = 1e-5, norm_atol: float = 1e-12, max_grad_norm: float | None = None, **options: Any,
) -> None:  # fmt: skip
    """Norms agree to ``tolerance`` relative; so does the clipped sum as one vector, relative to it or its largest term.

    C is the median norm unless given.
    """
    if max_grad_norm is None:
        norms = per_sample_loop(module, loss_fn, args, max_grad_norm=1.0, multiplicity=multiplicity)[1]
        max_grad_norm = max(float(norms.median()), 1e-6) if len(norms) else 1.0
    expected, norms = per_sample_loop(module, loss_fn, args, max_grad_norm=max_grad_norm, multiplicity=multiplicity)
    found = pf.clipped_grad(
        module, loss_fn, args, max_grad_norm=max_grad_norm, multiplicity=multiplicity, strategy=strategy, **options
    )
    torch.testing.assert_close(found.norms.double(), norms, rtol=tolerance, atol=norm_atol)
    assert found.grads.keys() == expected.keys()
    total = torch.sqrt(sum(e.square().sum() for e in expected.values()))
    error = torch.sqrt(sum((found.grads[n].double() - e).square().sum() for n, e in expected.items()))
    largest = min(max_grad_norm, float(norms.max())) if len(norms) else 0.0
    assert float(error) <= tolerance * max(float(total), largest) + 1e-12, f"clipped sum off by {float(error / total):.1e}"


def row_loss(module: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The mean squared difference of each row to its target (R,): one loss a row."""
    out = module(x)
    return (out - target[(...,) + (None,) * (out.dim() - target.dim())].to(out.dtype)).square().flatten(1).mean(1)
