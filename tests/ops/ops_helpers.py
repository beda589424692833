"""Comparison of a kernel with the float64 reference, within what float32 sums can lose."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_sums(actual: Tensor, expected: Tensor, magnitude: Tensor, epsilon: float = 4e-6) -> None:
    """|actual − expected| ≤ ε · (the same sum over absolute values), element by element.

    Sharper than a tolerance on the largest element: a small output that lost one term is seen.
    """
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    error = (actual.double() - expected.double()).abs()
    bound = epsilon * magnitude.double() + 1e-30
    assert bool((error <= bound).all()), f"worst error is {(error / bound).max():.3g} times the bound"


def assert_norms(sq_norms: Tensor, stored: Tensor) -> None:
    """The norm is that of what was stored, in double precision."""
    assert sq_norms.dtype == torch.float64
    expected = stored.reshape(stored.shape[0], -1).double().square().sum(1) if stored.shape[0] else sq_norms
    torch.testing.assert_close(sq_norms, expected, rtol=1e-12, atol=1e-300)


def variant(t: Tensor, how: str) -> Tensor:
    """The same values (rounded to bfloat16 for "bf16") in another memory layout."""
    if how == "bf16":
        return t.bfloat16()
    if how == "channels_last":
        return t.movedim(1, -1).contiguous().movedim(-1, 1)
    if how == "sliced":  # a window of a larger tensor: no stride is what a dense tensor would have
        wide = torch.full([n + 2 for n in t.shape], float("nan"), dtype=t.dtype)
        window = wide[tuple(slice(1, n + 1) for n in t.shape)]
        return window.copy_(t)
    if how == "transposed":
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert how == "dense"
    return t


LAYOUTS = ("dense", "channels_last", "sliced", "transposed", "bf16")
