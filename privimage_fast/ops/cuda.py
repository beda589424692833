"""The ops on CUDA kernels: checks, pointers, strides and the current stream, nothing else.

Same names and signatures as :mod:`privimage_fast.ops.reference`, whose docstrings hold the contract. Nothing here waits for
the device. CPU tensors run the same kernels under the host emulation (``csrc/emulation``): slow, for tests.

float32 inputs are multiplied as three TF32 products (float32 accuracy), bfloat16 ones directly; both are summed in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from privimage_fast.ops import affine, checks, native, reference
from privimage_fast.ops.native import _DTYPES, _dense, _plane, _pointer, _undense

_TILE = 64  # the smallest side of a kernel's tile; partial norms are counted by it
_DEPTH = {torch.float32: 16, torch.bfloat16: 32}  # positions that a weight gradient takes at a time


def supports(op: str, tensors: Sequence[Tensor]) -> bool:
    """Whether ``op`` has a CUDA kernel for these tensors: strided, on one GPU, of a known dtype."""
    if op not in globals() or not tensors or not all(t.is_cuda for t in tensors) or not native.cuda_usable():
        return False
    if any(t.layout != torch.strided or t.dtype not in native._SUPPORTED.get(op, native._FLOATS) for t in tensors):
        return False
    return len({t.device for t in tensors}) == 1 and torch.cuda.get_device_capability(tensors[0].device) >= (8, 0)


@contextlib.contextmanager
def _launching(op: str, **tensors: Tensor | None) -> Iterator[dict[str, Any]]:
    """Where to launch, for the extension's call; its errors leave with the op's name and shapes."""
    given = {name: t for name, t in tensors.items() if t is not None}
    device = next(iter(given.values())).device
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                yield {"device": "cuda", "stream": torch.cuda.current_stream().cuda_stream}
        else:
            yield {"device": "emulated", "stream": 0}
    except RuntimeError as error:
        shapes = ", ".join(f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in given.items())
        raise RuntimeError(f"{op} on {device} with {shapes}: {error}") from error


def _tiles(size: int) -> int:
    return -(-size // _TILE)


def _operands(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """One dtype, and channels innermost where that lets the kernel fetch 16 bytes at a time."""
    if x.dtype != g.dtype:
        x, g = x.float(), g.float()
    return x, g


def _channels_last(t: Tensor, channels: int) -> Tensor:
    """A copy with channels innermost, if they are not and a group of ``channels`` fills whole 16-byte chunks."""
    if t.stride(1) == 1 or channels % (16 // t.element_size()):
        return t
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def _whole_chunks(t: Tensor) -> Tensor:
    """t with channels of zeros behind its own, to whole chunks of 16 bytes: they add nothing to a gradient or its norm."""
    chunk = 16 // t.element_size()
    rows, channels, *spatial = t.shape
    filled = t.new_zeros(rows, *spatial, -(-channels // chunk) * chunk).movedim(-1, 1)
    filled[:, :channels] = t
    return filled


def _conv(
    op: str, x: Tensor, g: Tensor, shape: checks.ConvShape, groups: int, multiplicity: int, x_stride: Sequence[int],
    g_stride: Sequence[int], weights: Tensor | None, weight_stride: Sequence[int], accumulate: bool, tf32: bool,
    coef: Tensor | None = None, chunk: int = 1,
) -> Tensor:  # fmt: skip
    columns = shape.in_channels // groups * shape.kernel[0] * shape.kernel[1]
    tiles = groups * _tiles(shape.out_channels // groups) * _tiles(columns)
    sq_norms = torch.empty(shape.samples, dtype=torch.float64, device=x.device)
    partials = torch.empty(shape.samples * tiles, dtype=torch.float64, device=x.device)
    with _launching(op, x=x, g=g, out=weights) as where:
        native._C.conv_weight_grad(
            x=_pointer(x), g=_pointer(g), x_dtype=_DTYPES[x.dtype], g_dtype=_DTYPES[g.dtype], samples=shape.samples,
            multiplicity=multiplicity, groups=groups, in_channels=shape.in_channels, out_channels=shape.out_channels,
            in_size=shape.in_size, out_size=shape.out_size, kernel=shape.kernel, stride=shape.stride,
            padding=shape.padding, dilation=shape.dilation, x_stride=x_stride, g_stride=g_stride, out=_pointer(weights),
            out_stride=weight_stride, accumulate=accumulate, sq_norms=_pointer(sq_norms), num_threads=1,
            partials=_pointer(partials), partials_size=partials.numel(), tf32=tf32, coef=_pointer(coef),
            chunk=chunk, out_dtype=0 if weights is None else _DTYPES[weights.dtype], **where,
        )  # fmt: skip
    return sq_norms


def conv_weight_grad(
    x: Tensor, g: Tensor, *, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, multiplicity: int, store: bool = True, out: Tensor | None = None,
    store_dtype: torch.dtype = torch.float32, _tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    op = "conv_weight_grad"
    shape = checks.conv_shape(op, x, g, kernel_size, stride, padding, dilation, groups, multiplicity)
    checks.accumulator(op, "out", out, shape.weight_shape, x, rounded=True)
    checks.store_dtype(op, store_dtype)
    checks.require(store or out is None, op, "out", "given", "None with store=False")
    if x.numel() == 0 or g.numel() == 0:
        return reference.conv_weight_grad(
            x, g, kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups,
            multiplicity=multiplicity, store=store, out=out, store_dtype=store_dtype,
        )  # fmt: skip
    x, g = _operands(x, g)
    if groups == 1 and out is None and any(t.shape[1] % (16 // t.element_size()) for t in (x, g)):
        # The first and last layer, of 1 or 3 channels: fetched element by element they took longer than ten of the others.
        sq_norms, stored = conv_weight_grad(
            _whole_chunks(x), _whole_chunks(g), kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation,
            groups=1, multiplicity=multiplicity, store=store, store_dtype=store_dtype, _tf32=_tf32,
        )  # fmt: skip
        if stored is not None:
            stored = stored[:, : g.shape[1], : x.shape[1]].movedim(2, -1).contiguous().movedim(-1, 2)  # without the zeros'
        return sq_norms, stored
    x, g = _channels_last(x, x.shape[1] // groups), _channels_last(g, g.shape[1] // groups)
    weights = out
    if store and weights is None:
        # Channels innermost, the order in which the kernel produces them; weighted_sum_ puts the sum in torch's order.
        b, outputs, inputs, *kernel = shape.weight_shape
        weights = torch.empty((b, outputs, *kernel, inputs), dtype=store_dtype, device=x.device).movedim(-1, 2)
    weight_stride: tuple[int, ...] = (0,) * 5
    if weights is not None:
        s = weights.stride()
        weight_stride = s if len(s) == 5 else (*s[:3], 0, s[3])
    sq_norms = _conv(op, x, g, shape, groups, multiplicity, _plane(x), _plane(g), weights, weight_stride, out is not None, _tf32)
    return sq_norms, weights


def _features_last(t: Tensor) -> Tensor:
    """As :func:`_channels_last`, of (R, T, d)."""
    return t if t.stride(2) == 1 or t.shape[2] % (16 // t.element_size()) else t.contiguous()


def _as_conv(samples: int, inputs: int, outputs: int, positions: int) -> checks.ConvShape:
    """A linear layer is a 1×1 convolution over its positions, told by strides alone."""
    one = (1, 1)
    return checks.ConvShape(
        samples, inputs, outputs, (1, positions), (1, positions), one, one, (0, 0), one, (samples, outputs, inputs)
    )


def linear_weight_grad(
    x: Tensor, g: Tensor, *, multiplicity: int, store: bool = True, out: Tensor | None = None,
    store_dtype: torch.dtype = torch.float32, _tf32: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    op = "linear_weight_grad"
    samples, outputs, inputs = checks.linear_shape(op, x, g, multiplicity)
    checks.accumulator(op, "out", out, (samples, outputs, inputs), x, rounded=True)
    checks.store_dtype(op, store_dtype)
    checks.require(store or out is None, op, "out", "given", "None with store=False")
    if x.numel() == 0 or g.numel() == 0:
        return reference.linear_weight_grad(x, g, multiplicity=multiplicity, store=store, out=out, store_dtype=store_dtype)
    x, g = (_features_last(t) for t in _operands(x, g))
    weights = torch.empty(samples, outputs, inputs, dtype=store_dtype, device=x.device) if store and out is None else out
    weight_stride = (0,) * 5 if weights is None else (*weights.stride(), 0, 0)
    strides = [(t.stride(0), t.stride(2), 0, t.stride(1)) for t in (x, g)]
    shape = _as_conv(samples, inputs, outputs, x.shape[1])
    return _conv(op, x, g, shape, 1, multiplicity, *strides, weights, weight_stride, out is not None, _tf32), weights


def _linear_item(
    x: Tensor, g: Tensor, shape: tuple[int, int, int], weights: Tensor | None, sq_norms: Tensor, partials: Tensor | None
) -> tuple[Any, ...]:
    """The extension's view of one problem of :func:`linear_weight_grads`."""
    samples, outputs, inputs = shape
    return (
        _pointer(x), _pointer(g), _DTYPES[x.dtype], samples, x.shape[1], inputs, outputs, x.stride(), g.stride(),
        _pointer(weights), (0, 0, 0) if weights is None else weights.stride(), _pointer(sq_norms), _pointer(partials),
        0 if partials is None else partials.numel(),
    )  # fmt: skip


