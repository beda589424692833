"""A ResNet with its batch norms replaced, trained in physical batches, in the shape of Opacus' CIFAR-10 tutorial."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = (
            nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width)) if stride > 1 else None
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.layers = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2), Block(16, 32, 2))
        self.fc = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, Tensor], float]:
    """Trains and returns (state_dict, ε)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", default="privimage_fast", choices=["opacus", "privimage_fast"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-physical-batch-size", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--epsilon", type=float, default=5.0)
    parser.add_argument("--sigma", type=float, default=None, help="instead of --epsilon")
    parser.add_argument("--delta", type=float, default=1e-3)
    parser.add_argument("--max-grad-norm", type=float, default=1.2)
    parser.add_argument("--no-poisson", action="store_true", help="the loader's own batches, for comparisons")
    args = parser.parse_args(arguments)
    validators = importlib.import_module(f"{args.library}.validators")
    memory = importlib.import_module(f"{args.library}.utils.batch_memory_manager")
    library = importlib.import_module(args.library)

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(args.samples, 3, 16, 16), torch.randint(10, (args.samples,)))
    train_loader = DataLoader(data, batch_size=args.batch_size)
    model = validators.ModuleValidator.fix(ResNet())
    assert not validators.ModuleValidator.validate(model, strict=False)
    optimizer = optim.NAdam(model.parameters(), lr=args.lr)
    privacy_engine = library.PrivacyEngine()
    shared = dict(
        module=model,
        optimizer=optimizer,
        data_loader=train_loader,
        max_grad_norm=args.max_grad_norm,
        poisson_sampling=not args.no_poisson,
    )
    if args.sigma is None:
        model, optimizer, train_loader = privacy_engine.make_private_with_epsilon(
            epochs=args.epochs, target_epsilon=args.epsilon, target_delta=args.delta, **shared
        )
    else:
        model, optimizer, train_loader = privacy_engine.make_private(noise_multiplier=args.sigma, **shared)
    scheduler = optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    criterion = nn.CrossEntropyLoss()
    for _ in range(args.epochs):
        model.train()
        with memory.BatchMemoryManager(
            data_loader=train_loader, max_physical_batch_size=args.max_physical_batch_size, optimizer=optimizer
        ) as memory_safe_data_loader:
            for images, target in memory_safe_data_loader:
                optimizer.zero_grad()
                loss = criterion(model(images), target)
                loss.backward()
                optimizer.step()
        scheduler.step()
    epsilon = privacy_engine.get_epsilon(args.delta) if args.sigma != 0 else float("inf")
    return {key.removeprefix("_module."): t for key, t in model.state_dict().items()}, epsilon


if __name__ == "__main__":
    print(f"ε = {main()[1]:.2f}")
