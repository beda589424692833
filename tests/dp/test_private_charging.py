"""pf.PrivacyEngine: noise, empty batches, and every step charged before anything of it exists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import per_sample_loop
from private_helpers import (
    batch_step,
    data,
    expected_gradient,
    gradient,
    private,
    small_net,
    weights,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import privimage_fast as pf
from privimage_fast import ops
from privimage_fast.dp.dp_optimizer import GradientSums
from privimage_fast.dp.ledger import Ledger, OverBudgetError


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
        module, optimizer, loader, _ = private(small_net(), engine=engine, poisson_sampling=True, noise_multiplier=1.0)
        before = weights(module)
        with pytest.raises(OverBudgetError):
            batch_step(module, optimizer, *next(iter(loader)))
        assert torch.equal(before, weights(module)) and all(p.grad is None for p in module.parameters())
        assert len(engine.accountant) == 0 and not optimizer._sums._flat[0].any()


def test_steps_on_batches_from_elsewhere_are_not_charged_to_a_ledger(tmp_path: Path) -> None:
    """In batches cut from a list, one sample less moves all later ones: twice the bound a step, and another adjacency."""
    with Ledger(tmp_path / "ledger.jsonl", target_epsilon=None, delta=1e-3, population=16) as ledger:
        module, optimizer, _, _ = private(small_net(), engine=pf.PrivacyEngine(ledger=ledger), poisson_sampling=True)
        before = weights(module)
        with pytest.raises(RuntimeError, match=r"not of the private data loader.*add_or_remove_one"):
            batch_step(module, optimizer, *data(8).tensors)
        assert torch.equal(before, weights(module)) and not ledger.records()


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
