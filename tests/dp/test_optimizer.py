"""The private step: noise of the accounted size, a public divisor, and nothing written that would undo it."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import privimage_fast as pf
from privimage_fast import ops
from privimage_fast.dp import engine
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.dp.planner import MemoryMeter


def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (module(x)[:, 0] - y).square()


def make(module: nn.Module, **options: object) -> PrivateOptimizer:
    given = {"max_grad_norm": 0.5, "noise_multiplier": 0.0, "expected_batch_size": 8.0, "noise_key": NoiseKey.from_seed(1)}
    return PrivateOptimizer(module, **{**given, **options})


@pytest.mark.parametrize("c", [1e-3, 2.0])
def test_noise_is_sigma_times_c_over_the_expected_batch_size(c: float) -> None:
    """An empty draw moves the parameters by −lr·σ·C·N(0, I)/B: fails for noise 1 % off, not scaled by C, or a wrong divisor."""
    module = nn.Linear(1000, 1000)
    before = torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()
    optimizer = make(
        module, max_grad_norm=c, noise_multiplier=1.7, expected_batch_size=32.0, update=UpdateRule("sgd", lr=1000.0 / c)
    )
    optimizer.step()
    step = (optimizer.flat.data - before).double() / (1000.0 / c)
    expected = 1.7 * c / 32
    assert float(step.std()) == pytest.approx(expected, rel=4e-3)
    assert abs(float(step.mean())) < 5 * expected / 1000


def test_noise_is_added_once_a_step_however_many_micro_batches() -> None:
    module = nn.Linear(400, 1, bias=False)
    optimizer = make(module, noise_multiplier=1.0, max_grad_norm=1e-6, expected_batch_size=1.0, update=UpdateRule("sgd", lr=1e6))
    before = optimizer.flat.data.clone()
    for _ in range(16):
        optimizer.accumulate(loss, (torch.randn(2, 400), torch.randn(2)))
    optimizer.step()
    # Each micro-batch noised would give √16 or √17 times as much; none, nothing. 400 draws: about 4 standard errors.
    assert float((optimizer.flat.data - before).std()) == pytest.approx(1.0, rel=0.15)


def test_two_steps_draw_different_noise() -> None:
    module = nn.Linear(100, 1)
    optimizer = make(module, noise_multiplier=1.0, update=UpdateRule("sgd", lr=1.0))
    start = optimizer.flat.data.clone()
    optimizer.step()
    first = optimizer.flat.data - start
    middle = optimizer.flat.data.clone()
    optimizer.step()
    assert not torch.allclose(first, optimizer.flat.data - middle)


def test_the_divisor_is_the_expected_batch_size_not_the_drawn_one() -> None:
    steps = []
    for rows in (2, 4):
        torch.manual_seed(0)
        module = nn.Linear(3, 1, bias=False)
        optimizer = make(module, update=UpdateRule("sgd", lr=1.0))
        before = optimizer.flat.data.clone()
        x, y = torch.ones(1, 3).repeat(rows, 1), torch.full((rows,), 100.0)
        optimizer.accumulate(loss, (x, y))
        optimizer.step()
        steps.append(float((optimizer.flat.data - before).norm()))
    assert steps == pytest.approx([2 * 0.5 / 8, 4 * 0.5 / 8], rel=1e-4)


def test_equals_torch_adam_with_ema_and_micro_batches() -> None:
    torch.manual_seed(0)
    module, twin = nn.Linear(5, 1), nn.Linear(5, 1)
    twin.load_state_dict(module.state_dict())
    keys = list(module.state_dict())
    optimizer = make(module, max_grad_norm=1e9, expected_batch_size=4.0, update=UpdateRule("adam", lr=0.01), ema_decay=0.5)
    reference = torch.optim.Adam(twin.parameters(), lr=0.01)
    ema = [p.detach().clone() for p in twin.parameters()]
    for _ in range(5):
        x, y = torch.randn(4, 5), torch.randn(4)
        for part in (slice(0, 3), slice(3, 4)):
            optimizer.accumulate(loss, (x[part], y[part]))
        optimizer.step()
        reference.zero_grad()
        loss(twin, x, y).mean().backward()
        reference.step()
        ema = [0.5 * e + 0.5 * p.detach() for e, p in zip(ema, twin.parameters(), strict=True)]
    assert list(module.state_dict()) == keys
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    for e, found in zip(ema, optimizer.ema_state().values(), strict=True):
        torch.testing.assert_close(found, e, rtol=1e-5, atol=1e-6)


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the step sums the last micro-batch."""
    monkeypatch.setattr(ops, "step_sums_stored", lambda grad_sum: True)


