"""Every op in plain torch and numpy: the oracle of the native kernels, and what runs where they do not.

Right on any device. Outputs are float32, or float64 when an input is float64, so a test can hold a kernel against
double precision. A batch has R = B·K rows; sample b owns rows b·K … b·K+K−1 and its gradient is the sum over them.
``sq_norms`` are (B,) float64 squared L2 norms of exactly what is returned beside them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from privimage_fast.ops import checks


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _sq_norms(per_sample: Tensor) -> Tensor:
    if per_sample.shape[0] == 0:
        return torch.zeros(0, dtype=torch.float64, device=per_sample.device)
    return per_sample.reshape(per_sample.shape[0], -1).double().square().sum(1)


def _into(out: Tensor | None, value: Tensor) -> Tensor:
    return value if out is None else out.add_(value)


def _stored(out: Tensor | None, value: Tensor, store_dtype: torch.dtype) -> Tensor:
    """What is kept of ``value``: added to ``out``, or new; rounded where it is kept in bfloat16."""
    if out is None and store_dtype == torch.bfloat16:
        return value.to(store_dtype)
    return _into(out, value)


def conv_weight_grad(
    x: Tensor, g: Tensor, *, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, multiplicity: int, store: bool = True, out: Tensor | None = None,
    store_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Per-sample weight gradient of a 1-d or 2-d convolution with zero padding, and its squared norm.

    Args:
        x: (R, C, *spatial) input, float32, bfloat16 or float64, any strides.
        g: (R, P, *out_spatial) gradient of the output.
        kernel_size, stride, padding, dilation: tuples, one integer a spatial dimension.
        groups: as in ``torch.nn.functional.conv2d``.
        multiplicity: K.
        store: False returns norms only and never holds (B, P, C // groups, *kernel).
        out: (B, P, C // groups, *kernel), accumulated into (a module used more than once); the norm is then the sum's.
        store_dtype: float32, or bfloat16: gradients are rounded to it, to nearest even, and norms are those of the rounded ones.
            It is of new weights; ``out`` has its own dtype, and a bfloat16 one is rounded after each addition.

    Returns:
        (sq_norms (B,), weights (B, P, C // groups, *kernel) or None). The weights may be a permuted view.

    Raises:
        ValueError, TypeError: sizes that do not belong to one convolution.
    """
    op = "conv_weight_grad"
    shape = checks.conv_shape(op, x, g, kernel_size, stride, padding, dilation, groups, multiplicity)
    checks.accumulator(op, "out", out, shape.weight_shape, x, rounded=True)
    checks.store_dtype(op, store_dtype)
    checks.require(store or out is None, op, "out", "given", "None with store=False")
    if not store:
        norms = [
            conv_weight_grad(
                x[b * multiplicity : (b + 1) * multiplicity], g[b * multiplicity : (b + 1) * multiplicity],
                kernel_size=kernel_size, stride=stride, padding=padding, dilation=dilation, groups=groups,
                multiplicity=multiplicity,
            )[0]
            for b in range(shape.samples)
        ]  # fmt: skip
        return torch.cat(norms) if norms else torch.zeros(0, dtype=torch.float64, device=x.device), None

    samples, in_group, out_group = shape.samples, shape.in_channels // groups, shape.out_channels // groups
    dtype = _wide(x, g)
    x = x.to(dtype).reshape(x.shape[0], x.shape[1], *shape.in_size)
    g = g.to(dtype).reshape(samples, multiplicity, groups, out_group, *shape.out_size)
    (ph, pw), (sh, sw), (dh, dw), (oh, ow) = shape.padding, shape.stride, shape.dilation, shape.out_size
    x = F.pad(x, (pw, pw, ph, ph)).unflatten(0, (samples, multiplicity)).unflatten(2, (groups, in_group))
    weights = x.new_zeros(samples, groups, out_group, in_group, *shape.kernel)
    # One kernel offset at a time: a shifted view of the input instead of an unfolded copy of it.
    for i, j in itertools.product(*map(range, shape.kernel)):
        shifted = x[..., i * dh : i * dh + sh * (oh - 1) + 1 : sh, j * dw : j * dw + sw * (ow - 1) + 1 : sw]
        weights[..., i, j] = torch.einsum("bkgphw,bkgchw->bgpc", g, shifted)
    weights = _stored(out, weights.reshape(shape.weight_shape), store_dtype)
    return _sq_norms(weights), weights


