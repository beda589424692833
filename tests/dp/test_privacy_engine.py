"""pf.PrivacyEngine: gradients against the double-precision oracle, the clip bound, noise, charging, and bad use answered."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_loop
from private_helpers import batch_step, data, gradient, private, small_net, weights
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import DataLoader

import privimage_fast as pf
from privimage_fast import ops
from privimage_fast.dp.dp_optimizer import GradientSums
from privimage_fast.dp.ledger import Ledger, OverBudgetError


def row_losses(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y, reduction="none")


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


def derived_net() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), weight_norm(nn.Linear(8, 3)))


MODULES = {
    "linear": (small_net, (6,)),
    "conv": (conv_net, (1, 6, 6)),
    "attention": (Attention, (12,)),
    "derived": (derived_net, (6,)),
}


def expected_gradient(module: nn.Module, x: Tensor, y: Tensor, c: float, multiplicity: int = 1) -> Tensor:
    """Sum of clipped gradients of each sample's mean loss, in double precision."""

    def mean_loss(m: nn.Module, *args: Tensor) -> Tensor:
        return row_losses(m, *args) / multiplicity

    sums, _ = per_sample_loop(module, mean_loss, (x, y), max_grad_norm=c, multiplicity=multiplicity)
    return torch.cat([s.flatten() for s in sums.values()])


# ------------------------------------------------------------------------------------------------- the gradient


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


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2, inplace=True), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)[:, 0]


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


# ------------------------------------------------------------------------------------------- noise and empty batches


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(400, 250)


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_noise_is_sigma_times_the_sensitivity(clipping: str, reduction: str) -> None:
    """100,250 draws: fails for noise 1 % off, not scaled by C, without adaptive clipping's share, or with a wrong divisor."""
    options: dict[str, Any] = {"unclipped_num_std": 1.3} if clipping == "adaptive" else {}
    bound: Any = [0.3, 0.4] if clipping == "per_layer" else 0.5
    module, optimizer, _, _ = private(
        wide(),
        data(16, (400,)),
        noise_multiplier=1.7,
        max_grad_norm=bound,
        clipping=clipping,
        loss_reduction=reduction,
        **options,
    )
    module(torch.zeros(0, 400)).sum().backward()
    optimizer.step()
    sigma = (1.7**-2 - 2.6**-2) ** -0.5 if clipping == "adaptive" else 1.7
    found = gradient(module)
    assert float(found.std()) == pytest.approx(sigma * 0.5 / (8 if reduction == "mean" else 1), rel=8e-3)
    assert abs(float(found.mean())) < 5 * float(found.std()) / len(found) ** 0.5


def test_noise_is_drawn_once_a_logical_batch_and_never_twice_the_same() -> None:
    module, optimizer, loader, _ = private(wide(), data(32, (400,)), noise_multiplier=1.0, max_grad_norm=1e-6, batch_size=16)
    with pf.BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=optimizer) as parts:
        drawn = []
        for x, y in parts:
            batch_step(module, optimizer, x, y % 250)
            if optimizer._under_way is None:
                drawn.append(gradient(module))
    assert len(drawn) == 2
    for g in drawn:
        assert float(g.std()) == pytest.approx(1e-6 / 16, rel=0.02)  # √8 times as much if each part were noised
    assert abs(float(torch.corrcoef(torch.stack(drawn))[0, 1])) < 0.02


def test_noise_of_parameters_of_two_dtypes_is_independent() -> None:
    """Each dtype has its own flat tensor; both draw from one stream, at different places."""
    module = nn.ModuleDict({"a": nn.Linear(50, 40), "b": nn.Linear(50, 40).double()})
    module, optimizer, _, _ = private(module, noise_multiplier=1.0, max_grad_norm=8.0)
    optimizer.step()
    a, b = module["a"].weight.grad.flatten().double(), module["b"].weight.grad.flatten()
    assert b.dtype == torch.float64 and float(b.std()) == pytest.approx(1.0, rel=0.1)
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 0.1


def test_noise_does_not_follow_seeds_but_in_test_mode() -> None:
    def drawn(**options: Any) -> Tensor:
        torch.manual_seed(0)
        engine = pf.PrivacyEngine(**options)
        module, optimizer, _, _ = private(small_net(), engine=engine, noise_multiplier=1.0)
        optimizer.step()
        return gradient(module)

    assert not torch.equal(drawn(), drawn())
    assert torch.equal(drawn(secure=False, seed=5), drawn(secure=False, seed=5))
    assert not torch.equal(drawn(secure=False, seed=5), drawn(secure=False, seed=6))


