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

_FEWEST = 3  # positions along a side: with fewer there is no image left to convolve


class Patches(nn.Module):
    """The way from pixels to positions, and back. Without parameters, and with nothing to be saved.

    Args:
        patch: p, which divides ``resolution``; 1 leaves images as they are.

    Attributes:
        side: positions along a side.
        bands: channels of a position, channels·p²; of each of an image's channels the lowest frequency comes first.
    """

    cosines: Tensor

    def __init__(self, patch: int, *, resolution: int, channels: int) -> None:
        super().__init__()
        possible = [p for p in range(1, resolution + 1) if resolution % p == 0 and (p == 1 or resolution // p >= _FEWEST)]
        if patch not in possible:
            raise ValueError(
                f"model.patch {patch} does not divide {resolution} px into {_FEWEST} blocks or more; choose one of "
                + ", ".join(map(str, possible))
            )
        self.patch, self.channels = patch, channels
        self.side, self.bands = resolution // patch, channels * patch**2
        self.register_buffer("cosines", _cosines(patch), persistent=False)

    def gather(self, images: Tensor) -> Tensor:
        """(R, C, p·h, p·w) → (R, C·p², h, w) of the same dtype, also under autocast."""
        if self.patch == 1:
            return images
        blocks = F.pixel_unshuffle(images, self.patch).unflatten(1, (self.channels, -1))
        return self._transformed("uk,rckhw->rcuhw", blocks).flatten(1, 2)

    def spread(self, positions: Tensor) -> Tensor:
        """(R, C·p², h, w) → (R, C, p·h, p·w): the inverse of :meth:`gather`."""
        if self.patch == 1:
            return positions
        blocks = self._transformed("uk,rcuhw->rckhw", positions.unflatten(1, (self.channels, -1)))
        return F.pixel_shuffle(blocks.flatten(1, 2), self.patch)

    def _transformed(self, equation: str, blocks: Tensor) -> Tensor:
        # A product of matrices and not a convolution, which on a GPU rounds float32 to TF32 unless it is told otherwise.
        with torch.autocast(blocks.device.type, enabled=False):
            return torch.einsum(equation, self.cosines.to(blocks.dtype), blocks)


def _cosines(patch: int) -> Tensor:
    """(p², p²) float32, orthonormal: a row for each frequency of a block, a column for each pixel."""
    at = torch.arange(patch, dtype=torch.float64)
    rows = torch.cos(math.pi * at[:, None] * (at + 0.5) / patch) * math.sqrt(2 / patch)
    rows[0] /= math.sqrt(2)
    return torch.kron(rows, rows).to(torch.float32)
