"""The ops on the extension ``privimage_fast._C``: checks, pointers and strides, nothing else.

Same names and signatures as :mod:`privimage_fast.ops.reference`, whose docstrings hold the contract. Importing this
module never fails; ``IMPORT_ERROR`` says why the extension is absent.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privimage_fast.ops import affine, checks, reference

_C: Any = None
IMPORT_ERROR: str | None = None
try:
    from privimage_fast import _C  # type: ignore[no-redef,attr-defined]
except ImportError as error:
    IMPORT_ERROR = str(error)
    logging.getLogger("privimage_fast").info("native kernels are not available (%s): ops run on plain torch", error)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_HAS_CUDA = bool(_C and _C.build_info()["cuda"])
_ALGORITHMS = {"auto": 0, "direct": 1, "winograd2": 2, "winograd4": 3}
_OPTIMIZERS = {"sgd": 0, "adam": 1, "adamw": 2}
_FLOATS = frozenset(_DTYPES)
_FLOAT32 = frozenset({torch.float32})
_PART = 2**18  # floats that wait to be rounded
_STATS = frozenset({torch.float32, torch.bfloat16})

# What each op has kernels for; anything else runs on the reference.
_SUPPORTED: dict[str, frozenset[torch.dtype]] = {
    "conv_weight_grad": _FLOATS,
    "linear_weight_grad": _FLOATS,
    "linear_weight_grads": _FLOATS,
    "conv_gram_norms": _FLOATS,
    "linear_gram_norms": _FLOATS,
    "bias_grad": _FLOATS,
    "group_norm_affine_grad": _STATS,
    "layer_norm_affine_grad": _STATS,
    "embedding_grad": _FLOATS | {torch.int64, torch.int32},
    "clip_factors": frozenset({torch.float64, torch.float32}),
    "weighted_sum_": _FLOATS,
    "summed_private_step_": _FLOATS,
    "gaussian_noise": frozenset(),
    "chacha20_block": frozenset(),
    "private_step_": frozenset({torch.float32, torch.float64}),
}


@functools.cache
def cuda_usable() -> bool:
    """Whether this build's kernels can run on this machine; says once why not, where there is a GPU."""
    if not _HAS_CUDA:
        return False
    problem = _C.cuda_problem()
    if problem:
        logging.getLogger("privimage_fast").warning("CUDA kernels are not used (%s): ops on the GPU run on plain torch", problem)
    return not problem


def supports(op: str, tensors: Sequence[Tensor]) -> bool:
    """Whether ``op`` has a native kernel for these tensors: strided CPU memory of a known dtype."""
    if _C is None:
        return False
    if op == "private_step_":  # the noise is always native; the arithmetic falls back inside
        return True
    return all(t.layout == torch.strided and t.device.type == "cpu" and t.dtype in _SUPPORTED[op] for t in tensors)


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _norms(samples: int) -> Tensor:
    return torch.empty(samples, dtype=torch.float64, device="cpu")


def _plane(t: Tensor) -> tuple[int, ...]:
    """Strides of row, channel, height and width."""
    return t.stride() if t.dim() == 4 else (t.stride(0), t.stride(1), 0, t.stride(2))


def _conv(
    x: Tensor, g: Tensor, shape: checks.ConvShape, groups: int, multiplicity: int, x_stride: Sequence[int],
    g_stride: Sequence[int], weights: Tensor | None, weight_stride: Sequence[int], accumulate: bool,
    algorithm: str = "auto",
) -> Tensor:  # fmt: skip
    sq_norms = _norms(shape.samples)
    _C.conv_weight_grad(
        x=_pointer(x), g=_pointer(g), x_dtype=_DTYPES[x.dtype], g_dtype=_DTYPES[g.dtype], samples=shape.samples,
        multiplicity=multiplicity, groups=groups, in_channels=shape.in_channels, out_channels=shape.out_channels,
        in_size=shape.in_size, out_size=shape.out_size, kernel=shape.kernel, stride=shape.stride,
        padding=shape.padding, dilation=shape.dilation, x_stride=x_stride, g_stride=g_stride, out=_pointer(weights),
        out_stride=weight_stride, accumulate=accumulate, sq_norms=_pointer(sq_norms),
        algorithm=_ALGORITHMS[algorithm], num_threads=torch.get_num_threads(),
    )  # fmt: skip
    return sq_norms