def linear_weight_grads(
    problems: Sequence[tuple[Tensor, Tensor]], *, multiplicity: int, store: bool = True,
    store_dtype: torch.dtype = torch.float32, _tf32: bool = False,
) -> list[tuple[Tensor, Tensor | None]]:  # fmt: skip
    op = "linear_weight_grads"
    shapes = checks.linear_shapes(op, problems, multiplicity)
    checks.store_dtype(op, store_dtype)
    found: list[Any] = [None] * len(problems)
    items, operands, given = [], [], {}
    for i, ((x, g), shape) in enumerate(zip(problems, shapes, strict=True)):
        if x.numel() == 0 or g.numel() == 0:
            found[i] = reference.linear_weight_grad(x, g, multiplicity=multiplicity, store=store, store_dtype=store_dtype)
            continue
        given |= {f"x[{i}]": x, f"g[{i}]": g}
        x, g = (_features_last(t) for t in _operands(x, g))
        samples, outputs, inputs = shape
        weights = torch.empty(shape, dtype=store_dtype, device=x.device) if store else None
        sq_norms = torch.empty(samples, dtype=torch.float64, device=x.device)
        partials = torch.empty(samples * _tiles(outputs) * _tiles(inputs), dtype=torch.float64, device=x.device)
        items.append(_linear_item(x, g, shape, weights, sq_norms, partials))
        operands += [x, g, partials]  # alive until all are launched
        found[i] = (sq_norms, weights)
    if items:
        with _launching(op, **given) as where:
            native._C.linear_weight_grads(
                items=items, multiplicity=multiplicity, tf32=_tf32, out_dtype=_DTYPES[store_dtype], **where
            )
    return found


