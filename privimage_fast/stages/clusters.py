"""A label space of one's own: clusters of an embedding in the place of the public set's labels.

The query needs scores of labels and nothing else, so any embedding of a batch (a self-supervised network, an autoencoder, pixels)
makes a semantic function: a label is a cluster of public images, its score the nearness of the cluster's centre.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from privimage_fast.data import DataError, ImageSet
from privimage_fast.models.classifier import batched
from privimage_fast.stages.query import SemanticFunction


def cluster_labels(
    embedding: Callable[[Tensor], Tensor], public: ImageSet, n_labels: int, *, seed: int = 0, iterations: int = 30,
    device: str = "cpu",
) -> tuple[ImageSet, SemanticFunction]:  # fmt: skip
    """k-means of the public images' embeddings: (the public set relabelled by cluster, the semantic function of the clusters).

    embedding: float images (R, C, H, W) in [−1, 1] → (R, d), each image by itself. Clusters that end empty are left out. Reads
    public images only; pass both results to ``PrivImage.fit(public, …, semantic_function=…)``.

    Raises:
        DataError: n_labels below 2 or above the number of images, or an embedding that is not (R, d) and finite.
    """
    points = batched(embedding, public.images, device=device).astype(np.float64)
    if points.ndim != 2 or len(points) != len(public) or not np.isfinite(points).all():
        raise DataError(
            f"embedding: found shape {points.shape} for {len(public)} images, expected ({len(public)}, d), all finite"
        )
    if not 2 <= n_labels <= len(public):
        raise DataError(f"n_labels: expected 2 to {len(public)} (the public images), found {n_labels}")
    centres = _seeded(points, n_labels, np.random.default_rng(seed))
    for _ in range(iterations):
        labels = _nearest(points, centres)
        used = np.unique(labels)
        updated = np.stack([points[labels == c].mean(axis=0) for c in used])
        if updated.shape == centres.shape and np.allclose(updated, centres):
            break
        centres = updated
    # Labels by the function that the query will use, so that an image and its cluster agree.
    function = _nearness(torch.from_numpy(centres).float())
    scored = batched(lambda x: function(embedding(x)), public.images, device=device)
    used, labels = np.unique(scored.argmax(axis=1), return_inverse=True)
    function = _nearness(torch.from_numpy(centres[used]).float())
    names = [f"cluster {i}" for i in range(len(used))]
    return public.relabel(labels, names), lambda x: function(embedding(x))


def _nearness(centres: Tensor) -> Callable[[Tensor], Tensor]:
    def scores(features: Tensor) -> Tensor:
        # Row by row, without the batch's size in the arithmetic: an image scores alone as it does among others.
        at = centres.to(features.device)
        return -((features.float()[:, None] - at) ** 2).sum(2)

    return scores


def _seeded(points: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur & Vassilvitskii 2007): each centre far from those before it."""
    chosen = [int(random.integers(len(points)))]
    squared = ((points - points[chosen[0]]) ** 2).sum(1)
    for _ in range(1, count):
        total = squared.sum()
        weights = squared / total if total > 0 else np.full(len(points), 1 / len(points))
        chosen.append(int(random.choice(len(points), p=weights)))
        squared = np.minimum(squared, ((points - points[chosen[-1]]) ** 2).sum(1))
    return points[chosen]


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    norms = (centres**2).sum(1)
    return np.concatenate(
        [(norms - 2 * block @ centres.T).argmin(1) for block in np.array_split(points, max(1, len(points) // 4096))]
    )
