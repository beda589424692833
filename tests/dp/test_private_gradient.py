"""pf.PrivacyEngine: gradients against the double-precision oracle, and the clip bound."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_loop
from private_helpers import (
    Discriminator,
    batch_step,
    data,
    derived_net,
    expected_gradient,
    gradient,
    private,
    small_net,
    weights,
)
from torch import Tensor, nn

import privimage_fast as pf
from privimage_fast.dp.rules import UncoveredParameterError


class Attention(nn.Module):
    """Class token, position embedding, an encoder layer, a tied weight: what vision transformers are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 6)), nn.Parameter(torch.randn(3, 6))
        self.layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.0, batch_first=True)
        self.head, self.again = nn.Linear(6, 3), nn.Linear(6, 3)
        self.again.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), x.unflatten(1, (2, 6))], 1) + self.position
        h = self.layer(h)
        return self.head(h[:, 0]) + self.again(h[:, 1])


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular"),
        nn.GroupNorm(2, 4),
        nn.LeakyReLU(0.2, inplace=True),
        nn.Conv2d(4, 6, 2, 2, bias=False),
        nn.Flatten(),
        nn.Linear(54, 3),
    )


MODULES = {
    "linear": (small_net, (6,)),
    "conv": (conv_net, (1, 6, 6)),
    "attention": (Attention, (12,)),
    "derived": (derived_net, (6,)),
}


@pytest.mark.parametrize("strategy", ["auto", "store", "gram", "norm-only"])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_equals_the_per_sample_loop(name: str, reduction: str, strategy: str) -> None:
    torch.manual_seed(0)
    make, shape = MODULES[name]
    module, dataset = make(), data(8, shape, scale=2.0)
    x, y = dataset.tensors
    expected = expected_gradient(module, x, y, 0.7)
    module, optimizer, loader, _ = private(module, dataset, max_grad_norm=0.7, loss_reduction=reduction, strategy=strategy)
    for x, y in loader:
        F.cross_entropy(module(x), y, reduction=reduction).backward()
        optimizer.step()
    scale = 8 if reduction == "mean" else 1
    error = (gradient(module) * scale - expected).norm() / expected.norm()
    assert float(error) < 2e-5


@pytest.mark.parametrize("multiplicity", [1, 3])
@pytest.mark.parametrize("name", ["conv", "attention", "derived"])
def test_one_sample_contributes_c_and_no_more(name: str, multiplicity: int) -> None:
    """From the update itself: ‖sum‖ ≤ C(1 + 1e-6), and no less than C for a large gradient."""
    torch.manual_seed(0)
    make, shape = MODULES[name]
    for c in (1e-3, 0.2):
        module = make()
        dataset = data(1, shape, scale=5.0)
        _, optimizer, loader, _ = private(module, dataset, max_grad_norm=c, multiplicity=multiplicity)
        for x, _ in loader:
            (module(x.repeat_interleave(multiplicity, 0)) * 1e3).square().sum(1).mean().backward()
            optimizer.step()
        found = float(gradient(module).norm())
        assert c * (1 - 2e-5) <= found <= c * (1 + 1e-6)


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
def test_adding_a_sample_changes_the_sum_by_at_most_c(clipping: str) -> None:
    """Neighbouring sets: the mean over n + 1 rows is another loss, and yet the sum moves by the sensitivity only."""
    options: dict[str, Any] = {"unclipped_num_std": 1.0} if clipping == "adaptive" else {}
    x, y = data(9, scale=20.0).tensors
    sums = []
    for rows in (8, 9):
        module, optimizer, _, _ = private(small_net(), max_grad_norm=0.05, clipping=clipping, **options)
        batch_step(module, optimizer, x[:rows], y[:rows])
        sums.append(gradient(module) * optimizer.expected_batch_size)
    change = float((sums[1] - sums[0]).norm())
    assert 0.05 * (1 - 1e-2) <= change <= 0.05 * (1 + 1e-5)


