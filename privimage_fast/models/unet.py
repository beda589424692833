"""The denoising U-Net: DDPM++ blocks (Song et al. 2021) in the arrangement of Karras et al. 2022, class-conditional.

Differences to the published network, each for the sake of the DP step: class labels enter by an embedding (a table look-up
has a cheap per-sample norm), blocks that enlarge already have the width of the level they lead to (a quarter less time a
step), and resampling is average pooling and nearest neighbour, so that any size from 8 works.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privimage_fast.ops.normalise import group_norm, residual, wants_channels_innermost


@dataclass(frozen=True)
class UNetConfig:
    """Size of the network. ``PRESETS`` names the usual ones.

    Args:
        base_channels: width of the first level (nf).
        channel_mult: width of each level as a multiple of ``base_channels``; every level halves the resolution.
        blocks: residual blocks a level (one more on the way up).
        attention_levels: levels, from 0, whose blocks end in self-attention.
        head_channels: channels of one attention head.
        embedding_mult: width of the noise/class embedding as a multiple of ``base_channels``.
    """

    base_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    head_channels: int = 32
    embedding_mult: int = 4

    def __post_init__(self) -> None:
        for name in ("channel_mult", "attention_levels"):  # YAML and JSON give lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.base_channels < 8 or self.base_channels % 4:
            raise ValueError(f"base_channels must be a multiple of 4 and at least 8, found {self.base_channels}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"channel_mult must hold whole numbers ≥ 1, found {self.channel_mult}")
        for name in ("blocks", "head_channels", "embedding_mult"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be ≥ 1, found {getattr(self, name)}")
        if any(not 0 <= level < len(self.channel_mult) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels {self.attention_levels} names a level beyond the {len(self.channel_mult)} there are"
            )


PRESETS = {
    # 16×16 and below on a CPU, about 0.3 M parameters; attention at half resolution.
    "small": UNetConfig(base_channels=16, channel_mult=(1, 2), blocks=1, attention_levels=(1,), head_channels=16),
    # The published sizes: nf 32, attention at half resolution (16×16 of 32×32).
    "base": UNetConfig(base_channels=32, channel_mult=(1, 2, 2), blocks=2, attention_levels=(1,)),
    "large": UNetConfig(base_channels=32, channel_mult=(2, 4), blocks=2, attention_levels=(1,)),
}


class SelfAttention(nn.Module):
    """Multi-head self-attention over the positions of an image; the projections are 1×1 convolutions."""

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.heads = max(1, channels // head_channels)
        self.norm = _group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        qkv, split = self.qkv(_normalised(self.norm, x)), (3, self.heads, channels // self.heads)
        if wants_channels_innermost(x):
            # Views, there and back: each head's features lie side by side, as flash kernels want them.
            q, k, v = (t.transpose(1, 2) for t in qkv.movedim(1, -1).reshape(rows, height * width, *split).unbind(2))
            mixed = F.scaled_dot_product_attention(q, k, v)  # (R, heads, T, d)
            mixed = mixed.transpose(1, 2).reshape(rows, height, width, channels).movedim(-1, 1)
        else:
            q, k, v = qkv.reshape(rows, *split, height * width).transpose(-1, -2).unbind(1)
            mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).reshape(rows, channels, height, width)
            return (x + self.out(mixed)) * math.sqrt(0.5)
        return residual(x, _unbiased(self.out, mixed), self.out.bias, None, math.sqrt(0.5))


class ResidualBlock(nn.Module):
    """norm → silu → conv → (+ embedding) → norm → silu → conv, scaled by √½ with the skip, then optional attention."""

    def __init__(self, c_in: int, c_out: int, embedding: int, head_channels: int | None, resample: str | None = None) -> None:
        super().__init__()
        self.resample = resample
        self.norm1 = _group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.embed = nn.Linear(embedding, c_out)
        self.norm2 = _group_norm(c_out)
        self.conv2 = _zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        self.attention = SelfAttention(c_out, head_channels) if head_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        h = _normalised(self.norm1, x, silu=True)
        if self.resample == "down":
            h, x = (F.avg_pool2d(t, 2, ceil_mode=True) for t in (h, x))
        elif self.resample == "up":
            h, x = (F.interpolate(t, size=size, mode="nearest") for t in (h, x))
        if not wants_channels_innermost(h):
            h = self.conv1(h) + self.embed(embedding)[:, :, None, None]
            h = self.conv2(_normalised(self.norm2, h, silu=True))
            return self.attention((self.skip(x) + h) * math.sqrt(0.5))
        # The same; what is the same for all of an image's positions is added by the ops that follow, in their own passes.
        shift = self.embed(embedding).float() + self.conv1.bias
        h = _normalised(self.norm2, _unbiased(self.conv1, h), silu=True, shift=shift)
        skip, bias = (_unbiased(self.skip, x), self.skip.bias) if isinstance(self.skip, nn.Conv2d) else (x, None)
        return self.attention(residual(skip, _unbiased(self.conv2, h), self.conv2.bias, bias, math.sqrt(0.5)))


class UNet(nn.Module):
    """Predicts from noisy images. Label ``num_classes`` is the empty one (dropped label, unconditional).

    forward: x (R, C, H, W) float, noise (R,) float, labels (R,) int64 in [0, num_classes] → (R, C, H, W).
    """

    def __init__(self, config: UNetConfig, *, channels: int, num_classes: int) -> None:
        super().__init__()
        self.config, self.channels, self.num_classes = config, channels, num_classes
        nf, width = config.base_channels, config.base_channels * config.embedding_mult
        self.noise_in = nn.Linear(nf, width)
        self.label_in = nn.Embedding(num_classes + 1, width)
        self.embedding_out = nn.Linear(width, width)
        nn.init.normal_(self.label_in.weight, std=0.5)
        self.image_in = nn.Conv2d(channels, nf, 3, padding=1)

        widths = [nf * m for m in config.channel_mult]
        heads = [config.head_channels if i in config.attention_levels else None for i in range(len(widths))]
        self.down = nn.ModuleList()
        skips, c = [nf], nf
        for level, c_out in enumerate(widths):
            if level:
                self.down.append(ResidualBlock(c, c, width, None, "down"))
                skips.append(c)
            for _ in range(config.blocks):
                self.down.append(ResidualBlock(c, c_out, width, heads[level]))
                skips.append(c := c_out)
        self.middle = nn.ModuleList([ResidualBlock(c, c, width, config.head_channels), ResidualBlock(c, c, width, None)])
        self.up = nn.ModuleList()
        for level, c_out in reversed(list(enumerate(widths))):
            for _ in range(config.blocks + 1):
                self.up.append(ResidualBlock(c + skips.pop(), c_out, width, heads[level]))
                c = c_out
            if level:
                # Narrowed while it is enlarged: at the full width, this block would be the dearest of the network.
                self.up.append(ResidualBlock(c, c := widths[level - 1], width, None, "up"))
        self.norm_out = _group_norm(c)
        self.image_out = _zero(nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        embedding = F.silu(self.noise_in(_positional(noise, self.config.base_channels)) + self.label_in(labels))
        embedding = F.silu(self.embedding_out(embedding))
        h = self.image_in(x)
        if wants_channels_innermost(h):  # an image of one channel does not tell which layout it has
            h = h.contiguous(memory_format=torch.channels_last)
        skips = [h]
        for block in self.down:
            skips.append(h := block(h, embedding))
        for block in self.middle:
            h = block(h, embedding)
        for block in self.up:
            if block.resample == "up":  # to the very size that was halved: odd sizes come back whole
                h = block(h, embedding, skips[-1].shape[-2:])
            else:
                h = block(torch.cat([h, skips.pop()], 1), embedding)
        return self.image_out(_normalised(self.norm_out, h, silu=True))


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(g for g in range(1, min(32, channels // 4) + 1) if channels % g == 0), channels, eps=1e-6)


def _normalised(norm: nn.GroupNorm, x: Tensor, *, silu: bool = False, shift: Tensor | None = None) -> Tensor:
    if shift is None and not wants_channels_innermost(x):  # as a module, for whoever hooks modules (Opacus does)
        return F.silu(norm(x)) if silu else norm(x)
    return group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, shift=shift)


def _unbiased(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(x, layer.weight, None, layer.stride, layer.padding)


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Near-zero initial weights, so that a block begins as the identity."""
    nn.init.xavier_uniform_(layer.weight, gain=1e-3)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer


def _positional(noise: Tensor, channels: int) -> Tensor:
    """Sinusoidal embedding of the noise level, (R,) → (R, channels)."""
    frequencies = (1 / 10000) ** (torch.arange(channels // 2, device=noise.device, dtype=torch.float32) / (channels // 2))
    angles = noise.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1).to(noise.dtype)