class Viewing(nn.Module):
    """``view(len(x), -1)`` is ambiguous without rows; many models do it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.view(x.shape[0], -1))


def test_empty_batches_are_noised_stepped_and_charged() -> None:
    module, optimizer, loader, engine = private(
        Viewing(), data(2, (2, 3)), batch_size=1, population=200, poisson_sampling=True, noise_multiplier=1.0
    )
    empty = 0
    for x, y in loader:
        before, charged = weights(module), len(engine.accountant)
        optimizer.zero_grad()
        out = module(x)
        assert out.shape == (len(x), 3)
        F.cross_entropy(out, y).backward()
        optimizer.step()
        empty += len(x) == 0
        assert not torch.equal(before, weights(module)) and len(engine.accountant) == charged + 1
        assert weights(module).isfinite().all()
    assert empty > 150 and engine.accountant.history == [(1.0, 1 / 200, 200)]


# ------------------------------------------------------------------------------------------------------- charging


class Watching(Ledger):
    """Notes the parameters at the time of each charge."""

    module: nn.Module

    def charge(self, event: Any, **options: Any) -> Any:
        self.seen = weights(self.module), [p.grad for p in self.module.parameters()]
        return super().charge(event, **options)


def test_a_step_is_charged_before_anything_of_it_exists(tmp_path: Path) -> None:
    module = small_net()
    with Watching(tmp_path / "ledger.jsonl", target_epsilon=None, delta=1e-3, population=16) as ledger:
        ledger.module = module
        engine = pf.PrivacyEngine(ledger=ledger)
        module, optimizer, loader, _ = private(module, engine=engine, poisson_sampling=True, noise_multiplier=2.0)
        for x, y in loader:
            before = weights(module)
            batch_step(module, optimizer, x, y)
            assert torch.equal(ledger.seen[0], before) and ledger.seen[1] == [None] * 4
            assert not torch.equal(weights(module), before)
        assert ledger.epsilon() == engine.get_epsilon(1e-3) == engine.accountant.get_epsilon(1e-3)


def test_a_refused_charge_changes_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl", target_epsilon=0.5, delta=1e-3, population=16) as ledger:
        engine = pf.PrivacyEngine(ledger=ledger)
        module, optimizer, _, _ = private(small_net(), engine=engine, poisson_sampling=True, noise_multiplier=1.0)
        before = weights(module)
        with pytest.raises(OverBudgetError):
            batch_step(module, optimizer, *data(8).tensors)
        assert torch.equal(before, weights(module)) and all(p.grad is None for p in module.parameters())
        assert len(engine.accountant) == 0 and not optimizer._sums._flat[0].any()


def test_an_error_after_the_charge_does_not_take_it_back() -> None:
    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise OSError("disk full")

    module = small_net()
    module, optimizer, _, engine = private(
        module, optimizer=Failing(module.parameters(), lr=0.1), poisson_sampling=True, noise_multiplier=1.0
    )
    with pytest.raises(OSError, match="disk full"):
        batch_step(module, optimizer, *data(8).tensors)
    assert engine.accountant.history == [(1.0, 1.0, 1)]


def test_an_error_between_charge_and_release_leaves_no_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of the next batch would otherwise count twice."""
    module, optimizer, _, _ = private(small_net())
    x, y = data(8).tensors
    with monkeypatch.context() as patch:
        patch.setattr(type(optimizer._noise), "next_step", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            batch_step(module, optimizer, x, y)
    batch_step(module, optimizer, x, y)
    torch.testing.assert_close(gradient(module) * 8, expected_gradient(small_net(), x, y, 0.3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clipping", ["flat", "automatic", "adaptive", "per_layer"])
@pytest.mark.parametrize(("physical", "double"), [(8, False), (3, False), (3, True)])
def test_a_step_that_sums_the_last_batch_has_the_bits_of_sum_then_step(
    clipping: str, physical: int, double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; ``double``: also where half of the parameters have no kernel."""
    options: dict[str, Any] = {"max_grad_norm": [0.3] * 4} if clipping == "per_layer" else {}
    if clipping == "adaptive":
        options["unclipped_num_std"] = 1.3
    taken: list[bool] = []
    release = GradientSums.release

    def watched(sums: GradientSums, *arguments: Any) -> None:
        taken.append(arguments[-1] is not None)
        release(sums, *arguments)

    monkeypatch.setattr(GradientSums, "release", watched)
    found = []
    for fused in (True, False):
        monkeypatch.setattr(ops, "step_sums_stored", lambda grad_sum, fused=fused: fused)
        taken.clear()
        module = small_net()
        if double:
            module[2].double()
            module.insert(2, Widen())
        module, optimizer, loader, _ = private(
            module, data(), engine=pf.PrivacyEngine(secure=False, seed=1), clipping=clipping, noise_multiplier=1.0,
            strategy="store", **options,
        )  # fmt: skip
        with pf.BatchMemoryManager(data_loader=loader, max_physical_batch_size=physical, optimizer=optimizer) as parts:
            for x, y in parts:
                batch_step(module, optimizer, x, y)
        assert taken == [fused and clipping != "per_layer"] * 2
        found.append(weights(module.double()))
    if double:  # two dtypes in one weighted sum are summed by torch, in another order
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(*found)


class Widen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def test_a_bound_lowered_within_a_logical_batch_does_not_lower_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first part was clipped with the larger bound, and that is the sensitivity of the sum."""
    drawn = []
    module, optimizer, loader, _ = private(small_net(), data(8), noise_multiplier=1.0)
    monkeypatch.setattr("privimage_fast.dp.dp_optimizer.GradientSums.release", lambda self, std, *rest: drawn.append(std))
    monkeypatch.setattr(optimizer.original_optimizer, "step", lambda: None)
    with pf.BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as parts:
        for _ in range(2):
            for x, y in parts:
                batch_step(module, optimizer, x, y)
                optimizer.max_grad_norm = 0.1
    assert drawn == pytest.approx([0.3, 0.1])


def test_weights_changed_between_call_and_backward_are_refused() -> None:
    """The backward pass would take other weights than the loss did, as autograd itself refuses to."""
    module, _, _, _ = private(small_net())
    x, y = data(8).tensors
    loss = F.cross_entropy(module(x), y)
    with torch.no_grad():
        module[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"parameter '2\.weight' was modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("strategy", ["gram", "norm-only", "store"])
def test_a_batch_written_over_before_the_step_is_noticed(strategy: str) -> None:
    """Deferred layers are summed in the step: of inputs other than those measured, one sample could weigh more than C."""
    module, optimizer, _, _ = private(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), strategy=strategy)
    x, y = torch.randn(8, 6), torch.arange(8) % 4
    before = [p.detach().clone() for p in module.parameters()]
    F.cross_entropy(module(x), y).backward()
    x.mul_(100)
    if strategy == "store":
        optimizer.step()
        return
    with pytest.raises(RuntimeError, match=r"the input of linear\(0\.bias, 0\.weight\)|the input of linear\(0\.weight\)"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_weight_deferred_in_one_backward_pass_and_derived_from_in_another() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 6) * 0.3)

        def forward(self, x: Tensor, transposed: bool) -> Tensor:
            return x @ self.weight if transposed else F.linear(x, self.weight)

    torch.manual_seed(0)
    model = Tied()
    x, y = torch.randn(8, 6) * 3, torch.randint(0, 6, (8,))

    def losses(m: nn.Module, a: Tensor, b: Tensor) -> Tensor:
        return sum(F.cross_entropy(m(a, t), b, reduction="none") for t in (False, True))

    expected = per_sample_loop(model, losses, (x, y), max_grad_norm=0.3)[0]["weight"]
    module, optimizer, _, _ = private(model)
    for transposed in (False, True):
        F.cross_entropy(module(x, transposed), y).backward()
    optimizer.pre_step()
    torch.testing.assert_close(module.weight.grad.double() * 8, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_epsilon_is_that_of_opacus_accountants(accountant: str) -> None:
    from opacus.accountants import PRVAccountant, RDPAccountant

    engine = pf.PrivacyEngine(accountant=accountant)
    module, optimizer, loader, _ = private(small_net(), engine=engine, noise_multiplier=1.3, poisson_sampling=True)
    assert engine.get_epsilon(1e-5) == 0
    for sigma in (1.3, 0.9):  # as a noise scheduler would: the value at the time of the step is charged
        optimizer.noise_multiplier = sigma
        for x, y in loader:
            batch_step(module, optimizer, x, y)
    theirs = RDPAccountant() if accountant == "rdp" else PRVAccountant()
    theirs.history = [(1.3, 0.5, 2), (0.9, 0.5, 2)]
    assert sorted(engine.accountant.history) == sorted(theirs.history) and len(engine.accountant) == 4
    assert engine.get_epsilon(1e-5) == pytest.approx(theirs.get_epsilon(1e-5), abs=1e-6 if accountant == "rdp" else 0.03)


def test_adaptive_clipping_charges_the_combined_multiplier() -> None:
    module, optimizer, loader, engine = private(
        small_net(), noise_multiplier=1.1, clipping="adaptive", unclipped_num_std=0.8, poisson_sampling=True
    )
    before = optimizer.max_grad_norm
    for x, y in loader:
        batch_step(module, optimizer, x, y)
    assert engine.accountant.history == [(1.1, 0.5, 2)] and optimizer.max_grad_norm != before


@pytest.mark.parametrize("accountant", ["pld", "prv", "rdp"])
def test_target_epsilon_is_met_by_the_accountant_that_reports_it(accountant: str) -> None:
    engine, module = pf.PrivacyEngine(accountant=accountant), small_net()
    if accountant != "prv":  # slow with two kinds of steps
        engine.accountant.step(noise_multiplier=3.0, sample_rate=0.5)  # spent before: counts
    module, optimizer, loader = engine.make_private_with_epsilon(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=DataLoader(data(), batch_size=4),
        target_epsilon=4.0, target_delta=1e-3, epochs=2, max_grad_norm=1.0,
    )  # fmt: skip
    for _ in range(2):
        for x, y in loader:
            batch_step(module, optimizer, x, y)
    assert 3.9 < engine.get_epsilon(1e-3) <= 4.0


def test_without_poisson_sampling_a_pass_is_one_gaussian(caplog: pytest.LogCaptureFixture) -> None:
    module, optimizer, loader, engine = private(small_net(), noise_multiplier=2.0)
    for _ in range(3):
        for x, y in loader:
            batch_step(module, optimizer, x, y)
    for x, y in loader:
        batch_step(module, optimizer, x, y)
        break
    assert engine.accountant.history == [(2.0, 1.0, 4)]  # the pass that was left early has touched samples too
    assert engine.get_epsilon(1e-5) > 0 and "not for adding or removing" in caplog.text
    batch_step_from_elsewhere = len(engine.accountant)
    loader.listener._fed_by_loader = False
    batch_step(module, optimizer, *data(8).tensors)
    assert len(engine.accountant) == batch_step_from_elsewhere + 1


def test_target_epsilon_without_poisson_sampling_counts_passes() -> None:
    engine, module = pf.PrivacyEngine(), small_net()
    module, optimizer, loader = engine.make_private_with_epsilon(
        module=module, optimizer=torch.optim.SGD(module.parameters(), lr=0.1), data_loader=DataLoader(data(), batch_size=4),
        target_epsilon=4.0, target_delta=1e-3, epochs=2, max_grad_norm=1.0, poisson_sampling=False,
    )  # fmt: skip
    for _ in range(2):
        for x, y in loader:
            batch_step(module, optimizer, x, y)
    assert 3.9 < engine.get_epsilon(1e-3) <= 4.0


# ------------------------------------------------------------------------------------------------- module, optimizer


def test_the_module_stays_what_it_was() -> None:
    module = small_net()
    state = copy.deepcopy(module.state_dict())
    made, optimizer, loader, _ = private(module)
    assert made is module and isinstance(made, nn.Sequential) and type(made).__name__ == "Sequential"
    assert list(made.state_dict()) == list(state) and made._module is made
    for x, y in loader:
        batch_step(module, optimizer, x, y)
    twin, loaded = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for other in (twin, loaded):  # ordinary modules, with ordinary gradients
        assert type(other) is nn.Sequential
        F.cross_entropy(other(x), y).backward()
        assert all(p.grad is not None for p in other.parameters())
    before = [p.grad.clone() for p in module.parameters()]
    assert all(torch.equal(a, p.grad) for a, p in zip(before, module.parameters(), strict=True))


def test_evaluation_is_not_recorded() -> None:
    module, optimizer, loader, _ = private(small_net())
    for x, y in loader:
        module.eval()
        with torch.no_grad():
            module(torch.randn(50, 6))
        module.train()
        batch_step(module, optimizer, x, y)


def test_zero_grad_between_call_and_backward() -> None:
    x, y = data(8).tensors
    results = []
    for early in (True, False):
        module, optimizer, _, _ = private(small_net())
        (-3 * module(x)[:, 0]).mean().backward()  # to be forgotten
        if early:
            module.zero_grad()  # the module's counts as well
        loss = F.cross_entropy(module(x), y)
        if not early:
            optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results.append(gradient(module))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0] * 8, expected_gradient(small_net(), x, y, 0.3), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("on_private", [True, False])
def test_schedulers_and_state(on_private: bool) -> None:
    module = small_net()
    original = torch.optim.AdamW(module.parameters(), lr=0.1)
    module, optimizer, loader, _ = private(module, optimizer=original)
    assert isinstance(optimizer, torch.optim.Optimizer) and optimizer.original_optimizer is original
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer if on_private else original, 1, gamma=0.5)
    for x, y in loader:
        batch_step(module, optimizer, x, y)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == original.param_groups[0]["lr"] == 0.05
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert state["state"][0]["exp_avg"].any() and optimizer.state_dict()["param_groups"] == original.state_dict()["param_groups"]


def test_closures_and_hooks() -> None:
    module, optimizer, loader, _ = private(small_net())
    seen: list[Tensor] = []
    optimizer.attach_step_hook(lambda o: seen.append(o.params[0].grad.clone()))
    for x, y in loader:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(module(x), y)
            loss.backward()
            return loss

        assert float(optimizer.step(closure).detach()) > 0
    assert len(seen) == 2 and seen[-1].any()


def test_unfreezing_between_steps() -> None:
    module = small_net()
    module[0].requires_grad_(False)
    x, y = data(8).tensors
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    module, optimizer, _, _ = private(module, optimizer=optimizer)
    batch_step(module, optimizer, x, y)
    assert module[0].weight.grad is None
    module[0].requires_grad_(True)
    batch_step(module, optimizer, x, y)
    torch.testing.assert_close(gradient(module) * 8, expected_gradient(small_net(), x, y, 0.3), rtol=1e-4, atol=1e-6)


def test_a_standard_module_again() -> None:
    module, _, _, _ = private(small_net())
    assert module.to_standard_module() is module and type(module) is nn.Sequential
    F.cross_entropy(module(torch.randn(4, 6)), torch.zeros(4, dtype=torch.int64)).backward()
    assert all(p.grad is not None for p in module.parameters())


def test_rows_of_a_generators_own_number_are_forgotten_by_zero_grad() -> None:
    """G's step may take more rows through D than were drawn: D's gradients of it are dropped before D steps."""
    module, optimizer, loader, _ = private(Discriminator(), data(16, scale=3.0))
    plain, twin, plain_loader, _ = private(Discriminator(), data(16, scale=3.0))
    plain.load_state_dict(module.state_dict())
    for (x, _), (same, _) in zip(loader, plain_loader, strict=True):
        for m, o, rows in ((module, optimizer, x), (plain, twin, same)):
            o.zero_grad()
            F.softplus(m(rows)).mean().backward()
            o.step()
        z = torch.randn(20, 6, requires_grad=True)
        F.softplus(-module(z)).mean().backward()
        assert z.grad is not None and z.grad.any()
    assert torch.equal(weights(module), weights(plain))  # the way each gradient is had has not changed either


def test_backward_again_after_zero_grad() -> None:
    module, optimizer, loader, _ = private(derived_net(), data(8, scale=2.0))
    expected = expected_gradient(copy.deepcopy(module), *data(8, scale=2.0).tensors, 0.3)
    for x, y in loader:
        loss = F.cross_entropy(module(x), y)
        loss.backward(retain_graph=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(gradient(module) * 8, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["wrapper", "in place", "afterwards"])
def test_torch_compile_runs_as_written(how: str) -> None:
    x, y = data(8).tensors
    expected = expected_gradient(small_net(), x, y, 0.3)
    module = small_net()
    if how == "wrapper":
        module = torch.compile(module)
    elif how == "in place":
        module.compile()
    module, optimizer, _, _ = private(module)
    called = torch.compile(module) if how == "afterwards" else module
    optimizer.zero_grad()
    F.cross_entropy(called(x), y).backward()
    optimizer.step()
    torch.testing.assert_close(gradient(module) * 8, expected, rtol=1e-4, atol=1e-6)


def test_old_and_new_spectral_norm_train() -> None:
    module = nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.Tanh(), spectral_norm(nn.Linear(8, 3)))
    module, optimizer, loader, _ = private(module, max_grad_norm=0.05)
    for x, y in loader:
        batch_step(module, optimizer, x, y)
        assert float(gradient(module).norm()) * 8 <= 8 * 0.05 * (1 + 1e-6)


def test_ghost_mode_returns_the_criterion() -> None:
    criterion = nn.CrossEntropyLoss()
    module, optimizer, returned, loader, _ = private(small_net(), grad_sample_mode="ghost", criterion=criterion)
    assert returned is criterion
    for x, y in loader:
        optimizer.zero_grad()
        returned(module(x), y).backward()
        optimizer.step()


def test_making_private_again_replaces() -> None:
    module, optimizer, _, engine = private(small_net())
    module, optimizer, loader, _ = private(module, optimizer=optimizer, engine=engine, max_grad_norm=0.1)
    assert not isinstance(optimizer.original_optimizer, pf.DPOptimizer)
    for x, y in loader:
        batch_step(module, optimizer, x, y)
    assert float(gradient(module).norm()) <= 0.1 * (1 + 1e-6)


def test_rows_are_probed_once_for_all_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poisson batches all differ in size; a probe for each would be a second backward pass in nearly every step."""
    from privimage_fast.dp import engine as engine_module

    passes: list[Any] = []
    original = engine_module.backward
    monkeypatch.setattr(engine_module, "backward", lambda *a, **k: passes.append(1) or original(*a, **k))
    module, optimizer, _, _ = private(small_net())
    for rows in range(2, 8):
        x, y = data(rows).tensors
        batch_step(module, optimizer, x, y)
    assert len(passes) == 2  # half of the samples, and the other half


# --------------------------------------------------------------------------------------------------------- bad use


class MeanOver(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h - h.mean(0))


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x.view(len(x), -1, 2).transpose(0, 1).contiguous()).mean(0)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(6, 6), nn.Linear(6, 3), reentrant

    def forward(self, x: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        return self.b(checkpoint(self.a, x, use_reentrant=self.reentrant).tanh())


class Statistics(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(6, 3)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.lin(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (MeanOver, "rows of another"),
        (TimeFirst, "rows must stay the first dimension|rows of another"),
        (lambda: Checkpointed(False), "activation checkpointing.*BatchMemoryManager"),
        (lambda: Checkpointed(True), r"'a\.weight' is used by linear only where gradients are off"),
        (Statistics, "buffer 'mean'"),
    ],
)
def test_modules_that_cannot_be_private_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    module, optimizer, loader, _ = private(make())
    with pytest.raises(pf.UncoveredParameterError, match=message):
        for x, y in loader:
            batch_step(module, optimizer, x, y)


def test_batch_norm_is_refused_and_fixed() -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(pf.UnsupportedModuleError, match=r"1 \(BatchNorm1d\).*GroupNorm"):
        private(module)
    module, optimizer, loader, _ = private(pf.PrivacyEngine.get_compatible_module(module))
    for x, y in loader:
        batch_step(module, optimizer, x, y)
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    module, optimizer, loader, _ = private(module)  # frozen statistics mix nothing
    module.train()
    with pytest.raises(pf.UncoveredParameterError, match="use GroupNorm"):
        for x, y in loader:
            batch_step(module, optimizer, x, y)


@pytest.mark.parametrize("how", ["penalty", "part", "forward"])
def test_parameters_used_outside_the_call_are_refused_by_name(how: str) -> None:
    module, _, loader, _ = private(small_net())
    for x, y in loader:
        if how == "penalty":
            loss = F.cross_entropy(module(x), y) + 1e-3 * module[2].weight.square().sum()
        elif how == "part":
            loss = F.cross_entropy(module(x), y) + module[2](torch.ones(8, 8)).mean()
        else:
            loss = F.cross_entropy(module(x), y) + module.forward(x).mean()
        with pytest.raises(pf.UncoveredParameterError, match=r"parameter '\d\.(weight|bias)'.*outside the module's call"):
            loss.backward()
        break


def drive(case: str) -> None:
    """One way to get a step wrong, in the order in which a script would."""
    module, optimizer, loader, _ = private(small_net(), data(32, scale=1.0), batch_size=8)
    batches = iter(loader)
    x, y = next(batches)
    match case:
        case "no backward":
            module(x)
            optimizer.step()
        case "no call":
            optimizer.step()
        case "backward with inputs":
            x.requires_grad_()
            F.cross_entropy(module(x), y).backward(inputs=[x])
            optimizer.step()
        case "old graph":
            loss = F.cross_entropy(module(x), y)
            loss.backward(retain_graph=True)
            optimizer.step()
            loss.backward()
        case "old graph, forgotten before":
            loss = F.cross_entropy(module(x), y)
            loss.backward(retain_graph=True)
            batch_step(module, optimizer, x, y)
            loss.backward()
        case "two batches":
            F.cross_entropy(module(x), y).backward()
            optimizer._undone.clear()  # as if the loader had not told
            x, y = next(batches)
            F.cross_entropy(module(x), y).backward()
            optimizer.step()
        case "skipped batch":
            x, y = next(batches)
            batch_step(module, optimizer, x, y)
        case "two steps":
            batch_step(module, optimizer, x, y)
            batch_step(module, optimizer, x, y)
        case "concatenated":
            module(torch.cat([x, x])).square().mean().backward()
            optimizer.step()
        case "part of the rows":
            module(x[:4]).square().mean().backward()
            optimizer.step()
        case "unequal calls":
            optimizer._recorder.batch = None
            (module(x).square().mean() + module(x[:4]).square().mean()).backward()
            optimizer.step()
        case "merged draws":
            optimizer.signal_skip_step()
            batch_step(module, optimizer, x, y)
        case "frozen within":
            with pf.BatchMemoryManager(data_loader=loader, max_physical_batch_size=4, optimizer=optimizer) as parts:
                for x, y in parts:
                    batch_step(module, optimizer, x, y)
                    module[0].requires_grad_(False)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no backward", "no gradient reached"),
        ("no call", "no gradient reached"),
        ("backward with inputs", "no gradient reached"),
        ("old graph", "before the last optimizer.step"),
        ("old graph, forgotten before", "before the last optimizer.step"),
        ("two batches", "gradients of two batches"),
        ("skipped batch", "2 batches were drawn"),
        ("two steps", "twice on one batch"),
        ("concatenated", "16 rows on a batch of 8 samples"),
        ("part of the rows", "4 rows on a batch of 8 samples"),
        ("unequal calls", "8 and with 4 rows|4 and with 8 rows"),
        ("merged draws", "would count twice"),
        ("frozen within", "within a logical batch"),
    ],
)
def test_wrong_steps_are_answered(case: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        drive(case)


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_scaler_is_refused(enabled: bool) -> None:
    module, optimizer, loader, _ = private(small_net())
    scaler = torch.amp.GradScaler("cpu", enabled=enabled)
    for x, y in loader:
        optimizer.zero_grad(set_to_none=False)
        scaler.scale(F.cross_entropy(module(x), y)).backward()
        if enabled:
            with pytest.raises(RuntimeError, match="GradScaler multiplies the loss"):
                scaler.step(optimizer)
            break
        scaler.step(optimizer)


def test_batches_from_elsewhere_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    module, optimizer, _, _ = private(small_net())
    for _ in range(3):
        batch_step(module, optimizer, *data(8).tensors)
    assert caplog.text.count("without amplification by sampling") == 1


def test_batches_from_elsewhere_are_charged_without_amplification() -> None:
    module, optimizer, _, engine = private(small_net(), poisson_sampling=True, noise_multiplier=1.0)
    for _ in range(3):
        batch_step(module, optimizer, *data(8).tensors)
    assert engine.accountant.history == [(1.0, 1.0, 3)]


def test_a_logical_batch_left_early_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    """Its gradients must not reach the next one: a sample of both would count twice."""
    dataset = data(8, scale=3.0)
    module, optimizer, loader, engine = private(small_net(), dataset)
    with pf.BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
        for x, y in parts:
            batch_step(module, optimizer, x, y)
            break
        for x, y in parts:
            batch_step(module, optimizer, x, y)
    assert "left before its last part" in caplog.text and engine.accountant.history == [(0.0, 1.0, 1)]
    torch.testing.assert_close(gradient(module) * 8, expected_gradient(small_net(), *dataset.tensors, 0.3), rtol=1e-4, atol=1e-6)


def test_a_logical_batch_left_early_is_dropped_from_adaptive_clippings_count() -> None:
    bounds = []
    for leave in (False, True):
        module, optimizer, loader, _ = private(small_net(), data(8), clipping="adaptive", unclipped_num_std=1e-9)
        with pf.BatchMemoryManager(data_loader=loader, max_physical_batch_size=3, optimizer=optimizer) as parts:
            for stop in (1, 3) if leave else (3,):
                for _, (x, y) in zip(range(stop), parts, strict=False):
                    batch_step(module, optimizer, x, y)
        bounds.append(optimizer.max_grad_norm)
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-6) and bounds[0] != pytest.approx(0.3, rel=1e-6)


def test_an_evaluation_over_the_private_loader_disturbs_nothing() -> None:
    module, optimizer, loader, engine = private(small_net(), data(32), poisson_sampling=True, noise_multiplier=1.0)
    for x, y in loader:
        batch_step(module, optimizer, x, y)
        with torch.no_grad():
            for inner, _ in loader:
                module(inner)
    assert len(engine.accountant) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_first": False}, "rows in the first dimension"),
        ({"rand_on_empty": True}, "made-up sample"),
        ({"noise_multiplier": -1.0}, "finite and 0 or more"),
        ({"noise_multiplier": math.nan}, "finite and 0 or more"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"max_grad_norm": [1.0, 1.0]}, "one bound"),
        ({"clipping": "per_layer", "max_grad_norm": [1.0]}, "1 bounds for 4 trainable parameters"),
        ({"multiplicity": 0}, "multiplicity"),
        ({"strategy": "fast"}, "strategy must be one of"),
        ({"loss_reduction": "none"}, "must be 'mean' or 'sum'"),
        ({"criterion": nn.CrossEntropyLoss(reduction="sum")}, "reduction='sum'"),
        ({"criterion": nn.CrossEntropyLoss(weight=torch.ones(3))}, "class weights"),
        ({"noise_generator": torch.Generator()}, "needs secure=False"),
        ({"clipping": "adaptive", "unclipped_num_std": 0.4, "noise_multiplier": 1.0}, "more than half the noise multiplier"),
    ],
)
def test_bad_options_are_answered(change: dict[str, Any], message: str) -> None:
    module = small_net()
    with pytest.raises(ValueError, match=message):
        private(module, **change)
    assert type(module) is nn.Sequential  # nothing half done


def test_unknown_options_and_foreign_parameters_are_answered() -> None:
    with pytest.raises(TypeError, match=r"unknown options.*gamma"):
        private(small_net(), gamma=0.1)
    with pytest.raises(ValueError, match="is not the module's"):
        private(small_net(), optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(ValueError, match="no trainable parameter"):
        private(small_net().requires_grad_(False))
    with pytest.raises(ValueError, match="DataParallel is not covered"):
        private(nn.DataParallel(small_net()))
    with pytest.raises(ValueError, match="3 rows, which cannot be grouped"):
        module, optimizer, _, _ = private(small_net(), multiplicity=2)
        batch_step(module, optimizer, *data(3).tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"accountant": "gdp"}, "no bound"),
        ({"accountant": "moments"}, "must be 'pld', 'prv' or 'rdp'"),
        ({"seed": 1}, "needs secure=False"),
        ({"secure": False}, "needs a seed"),
    ],
)
def test_bad_engines_are_answered(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pf.PrivacyEngine(**options)


def test_ledgers_that_would_lie_are_refused(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl", target_epsilon=None, delta=1e-3, population=16) as ledger:
        with pytest.raises(ValueError, match="seeded=True"):
            pf.PrivacyEngine(secure=False, seed=1, ledger=ledger)
        with pytest.raises(ValueError, match="another adjacency"):
            private(small_net(), engine=pf.PrivacyEngine(ledger=ledger), poisson_sampling=False)
        with pytest.raises(ValueError, match="opened with 16"):
            private(small_net(), engine=pf.PrivacyEngine(ledger=ledger), poisson_sampling=True, population=20)


def test_the_ledgers_population_is_the_public_one(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl", target_epsilon=None, delta=1e-3, population=20) as ledger:
        _, optimizer, loader, _ = private(
            small_net(), data(19), engine=pf.PrivacyEngine(ledger=ledger), poisson_sampling=True, batch_size=5
        )
        assert (loader.sample_rate, optimizer.expected_batch_size) == (0.25, 5.0)


def test_batch_memory_manager_checks_its_parts() -> None:
    _, optimizer, loader, _ = private(small_net())
    _, other, _, _ = private(small_net())
    with pytest.raises(TypeError, match="make_private returned"):
        pf.BatchMemoryManager(data_loader=DataLoader(data()), max_physical_batch_size=2, optimizer=optimizer)
    with pytest.raises(ValueError, match="1 or more"):
        pf.BatchMemoryManager(data_loader=loader, max_physical_batch_size=0, optimizer=optimizer)
    with pytest.raises(ValueError, match="different calls"):
        pf.BatchMemoryManager(data_loader=loader, max_physical_batch_size=2, optimizer=other)


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_checkpoint_brings_back_weights_optimizer_and_account(tmp_path: Path) -> None:
    def fresh() -> tuple[Any, ...]:
        module = small_net()
        return private(
            module, optimizer=torch.optim.Adam(module.parameters(), betas=(0.5, 0.9)), poisson_sampling=True,
            noise_multiplier=1.0, clipping="adaptive", unclipped_num_std=1.0,
        )  # fmt: skip

    module, optimizer, loader, engine = fresh()
    for x, y in loader:
        batch_step(module, optimizer, x, y)
    path = tmp_path / "state.safetensors"
    engine.save_checkpoint(path=path, module=module, optimizer=optimizer, checkpoint_dict={"epoch": 3})
    assert b"pickle" not in path.read_bytes() and list(tmp_path.iterdir()) == [path]
    other, other_optimizer, _, other_engine = fresh()
    assert other_engine.load_checkpoint(path=path, module=other, optimizer=other_optimizer) == {"epoch": 3}
    assert torch.equal(weights(module), weights(other)) and other_optimizer.max_grad_norm == optimizer.max_grad_norm
    assert other_engine.accountant.history == engine.accountant.history
    for mine, theirs in zip(
        optimizer.state_dict()["state"].values(), other_optimizer.state_dict()["state"].values(), strict=True
    ):
        assert mine.keys() == theirs.keys() and all(
            torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(theirs[k])) for k in mine
        )
    assert other_optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    # Going back in the same process does not take back what was spent since.
    for x, y in loader:
        batch_step(module, optimizer, x, y)
    engine.load_checkpoint(path=path, module=module, optimizer=optimizer)
    assert engine.accountant.history == [(1.0, 0.5, 4)]
    # Two runs that went on from one checkpoint: each pays for its own, and the common part once.
    other_engine.accountant.step(noise_multiplier=1.0, sample_rate=0.5)
    engine.accountant.load_state_dict(other_engine.accountant.state_dict())
    assert engine.accountant.history == [(1.0, 0.5, 5)]


def test_a_checkpoint_with_steps_that_the_ledger_does_not_hold_is_refused(tmp_path: Path) -> None:
    module, optimizer, loader, engine = private(small_net(), poisson_sampling=True, noise_multiplier=2.0)
    for x, y in loader:
        batch_step(module, optimizer, x, y)
    engine.save_checkpoint(path=tmp_path / "a.safetensors", module=module, optimizer=optimizer)
    with Ledger(tmp_path / "ledger.jsonl", target_epsilon=None, delta=1e-3, population=16) as ledger:
        module, optimizer, _, other = private(small_net(), engine=pf.PrivacyEngine(ledger=ledger), poisson_sampling=True)
        with pytest.raises(ValueError, match="but the ledger holds 0: use the ledger that they were charged to"):
            other.load_checkpoint(path=tmp_path / "a.safetensors", module=module, optimizer=optimizer)


def test_files_that_are_no_checkpoint_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    module, optimizer, _, engine = private(small_net())
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="format None"):
        engine.load_checkpoint(path=tmp_path / "other.safetensors", module=module)
    engine.save_checkpoint(path=tmp_path / "module.safetensors", module=module)
    with pytest.raises(ValueError, match="no optimizer state"):
        engine.load_checkpoint(path=tmp_path / "module.safetensors", module=module, optimizer=optimizer)
    for bad in ({}, {"runs": 3}, {"runs": {"a": [[{"kind": "gaussian", "noise_multiplier": 1.0}, -1]]}}):
        with pytest.raises(ValueError, match="accountant's state"):
            engine.accountant.load_state_dict(bad)
