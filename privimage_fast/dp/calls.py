"""How calls on parameters are rewritten so that the rules of :mod:`privimage_fast.dp.rules` cover them.

Four families, keyed by the objects a TorchFunctionMode is handed:

- ``REWRITES``: composite functions, written out in terms of functions that have rules. They run with the tracker active.
- ``ELEMENTWISE``: broadcasting functions; a parameter broadcast against the batch is its own copy for each row.
- ``EXPANDS``: the copies a model makes itself (``class_token.expand(rows, -1, -1)``).
- ``BORROWS_ONLY``: functions that take shape, dtype or device, but no values, from their last tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from privimage_fast.dp.rules import UncoveredParameterError


def named(*names: str) -> set[Callable[..., Any]]:
    found = {getattr(owner, n) for n in names for owner in (torch, Tensor) if hasattr(owner, n)}
    return {f for f in found if callable(f)}


ELEMENTWISE = named(
    *(f"{n}{suffix}" for n in ("add", "sub", "subtract", "mul", "multiply", "div", "divide", "true_divide", "pow", "lerp",
                               "addcmul", "addcdiv", "atan2") for suffix in ("", "_")),
    *(f"__{i}{n}__" for n in ("add", "sub", "mul", "truediv", "pow") for i in ("", "r", "i")),
    "rsub", "maximum", "minimum", "fmax", "fmin", "where", "hypot", "logaddexp",
) | {F.scaled_dot_product_attention}  # fmt: skip  # attention: a bias of the scores, broadcast over the rows

EXPANDS = {Tensor.expand, Tensor.expand_as, Tensor.broadcast_to, torch.broadcast_to, Tensor.repeat}

BORROWS_VALUES_OF_FIRST = {Tensor.type_as, Tensor.to, Tensor.view_as, Tensor.reshape_as}
BORROWS_ONLY = BORROWS_VALUES_OF_FIRST | {torch.zeros_like, torch.ones_like}


def elementwise_rows(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_derived: Callable[[Tensor], bool], rows: int
) -> Callable[[Tensor], tuple[int, ...] | None] | None:
    """For a broadcasting call: parameter-side tensor → the shape of its copies, rows first; None where there is none."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    dims = max(t.dim() for t in tensors)
    lead = {t.shape[0] for t in tensors if t.dim() == dims and not is_derived(t)} - {1}
    if dims == 0 or len(lead) > 1 or any(n % rows for n in lead):
        return None
    (first,) = lead or {rows}
    if not lead and rows != 1:
        return None  # nothing of the batch has all the dimensions

    def shape(t: Tensor) -> tuple[int, ...] | None:
        own = tuple(t.shape)
        if len(own) == dims:
            if own[0] != 1:
                return None
            own = own[1:]
        return (first, *[1] * (dims - 1 - len(own)), *own)

    return shape


def expanded_source(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], rows: int
) -> tuple[Tensor, tuple[int, ...]] | None:
    """The tensor that a call repeats once for each row, and the resulting shape; None for any other repetition."""
    tensor = kwargs.get("input", kwargs.get("self", args[0] if args else None))
    if not isinstance(tensor, Tensor):
        return None
    given = args[1:] or tuple(kwargs.values())
    if len(given) == 1 and isinstance(given[0], Tensor):
        sizes: Sequence[int] = given[0].shape
    else:
        sizes = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    own = (1,) * (len(sizes) - tensor.dim()) + tuple(tensor.shape)
    if len(own) != len(sizes) or not sizes or own[0] != 1 or not all(isinstance(s, int) for s in sizes):
        return None
    if func is Tensor.repeat:
        if any(s != 1 for s in sizes[1:]):
            return None
        target = (sizes[0], *own[1:])
    else:
        target = tuple(o if s == -1 else s for o, s in zip(own, sizes, strict=True))
    return (tensor, target) if target[0] == rows else None


