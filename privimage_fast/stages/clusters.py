"""Clusters of the public images in the place of their labels: finer than labels, and there where nobody wrote any.

The query needs scores of labels and nothing else, so any embedding of a batch (a self-supervised network, a classifier's
features, pixels) makes a semantic function: a label is a cluster of public images, its score the nearness of the cluster's
centre. The embedding and the clusters come of public images only; what the query then does, and costs, is the same.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from privimage_fast.data import DataError, ImageSet
from privimage_fast.models.classifier import batched
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, set_fingerprint
from privimage_fast.stages.query import QueryConfig, SemanticFunction, load_onnx, public_classifier

Embedding = Callable[[Tensor], Tensor]

# Centres are found from at most so many images; all of them are then assigned.
_MOST_POINTS = 50_000
_ITERATIONS = 30


def public_clusters(
    folder: RunFolder, config: QueryConfig, public: ImageSet, *, seed: int, device: str = "cpu"
) -> tuple[ImageSet, SemanticFunction]:
    """The public set by the ``config.clusters`` clusters of its images, and the function that scores them; made once a folder.

    They are kept, since another machine's sums might move an image from one cluster to the next. A cluster is named after the
    label that most of its images have, and its number.

    Raises:
        DataError: fewer images than clusters.
        RunError: an ONNX model that cannot be loaded, no labels to learn an embedding from, or a query whose clusters are gone.
    """
    assert config.clusters is not None
    if config.clusters > len(public):
        raise DataError(f"query.clusters is {config.clusters}, but there are {len(public)} public images; lower it")
    if config.embedding == "network" and config.onnx is None and public.n_classes == 1:
        raise RunError(
            "query.embedding network needs public labels to train a classifier on, but the public set has one label for all; set "
            "query.onnx, or query.embedding pixels"
        )
    path = folder.checkpoint("clusters")
    classifier = config.classifier if config.embedding == "network" and config.onnx is None else None
    stamp = fingerprint(config.clusters, config.embedding, config.onnx, classifier, seed, set_fingerprint(public))
    embedding = _embedding(folder, config, public, seed, device)
    tensors, metadata = folder.load_tensors(path, "query") if path.exists() else ({}, {})
    if metadata.get("fingerprint") != stamp:
        if folder.query.exists():
            raise RunError(
                f"{folder.query} counts votes for clusters that {path} no longer holds, and new ones would differ; restore "
                "that file, or start over with another --out"
            )
        centres, labels = _clusters(embedding, public, config.clusters, seed=seed, device=device)
        tensors = {"centres": centres, "labels": torch.from_numpy(labels)}
        folder.save_tensors(path, tensors, {"fingerprint": stamp})
    labels = tensors["labels"].numpy()
    numbered = public.relabel(labels, [str(i) for i in range(len(tensors["centres"]))])
    names = [f"{public.label_names[label]} #{i}" for i, label in enumerate(majority_labels(numbered, public))]
    return numbered.relabel(labels, names), _nearest_centre(embedding, tensors["centres"])


def pixels(x: Tensor) -> Tensor:
    """Images (R, C, H, W) averaged to at most 8×8, in rows (R, C·h·w)."""
    return F.avg_pool2d(x, -(-x.shape[-1] // 8), ceil_mode=True).flatten(1)


def _embedding(folder: RunFolder, config: QueryConfig, public: ImageSet, seed: int, device: str) -> Embedding:
    if config.embedding == "pixels":
        return pixels
    if config.onnx is not None:
        return load_onnx(config.onnx)
    return public_classifier(folder, config.classifier, public, seed=seed, device=device).features


def majority_labels(asked: ImageSet, public: ImageSet) -> np.ndarray:
    """int64 (asked labels,): the public label that most of its images have; the two are the same images by other labels."""
    table = np.zeros((asked.n_classes, public.n_classes), np.int64)
    np.add.at(table, (asked.labels, public.labels), 1)
    return table.argmax(1)


def cluster_labels(
    embedding: Embedding, public: ImageSet, n_labels: int, *, seed: int = 0, iterations: int = _ITERATIONS,
    device: str = "cpu",
) -> tuple[ImageSet, SemanticFunction]:  # fmt: skip
    """k-means of the public images' embeddings: (the public set relabelled by cluster, the semantic function of the clusters).

    embedding: float images (R, C, H, W) in [−1, 1] → (R, d), each image by itself. Clusters that end empty are left out. Reads
    public images only; pass both results to ``PrivImage.fit(public, …, semantic_function=…)``.

    Raises:
        DataError: n_labels below 2 or above the number of images, or an embedding that is not (R, d) and finite.
    """
    if not 2 <= n_labels <= len(public):
        raise DataError(f"n_labels: expected 2 to {len(public)} (the public images), found {n_labels}")
    centres, labels = _clusters(embedding, public, n_labels, seed=seed, device=device, iterations=iterations)
    names = [f"cluster {i}" for i in range(len(centres))]
    return public.relabel(labels, names), _nearest_centre(embedding, centres)


def _clusters(
    embedding: Embedding, public: ImageSet, count: int, *, seed: int, device: str, iterations: int = _ITERATIONS
) -> tuple[Tensor, np.ndarray]:
    """Centres float32 (at most ``count``, d), none without images, and the label int64 of each image."""
    points = batched(embedding, public.images, device=device)
    if points.ndim != 2 or len(points) != len(public) or not np.isfinite(points).all():
        raise DataError(
            f"embedding: found shape {points.shape} for {len(public)} images, expected ({len(public)}, d), all finite"
        )
    random = np.random.default_rng(seed)
    if len(points) > max(_MOST_POINTS, count):
        points = points[random.choice(len(points), max(_MOST_POINTS, count), replace=False)]
    points = points.astype(np.float64)
    centres = _seeded(points, count, random)
    for _ in range(iterations):
        labels = _nearest(points, centres)
        used = np.unique(labels)
        updated = np.stack([points[labels == c].mean(axis=0) for c in used])
        if updated.shape == centres.shape and np.allclose(updated, centres):
            break
        centres = updated
    # Labels by the function that the query will use, so that an image and its cluster agree.
    found = torch.from_numpy(centres).float()
    function = _nearest_centre(embedding, found)
    nearest = batched(lambda x: function(x).argmax(1), public.images, device=device).astype(np.int64)
    used, labels = np.unique(nearest, return_inverse=True)
    return found[used], labels


def _nearest_centre(embedding: Embedding, centres: Tensor) -> SemanticFunction:
    """Scores (R, labels): minus the distance to each centre."""

    def scores(x: Tensor) -> Tensor:
        features = embedding(x).float()
        # Without a matrix product, whose rounding may depend on the other rows: an image scores alone as it does among others.
        return -torch.cdist(features, centres.to(features.device), compute_mode="donot_use_mm_for_euclid_dist")

    return scores


def _seeded(points: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur & Vassilvitskii 2007): each centre far from those before it."""
    chosen = [int(random.integers(len(points)))]
    norms = (points**2).sum(1)
    squared = np.full(len(points), np.inf)
    for _ in range(1, count):
        last = chosen[-1]
        squared = np.minimum(squared, np.maximum(norms + norms[last] - 2 * (points @ points[last]), 0))
        squared[last] = 0
        total = squared.sum()
        weights = squared / total if total > 0 else np.full(len(points), 1 / len(points))
        chosen.append(int(random.choice(len(points), p=weights)))
    return points[chosen]


def _nearest(points: np.ndarray, centres: np.ndarray) -> np.ndarray:
    norms = (centres**2).sum(1)
    return np.concatenate(
        [(norms - 2 * block @ centres.T).argmin(1) for block in np.array_split(points, max(1, len(points) // 4096))]
    )
