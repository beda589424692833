"""A small CNN on 28×28 digits, in the shape of Opacus' MNIST example. ``--library`` chooses the import, and nothing else."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset


class SampleConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 8, 2, padding=3)
        self.conv2 = nn.Conv2d(8, 16, 4, 2)
        self.fc1 = nn.Linear(16 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2, 1)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2, 1)
        x = x.view(-1, 16 * 4 * 4)
        return self.fc2(F.relu(self.fc1(x)))


def digits(count: int) -> TensorDataset:
    """Digit d is a bright bar at row 2d, under noise."""
    labels = torch.arange(count) % 10
    images = torch.randn(count, 1, 28, 28) * 0.3
    images[torch.arange(count), 0, 2 * labels] += 2.0
    return TensorDataset(images, labels)


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, Tensor], float, float]:
    """Trains and returns (state_dict, ε, accuracy on the training images)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", default="privimage_fast", choices=["opacus", "privimage_fast"])
    parser.add_argument("-b", "--batch-size", type=int, default=20)
    parser.add_argument("-n", "--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=80)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("-c", "--max-per-sample-grad_norm", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-3)
    parser.add_argument("--no-poisson", action="store_true", help="the loader's own batches, for comparisons")
    args = parser.parse_args(arguments)
    library: ModuleType = importlib.import_module(args.library)

    torch.manual_seed(0)
    loader = DataLoader(digits(args.samples), batch_size=args.batch_size)
    model = SampleConvNet()
    optimizer = optim.SGD(model.parameters(), lr=args.lr, momentum=0.5)
    privacy_engine = library.PrivacyEngine()
    model, optimizer, train_loader = privacy_engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=loader,
        noise_multiplier=args.sigma,
        max_grad_norm=args.max_per_sample_grad_norm,
        poisson_sampling=not args.no_poisson,
    )
    model.train()
    criterion = nn.CrossEntropyLoss()
    for _ in range(args.epochs):
        for data, target in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(data), target)
            loss.backward()
            optimizer.step()
    epsilon = privacy_engine.accountant.get_epsilon(delta=args.delta) if args.sigma else float("inf")
    model.eval()
    with torch.no_grad():
        correct = sum(int((model(data).argmax(1) == target).sum()) for data, target in loader)
    state = {key.removeprefix("_module."): t for key, t in model.state_dict().items()}
    return state, epsilon, correct / args.samples


if __name__ == "__main__":
    _, spent, accuracy = main()
    print(f"accuracy {accuracy:.3f}, ε = {spent:.2f}")
