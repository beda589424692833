"""Group normalisation, SiLU and a block's end in one kernel each, thread by thread on the host, against torch in double.

PRIVIMAGE_TEST_DEVICE=cuda runs the same tests on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from privimage_fast import ops
from privimage_fast.ops import cuda, native, normalise

DEVICE = os.environ.get("PRIVIMAGE_TEST_DEVICE", "cpu")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # of the result, relative to its norm

pytestmark = pytest.mark.skipif(native._C is None, reason="the extension is not built")


@pytest.fixture(autouse=True)
def on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if DEVICE == "cpu":
        monkeypatch.setattr(
            cuda, "supports", lambda op, tensors: hasattr(cuda, op) and all(t.dtype in native._FLOATS for t in tensors)
        )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        yield


def is_fused(y: Tensor) -> bool:
    return type(y.grad_fn).__name__ in ("_GroupNormBackward", "_ResidualBackward")


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


SHAPES = [
    (3, 16, 5, 7, 4),
    (2, 64, 8, 8, 16),  # positions in whole strides
    (2, 96, 3, 3, 24),  # threads without work
    (1, 8, 2, 1, 2),
    (2, 2048, 2, 1, 32),  # as many channels as a block takes
    (2, 24, 13, 11, 1),  # one group
    (2, 32, 14, 14, 32),  # one channel a group
]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_results_and_gradients_are_torchs(shape: tuple[int, ...], dtype: torch.dtype, silu: bool, affine: bool) -> None:
    *size, groups = shape
    x, g = ((torch.randn(size) * 2 + 1).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(size[1]).requires_grad_() if affine else None for _ in range(2))
    x.requires_grad_()
    y = normalise.group_norm(x, groups, weight, bias, 1e-5, silu=silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last) and is_fused(y)
    y.backward(g)
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    expected = F.group_norm(wide[0], groups, wide[1], wide[2], 1e-5)
    expected = F.silu(expected) if silu else expected
    expected.backward(g.double())
    assert error(y.detach(), expected.detach()) < ROUNDING[dtype]
    assert x.grad is not None and x.grad.dtype == dtype
    if size[2] * size[3] * size[1] // groups > 2:  # of two values, x̂ is ±1 and its gradient rounding
        assert error(x.grad, wide[0].grad) < ROUNDING[dtype]
    if affine:
        for found, of in ((weight, wide[1]), (bias, wide[2])):
            assert error(found.grad, of.grad) < 1e-6  # sums of what bfloat16 held exactly


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_mean_far_from_zero_costs_no_digits(dtype: torch.dtype) -> None:
    x = (torch.randn(2, 16, 9, 9) + 1000).to(dtype)
    y = normalise.group_norm(x, 4, None, None, 1e-5)
    assert error(y, F.group_norm(x.double(), 4, None, None, 1e-5)) < (1e-4 if dtype == torch.float32 else 4e-3)


def test_each_row_has_its_own_gradients() -> None:
    """Which clipping needs: the sums over a row's positions, and over no other row's."""
    x, g = torch.randn(2, 4, 16, 3, 5)
    weight, bias = torch.randn(2, 16)
    _, mean, rstd = normalise.forward(x, 4, weight, bias, 1e-5, True)
    dx, _, weights, biases = normalise.backward(x, g, mean, rstd, weight, bias, True)
    for row in range(4):
        alone = [t.detach().double().requires_grad_() for t in (x[row : row + 1], weight, bias)]
        F.silu(F.group_norm(alone[0], 4, alone[1], alone[2], 1e-5)).backward(g[row : row + 1].double())
        for found, expected in zip((dx[row], weights[row], biases[row]), alone, strict=True):
            assert error(found, expected.grad.reshape(found.shape)) < 1e-6
    nothing, _, *again = normalise.backward(x, g, mean, rstd, weight, bias, True, needs_x=False)
    assert nothing is None and torch.equal(again[0], weights) and torch.equal(again[1], biases)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_shift_is_added_first(shape: tuple[int, ...], dtype: torch.dtype, silu: bool) -> None:
    *size, groups = shape
    x, g = (torch.randn(size).to(dtype) for _ in range(2))
    shift, weight, bias = (3 * torch.randn(size[:2])).to(dtype), torch.randn(size[1]), torch.randn(size[1])
    given = [t.clone().requires_grad_() for t in (x, weight, bias, shift)]
    y = normalise.group_norm(given[0], groups, *given[1:3], 1e-5, silu=silu, shift=given[3])
    assert is_fused(y)
    y.backward(g)
    wide = [t.double().requires_grad_() for t in (x, weight, bias, shift)]
    expected = F.group_norm(wide[0] + wide[3][:, :, None, None], groups, *wide[1:3], 1e-5)
    expected = F.silu(expected) if silu else expected
    expected.backward(g.double())
    assert error(y.detach(), expected.detach()) < ROUNDING[dtype]
    if size[2] * size[3] * size[1] // groups > 2:
        assert error(given[0].grad, wide[0].grad) < ROUNDING[dtype]
        if groups < size[1]:  # of a group of one channel the shift is taken out again
            assert given[3].grad.dtype == dtype and error(given[3].grad, wide[3].grad) < 2 * ROUNDING[dtype]
    for i in (1, 2):
        assert error(given[i].grad, wide[i].grad) < 2e-6


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("size", [(3, 16, 5, 7), (2, 64, 8, 8), (2, 96, 3, 3), (1, 8, 1, 1), (1, 2048, 2, 1)])
@pytest.mark.parametrize("biases", [0, 1, 2])
def test_a_residual_is_torchs(size: tuple[int, ...], dtype: torch.dtype, biases: int) -> None:
    a, b, g = (torch.randn(size).to(dtype) for _ in range(3))
    given = [t.clone().requires_grad_() for t in (a, b, *torch.randn(biases, size[1]))]
    wide = [t.detach().double().requires_grad_() for t in given]
    y = normalise.residual(*given, scale=0.5**0.5)
    y.backward(g)
    expected = (wide[0] + wide[1] + sum(t[:, None, None] for t in wide[2:])) * 0.5**0.5
    expected.backward(g.double())
    assert y.dtype == dtype and is_fused(y)
    assert error(y.detach(), expected.detach()) < ROUNDING[dtype]
    for i, (found, of) in enumerate(zip(given, wide, strict=True)):
        assert error(found.grad, of.grad) < (ROUNDING[dtype] if i < 2 else 1e-6)
    d, rows = normalise.residual_backward(g, 0.5)
    assert error(rows, 0.5 * g.double().sum((2, 3))) < 1e-6 and error(d, 0.5 * g.double()) < ROUNDING[dtype]


def test_any_layout_is_read() -> None:
    dense = torch.randn(2, 16, 4, 6)
    expected = F.group_norm(dense.double(), 4)
    shifted = torch.empty(dense.numel() + 1)[1:].view(2, 4, 6, 16).movedim(-1, 1).copy_(dense)  # 4 bytes past a multiple of 16
    sliced = torch.randn(2, 24, 4, 6).to(memory_format=torch.channels_last)[:, 8:].copy_(dense)
    assert shifted.data_ptr() % 16 and not sliced.is_contiguous()
    for x in (dense, dense.to(memory_format=torch.channels_last), shifted, sliced, dense.mT.contiguous().mT):
        assert is_fused(normalise.group_norm(x.requires_grad_(), 4))
        assert error(normalise.group_norm(x, 4), expected) < 1e-6
    single = torch.randn(2, 16, 1, 1).expand(2, 16, 1, 3)
    assert error(normalise.group_norm(single, 2), F.group_norm(single.double(), 2)) < 1e-6


def test_not_a_number_stays_one_and_in_its_group() -> None:
    x = torch.randn(2, 16, 4, 4)
    x[0, 3, 1, 1] = torch.nan
    y = normalise.group_norm(x, 4, None, None, 1e-5, silu=True)
    assert y[0, :4].isnan().all() and y[0, 4:].isfinite().all() and y[1].isfinite().all()


def test_large_values_do_not_overflow_in_silu() -> None:
    x = torch.randn(1, 8, 2, 2, requires_grad=True)
    y = normalise.group_norm(x, 1, torch.full((8,), 1e4), torch.full((8,), -1e4), 1e-5, silu=True)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("shape", "groups", "dtype"),
    [((2, 12, 3, 3), 4, torch.float32), ((2, 16, 3), 4, torch.float32), ((2, 16, 3, 3), 4, torch.float64)],
)  # fmt: skip
def test_what_the_kernel_does_not_take_is_torchs(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    y = normalise.group_norm(x, groups, silu=True)
    assert type(y.grad_fn).__name__ == "SiluBackward0" and torch.equal(y, F.silu(F.group_norm(x, groups)))


def double_backward(build: Callable[..., Tensor], *inputs: Tensor) -> None:
    """First gradients under create_graph, and second ones, against those in double, which have no kernel."""
    found, expected = ([t.detach().to(dtype).requires_grad_() for t in inputs] for dtype in (torch.float32, torch.float64))
    for given in (found, expected):
        grads = torch.autograd.grad(build(*given).square().sum(), given, create_graph=True)
        given += [g.detach().clone() for g in grads]
        sum(g.square().sum() for g in grads).backward()
    for a, b in zip(found[: len(inputs)], expected[: len(inputs)], strict=True):
        assert error(a.grad, b.grad) < 2e-5
    for a, b in zip(found[len(inputs) :], expected[len(inputs) :], strict=True):
        assert error(a, b) < 2e-6


def test_a_second_derivative_is_torchs() -> None:
    x, (w, b), s = torch.randn(2, 8, 2, 3), torch.randn(2, 8), torch.randn(2, 8)
    double_backward(lambda x, w, b, s: normalise.group_norm(x, 2, w, b, silu=True, shift=s), x, w, b, s)
    double_backward(lambda x, w, b: normalise.residual(x * x, x, w, b, 0.5), x, w, b)


def test_gradients_of_inputs_that_depend_on_each_other_are_torchs() -> None:
    x, w = torch.randn(2, 8, 2, 3), torch.randn(8)
    double_backward(lambda x, w: normalise.group_norm(normalise.group_norm(x, 2, w, w), 4, w, 2 * w, silu=True), x, w)
    double_backward(lambda x, w: normalise.group_norm(x, 2, w, shift=x.mean((2, 3)) + w), x, w)
    double_backward(lambda x, w: normalise.residual(x, normalise.residual(x, x, w), w, w, 0.5), x, w)


@pytest.mark.parametrize("other", [torch.float64, torch.bfloat16])
def test_kernels_write_float32_whatever_the_default_dtype_is(other: torch.dtype) -> None:
    x, g, affine = torch.randn(2, 8, 2, 3), torch.randn(2, 8, 2, 3), torch.randn(2, 8)
    ids, conv = torch.arange(4).view(2, 2), dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    sq = torch.rand(2, dtype=torch.float64)

    def everything() -> list[Tensor | None]:
        y, mean, rstd = normalise.forward(x, 2, *affine, 1e-5, True, affine)
        found = [
            y,
            mean,
            rstd,
            *normalise.backward(x, g, mean, rstd, *affine, True, affine),
            *normalise.residual_backward(g, 0.5),
        ]
        for op in (cuda, native) if DEVICE == "cpu" else (cuda,):
            found += [*op.conv_weight_grad(x, g, multiplicity=1, **conv), op.conv_gram_norms(x, g, multiplicity=1, **conv)]
            found += [*op.bias_grad(g, channel_dim=1, multiplicity=2), op.clip_factors(sq, 0.5)]
            found += op.group_norm_affine_grad(x, g, mean, rstd, num_groups=2, multiplicity=1)
            found += op.linear_weight_grad(x.flatten(2), g.flatten(2), multiplicity=2)
            found += op.embedding_grad(ids, x[:, :2, 0], num_embeddings=5, padding_idx=None, multiplicity=1)
        return [*found, ops.conv_clipped_sum(x, g, sq.float(), multiplicity=1, **conv)]

    expected, before = everything(), torch.get_default_dtype()
    torch.set_default_dtype(other)
    try:
        found = everything()
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or (a.dtype == b.dtype and torch.equal(a, b))


def test_wrong_shapes_are_refused_before_a_kernel_sees_them() -> None:
    x, one = torch.randn(2, 16, 3, 3), torch.ones(16)
    for weight, bias in ((torch.ones(4), None), (one, torch.ones(1))):
        with pytest.raises(ValueError, match=r"has shape \([14],\); expected one number a channel, \(16,\)"):
            normalise.group_norm(x, 4, weight, bias)
        with pytest.raises(ValueError, match="expected one number a channel"):
            normalise.residual(x, x, weight, bias)
    with pytest.raises(ValueError, match=r"shift has shape \(1, 16\); expected rows and channels of x, \(2, 16\)"):
        normalise.group_norm(x, 4, shift=torch.zeros(1, 16))
    with pytest.raises(ValueError, match=r"b has shape \(1, 16, 3, 3\); expected that of a"):
        normalise.residual(x, x[:1])
