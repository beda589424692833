"""Five hundred random layer configurations against the double-precision per-sample loop.

Each seed draws a family, its options, a memory layout, B, K, a strategy, C, and sometimes a memory budget. Five things are
asked of each: norms and clipped sum equal the loop's; no sample adds more than C(1 + 1e-6), taken in double from the sum that
is returned; none that is clipped adds less than C(1 − 2e-5); padding changes nothing; parts of the batch add up to the whole.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_matches_loop, per_sample_loop
from torch import Tensor, nn

import privimage_fast as pf

CONFIGURATIONS = 500
STRATEGIES = ("auto", "store", "gram", "norm-only")
TOLERANCE = 2e-5  # relative, fp32 against double


@dataclass
class Case:
    module: nn.Module
    args: tuple[Tensor, ...]
    multiplicity: int
    text: str = ""
    options: dict[str, Any] = field(default_factory=dict)


class Framed(nn.Module):
    """A raw parameter before the layer, whose gradient is right only if the layer's input gradient is; a bend after it."""

    def __init__(self, layer: nn.Module, features: tuple[int, ...] | None) -> None:
        super().__init__()
        self.layer = layer
        self.scale = None if features is None else nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        out = self.layer(x if self.scale is None else x * self.scale, *more)
        return torch.tanh(out[0] if isinstance(out, tuple) else out)


def row_loss(module: nn.Module, *args: Tensor) -> Tensor:
    """Distances from the row's target, with a weight for each output so that no gradient cancels by symmetry."""
    out = module(*args[:-1]).flatten(1)
    slope = 1 + torch.arange(out.shape[1], dtype=out.dtype, device=out.device).remainder(7) / 7
    return ((out - args[-1][:, None]).square() * slope).sum(1)


def layout(r: random.Random, x: Tensor) -> tuple[Tensor, str]:
    """The same numbers in another memory order, or numbers that share their memory."""
    how = r.choice(["contiguous", "contiguous", "channels_last", "transposed", "sliced", "expanded", "offset"])
    if how == "channels_last" and x.dim() in (4, 5):
        x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    elif how == "transposed" and x.dim() > 2:
        x = x.transpose(1, -1).contiguous().transpose(1, -1)
    elif how == "sliced":
        x = torch.stack([x, x + 1], -1)[..., 0]
    elif how == "expanded" and x.dim() > 1:
        x = x[:, :1].expand(x.shape)
    elif how == "offset":
        x = torch.cat([x.flatten(), x.new_zeros(3)])[: x.numel()].roll(1)[0:].view(x.shape)
    return x, how


def sizes(r: random.Random, dims: int, least: int, most: int = 9) -> list[int]:
    return [r.randint(least, max(least, most)) for _ in range(dims)]


# --- families: (random, rows) → layer, its input, per-feature shape of the frame (None for ids), and what else it takes

Family = Callable[[random.Random, int], tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]]