def linear_weight_grad(
    x: Tensor, g: Tensor, *, multiplicity: int, store: bool = True, out: Tensor | None = None,
    store_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Per-sample weight gradient of a linear layer and its squared norm.

    Args:
        x: (R, T, d) input at T positions a row.
        g: (R, T, p) gradient of the output.
        multiplicity, store, out, store_dtype: as in :func:`conv_weight_grad`; out is (B, p, d).

    Returns:
        (sq_norms (B,), weights (B, p, d) or None).
    """
    op = "linear_weight_grad"
    samples, outputs, inputs = checks.linear_shape(op, x, g, multiplicity)
    checks.accumulator(op, "out", out, (samples, outputs, inputs), x, rounded=True)
    checks.store_dtype(op, store_dtype)
    checks.require(store or out is None, op, "out", "given", "None with store=False")
    dtype = _wide(x, g)
    positions = multiplicity * x.shape[1]
    x, g = x.to(dtype).reshape(samples, positions, inputs), g.to(dtype).reshape(samples, positions, outputs)
    if not store:
        return torch.cat([_sq_norms(g[b : b + 1].mT @ x[b : b + 1]) for b in range(samples)] or [_sq_norms(x)]), None
    weights = _stored(out, g.mT @ x, store_dtype)
    return _sq_norms(weights), weights


def linear_weight_grads(
    problems: Sequence[tuple[Tensor, Tensor]], *, multiplicity: int, store: bool = True,
    store_dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, Tensor | None]]:  # fmt: skip
    """:func:`linear_weight_grad` of several layers at once, with the same bits; on a GPU in few launches.

    Args:
        problems: pairs (x, g), each (R, T, d) and (R, T, p) with sizes of its own.
        multiplicity, store, store_dtype: as in :func:`linear_weight_grad`, the same for all.

    Returns:
        (sq_norms (B,), weights (B, p, d) or None) of each, in order.

    Raises:
        ValueError, TypeError: naming the problem by its place.
    """
    checks.linear_shapes("linear_weight_grads", problems, multiplicity)
    return [linear_weight_grad(x, g, multiplicity=multiplicity, store=store, store_dtype=store_dtype) for x, g in problems]


def conv_gram_norms(
    x: Tensor, g: Tensor, *, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, multiplicity: int,
) -> Tensor:  # fmt: skip
    """Squared norms of :func:`conv_weight_grad`'s gradients from inner products of positions; no gradient is formed.

    Cheaper than the gradient where a sample has few positions and many channels. Inner products are in double, since
    their sum may be far below its terms.

    Args:
        x, g, kernel_size, stride, padding, dilation, groups, multiplicity: as in :func:`conv_weight_grad`.

    Returns:
        (B,) float64, not negative; not finite where the sample's x or g is not.
    """
    op = "conv_gram_norms"
    shape = checks.conv_shape(op, x, g, kernel_size, stride, padding, dilation, groups, multiplicity)
    norms = torch.zeros(shape.samples, dtype=torch.float64, device=x.device)
    if x.numel() == 0 or g.numel() == 0:
        return norms
    x, g = x.reshape(*x.shape[:2], *shape.in_size), g.reshape(*g.shape[:2], *shape.out_size)
    # One group and one sample at a time: only that sample's unfolded input ever exists.
    for b in range(shape.samples):
        rows = slice(b * multiplicity, (b + 1) * multiplicity)
        for xs, gs in zip(x[rows].double().chunk(groups, 1), g[rows].double().chunk(groups, 1), strict=True):
            columns = F.unfold(xs, shape.kernel, dilation=shape.dilation, padding=shape.padding, stride=shape.stride)
            norms[b] += _position_norms(columns.mT, gs.flatten(2).mT, multiplicity)[0]
    return norms


def linear_gram_norms(x: Tensor, g: Tensor, *, multiplicity: int) -> Tensor:
    """Squared norms of :func:`linear_weight_grad`'s gradients from inner products of positions.

    ‖Σ_t g_t a_tᵀ‖² = ⟨A Aᵀ, G Gᵀ⟩ over a sample's K·T positions, in double.

    Args:
        x, g, multiplicity: as in :func:`linear_weight_grad`.

    Returns:
        (B,) float64, not negative; not finite where the sample's x or g is not.
    """
    samples, _, _ = checks.linear_shape("linear_gram_norms", x, g, multiplicity)
    if x.numel() == 0 or g.numel() == 0:
        return torch.zeros(samples, dtype=torch.float64, device=x.device)
    return _position_norms(x.double(), g.double(), multiplicity)


def _position_norms(x: Tensor, g: Tensor, multiplicity: int) -> Tensor:
    """x (R, T, d), g (R, T, p), float64 → (B,), not negative."""
    samples = x.shape[0] // multiplicity
    x, g = x.reshape(samples, -1, x.shape[-1]), g.reshape(samples, -1, g.shape[-1])
    norms = ((x @ x.mT) * (g @ g.mT)).sum((1, 2))
    # Rounding may leave a zero norm below zero; what is not finite has to stay so.
    return torch.where(norms.isfinite(), norms.clamp_min(0), norms.abs())


def bias_grad(g: Tensor, *, channel_dim: int, multiplicity: int, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Per-sample bias gradient: the sum of g over everything but sample and channel.

    Args:
        g: (R, …) with the P channels at ``channel_dim`` (1 for convolutions, -1 for linear layers).
        out: (B, P), accumulated into.

    Returns:
        (sq_norms (B,), bias (B, P)).
    """
    op = "bias_grad"
    samples, channels, dim = checks.bias_shape(op, g, channel_dim, multiplicity)
    checks.accumulator(op, "out", out, (samples, channels), g)
    positions = g.numel() // max(1, samples * channels)
    summed = g.to(_wide(g)).movedim(dim, -1).reshape(samples, positions, channels).sum(1)
    bias = _into(out, summed)
    return _sq_norms(bias), bias


def group_norm_affine_grad(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, *, num_groups: int, multiplicity: int,
    out_weight: Tensor | None = None, out_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Per-sample gradients of group norm's weight and bias.

    Args:
        x, g: (R, C, *spatial) input and gradient of the output.
        mean, rstd: (R, num_groups), as ``torch.native_group_norm`` returns them.
        out_weight, out_bias: (B, C), accumulated into.

    Returns:
        (sq_norms_weight (B,), weight (B, C), sq_norms_bias (B,), bias (B, C)).
    """
    samples = checks.group_norm_shape(x, g, mean, rstd, num_groups, multiplicity, out_weight, out_bias)
    rows, channels = x.shape[:2]
    dtype = _wide(x, g)
    positions = x.numel() // max(1, rows * channels)
    per_channel = [t.to(dtype).repeat_interleave(channels // num_groups, 1).unsqueeze(2) for t in (mean, rstd)]
    g = g.to(dtype).reshape(rows, channels, positions)
    normalised = (x.to(dtype).reshape(rows, channels, positions) - per_channel[0]) * per_channel[1]
    weight = _into(out_weight, (g * normalised).sum(2).unflatten(0, (samples, multiplicity)).sum(1))
    bias = _into(out_bias, g.sum(2).unflatten(0, (samples, multiplicity)).sum(1))
    return _sq_norms(weight), weight, _sq_norms(bias), bias


def layer_norm_affine_grad(
    x: Tensor, g: Tensor, mean: Tensor, rstd: Tensor, *, multiplicity: int,
    out_weight: Tensor | None = None, out_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Per-sample gradients of layer norm's weight and bias.

    Args:
        x, g: (R, T, D) input and gradient of the output, normalised over D.
        mean, rstd: (R, T).
        out_weight, out_bias: (B, D), accumulated into.

    Returns:
        (sq_norms_weight (B,), weight (B, D), sq_norms_bias (B,), bias (B, D)).
    """
    samples = checks.layer_norm_shape(x, g, mean, rstd, multiplicity, out_weight, out_bias)
    dtype = _wide(x, g)
    g = g.to(dtype)
    normalised = (x.to(dtype) - mean.to(dtype).unsqueeze(2)) * rstd.to(dtype).unsqueeze(2)
    weight = _into(out_weight, (g * normalised).sum(1).unflatten(0, (samples, multiplicity)).sum(1))
    bias = _into(out_bias, g.sum(1).unflatten(0, (samples, multiplicity)).sum(1))
    return _sq_norms(weight), weight, _sq_norms(bias), bias


def embedding_grad(
    ids: Tensor, g: Tensor, *, num_embeddings: int, padding_idx: int | None, multiplicity: int,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Per-sample gradient of an embedding table; a row looked up twice by one sample is summed before the norm.

    Args:
        ids: (R, T) int64, in [0, num_embeddings).
        g: (R, T, D) gradient of the looked-up rows.
        padding_idx: this row's gradient is dropped, as torch does; None for no such row.
        out: (B, num_embeddings, D), accumulated into.

    Returns:
        (sq_norms (B,), table (B, num_embeddings, D)).
    """
    op = "embedding_grad"
    samples, width = checks.embedding_shape(op, ids, g, num_embeddings, padding_idx, multiplicity)
    checks.accumulator(op, "out", out, (samples, num_embeddings, width), g)
    dtype = _wide(g)
    g = g.to(dtype)
    if padding_idx is not None:
        g = torch.where((ids == padding_idx).unsqueeze(2), 0.0, g)
    sample = torch.arange(samples, device=ids.device).repeat_interleave(multiplicity).unsqueeze(1)
    flat = torch.zeros(samples * num_embeddings, width, dtype=dtype, device=g.device)
    flat.index_add_(0, (sample * num_embeddings + ids).flatten(), g.reshape(-1, width))
    table = _into(out, flat.view(samples, num_embeddings, width))
    return _sq_norms(table), table


def clip_factors(sq_norms: Tensor, max_grad_norm: float, sample_weight: Tensor | None = None) -> Tensor:
    """weight · min(1, C / norm) for each sample, (B,) float32.

    Formal guarantees: rounded toward zero, so factor · norm ≤ weight · C(1 + 1e-6) for every finite norm; exactly 0
    where the norm is inf or NaN: such a sample contributes zero.

    Args:
        sq_norms: (B,) squared norms, float64.
        max_grad_norm: C, finite and positive.
        sample_weight: (B,), 0 for padding rows of a fixed-shape batch and 1 otherwise.
    """
    checks.clip_arguments("clip_factors", sq_norms, max_grad_norm, sample_weight)
    norm = sq_norms.double().sqrt()
    factor = torch.where(torch.isfinite(norm), (max_grad_norm / norm).clamp(max=1.0), 0.0)
    if sample_weight is not None:
        factor = factor * sample_weight.to(factor)
    rounded = factor.float()
    toward_zero = torch.nextafter(rounded, torch.zeros_like(rounded))
    return torch.where(rounded.double().abs() > factor.abs(), toward_zero, rounded)


def weighted_sum_(out: Tensor | Sequence[Tensor], stored: Tensor | Sequence[Tensor], coef: Tensor) -> None:
    """out += Σ_b coef_b · stored_b, for one layer or a list of layers.

    A sample whose coefficient is 0 is skipped, so it adds nothing even if its stored gradient holds inf or NaN.

    Args:
        out: float32 tensor(s) of any shape, changed in place (float64 is accepted too).
        stored: tensor(s) (B, *out.shape), float32 or bfloat16.
        coef: (B,) float32.
    """
    outs, stores = checks.sum_arguments("weighted_sum_", out, stored, coef)
    keep = (coef != 0).nonzero().flatten()
    for o, s in zip(outs, stores, strict=True):
        if keep.numel():
            o.add_(torch.tensordot(coef[keep].to(o.dtype), s[keep].to(o.dtype), dims=1))


def chacha20_block(key: bytes, counter: int, nonce: Sequence[int]) -> bytes:
    """One 64-byte ChaCha20 block, RFC 8439 section 2.3.

    Args:
        key: 32 bytes.
        counter: word 12.
        nonce: words 13, 14 and 15.
    """
    checks.noise_arguments("chacha20_block", key, 0, 0, 0, 0, 0)
    words = _chacha20(key, np.array([counter], dtype=np.uint32), nonce)
    return words[0].astype("<u4").tobytes()


def _chacha20(key: bytes, counters: np.ndarray, nonce: Sequence[int]) -> np.ndarray:
    """(len(counters), 16) uint32 output words."""
    start = np.empty((16, len(counters)), dtype=np.uint32)
    start[:4] = np.frombuffer(b"expand 32-byte k", dtype="<u4")[:, None]
    start[4:12] = np.frombuffer(key, dtype="<u4")[:, None]
    start[12] = counters
    start[13:] = np.array(nonce, dtype=np.uint32)[:, None]
    state = start.copy()

    def mix(a: int, b: int, c: int, d: int) -> None:
        for first, second, target, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[first] += state[second]
            state[target] ^= state[first]
            state[target] = (state[target] << np.uint32(turn)) | (state[target] >> np.uint32(32 - turn))

    for _ in range(10):
        for i in range(4):
            mix(i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            mix(i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return (state + start).T


def gaussian_noise(key: bytes, *, step: int, rank: int, stream: int, n: int, offset: int = 0) -> np.ndarray:
    """n standard normals, a pure function of its arguments: ChaCha20 (RFC 8439) and Box–Muller in double precision.

    Block i of the cipher (word 12; the nonce words 13–15 are stream, rank, step) gives normals 8i … 8i+7: each pair of
    64-bit words, cut to 53 bits, gives uniforms u = (m + ½)·2⁻⁵³ and the normals √(−2 ln u₀)·(cos, sin)(2πu₁).

    Args:
        key: 32 secret bytes.
        step, rank, stream: what the noise is for; two uses must differ in one of them or in the offset range.
        n, offset: normals offset … offset+n−1 of that stream.

    Returns:
        (n,) float64.

    Raises:
        ValueError: past 2³² blocks, where the counter would wrap and noise would repeat.
    """
    checks.noise_arguments("gaussian_noise", key, step, rank, stream, n, offset)
    first, last = offset // 8, -(-(offset + n) // 8)
    normals = np.empty((last - first) * 8)
    for at in range(first, last, 1 << 16):  # bounded working memory
        words = _chacha20(key, np.arange(at, min(at + (1 << 16), last)).astype(np.uint32), (stream, rank, step))
        bits = np.ascontiguousarray(words.astype("<u4")).view("<u8") >> np.uint64(11)
        uniform = (bits.astype(np.float64) + 0.5) * 2.0**-53
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:, 0::2])), 2.0 * np.pi * uniform[:, 1::2]
        pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2)
        normals[(at - first) * 8 : (at - first) * 8 + pairs.size] = pairs.ravel()
    return normals[offset - first * 8 :][:n]


def private_step_(
    param: Tensor, grad_sum: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, ema: Tensor | None, *,
    noise_std: float, denominator: float, key: bytes, step: int, rank: int, stream: int, optimizer: str, lr: float,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0, momentum: float = 0.0,
    optimizer_step: int = 1, ema_decay: float = 0.0, offset: int = 0, grad_out: Tensor | None = None,
) -> None:  # fmt: skip
    """Noise, division, optimizer update and EMA in place: g = (grad_sum + noise_std·N(0, I)) / denominator.

    The update is torch.optim's SGD, Adam or AdamW; ``grad_sum`` is zeroed for the next batch.

    Args:
        param, grad_sum: flat (n,) float32 (all tensors float64 is accepted too).
        exp_avg: first moment, or SGD's momentum buffer; untouched by SGD without momentum.
        exp_avg_sq: second moment, for Adam and AdamW.
        ema: exponential moving average of the parameters, or None.
        noise_std: noise_multiplier · max_grad_norm; 0 draws no noise.
        denominator: the public expected batch size.
        key, step, rank, stream, offset: as in :func:`gaussian_noise`; element i gets normal offset + i.
        optimizer: "sgd", "adam" or "adamw".
        optimizer_step: 1 at the first step, for the bias correction.
        grad_out: (n,), receives the noisy gradient.
    """
    tensors = {
        "param": param, "grad_sum": grad_sum, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "ema": ema,
        "grad_out": grad_out,
    }  # fmt: skip
    checks.step_arguments("private_step_", tensors, optimizer, momentum, noise_std, denominator, optimizer_step)
    checks.noise_arguments("private_step_", key, step, rank, stream, param.numel(), offset)
    noise = None
    if noise_std:
        noise = gaussian_noise(key, step=step, rank=rank, stream=stream, n=param.numel(), offset=offset)
    step_with_noise_(
        param, grad_sum, exp_avg, exp_avg_sq, ema, noise, noise_std=noise_std, denominator=denominator,
        optimizer=optimizer, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum,
        optimizer_step=optimizer_step, ema_decay=ema_decay, grad_out=grad_out,
    )  # fmt: skip


def summed_private_step_(
    param: Tensor, grad_sum: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, ema: Tensor | None, *,
    sums: Sequence[Tensor], stored: Sequence[Tensor], coef: Tensor, **step: Any,
) -> None:  # fmt: skip
    """:func:`weighted_sum_` of the last micro-batch, then :func:`private_step_`: one pass where a kernel does it, the same bits.

    Args:
        param, grad_sum, exp_avg, exp_avg_sq, ema: as in :func:`private_step_`.
        sums: views of ``grad_sum``, contiguous, no element in two of them.
        stored: a tensor (B, *shape) for each of them.
        coef: (B,) float32; a sample whose coefficient is 0 is skipped, whatever it holds.
        step: the keywords of :func:`private_step_`.
    """
    sums, stored = checks.summed_step_arguments("summed_private_step_", grad_sum, sums, stored, coef)
    weighted_sum_(sums, stored, coef)
    private_step_(param, grad_sum, exp_avg, exp_avg_sq, ema, **step)


def step_with_noise_(
    param: Tensor, grad_sum: Tensor, exp_avg: Tensor | None, exp_avg_sq: Tensor | None, ema: Tensor | None,
    noise: np.ndarray | None, *, noise_std: float, denominator: float, optimizer: str, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, momentum: float, optimizer_step: int,
    ema_decay: float, grad_out: Tensor | None,
) -> None:  # fmt: skip
    """The arithmetic of :func:`private_step_` once the noise is drawn; arguments are checked there."""
    total = grad_sum.double()
    if noise is not None:
        # Signal and noise are added in double and rounded once.
        total = total + noise_std * torch.from_numpy(noise).to(total.device)
    grad = (total / denominator).to(param.dtype)
    if grad_out is not None:
        grad_out.copy_(grad)
    grad_sum.zero_()
    if optimizer == "adamw":
        param.mul_(1 - lr * weight_decay)
    elif weight_decay:
        grad = grad + weight_decay * param
    if optimizer == "sgd":
        if momentum:
            assert exp_avg is not None
            grad = exp_avg.mul_(momentum).add_(grad)
        param.sub_(grad, alpha=lr)
    else:
        assert exp_avg is not None and exp_avg_sq is not None
        exp_avg.lerp_(grad, 1 - betas[0])
        exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
        correction1, correction2 = 1 - betas[0] ** optimizer_step, 1 - betas[1] ** optimizer_step
        denominators = exp_avg_sq.sqrt().div_(correction2**0.5).add_(eps)
        param.addcdiv_(exp_avg, denominators, value=-lr / correction1)
    if ema is not None:
        ema.lerp_(param, 1 - ema_decay)
