"""The networks of PRIVIMAGE+G: a class-conditional convolutional GAN for 8 to 64 px.

Both networks treat each row alone, which DP-SGD on the discriminator rests on: no batch normalisation, no minibatch statistics.
Label ``num_classes`` is the empty one, as in the U-Net. Levels halve the resolution (14 → 7 → 4) until 4 px or less are
left; with a ``patch`` of p, p×p pixels are one position to both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from privimage_fast.models.patches import Patches

_SMALLEST = 4  # px


@dataclass(frozen=True)
class GANConfig:
    """Sizes of both networks. ``PRESETS`` names the usual ones.

    Args:
        latent: numbers drawn for an image.
        generator_channels: width of the generator at full resolution.
        discriminator_channels: width of the discriminator at full resolution. It is what DP-SGD adds noise to.
        max_mult: the width doubles at each level, up to this multiple.
        features: what the discriminator's last layers see of an image.
    """

    latent: int = 64
    generator_channels: int = 48
    discriminator_channels: int = 32
    max_mult: int = 4
    features: int = 64

    def __post_init__(self) -> None:
        for name in ("latent", "max_mult", "features"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.gan.{name} must be ≥ 1, found {getattr(self, name)}")
        for name in ("generator_channels", "discriminator_channels"):
            if getattr(self, name) < 4 or getattr(self, name) % 4:
                raise ValueError(f"model.gan.{name} must be a multiple of 4, found {getattr(self, name)}")


PRESETS = {
    # 16×16 and below on a CPU; parameters of generator and discriminator at 14×14: 0.50 M and 0.10 M.
    "small": GANConfig(generator_channels=32, discriminator_channels=16),
    "base": GANConfig(),
    "large": GANConfig(latent=128, generator_channels=96, discriminator_channels=64, features=128),
}


def level_sizes(resolution: int) -> list[int]:
    """Sides of the feature maps, largest first: 28 → [28, 14, 7, 4]."""
    sizes = [resolution]
    while sizes[-1] > _SMALLEST:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def level_widths(base: int, levels: int, max_mult: int) -> list[int]:
    return [base * min(2**level, max_mult) for level in range(levels)]


class ConditionalNorm(nn.Module):
    """Group normalisation with scale and shift from the row's code; groups of 4 channels."""

    def __init__(self, channels: int, code: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(channels // 4, channels, affine=False)
        self.affine = nn.Linear(code, 2 * channels)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        scale, shift = self.affine(code)[:, :, None, None].chunk(2, 1)
        return self.norm(x) * (1 + scale) + shift


class GeneratorBlock(nn.Module):
    """Residual block that enlarges to ``size`` × ``size``: (norm → relu → conv) twice."""

    def __init__(self, c_in: int, c_out: int, code: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.norm1, self.conv1 = ConditionalNorm(c_in, code), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = ConditionalNorm(c_out, code), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        h = F.interpolate(F.relu(self.norm1(x, code)), size=self.size, mode="nearest")
        h = self.conv2(F.relu(self.norm2(self.conv1(h), code)))
        return h + F.interpolate(self.skip(x), size=self.size, mode="nearest")


class Generator(nn.Module):
    """forward: latents (R, latent) float, labels (R,) int64 in [0, num_classes] → images (R, C, H, W) in [−1, 1]."""

    def __init__(self, config: GANConfig, *, resolution: int, channels: int, num_classes: int, patch: int = 1) -> None:
        super().__init__()
        self.config, self.resolution, self.channels, self.num_classes = config, resolution, channels, num_classes
        self.patches = Patches(patch, resolution=resolution, channels=channels)
        sizes = level_sizes(self.patches.side)
        widths = level_widths(config.generator_channels, len(sizes), config.max_mult)
        code = 2 * config.latent
        self.label_in = nn.Embedding(num_classes + 1, config.latent)
        self.start = nn.Linear(code, widths[-1] * sizes[-1] ** 2)
        self.blocks = nn.ModuleList(
            GeneratorBlock(widths[i + 1], widths[i], code, sizes[i]) for i in reversed(range(len(sizes) - 1))
        )
        self.norm_out = ConditionalNorm(widths[0], code)
        self.image_out = nn.Conv2d(widths[0], self.patches.bands, 3, padding=1)
        self._start_shape = (widths[-1], sizes[-1], sizes[-1])

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        code = torch.cat([latents, self.label_in(labels)], 1)
        h = self.start(code).unflatten(1, self._start_shape)
        for block in self.blocks:
            h = block(h, code)
        return torch.tanh(self.patches.spread(self.image_out(F.relu(self.norm_out(h, code)))))

    @property
    def device(self) -> torch.device:
        return self.start.weight.device

    def latents(self, rows: int, random: torch.Generator | None) -> Tensor:
        """(rows, latent) standard normal, drawn on the generator's device."""
        device = None if random is None else random.device
        return torch.randn(rows, self.config.latent, generator=random, device=device).to(self.device)

    @torch.inference_mode()
    def draw(self, labels: Tensor, options: object, latents: Tensor) -> Tensor:
        """One forward pass; ``options`` (of the diffusion samplers) mean nothing here."""
        return self(latents, labels)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.config.latent,)

    def network_evaluations(self, options: object) -> int:
        return 1

    def describe(self) -> dict[str, object]:
        return {"family": "gan", "gan": vars(self.config), "patch": self.patches.patch}


class DiscriminatorBlock(nn.Module):
    """Residual block that halves the resolution: (leaky relu → conv) twice, then the mean of 2×2."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c_in, c_in, 3, padding=1), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.conv1(F.leaky_relu(x, 0.2)), 0.2)
        return _halved(self.conv2(h)) + self.skip(_halved(x))


class Discriminator(nn.Module):
    """Projection discriminator (Miyato & Koyama 2018). forward: images (R, C, H, W), labels (R,) int64 → scores (R,).

    Always in evaluation mode. Spectral norm would otherwise improve its estimate in every forward pass, and how many there are
    in a private step depends on how many images were drawn, which is secret. :meth:`iterate` improves it, once a step.
    """

    def __init__(
        self, config: GANConfig, *, spectral: bool, resolution: int, channels: int, num_classes: int, patch: int = 1
    ) -> None:  # fmt: skip
        super().__init__()
        self.patches = Patches(patch, resolution=resolution, channels=channels)
        sizes = level_sizes(self.patches.side)
        widths = level_widths(config.discriminator_channels, len(sizes), config.max_mult)
        self.image_in = nn.Conv2d(self.patches.bands, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(widths[i], widths[i + 1]) for i in range(len(sizes) - 1))
        self.features = nn.Linear(widths[-1] * sizes[-1] ** 2, config.features)
        self.score = nn.Linear(config.features, 1)
        self.label_in = nn.Embedding(num_classes + 1, config.features)
        nn.init.normal_(self.label_in.weight, std=config.features**-0.5)
        if spectral:
            for layer in [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
                spectral_norm(layer)
        self.eval()

    def train(self, mode: bool = True) -> Discriminator:
        return super().train(False)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        h = self.image_in(self.patches.gather(images))
        for block in self.blocks:
            h = block(h)
        h = F.leaky_relu(self.features(F.leaky_relu(h, 0.2).flatten(1)), 0.2)
        return self.score(h)[:, 0] + (h * self.label_in(labels)).sum(1)

    @torch.no_grad()
    def iterate(self) -> None:
        """One power iteration of every spectral norm: a function of the weights alone."""
        for layer in self.modules():
            if parametrize.is_parametrized(layer, "weight"):
                (norm,) = layer.parametrizations["weight"]  # type: ignore[union-attr, misc]
                norm.train()
                _ = layer.weight
                norm.eval()


def _halved(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2, ceil_mode=True)
