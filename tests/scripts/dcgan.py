"""A DCGAN whose discriminator is private and called twice a step, in the shape of Opacus' DCGAN example."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset

NOISE = 8


class Generator(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.ConvTranspose2d(NOISE, width * 2, 4, 1, 0, bias=False),
            nn.GroupNorm(4, width * 2),
            nn.ReLU(True),
            nn.ConvTranspose2d(width * 2, width, 4, 2, 1, bias=False),
            nn.GroupNorm(4, width),
            nn.ReLU(True),
            nn.ConvTranspose2d(width, 1, 4, 2, 1, bias=False),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


class Discriminator(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(1, width, 4, 2, 1, bias=False),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width * 2, 4, 2, 1, bias=False),
            nn.GroupNorm(4, width * 2),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width * 2, 1, 4, 1, 0, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x).view(-1, 1).squeeze(1)


def main(arguments: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Trains and returns (discriminator's state_dict, generator's state_dict, ε)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", default="privimage_fast", choices=["opacus", "privimage_fast"])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--sigma", type=float, default=1.0)
    parser.add_argument("-c", "--max-per-sample-grad_norm", type=float, default=0.1)
    parser.add_argument("--delta", type=float, default=1e-3)
    parser.add_argument("--no-poisson", action="store_true", help="the loader's own batches, for comparisons")
    args = parser.parse_args(arguments)
    library = importlib.import_module(args.library)

    torch.manual_seed(0)
    dataloader = DataLoader(TensorDataset(torch.rand(args.samples, 1, 16, 16) * 2 - 1), batch_size=args.batch_size)
    netG, netD = Generator(), Discriminator()
    criterion = nn.BCELoss()
    optimizerD = optim.Adam(netD.parameters(), lr=args.lr, betas=(0.5, 0.999))
    privacy_engine = library.PrivacyEngine()
    netD, optimizerD, dataloader = privacy_engine.make_private(
        module=netD,
        optimizer=optimizerD,
        data_loader=dataloader,
        noise_multiplier=args.sigma,
        max_grad_norm=args.max_per_sample_grad_norm,
        poisson_sampling=not args.no_poisson,
    )
    optimizerG = optim.Adam(netG.parameters(), lr=args.lr, betas=(0.5, 0.999))
    for _ in range(args.epochs):
        for data in dataloader:
            # (1) D: maximize log(D(x)) + log(1 - D(G(z)))
            optimizerD.zero_grad(set_to_none=True)
            real_data = data[0]
            batch_size = real_data.size(0)
            errD_real = criterion(netD(real_data), torch.ones(batch_size))
            fake = netG(torch.randn(batch_size, NOISE, 1, 1))
            errD_fake = criterion(netD(fake.detach()), torch.zeros(batch_size))
            errD = errD_real + errD_fake
            errD.backward()
            optimizerD.step()
            optimizerD.zero_grad(set_to_none=True)
            # (2) G: maximize log(D(G(z)))
            optimizerG.zero_grad()
            errG = criterion(netD(fake), torch.ones(batch_size))
            errG.backward()
            optimizerG.step()
    epsilon = privacy_engine.accountant.get_epsilon(delta=args.delta) if args.sigma else float("inf")
    return {key.removeprefix("_module."): t for key, t in netD.state_dict().items()}, netG.state_dict(), epsilon


if __name__ == "__main__":
    print(f"ε = {main()[2]:.2f}")
