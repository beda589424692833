"""The CUDA kernels, thread by thread on the host, against double precision.

Tolerances are relative to the same sum over absolute values: 1e-6 for float32 (three TF32 products) and bfloat16 inputs (their
products are exact), 1.2e-3 for single TF32 products (two operands rounded to 11 bits).

PRIVIMAGE_TEST_DEVICE=cuda runs the same tests on a GPU.
"""

from __future__ import annotations

import inspect
import itertools
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ops_helpers import assert_norms, assert_sums, variant
from test_ops_noise import RFC_BLOCKS
from test_ops_weight_grads import conv_case

from privimage_fast import ops
from privimage_fast.ops import cuda, native, reference

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(native._C is None, reason="the extension is not built")

DEVICE = os.environ.get("PRIVIMAGE_TEST_DEVICE", "cpu")
STEP_DEVICE = "emulated" if DEVICE == "cpu" else None

MODES: dict[str, tuple[torch.dtype, dict[str, bool], float]] = {
    "float32": (torch.float32, {}, 1e-6),
    "tf32": (torch.float32, {"_tf32": True}, 1.2e-3),
    "bfloat16": (torch.bfloat16, {}, 1e-6),
}


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


@pytest.fixture
def shuffled() -> Iterator[Callable[[int], None]]:
    """Sets the seed of the order in which a block's threads run."""
    yield native._C.set_emulation_schedule
    native._C.set_emulation_schedule(0)


def _random_shapes(count: int) -> list[tuple[Any, ...]]:
    """(b, k, c, p, size, kernel, stride, padding, dilation, groups), none of them what a tile would like."""
    draw = random.Random(8439)
    shapes = []
    while len(shapes) < count:
        groups = draw.choice([1, 1, 1, 2, 3, 5])
        c, p = (groups * draw.choice([1, 2, 3, 4, 7, 8, 9, 12, 16, 24, 31, 33]) for _ in range(2))
        kernel = (draw.randint(1, 4), draw.randint(1, 4)) if draw.random() < 0.8 else (draw.randint(1, 5),)
        stride, padding, dilation = draw.randint(1, 3), draw.choice([0, 1, 1, 2, 5]), draw.randint(1, 3)
        size = tuple(max(1, dilation * (m - 1) + 1 - 2 * padding) + draw.choice([0, 0, 1, 2, 5]) for m in kernel)
        shapes.append((draw.randint(1, 3), draw.randint(1, 4), c, p, size, kernel, stride, padding, dilation, groups))
    return shapes


CONV_SHAPES = [
    (1, 1, 1, 1, (1, 1), (1, 1), 1, 0, 1, 1),
    (2, 3, 8, 16, (1, 1), (3, 3), 1, 1, 1, 1),  # a 1×1 image under a 3×3 kernel
    (1, 1, 3, 5, (2, 2), (3, 3), 1, 4, 1, 1),  # padding larger than the kernel
    (2, 2, 64, 64, (4, 4), (3, 3), 1, 1, 1, 1),  # tiles filled exactly
    (1, 1, 72, 136, (5, 3), (3, 3), 1, 1, 1, 1),  # the large tile, not filled
    (2, 2, 32, 32, (7, 6), (3, 3), 1, 1, 1, 1),  # the flat tile
    (1, 3, 40, 24, (6, 5), (3, 3), 2, 1, 1, 1),
    (2, 3, 16, 8, (2, 1), (3, 3), 1, 1, 1, 1),  # several rows of a sample in a stage
    (1, 1, 72, 32, (3, 37), (3, 3), 1, 1, 2, 1),
    (1, 2, 136, 72, (4, 4), (1, 1), 1, 0, 1, 1),
    (2, 1, 128, 128, (3, 3), (1, 1), 1, 0, 1, 1),
    (1, 5, 8, 8, (9, 9), (3, 3), 2, 1, 1, 1),  # more stages than the pipeline has
    (1, 1, 8, 72, (17, 13), (3, 3), 1, 1, 1, 1),
    (3, 2, 16, 32, (6, 5), (3, 3), 1, 1, 1, 4),
    (2, 1, 6, 6, (5, 5), (3, 3), 1, 1, 1, 6),  # depthwise
    (1, 2, 12, 8, (40,), (5,), 2, 3, 2, 2),
    *_random_shapes(148),
]
LAYOUTS = ("channels_last", "dense", "sliced")


