"""pf.PrivacyEngine: what cannot be private, or would not be, is answered by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from private_helpers import (
    batch_step,
    data,
    expected_gradient,
    gradient,
    private,
    small_net,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import privimage_fast as pf
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.rules import UncoveredParameterError


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


def test_tensors_of_different_lengths_need_the_private_loader() -> None:
    """Four rows of mask before eight of images would make pairs of images samples."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, mask: Tensor, x: Tensor) -> Tensor:
            return self.linear(x)

    module, optimizer, _, _ = private(Masked())
    x, y = data(8).tensors
    F.cross_entropy(module(torch.ones(4, 4), x), y).backward()
    with pytest.raises(RuntimeError, match="4 and 8 rows"):
        optimizer.step()


def test_dropping_batches_that_do_not_suit_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    module, optimizer, loader, _ = private(small_net(), data(32), poisson_sampling=True, noise_multiplier=1.0)
    for _ in range(2):
        next(iter(loader))
    batch_step(module, optimizer, *next(iter(loader)))
    assert caplog.text.count("not stepped, and another pass begun") == 1


def test_complex_parameters_are_refused() -> None:
    """A real sum of their gradients would drop the imaginary part."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filter = nn.Parameter(torch.randn(6, dtype=torch.complex64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.ifft(torch.fft.fft(x) * self.filter).real

    with pytest.raises(UncoveredParameterError, match="'filter' is complex"):
        pf.clipped_grad(Spectral(), lambda m, x: m(x).sum(1), (torch.randn(4, 6),), max_grad_norm=1.0)


def test_a_path_is_no_ledger() -> None:
    with pytest.raises(TypeError, match=r"open one: pf\.Ledger\("):
        pf.PrivacyEngine(ledger="ledger.jsonl")  # type: ignore[arg-type]
    assert pf.Ledger is Ledger
