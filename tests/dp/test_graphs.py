"""CapturedStep without a GPU: everything but the recording itself, for which ``replayed`` stands in.

``replayed`` runs the recorded function again where a graph would be replayed; the armed step then runs on emulated CUDA kernels.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from emulated import replay
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from privimage_fast import ops
from privimage_fast.dp import graphs
from privimage_fast.dp.engine import accumulate_clipped
from privimage_fast.dp.graphs import CapturedStep
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.dp.rules import UncoveredParameterError
from privimage_fast.dp.tracker import batch_tensors
from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, denoising_batch
from privimage_fast.models.unet import UNetConfig
from privimage_fast.ops import native

native_only = pytest.mark.skipif(native._C is None, reason="the extension is not built")


class Network(nn.Module):
    """Its last layer begins at zero, as those of diffusion networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Linear(8, 3)
        nn.init.zeros_(self.last.weight)
        self.dropout = nn.Dropout(0.0)
        self.register_buffer("counter", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.dropout(torch.relu(self.norm(self.first(x)))).mean((2, 3)))


def losses(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module(x), y, reduction="none")


def batch(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 2, 5, 5, generator=generator), torch.arange(samples) % 3


def optimizer(module: nn.Module | None = None, **options: Any) -> PrivateOptimizer:
    if module is None:
        torch.manual_seed(0)
        module = Network()
    given: dict[str, Any] = {
        "max_grad_norm": 0.5, "noise_multiplier": 1.0, "expected_batch_size": 8.0, "noise_key": NoiseKey.from_seed(1),
        "update": UpdateRule("adam", lr=0.01), "ema_decay": 0.9,
    }  # fmt: skip
    return PrivateOptimizer(module, **{**given, **options})


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the recording; the list says what was replayed."""
    return replay(monkeypatch)


def states_equal(a: PrivateOptimizer, b: PrivateOptimizer) -> bool:
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


@native_only
@pytest.mark.parametrize(
    "update", [UpdateRule("adam", lr=0.01), UpdateRule("sgd", lr=0.1, momentum=0.9), UpdateRule("sgd", lr=0.1)]
)
def test_captured_steps_have_the_bits_of_ordinary_ones(replayed: list[str], update: UpdateRule) -> None:
    """Over steps of two micro-batches, one padded, of none, and with a rate and an EMA decay that change."""
    ordinary, other = optimizer(update=update), optimizer(update=update)
    captured = CapturedStep(other, losses, batch(4, seed=9), capture=True)
    assert captured.captured and captured.samples == 4
    assert states_equal(ordinary, other) and not other.grad_sum.any()  # the capture left no trace
    for number, parts in enumerate([2, 2, 0, 1]):
        for part in range(parts):
            x, y = batch(4, seed=10 * number + part)
            weight = torch.tensor([1.0, 1, 1, 0]) if part else torch.ones(4)
            expected = ordinary.accumulate(losses, (x, y), weight)
            found = captured.accumulate((x, y), weight)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
        for o in (ordinary, other):
            o.ema_decay = (1 + number) / (10 + number)
        ordinary.step()
        captured.step()
        assert states_equal(ordinary, other)
    assert replayed == ["accumulate", "accumulate", "launch"] * 2 + ["launch", "accumulate", "launch"]


@native_only
@pytest.mark.parametrize("then", ["step", "accumulate"])
def test_an_eager_micro_batch_is_in_the_captured_step_after_it(
    replayed: list[str], then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left to a later step, it would be released with another batch: 2C for a sample of both."""
    ordinary, other = optimizer(), optimizer()
    captured = CapturedStep(other, losses, batch(2), capture=True)
    ordinary.accumulate(losses, batch(2, seed=1))
    with monkeypatch.context() as eager:
        eager.setattr(ops, "step_sums_stored", lambda grad_sum: True)
        other.accumulate(losses, batch(2, seed=1))
    assert other._pending is not None
    if then == "accumulate":
        monkeypatch.setattr(other, "accumulate", lambda *args: (torch.zeros(2), torch.zeros(2)))  # a replay runs no Python
        captured.accumulate(batch(2))
        assert other._pending is None
    captured.step()
    ordinary.step()
    assert other._pending is None and states_equal(ordinary, other)