class Mixed(nn.Module):
    """Stored (convolution, biases, norm, embedding) and deferred (one position a sample) parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.table = nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Embedding(3, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.first(x)).flatten(2).mean(2)
        return self.out(h + self.table((x[:, 0, 0, 0] > 0).long()))


def _mixed_batch(rows: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 1, 5, 5), torch.randn(rows)


def _optimizers(strategy: str = "auto", **options: object) -> list[PrivateOptimizer]:
    torch.manual_seed(0)
    first = Mixed()
    return [make(copy.deepcopy(first), noise_multiplier=1.0, ema_decay=0.9, strategy=strategy, **options) for _ in range(2)]


@pytest.mark.parametrize("strategy", ["auto", "store", "gram"])
@pytest.mark.parametrize("budget", [None, 2**30])
def test_the_step_that_sums_has_the_bits_of_sum_then_step(
    strategy: str, budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = _optimizers(strategy, memory_budget=budget)
    for micro_batches in (1, 3, 0, 2):
        batches = [_mixed_batch(4) for _ in range(micro_batches)]
        for optimizer, fused in ((one, True), (two, False)):
            monkeypatch.setattr(ops, "step_sums_stored", lambda grad_sum, fused=fused: fused)
            for args in batches:
                optimizer.accumulate(loss, args)
            assert (optimizer._pending is not None) == (fused and micro_batches > 0)
            optimizer.step()
            assert optimizer._pending is None
        for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_a_batch_in_parts_leaves_the_last_to_the_step(one_pass: None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = engine.plan_for(Mixed(), loss, _mixed_batch(4), multiplicity=1)
    monkeypatch.setattr(engine, "plan_for", lambda *args, **options: dataclasses.replace(plan, physical_batch_size=2))
    whole, parts = _optimizers("store")
    parts.memory_budget = 2**30
    args = _mixed_batch(5)
    for optimizer in (whole, parts):
        optimizer.accumulate(loss, args)
    assert parts._pending is not None and len(parts._pending.factors) == 1  # the fifth sample
    torch.testing.assert_close(parts.grad_sum, whole.grad_sum)


def test_whoever_reads_the_sum_finds_all_of_it(one_pass: None) -> None:
    one, _ = _optimizers()
    args = _mixed_batch(4)
    one.accumulate(loss, args)
    expected = pf.clipped_grad(one.module, loss, args, max_grad_norm=0.5).grads
    for name, found in one.flat.views(one.grad_sum).items():
        torch.testing.assert_close(found, expected[name])
    assert one._pending is None
    sums = one.grad_sum.clone()
    assert torch.equal(one.grad_sum, sums)  # and it is summed once


@pytest.mark.parametrize("how", ["discard", "load_state_dict"])
@pytest.mark.parametrize("fused", [True, False])
def test_what_was_accumulated_is_forgotten(fused: bool, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restore it is of other weights; the next step would release it with another batch: 2C for a sample of both."""
    monkeypatch.setattr(ops, "step_sums_stored", lambda grad_sum: fused)
    one, two = _optimizers()
    state = {name: t.clone() for name, t in one.state_dict().items()}
    one.accumulate(loss, _mixed_batch(4))
    one.accumulate(loss, _mixed_batch(4))
    if how == "discard":
        one.discard()
    else:
        one.load_state_dict(state)
    for optimizer in (one, two):
        optimizer.step()
    assert torch.equal(one.flat.data, two.flat.data)


@pytest.mark.parametrize("fused", [True, False])
def test_noise_is_that_of_the_largest_bound_of_the_batch(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "step_sums_stored", lambda grad_sum: fused)
    one, _ = _optimizers()
    one.max_grad_norm = 2.0
    one.accumulate(loss, _mixed_batch(4))
    one.max_grad_norm = 0.1
    one.accumulate(loss, _mixed_batch(4))
    found = []
    for name in ("private_step_", "summed_private_step_"):
        monkeypatch.setattr(ops, name, lambda *a, noise_std, **k: found.append(noise_std))
    one.step()
    one.step()  # nothing is left of the larger one
    assert found == [2.0, 0.1]


