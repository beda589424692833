"""A classifier that gives synthetic images their labels: features that synthetic images have taught, and a linear layer on them.

Everything but the last layer comes from images that are private already. What is trained on sensitive images is the last layer
alone, on rows of a bounded length, so a step of it is one sum of bounded outer products (``stages.label``).
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from privimage_fast.models.classifier import Classifier, ClassifierConfig, batched

# Rows of every call: another shape could round otherwise, and so one image more could move the rows of others.
ROWS = 512
_MAX_WIDTH = 64  # of the classifier; the projection has (68·width)² entries
# Entries of a row are whole multiples of 2⁻¹⁴, those of the last layer of 2⁻¹⁶: sums of their products are then exact in float64,
# in whatever order they are added up.
ROW_BITS, HEAD_BITS = 14, 16
_CONSTANT = 0.3  # entry of a row that is the same for all: the bias; others have a length of about 1 before a row is scaled down
_SHRINKAGE = 0.1  # of the features' covariance towards the identity: directions that hardly vary are not blown up


def check_width(config: ClassifierConfig) -> None:
    if config.width > _MAX_WIDTH:
        raise ValueError(f"classifier.width must be at most {_MAX_WIDTH}, found {config.width}")


def row_entries(config: ClassifierConfig) -> int:
    """Entries of an image's row, the constant one included."""
    return 68 * config.width + 1


class Labeller(nn.Module):
    """Logits of classes for images (R, C, H, W) in [−1, 1].

    A row is an image's features — of each stage of a classifier, averaged over few places — less their mean and with their
    covariance taken out, as synthetic images have them, with a constant entry, scaled down to a length of at most 1.
    ``steps``: noised ones that the last layer has taken.
    """

    mean: Tensor
    projection: Tensor
    head: Tensor

    def __init__(self, config: ClassifierConfig, *, channels: int, num_classes: int) -> None:
        check_width(config)
        super().__init__()
        self.steps = 0
        self.classifier = Classifier(config, channels=channels, num_classes=num_classes)
        d = row_entries(config) - 1
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("projection", torch.eye(d))
        self.register_buffer("head", torch.zeros(d + 1, num_classes, dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        """(R, 68·width): the first two stages at 4×4 places, the third at 2×2 and on average."""
        first, second, third = self.classifier.stages(x)
        grids = (F.adaptive_avg_pool2d(stage, size).flatten(1) for stage, size in ((first, 4), (second, 4), (third, 2)))
        return torch.cat([*grids, third.mean((2, 3))], 1).float()

    def fit_rows(self, features: Tensor) -> None:
        """Takes mean, covariance and scale from features (N, 68·width) of synthetic images."""
        features = features.double()
        self.mean.copy_(features.mean(0))
        covariance = torch.cov(features.T)
        covariance += _SHRINKAGE * covariance.trace() / len(covariance) * torch.eye(len(covariance)).to(covariance)
        variances, axes = torch.linalg.eigh(covariance)
        projection = axes / variances.clamp_min(1e-30).sqrt()
        lengths = ((features - self.mean) @ projection).norm(dim=1)
        self.projection.copy_(projection / lengths.median().clamp_min(1e-30))

    def rows(self, x: Tensor) -> Tensor:
        """(R, 68·width + 1) float32 of images, each of length at most 1; a row that is not finite is zero."""
        entries = (self.features(x) - self.mean) @ self.projection
        entries = torch.cat([entries, torch.full_like(entries[:, :1], _CONSTANT)], 1).double()
        # Towards zero: no entry, and so no row, gets longer.
        shorter = (1 - 1e-9) / entries.norm(dim=1, keepdim=True).clamp_min(1.0)
        entries = (entries * shorter * 2**ROW_BITS).trunc() / 2**ROW_BITS
        return torch.where(entries.isfinite().all(1, keepdim=True), entries, 0.0).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.rows(x).double() @ self.head

    def labels(self, images: np.ndarray, device: str = "cpu") -> np.ndarray:
        """int64 (n,) of uint8 NHWC images."""
        self.to(device).eval()
        return batched(self, images, device=device, batch_size=ROWS).argmax(1).astype(np.int64)

    def describe(self) -> dict[str, Any]:
        """JSON from which, with channels and classes, an equal one can be built."""
        return asdict(self.classifier.config)
