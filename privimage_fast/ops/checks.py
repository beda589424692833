"""Argument checks that the reference and the native ops share: each returns the sizes it has verified.

Every error names the op, the argument, what was found and what was expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_NORMALS = 8 * 2**32  # a 32-bit block counter, 8 normals a block


def require(ok: bool, op: str, argument: str, found: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{op}: {argument} is {found}, expected {expected}")


def require_tensor(op: str, **tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name} is {type(value).__name__}, expected a tensor")


def require_floating(op: str, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise TypeError(f"{op}: {name} has dtype {value.dtype}, expected a floating-point dtype")


def _describe(shape: Sequence[int]) -> str:
    return str(tuple(shape))


def samples_of(op: str, rows: int, multiplicity: int) -> int:
    """B = rows / multiplicity."""
    require(isinstance(multiplicity, int) and multiplicity >= 1, op, "multiplicity", multiplicity, "an integer ≥ 1")
    require(rows % multiplicity == 0, op, "number of rows", rows, f"a multiple of multiplicity = {multiplicity}")
    return rows // multiplicity


def same_rows(op: str, x: Tensor, g: Tensor) -> None:
    require(x.shape[0] == g.shape[0], op, "rows of g", g.shape[0], f"{x.shape[0]}, the rows of x")


def store_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"{op}: store_dtype is {dtype}, expected torch.float32 or torch.bfloat16")


def accumulator(op: str, name: str, out: Tensor | None, shape: Sequence[int], like: Tensor, *, rounded: bool = False) -> None:
    """``out`` must be what the op would have returned: shape, fp32 (fp64 beside fp64 inputs; ``rounded``: or bf16), device."""
    if out is None:
        return
    require_tensor(op, **{name: out})
    require(tuple(out.shape) == tuple(shape), op, f"shape of {name}", _describe(out.shape), _describe(shape))
    if out.dtype not in (torch.float32, torch.float64) and not (rounded and out.dtype == torch.bfloat16):
        raise TypeError(f"{op}: {name} has dtype {out.dtype}, expected torch.float32 (float64 for float64 inputs)")
    require(out.device == like.device, op, f"device of {name}", out.device, str(like.device))


@dataclass(frozen=True)
class ConvShape:
    """A convolution in 2-d terms; 1-d has height 1."""

    samples: int
    in_channels: int
    out_channels: int
    in_size: tuple[int, int]
    out_size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    weight_shape: tuple[int, ...]  # (B, P, C // groups, *kernel), of the caller's dimensionality


def conv_shape(
    op: str, x: Tensor, g: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, multiplicity: int,
) -> ConvShape:  # fmt: skip
    require_tensor(op, x=x, g=g)
    require_floating(op, x=x, g=g)
    require(x.dim() in (3, 4), op, "x.dim()", x.dim(), "3 (1-d convolution) or 4 (2-d)")
    dims = x.dim() - 2
    require(g.dim() == x.dim(), op, "g.dim()", g.dim(), f"{x.dim()}, as x")
    same_rows(op, x, g)
    sizes: dict[str, tuple[int, int]] = {}
    for name, value, least in (
        ("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1),
    ):  # fmt: skip
        numbers = isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, int) for v in value)
        ok = numbers and len(value) == dims and all(v >= least for v in value)
        require(ok, op, name, value, f"a tuple of {dims} integers ≥ {least}")
        sizes[name] = (1 if least else 0, value[0]) if dims == 1 else (value[0], value[1])
    in_size = (1, x.shape[2]) if dims == 1 else (x.shape[2], x.shape[3])
    out_size = (1, g.shape[2]) if dims == 1 else (g.shape[2], g.shape[3])
    channels, outputs = x.shape[1], g.shape[1]
    require(isinstance(groups, int) and groups >= 1, op, "groups", groups, "an integer ≥ 1")
    require(channels % groups == 0, op, "channels of x", channels, f"a multiple of groups = {groups}")
    require(outputs % groups == 0, op, "channels of g", outputs, f"a multiple of groups = {groups}")
    expected = tuple(
        (in_size[i] + 2 * sizes["padding"][i] - sizes["dilation"][i] * (sizes["kernel_size"][i] - 1) - 1)
        // sizes["stride"][i] + 1
        for i in range(2)
    )  # fmt: skip
    require(
        out_size == expected, op, "spatial size of g", _describe(out_size[2 - dims :]),
        f"{_describe(expected[2 - dims :])} for x of spatial size {_describe(in_size[2 - dims :])}",
    )  # fmt: skip
    samples = samples_of(op, x.shape[0], multiplicity)
    return ConvShape(
        samples, channels, outputs, in_size, out_size, sizes["kernel_size"], sizes["stride"], sizes["padding"],
        sizes["dilation"], (samples, outputs, channels // groups, *kernel_size),
    )  # fmt: skip


def linear_shape(op: str, x: Tensor, g: Tensor, multiplicity: int) -> tuple[int, int, int]:
    """(B, p, d)."""
    require_tensor(op, x=x, g=g)
    require_floating(op, x=x, g=g)
    for name, t in (("x", x), ("g", g)):
        require(t.dim() == 3, op, f"shape of {name}", _describe(t.shape), "(rows, positions, features)")
    same_rows(op, x, g)
    require(x.shape[1] == g.shape[1], op, "positions of g", g.shape[1], f"{x.shape[1]}, the positions of x")
    return samples_of(op, x.shape[0], multiplicity), g.shape[2], x.shape[2]


def linear_shapes(op: str, problems: Sequence[tuple[Tensor, Tensor]], multiplicity: int) -> list[tuple[int, int, int]]:
    """(B, p, d) of each pair (x, g); errors name the pair by its place. All must be on one device."""
    shapes = []
    for i, pair in enumerate(problems):
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(f"{op}: problems[{i}] is {type(pair).__name__}, expected a pair (x, g)")
        shapes.append(linear_shape(f"{op}: problems[{i}]", *pair, multiplicity))
        device = problems[0][0].device
        for name, t in zip(("x", "g"), pair, strict=True):
            require(t.device == device, f"{op}: problems[{i}]", f"device of {name}", t.device, f"{device}, as the first")
    return shapes


def bias_shape(op: str, g: Tensor, channel_dim: int, multiplicity: int) -> tuple[int, int, int]:
    """(B, P, channel dimension counted from the front)."""
    require_tensor(op, g=g)
    require_floating(op, g=g)
    require(g.dim() >= 2, op, "g.dim()", g.dim(), "at least 2: rows and channels")
    dim = channel_dim + g.dim() if channel_dim < 0 else channel_dim
    require(1 <= dim < g.dim(), op, "channel_dim", channel_dim, f"a dimension of g (dim {g.dim()}) other than the rows")
    return samples_of(op, g.shape[0], multiplicity), g.shape[dim], dim


def norm_shape(op: str, x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, stats: tuple[int, ...], multiplicity: int) -> int:
    """B, having checked that x and g agree and that mean and rstd have shape ``stats``."""
    require_tensor(op, x=x, g=g, mean=mean, rstd=rstd)
    require_floating(op, x=x, g=g, mean=mean, rstd=rstd)
    require(x.shape == g.shape, op, "shape of g", _describe(g.shape), f"{_describe(x.shape)}, as x")
    for name, t in (("mean", mean), ("rstd", rstd)):
        require(tuple(t.shape) == stats, op, f"shape of {name}", _describe(t.shape), _describe(stats))
    return samples_of(op, x.shape[0], multiplicity)


def group_norm_shape(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, num_groups: int, multiplicity: int, out_weight: Tensor | None,
    out_bias: Tensor | None,
) -> int:  # fmt: skip
    """B."""
    op = "group_norm_affine_grad"
    require_tensor(op, x=x)
    require(x.dim() >= 2, op, "x.dim()", x.dim(), "at least 2: (rows, channels, *spatial)")
    rows, channels = x.shape[:2]
    divides = num_groups >= 1 and channels % num_groups == 0
    require(divides, op, "num_groups", num_groups, f"a divisor of {channels}")
    samples = norm_shape(op, x, g, mean, rstd, (rows, num_groups), multiplicity)
    accumulator(op, "out_weight", out_weight, (samples, channels), x)
    accumulator(op, "out_bias", out_bias, (samples, channels), x)
    return samples


def layer_norm_shape(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, multiplicity: int, out_weight: Tensor | None, out_bias: Tensor | None
) -> int:
    """B."""
    op = "layer_norm_affine_grad"
    require_tensor(op, x=x)
    require(x.dim() == 3, op, "x.dim()", x.dim(), "3: (rows, positions, features)")
    samples = norm_shape(op, x, g, mean, rstd, tuple(x.shape[:2]), multiplicity)
    accumulator(op, "out_weight", out_weight, (samples, x.shape[2]), x)
    accumulator(op, "out_bias", out_bias, (samples, x.shape[2]), x)
    return samples


def embedding_shape(
    op: str, ids: Tensor, g: Tensor, num_embeddings: int, padding_idx: int | None, multiplicity: int
) -> tuple[int, int]:
    """(B, D)."""
    require_tensor(op, ids=ids, g=g)
    require_floating(op, g=g)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: ids has dtype {ids.dtype}, expected torch.int64 or torch.int32")
    require(ids.dim() == 2, op, "shape of ids", _describe(ids.shape), "(rows, positions)")
    require(g.dim() == 3 and g.shape[:2] == ids.shape, op, "shape of g", _describe(g.shape),
            f"({ids.shape[0]}, {ids.shape[1]}, dimension)")  # fmt: skip
    require(num_embeddings >= 1, op, "num_embeddings", num_embeddings, "at least 1")
    require(padding_idx is None or 0 <= padding_idx < num_embeddings, op, "padding_idx", padding_idx,
            f"None or in [0, {num_embeddings})")  # fmt: skip
    if ids.numel() and ids.device.type == "cpu":  # on a GPU this would wait for the device; there index_add_ asserts it
        low, high = int(ids.min()), int(ids.max())
        found, allowed = f"[{low}, {high}]", f"within [0, {num_embeddings})"
        require(0 <= low and high < num_embeddings, op, "range of ids", found, allowed)
    return samples_of(op, ids.shape[0], multiplicity), g.shape[2]


def clip_arguments(op: str, sq_norms: Tensor, max_grad_norm: float, sample_weight: Tensor | None) -> None:
    require_tensor(op, sq_norms=sq_norms)
    require_floating(op, sq_norms=sq_norms)
    require(sq_norms.dim() == 1, op, "shape of sq_norms", _describe(sq_norms.shape), "(samples,)")
    require(math.isfinite(max_grad_norm) and max_grad_norm > 0, op, "max_grad_norm", max_grad_norm, "finite and > 0")
    if sample_weight is not None:
        require_tensor(op, sample_weight=sample_weight)
        require(sample_weight.shape == sq_norms.shape, op, "shape of sample_weight", _describe(sample_weight.shape),
                _describe(sq_norms.shape))  # fmt: skip


def sum_arguments(
    op: str, out: Tensor | Sequence[Tensor], stored: Tensor | Sequence[Tensor], coef: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Both as lists of the same length."""
    outs = [out] if isinstance(out, Tensor) else list(out)
    stores = [stored] if isinstance(stored, Tensor) else list(stored)
    require(len(outs) == len(stores), op, "length of stored", len(stores), f"{len(outs)}, the length of out")
    require_tensor(op, coef=coef)
    require(coef.dim() == 1, op, "shape of coef", _describe(coef.shape), "(samples,)")
    for i, (o, s) in enumerate(zip(outs, stores, strict=True)):
        require_tensor(op, **{f"out[{i}]": o, f"stored[{i}]": s})
        require(tuple(s.shape) == (coef.shape[0], *o.shape), op, f"shape of stored[{i}]", _describe(s.shape),
                _describe((coef.shape[0], *o.shape)))  # fmt: skip
        if o.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: out[{i}] has dtype {o.dtype}, expected torch.float32 or torch.float64: it is a sum")
    return outs, stores


