"""What lies between a U-Net's convolutions, as one op each, with gradients, where a GPU has a kernel for it; else torch's own.

Torch's group norm wants channels outermost and, under autocast, float32. Between convolutions in bfloat16 with channels innermost
that is four passes over memory to bring an image there and back, several times what the normalisation itself takes. Biases,
embeddings, activations and the sum at a block's end are passes of their own there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from privimage_fast.ops import cuda

_VECTOR, _MOST_CHANNELS = 8, 2048  # of csrc/cuda/images.cuh; more channels need more shared memory than every GPU has


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *,
    silu: bool = False, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``F.group_norm(x, num_groups, weight, bias, eps)``, of x + shift where there is one; then ``F.silu`` if asked for.

    Args:
        x: (R, C, *spatial), float.
        weight, bias: (C,), float32 or None.
        shift: (R, C), one number for each image and channel, or None.

    Returns:
        (R, C, *spatial) of x's dtype, channels innermost, from the kernel (x of bfloat16 or float32, two spatial dimensions, C a
        multiple of 8 up to 2,048); what torch makes of it otherwise.

    Raises:
        ValueError: weight, bias or shift has another shape.
    """
    _check("group_norm", x, weight=weight, bias=bias)
    if shift is not None and shift.shape != x.shape[:2]:
        raise ValueError(
            f"group_norm: shift has shape {tuple(shift.shape)}; expected rows and channels of x, {tuple(x.shape[:2])}"
        )
    if not (_fits(x) and x.shape[1] % num_groups == 0 and _kernel("group_norm", [x, shift], weight, bias)):
        return _plain_norm(x, num_groups, weight, bias, eps, silu, shift)
    tensors = tuple(t for t in (x, weight, bias, shift) if t is not None)
    if has_torch_function(tensors):  # somebody watches, and would see no call otherwise
        return handle_torch_function(group_norm, tensors, x, num_groups, weight, bias, eps, silu=silu, shift=shift)
    return _GroupNorm.apply(x, num_groups, weight, bias, eps, silu, shift)


def residual(a: Tensor, b: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """(a + b + weight + bias) · scale: a block's end, with the biases of the convolutions that a and b come from.

    Args:
        a, b: (R, C, *spatial), float.
        weight, bias: (C,), float32 or None.

    Returns:
        (R, C, *spatial) of a's dtype, channels innermost from the kernel, which takes what that of :func:`group_norm` takes.

    Raises:
        ValueError: b has another shape than a, or a bias another than (C,).
    """
    _check("residual", a, weight=weight, bias=bias)
    if a.shape != b.shape:
        raise ValueError(f"residual: b has shape {tuple(b.shape)}; expected that of a, {tuple(a.shape)}")
    if not (_fits(a) and a.dtype == b.dtype and _kernel("residual", [a, b], weight, bias)):
        return _plain_residual(a, b, weight, bias, scale)
    tensors = tuple(t for t in (a, b, weight, bias) if t is not None)
    if has_torch_function(tensors):
        return handle_torch_function(residual, tensors, a, b, weight, bias, scale)
    return _Residual.apply(a, b, weight, bias, scale)


def wants_channels_innermost(x: Tensor) -> bool:
    """Whether images like x, (R, C, H, W), had better lie with channels innermost, as kernels and convolutions want them."""
    return not torch.compiler.is_compiling() and cuda.supports("group_norm", [x])


def _check(op: str, x: Tensor, **affine: Tensor | None) -> None:
    for name, t in affine.items():
        if t is not None and t.shape != x.shape[1:2]:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}; expected one number a channel, {tuple(x.shape[1:2])}")


def _fits(x: Tensor) -> bool:
    return x.dim() == 4 and x.numel() > 0 and x.shape[1] % _VECTOR == 0 and x.shape[1] <= _MOST_CHANNELS


def _kernel(op: str, images: list[Tensor | None], *affine: Tensor | None) -> bool:
    given = [t for t in affine if t is not None]
    return (
        not torch.compiler.is_compiling()
        and all(t.dtype == torch.float32 for t in given)
        and cuda.supports(op, [*(t for t in images if t is not None), *given])
    )


def _channels_innermost(t: Tensor) -> Tensor:
    """t with channels innermost, dense, at an address that is a multiple of 16."""
    t = t.contiguous(memory_format=torch.channels_last)
    _, channels, *spatial = t.shape
    dense = (channels * math.prod(spatial), 1, channels * spatial[1], channels)  # a dimension of 1 may have any stride
    if any(n > 1 and s != d for n, s, d in zip(t.shape, t.stride(), dense, strict=True)) or t.data_ptr() % 16:
        t = t.clone(memory_format=torch.channels_last)
    return t


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _rows(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)


def forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y of :func:`group_norm`, and mean and rstd (R, num_groups) for :func:`backward`."""
    x = _channels_innermost(x)
    y, (mean, rstd) = _like(x), (torch.empty(x.shape[0], num_groups, dtype=torch.float32, device=x.device) for _ in range(2))
    cuda.group_norm(x, mean, rstd, weight, bias, None if shift is None else shift.float(), silu, eps=eps, y=y)
    return y, mean, rstd


def backward(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, silu: bool,
    shift: Tensor | None = None, *, needs_x: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The gradients of x and, in its dtype, of shift; and each row's of weight and bias, (R, C) float32, which clipping needs."""
    x, g = _channels_innermost(x), _channels_innermost(g.to(x.dtype))
    dx = _like(x) if needs_x or shift is not None else None
    weight_rows, bias_rows = _rows(x), _rows(x)
    shift_rows = None if shift is None else _rows(x)
    cuda.group_norm(
        x, mean, rstd, weight, bias, None if shift is None else shift.float(), silu, g=g, dx=dx, weight_rows=weight_rows,
        bias_rows=bias_rows, shift_rows=shift_rows,
    )  # fmt: skip
    return dx, None if shift is None or shift_rows is None else shift_rows.to(shift.dtype), weight_rows, bias_rows


def residual_forward(a: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    """:func:`residual` by the kernel."""
    a, b = _channels_innermost(a), _channels_innermost(b)
    out = _like(a)
    cuda.residual(a, scale, a=a, b=b, bias_a=weight, bias_b=bias, out=out)
    return out


def residual_backward(g: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradient that a and b of :func:`residual` share, and each row's of either bias, (R, C) float32."""
    g = _channels_innermost(g)
    d, rows = _like(g), _rows(g)
    cuda.residual(g, scale, g=g, d=d, bias_rows=rows)
    return d, rows


def _plain_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool, shift: Tensor | None
) -> Tensor:
    if shift is not None:
        x = x + shift.view(*shift.shape, *[1] * (x.dim() - 2))
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y


def _plain_residual(a: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    out = a + b
    for t in (weight, bias):
        out = out if t is None else out + t.view(-1, *[1] * (a.dim() - 2))
    return (out * scale).to(a.dtype)


def _differentiable(
    call: Any, inputs: tuple[Tensor | None, ...], needs: tuple[bool, ...], g: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients under create_graph, which have to be differentiable themselves: torch's.

    Of views, each of its own: of the inputs themselves they would be total, where one is computed from another.
    """
    inputs = tuple(t.view_as(t) if need and t is not None else t for t, need in zip(inputs, needs, strict=True))
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need and t is not None]
    found = iter(torch.autograd.grad(call(*inputs), wanted, g, create_graph=True))
    return tuple(next(found) if need and t is not None else None for t, need in zip(inputs, needs, strict=True))


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool,
        shift: Tensor | None,
    ) -> Tensor:  # fmt: skip
        y, mean, rstd = forward(x, num_groups, weight, bias, eps, silu, shift)
        ctx.options = num_groups, eps, silu
        ctx.save_for_backward(x, mean, rstd, weight, bias, shift)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias, shift = ctx.saved_tensors
        num_groups, eps, silu = ctx.options
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            dx, dweight, dbias, dshift = _differentiable(
                lambda x, weight, bias, shift: _plain_norm(x, num_groups, weight, bias, eps, silu, shift),
                (x, weight, bias, shift), (needs[0], needs[2], needs[3], needs[6]), g,
            )  # fmt: skip
            return dx, None, dweight, dbias, None, None, dshift
        dx, dshift, of_weight, of_bias = backward(x, g, mean, rstd, weight, bias, silu, shift, needs_x=needs[0])
        return dx, None, of_weight.sum(0) if needs[2] else None, of_bias.sum(0) if needs[3] else None, None, None, dshift


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weight: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
        ctx.scale = scale
        return residual_forward(a, b, weight, bias, scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # linear: the gradient is differentiable as it stands
            d = g * ctx.scale
            of_bias = d.flatten(2).sum((0, 2)).float() if needs[2] or needs[3] else None
        else:
            d, rows = residual_backward(g, ctx.scale)
            of_bias = rows.sum(0) if needs[2] or needs[3] else None
        return d if needs[0] else None, d if needs[1] else None, *(of_bias if need else None for need in needs[2:4]), None
