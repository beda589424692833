"""A private training loop in a few lines, for the tests of the privacy engine."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