@native_only
def test_warming_up_leaves_buffers_as_they_were(replayed: list[str]) -> None:
    class Counting(Network):
        def forward(self, x: Tensor) -> Tensor:
            self.counter += 1
            return super().forward(x)

    torch.manual_seed(0)
    o = optimizer(Counting())
    CapturedStep(o, losses, batch(2), capture=True)
    assert float(o.module.counter) == 0


@native_only
def test_each_replay_of_the_step_draws_its_own_noise(replayed: list[str]) -> None:
    o = optimizer(update=UpdateRule("sgd", lr=1.0))
    captured = CapturedStep(o, losses, batch(2), capture=True)
    places = [o.flat.data.clone()]
    for _ in range(3):
        captured.step()
        places.append(o.flat.data.clone())
    moves = torch.stack([b - a for a, b in pairwise(places)])
    assert float(torch.corrcoef(moves).fill_diagonal_(0).abs().max()) < 0.5  # 107 parameters: 0.5 is 5 standard errors
    assert o.steps == 3


@native_only
def test_a_replay_that_nobody_armed_makes_nothing_usable(replayed: list[str]) -> None:
    o = optimizer()
    captured = CapturedStep(o, losses, batch(2), capture=True)
    captured.accumulate(batch(2))
    captured.step()
    assert o.flat.data.isfinite().all()
    captured.accumulate(batch(2))
    captured._run_step()  # as if somebody replayed the graph
    assert o.flat.data.isnan().all() and o.ema is not None and o.ema.isnan().all() and not o.grad_sum.any()


@native_only
def test_a_step_number_is_armed_once(replayed: list[str]) -> None:
    from privimage_fast.dp.noise import NoiseReuseError

    o = optimizer()
    captured = CapturedStep(o, losses, batch(2), capture=True)
    captured.step()
    o.steps -= 1
    captured.accumulate(batch(2))
    with pytest.raises(NoiseReuseError, match="step 1"):
        captured.step()
    assert not o.grad_sum.any()


def test_without_a_gpu_the_same_calls_run_eagerly() -> None:
    ordinary, other = optimizer(), optimizer()
    eager = CapturedStep(other, losses, batch(4))
    assert not eager.captured
    for part in range(2):
        ordinary.accumulate(losses, batch(4, seed=part))
        eager.accumulate(batch(4, seed=part))
    ordinary.step()
    eager.step()
    assert states_equal(ordinary, other)


def test_padding_adds_nothing_whatever_it_holds() -> None:
    o, other = optimizer(), optimizer()
    steps = [CapturedStep(p, losses, batch(4)) for p in (o, other)]
    x, y = batch(4)
    x[2:] = torch.inf
    steps[0].accumulate((x, y), torch.tensor([1.0, 1, 0, 0]))
    steps[1].accumulate((x, y))  # not finite: rejected all the same
    assert o.grad_sum.any() and o.grad_sum.isfinite().all() and torch.equal(o.grad_sum, other.grad_sum)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (batch(3), r"args\[0\] is \(3, 2, 5, 5\) torch.float32, expected \(4, 2, 5, 5\) torch.float32"),
        ((batch(4)[0].double(), batch(4)[1]), r"args\[0\] is .* torch.float64"),
        (batch(4)[:1], "the loss was given 1 tensors, expected 2"),
    ],
)  # fmt: skip
def test_another_shape_is_refused_before_anything_is_added(args: Sequence[Tensor], message: str) -> None:
    o = optimizer()
    step = CapturedStep(o, losses, batch(4))
    before = [t.clone() for t in step._inputs]
    with pytest.raises(ValueError, match=message):
        step.accumulate(args)
    assert not o.grad_sum.any() and all(torch.equal(a, b) for a, b in zip(before, step._inputs, strict=True))