def _chunk(samples: int, tiles: int) -> int:
    """Samples a block adds up: few enough that there are about three blocks a multiprocessor of a large GPU."""
    return -(-samples // min(samples, -(-400 // tiles)))


def conv_clipped_sum_(
    out: Tensor, x: Tensor, g: Tensor, coef: Tensor, *, kernel_size: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, multiplicity: int,
) -> None:  # fmt: skip
    """out += Σ_b coef_b · W_b, with W_b as :func:`conv_weight_grad` has it, of samples whose gradients are not stored.

    Each product is as exact as in the norms, coefficients enter in float32, and a sample whose coefficient is 0 adds nothing
    even if it holds inf or NaN.

    Args:
        out: (P, C // groups, *kernel) float32.
        coef: (B,) float32.
        x, g, kernel_size, stride, padding, dilation, groups, multiplicity: as in :func:`conv_weight_grad`.
    """
    op = "conv_clipped_sum_"
    shape = checks.conv_shape(op, x, g, kernel_size, stride, padding, dilation, groups, multiplicity)
    checks.require(tuple(coef.shape) == (shape.samples,), op, "shape of coef", tuple(coef.shape), f"({shape.samples},)")
    checks.accumulator(op, "out", out, shape.weight_shape[1:], x)
    if x.numel() == 0 or g.numel() == 0:
        return
    x, g = _operands(x, g)
    x, g = _channels_last(x, x.shape[1] // groups), _channels_last(g, g.shape[1] // groups)
    _, outputs, inputs, *kernel = shape.weight_shape
    tiles = groups * _tiles(outputs // groups) * _tiles(inputs * kernel[0] * (kernel[1] if len(kernel) > 1 else 1))
    chunk = _chunk(shape.samples, tiles)
    parts = torch.empty((-(-shape.samples // chunk), outputs, *kernel, inputs), dtype=torch.float32, device=x.device).movedim(
        -1, 2
    )
    s = parts.stride()
    part_stride = s if len(s) == 5 else (*s[:3], 0, s[3])
    coef = coef.contiguous()
    _conv(op, x, g, shape, groups, multiplicity, _plane(x), _plane(g), parts, part_stride, False, False, coef, chunk)
    weighted_sum_(out, parts, torch.ones(parts.shape[0], dtype=torch.float32, device=x.device))


def linear_clipped_sum_(out: Tensor, x: Tensor, g: Tensor, coef: Tensor, *, multiplicity: int) -> None:
    """:func:`conv_clipped_sum_` for a linear layer: out (p, d), x (R, T, d), g (R, T, p)."""
    op = "linear_clipped_sum_"
    samples, outputs, inputs = checks.linear_shape(op, x, g, multiplicity)
    checks.require(tuple(coef.shape) == (samples,), op, "shape of coef", tuple(coef.shape), f"({samples},)")
    checks.accumulator(op, "out", out, (outputs, inputs), x)
    if x.numel() == 0 or g.numel() == 0:
        return
    x, g = (_features_last(t) for t in _operands(x, g))
    chunk = _chunk(samples, _tiles(outputs) * _tiles(inputs))
    parts = torch.empty(-(-samples // chunk), outputs, inputs, dtype=torch.float32, device=x.device)
    strides = [(t.stride(0), t.stride(2), 0, t.stride(1)) for t in (x, g)]
    shape = _as_conv(samples, inputs, outputs, x.shape[1])
    _conv(op, x, g, shape, 1, multiplicity, *strides, parts, (*parts.stride(), 0, 0), False, False, coef.contiguous(), chunk)
    weighted_sum_(out, parts, torch.ones(parts.shape[0], dtype=torch.float32, device=x.device))


def _gram(
    op: str, x: Tensor, g: Tensor, shape: checks.ConvShape, groups: int, multiplicity: int, x_stride: Sequence[int],
    g_stride: Sequence[int],
) -> Tensor:  # fmt: skip
    side = _tiles(multiplicity * shape.out_size[0] * shape.out_size[1])
    sq_norms = torch.empty(shape.samples, dtype=torch.float64, device=x.device)
    partials = torch.empty(shape.samples * groups * side * (side + 1) // 2, dtype=torch.float64, device=x.device)
    with _launching(op, x=x, g=g) as where:
        native._C.conv_gram(
            x=_pointer(x), g=_pointer(g), x_dtype=_DTYPES[x.dtype], g_dtype=_DTYPES[g.dtype], samples=shape.samples,
            multiplicity=multiplicity, groups=groups, in_channels=shape.in_channels, out_channels=shape.out_channels,
            in_size=shape.in_size, out_size=shape.out_size, kernel=shape.kernel, stride=shape.stride,
            padding=shape.padding, dilation=shape.dilation, x_stride=x_stride, g_stride=g_stride,
            sq_norms=_pointer(sq_norms), num_threads=1, partials=_pointer(partials), partials_size=partials.numel(), **where,
        )  # fmt: skip
    return sq_norms


def conv_gram_norms(
    x: Tensor, g: Tensor, *, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, multiplicity: int,
) -> Tensor:  # fmt: skip
    op = "conv_gram_norms"
    shape = checks.conv_shape(op, x, g, kernel_size, stride, padding, dilation, groups, multiplicity)
    if x.numel() == 0 or g.numel() == 0:
        return torch.zeros(shape.samples, dtype=torch.float64, device=x.device)
    x, g = _operands(x, g)
    return _gram(op, x, g, shape, groups, multiplicity, _plane(x), _plane(g))


def linear_gram_norms(x: Tensor, g: Tensor, *, multiplicity: int) -> Tensor:
    op = "linear_gram_norms"
    samples, outputs, inputs = checks.linear_shape(op, x, g, multiplicity)
    if x.numel() == 0 or g.numel() == 0:
        return torch.zeros(samples, dtype=torch.float64, device=x.device)
    x, g = _operands(x, g)
    shape = _as_conv(samples, inputs, outputs, x.shape[1])
    return _gram(op, x, g, shape, 1, multiplicity, *((t.stride(0), t.stride(2), 0, t.stride(1)) for t in (x, g)))


def _affine(
    op: str, x: Tensor | None, g: Tensor, mean: Tensor | None, rstd: Tensor | None, *, channels_last: bool,
    per_position: bool, samples: int, multiplicity: int, channels: int, positions: int, groups: int,
    out_weight: Tensor | None, out_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, g: contiguous (R, C, S), or (R, S, C) with channels_last. x None: bias only."""
    rows = samples if x is not None else 0
    if not g.numel():
        weight = torch.zeros(rows, channels, dtype=torch.float32, device=g.device) if out_weight is None else out_weight
        bias = torch.zeros(samples, channels, dtype=torch.float32, device=g.device) if out_bias is None else out_bias
        return reference._sq_norms(weight), weight, reference._sq_norms(bias), bias
    mean, rstd = (t if t is None else t.float().contiguous() for t in (mean, rstd))
    weight = torch.empty(rows, channels, dtype=torch.float32, device=g.device) if out_weight is None else _dense(out_weight)
    bias = torch.empty(samples, channels, dtype=torch.float32, device=g.device) if out_bias is None else _dense(out_bias)
    sq_weight, sq_bias = (torch.empty(n, dtype=torch.float64, device=g.device) for n in (rows, samples))
    with _launching(op, x=x, g=g) as where:
        native._C.affine_grad(
            x=_pointer(x), g=_pointer(g), x_dtype=0 if x is None else _DTYPES[x.dtype], g_dtype=_DTYPES[g.dtype],
            channels_last=channels_last, per_position=per_position, mean=_pointer(mean), rstd=_pointer(rstd),
            samples=samples, multiplicity=multiplicity, channels=channels, positions=positions, groups=groups,
            weight=_pointer(weight), bias=_pointer(bias), accumulate_weight=out_weight is not None,
            accumulate_bias=out_bias is not None, sq_norms_weight=_pointer(sq_weight), sq_norms_bias=_pointer(sq_bias),
            num_threads=1, **where,
        )  # fmt: skip
    return sq_weight, _undense(out_weight, weight), sq_bias, _undense(out_bias, bias)


def bias_grad(g: Tensor, *, channel_dim: int, multiplicity: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _, _, sq_norms, bias = _affine("bias_grad", **affine.bias(g, channel_dim, multiplicity, out))
    return sq_norms, bias


def group_norm_affine_grad(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, *, num_groups: int, multiplicity: int,
    out_weight: Tensor | None = None, out_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _affine(
        "group_norm_affine_grad", **affine.group_norm(x, g, mean, rstd, num_groups, multiplicity, out_weight, out_bias)
    )


def layer_norm_affine_grad(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, *, multiplicity: int,
    out_weight: Tensor | None = None, out_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _affine("layer_norm_affine_grad", **affine.layer_norm(x, g, mean, rstd, multiplicity, out_weight, out_bias))


def group_norm(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, silu: bool, *,
    eps: float = 0.0, **outputs: Tensor | None,
) -> None:  # fmt: skip
    """The launch alone: :mod:`privimage_fast.ops.normalise` has seen to layouts. With g the backward pass, else the forward."""
    weight, bias, shift = (t if t is None else t.contiguous() for t in (weight, bias, shift))
    rows, channels, height, width = x.shape
    with _launching("group_norm", x=x, weight=weight) as where:
        native._C.group_norm(
            x=_pointer(x), dtype=_DTYPES[x.dtype], rows=rows, positions=height * width, channels=channels,
            groups=mean.shape[1], weight=_pointer(weight), bias=_pointer(bias), shift=_pointer(shift), eps=eps, silu=silu,
            mean=_pointer(mean), rstd=_pointer(rstd), **{name: _pointer(t) for name, t in outputs.items()}, **where,
        )  # fmt: skip


def residual(like: Tensor, scale: float, **tensors: Tensor | None) -> None:
    """The launch alone, as above; ``like`` is one of the images."""
    rows, channels, height, width = like.shape
    tensors = {name: t.contiguous() if t is not None and t.dim() == 1 else t for name, t in tensors.items()}
    with _launching("residual", like=like) as where:
        native._C.residual(
            dtype=_DTYPES[like.dtype], rows=rows, positions=height * width, channels=channels, scale=scale,
            **{name: _pointer(t) for name, t in tensors.items()}, **where,
        )  # fmt: skip


def embedding_grad(
    ids: Tensor, g: Tensor, *, num_embeddings: int, padding_idx: int | None, multiplicity: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "embedding_grad"
    samples, width = checks.embedding_shape(op, ids, g, num_embeddings, padding_idx, multiplicity)
    checks.accumulator(op, "out", out, (samples, num_embeddings, width), g)
    ids, g = ids.long().contiguous(), g.contiguous()
    table = torch.empty(samples, num_embeddings, width, dtype=torch.float32, device=g.device) if out is None else _dense(out)
    sq_norms = torch.empty(samples, dtype=torch.float64, device=g.device)
    with _launching(op, ids=ids, g=g) as where:
        native._C.embedding_grad(
            ids=_pointer(ids), g=_pointer(g), g_dtype=_DTYPES[g.dtype], samples=samples,
            positions=multiplicity * ids.shape[1], dim=width, num_embeddings=num_embeddings,
            padding_idx=-1 if padding_idx is None else padding_idx, out=_pointer(table), accumulate=out is not None,
            sq_norms=_pointer(sq_norms), num_threads=1, **where,
        )  # fmt: skip
    return sq_norms, _undense(out, table)


def clip_factors(sq_norms: Tensor, max_grad_norm: float, sample_weight: Tensor | None = None) -> Tensor:
    op = "clip_factors"
    checks.clip_arguments(op, sq_norms, max_grad_norm, sample_weight)
    sq_norms = sq_norms.double().contiguous()
    weight = None if sample_weight is None else sample_weight.double().contiguous()
    factors = torch.empty(sq_norms.shape[0], dtype=torch.float32, device=sq_norms.device)
    with _launching(op, sq_norms=sq_norms) as where:
        native._C.clip_factors(
            sq_norms=_pointer(sq_norms), sample_weight=_pointer(weight), max_grad_norm=max_grad_norm,
            samples=sq_norms.shape[0], factors=_pointer(factors), **where,
        )  # fmt: skip
    return factors


def weighted_sum_(out: Tensor | Sequence[Tensor], stored: Tensor | Sequence[Tensor], coef: Tensor) -> None:
    with _launching("weighted_sum_", coef=coef) as where:
        native.weighted_sum_(out, stored, coef, _device=where["device"])


def summed_private_step_(
    param: Tensor, grad_sum: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, ema: Tensor | None, *,
    sums: Sequence[Tensor], stored: Sequence[Tensor], coef: Tensor, **step: Any,
) -> None:  # fmt: skip
    with _launching("summed_private_step_", param=param, coef=coef) as where:
        native.summed_private_step_(
            param, grad_sum, exp_avg, exp_avg_sq, ema, sums=sums, stored=stored, coef=coef, _device=where["device"], **step
        )
