"""Bias, group-norm and layer-norm gradients against the float64 reference, and the reference against autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from ops_helpers import assert_norms, assert_sums, variant

from privimage_fast.ops import native, reference


@pytest.mark.parametrize("layout", ["dense", "channels_last", "sliced", "bf16"])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((6, 5, 7, 3), 1), ((6, 33, 4, 4), 1), ((6, 9, 21), -1), ((6, 4), 1), ((6, 3, 17, 5), 2), ((6, 1, 1), 1)],
)
def test_bias(isa: str, shape: tuple[int, ...], dim: int, layout: str) -> None:
    g = variant(torch.randn(shape), layout)
    others = [d for d in range(1, len(shape)) if d != dim % len(shape)]
    expected = g.double().sum(others).view(3, 2, -1).sum(1) if others else g.double().view(3, 2, -1).sum(1)
    magnitude = reference.bias_grad(g.double().abs(), channel_dim=dim, multiplicity=2)[1]
    torch.testing.assert_close(reference.bias_grad(g.double(), channel_dim=dim, multiplicity=2)[1], expected)
    sq_norms, bias = native.bias_grad(g, channel_dim=dim, multiplicity=2)
    assert_sums(bias, expected, magnitude)
    assert_norms(sq_norms, bias)
    out = torch.ones_like(bias)
    sq_norms, _ = native.bias_grad(g, channel_dim=dim, multiplicity=2, out=out)
    assert_sums(out, expected + 1, magnitude + 1)
    assert_norms(sq_norms, out)


@pytest.mark.parametrize("layout", ["dense", "channels_last", "sliced", "bf16"])
@pytest.mark.parametrize(("channels", "groups", "spatial"), [(6, 3, (5, 7)), (40, 4, (4, 4)), (3, 1, (1, 1)), (32, 32, (9,))])
def test_group_norm(isa: str, channels: int, groups: int, spatial: tuple[int, ...], layout: str) -> None:
    rows, k = 6, 3
    x = variant(torch.randn(rows, channels, *spatial) + 50, layout)  # a mean that a cancelling formula would lose to
    g = variant(torch.randn(rows, channels, *spatial), layout)
    grouped = x.double().reshape(rows, groups, -1)
    mean, rstd = grouped.mean(2), (grouped.var(2, correction=0) + 1e-5).rsqrt()
    mean32, rstd32 = mean.float(), rstd.float()
    _, expected_w, _, expected_b = reference.group_norm_affine_grad(
        x.double(), g.double(), mean32.double(), rstd32.double(), num_groups=groups, multiplicity=k
    )
    deviation = (grouped - mean32.double().unsqueeze(2)).abs().reshape(x.shape)
    _, magnitude_w, _, magnitude_b = reference.group_norm_affine_grad(
        deviation, g.double().abs(), torch.zeros_like(mean), rstd32.double(), num_groups=groups, multiplicity=k
    )
    sq_w, weight, sq_b, bias = native.group_norm_affine_grad(x, g, mean32, rstd32, num_groups=groups, multiplicity=k)
    assert_sums(weight, expected_w, magnitude_w)
    assert_sums(bias, expected_b, magnitude_b)
    assert_norms(sq_w, weight)
    assert_norms(sq_b, bias)
    out_weight = torch.ones_like(weight)
    sq_w, again, _, plain = native.group_norm_affine_grad(
        x, g, mean32, rstd32, num_groups=groups, multiplicity=k, out_weight=out_weight
    )
    assert again is out_weight
    assert_sums(out_weight, expected_w + 1, magnitude_w + 1)
    assert_norms(sq_w, out_weight)
    assert torch.equal(plain, bias)


def test_group_norm_reference_is_autograd() -> None:
    x, g = torch.randn(4, 6, 3, 5, dtype=torch.float64), torch.randn(4, 6, 3, 5, dtype=torch.float64)
    _, mean, rstd = torch.native_group_norm(x, None, None, 4, 6, 15, 2, 1e-5)
    _, weight, _, bias = reference.group_norm_affine_grad(x, g, mean, rstd, num_groups=2, multiplicity=2)
    for b in range(2):
        w, v = (torch.zeros(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
        F.group_norm(x[2 * b : 2 * b + 2], 2, w, v).backward(g[2 * b : 2 * b + 2])
        torch.testing.assert_close(weight[b], w.grad)
        torch.testing.assert_close(bias[b], v.grad)


@pytest.mark.parametrize("layout", ["dense", "sliced", "bf16"])
@pytest.mark.parametrize(("positions", "width"), [(7, 19), (1, 64), (33, 1)])
def test_layer_norm(isa: str, positions: int, width: int, layout: str) -> None:
    x, g = (variant(torch.randn(6, positions, width) + shift, layout) for shift in (50, 0))
    mean, rstd = x.float().mean(2), (x.float().var(2, correction=0) + 1e-5).rsqrt()
    arguments = (mean.double(), rstd.double())
    _, expected_w, _, expected_b = reference.layer_norm_affine_grad(x.double(), g.double(), *arguments, multiplicity=2)
    deviation = (x.double() - mean.double().unsqueeze(2)).abs()
    _, magnitude_w, _, magnitude_b = reference.layer_norm_affine_grad(
        deviation, g.double().abs(), torch.zeros_like(arguments[0]), arguments[1], multiplicity=2
    )
    sq_w, weight, sq_b, bias = native.layer_norm_affine_grad(x, g, mean, rstd, multiplicity=2)
    assert_sums(weight, expected_w, magnitude_w)
    assert_sums(bias, expected_b, magnitude_b)
    assert_norms(sq_w, weight)
    assert_norms(sq_b, bias)


def test_layer_norm_reference_is_autograd() -> None:
    x, g = torch.randn(4, 3, 8, dtype=torch.float64), torch.randn(4, 3, 8, dtype=torch.float64)
    _, mean, rstd = torch.native_layer_norm(x, [8], None, None, 1e-5)
    _, weight, _, bias = reference.layer_norm_affine_grad(x, g, mean[..., 0], rstd[..., 0], multiplicity=2)
    for b in range(2):
        w, v = (torch.zeros(8, dtype=torch.float64, requires_grad=True) for _ in range(2))
        F.layer_norm(x[2 * b : 2 * b + 2], (8,), w, v).backward(g[2 * b : 2 * b + 2])
        torch.testing.assert_close(weight[b], w.grad)
        torch.testing.assert_close(bias[b], v.grad)


def test_errors_name_the_argument() -> None:
    x = torch.zeros(4, 6, 2, 2)
    with pytest.raises(ValueError, match="group_norm_affine_grad: num_groups is 4, expected a divisor of 6"):
        reference.group_norm_affine_grad(x, x, torch.zeros(4, 4), torch.zeros(4, 4), num_groups=4, multiplicity=1)
    with pytest.raises(ValueError, match=r"group_norm_affine_grad: shape of mean is \(4, 3\), expected \(4, 2\)"):
        native.group_norm_affine_grad(x, x, torch.zeros(4, 3), torch.zeros(4, 2), num_groups=2, multiplicity=1)
    with pytest.raises(ValueError, match="bias_grad: channel_dim is 0"):
        native.bias_grad(x, channel_dim=0, multiplicity=1)
