"""Convolution, linear and embedding gradients against the float64 reference, and the reference against autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, assert_norms, assert_sums, variant

from privimage_fast import ops
from privimage_fast.ops import native, reference

fixtures_are_constant = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def conv_case(
    b: int, k: int, c: int, p: int, size: tuple[int, ...], kernel: tuple[int, ...], stride: int = 1, padding: int = 0,
    dilation: int = 1, groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:  # fmt: skip
    dims = len(size)
    out = [(n + 2 * padding - dilation * (m - 1) - 1) // stride + 1 for n, m in zip(size, kernel, strict=True)]
    arguments = dict(
        kernel_size=kernel, stride=(stride,) * dims, padding=(padding,) * dims, dilation=(dilation,) * dims,
        groups=groups, multiplicity=k,
    )  # fmt: skip
    return torch.randn(b * k, c, *size), torch.randn(b * k, p, *out), arguments


def check_conv(x: torch.Tensor, g: torch.Tensor, arguments: dict[str, Any]) -> None:
    """The direct kernel, element by element; test_ops_winograd.py has the others, which round otherwise."""
    expected = reference.conv_weight_grad(x.double(), g.double(), **arguments)[1]
    magnitude = reference.conv_weight_grad(x.double().abs(), g.double().abs(), **arguments)[1]
    sq_norms, weights = native.conv_weight_grad(x, g, _algorithm="direct", **arguments)
    assert_sums(weights, expected, magnitude)
    assert_norms(sq_norms, weights)
    only_norms, nothing = native.conv_weight_grad(x, g, store=False, _algorithm="direct", **arguments)
    assert nothing is None
    torch.testing.assert_close(only_norms, sq_norms, rtol=1e-12, atol=0)

    start = torch.randn(expected.shape)
    out = start.clone()
    sq_norms, same = native.conv_weight_grad(x, g, out=out, _algorithm="direct", **arguments)
    assert same is out
    assert_sums(out, expected + start.double(), magnitude + start.double().abs())
    assert_norms(sq_norms, out)


# b, k, c, p, size, kernel, stride, padding, dilation, groups
CASES = [
    (1, 1, 1, 1, (1, 1), (1, 1), 1, 0, 1, 1),
    (3, 3, 5, 7, (1, 1), (3, 3), 1, 1, 1, 1),  # the image is smaller than the kernel
    (5, 1, 33, 17, (5, 3), (3, 3), 1, 1, 1, 1),
    (2, 2, 3, 40, (9, 11), (3, 3), 1, 1, 1, 1),  # few inputs: vectors over outputs
    (2, 1, 1, 64, (7, 7), (5, 5), 2, 2, 1, 1),
    (2, 3, 70, 3, (6, 5), (3, 3), 1, 1, 1, 1),
    (3, 2, 12, 8, (8, 7), (3, 3), 2, 1, 1, 4),
    (3, 1, 6, 12, (8, 7), (3, 2), 1, 0, 1, 6),  # depthwise with a multiplier, even kernel
    (2, 2, 16, 24, (11, 9), (3, 3), 1, 2, 2, 1),
    (2, 1, 20, 12, (13, 4), (1, 1), 3, 0, 1, 1),
    (1, 2, 34, 40, (16, 12), (3, 3), 1, 1, 1, 1),  # one sample on several threads
    (5, 1, 32, 9, (20, 18), (3, 3), 1, 1, 1, 1),  # several runs, samples not a multiple of the threads
    (2, 20, 32, 16, (4, 4), (3, 3), 1, 1, 1, 1),  # rows packed together, the last time not all
    (2, 9, 40, 8, (3, 3), (1, 1), 1, 0, 1, 1),
    (3, 2, 5, 6, (30,), (3,), 1, 1, 1, 1),
    (2, 2, 18, 4, (600,), (5,), 2, 3, 2, 2),  # a line longer than a run
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_shapes(isa: str, case: tuple[Any, ...]) -> None:
    check_conv(*conv_case(*case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CASES[3], CASES[6], CASES[10], CASES[12]], ids=str)
def test_conv_layouts(isa: str, case: tuple[Any, ...], layout: str) -> None:
    x, g, arguments = conv_case(*case)
    check_conv(variant(x, layout), g, arguments)
    check_conv(x, variant(g, layout), arguments)
    check_conv(variant(x, layout), variant(g, layout), arguments)


@fixtures_are_constant
@given(data=st.data())
def test_conv_any_shape(isa: str, data: st.DataObject) -> None:
    groups = data.draw(st.sampled_from([1, 1, 1, 2, 3]), "groups")
    c, p = groups * data.draw(st.integers(1, 40), "c"), groups * data.draw(st.integers(1, 40), "p")
    kernel = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)), "kernel")
    stride, padding, dilation = (data.draw(st.integers(low, 3), name) for low, name in ((1, "s"), (0, "p"), (1, "d")))
    least = [max(1, dilation * (m - 1) + 1 - 2 * padding) for m in kernel]
    size = tuple(data.draw(st.integers(n, n + 9), "size") for n in least)
    b, k = data.draw(st.integers(1, 4), "b"), data.draw(st.integers(1, 4), "k")
    check_conv(*conv_case(b, k, c, p, size, kernel, stride, padding, dilation, groups))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_reference_is_autograd(case: tuple[Any, ...]) -> None:
    x, g, arguments = conv_case(*case)
    b, k = case[0], case[1]
    got = reference.conv_weight_grad(x.double(), g.double(), **arguments)[1]
    options = {key: arguments[key] for key in ("stride", "padding", "dilation", "groups")}
    convolution = F.conv1d if x.dim() == 3 else F.conv2d
    for i in range(b):
        weight = torch.zeros(got.shape[1:], dtype=torch.float64, requires_grad=True)
        rows = slice(i * k, (i + 1) * k)
        convolution(x[rows].double(), weight, **options).backward(g[rows].double())
        torch.testing.assert_close(got[i], weight.grad, rtol=1e-10, atol=1e-10)


def test_conv_threads_do_not_change_bits(isa: str) -> None:
    x, g, arguments = conv_case(3, 2, 40, 20, (9, 9), (3, 3), 1, 1)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(native.conv_weight_grad(x, g, **arguments))
    finally:
        torch.set_num_threads(threads)
    for sq_norms, weights in results[1:]:
        assert torch.equal(weights, results[0][1])
        assert torch.equal(sq_norms, results[0][0])


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_conv_non_finite_sample_is_seen_and_alone(isa: str, value: float) -> None:
    x, g, arguments = conv_case(3, 2, 8, 8, (6, 6), (3, 3), 1, 1)
    g[2, 1, 3, 3] = value  # in sample 1
    sq_norms, _ = native.conv_weight_grad(x, g, **arguments)
    assert torch.isfinite(sq_norms).tolist() == [True, False, True]


def test_empty_batches(isa: str) -> None:
    x, g, arguments = conv_case(0, 2, 8, 4, (6, 6), (3, 3), 1, 1)
    sq_norms, weights = ops.conv_weight_grad(x, g, **arguments)
    assert sq_norms.shape == (0,) and weights.shape == (0, 4, 8, 3, 3)
    assert ops.conv_weight_grad(x, g, store=False, **arguments)[0].shape == (0,)
    sq_norms, weights = ops.linear_weight_grad(torch.zeros(0, 3, 4), torch.zeros(0, 3, 5), multiplicity=2)
    assert sq_norms.shape == (0,) and weights.shape == (0, 5, 4)
    sq_norms, _ = ops.linear_weight_grad(torch.zeros(0, 3, 4), torch.zeros(0, 3, 5), multiplicity=2, store=False)
    assert sq_norms.shape == (0,)
    sq_norms, weights = ops.linear_weight_grad(torch.zeros(4, 0, 4), torch.zeros(4, 0, 5), multiplicity=2)
    assert sq_norms.tolist() == [0, 0] and not weights.any()
    sq_norms, table = ops.embedding_grad(
        torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, 5), num_embeddings=4, padding_idx=None, multiplicity=1
    )
    assert sq_norms.shape == (0,) and table.shape == (0, 4, 5)


@pytest.mark.parametrize("layout", ["dense", "sliced", "transposed", "bf16"])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1), (3, 2, 7, 33, 5), (2, 1, 300, 16, 65), (2, 32, 1, 128, 40)])
def test_linear(isa: str, sizes: tuple[int, int, int, int, int], layout: str) -> None:
    b, k, t, d, p = sizes
    x, g = variant(torch.randn(b * k, t, d), layout), variant(torch.randn(b * k, t, p), layout)
    expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=k)[1]
    magnitude = reference.linear_weight_grad(x.double().abs(), g.double().abs(), multiplicity=k)[1]
    sq_norms, weights = native.linear_weight_grad(x, g, multiplicity=k)
    assert_sums(weights, expected, magnitude)
    assert_norms(sq_norms, weights)
    torch.testing.assert_close(native.linear_weight_grad(x, g, multiplicity=k, store=False)[0], sq_norms, rtol=1e-12, atol=0)
    out = torch.ones_like(weights)
    sq_norms, _ = native.linear_weight_grad(x, g, multiplicity=k, out=out)
    assert_sums(out, expected + 1, magnitude + 1)
    assert_norms(sq_norms, out)


def test_linear_reference_is_the_definition() -> None:
    x, g = torch.randn(6, 5, 4, dtype=torch.float64), torch.randn(6, 5, 3, dtype=torch.float64)
    expected = torch.einsum("bktd,bktp->bpd", x.view(2, 3, 5, 4), g.view(2, 3, 5, 3))
    sq_norms, weights = reference.linear_weight_grad(x, g, multiplicity=3)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(sq_norms, expected.square().sum((1, 2)))
    torch.testing.assert_close(reference.linear_weight_grad(x, g, multiplicity=3, store=False)[0], sq_norms)


@pytest.mark.parametrize("padding_idx", [None, 0, 4])
@pytest.mark.parametrize("layout", ["dense", "sliced", "bf16"])
def test_embedding(isa: str, padding_idx: int | None, layout: str) -> None:
    ids = torch.randint(0, 5, (6, 9))  # many duplicates
    g = variant(torch.randn(6, 9, 19), layout)
    arguments = dict(num_embeddings=5, padding_idx=padding_idx, multiplicity=2)
    sq_norms, table = native.embedding_grad(ids, g, **arguments)
    expected = torch.zeros(3, 5, 19, dtype=torch.float64)
    for row in range(6):
        for t in range(9):
            if ids[row, t] != padding_idx:
                expected[row // 2, ids[row, t]] += g[row, t].double()
    magnitude = reference.embedding_grad(ids, g.double().abs(), **arguments)[1]
    assert_sums(table, expected, magnitude)
    assert_norms(sq_norms, table)
    torch.testing.assert_close(reference.embedding_grad(ids, g.double(), **arguments)[1], expected)
    out = torch.ones_like(table)
    sq_norms, _ = native.embedding_grad(ids, g, out=out, **arguments)
    assert_sums(out, expected + 1, magnitude + 1)
    assert_norms(sq_norms, out)


def test_embedding_padding_drops_a_non_finite_gradient() -> None:
    ids, g = torch.tensor([[0, 1]]), torch.ones(1, 2, 3)
    g[0, 0] = float("inf")
    for embedding_grad in (ops.embedding_grad, reference.embedding_grad):
        sq_norms, _ = embedding_grad(ids, g, num_embeddings=2, padding_idx=0, multiplicity=1)
        assert sq_norms.tolist() == [3.0]


BAD_CONV: list[tuple[dict[str, Any], str]] = [
    ({"kernel_size": 3}, r"kernel_size is 3, expected a tuple of 2 integers ≥ 1"),
    ({"stride": (1,)}, r"stride is \(1,\)"),
    ({"padding": (-1, 0)}, r"padding is \(-1, 0\)"),
    ({"dilation": (0, 1)}, r"dilation is \(0, 1\)"),
    ({"groups": 3}, r"channels of x is 8, expected a multiple of groups = 3"),
    ({"multiplicity": 4}, r"number of rows is 6, expected a multiple of multiplicity = 4"),
    ({"multiplicity": 0}, r"multiplicity is 0"),
    ({"padding": (0, 0)}, r"spatial size of g is \(6, 6\), expected \(4, 4\)"),
    ({"out": torch.zeros(3, 4, 8, 3, 2)}, r"shape of out is \(3, 4, 8, 3, 2\), expected \(3, 4, 8, 3, 3\)"),
    ({"out": torch.zeros(3, 4, 8, 3, 3), "store": False}, r"out is given, expected None with store=False"),
]


@pytest.mark.parametrize(("change", "message"), BAD_CONV, ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("module", [ops, reference])
def test_conv_errors_name_the_argument(module: Any, change: dict[str, Any], message: str) -> None:
    x, g, arguments = conv_case(3, 2, 8, 4, (6, 6), (3, 3), 1, 1)
    with pytest.raises(ValueError, match="conv_weight_grad: " + message):
        module.conv_weight_grad(x, g, **{**arguments, **change})


def test_type_errors() -> None:
    x, g, arguments = conv_case(3, 2, 8, 4, (6, 6), (3, 3), 1, 1)
    with pytest.raises(TypeError, match=r"conv_weight_grad: x has dtype torch\.int64"):
        ops.conv_weight_grad(x.long(), g, **arguments)
    with pytest.raises(TypeError, match=r"conv_weight_grad: out has dtype torch\.float16"):
        ops.conv_weight_grad(x, g, out=torch.zeros(3, 4, 8, 3, 3, dtype=torch.float16), **arguments)
    with pytest.raises(TypeError, match=r"bias_grad: out has dtype torch\.bfloat16"):
        ops.bias_grad(g, channel_dim=1, multiplicity=2, out=torch.zeros(3, 4, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match=r"conv_weight_grad: store_dtype is torch\.float16, expected torch\.float32 or"):
        ops.conv_weight_grad(x, g, store_dtype=torch.float16, **arguments)
    with pytest.raises(TypeError, match=r"linear_weight_grad: store_dtype is torch\.float64"):
        ops.linear_weight_grad(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), multiplicity=1, store_dtype=torch.float64)
    with pytest.raises(TypeError, match="linear_weight_grad: x is list"):
        ops.linear_weight_grad([1.0], torch.zeros(1, 1, 1), multiplicity=1)
    with pytest.raises(TypeError, match=r"embedding_grad: ids has dtype torch\.float32"):
        ops.embedding_grad(torch.zeros(1, 1), torch.zeros(1, 1, 1), num_embeddings=1, padding_idx=None, multiplicity=1)


@pytest.mark.parametrize("bad", [-1, 5])
def test_embedding_refuses_ids_outside_the_table(bad: int) -> None:
    with pytest.raises(ValueError, match=r"embedding_grad: range of ids"):
        ops.embedding_grad(torch.tensor([[0, bad]]), torch.zeros(1, 2, 3), num_embeddings=5, padding_idx=None, multiplicity=1)


def test_kernels_of_cpu_tensors_answer_on_the_cpu_whatever_the_default_device_is() -> None:
    """Scripts that set it to a GPU still hold tensors here: a kernel must not write to memory of the default device."""
    x, g = torch.randn(4, 5, 6, 6), torch.randn(4, 7, 6, 6)
    conv = dict(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, multiplicity=2)
    statistics = torch.randn(4, 1), torch.rand(4, 1)
    sq = torch.rand(3, dtype=torch.float64)

    def everything() -> list[torch.Tensor]:
        found = [*native.conv_weight_grad(x, g, **conv), native.conv_gram_norms(x, g, **conv)]
        found += native.bias_grad(g, channel_dim=1, multiplicity=2)
        found += native.group_norm_affine_grad(x, x, *statistics, num_groups=1, multiplicity=2)
        found += native.linear_weight_grad(x.flatten(2), g.flatten(2)[:, :5], multiplicity=2)
        found += [native.linear_gram_norms(x.flatten(2), g.flatten(2)[:, :5], multiplicity=2), native.clip_factors(sq, 1.0)]
        ids = torch.arange(8, device="cpu").view(4, 2)
        return found + list(native.embedding_grad(ids, x[:, :2, 0], num_embeddings=9, padding_idx=None, multiplicity=2))

    expected = everything()
    with torch.device("meta"):
        found = everything()
    for a, b in zip(found, expected, strict=True):
        assert a.device.type == "cpu" and torch.equal(a, b)
