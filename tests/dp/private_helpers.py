"""A private training loop in a few lines, and its gradient as the oracle has it, for the tests of the privacy engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from oracle import per_sample_loop
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

import privimage_fast as pf
from privimage_fast.dp.dp_optimizer import DPOptimizer
from privimage_fast.dp.loader import DPDataLoader


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def data(samples: int = 16, shape: tuple[int, ...] = (6,), scale: float = 1.0) -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(samples, *shape) * scale, torch.arange(samples) % 3)


def private(
    module: nn.Module, dataset: Any = None, *, batch_size: int = 8, optimizer: Any = None, engine: Any = None, **options: Any
) -> tuple[nn.Module, DPOptimizer, DPDataLoader, pf.PrivacyEngine]:
    """make_private with no noise and the loader's own batches, unless told otherwise."""
    engine = engine or pf.PrivacyEngine()
    given = {"noise_multiplier": 0.0, "max_grad_norm": 0.3, "poisson_sampling": False, **options}
    made = engine.make_private(
        module=module,
        optimizer=optimizer or torch.optim.SGD(module.parameters(), lr=0.1),
        data_loader=DataLoader(dataset or data(), batch_size=batch_size),
        **given,
    )
    return (*made, engine)


def batch_step(module: nn.Module, optimizer: DPOptimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(module(x), y).backward()
    optimizer.step()


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in module.parameters() if p.grad is not None])


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def row_losses(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(module(x), y, reduction="none")


def derived_net() -> nn.Module:
    return nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), weight_norm(nn.Linear(8, 3)))


class Discriminator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Linear(6, 8), nn.LeakyReLU(0.2, inplace=True), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x)[:, 0]


def expected_gradient(module: nn.Module, x: Tensor, y: Tensor, c: float, multiplicity: int = 1) -> Tensor:
    """Sum of clipped gradients of each sample's mean loss, in double precision."""

    def mean_loss(m: nn.Module, *args: Tensor) -> Tensor:
        return row_losses(m, *args) / multiplicity

    sums, _ = per_sample_loop(module, mean_loss, (x, y), max_grad_norm=c, multiplicity=multiplicity)
    return torch.cat([s.flatten() for s in sums.values()])
