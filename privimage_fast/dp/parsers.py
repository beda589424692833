"""Which rule stands for a call of a torch function, and with what arguments.

A parser is given the names of the trainable parameters and the call's arguments as torch's function takes them; it returns
the input (padded, where the kernels pad otherwise) and the rule. Forms of a function that no rule covers are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from privimage_fast.dp.norm_rules import FusedGroupNormRule, GroupNormRule, LayerNormRule, ResidualRule
from privimage_fast.dp.rules import (
    ConvRule,
    ConvTransposeRule,
    EmbeddingRule,
    LinearRule,
    Rule,
    UncoveredParameterError,
)  # fmt: skip
from privimage_fast.ops import normalise


def _expand(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def _check_dims(function: str, names: dict[str, str], input: Tensor, dims: int) -> None:
    if input.dim() != dims:
        raise UncoveredParameterError(
            f"{function} ({', '.join(names.values())}) of shape {tuple(input.shape)}; expected rows first and {dims} dimensions"
        )


def _conv_call(dims: int) -> Callable[..., tuple[Tensor, Rule]]:
    def parse(
        names: dict[str, str], input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
        padding: Any = 0, dilation: Any = 1, groups: int = 1,
    ) -> tuple[Tensor, Rule]:  # fmt: skip
        _check_dims(f"conv{dims}d", names, input, dims + 2)
        dilation = _expand(dilation, dims)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            if any(t % 2 for t in total):  # torch puts the odd column behind; the kernels pad symmetrically
                input = F.pad(input, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
                padding = 0
            else:
                padding = [t // 2 for t in total]
        options = {
            "stride": _expand(stride, dims), "padding": _expand(padding, dims), "dilation": dilation, "groups": groups,
            "channel_dim": 1,
        }  # fmt: skip
        return input, ConvRule(f"conv{dims}d", names, weight, bias, options)

    return parse


def _conv_transpose_call(dims: int) -> Callable[..., tuple[Tensor, Rule]]:
    def parse(
        names: dict[str, str], input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> tuple[Tensor, Rule]:  # fmt: skip
        _check_dims(f"conv_transpose{dims}d", names, input, dims + 2)
        options = {
            "stride": _expand(stride, dims), "padding": _expand(padding, dims), "dilation": _expand(dilation, dims),
            "groups": groups, "output_padding": _expand(output_padding, dims), "channel_dim": 1,
        }  # fmt: skip
        return input, ConvTransposeRule(f"conv_transpose{dims}d", names, weight, bias, options)

    return parse


def _linear_call(names: dict[str, str], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Rule]:
    if weight.dim() != 2:
        raise UncoveredParameterError(
            f"linear with a weight of shape {tuple(weight.shape)} ({', '.join(names.values())}); expected (outputs, inputs)"
        )
    return input, LinearRule("linear", names, weight, bias, {"channel_dim": -1})


def _group_norm_call(
    names: dict[str, str], input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Rule]:  # fmt: skip
    return input, GroupNormRule("group_norm", names, weight, bias, {"num_groups": num_groups, "eps": eps})


def _fused_group_norm_call(
    names: dict[str, str], input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5, *, silu: bool = False, shift: Tensor | None = None,
) -> tuple[Tensor, Rule]:  # fmt: skip
    more = () if shift is None else (shift,)
    options = {"num_groups": num_groups, "eps": eps, "silu": silu, "more": more}
    return input, FusedGroupNormRule("fused_group_norm", names, weight, bias, options)


def _residual_call(
    names: dict[str, str],
    input: Tensor,
    other: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Rule]:
    return input, ResidualRule("residual", names, weight, bias, {"scale": scale, "more": (other,)})


def _layer_norm_call(
    names: dict[str, str], input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> tuple[Tensor, Rule]:  # fmt: skip
    return input, LayerNormRule("layer_norm", names, weight, bias, {"normalized_shape": tuple(normalized_shape), "eps": eps})


def _embedding_call(
    names: dict[str, str], input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> tuple[Tensor, Rule]:  # fmt: skip
    if max_norm is not None or scale_grad_by_freq:
        raise UncoveredParameterError(
            f"embedding with max_norm={max_norm}, scale_grad_by_freq={scale_grad_by_freq} (parameter {names['weight']!r}) "
            "makes one sample's gradient depend on the other samples of the batch; leave both options off"
        )
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return input, EmbeddingRule("embedding", names, weight, None, {"padding_idx": padding_idx})


# Function → parser of its call. The keys are the objects a TorchFunctionMode is handed.
RULES: dict[Callable[..., Any], Callable[..., tuple[Tensor, Rule]]] = {
    F.conv1d: _conv_call(1),
    F.conv2d: _conv_call(2),
    F.conv_transpose1d: _conv_transpose_call(1),
    F.conv_transpose2d: _conv_transpose_call(2),
    F.linear: _linear_call,
    F.group_norm: _group_norm_call,
    F.layer_norm: _layer_norm_call,
    normalise.group_norm: _fused_group_norm_call,
    normalise.residual: _residual_call,
    F.embedding: _embedding_call,
}
