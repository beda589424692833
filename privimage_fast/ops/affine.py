"""Biases and normalisation layers as calls of the one affine kernel: checks, layout and sizes, alike on CPU and GPU.

Each function returns keyword arguments of a backend's ``_affine``: x, g contiguous (R, C, S), or (R, S, C) with channels_last.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from privimage_fast.ops import checks


def bias(g: Tensor, channel_dim: int, multiplicity: int, out: Tensor | None) -> dict[str, Any]:
    samples, channels, dim = checks.bias_shape("bias_grad", g, channel_dim, multiplicity)
    checks.accumulator("bias_grad", "out", out, (samples, channels), g)
    last = g.movedim(dim, -1)
    channels_last = last.is_contiguous()
    return {
        "x": None, "g": last if channels_last else g.movedim(dim, 1).contiguous(), "mean": None, "rstd": None,
        "channels_last": channels_last, "per_position": False, "samples": samples, "multiplicity": multiplicity,
        "channels": channels, "positions": g.numel() // max(1, g.shape[0] * channels), "groups": 1, "out_weight": None,
        "out_bias": out,
    }  # fmt: skip


def group_norm(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, num_groups: int, multiplicity: int, out_weight: Tensor | None,
    out_bias: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    samples = checks.group_norm_shape(x, g, mean, rstd, num_groups, multiplicity, out_weight, out_bias)
    rows, channels = x.shape[:2]
    x_last, g_last = x.movedim(1, -1), g.movedim(1, -1)
    channels_last = x_last.is_contiguous() and g_last.is_contiguous()
    return {
        "x": x_last if channels_last else x.contiguous(), "g": g_last if channels_last else g.contiguous(), "mean": mean,
        "rstd": rstd, "channels_last": channels_last, "per_position": False, "samples": samples, "multiplicity": multiplicity,
        "channels": channels, "positions": x.numel() // max(1, rows * channels), "groups": num_groups,
        "out_weight": out_weight, "out_bias": out_bias,
    }  # fmt: skip


def layer_norm(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, multiplicity: int, out_weight: Tensor | None, out_bias: Tensor | None
) -> dict[str, Any]:
    samples = checks.layer_norm_shape(x, g, mean, rstd, multiplicity, out_weight, out_bias)
    return {
        "x": x.contiguous(), "g": g.contiguous(), "mean": mean, "rstd": rstd, "channels_last": True, "per_position": True,
        "samples": samples, "multiplicity": multiplicity, "channels": x.shape[2], "positions": x.shape[1], "groups": 1,
        "out_weight": out_weight, "out_bias": out_bias,
    }  # fmt: skip
