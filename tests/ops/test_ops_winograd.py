"""Winograd weight gradients against the float64 reference: every algorithm, awkward shapes, and which one is chosen.

Winograd's form rounds sums of several inputs, so a small element carries the error of its large neighbours: errors are
measured against the whole gradient of a sample, not element by element as for the direct kernel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ops_helpers import LAYOUTS, assert_norms, variant

from privimage_fast.ops import native, reference

WINOGRAD = ("winograd2", "winograd4")
ALGORITHMS = ("direct", *WINOGRAD)
# ‖error‖ / ‖Σ|g||x|‖, the same sum over absolute values. Measured: at most 0.5e-7, 0.8e-7 and 2.1e-7.
TOLERANCE = {"direct": 2e-7, "winograd2": 3e-7, "winograd4": 8e-7}


def case(
    b: int, k: int, c: int, p: int, size: tuple[int, int], padding: int = 1, groups: int = 1
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Activations with an offset and small gradients, as a network has them."""
    x = torch.randn(b * k, c, *size) + torch.randn(c, 1, 1)
    g = 1e-3 * torch.randn(b * k, p, *(n + 2 * padding - 2 for n in size))
    arguments = dict(
        kernel_size=(3, 3), stride=(1, 1), padding=(padding, padding), dilation=(1, 1), groups=groups, multiplicity=k
    )
    return x, g, arguments


def error(weights: torch.Tensor, x: torch.Tensor, g: torch.Tensor, arguments: dict[str, Any], start: float = 0) -> float:
    expected = reference.conv_weight_grad(x.double(), g.double(), **arguments)[1] + start
    magnitude = reference.conv_weight_grad(x.double().abs(), g.double().abs(), **arguments)[1] + abs(start)
    assert weights.shape == expected.shape and weights.dtype == torch.float32
    norms = [t.flatten(1).norm(dim=1) for t in (weights.double() - expected, magnitude)]
    return (norms[0] / norms[1].clamp_min(1e-30)).max().item()


def check(algorithm: str, x: torch.Tensor, g: torch.Tensor, arguments: dict[str, Any]) -> None:
    sq_norms, weights = native.conv_weight_grad(x, g, _algorithm=algorithm, **arguments)
    assert error(weights, x, g, arguments) <= TOLERANCE[algorithm]
    assert_norms(sq_norms, weights)
    only_norms, nothing = native.conv_weight_grad(x, g, store=False, _algorithm=algorithm, **arguments)
    assert nothing is None
    torch.testing.assert_close(only_norms, sq_norms, rtol=1e-12, atol=0)
    out = torch.full(weights.shape, 0.5)  # torch's order: a weight's lanes are not adjacent
    sq_norms, same = native.conv_weight_grad(x, g, out=out, _algorithm=algorithm, **arguments)
    assert same is out
    assert error(out, x, g, arguments, start=0.5) <= TOLERANCE[algorithm]
    assert_norms(sq_norms, out)
    again = weights.clone(memory_format=torch.preserve_format)
    sq_norms, _ = native.conv_weight_grad(x, g, out=again, _algorithm=algorithm, **arguments)
    torch.testing.assert_close(again, 2 * weights, rtol=1e-6, atol=0)
    assert_norms(sq_norms, again)


# b, k, c, p, size, padding, groups
CASES = [
    (1, 1, 1, 1, (1, 1)),
    (2, 3, 3, 5, (1, 1)),
    (5, 1, 33, 5, (1, 2)),
    (2, 1, 5, 33, (5, 3), 0),
    (1, 8, 3, 3, (7, 7), 2),
    (2, 3, 33, 33, (9, 11)),
    (2, 1, 16, 12, (8, 8)),
    (1, 3, 40, 7, (13, 4), 0),
    (5, 1, 8, 6, (6, 31), 2),
    (2, 8, 17, 13, (10, 10)),
    (3, 1, 12, 24, (8, 7), 1, 4),
    (2, 2, 6, 6, (5, 5), 2, 2),
    (1, 1, 20, 9, (40, 36)),  # several bands of one image
    (2, 8, 18, 14, (32, 32)),  # several runs, sums in memory
    (1, 5, 64, 48, (30, 30)),
    (2, 1, 3, 4, (3, 140)),  # tile rows as long as a run
]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", CASES, ids=str)
def test_shapes(isa: str, shape: tuple[Any, ...], algorithm: str) -> None:
    check(algorithm, *case(*shape))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("algorithm", WINOGRAD)
def test_layouts(isa: str, algorithm: str, layout: str) -> None:
    x, g, arguments = case(2, 3, 21, 13, (9, 10))
    check(algorithm, variant(x, layout), g, arguments)
    check(algorithm, x, variant(g, layout), arguments)
    check(algorithm, variant(x, layout), variant(g, layout), arguments)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_shape(isa: str, data: st.DataObject) -> None:
    draw = data.draw
    groups, padding = draw(st.sampled_from([1, 1, 2, 3]), "groups"), draw(st.integers(0, 3), "padding")
    low = max(1, 3 - 2 * padding)
    size = (draw(st.integers(low, low + 14), "height"), draw(st.integers(low, low + 14), "width"))
    c, p = groups * draw(st.integers(1, 40), "c"), groups * draw(st.integers(1, 40), "p")
    b, k = draw(st.integers(1, 4), "b"), draw(st.integers(1, 4), "k")
    check(draw(st.sampled_from(WINOGRAD), "algorithm"), *case(b, k, c, p, size, padding, groups))


