"""Ghost norms from Gram matrices against the norms of float64 gradients, and the reference against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, variant
from test_ops_weight_grads import BAD_CONV, conv_case
from test_ops_weight_grads import CASES as CONV_CASES

from privimage_fast import ops
from privimage_fast.ops import native, reference

fixtures_are_constant = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def check_conv(x: torch.Tensor, g: torch.Tensor, arguments: dict[str, Any]) -> None:
    expected = reference.conv_weight_grad(x.double(), g.double(), **arguments)[0]
    got = native.conv_gram_norms(x, g, **arguments)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


# b, k, c, p, size, kernel, stride, padding, dilation, groups
CASES = [
    *CONV_CASES,
    (2, 1, 3, 5, (4, 100), (3, 3), 1, 1, 1, 1),  # several segments an image, with what they share
    (2, 2, 3, 2, (3, 101), (2, 4), 3, 2, 2, 1),  # segments and phases at once
    (1, 5, 4, 3, (7, 7), (3, 3), 1, 1, 1, 1),  # images side by side, several lines
    (2, 11, 3, 4, (5, 9), (3, 3), 2, 1, 1, 1),  # the last line is not full
    (2, 2, 4, 4, (1, 4), (3, 5), 4, 5, 3, 1),  # phases that see nothing but padding
    (2, 2, 9, 5, (2, 2), (1, 1), 1, 2, 1, 1),  # 1×1 with padding is not flat
    (2, 3, 4, 6, (9, 10), (1, 1), 2, 0, 1, 2),
    (1, 1, 4, 5, (3, 9), (2, 3), 1, 0, 3, 1),  # input columns that no output sees
    (2, 1, 5, 3, (49,), (1,), 1, 0, 1, 1),
    (2, 1, 5, 3, (300,), (4,), 1, 2, 2, 1),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_shapes(isa: str, case: tuple[Any, ...]) -> None:
    check_conv(*conv_case(*case))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [CONV_CASES[3], CONV_CASES[6], CONV_CASES[10], CONV_CASES[12], CONV_CASES[9]], ids=str)
def test_conv_layouts(isa: str, case: tuple[Any, ...], layout: str) -> None:
    x, g, arguments = conv_case(*case)
    check_conv(variant(x, layout), g, arguments)
    check_conv(x, variant(g, layout), arguments)
    check_conv(variant(x, layout), variant(g, layout), arguments)


@fixtures_are_constant
@given(data=st.data())
def test_conv_any_shape(isa: str, data: st.DataObject) -> None:
    def pair(name: str, low: int, high: int) -> tuple[int, int]:
        return data.draw(st.tuples(st.integers(low, high), st.integers(low, high)), name)

    groups = data.draw(st.sampled_from([1, 1, 2, 3]), "groups")
    c, p = groups * data.draw(st.integers(1, 9), "c"), groups * data.draw(st.integers(1, 9), "p")
    kernel, stride, padding, dilation = pair("kernel", 1, 4), pair("stride", 1, 5), pair("padding", 0, 4), pair("dilation", 1, 4)
    size, out = [], []
    for m, s, q, d, extra in zip(kernel, stride, padding, dilation, pair("extra", 0, 20), strict=True):
        size.append(max(1, d * (m - 1) + 1 - 2 * q) + extra)
        out.append((size[-1] + 2 * q - d * (m - 1) - 1) // s + 1)
    b, k = data.draw(st.integers(1, 3), "b"), data.draw(st.integers(1, 5), "k")
    arguments = dict(kernel_size=kernel, stride=stride, padding=padding, dilation=dilation, groups=groups, multiplicity=k)
    check_conv(torch.randn(b * k, c, *size), torch.randn(b * k, p, *out), arguments)


@pytest.mark.parametrize("layout", ["dense", "sliced", "transposed", "bf16"])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1, 1), (3, 1, 1, 37, 70), (3, 2, 7, 33, 5), (2, 1, 300, 16, 65), (2, 32, 1, 128, 40), (2, 3, 17, 3, 9)]
)
def test_linear(isa: str, sizes: tuple[int, int, int, int, int], layout: str) -> None:
    b, k, t, d, p = sizes
    x, g = variant(torch.randn(b * k, t, d), layout), variant(torch.randn(b * k, t, p), layout)
    expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=k)[0]
    torch.testing.assert_close(native.linear_gram_norms(x, g, multiplicity=k), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_reference_is_the_norm_of_the_gradient(case: tuple[Any, ...]) -> None:
    x, g, arguments = conv_case(*case)
    expected = reference.conv_weight_grad(x.double(), g.double(), **arguments)[0]
    torch.testing.assert_close(reference.conv_gram_norms(x, g, **arguments), expected, rtol=1e-10, atol=0)


def test_linear_reference_is_the_norm_of_the_gradient() -> None:
    x, g = torch.randn(6, 5, 4), torch.randn(6, 5, 3)
    expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=3)[0]
    torch.testing.assert_close(reference.linear_gram_norms(x, g, multiplicity=3), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("module", [native, reference], ids=["native", "reference"])
def test_a_norm_far_below_its_terms(isa: str, module: Any) -> None:
    """Two positions that cancel but for one part in 2^20: the norm is 2^-40 of the terms."""
    x = torch.randn(1, 1, 40).expand(2, 2, 40).clone()
    g = torch.randn(2, 2, 30)
    g[:, 1] = -g[:, 0] * (1 + 2**-20)  # rounded to float32, so the difference is exact in double
    expected = reference.linear_weight_grad(x.double(), g.double(), multiplicity=1)[0]
    terms = (x[:, 0].double().square().sum(1)) * g[:, 0].double().square().sum(1)
    assert bool((expected < 1e-11 * terms).all())
    got = module.linear_gram_norms(x, g, multiplicity=1)
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=0)
    g[:, 1] = -g[:, 0]
    assert bool((module.linear_gram_norms(x, g, multiplicity=1) >= 0).all())


def test_threads_do_not_change_bits(isa: str) -> None:
    threads = torch.get_num_threads()
    linear = torch.randn(3, 130, 40), torch.randn(3, 130, 20)
    results = []
    try:
        for case in [(3, 2, 40, 20, (9, 9), (3, 3), 1, 1), (4, 7, 6, 5, (4, 70), (3, 3), 2, 1, 1, 1)]:
            torch.manual_seed(1)
            x, g, arguments = conv_case(*case)
            for n in (1, 2, 5):
                torch.set_num_threads(n)
                results.append(native.conv_gram_norms(x, g, **arguments))
            assert all(torch.equal(r, results[-3]) for r in results[-2:])
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(native.linear_gram_norms(*linear, multiplicity=1))
        assert all(torch.equal(r, results[-3]) for r in results[-2:])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("module", [native, reference], ids=["native", "reference"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "g"])
def test_non_finite_sample_is_seen_and_alone(isa: str, where: str, value: float, module: Any) -> None:
    x, g, arguments = conv_case(4, 2, 8, 8, (6, 6), (3, 3), 1, 1)
    (x if where == "x" else g)[3, 1, 3, 3] = value  # in sample 1
    got = module.conv_gram_norms(x, g, **arguments)
    assert torch.isfinite(got).tolist() == [True, False, True, True]
    assert not (got < 0).any()
    x, g = torch.randn(8, 3, 5), torch.randn(8, 3, 4)
    (x if where == "x" else g)[3, 1, 3] = value
    assert torch.isfinite(module.linear_gram_norms(x, g, multiplicity=2)).tolist() == [True, False, True, True]
    # Nothing of that sample stays behind in the kernel's memory.
    x, g, arguments = conv_case(4, 2, 8, 8, (6, 6), (3, 3), 1, 1)
    assert torch.isfinite(module.conv_gram_norms(x, g, **arguments)).all()


def test_what_no_output_sees_does_not_count(isa: str) -> None:
    x, g, arguments = conv_case(2, 1, 4, 5, (3, 9), (2, 3), 3, 0)
    expected = native.conv_gram_norms(x, g, **arguments)
    x[0, :, 2, :] = float("inf")
    x[1, :, :, 8] = float("nan") if arguments["stride"][1] * (g.shape[3] - 1) + 2 < 8 else x[1, :, :, 8]
    assert torch.equal(native.conv_gram_norms(x, g, **arguments), expected)
    x, g, arguments = conv_case(1, 1, 4, 5, (1, 5), (1, 3), 1, 0, 2)
    expected = native.conv_gram_norms(x, g, **arguments)
    x[..., 1::2] = float("inf")
    assert torch.equal(native.conv_gram_norms(x, g, **arguments), expected)


@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_empty(isa: str, module: Any) -> None:
    x, g, arguments = conv_case(0, 2, 8, 4, (6, 6), (3, 3), 1, 1)
    assert module.conv_gram_norms(x, g, **arguments).shape == (0,)
    assert module.linear_gram_norms(torch.zeros(0, 3, 4), torch.zeros(0, 3, 5), multiplicity=2).shape == (0,)
    nothing = module.linear_gram_norms(torch.zeros(4, 0, 4), torch.zeros(4, 0, 5), multiplicity=2)
    assert nothing.tolist() == [0, 0] and nothing.dtype == torch.float64


@pytest.mark.parametrize(("change", "message"), [c for c in BAD_CONV if "out" not in c[0]], ids=lambda v: str(v)[:40])
@pytest.mark.parametrize("module", [ops, reference], ids=["ops", "reference"])
def test_errors_name_the_argument(module: Any, change: dict[str, Any], message: str) -> None:
    x, g, arguments = conv_case(3, 2, 8, 4, (6, 6), (3, 3), 1, 1)
    with pytest.raises(ValueError, match="conv_gram_norms: " + message):
        module.conv_gram_norms(x, g, **{**arguments, **change})