def test_weights_are_0_or_1() -> None:
    step = CapturedStep(optimizer(), losses, batch(4))
    with pytest.raises(ValueError, match="0 and 1 only"):
        step.accumulate(batch(4), torch.tensor([1.0, 2.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match=r"shape \(4,\), found \(3,\)"):
        step.accumulate(batch(4), torch.ones(3))


def test_a_stand_in_needs_whole_samples() -> None:
    with pytest.raises(ValueError, match="stand_in has 3 rows; expected at least one sample of 2 adjacent rows"):
        CapturedStep(optimizer(multiplicity=2), losses, batch(3))


CHANGES: dict[str, Callable[[PrivateOptimizer], Any]] = {
    "max_grad_norm was changed from 0.5 to 1.0": lambda o: setattr(o, "max_grad_norm", 1.0),
    "multiplicity was changed from 1 to 2": lambda o: setattr(o, "multiplicity", 2),
    "the module's training mode was changed": lambda o: o.module.eval(),
    "the update rule was changed": lambda o: setattr(o, "update", UpdateRule("sgd")),
    "the optimizer's state was changed": lambda o: setattr(o, "ema", None),
    "parameter 'first.weight' was moved": lambda o: o.module.double().float(),
    "strategy was changed from 'auto' to 'store'": lambda o: setattr(o, "strategy", "store"),
    "memory_budget was changed": lambda o: setattr(o, "memory_budget", 2**30),
    "store_dtype was changed": lambda o: setattr(o, "store_dtype", torch.bfloat16),
    "the place of a buffer was changed": lambda o: setattr(o.module, "counter", torch.zeros(1)),
    "'last.bias' was frozen or unfrozen": lambda o: o.module.last.bias.requires_grad_(False),
}


@native_only
@pytest.mark.parametrize("message", CHANGES)
def test_what_a_graph_has_frozen_may_not_change(replayed: list[str], message: str) -> None:
    """Sums clipped to the old bound would be noised for the new one."""
    o = optimizer()
    step = CapturedStep(o, losses, batch(2), capture=True)
    step.accumulate(batch(2))
    CHANGES[message](o)
    before = o.flat.data.clone()
    for call in (lambda: step.accumulate(batch(2)), step.step):
        with pytest.raises((RuntimeError, ValueError), match=message):
            call()
    assert torch.equal(o.flat.data, before) and o.steps == 0 and replayed == ["accumulate"]
    assert not o.grad_sum.any()  # or the sums of this batch would be in the next one's step as well


@native_only
def test_noise_and_rate_follow_the_optimizer(replayed: list[str]) -> None:
    """They are armed for each step, not frozen."""
    ordinary, other = optimizer(), optimizer()
    captured = CapturedStep(other, losses, batch(2), capture=True)
    for o in (ordinary, other):
        o.noise_multiplier, o.expected_batch_size, o.update = 3.0, 5.0, UpdateRule("adam", lr=0.5, weight_decay=0.1)
    ordinary.step()
    captured.step()
    assert states_equal(ordinary, other)


@pytest.mark.parametrize("how", ["module", "function"])
def test_a_loss_with_draws_of_its_own_is_not_captured(replayed: list[str], how: str, caplog: pytest.LogCaptureFixture) -> None:
    o = optimizer()
    assert isinstance(o.module, Network)
    o.module.dropout.p = 0.5 if how == "module" else 0.0

    def noisy(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return losses(module, x + torch.randn_like(x), y)

    loss = losses if how == "module" else noisy
    if native._C is not None:
        with pytest.raises(RuntimeError, match="draws random numbers of its own"):
            CapturedStep(o, loss, batch(2), capture=True)
    o.module.eval()
    if how == "module" and native._C is not None:
        assert CapturedStep(o, loss, batch(2), capture=True).captured


def test_a_capture_that_fails_runs_eagerly_and_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(self: CapturedStep) -> None:
        self._run_accumulate = self._run_step = lambda: pytest.fail("a half-made capture was used")
        raise RuntimeError("operation not permitted when stream is capturing")

    ordinary, other = optimizer(), optimizer()
    monkeypatch.setattr(CapturedStep, "_capture", fail)
    with pytest.raises(RuntimeError, match="not permitted"):
        CapturedStep(optimizer(), losses, batch(2), capture=True)
    monkeypatch.setattr(graphs, "_on_gpu", lambda device: True)
    with caplog.at_level(logging.WARNING):
        step = CapturedStep(other, losses, batch(2))
    assert not step.captured and "without CUDA graphs, which is slower: operation not permitted" in caplog.text
    ordinary.accumulate(losses, batch(2))
    step.accumulate(batch(2))
    ordinary.step()
    step.step()
    assert states_equal(ordinary, other)


@native_only
def test_a_module_that_mixes_samples_is_refused_before_it_sees_data(replayed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def mixing(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        found = losses(module, x, y)
        return found + found.mean()

    monkeypatch.setattr(graphs, "_on_gpu", lambda device: True)
    o = optimizer()
    before = o.flat.data.clone()
    with pytest.raises(UncoveredParameterError):
        CapturedStep(o, mixing, batch(4))
    assert torch.equal(o.flat.data, before) and not o.grad_sum.any()


@native_only
def test_rows_are_looked_at_before_the_capture(replayed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the layer that begins at zero nothing shows; a look within a capture would wait for the GPU."""
    from privimage_fast.dp import engine

    step = CapturedStep(optimizer(), losses, batch(4), capture=True)
    monkeypatch.setattr(engine.random, "SystemRandom", lambda: pytest.fail("rows were looked at again"))
    step.accumulate(batch(4, seed=5))


def test_autocast_reaches_the_loss_and_not_the_norms() -> None:
    seen: list[torch.dtype] = []

    def watched(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = module(x)
        seen.append(out.dtype)
        return nn.functional.cross_entropy(out.float(), y, reduction="none")

    o, other = optimizer(), optimizer()
    CapturedStep(other, watched, batch(4), autocast=torch.bfloat16).accumulate(batch(4))
    with torch.autocast("cpu", torch.bfloat16):
        o.accumulate(watched, batch(4))
    assert seen == [torch.bfloat16] * 2 and torch.equal(o.grad_sum, other.grad_sum)


# --- what a capture forbids, seen on a device that holds no values ---------------------------------------------------------


class Waiting(TorchDispatchMode):
    """Fails where a tensor of the host takes part: such a copy waits for a GPU, and a graph would repeat an old value."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in batch_tensors((args, kwargs or {}, out)):
            assert t.device.type == "meta", f"{func} on {t.device}"
        return out


@pytest.mark.parametrize("strategy", ["store", "gram", "norm-only", "auto"])
def test_a_pass_neither_copies_from_the_host_nor_reads_a_value(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample, so that nothing is probed; on "meta" tensors, whose values cannot be read, the engine goes a GPU's way."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda d="cuda": d != "meta" and enabled(d))
    monkeypatch.setattr(torch, "autocast", lambda d, *a, **k: contextlib.nullcontext() if d == "meta" else autocast(d, *a, **k))
    monkeypatch.setattr(ops, "weighted_sum_", lambda *a: None)  # the reference looks at coefficients, the kernel does not
    unet = UNetConfig(base_channels=8, channel_mult=(1, 2), blocks=1, attention_levels=(1,), head_channels=8)
    model = Denoiser(unet, EDMConfig(), resolution=8, channels=3, num_classes=4).to("meta")
    images, labels = torch.zeros(1, 3, 8, 8, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    args = denoising_batch(
        images, labels, edm=model.edm, num_classes=4, multiplicity=3, label_dropout=0.1, generator=None
    ).args()  # fmt: skip
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    weight = torch.ones(1, device="meta")
    with Waiting():
        norms, _ = accumulate_clipped(
            model, DenoisingLoss(3), args, sums, max_grad_norm=1.0, multiplicity=3, strategy=strategy, sample_weight=weight
        )
    assert norms.device.type == "meta"


def test_what_runs_eagerly_keeps_nothing_alive() -> None:
    """A plan's network and its state would lie beside the run's until the garbage collector comes."""
    captured = CapturedStep(optimizer(), losses, batch(2))
    captured.accumulate(batch(2))
    captured.step()
    there = weakref.ref(captured.optimizer)
    gc.disable()
    try:
        del captured
        assert there() is None
    finally:
        gc.enable()