def batch_norm_training(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    position = 5  # (input, running_mean, running_var, weight, bias, training, …); torch.batch_norm swaps 1–2 with 3–4
    return bool(kwargs["training"] if "training" in kwargs else args[position] if len(args) > position else False)


# --- rewrites ---------------------------------------------------------------------------------------------------------


def _channels(p: Tensor, x: Tensor) -> Tensor:
    return p.view(1, -1, *[1] * (x.dim() - 2))


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = y if weight is None else y * _channels(weight, y)
    return y if bias is None else y + _channels(bias, y)


def _instance_norm(
    input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if use_input_stats and running_mean is None and running_var is None:
        return F.group_norm(input, input.shape[1], weight, bias, eps)  # one group a channel: the same thing
    return _affine(F.instance_norm(input, running_mean, running_var, None, None, use_input_stats, momentum, eps), weight, bias)


def _frozen_batch_norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    return _affine(F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps), weight, bias)


def _rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    y = F.rms_norm(input, normalized_shape, None, eps)
    return y if weight is None else y * weight


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    return torch.where(input > 0, input, input * (_channels(weight, input) if input.dim() > 1 else weight))


def _matmul(input: Tensor, other: Tensor) -> Tensor:
    if other.dim() == 2 and input.dim() >= 2:
        return F.linear(input, other.mT)
    if other.dim() == 1 and input.dim() >= 2:
        return F.linear(input, other[None])[..., 0]
    if input.dim() == 2:  # mixes positions: W x = (xᵀ Wᵀ)ᵀ
        return F.linear(other.mT, input).mT
    return (input.unsqueeze(-1) * other.unsqueeze(-3)).sum(-2) if input.dim() > 1 else (input[..., None] * other).sum(-2)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    y = torch.matmul(mat1, mat2)
    return (input if beta == 1 else input * beta) + (y if alpha == 1 else y * alpha)


def _index(input: Tensor, index: Any) -> Tensor:
    """``table[ids]`` with ids of the batch is an embedding."""
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or index.dim() == 0:
        raise UncoveredParameterError(
            f"a parameter of shape {tuple(input.shape)} is indexed by the batch in a way that is no table look-up; use "
            "F.embedding, or freeze it with requires_grad_(False)"
        )
    ids = torch.where(index < 0, index + input.shape[0], index)
    return F.embedding(ids, input.flatten(1) if input.dim() > 1 else input[:, None]).reshape(*index.shape, *input.shape[1:])


def _multi_head_attention(
    query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int, in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero_attn: bool, dropout_p: float,
    out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True, key_padding_mask: Tensor | None = None,
    need_weights: bool = True, attn_mask: Tensor | None = None, use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None, static_v: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``F.multi_head_attention_forward`` with the rows first. query (L, R, E), key and value (S, R, ·) → (L, R, E)."""
    if query.dim() != 3 or static_k is not None or static_v is not None:
        raise UncoveredParameterError(
            f"multi_head_attention_forward of a query of shape {tuple(query.shape)}: unbatched queries and static keys are not "
            "covered; give a batch"
        )
    same = query is key and key is value
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    width = q.shape[-1]
    if use_separate_proj_weight:
        assert q_proj_weight is not None and k_proj_weight is not None and v_proj_weight is not None
        parts = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(t, w, b) for t, w, b in zip((q, k, v), (q_proj_weight, k_proj_weight, v_proj_weight), parts, strict=True)
        )
    elif same:
        assert in_proj_weight is not None
        q, k, v = F.linear(q, in_proj_weight, in_proj_bias).split(width, -1)
    else:
        assert in_proj_weight is not None
        parts = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((q, k, v), in_proj_weight.chunk(3), parts, strict=True))
    rows, length = q.shape[:2]
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(rows, 1, width)], 1)
        v = torch.cat([v, bias_v.expand(rows, 1, width)], 1)
    q, k, v = (t.unflatten(-1, (num_heads, width // num_heads)).transpose(1, 2) for t in (q, k, v))  # (R, heads, ·, head width)
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(*t.shape[:2], 1, t.shape[-1])], 2) for t in (k, v))
    mask = _attention_mask(attn_mask, key_padding_mask, is_causal, rows, num_heads, length, k.shape[2], q)
    drop = dropout_p if training else 0.0
    weights = None
    if need_weights:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = torch.softmax(scores if mask is None else scores + mask, -1)
        weights = F.dropout(weights, drop) if drop else weights
        mixed = weights @ v
        weights = weights.mean(1) if average_attn_weights else weights
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, drop)
    out = F.linear(mixed.transpose(1, 2).flatten(-2), out_proj_weight, out_proj_bias)
    return out.transpose(0, 1), weights


def _attention_mask(
    attn_mask: Tensor | None, padding: Tensor | None, is_causal: bool, rows: int, heads: int, length: int, keys: int, like: Tensor
) -> Tensor | None:
    """Sum of both masks as a float that broadcasts to (rows, heads, length, keys); keys added by bias_k or zeros are open."""

    def as_float(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))
        return F.pad(mask, (0, keys - mask.shape[-1]))

    total = None
    if is_causal and attn_mask is None:
        attn_mask = torch.ones(length, keys, dtype=torch.bool, device=like.device).triu(1)
    if attn_mask is not None:
        total = as_float(attn_mask)
        if total.dim() == 3:
            total = total.view(rows, heads, length, keys)
    if padding is not None:
        open_keys = as_float(padding)[:, None, None]
        total = open_keys if total is None else total + open_keys
    return total


REWRITES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.instance_norm: _instance_norm,
    F.batch_norm: _frozen_batch_norm,
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.prelu: _prelu,
    torch.prelu: _prelu,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    Tensor.__rmatmul__: lambda other, input: _matmul(input, other),
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    Tensor.__getitem__: _index,
    F.multi_head_attention_forward: _multi_head_attention,
}