def linear(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    lead = sizes(r, r.choice([0, 0, 1, 2, 3]), 1, 6)
    d, p = r.choice([1, 2, 7, 16, 33]), r.choice([1, 3, 8, 20])
    return nn.Linear(d, p, r.random() < 0.7), [torch.randn(rows, *lead, d)], (d,)


def convolution(dims: int) -> Family:
    def make(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
        groups = r.choice([1, 1, 1, 2, 3, 4])
        c_in, c_out = groups * r.choice([1, 2, 3, 8]), groups * r.choice([1, 2, 5, 9])
        if r.random() < 0.15:  # depthwise
            groups = c_out = c_in = r.choice([3, 8])
        kernel = [r.choice([1, 2, 3, 4, 5]) for _ in range(dims)]
        dilation = [r.choice([1, 1, 1, 2, 3]) for _ in range(dims)]
        mode = r.choice(["zeros", "zeros", "circular", "reflect", "replicate"])
        span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        padding: Any = r.choice(["same", "valid"]) if r.random() < 0.25 else [r.randint(0, 2) for _ in range(dims)]
        stride = [1] * dims if padding == "same" else [r.choice([1, 1, 2, 3]) for _ in range(dims)]
        size = [max(3, s) + r.randint(0, 5) for s in span]  # reflection needs more than it pads
        if mode == "zeros" and r.random() < 0.2:  # 1×1 images, and images that the stride steps over
            own = [0] * dims if padding == "valid" else [s // 2 for s in span] if padding == "same" else padding
            size = [max(1, s - 2 * p) for s, p in zip(span, own, strict=True)]
        elif padding == "same":
            size = [max(3, s) + r.randint(0, 5) for s in span]
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](
            c_in, c_out, kernel, stride, padding, dilation, groups, r.random() < 0.7, mode
        )
        return layer, [torch.randn(rows, c_in, *size)], (c_in, *[1] * dims)

    return make


def transposed(dims: int) -> Family:
    def make(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
        groups = r.choice([1, 1, 2, 3])
        c_in, c_out = groups * r.choice([1, 2, 5]), groups * r.choice([1, 3, 4])
        kernel, dilation = sizes(r, dims, 1, 4), [r.choice([1, 1, 2]) for _ in range(dims)]
        stride = sizes(r, dims, 1, 3)
        extra = [r.randint(0, max(s, d) - 1) for s, d in zip(stride, dilation, strict=True)]
        padding = [r.randint(0, d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)]
        layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](
            c_in, c_out, kernel, stride, padding, extra, groups, r.random() < 0.7, dilation
        )
        return layer, [torch.randn(rows, c_in, *sizes(r, dims, 1, 5))], (c_in, *[1] * dims)

    return make


def group_norm(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    groups, dims = r.choice([1, 2, 3, 5]), r.choice([0, 1, 2, 3])
    c = groups * r.choice([2, 3, 4])
    return nn.GroupNorm(groups, c, affine=r.random() < 0.85), [torch.randn(rows, c, *sizes(r, dims, 1, 5))], (c, *[1] * dims)


def layer_norm(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    shape, lead = sizes(r, r.choice([1, 1, 2, 3]), 2, 6), sizes(r, r.choice([0, 1, 2]), 1, 5)
    affine = r.random() < 0.85
    return nn.LayerNorm(shape, elementwise_affine=affine, bias=r.random() < 0.7), [torch.randn(rows, *lead, *shape)], tuple(shape)


def instance_norm(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    dims, c = r.choice([1, 2, 3]), r.choice([1, 3, 6])
    layer = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1](c, affine=r.random() < 0.8)
    return layer, [torch.randn(rows, c, *sizes(r, dims, 2, 5))], (c, *[1] * dims)


def rms_norm(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    shape, lead = sizes(r, r.choice([1, 1, 2]), 2, 6), sizes(r, r.choice([0, 1, 2]), 1, 5)
    layer = nn.RMSNorm(shape, eps=r.choice([None, 1e-3]), elementwise_affine=r.random() < 0.85)
    return layer, [torch.randn(rows, *lead, *shape)], tuple(shape)


def embedding(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    n, shape = r.choice([2, 7, 30]), sizes(r, r.choice([0, 1, 2]), 1, 6)
    layer = nn.Embedding(n, r.choice([1, 5, 8]), padding_idx=r.choice([None, None, 0, 1, -1]))
    return nn.Sequential(layer, nn.Linear(layer.embedding_dim, 3)), [torch.randint(n, (rows, *shape))], None


class Bags(nn.Module):
    def __init__(self, n: int, width: int, mode: str, padding_idx: int | None) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(n, width, mode=mode, padding_idx=padding_idx)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bag(ids)


class Scores(nn.Module):
    """Attention written out, with learned queries, a learned bias of the scores, or learned keys beside the row's own."""

    def __init__(self, width: int, heads: int, tokens: int, *, learned: str, causal: bool) -> None:
        super().__init__()
        self.heads, self.learned, self.causal = heads, learned, causal
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        own = {"bias": (heads, tokens, tokens), "queries": (1, heads, 2, width // heads), "keys": (1, heads, 3, width // heads)}
        self.extra = nn.Parameter(torch.zeros(own[learned])) if learned in own else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        bias = self.extra if self.learned == "bias" else None
        if self.learned == "queries":
            q = self.extra.expand(x.shape[0], -1, -1, -1)
        if self.learned == "keys":
            k = torch.cat([self.extra.repeat(x.shape[0], 1, 1, 1), k], 2)
            v = torch.cat([torch.zeros_like(k[:, :, :3]), v], 2)
        mixed = F.scaled_dot_product_attention(q, k, v, bias, is_causal=self.causal and self.extra is None)
        return self.out(mixed.transpose(1, 2).flatten(-2))


def attention(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    heads = r.choice([1, 2, 3])
    width, tokens = heads * r.choice([2, 4]), r.choice([1, 2, 5])
    learned = r.choice(["none", "bias", "queries", "keys"])
    layer = Scores(width, heads, tokens, learned=learned, causal=r.random() < 0.5)
    return layer, [torch.randn(rows, tokens, width)], (width,)


class Heads(nn.Module):
    """``nn.MultiheadAttention`` of a sequence with itself or with another one, in either order of dimensions."""

    def __init__(self, layer: nn.MultiheadAttention, mask: Tensor | None, *, crossed: bool, padded: bool, weights: bool) -> None:
        super().__init__()
        self.layer, self.crossed, self.padded, self.weights = layer, crossed, padded, weights
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k, v = (keys, values) if self.crossed else (x, x)
        padding = None
        if self.padded:  # the last key of every row, but never all of them
            padding = torch.zeros(k.shape[:2], dtype=torch.bool)
            padding[:, -1] = k.shape[1] > 1
        if not self.layer.batch_first:
            turned = {id(t): t.transpose(0, 1) for t in (x, k, v)}
            x, k, v = turned[id(x)], turned[id(k)], turned[id(v)]
        out, scores = self.layer(x, k, v, key_padding_mask=padding, attn_mask=self.mask, need_weights=self.weights)
        out = out if self.layer.batch_first else out.transpose(0, 1)
        return torch.cat([out.flatten(1), scores.flatten(1)], 1) if self.weights else out


def multihead(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    heads = r.choice([1, 2])
    width, length = heads * r.choice([2, 3]), r.choice([1, 3, 4])
    crossed = r.random() < 0.5
    other = r.choice([1, 2, 5]) if crossed else length
    k_width, v_width = (r.choice([None, 3, 5]), r.choice([None, 2])) if crossed else (None, None)
    extra = r.random() < 0.3
    layer = nn.MultiheadAttention(
        width, heads, bias=r.random() < 0.7, add_bias_kv=extra, add_zero_attn=r.random() < 0.3, kdim=k_width, vdim=v_width,
        batch_first=r.random() < 0.6,
    )  # fmt: skip
    mask = r.choice([None, "bool", "float"])
    if mask == "bool":
        mask = torch.ones(length, other, dtype=torch.bool).triu(1)
    elif mask == "float":
        mask = torch.randn(length, other)
    padded = r.random() < 0.4 and not (isinstance(mask, Tensor) and mask.dtype == torch.bool and other > length)
    module = Heads(layer, mask, crossed=crossed, padded=padded and other > 1, weights=r.random() < 0.4)
    inputs = [torch.randn(rows, n, w or width) for n, w in ((length, width), (other, k_width), (other, v_width))]
    return module, inputs, (width,)


class Rectified(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.relu = nn.PReLU(n)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x)


def prelu(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    c, dims = r.choice([1, 4, 5]), r.choice([0, 1, 2])
    return Rectified(r.choice([1, c])), [torch.randn(rows, c, *sizes(r, dims, 1, 4))], (c, *[1] * dims)


def bilinear(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    a, b, lead = r.choice([1, 3, 5]), r.choice([2, 4]), sizes(r, r.choice([0, 1]), 1, 3)
    return nn.Bilinear(a, b, 3, r.random() < 0.7), [torch.randn(rows, *lead, a), torch.randn(rows, *lead, b)], (a,)


class Products(nn.Module):
    """Raw parameters in matrix products, look-ups and broadcasts that no layer stands for."""

    FORMS = ("matmul", "mm-left", "vector", "einsum", "addmm", "bmm", "heads", "lookup", "lerp", "where", "power", "addcmul",
             "cat")  # fmt: skip

    def __init__(self, form: str, tokens: int, d: int) -> None:
        super().__init__()
        shape = {
            "matmul": (d, 4), "mm-left": (3, tokens), "vector": (d,), "einsum": (d, 4), "addmm": (d, 4), "bmm": (1, d, 4),
            "heads": (tokens, d, 3), "lookup": (6, d), "lerp": (tokens, d), "where": (d,), "power": (1, tokens, 1),
            "addcmul": (tokens, 1), "cat": (1, 2, d),
        }[form]  # fmt: skip
        self.form, self.w = form, nn.Parameter(torch.zeros(shape))
        self.b = nn.Parameter(torch.zeros(4)) if form == "addmm" else None

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        w = self.w
        match self.form:
            case "matmul":
                return x @ w
            case "mm-left":
                return w @ x
            case "vector":
                return torch.matmul(x, w)
            case "einsum":
                return torch.einsum("btd,dp->bpt", x, w)
            case "addmm":
                return torch.addmm(self.b, x[:, 0], w, beta=0.5, alpha=2)
            case "bmm":
                return torch.bmm(x, w.expand(x.shape[0], -1, -1))
            case "heads":
                return x[:, :, None] @ w
            case "lookup":
                return w[ids - 3] + x.mean(1)
            case "lerp":
                return torch.lerp(x, w, 0.3)
            case "where":
                return torch.where(x > 0, x, w)
            case "power":
                return x.abs().add(0.5) ** w
            case "addcmul":
                return torch.addcmul(x, x.cos(), w, value=2)
        return torch.cat([w.expand(x.shape[0], -1, -1), x], 1).cumsum(1)


def products(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    tokens, d = r.choice([1, 2, 5]), r.choice([1, 3, 6])
    layer = Products(r.choice(Products.FORMS), tokens, d)
    return layer, [torch.randn(rows, tokens, d), torch.randint(6, (rows,))], (d,)


def bag(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    layer = Bags(7, r.choice([1, 4]), r.choice(["mean", "sum", "max"]), r.choice([None, 0]))
    return nn.Sequential(layer, nn.Linear(layer.bag.embedding_dim, 3)), [torch.randint(7, (rows, r.choice([1, 5])))], None


class Cell(nn.Module):
    """A recurrent cell over a few steps: the same parameters in every step."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], self.cell.hidden_size)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return h


def cell(r: random.Random, rows: int) -> tuple[nn.Module, Sequence[Tensor], tuple[int, ...] | None]:
    d, make = r.choice([1, 3]), r.choice([nn.GRUCell, nn.RNNCell])
    return Cell(make(d, r.choice([2, 4]), bias=r.random() < 0.7)), [torch.randn(rows, r.choice([1, 3]), d)], (d,)


# As often as they stand here in every fifty.
FAMILIES: dict[str, tuple[Family, int]] = {
    "linear": (linear, 5), "conv1d": (convolution(1), 4), "conv2d": (convolution(2), 8), "conv3d": (convolution(3), 2),
    "conv_transpose1d": (transposed(1), 2), "conv_transpose2d": (transposed(2), 4), "conv_transpose3d": (transposed(3), 1),
    "group_norm": (group_norm, 3), "layer_norm": (layer_norm, 3), "instance_norm": (instance_norm, 2), "rms_norm": (rms_norm, 2),
    "embedding": (embedding, 2), "embedding_bag": (bag, 1), "attention": (attention, 2), "multihead": (multihead, 3),
    "prelu": (prelu, 1), "bilinear": (bilinear, 1), "cell": (cell, 1), "products": (products, 4),
}  # fmt: skip
ORDER = [name for name, (_, times) in FAMILIES.items() for _ in range(times)]


def draw(seed: int) -> Case:
    r = random.Random(seed)
    torch.manual_seed(seed)
    name = ORDER[seed % len(ORDER)]
    samples, multiplicity = r.choice([0, 1, 2, 2, 3, 3, 5, 5]), r.choice([1, 1, 2, 3])
    rows = samples * multiplicity
    layer, inputs, features = FAMILIES[name][0](r, rows)
    x, how = layout(r, inputs[0])
    module = Framed(layer, features)
    for p in module.parameters():  # away from ones and zeros
        nn.init.normal_(p, std=0.5)
    if r.random() < 0.15 and all(p.dim() < 5 for p in module.parameters()):
        module = module.to(memory_format=torch.channels_last)
        how += ", weights channels_last"
    strategy = STRATEGIES[(seed // len(ORDER)) % 4]
    options: dict[str, Any] = {"strategy": strategy}
    if samples > 1 and r.random() < 0.1:
        options["memory_budget"] = "one sample"
    text = (
        f"seed {seed}: {layer}, inputs {[tuple(t.shape) for t in inputs]} ({how}), B={samples}, K={multiplicity}, "
        f"{', '.join(f'{k}={v}' for k, v in options.items())}"
    )
    return Case(module, (x, *inputs[1:], torch.randn(rows)), multiplicity, text, options)


def in_double(grads: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))


def error_of_autograd(module: nn.Module, args: tuple[Tensor, ...], multiplicity: int, c: float) -> float:
    """How far torch's own float32 gradients are from double, where layers cancel (a norm of few, nearly equal numbers)."""
    (exact, norms), (sums, found) = (
        per_sample_loop(module, row_loss, args, max_grad_norm=c, multiplicity=multiplicity, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    worst = float(((found - norms).abs() / norms.clamp(min=1e-12)).max()) if len(norms) else 0.0
    return max(worst, in_double({name: sums[name] - e for name, e in exact.items()}) / max(in_double(exact), 1e-12))


def check(case: Case, max_grad_norm: float | None = None) -> None:
    module, args, k = case.module, case.args, case.multiplicity
    options = dict(case.options)
    if options.get("memory_budget") == "one sample":
        first = tuple(a[:k] for a in args)
        plan = pf.make_plan(module, row_loss, first, multiplicity=k, strategy=options["strategy"])
        options["memory_budget"] = plan.peak_bytes * 101 // 100  # the whole batch does not fit, or just
    samples = len(args[-1]) // k
    _, norms = per_sample_loop(module, row_loss, args, max_grad_norm=1.0, multiplicity=k)
    c = max_grad_norm or (float(norms.median()) if samples else 0) or 1.0
    tolerance = TOLERANCE + 4 * error_of_autograd(module, args, k, c)
    # A gradient that is zero because every position cancels or pads is measured as what its sum may round to.
    atol = 1e-12 if samples and float(norms.max()) > 0 else 1e-3
    assert_matches_loop(module, row_loss, args, multiplicity=k, tolerance=tolerance, norm_atol=atol, max_grad_norm=c, **options)
    whole = pf.clipped_grad(module, row_loss, args, max_grad_norm=c, multiplicity=k, **options).grads
    parts: dict[str, Tensor] = {name: torch.zeros_like(g, dtype=torch.float64) for name, g in whole.items()}
    for b in range(samples):
        chosen = torch.zeros(samples)
        chosen[b] = 1
        one = pf.clipped_grad(module, row_loss, args, max_grad_norm=c, multiplicity=k, sample_weight=chosen, **options).grads
        added = in_double(one)
        assert added <= c * (1 + 1e-6), f"sample {b} adds {added / c:.8f}·C"
        if float(norms[b]) >= c * (1 + tolerance):
            assert added >= c * (1 - TOLERANCE), f"sample {b} adds {added / c:.8f}·C"
        rows = slice(b * k, (b + 1) * k)
        own = pf.clipped_grad(module, row_loss, tuple(a[rows] for a in args), max_grad_norm=c, multiplicity=k, **options).grads
        for name, g in own.items():
            parts[name] += g
    error = in_double({name: parts[name] - g for name, g in whole.items()})
    assert error <= tolerance * in_double(whole) + 1e-12, f"parts of the batch differ from the whole by {error:.2e}"


@pytest.mark.parametrize("seed", range(CONFIGURATIONS))
def test_random_configuration_equals_the_per_sample_loop(seed: int) -> None:
    case = draw(seed)
    try:
        check(case, max_grad_norm=1e-3 if seed % 7 == 0 else None)
    except BaseException as error:
        error.add_note(case.text)
        raise


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_the_bound_holds_where_positions_cancel(kind: str, strategy: str) -> None:
    """Σ_t g_t a_tᵀ with equal a_t and Σ_t g_t = 0: what float32 leaves of it is rounding, and that is clipped too."""
    torch.manual_seed(0)

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8, bias=False) if kind == "linear" else nn.Conv2d(8, 8, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x).flatten(1) if kind == "conv" else self.layer(x).mT.flatten(1)
            half = out.shape[1] // 16
            return (out.unflatten(1, (8, 2, half)) * torch.tensor([1.0, -1.0 + 2.0**-20])[:, None]).sum((2, 3))

    for size in (4, 16, 32):
        for row in range(3):
            channels = torch.rand(8, generator=torch.Generator().manual_seed(row)) + 0.5
            x = channels.expand(1, size * size, 8).clone()
            x = x if kind == "linear" else x.mT.reshape(1, 8, size, size).contiguous()
            args = (x, torch.full((1,), 3.0))
            norm = float(pf.clipped_grad(Centred(), row_loss, args, max_grad_norm=1e9, strategy="store").norms[0])
            for c in (norm / 100, norm / 3):
                grads = pf.clipped_grad(Centred(), row_loss, args, max_grad_norm=c, strategy=strategy).grads
                assert in_double(grads) <= c * (1 + 1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["linear", "rank-1", "conv", "norm"])
def test_the_bound_holds_over_the_range_of_floats(kind: str, strategy: str) -> None:
    """Inputs and gradients of 1e-38 … 1e38, where factors and products become denormal or infinite."""
    torch.manual_seed(0)
    module, shape = {
        "linear": (nn.Linear(9, 6, bias=False), (4, 9)), "rank-1": (nn.Linear(9, 6), (9,)),
        "conv": (nn.Conv2d(2, 4, 3), (2, 5, 5)),
        "norm": (nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)), (2, 5, 5)),
    }[kind]  # fmt: skip

    def steep(module: nn.Module, x: Tensor, slope: Tensor) -> Tensor:
        return module(x).flatten(1).sum(1) * slope

    for x_power in (-38, -20, 0, 9, 18, 20, 23, 30, 38):
        for slope_power in (-40, -16, 0, 16, 32):
            args = (torch.randn(1, *shape) * 10.0**x_power, torch.full((1,), float(10.0**slope_power)))
            for c in (1e-15, 1e-3, 1e3):
                grads = pf.clipped_grad(module, steep, args, max_grad_norm=c, strategy=strategy).grads
                assert in_double(grads) <= c * (1 + 1e-6), (x_power, slope_power, c)


@pytest.mark.parametrize("layer", [nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)], ids=["group", "instance"])
def test_a_channels_last_normalisation_takes_an_output_gradient_in_plain_order(layer: nn.Module) -> None:
    """torch's kernel reads both in the order of its input; read wrongly, layers below would get another gradient, silently."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, 5).to(memory_format=torch.channels_last)
    module = nn.Sequential(nn.Conv2d(4, 4, 1), layer, nn.Flatten(), nn.Linear(60, 3))
    nn.init.normal_(layer.weight)
    module[0].to(memory_format=torch.channels_last)
    assert_matches_loop(module, row_loss, (x, torch.randn(6)), multiplicity=2)


def test_an_output_padding_of_a_stride_or_more() -> None:
    """A dilation allows it; the output then has columns that no position of the input stands for."""
    torch.manual_seed(0)
    for strategy in STRATEGIES:
        layer = Framed(nn.ConvTranspose2d(2, 3, (2, 3), (1, 2), (2, 1), (2, 2), dilation=(4, 3)), (2, 1, 1))
        assert_matches_loop(layer, row_loss, (torch.randn(4, 2, 3, 4), torch.randn(4)), multiplicity=2, strategy=strategy)