def _inputs(case: tuple[Any, ...], dtype: torch.dtype, layout: str) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    x, g, arguments = conv_case(*case)
    return variant(x.to(dtype), layout), variant(g.to(dtype), layout), arguments


@pytest.mark.parametrize("index", range(len(CONV_SHAPES)), ids=lambda i: "-".join(map(str, CONV_SHAPES[i])).replace(" ", ""))
def test_conv(index: int) -> None:
    """Weight gradients stored, accumulated and not stored, and Gram norms."""
    case, layout = CONV_SHAPES[index], LAYOUTS[index % 3]
    for dtype, options, epsilon in MODES.values():
        x, g, arguments = _inputs(case, dtype, layout)
        expected = reference.conv_weight_grad(x.double(), g.double(), **arguments)[1]
        magnitude = reference.conv_weight_grad(x.double().abs(), g.double().abs(), **arguments)[1]
        sq_norms, weights = cuda.conv_weight_grad(x, g, **arguments, **options)
        assert_sums(weights, expected, magnitude, epsilon)
        assert_norms(sq_norms, weights)
        if index % 4 == 0:
            only, nothing = cuda.conv_weight_grad(x, g, store=False, **arguments, **options)
            assert nothing is None and torch.equal(only, sq_norms)
            out = torch.ones(expected.shape) if index % 8 else torch.ones_like(weights)
            sq_norms, same = cuda.conv_weight_grad(x, g, out=out, **arguments, **options)
            assert same is out
            assert_sums(out, expected + 1, magnitude + 1, epsilon)
            assert_norms(sq_norms, out)
        if index % 4 == 1:
            sq_norms, rounded = cuda.conv_weight_grad(x, g, store_dtype=torch.bfloat16, **arguments, **options)
            assert torch.equal(rounded, weights.bfloat16())
            assert_norms(sq_norms, rounded)
        if not options:
            exact = expected.flatten(1).square().sum(1)
            torch.testing.assert_close(cuda.conv_gram_norms(x, g, **arguments), exact, rtol=1e-9, atol=0)


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize(
    "case", [CONV_SHAPES[0], CONV_SHAPES[9], (5, 2, 72, 16, (5, 5), (3, 3), 1, 1, 1, 1), (5, 3, 8, 8, (9,), (3,), 2, 1, 1, 1)]
)
def test_clipped_sums_of_what_was_not_stored(case: tuple[Any, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many samples a block adds up, and whatever a rejected sample holds."""
    monkeypatch.setattr(cuda, "_chunk", lambda samples, tiles: chunk)
    for dtype in (torch.float32, torch.bfloat16):
        x, g, arguments = _inputs(case, dtype, "channels_last")
        coef = torch.rand(case[0]) + 0.1
        expected = reference.conv_weight_grad(x.double(), g.double(), **arguments)[1]
        magnitude = reference.conv_weight_grad(x.double().abs(), g.double().abs(), **arguments)[1]
        if case[0] > 2:
            coef[1] = 0
            expected[1] = magnitude[1] = 0
            g[case[1]] = torch.nan  # the first row of sample 1
        scale = coef.double().view(-1, *[1] * (expected.dim() - 1))
        out = torch.ones(expected.shape[1:])
        cuda.conv_clipped_sum_(out, x, g, coef, **arguments)
        assert_sums(out, 1 + (scale * expected).sum(0), 1 + (scale * magnitude).sum(0), 1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (5, 2, 7, 33, 5), (4, 1, 3, 72, 136)])
def test_clipped_sums_of_linear_layers(sizes: tuple[int, ...]) -> None:
    b, k, t, d, p = sizes
    x, g, coef = torch.randn(b * k, t, d), torch.randn(b * k, t, p), torch.rand(b)
    expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=k)[1]
    magnitude = reference.linear_weight_grad(x.double().abs(), g.double().abs(), multiplicity=k)[1]
    out = torch.zeros(p, d)
    cuda.linear_clipped_sum_(out, x, g, coef, multiplicity=k)
    scale = coef.double().view(-1, 1, 1)
    assert_sums(out, (scale * expected).sum(0), (scale * magnitude).sum(0), 1e-6)


@pytest.mark.parametrize("op", ["linear_weight_grad", "linear_clipped_sum_"])
@pytest.mark.parametrize(("sizes", "laid_out"), [((2, 2, 3, 8, 16), True), ((2, 2, 3, 7, 16), False)])
def test_linear_operands_have_features_innermost(
    op: str, sizes: tuple[int, ...], laid_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel fetches 16 bytes at a time only so; a transposed input is copied where its features fill such chunks."""
    b, k, t, d, p = sizes
    x, g = torch.randn(d, b * k, t).movedim(0, -1), torch.randn(b * k, p, t).transpose(1, 2)
    launched, conv = [], cuda._conv

    def watching(op: str, x: Any, g: Any, shape: Any, groups: int, multiplicity: int, *strides: Any) -> Any:
        launched.append((x.stride(2) == 1, g.stride(2) == 1, strides[0][1] == x.stride(2), strides[1][1] == g.stride(2)))
        return conv(op, x, g, shape, groups, multiplicity, *strides)

    monkeypatch.setattr(cuda, "_conv", watching)
    expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=k)[1]
    magnitude = reference.linear_weight_grad(x.double().abs(), g.double().abs(), multiplicity=k)[1]
    assert expected is not None and magnitude is not None
    if op == "linear_weight_grad":
        found = cuda.linear_weight_grad(x, g, multiplicity=k)[1]
        assert found is not None
        assert_sums(found, expected, magnitude, 1e-6)
    else:
        out = torch.zeros(p, d)
        cuda.linear_clipped_sum_(out, x, g, torch.ones(b), multiplicity=k)
        assert_sums(out, expected.sum(0), magnitude.sum(0), 1e-6)
    assert launched == [(laid_out, True, True, True)]


LINEAR_SHAPES = [
    (1, 1, 1, 1, 1), (3, 1, 1, 37, 70), (3, 2, 7, 33, 5), (2, 1, 70, 16, 65), (2, 8, 1, 128, 40), (2, 3, 17, 3, 9),
    (1, 1, 3, 136, 72), *itertools.product((1, 2), (1, 3), (1, 5, 66), (4, 9, 24), (8, 17)),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(LINEAR_SHAPES)), ids=lambda i: "-".join(map(str, LINEAR_SHAPES[i])))
