"""One DP step beside the plain step and beside Opacus' hooks, on the same network, batch and machine, in one run.

    make bench          # writes benchmarks/results/dp_step.json and prints the ratios

Figures are only comparable inside one run: read the ratios, not the seconds.
"""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, denoising_batch
from privimage_fast.models.unet import PRESETS

CASES = {"small-14": ("small", 14, 1), "base-32": ("base", 32, 3)}
ROWS = 16


def case(name: str, multiplicity: int) -> tuple[Denoiser, tuple[Tensor, ...], DenoisingLoss]:
    torch.manual_seed(0)
    preset, resolution, channels = CASES[name]
    model = Denoiser(PRESETS[preset], EDMConfig(), resolution=resolution, channels=channels, num_classes=10)
    samples = ROWS // multiplicity
    batch = denoising_batch(
        torch.rand(samples, channels, resolution, resolution) * 2 - 1, torch.arange(samples) % 10, edm=model.edm, num_classes=10,
        multiplicity=multiplicity, label_dropout=0.1, generator=None,
    )  # fmt: skip
    return model, batch.args(), DenoisingLoss(multiplicity)


def measure(benchmark: BenchmarkFixture, step, group: str) -> None:
    benchmark.group = group
    benchmark.pedantic(step, rounds=9, warmup_rounds=2)


@pytest.mark.parametrize("multiplicity", [1, 8])
@pytest.mark.parametrize("name", CASES)
def test_plain(benchmark: BenchmarkFixture, name: str, multiplicity: int) -> None:
    """Forward, backward, Adam: what a step costs without privacy."""
    model, args, loss_fn = case(name, multiplicity)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_fn(model, *args).sum().backward()
        optimizer.step()

    measure(benchmark, step, f"{name} K={multiplicity}")


@pytest.mark.parametrize("multiplicity", [1, 8])
@pytest.mark.parametrize("name", CASES)
def test_privimage_fast(benchmark: BenchmarkFixture, name: str, multiplicity: int) -> None:
    """Forward, backward, norms, clipping, ChaCha20 noise, Adam and EMA."""
    model, args, loss_fn = case(name, multiplicity)
    optimizer = PrivateOptimizer(
        model, max_grad_norm=1e-3, noise_multiplier=1.0, expected_batch_size=ROWS // multiplicity, multiplicity=multiplicity,
        update=UpdateRule("adam", lr=1e-4), ema_decay=0.999,
    )  # fmt: skip

    def step() -> None:
        optimizer.accumulate(loss_fn, args)
        optimizer.step()

    measure(benchmark, step, f"{name} K={multiplicity}")


@pytest.mark.parametrize("name", CASES)
def test_opacus_hooks(benchmark: BenchmarkFixture, name: str) -> None:
    """Opacus' per-sample gradients by hooks, its optimizer with ordinary torch noise; it has no multiplicity, so K=1."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, args, loss_fn = case(name, 1)
    wrapped = GradSampleModule(model, loss_reduction="sum")
    wrapped.edm = model.edm
    optimizer = DPOptimizer(
        torch.optim.Adam(wrapped.parameters(), lr=1e-4, fused=True), noise_multiplier=1.0, max_grad_norm=1e-3,
        expected_batch_size=ROWS, loss_reduction="sum",
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_fn(wrapped, *args).sum().backward()
        optimizer.step()

    measure(benchmark, step, f"{name} K=1")
