"""Blocks of p×p pixels as one position of a network, their pixels as its channels: space to depth, and back.

After Hoogeboom et al. 2023 (simple diffusion). The same network has p² times fewer positions to visit, and nothing is averaged
away; only its first and last convolution grow. An image's pixels go to its own row alone.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def positions(resolution: int, patch: int) -> int:
    """Positions along a side. ValueError where patches do not fill it."""
    if patch < 1 or resolution % patch:
        divisors = ", ".join(str(p) for p in range(1, resolution + 1) if resolution % p == 0 and resolution // p >= 4)
        raise ValueError(f"model.patch {patch} does not divide {resolution} px; choose one of {divisors}")
    return resolution // patch


def gather(images: Tensor, patch: int) -> Tensor:
    """(R, C, p·h, p·w) → (R, C·p², h, w)."""
    return images if patch == 1 else F.pixel_unshuffle(images, patch)


def spread(positions: Tensor, patch: int) -> Tensor:
    """(R, C·p², h, w) → (R, C, p·h, p·w), as :func:`gather` had it."""
    return positions if patch == 1 else F.pixel_shuffle(positions, patch)