@pytest.mark.parametrize("algorithm", WINOGRAD)
def test_error_against_the_gradient_itself(isa: str, algorithm: str) -> None:
    """Random signs cancel, so the gradient is far smaller than the sum of magnitudes; so is the error."""
    x, g, arguments = case(2, 8, 32, 32, (32, 32))
    expected = reference.conv_weight_grad(x.double(), g.double(), **arguments)[1].flatten(1)
    weights = native.conv_weight_grad(x, g, _algorithm=algorithm, **arguments)[1].flatten(1)
    assert ((weights - expected).norm(dim=1) / expected.norm(dim=1)).max().item() < 2e-6


@pytest.mark.parametrize("algorithm", (*ALGORITHMS, "auto"))
@pytest.mark.parametrize("shape", [(3, 2, 40, 20, (9, 9)), (1, 9, 34, 15, (32, 32)), (4, 1, 64, 64, (8, 8))], ids=str)
def test_threads_do_not_change_bits(isa: str, shape: tuple[Any, ...], algorithm: str) -> None:
    x, g, arguments = case(*shape)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            results.append(native.conv_weight_grad(x, g, _algorithm=algorithm, **arguments))
    finally:
        torch.set_num_threads(threads)
    for sq_norms, weights in results[1:]:
        assert torch.equal(weights, results[0][1])
        assert torch.equal(sq_norms, results[0][0])


@pytest.mark.parametrize("algorithm", WINOGRAD)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["x", "g"])
def test_non_finite_rows_stay_in_their_sample(isa: str, where: str, value: float, algorithm: str) -> None:
    x, g, arguments = case(3, 2, 9, 8, (7, 6))
    clean, _ = native.conv_weight_grad(x, g, _algorithm=algorithm, **arguments)
    for position in ((0, 0), (3, 2), (6, 5)):
        bad = {"x": x.clone(), "g": g.clone()}
        bad[where][2, 1, position[0], position[1]] = value  # in sample 1
        sq_norms, weights = native.conv_weight_grad(bad["x"], bad["g"], _algorithm=algorithm, **arguments)
        assert torch.isfinite(sq_norms).tolist() == [True, False, True]
        assert torch.equal(sq_norms[[0, 2]], clean[[0, 2]])
        assert torch.isfinite(weights[[0, 2]]).all()


def test_a_norm_alone_is_the_direct_kernels(isa: str) -> None:
    """Another computation sums that gradient, and the slack between the two is that of plain rounding."""
    x, g, arguments = case(2, 1, 64, 64, (32, 32))
    direct = native.conv_weight_grad(x, g, store=False, _algorithm="direct", **arguments)[0]
    assert torch.equal(native.conv_weight_grad(x, g, store=False, **arguments)[0], direct)
    stored = native.conv_weight_grad(x, g, **arguments)[1]
    assert not torch.equal(stored, native.conv_weight_grad(x, g, _algorithm="direct", **arguments)[1])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 1, 64, 64, (32, 32)), "winograd4"),
        ((1, 8, 64, 64, (8, 8)), "winograd4"),
        ((2, 1, 1, 64, (32, 32)), "direct"),  # transforms of g would cost more than they save
        ((2, 1, 8, 8, (2, 2)), "direct"),
    ],
    ids=str,
)
def test_the_choice(isa: str, shape: tuple[Any, ...], expected: str) -> None:
    x, g, arguments = case(*shape)
    weights = native.conv_weight_grad(x, g, **arguments)[1]
    same = [a for a in ALGORITHMS if torch.equal(weights, native.conv_weight_grad(x, g, _algorithm=a, **arguments)[1])]
    assert same == [expected]


@pytest.mark.parametrize("change", [{"stride": (2, 2)}, {"dilation": (2, 2)}, {"kernel_size": (3, 2)}], ids=str)
def test_winograd_refuses_other_convolutions(isa: str, change: dict[str, Any]) -> None:
    arguments = {**case(1, 1, 4, 4, (8, 8))[2], **change}
    spans = [d * (m - 1) + 1 for d, m in zip(arguments["dilation"], arguments["kernel_size"], strict=True)]
    out = [(8 + 2 - span) // s + 1 for span, s in zip(spans, arguments["stride"], strict=True)]
    x, g = torch.randn(1, 4, 8, 8), torch.randn(1, 4, *out)
    with pytest.raises(ValueError, match="_algorithm is winograd4, expected direct"):
        native.conv_weight_grad(x, g, _algorithm="winograd4", **arguments)
    assert error(native.conv_weight_grad(x, g, **arguments)[1], x, g, arguments) <= TOLERANCE["direct"]


def test_unknown_algorithm_is_named(isa: str) -> None:
    x, g, arguments = case(1, 1, 4, 4, (8, 8))
    with pytest.raises(ValueError, match="_algorithm is fastest, expected auto, direct, winograd2 or winograd4"):
        native.conv_weight_grad(x, g, _algorithm="fastest", **arguments)
