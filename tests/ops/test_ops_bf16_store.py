"""Gradients stored in bfloat16: rounded to nearest even, and the norm is that of what was rounded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_helpers import assert_norms, variant
from test_ops_weight_grads import conv_case
from torch import Tensor

from privimage_fast.ops import cuda, native, reference

BF16 = torch.bfloat16
MODULES = {"native": native, "emulated": cuda, "reference": reference}

# (b, k, c, p, size, kernel, stride, padding, dilation, groups): pairs of columns that can be written at once, and that cannot.
CONVOLUTIONS = [
    (3, 2, 8, 16, (5, 4), (3, 3), 1, 1, 1, 1),
    (2, 1, 3, 5, (6, 6), (3, 3), 2, 1, 1, 1),
    (2, 3, 6, 9, (7, 5), (2, 3), 1, 0, 2, 3),
    (4, 1, 5, 4, (11,), (3,), 1, 1, 1, 1),
    (1, 1, 72, 136, (4, 4), (1, 1), 1, 0, 1, 1),
]
LINEARS = [(3, 2, 5, 24, 17), (2, 1, 1, 7, 3), (5, 1, 4, 33, 70), (1, 3, 2, 1, 1)]


def _call(module: Any, case: tuple[Any, ...], layout: str, dtype: torch.dtype) -> Any:
    """The op on one input: takes store_dtype, store and out."""
    if len(case) == 5:
        b, k, t, d, p = case
        x, g = (variant(torch.randn(b * k, t, n).to(dtype), layout) for n in (d, p))
        return lambda **options: module.linear_weight_grad(x, g, multiplicity=k, **options)
    x, g, arguments = conv_case(*case)
    x, g = (variant(t.to(dtype), layout) for t in (x, g))
    return lambda **options: module.conv_weight_grad(x, g, **arguments, **options)


@pytest.mark.parametrize("which", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("layout", ["dense", "channels_last"])
@pytest.mark.parametrize("case", [*CONVOLUTIONS, *LINEARS], ids=lambda c: "-".join(map(str, c)).replace(" ", ""))
def test_the_norm_is_that_of_what_is_stored(isa: str, which: str, dtype: torch.dtype, layout: str, case: tuple[Any, ...]) -> None:
    """Also where a module is used once more, and not that of the gradient before it was rounded."""
    call = _call(MODULES[which], case, layout if len(case) > 5 else "dense", dtype)
    exact_norms, exact = call()
    sq_norms, stored = call(store_dtype=BF16)
    assert stored.dtype == BF16 and torch.equal(stored, exact.to(BF16))
    assert_norms(sq_norms, stored)
    if stored[0].numel() > 1:
        assert not torch.allclose(sq_norms, exact_norms, rtol=1e-7)
    out = torch.randn(exact.shape).to(BF16)
    expected = (out.float() + exact).to(BF16)
    sq_norms, same = call(out=out)
    assert same is out and torch.equal(out, expected)
    assert_norms(sq_norms, out)
    only, nothing = call(store=False, store_dtype=BF16)  # nothing is rounded: such a gradient is summed in float32
    assert nothing is None
    torch.testing.assert_close(only, exact_norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("which", MODULES)
def test_rounding_is_to_nearest_even(isa: str, which: str) -> None:
    ulp = 2.0**-7
    values = torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2, 1 + ulp / 2 + 2.0**-16, -1 - ulp / 2, 2.0**-120, 0.0])
    wanted = torch.tensor([1.0, 1 + 2 * ulp, 1 + ulp, -1.0, 2.0**-120, 0.0])
    _, stored = MODULES[which].linear_weight_grad(torch.ones(1, 1, 1), values.view(1, 1, -1), multiplicity=1, store_dtype=BF16)
    assert torch.equal(stored.flatten().float(), wanted)


@pytest.mark.parametrize("which", MODULES)
@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000, 0x7FFFFFFF])
def test_what_is_not_finite_stays_so_and_alone(isa: str, which: str, bits: int) -> None:
    """Above all NaN: of the last one, which is a GPU's own, rounding as of a number would make a zero."""
    x, g = torch.ones(3, 1, 2), torch.ones(3, 1, 4)
    g[1, 0, 2] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    sq_norms, _ = MODULES[which].linear_weight_grad(x, g, multiplicity=1, store_dtype=BF16)
    assert sq_norms.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("which", ["native", "reference"])
def test_what_rounds_beyond_the_largest_number_is_not_finite(isa: str, which: str) -> None:
    g = torch.full((1, 1, 1), torch.finfo(torch.float32).max)
    sq_norms, stored = MODULES[which].linear_weight_grad(torch.ones(1, 1, 1), g, multiplicity=1, store_dtype=BF16)
    assert stored.isinf().all() and sq_norms.isinf().all()


def _stores(samples: int) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(7,), (64, 5, 3, 3), (1, 1), (33, 301), (4, 6, 5), (8, 16), (16, 4, 1, 1)]
    stored = [torch.randn(samples, *shape) for shape in shapes]
    for i in (1, 4):
        stored[i] = stored[i].movedim(2, -1).contiguous().movedim(-1, 2)
    stored = [s.to(BF16) if i != 3 else s for i, s in enumerate(stored)]
    stored[5] = torch.cat([torch.zeros(3, dtype=BF16), stored[5].flatten()])[3:].view(samples, 8, 16)  # not aligned
    return [torch.randn(shape) for shape in shapes], stored


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("samples", [1, 6])
def test_sums_read_both_dtypes(isa: str, samples: int, device: str) -> None:
    outs, stored = _stores(samples)
    coef = torch.rand(samples)
    coef[samples // 2 :: 4] = 0
    expected = [o.double() for o in outs]
    reference.weighted_sum_(expected, [s.double() for s in stored], coef)
    for s in stored:
        s[samples // 2 :: 4] = torch.nan  # never read
    native.weighted_sum_(outs, stored, coef, _device=device)
    for got, want in zip(outs, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