def test_rows_of_a_sample_are_averaged_and_clipped_once() -> None:
    module, dataset = small_net(), data(12, scale=3.0)
    x, y = dataset.tensors
    expected = expected_gradient(module, x, y, 0.3, multiplicity=3)
    module, optimizer, _, _ = private(module, dataset, multiplicity=3, batch_size=4)
    batch_step(module, optimizer, x, y)
    torch.testing.assert_close(gradient(module) * optimizer.expected_batch_size, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backward_calls", [1, 2])
def test_two_calls_in_a_step_are_one_gradient_a_sample(backward_calls: int) -> None:
    torch.manual_seed(0)
    module, dataset = Discriminator(), data(8, scale=3.0)
    real, fake = dataset.tensors[0], torch.randn(8, 6)

    def both(m: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return F.softplus(-m(a)) + F.softplus(m(b))

    sums, norms = per_sample_loop(module, both, (real, fake), max_grad_norm=2.0)
    assert float(norms.min()) < 2 < float(norms.max())
    module, optimizer, loader, _ = private(module, dataset, max_grad_norm=2.0)
    for x, _ in loader:
        losses = F.softplus(-module(x)).mean(), F.softplus(module(fake)).mean()
        for loss in [sum(losses)] if backward_calls == 1 else losses:
            loss.backward()
        optimizer.step()
    expected = torch.cat([s.flatten() for s in sums.values()])
    torch.testing.assert_close(gradient(module) * 8, expected, rtol=1e-4, atol=1e-6)


def test_gradient_penalty() -> None:
    torch.manual_seed(0)
    module, dataset = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), data(8)

    def loss(m: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        out = m(x)[:, 0]
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out + 10 * (slope.norm(dim=1) - 1).square()

    sums, norms = per_sample_loop(module, loss, (dataset.tensors[0],), max_grad_norm=12.0)
    assert float(norms.min()) < 12 < float(norms.max())
    module, optimizer, loader, _ = private(module, dataset, max_grad_norm=12.0)
    for x, _ in loader:
        loss(module, x).mean().backward()
        optimizer.step()
    torch.testing.assert_close(gradient(module) * 8, torch.cat([s.flatten() for s in sums.values()]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_bf16_autocast_keeps_the_bound(whole: bool) -> None:
    for row in range(4):
        torch.manual_seed(row)
        module = nn.Sequential(nn.Linear(6, 64), nn.LayerNorm(64), nn.SiLU(), nn.Linear(64, 3))
        module, optimizer, loader, _ = private(module, data(1, scale=4.0), max_grad_norm=0.1)
        for x, y in loader:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(module(x) * 30, y)
                if whole:
                    loss.backward()
            if not whole:
                loss.backward()
            optimizer.step()
        assert 0.1 * (1 - 1e-4) <= float(gradient(module).norm()) <= 0.1 * (1 + 1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_contributes_zero(bad: float) -> None:
    dataset = data(8)
    expected = expected_gradient(small_net(), *(t[1:] for t in dataset.tensors), 0.3)
    dataset.tensors[0][0, 2] = bad
    module, optimizer, loader, _ = private(small_net(), dataset)
    for x, y in loader:
        batch_step(module, optimizer, x, y)
    torch.testing.assert_close(gradient(module) * 8, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("physical", [1, 3, 8])
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
def test_physical_batches_are_one_logical_batch(physical: int, clipping: str) -> None:
    options: dict[str, Any] = {"unclipped_num_std": 1e-9} if clipping == "adaptive" else {}
    dataset = data(16, scale=3.0)
    results = []
    for size in (None, physical):
        module, optimizer, loader, engine = private(small_net(), dataset, clipping=clipping, **options)
        batches = loader if size is None else pf.BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=size, optimizer=optimizer
        ).__enter__()  # fmt: skip
        for x, y in batches:
            before = weights(module)
            batch_step(module, optimizer, x, y)
            stepped = optimizer._under_way is None
            assert stepped != torch.equal(before, weights(module))  # nothing moves before the last part
        results.append((weights(module), optimizer.max_grad_norm, engine.accountant.history))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-6) and results[0][2] == results[1][2]


def test_the_divisor_is_public() -> None:
    """Half a batch has half the sum, and the same divisor."""
    x, y = data(8).tensors
    found = []
    for rows in (slice(0, 8), slice(0, 4), slice(4, 8)):
        module, optimizer, _, _ = private(small_net())
        assert optimizer.expected_batch_size == 8
        batch_step(module, optimizer, x[rows], y[rows])
        found.append(gradient(module))
    torch.testing.assert_close(found[0], found[1] + found[2], rtol=1e-4, atol=1e-7)


def test_parameters_outside_the_optimizer_do_not_count() -> None:
    """Only what is trained is clipped: the norm of the head alone, as if the rest were frozen."""
    frozen = small_net()
    frozen[0].requires_grad_(False)
    x, y = data(8).tensors
    expected = expected_gradient(frozen, x, y, 0.3)
    module = small_net()
    module, optimizer, _, _ = private(module, optimizer=torch.optim.SGD(module[2].parameters(), lr=0.1))
    batch_step(module, optimizer, x, y)
    torch.testing.assert_close(gradient(module) * 8, expected, rtol=1e-4, atol=1e-6)


def test_double_parameters_are_clipped_in_double() -> None:
    x, y = data(8).tensors
    expected = expected_gradient(small_net(), x, y, 0.3)
    module, optimizer, _, _ = private(small_net().double())
    batch_step(module, optimizer, x.double(), y)
    torch.testing.assert_close(gradient(module) * 8, expected, rtol=1e-6, atol=5e-8)  # factors are float32


# ------------------------------------------------------------------------------------ tensors with as many rows by chance


class ClassDescriptions(nn.Module):
    """Scores against ten projected descriptions: constants with as many rows as some batches have."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.body, self.project = nn.Linear(6, 5), nn.Linear(4, 5, bias=False)
        descriptions = torch.linspace(-3, 3, 40).reshape(10, 4).cos()
        if kind == "buffer":
            self.register_buffer("descriptions", descriptions)
        else:
            self.descriptions = descriptions

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) @ self.project(self.descriptions).T


class Prototypes(nn.Module):
    """A direction repeated for ten classes, not for ten rows."""

    def __init__(self) -> None:
        super().__init__()
        self.direction, self.codes = nn.Parameter(torch.randn(1, 6)), torch.eye(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.direction.expand(10, -1) * self.codes).T


@pytest.mark.parametrize("kind", ["buffer", "attribute", "prototypes"])
def test_a_batch_with_as_many_rows_as_a_constant_is_not_clipped_by_it(kind: str) -> None:
    """After a batch of nine, one of ten: rows of the constant must not pass for samples. Removing a sample moves the sum by C."""

    def summed(samples: int) -> Tensor:
        torch.manual_seed(0)
        module = Prototypes() if kind == "prototypes" else ClassDescriptions(kind)
        module, optimizer, _, _ = private(module, data(40), max_grad_norm=0.1, loss_reduction="sum")
        x, y = torch.ones(11, 6), torch.zeros(11, dtype=torch.long)
        F.cross_entropy(module(x[:9]), y[:9], reduction="sum").backward()
        optimizer.zero_grad()
        F.cross_entropy(module(x[:samples]), y[:samples], reduction="sum").backward()
        optimizer.pre_step()
        return gradient(module)

    assert (summed(9) - summed(8)).norm() <= 0.1 * (1 + 1e-5)
    if kind == "buffer":
        assert (summed(10) - summed(9)).norm() <= 0.1 * (1 + 1e-5)
    else:  # what it is cannot be known, but that it is no batch can be seen
        with pytest.raises(UncoveredParameterError, match="rows of"):
            summed(10)
