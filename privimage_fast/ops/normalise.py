"""Group normalisation and what follows it in one op, with its gradients, where a GPU has a kernel for it; elsewhere torch's own.

Torch's group norm wants channels outermost and, under autocast, float32. Between convolutions in bfloat16 with channels
innermost that is four passes over memory to bring an image there and back, several times what the normalisation itself takes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from privimage_fast.ops import cuda

_VECTOR, _BLOCK = 8, 512  # as in csrc/cuda/group_norm.cu


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *, silu: bool = False
) -> Tensor:
    """``F.group_norm(x, num_groups, weight, bias, eps)``, then ``F.silu`` if asked for.

    Args:
        x: (R, C, *spatial), float.
        weight, bias: (C,), float32 or None.

    Returns:
        (R, C, *spatial) of x's dtype, channels innermost, from the kernel (x of bfloat16 or float32, two spatial dimensions, C a
        multiple of 8); what torch makes of it otherwise.
    """
    if torch.compiler.is_compiling() or not has_kernel(x, num_groups, weight, bias):
        return _plain(x, num_groups, weight, bias, eps, silu)
    if has_torch_function_variadic(x, weight, bias):  # somebody watches, and would see no call otherwise
        return handle_torch_function(group_norm, (x, weight, bias), x, num_groups, weight, bias, eps, silu=silu)
    return _GroupNorm.apply(x, num_groups, weight, bias, eps, silu)


def has_kernel(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether :func:`group_norm` of these tensors is one launch."""
    affine = [t for t in (weight, bias) if t is not None]
    return (
        x.dim() == 4
        and x.numel() > 0
        and x.shape[1] % _VECTOR == x.shape[1] % num_groups == 0
        and x.shape[1] <= _VECTOR * _BLOCK
        and all(t.dtype == torch.float32 for t in affine)
        and cuda.supports("group_norm", [x, *affine])
    )


def wants_channels_innermost(x: Tensor) -> bool:
    """Whether images like x, (R, C, H, W), had better lie with channels innermost, as kernel and convolutions want them."""
    return not torch.compiler.is_compiling() and cuda.supports("group_norm", [x])


def _channels_innermost(t: Tensor) -> Tensor:
    """t with channels innermost, dense, at an address that is a multiple of 16."""
    t = t.contiguous(memory_format=torch.channels_last)
    _, channels, *spatial = t.shape
    dense = (channels * math.prod(spatial), 1, channels * spatial[1], channels)  # a dimension of 1 may have any stride
    if any(n > 1 and s != d for n, s, d in zip(t.shape, t.stride(), dense, strict=True)) or t.data_ptr() % 16:
        t = t.clone(memory_format=torch.channels_last)
    return t


def forward(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, and mean and rstd (R, num_groups) for :func:`backward`."""
    x = _channels_innermost(x)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    mean, rstd = (torch.empty(x.shape[0], num_groups, device=x.device) for _ in range(2))
    cuda.group_norm(x, mean, rstd, weight, bias, silu, eps=eps, y=y)
    return y, mean, rstd


def backward(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, silu: bool, *,
    needs_x: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:  # fmt: skip
    """The gradient of x, and each row's gradients of weight and bias, (R, C) float32, which clipping needs apart."""
    x, g = _channels_innermost(x), _channels_innermost(g.to(x.dtype))
    dx = torch.empty_like(x, memory_format=torch.channels_last) if needs_x else None
    weight_rows, bias_rows = (torch.empty(x.shape[:2], device=x.device) for _ in range(2))
    cuda.group_norm(x, mean, rstd, weight, bias, silu, g=g, dx=dx, weight_rows=weight_rows, bias_rows=bias_rows)
    return dx, weight_rows, bias_rows


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
    ) -> Tensor:
        y, mean, rstd = forward(x, num_groups, weight, bias, eps, silu)
        ctx.options = num_groups, eps, silu
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        num_groups, eps, silu = ctx.options
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph: the gradient has to be differentiable itself
            y = _plain(x, num_groups, weight, bias, eps, silu)
            wanted = [t for t, need in ((x, needs[0]), (weight, needs[2]), (bias, needs[3])) if need]
            found = iter(torch.autograd.grad(y, wanted, g, create_graph=True))
            dx, dweight, dbias = (next(found) if needs[i] else None for i in (0, 2, 3))
            return dx, None, dweight, dbias, None, None
        dx, weight_rows, bias_rows = backward(x, g, mean, rstd, weight, bias, silu, needs_x=needs[0])
        return dx, None, weight_rows.sum(0) if needs[2] else None, bias_rows.sum(0) if needs[3] else None, None, None


def _plain(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool) -> Tensor:
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y