def summed_step_arguments(
    op: str, grad_sum: Tensor, sums: Sequence[Tensor], stored: Sequence[Tensor], coef: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """sums and stored in the order of memory, without what has no elements; sums are disjoint views of grad_sum."""
    sums, stored = sum_arguments(op, list(sums), list(stored), coef)
    require_tensor(op, grad_sum=grad_sum)
    placed = sorted(
        ((s.data_ptr() - grad_sum.data_ptr(), i) for i, s in enumerate(sums) if s.numel()), key=lambda place: place[0]
    )
    end = 0
    for at, i in placed:
        s = sums[i]
        part = s.is_contiguous() and s.dtype == grad_sum.dtype and s.device == grad_sum.device
        require(part and at >= 0 and at % s.element_size() == 0, op, f"sums[{i}]", "elsewhere", "a contiguous view of grad_sum")
        require(at >= end, op, f"sums[{i}]", "over another", "views that share no element")
        end = at + s.numel() * s.element_size()
        require(end <= grad_sum.numel() * grad_sum.element_size(), op, f"sums[{i}]", "elsewhere", "a contiguous view of grad_sum")
    return [sums[i] for _, i in placed], [stored[i] for _, i in placed]


def noise_arguments(op: str, key: bytes, step: int, rank: int, stream: int, n: int, offset: int) -> None:
    if not isinstance(key, bytes):
        raise TypeError(f"{op}: key is {type(key).__name__}, expected bytes")
    require(len(key) == 32, op, "length of key", len(key), "32 bytes")
    for name, value in (("step", step), ("rank", rank), ("stream", stream)):
        require(0 <= value < 2**32, op, name, value, "in [0, 2^32): it is one word of the nonce")
    require(n >= 0, op, "n", n, "≥ 0")
    # Past this the block counter would wrap and noise would repeat, which is worse than no noise.
    fits = 0 <= offset and offset + n <= MAX_NORMALS
    require(fits, op, "offset + n", f"{offset} + {n}", "within the 2^35 normals (2^32 blocks) of a stream")


def step_arguments(
    op: str, tensors: dict[str, Tensor | None], optimizer: str, momentum: float, noise_std: float, denominator: float,
    optimizer_step: int,
) -> None:  # fmt: skip
    """``tensors`` starts with ``param``; None stands for a tensor that is not used."""
    param = tensors["param"]
    require_tensor(op, param=param)
    assert param is not None
    for name, t in tensors.items():
        if t is None:
            continue
        require_tensor(op, **{name: t})
        if t.dtype != param.dtype or t.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{op}: {name} has dtype {t.dtype}, expected float32 for all, or float64 for all")
        require(t.dim() == 1 and t.shape == param.shape, op, f"shape of {name}", _describe(t.shape),
                f"({param.numel()},), one flat tensor")  # fmt: skip
        require(t.is_contiguous(), op, f"stride of {name}", t.stride(), "contiguous")
        require(t.device == param.device, op, f"device of {name}", t.device, str(param.device))
    require(optimizer in ("sgd", "adam", "adamw"), op, "optimizer", repr(optimizer), '"sgd", "adam" or "adamw"')
    needed = ("exp_avg", "exp_avg_sq") if optimizer != "sgd" else ("exp_avg",) if momentum else ()
    for name in needed:
        require(tensors[name] is not None, op, name, None, f"a tensor, for optimizer {optimizer!r}")
    require(math.isfinite(noise_std) and noise_std >= 0, op, "noise_std", noise_std, "finite and ≥ 0")
    require(math.isfinite(denominator) and denominator > 0, op, "denominator", denominator, "finite and > 0")
    require(optimizer_step >= 1, op, "optimizer_step", optimizer_step, "≥ 1: the first step is 1")
