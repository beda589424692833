"""pf.PrivacyEngine: the module stays what it was, optimizers, schedulers, torch.compile, and checkpoints."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from torch.nn.utils.parametrizations import spectral_norm

import privimage_fast as pf
from privimage_fast.dp.ledger import Ledger


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


def test_a_checkpoint_of_the_inner_optimizer_serves_the_private_one(tmp_path: Path) -> None:
    module, optimizer, _, engine = private(small_net(), max_grad_norm=0.3)
    engine.save_checkpoint(path=tmp_path / "a.safetensors", module=module, optimizer=optimizer.original_optimizer)
    engine.load_checkpoint(path=tmp_path / "a.safetensors", module=module, optimizer=optimizer)
    assert optimizer.max_grad_norm == pytest.approx(0.3)
