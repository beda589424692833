"""Blocks of p×p pixels as one position of a network, their frequencies as its channels.

The same network has p² times fewer positions to visit, and nothing is averaged away: the cosine transform of a block (DCT-II) is
orthonormal, so that white noise stays white, and an image's pixels go to its own row alone. Blocks as positions are those of
Hoogeboom et al. 2023 (simple diffusion), where the channels are the pixels themselves.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Patches(nn.Module):
    """The way from pixels to positions, and back. Without parameters, and with nothing to be saved.

    Args:
        patch: p, which divides ``resolution``; 1 leaves images as they are.

    Attributes:
        side: positions along a side.
        bands: channels of a position, channels·p²; of each of an image's channels the lowest frequency comes first.
    """

    filters: Tensor

    def __init__(self, patch: int, *, resolution: int, channels: int) -> None:
        super().__init__()
        if patch < 1 or resolution % patch:
            divisors = ", ".join(str(p) for p in range(1, resolution + 1) if resolution % p == 0 and resolution // p >= 4)
            raise ValueError(f"model.patch {patch} does not divide {resolution} px; choose one of {divisors}")
        self.patch, self.channels = patch, channels
        self.side, self.bands = resolution // patch, channels * patch**2
        self.register_buffer("filters", _cosines(patch).repeat(channels, 1, 1, 1), persistent=False)

    def gather(self, images: Tensor) -> Tensor:
        """(R, C, p·h, p·w) → (R, C·p², h, w), never in lower precision than it was given."""
        if self.patch == 1:
            return images
        with torch.autocast(images.device.type, enabled=False):
            return F.conv2d(images, self.filters.to(images.dtype), stride=self.patch, groups=self.channels)

    def spread(self, positions: Tensor) -> Tensor:
        """(R, C·p², h, w) → (R, C, p·h, p·w): the inverse of :meth:`gather`."""
        if self.patch == 1:
            return positions
        with torch.autocast(positions.device.type, enabled=False):
            return F.conv_transpose2d(positions, self.filters.to(positions.dtype), stride=self.patch, groups=self.channels)


def _cosines(patch: int) -> Tensor:
    """(p², 1, p, p) float32: the frequencies of a block, as orthonormal filters."""
    at = torch.arange(patch, dtype=torch.float64)
    rows = torch.cos(math.pi * at[:, None] * (at + 0.5) / patch) * math.sqrt(2 / patch)
    rows[0] /= math.sqrt(2)
    return torch.einsum("ui,vj->uvij", rows, rows).reshape(patch**2, 1, patch, patch).to(torch.float32)
