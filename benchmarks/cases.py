"""The networks, batches and losses that a step is measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, denoising_batch
from privimage_fast.models.unet import PRESETS, UNetConfig

ROWS = 16
CLASSES = 10


class Built(NamedTuple):
    """A network, one batch, and ``loss(model, *args)``: one loss a row."""

    model: nn.Module
    args: tuple[Tensor, ...]
    loss: Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One network at one multiplicity. The number of rows stays, so at K = 8 there are two samples."""

    network: str
    multiplicity: int = 1
    rows: int = ROWS

    def __str__(self) -> str:
        return f"{self.network}, K={self.multiplicity}"

    @property
    def samples(self) -> int:
        return self.rows // self.multiplicity

    def build(self) -> Built:
        torch.manual_seed(0)
        return NETWORKS[self.network](self.rows, self.multiplicity)


def unet(config: UNetConfig, resolution: int, channels: int) -> Callable[[int, int], Built]:
    """The package's own U-Net under the EDM loss, as fine-tuning trains it."""

    def build(rows: int, multiplicity: int) -> Built:
        model = Denoiser(config, EDMConfig(), resolution=resolution, channels=channels, num_classes=CLASSES)
        samples = rows // multiplicity
        batch = denoising_batch(
            torch.rand(samples, channels, resolution, resolution) * 2 - 1, torch.arange(samples) % CLASSES, edm=model.edm,
            num_classes=CLASSES, multiplicity=multiplicity, label_dropout=0.1, generator=None,
        )  # fmt: skip
        return Built(model, batch.args(), DenoisingLoss(multiplicity))

    return build


def _noise_loss(model: nn.Module, images: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
    return (model(images, timestep).sample - noise).square().flatten(1).mean(1)


def diffusers_unet(widths: tuple[int, ...], resolution: int) -> Callable[[int, int], Built]:
    """diffusers' UNet2DModel, attention at the lower level; (64, 128) has 4.0 M parameters."""

    def build(rows: int, multiplicity: int) -> Built:
        from diffusers import UNet2DModel

        model = UNet2DModel(
            sample_size=resolution, in_channels=3, out_channels=3, layers_per_block=2, block_out_channels=widths,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        images, noise = torch.randn(2, rows, 3, resolution, resolution)
        return Built(model, (images, torch.randint(0, 1000, (rows,)), noise), _noise_loss)

    return build


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResNet(nn.Module):
    """ResNet-18 for 32×32 (He et al. 2016) with group norm, at half width."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(8, width)
        blocks: list[nn.Module] = []
        inputs = width
        for level in range(4):
            for index in range(2):
                outputs = width << level
                blocks.append(_ResidualBlock(inputs, outputs, 2 if level and not index else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


class _TransformerBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) with class token and position embedding as raw parameters, as in timm."""

    def __init__(self, resolution: int = 32, patch: int = 4, width: int = 192, depth: int = 6, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, (resolution // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(_TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def _class_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels, reduction="none")


def classifier(make: Callable[[], nn.Module], resolution: int) -> Callable[[int, int], Built]:
    def build(rows: int, multiplicity: int) -> Built:
        return Built(make(), (torch.randn(rows, 3, resolution, resolution), torch.arange(rows) % CLASSES), _class_loss)

    return build


NETWORKS: dict[str, Callable[[int, int], Built]] = {
    "U-Net small 14×14": unet(PRESETS["small"], 14, 1),
    "U-Net base 32×32": unet(PRESETS["base"], 32, 3),
    "UNet2DModel 32×32": diffusers_unet((64, 128), 32),
    "ResNet-18 32×32": classifier(ResNet, 32),
    "ViT 32×32": classifier(ViT, 32),
    # For the smoke test of the benchmarks themselves.
    "tiny U-Net": unet(UNetConfig(base_channels=8, channel_mult=(1,), blocks=1, attention_levels=(0,), head_channels=8), 8, 1),
    "tiny ViT": classifier(lambda: ViT(resolution=8, width=12, depth=1, heads=1), 8),
}
FULL = [Case(network, multiplicity) for network in list(NETWORKS)[:5] for multiplicity in (1, 8)]
SMOKE = [Case("tiny U-Net", 1, rows=4), Case("tiny ViT", 2, rows=4)]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def with_layout(value: Any, layout: torch.memory_format) -> Any:
    """Images in ``layout``, everything else as it is."""
    return value.contiguous(memory_format=layout) if isinstance(value, Tensor) and value.dim() == 4 else value