def test_linear(index: int) -> None:
    b, k, t, d, p = LINEAR_SHAPES[index]
    for dtype, options, epsilon in MODES.values():
        layout = ("dense", "sliced", "transposed")[index % 3]
        x, g = (variant(torch.randn(b * k, t, n).to(dtype), layout) for n in (d, p))
        expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=k)[1]
        magnitude = reference.linear_weight_grad(x.double().abs(), g.double().abs(), multiplicity=k)[1]
        sq_norms, weights = cuda.linear_weight_grad(x, g, multiplicity=k, **options)
        assert_sums(weights, expected, magnitude, epsilon)
        assert_norms(sq_norms, weights)
        sq_norms, rounded = cuda.linear_weight_grad(x, g, multiplicity=k, store_dtype=torch.bfloat16, **options)
        assert torch.equal(rounded, weights.bfloat16())
        assert_norms(sq_norms, rounded)
        if not options:
            exact = expected.flatten(1).square().sum(1)
            torch.testing.assert_close(cuda.linear_gram_norms(x, g, multiplicity=k), exact, rtol=1e-9, atol=0)


# (T, d, p) of problems that take one kind of tile, several, more than one launch holds, and norms in one and in two launches.
SEVERAL = {
    "attention": [(16, 64, 64)] * 3 + [(16, 64, 72)],
    "one-tile": [(5, 8, 16), (3, 24, 40), (1, 64, 64)],
    "ragged": [(1, 1, 1), (7, 33, 5), (9, 136, 72), (2, 3, 130), (70, 8, 8), (3, 72, 136)],
    "empty": [(4, 8, 8), (0, 8, 8), (4, 0, 8), (4, 72, 8), (4, 8, 0)],
    "many": [(2, 4 + i % 3, 70) for i in range(30)],
}