def conv_weight_grad(
    x: Tensor, g: Tensor, *, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, multiplicity: int, store: bool = True, out: Tensor | None = None,
    store_dtype: torch.dtype = torch.float32, _algorithm: str = "auto",
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    op = "conv_weight_grad"
    shape = checks.conv_shape(op, x, g, kernel_size, stride, padding, dilation, groups, multiplicity)
    checks.require(_algorithm in _ALGORITHMS, op, "_algorithm", _algorithm, "auto, direct, winograd2 or winograd4")
    if _algorithm.startswith("winograd"):
        plain = shape.kernel == (3, 3) and shape.stride == (1, 1) and shape.dilation == (1, 1)
        checks.require(plain, op, "_algorithm", _algorithm, "direct: Winograd's form is for 3×3, stride 1, dilation 1")
    checks.accumulator(op, "out", out, shape.weight_shape, x, rounded=True)
    checks.store_dtype(op, store_dtype)
    checks.require(store or out is None, op, "out", "given", "None with store=False")
    options: dict[str, Any] = {
        "kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation, "groups": groups,
        "multiplicity": multiplicity,
    }  # fmt: skip
    if x.numel() == 0 or g.numel() == 0:
        return reference.conv_weight_grad(x, g, store=store, out=out, store_dtype=store_dtype, **options)

    weights = out
    if store and weights is None:
        # Channels innermost, the order in which the kernel produces them; weighted_sum_ puts the sum in torch's order.
        b, outputs, inputs, *kernel = shape.weight_shape
        weights = torch.empty((b, outputs, *kernel, inputs), dtype=store_dtype, device="cpu").movedim(-1, 2)
    if weights is not None and weights.dtype == torch.bfloat16:
        compute = functools.partial(conv_weight_grad, _algorithm=_algorithm, **options)
        return _round_parts(compute, x, g, multiplicity, weights, out is not None), weights
    weight_stride: tuple[int, ...] = (0,) * 5
    if weights is not None:
        s = weights.stride()
        weight_stride = s if len(s) == 5 else (*s[:3], 0, s[3])
    sq_norms = _conv(x, g, shape, groups, multiplicity, _plane(x), _plane(g), weights, weight_stride, out is not None, _algorithm)
    return sq_norms, weights


def _round_parts(
    compute: Callable[..., tuple[Tensor, Tensor | None]],
    x: Tensor,
    g: Tensor,
    multiplicity: int,
    weights: Tensor,
    accumulate: bool,
) -> Tensor:
    """Per-sample gradients in bfloat16, made in float32 for a few samples at a time; squared norms of what is then in weights."""
    threads = torch.get_num_threads()
    step = threads * max(1, _PART // (threads * weights[0].numel()))
    norms = []
    for b in range(0, len(weights), step):
        rows = slice(b * multiplicity, (b + step) * multiplicity)
        _, part = compute(x[rows], g[rows])
        assert part is not None
        into = weights[b : b + step]
        into.copy_(into + part if accumulate else part)
        exact = into.reshape(len(into), -1).double()
        norms.append(torch.linalg.vecdot(exact, exact))
    return torch.cat(norms)


def linear_weight_grad(
    x: Tensor, g: Tensor, *, multiplicity: int, store: bool = True, out: Tensor | None = None,
    store_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    op = "linear_weight_grad"
    samples, outputs, inputs = checks.linear_shape(op, x, g, multiplicity)
    checks.accumulator(op, "out", out, (samples, outputs, inputs), x, rounded=True)
    checks.store_dtype(op, store_dtype)
    checks.require(store or out is None, op, "out", "given", "None with store=False")
    if x.numel() == 0 or g.numel() == 0:
        return reference.linear_weight_grad(x, g, multiplicity=multiplicity, store=store, out=out, store_dtype=store_dtype)
    weights = torch.empty((samples, outputs, inputs), dtype=store_dtype, device="cpu") if store and out is None else out
    if weights is not None and weights.dtype == torch.bfloat16:
        compute = functools.partial(linear_weight_grad, multiplicity=multiplicity)
        return _round_parts(compute, x, g, multiplicity, weights, out is not None), weights
    # A 1×1 convolution over T positions, told by strides alone.
    positions, one = x.shape[1], (1, 1)
    shape = checks.ConvShape(
        samples, inputs, outputs, (1, positions), (1, positions), one, one, (0, 0), one, (samples, outputs, inputs)
    )
    weight_stride = (0,) * 5 if weights is None else (*weights.stride(), 0, 0)
    strides = [(t.stride(0), t.stride(2), 0, t.stride(1)) for t in (x, g)]
    return _conv(x, g, shape, 1, multiplicity, *strides, weights, weight_stride, out is not None), weights


def linear_weight_grads(
    problems: Sequence[tuple[Tensor, Tensor]], *, multiplicity: int, store: bool = True,
    store_dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor | None]]:  # fmt: skip
    checks.linear_shapes("linear_weight_grads", problems, multiplicity)
    return [linear_weight_grad(x, g, multiplicity=multiplicity, store=store, store_dtype=store_dtype) for x, g in problems]


def _gram(
    x: Tensor, g: Tensor, shape: checks.ConvShape, groups: int, multiplicity: int, x_stride: Sequence[int],
    g_stride: Sequence[int],
) -> Tensor:  # fmt: skip
    sq_norms = _norms(shape.samples)
    _C.conv_gram(
        x=_pointer(x), g=_pointer(g), x_dtype=_DTYPES[x.dtype], g_dtype=_DTYPES[g.dtype], samples=shape.samples,
        multiplicity=multiplicity, groups=groups, in_channels=shape.in_channels, out_channels=shape.out_channels,
        in_size=shape.in_size, out_size=shape.out_size, kernel=shape.kernel, stride=shape.stride,
        padding=shape.padding, dilation=shape.dilation, x_stride=x_stride, g_stride=g_stride,
        sq_norms=_pointer(sq_norms), num_threads=torch.get_num_threads(),
    )  # fmt: skip
    return sq_norms


def conv_gram_norms(
    x: Tensor, g: Tensor, *, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, multiplicity: int,
) -> Tensor:  # fmt: skip
    op = "conv_gram_norms"
    shape = checks.conv_shape(op, x, g, kernel_size, stride, padding, dilation, groups, multiplicity)
    if x.numel() == 0 or g.numel() == 0:
        return torch.zeros(shape.samples, dtype=torch.float64, device="cpu")
    return _gram(x, g, shape, groups, multiplicity, _plane(x), _plane(g))


def linear_gram_norms(x: Tensor, g: Tensor, *, multiplicity: int) -> Tensor:
    samples, outputs, inputs = checks.linear_shape("linear_gram_norms", x, g, multiplicity)
    if x.numel() == 0 or g.numel() == 0:
        return torch.zeros(samples, dtype=torch.float64, device="cpu")
    # As in linear_weight_grad, a 1×1 convolution.
    positions, one = x.shape[1], (1, 1)
    shape = checks.ConvShape(samples, inputs, outputs, (1, positions), (1, positions), one, one, (0, 0), one, ())
    return _gram(x, g, shape, 1, multiplicity, *((t.stride(0), t.stride(2), 0, t.stride(1)) for t in (x, g)))


def _affine(
    x: Tensor | None, g: Tensor, mean: Tensor | None, rstd: Tensor | None, *, channels_last: bool, per_position: bool,
    samples: int, multiplicity: int, channels: int, positions: int, groups: int, out_weight: Tensor | None,
    out_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, g: contiguous (R, C, S), or (R, S, C) with channels_last. x None: bias only."""
    if g.numel():
        mean, rstd = (t if t is None else t.float().contiguous() for t in (mean, rstd))
        weight = (
            torch.empty(samples if x is not None else 0, channels, dtype=torch.float32, device="cpu")
            if out_weight is None
            else _dense(out_weight)
        )
        bias = torch.empty(samples, channels, dtype=torch.float32, device="cpu") if out_bias is None else _dense(out_bias)
        sq_weight, sq_bias = _norms(weight.shape[0]), _norms(samples)
        _C.affine_grad(
            x=_pointer(x), g=_pointer(g), x_dtype=0 if x is None else _DTYPES[x.dtype], g_dtype=_DTYPES[g.dtype],
            channels_last=channels_last, per_position=per_position, mean=_pointer(mean), rstd=_pointer(rstd),
            samples=samples, multiplicity=multiplicity, channels=channels, positions=positions, groups=groups,
            weight=_pointer(weight), bias=_pointer(bias), accumulate_weight=out_weight is not None,
            accumulate_bias=out_bias is not None, sq_norms_weight=_pointer(sq_weight), sq_norms_bias=_pointer(sq_bias),
            num_threads=torch.get_num_threads(),
        )  # fmt: skip
        weight, bias = _undense(out_weight, weight), _undense(out_bias, bias)
        return sq_weight, weight, sq_bias, bias
    weight = (
        torch.zeros(samples if x is not None else 0, channels, dtype=torch.float32, device="cpu")
        if out_weight is None
        else out_weight
    )
    bias = torch.zeros(samples, channels, dtype=torch.float32, device="cpu") if out_bias is None else out_bias
    return reference._sq_norms(weight), weight, reference._sq_norms(bias), bias


def _dense(out: Tensor) -> Tensor:
    return out.contiguous()


def _undense(out: Tensor | None, dense: Tensor) -> Tensor:
    """What was accumulated, in the caller's own tensor."""
    if out is None:
        return dense
    return out if out.data_ptr() == dense.data_ptr() else out.copy_(dense)


def bias_grad(g: Tensor, *, channel_dim: int, multiplicity: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _, _, sq_norms, bias = _affine(**affine.bias(g, channel_dim, multiplicity, out))
    return sq_norms, bias


def group_norm_affine_grad(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, *, num_groups: int, multiplicity: int,
    out_weight: Tensor | None = None, out_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _affine(**affine.group_norm(x, g, mean, rstd, num_groups, multiplicity, out_weight, out_bias))


def layer_norm_affine_grad(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, *, multiplicity: int,
    out_weight: Tensor | None = None, out_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _affine(**affine.layer_norm(x, g, mean, rstd, multiplicity, out_weight, out_bias))


def embedding_grad(
    ids: Tensor, g: Tensor, *, num_embeddings: int, padding_idx: int | None, multiplicity: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    op = "embedding_grad"
    samples, width = checks.embedding_shape(op, ids, g, num_embeddings, padding_idx, multiplicity)
    checks.accumulator(op, "out", out, (samples, num_embeddings, width), g)
    ids, g = ids.long().contiguous(), g.contiguous()
    table = torch.empty((samples, num_embeddings, width), dtype=torch.float32, device="cpu") if out is None else _dense(out)
    sq_norms = _norms(samples)
    _C.embedding_grad(
        ids=_pointer(ids), g=_pointer(g), g_dtype=_DTYPES[g.dtype], samples=samples,
        positions=multiplicity * ids.shape[1], dim=width, num_embeddings=num_embeddings,
        padding_idx=-1 if padding_idx is None else padding_idx, out=_pointer(table), accumulate=out is not None,
        sq_norms=_pointer(sq_norms), num_threads=torch.get_num_threads(),
    )  # fmt: skip
    return sq_norms, _undense(out, table)


def clip_factors(sq_norms: Tensor, max_grad_norm: float, sample_weight: Tensor | None = None) -> Tensor:
    checks.clip_arguments("clip_factors", sq_norms, max_grad_norm, sample_weight)
    sq_norms = sq_norms.double().contiguous()
    weight = None if sample_weight is None else sample_weight.double().contiguous()
    factors = torch.empty(sq_norms.shape[0], dtype=torch.float32, device="cpu")  # whatever torch.set_default_device says
    _C.clip_factors(
        sq_norms=_pointer(sq_norms), sample_weight=_pointer(weight), max_grad_norm=max_grad_norm,
        samples=sq_norms.shape[0], factors=_pointer(factors),
    )  # fmt: skip
    return factors


def _sum_item(out: Tensor, stored: Tensor) -> tuple[tuple[int, ...], Tensor]:
    """The kernel's view of one layer, and the stored tensor it points into."""
    size, dtype = out.numel(), _DTYPES[stored.dtype]
    sample = stored[0]
    if sample.is_contiguous():
        return (_pointer(out), _pointer(stored), stored.stride(0), 1, 1, size, dtype), stored
    if sample.dim() >= 3 and sample.movedim(1, -1).is_contiguous():  # as conv_weight_grad stores it
        outer, channels = sample.shape[:2]
        return (_pointer(out), _pointer(stored), stored.stride(0), outer, size // (outer * channels), channels, dtype), stored
    stored = stored.contiguous()
    return (_pointer(out), _pointer(stored), size, 1, 1, size, dtype), stored


def _sum_items(outs: Sequence[Tensor], stored: Sequence[Tensor]) -> tuple[list[tuple[int, ...]], list[Tensor]]:
    """The kernel's view of all layers that have elements, and the tensors it points into."""
    found = [_sum_item(o, s) for o, s in zip(outs, stored, strict=True) if o.numel()]
    return [item for item, _ in found], [kept for _, kept in found]


def weighted_sum_(
    out: Tensor | Sequence[Tensor], stored: Tensor | Sequence[Tensor], coef: Tensor, *, _device: str | None = None
) -> None:
    outs, stores = checks.sum_arguments("weighted_sum_", out, stored, coef)
    if coef.shape[0] == 0 or not outs:
        return
    coef = coef.float().contiguous()
    dense = [_dense(o) for o in outs]
    items, _alive = _sum_items(dense, stores)
    device = _device or coef.device.type
    with torch.cuda.device(coef.device) if device == "cuda" else _Nothing():
        _C.weighted_sum(
            device=device, items=items, coef=_pointer(coef), samples=coef.shape[0], num_threads=torch.get_num_threads(),
            stream=torch.cuda.current_stream().cuda_stream if device == "cuda" else 0,
        )  # fmt: skip
    for o, d in zip(outs, dense, strict=True):
        _undense(o, d)


def refuse_capture(op: str, t: Tensor) -> None:
    """A captured launch keeps its step number: every replay would add the same noise, and two results would cancel it."""
    if not torch.cuda.is_initialized():
        return
    with torch.cuda.device(t.device if t.is_cuda else -1):  # streams belong to a device; -1 is the current one
        captured = torch.cuda.is_current_stream_capturing()
    if captured:
        raise RuntimeError(
            f"{op} is being captured in a CUDA graph, whose replays would repeat its noise; call it outside of the graph (a step "
            "that may be captured is ArmedStep.launch)"
        )


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


def chacha20_block(key: bytes, counter: int, nonce: Sequence[int]) -> bytes:
    checks.noise_arguments("chacha20_block", key, 0, 0, 0, 0, 0)
    return _C.chacha20_block(key, counter, tuple(nonce))


def gaussian_noise(key: bytes, *, step: int, rank: int, stream: int, n: int, offset: int = 0) -> np.ndarray:
    checks.noise_arguments("gaussian_noise", key, step, rank, stream, n, offset)
    normals = np.empty(n)
    _C.gaussian_noise(
        key=key, step=step, rank=rank, stream=stream, offset=offset, size=n, out=normals.ctypes.data,
        num_threads=torch.get_num_threads(),
    )  # fmt: skip
    return normals


def private_step_(
    param: Tensor, grad_sum: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, ema: Tensor | None, *,
    noise_std: float, denominator: float, key: bytes, step: int, rank: int, stream: int, optimizer: str, lr: float,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.0,
    optimizer_step: int = 1, ema_decay: float = 0.0, offset: int = 0, grad_out: Tensor | None = None,
    _device: str | None = None, _summed: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    tensors = {
        "param": param, "grad_sum": grad_sum, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema,
        "grad_out": grad_out,
    }  # fmt: skip
    checks.step_arguments("private_step_", tensors, optimizer, momentum, noise_std, denominator, optimizer_step)
    checks.noise_arguments("private_step_", key, step, rank, stream, param.numel(), offset)
    device = _device or param.device.type
    native_here = device in ("cpu", "emulated") or (device == "cuda" and cuda_usable())
    if param.dtype != torch.float32 or not native_here:
        noise = None
        if noise_std:
            noise = gaussian_noise(key, step=step, rank=rank, stream=stream, n=param.numel(), offset=offset)
        reference.step_with_noise_(
            param, grad_sum, exp_avg, exp_avg_sq, ema, noise, noise_std=noise_std, denominator=denominator,
            optimizer=optimizer, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum,
            optimizer_step=optimizer_step, ema_decay=ema_decay, grad_out=grad_out,
        )  # fmt: skip
        return
    if device == "cuda" and noise_std:
        refuse_capture("private_step_", param)
    if optimizer == "sgd":
        exp_avg, exp_avg_sq = (exp_avg if momentum else None), None
    with torch.cuda.device(param.device) if device == "cuda" else _Nothing():
        _C.private_step(
            device=device, param=_pointer(param), grad_sum=_pointer(grad_sum), exp_avg=_pointer(exp_avg),
            exp_avg_sq=_pointer(exp_avg_sq), ema=_pointer(ema), grad_out=_pointer(grad_out), size=param.numel(),
            key=key, step=step, rank=rank, stream=stream, offset=offset, noise_std=noise_std, denominator=denominator,
            optimizer=_OPTIMIZERS[optimizer], lr=lr, beta1=betas[0], beta2=betas[1], eps=eps,
            weight_decay=weight_decay, momentum=momentum, ema_decay=ema_decay, optimizer_step=optimizer_step,
            num_threads=torch.get_num_threads(),
            cuda_stream=torch.cuda.current_stream().cuda_stream if device == "cuda" else 0, **(_summed or {}),
        )  # fmt: skip


def summed_private_step_(
    param: Tensor, grad_sum: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, ema: Tensor | None, *,
    sums: Sequence[Tensor], stored: Sequence[Tensor], coef: Tensor, _device: str | None = None, **step: Any,
) -> None:  # fmt: skip
    sums, stored = checks.summed_step_arguments("summed_private_step_", grad_sum, sums, stored, coef)
    coef = coef.float().contiguous()
    items, _alive = _sum_items(sums, stored) if len(coef) else ([], [])
    summed = {"items": items, "coef": _pointer(coef), "samples": len(coef)}
    private_step_(param, grad_sum, exp_avg, exp_avg_sq, ema, _device=_device, _summed=summed, **step)