@pytest.mark.parametrize("fused", [True, False])
def test_a_failed_micro_batch_adds_nothing_and_takes_nothing(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "step_sums_stored", lambda grad_sum: fused)
    one, two = _optimizers()
    args = _mixed_batch(4)
    for optimizer in (one, two):
        optimizer.accumulate(loss, args)
    with pytest.raises(ValueError, match="one loss a row"):
        one.accumulate(lambda *a: loss(*a).sum(), _mixed_batch(4))
    for optimizer in (one, two):
        optimizer.step()
    assert torch.equal(one.flat.data, two.flat.data)


@pytest.mark.parametrize("fused", [True, False])
def test_a_failed_step_leaves_no_sums_to_the_next_batch(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of both batches would count twice in one step."""
    monkeypatch.setattr(ops, "step_sums_stored", lambda grad_sum: fused)
    one, _ = _optimizers()
    one.accumulate(loss, _mixed_batch(4))
    before = one.flat.data.clone()
    one.expected_batch_size = 0.0
    with pytest.raises(ValueError, match="denominator"):
        one.step()
    assert torch.equal(one.flat.data, before)
    assert one._pending is None and not one.grad_sum.any()


def test_no_micro_batch_is_summed_inside_a_capture_made_after_it(one_pass: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay would add it once more."""
    one, two = _optimizers()
    args = _mixed_batch(4)
    for optimizer in (one, two):
        optimizer.accumulate(loss, args)
    with monkeypatch.context() as m:
        m.setattr(ops, "capturing", lambda t: True)
        with pytest.raises(RuntimeError, match="every replay would add that once more"):
            one.accumulate(loss, args)
        with pytest.raises(RuntimeError, match="every replay would add that once more"):
            _ = one.grad_sum
    for optimizer in (one, two):
        optimizer.step()
    assert torch.equal(one.flat.data, two.flat.data)


def test_what_waits_for_the_step_is_not_in_memory_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned peaks hold: a micro-batch is summed before the next one's pass begins."""
    peaks = []
    for fused in (False, True):
        monkeypatch.setattr(ops, "step_sums_stored", lambda grad_sum, fused=fused: fused)
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(1, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64, 1))
        optimizer = make(module, strategy="store")
        batches = [_mixed_batch(8) for _ in range(3)]
        optimizer.accumulate(loss, batches[0])  # the looks at rows are behind it
        optimizer.step()
        with MemoryMeter() as meter:
            for args in batches:
                optimizer.accumulate(loss, args)
            optimizer.step()
        peaks.append(meter.take())
    assert peaks[0] > 8 * 4 * 64 * 64 * 9  # the stored gradients were seen
    assert peaks[1] <= 1.01 * peaks[0]


def test_state_resumes_and_holds_no_secret() -> None:
    torch.manual_seed(0)
    module, other = nn.Linear(5, 1), nn.Linear(5, 1)
    optimizer, second = make(module, ema_decay=0.9), make(other, ema_decay=0.9)
    x, y = torch.randn(4, 5), torch.randn(4)
    optimizer.accumulate(loss, (x, y))
    optimizer.step()
    optimizer.accumulate(loss, (x, y))
    state = {k: v.clone() for k, v in optimizer.state_dict().items()}
    assert set(state) == {"parameters", "exp_avg", "exp_avg_sq", "ema", "steps"}  # neither key nor un-noised sums
    second.load_state_dict(state)
    optimizer.discard()
    for o in (optimizer, second):
        o.accumulate(loss, (x, y))
        o.step()
    torch.testing.assert_close(optimizer.flat.data, second.flat.data)
    with pytest.raises(ValueError, match="expected"):
        second.load_state_dict({"parameters": state["parameters"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"expected_batch_size": 0.0}, "expected_batch_size"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"update": None, "module": nn.Linear(2, 1).double()}, "float32"),
        ({"module": nn.Linear(2, 1).requires_grad_(False)}, "no trainable parameter"),
    ],
)
def test_bad_options_are_named(options: dict, message: str) -> None:
    module = options.pop("module", nn.Linear(2, 1))
    with pytest.raises(ValueError, match=message):
        make(module, **options)


def test_unknown_optimizer() -> None:
    with pytest.raises(ValueError, match="adam, adamw or sgd"):
        UpdateRule("lion")


def test_a_module_that_left_its_flat_tensor_is_noticed() -> None:
    for change in (lambda m: m.double().float(), lambda m: m.bias.requires_grad_(False)):
        module = nn.Linear(3, 1)
        optimizer = make(module)
        change(module)
        with pytest.raises(ValueError, match="make a new PrivateOptimizer"):
            optimizer.accumulate(loss, (torch.randn(2, 3), torch.randn(2)))