@pytest.mark.parametrize("multiplicity", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("sizes", SEVERAL)
def test_several_linear_layers_have_the_bits_of_each_alone(sizes: str, mode: str, multiplicity: int) -> None:
    dtype, options, epsilon = MODES[mode]
    rows = 2 * multiplicity
    problems = [(torch.randn(rows, t, d).to(dtype), torch.randn(rows, t, p).to(dtype)) for t, d, p in SEVERAL[sizes]]
    problems[0] = (variant(problems[0][0], "sliced"), variant(problems[0][1], "transposed"))
    problems[1] = (problems[1][0].repeat(2, 1, 1), problems[1][1].repeat(2, 1, 1))  # a batch of its own size
    alone = [cuda.linear_weight_grad(x, g, multiplicity=multiplicity, **options) for x, g in problems]
    rounded = {"store_dtype": torch.bfloat16}
    in_bfloat16 = [cuda.linear_weight_grad(x, g, multiplicity=multiplicity, **rounded, **options) for x, g in problems]
    for stored, like in (({}, alone), ({"store": False}, alone), (rounded, in_bfloat16)):
        found = cuda.linear_weight_grads(problems, multiplicity=multiplicity, **stored, **options)
        assert len(found) == len(problems)
        for (sq_norms, weights), (expected_norms, expected) in zip(found, like, strict=True):
            assert torch.equal(sq_norms, expected_norms)
            assert weights is None if "store" in stored else weights.dtype == expected.dtype and torch.equal(weights, expected)
    x, g = problems[-2]
    expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=multiplicity)[1]
    magnitude = reference.linear_weight_grad(x.double().abs(), g.double().abs(), multiplicity=multiplicity)[1]
    assert_sums(alone[-2][1], expected, magnitude, epsilon)


@pytest.mark.skipif(DEVICE != "cpu", reason="the emulation counts launches")
@pytest.mark.parametrize(
    ("sizes", "launches"),
    [("attention", 2), ("one-tile", 1), ("many", 3 + 1)],  # products of a dozen problems each, then the norms of all
)
def test_several_linear_layers_share_launches(sizes: str, launches: int) -> None:
    problems = [(torch.randn(2, t, d), torch.randn(2, t, p)) for t, d, p in SEVERAL[sizes]]
    before = native._C.emulated_launches()
    cuda.linear_weight_grads(problems, multiplicity=1)
    assert native._C.emulated_launches() - before == launches


def test_no_problems_are_no_launch() -> None:
    before = native._C.emulated_launches()
    assert cuda.linear_weight_grads([], multiplicity=1) == [] == reference.linear_weight_grads([], multiplicity=1)
    assert native._C.emulated_launches() == before


def test_a_faulty_problem_among_several_is_named() -> None:
    good = (torch.randn(2, 3, 4), torch.randn(2, 3, 5))
    for op in (cuda.linear_weight_grads, reference.linear_weight_grads, native.linear_weight_grads):
        with pytest.raises(ValueError, match=r"linear_weight_grads: problems\[1\]: positions of g is 7, expected 3"):
            op([good, (torch.randn(2, 3, 4), torch.randn(2, 7, 5))], multiplicity=1)
        with pytest.raises(TypeError, match=r"linear_weight_grads: problems\[2\] is Tensor, expected a pair \(x, g\)"):
            op([good, good, torch.zeros(2, 3, 4)], multiplicity=1)
    wide = torch.randn(8).as_strided((1, 1, 8), (8, 2**31, 1))  # a stride no kernel takes
    with pytest.raises(RuntimeError, match=r"linear_weight_grads on .*g\[1\] \(1, 1, 4\) float32: .*\[1\]: a .*beyond 31 bits"):
        cuda.linear_weight_grads([(torch.randn(1, 1, 8), torch.randn(1, 1, 4)), (wide, torch.randn(1, 1, 4))], multiplicity=1)


def test_mixed_dtypes_are_multiplied_in_float32() -> None:
    x, g = torch.randn(4, 5, 16).bfloat16(), torch.randn(4, 5, 8)
    expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=2)[1]
    magnitude = reference.linear_weight_grad(x.double().abs(), g.double().abs(), multiplicity=2)[1]
    assert_sums(cuda.linear_weight_grad(x, g, multiplicity=2)[1], expected, magnitude, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_long_sums_do_not_drift(dtype: torch.dtype) -> None:
    """The matrix unit cuts instead of rounding; a norm of 4,096 like terms would come out too small by 1e-5 and more."""
    x, g = (torch.rand(1, 4096, 8) + 0.5).to(dtype), (torch.rand(1, 4096, 8) + 0.5).to(dtype)
    expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=1)[0]
    found = cuda.linear_weight_grad(x, g, multiplicity=1, store=False)[0]
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


def test_gram_norms_survive_cancellation() -> None:
    """Alike inputs and gradients that sum to almost nothing: the norm is far below the terms it is summed from."""
    x = 1 + 1e-3 * torch.randn(1, 80, 24)
    g = torch.randn(1, 80, 8)
    g -= g.mean(1, keepdim=True)
    expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=1)[0]
    torch.testing.assert_close(cuda.linear_gram_norms(x, g, multiplicity=1), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("mode", MODES)
def test_a_sample_that_is_not_finite_is_seen_and_alone(mode: str, value: float) -> None:
    dtype, options, _ = MODES[mode]
    x, g, arguments = _inputs((3, 2, 8, 8, (5, 5), (3, 3), 1, 1, 1, 1), dtype, "channels_last")
    g[2, 1, 3, 3] = value  # in sample 1
    assert cuda.conv_weight_grad(x, g, **arguments, **options)[0].isfinite().tolist() == [True, False, True]
    assert cuda.conv_gram_norms(x, g, **arguments).isfinite().tolist() == [True, False, True]


AFFINE_SHAPES = [
    ((6, 5, 7, 3), 1),
    ((6, 33, 4, 4), 1),
    ((6, 9, 21), -1),
    ((6, 4), 1),
    ((6, 3, 17, 5), 2),
    ((6, 1, 1), 1),
    ((6, 70, 3), -1),
]


@pytest.mark.parametrize("layout", ["dense", "channels_last", "sliced", "bf16"])
@pytest.mark.parametrize(("shape", "dim"), AFFINE_SHAPES)
def test_bias(shape: tuple[int, ...], dim: int, layout: str) -> None:
    g = variant(torch.randn(shape), layout)
    _, expected = reference.bias_grad(g.double(), channel_dim=dim, multiplicity=2)
    magnitude = reference.bias_grad(g.double().abs(), channel_dim=dim, multiplicity=2)[1]
    sq_norms, bias = cuda.bias_grad(g, channel_dim=dim, multiplicity=2)
    assert_sums(bias, expected, magnitude, 1e-6)
    assert_norms(sq_norms, bias)
    out = torch.ones_like(bias)
    sq_norms, same = cuda.bias_grad(g, channel_dim=dim, multiplicity=2, out=out)
    assert same is out
    assert_sums(out, expected + 1, magnitude + 1, 1e-6)
    assert_norms(sq_norms, out)


@pytest.mark.parametrize("layout", ["dense", "channels_last", "sliced", "bf16"])
@pytest.mark.parametrize(
    ("channels", "groups", "spatial"), [(6, 3, (5, 7)), (40, 4, (4, 4)), (3, 1, (1, 1)), (32, 32, (9,)), (9, 9, (3, 3))]
)
def test_group_norm(channels: int, groups: int, spatial: tuple[int, ...], layout: str) -> None:
    x = variant(torch.randn(6, channels, *spatial) + 50, layout)  # a mean that a cancelling formula would lose to
    g = variant(torch.randn(6, channels, *spatial), layout)
    mean, rstd = x.float().reshape(6, groups, -1).mean(2), torch.rand(6, groups) + 0.5
    arguments = dict(num_groups=groups, multiplicity=3)
    expected = reference.group_norm_affine_grad(x.double(), g.double(), mean.double(), rstd.double(), **arguments)
    spread = mean.double().repeat_interleave(channels // groups, 1).view(6, channels, *[1] * len(spatial))
    magnitude = reference.group_norm_affine_grad(
        (x.double() - spread).abs(), g.double().abs(), torch.zeros_like(mean), rstd.double(), **arguments
    )
    found = cuda.group_norm_affine_grad(x, g, mean, rstd, **arguments)
    for i in (1, 3):
        assert_sums(found[i], expected[i], magnitude[i], 1e-6)
        assert_norms(found[i - 1], found[i])
    out = torch.ones_like(found[1])
    sq_norms, again, _, bias = cuda.group_norm_affine_grad(x, g, mean, rstd, out_weight=out, **arguments)
    assert again is out and torch.equal(bias, found[3])
    assert_sums(out, expected[1] + 1, magnitude[1] + 1, 1e-6)
    assert_norms(sq_norms, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("positions", "width"), [(1, 1), (7, 5), (3, 40), (50, 3)])
def test_layer_norm(positions: int, width: int, dtype: torch.dtype) -> None:
    x, g = torch.randn(4, positions, width).to(dtype), torch.randn(4, positions, width).to(dtype)
    mean, rstd = torch.randn(4, positions), torch.rand(4, positions) + 0.5
    expected = reference.layer_norm_affine_grad(x.double(), g.double(), mean.double(), rstd.double(), multiplicity=2)
    magnitude = reference.layer_norm_affine_grad(
        (x.double() - mean.double().unsqueeze(2)).abs(), g.double().abs(), torch.zeros_like(mean), rstd.double(), multiplicity=2
    )
    found = cuda.layer_norm_affine_grad(x, g, mean, rstd, multiplicity=2)
    for i in (1, 3):
        assert_sums(found[i], expected[i], magnitude[i], 1e-6)
        assert_norms(found[i - 1], found[i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("positions", "width", "rows", "padding"), [(1, 1, 1, None), (5, 130, 4, 2), (9, 3, 2, 0), (2, 128, 7, None)]
)
def test_embedding(positions: int, width: int, rows: int, padding: int | None, dtype: torch.dtype) -> None:
    ids, g = torch.randint(rows, (4, positions)), torch.randn(4, positions, width).to(dtype)
    arguments = dict(num_embeddings=rows, padding_idx=padding, multiplicity=2)
    expected = reference.embedding_grad(ids, g.double(), **arguments)[1]
    magnitude = reference.embedding_grad(ids, g.double().abs(), **arguments)[1]
    sq_norms, table = cuda.embedding_grad(ids, g, **arguments)
    assert_sums(table, expected, magnitude, 1e-6)
    assert_norms(sq_norms, table)
    out = torch.ones_like(table)
    assert_norms(cuda.embedding_grad(ids, g, out=out, **arguments)[0], out)
    assert_sums(out, expected + 1, magnitude + 1, 1e-6)


def test_clip_factors_have_the_cpu_bits() -> None:
    exponents = torch.linspace(-300, 300, 401, dtype=torch.float64)
    sq = torch.cat([10**exponents, torch.tensor([0.0, 5e-324, torch.inf, torch.nan, -1.0], dtype=torch.float64)])
    weight = torch.rand(len(sq))
    for bound in (1e-30, 1e-3, 1.0, 7.0, 1e30):
        for given in (None, weight):
            expected = native.clip_factors(sq.cpu(), bound, None if given is None else given.cpu())
            assert torch.equal(cuda.clip_factors(sq, bound, given).cpu(), expected)


def test_weighted_sum_of_many_layers() -> None:
    """More layers than one launch takes, with and without aligned runs of four."""
    shapes = [(n % 13 + 1, n % 5 + 1) for n in range(150)] + [(8, 12), (0, 3), (16, 4, 3, 3)]
    stored = [torch.randn(3, *s) for s in shapes]
    stored[-1] = stored[-1].movedim(2, -1).contiguous().movedim(-1, 2)
    outs = [torch.randn(s) for s in shapes]
    coef = torch.tensor([0.5, 0.0, 2.0])
    for s in stored:
        s[1] = torch.nan  # never read: its factor is 0
    expected = [o.double() + 0.5 * s[0].double() + 2 * s[2].double() for o, s in zip(outs, stored, strict=True)]
    cuda.weighted_sum_(outs, stored, coef)
    for o, e in zip(outs, expected, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("key", "counter", "nonce", "block"), RFC_BLOCKS)
def test_noise_is_rfc_8439(key: bytes, counter: int, nonce: bytes, block: str) -> None:
    """The step's noise, from the published cipher blocks."""
    words = np.frombuffer(bytes.fromhex(block), dtype="<u8") >> np.uint64(11)
    u = (words.astype(np.float64) + 0.5) / 2.0**53
    radius, angle = np.sqrt(-2 * np.log(u[::2])), 2 * np.pi * u[1::2]
    expected = np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).ravel()
    stream, rank, step = (int.from_bytes(nonce[i : i + 4], "little") for i in (0, 4, 8))
    param = torch.zeros(8)
    native.private_step_(
        param, torch.zeros(8), None, None, None, noise_std=1.0, denominator=1.0, key=key, step=step, rank=rank, stream=stream,
        offset=8 * counter, optimizer="sgd", lr=1.0, _device=STEP_DEVICE,
    )  # fmt: skip
    np.testing.assert_allclose(-param.double().cpu().numpy(), expected, rtol=1e-7, atol=0)


def _everything() -> list[torch.Tensor]:
    torch.manual_seed(1)
    found: list[Any] = []
    for case in (CONV_SHAPES[4], CONV_SHAPES[7], CONV_SHAPES[9], CONV_SHAPES[20]):
        for dtype, options, _ in MODES.values():
            x, g, arguments = _inputs(case, dtype, "channels_last")
            found += [*cuda.conv_weight_grad(x, g, **arguments, **options), cuda.conv_gram_norms(x, g, **arguments)]
    pairs = [(torch.randn(4, 9, d), torch.randn(4, 9, p)) for d, p in ((8, 72), (72, 8), (4, 4))]
    for mode in MODES.values():
        several = [(x.to(mode[0]), g.to(mode[0])) for x, g in pairs]
        found += itertools.chain(*cuda.linear_weight_grads(several, multiplicity=2, **mode[1]))
    g = torch.randn(4, 9, 11)
    for dim in (1, -1):
        found += cuda.bias_grad(g, channel_dim=dim, multiplicity=2)
    found += cuda.layer_norm_affine_grad(g, g, torch.randn(4, 9), torch.rand(4, 9), multiplicity=2)
    found += cuda.embedding_grad(torch.randint(5, (4, 9)), g, num_embeddings=5, padding_idx=None, multiplicity=2)
    out = torch.zeros(37)
    cuda.weighted_sum_(out, torch.randn(5, 37), torch.rand(5))
    state = [torch.randn(37), out.clone(), torch.zeros(37), torch.zeros(37), torch.zeros(37)]
    native.private_step_(
        *state, noise_std=1.0, denominator=2.0, key=bytes(32), step=1, rank=0, stream=1, optimizer="adam", lr=0.1,
        ema_decay=0.9, _device=STEP_DEVICE,
    )  # fmt: skip
    stored = torch.randn(5, 3, 3, 4).movedim(-1, 2)
    native.summed_private_step_(
        *state, sums=[state[1][1:].view(3, 4, 3)], stored=[stored], coef=torch.rand(5), noise_std=1.0, denominator=2.0,
        key=bytes(32), step=2, rank=0, stream=1, optimizer="adam", lr=0.1, ema_decay=0.9, _device=STEP_DEVICE,
    )  # fmt: skip
    step = ops.ArmedStep(*state, optimizer="adam")
    step.arm(noise_std=1.0, denominator=2.0, key=bytes(32), step=3, rank=0, stream=1, lr=0.1, ema_decay=0.9)
    step.launch()
    return [*found, out, *state]


@pytest.mark.parametrize("samples", [1, 6])
def test_sum_and_step_in_one_pass_have_the_bits_of_two(samples: int) -> None:
    """Also where a block sums over many samples, and where a launch ends within a parameter (test_ops_step has the layouts)."""
    shapes = [(8, 40, 3, 3), (8,), *[(2, 3)] * 70, (5, 33)]
    stored = [torch.randn(samples, *s) for s in shapes]
    stored[0] = stored[0].movedim(2, -1).contiguous().movedim(-1, 2)
    coef = torch.rand(samples)
    coef[samples // 2] = 0
    n = sum(s[0].numel() for s in stored)
    options = dict(
        noise_std=1.0, denominator=2.0, key=bytes(32), step=1, rank=0, stream=1, optimizer="adam", lr=0.1, ema_decay=0.9,
        offset=3, _device=STEP_DEVICE,
    )  # fmt: skip
    one = [torch.randn(n), torch.randn(n), torch.zeros(n), torch.zeros(n), torch.zeros(n)]
    two = [t.clone() for t in one]

    def views(flat: torch.Tensor) -> list[torch.Tensor]:
        return [part.view(s) for part, s in zip(flat.split([s[0].numel() for s in stored]), shapes, strict=True)]

    cuda.weighted_sum_(views(two[1]), stored, coef)
    native.private_step_(*two, **options)
    native.summed_private_step_(*one, sums=views(one[1]), stored=stored, coef=coef, **options)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


def test_the_order_of_threads_changes_no_bit(shuffled: Callable[[int], None]) -> None:
    expected = _everything()
    for seed in (1, 2, 3):
        shuffled(seed)
        for a, b in zip(expected, _everything(), strict=True):
            assert torch.equal(a, b)


def test_a_driver_too_old_is_told_once_and_torch_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Extension:
        @staticmethod
        def cuda_problem() -> str:
            return "the kernels were built with CUDA 13.0, and the driver knows CUDA 12.4 at most"

    monkeypatch.setattr(native, "_HAS_CUDA", True)
    monkeypatch.setattr(native, "_C", Extension)
    native.cuda_usable.cache_clear()
    try:
        assert not native.cuda_usable() and not native.cuda_usable()
    finally:
        native.cuda_usable.cache_clear()
    assert [r.getMessage() for r in caplog.records] == [
        "CUDA kernels are not used (the kernels were built with CUDA 13.0, and the driver knows CUDA 12.4 at most): ops on the "
        "GPU run on plain torch"
    ]


def test_a_step_in_a_cuda_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(
        RuntimeError, match="private_step_ is being captured in a CUDA graph, whose replays would repeat its noise"
    ):
        native.refuse_capture("private_step_", torch.zeros(1))


@pytest.mark.parametrize("name", [n for n in ops._OP_NAMES if hasattr(cuda, n)])
def test_cuda_ops_have_the_reference_signature(name: str) -> None:
    plain = inspect.signature(getattr(reference, name)).parameters
    kernel = {k: v for k, v in inspect.signature(getattr(cuda, name)).parameters.items() if not k.startswith("_")}
    described = [[(p.name, p.kind, p.default) for p in side.values()] for side in (plain, kernel)]
    assert described[0] == described[1]


def test_launch_errors_name_the_op_and_the_shapes() -> None:
    x = torch.randn(8).as_strided((1, 1, 8), (8, 2**31, 1))  # a stride no kernel takes
    with pytest.raises(RuntimeError, match=r"linear_weight_grad on .* with x \(1, 1, 8\) float32, g .*beyond 31 bits"):
        cuda.linear_weight_grad(x, torch.randn(1, 1, 4), multiplicity=1)
