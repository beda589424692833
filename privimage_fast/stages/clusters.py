"""Clusters of the public images in the place of their labels: finer than labels, and there where nobody wrote any.

The query needs scores of labels and nothing else, so any embedding of a batch (a self-supervised network, a classifier's
features, pixels) makes a semantic function: a label is a cluster of public images, its score the nearness of the cluster's
centre. The embedding and the clusters come of public images only; what the query then does, and costs, is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from privimage_fast.data import DataError, ImageSet
from privimage_fast.models.classifier import batched
from privimage_fast.stages.folder import RunError, RunFolder, file_fingerprint, fingerprint, set_fingerprint
from privimage_fast.stages.query import QueryConfig, SemanticFunction, labelling_fingerprint, load_onnx, public_classifier, tried

Embedding = Callable[[Tensor], Tensor]

# Centres are found from at most so many images; all of them are then assigned.
_MOST_POINTS = 50_000
_ITERATIONS = 30


def public_clusters(
    folder: RunFolder, config: QueryConfig, public: ImageSet, *, seed: int, device: str = "cpu"
) -> tuple[ImageSet, SemanticFunction, str]:
    """The public set by the ``config.clusters`` clusters of its images, the function that scores them, and what that is.

    They are made once a folder and kept, since another machine's sums might move an image from one cluster to the next. A cluster
    is named after the label that most of its images have, and its number.

    Raises:
        DataError: what :func:`check_clusters` refuses, or an embedding that is not (R, d) and finite.
        RunError: an ONNX model that cannot be loaded or fails, or a query whose clusters are gone.
    """
    check_clusters(config, public)
    assert isinstance(config.clusters, int)  # auto was resolved
    path, stamp = folder.checkpoint("clusters"), fingerprint(clusters_key(config), seed, set_fingerprint(public))
    embedding, name = _embedding(folder, config, public, seed, device)
    tensors, metadata = folder.load_tensors(path, "query") if path.exists() else ({}, {})
    if metadata.get("fingerprint") != stamp:
        centres, labels = _clusters(embedding, public, config.clusters, seed=seed, device=device)
        drawn = folder.read_json(folder.query, "query") if folder.query.exists() else None
        if drawn is not None and drawn.get("labelling") != labelling_fingerprint(public.relabel(labels, _numbers(centres))):
            raise RunError(
                f"{folder.query} counts votes for clusters that {path} no longer holds, and those that were found anew differ; "
                "restore that file, or start over with another --out"
            )
        tensors = {"centres": centres, "labels": torch.from_numpy(labels)}
        folder.save_tensors(path, tensors, {"fingerprint": stamp})
    labels = tensors["labels"].numpy()
    numbered = public.relabel(labels, _numbers(tensors["centres"]))
    names = [f"{public.label_names[label]} #{i}" for i, label in enumerate(majority_labels(numbered, public))]
    described = f"the nearest of {len(names)} clusters of the public images, by {name}"
    return numbered.relabel(labels, names), _nearest_centre(embedding, tensors["centres"]), described


def _numbers(centres: Tensor) -> list[str]:
    return [str(i) for i in range(len(centres))]


def check_clusters(config: QueryConfig, public: ImageSet) -> None:
    """Whether there can be such clusters at all.

    Raises:
        DataError: fewer images than clusters, or no labels to learn an embedding from.
    """
    if isinstance(config.clusters, int) and config.clusters > len(public):
        raise DataError(f"query.clusters is {config.clusters}, but there are {len(public)} public images; lower it")
    if config.clusters is not None and config.onnx is None and not config.embeds_pixels and public.n_classes == 1:
        raise DataError(
            "query.embedding network needs public labels to train a classifier on, but the public set has one label for all; set "
            "query.onnx, or query.embedding pixels"
        )


def clusters_key(config: QueryConfig) -> str:
    """Of all in ``config`` that the clusters depend on."""
    learned = config.classifier if not config.embeds_pixels and config.onnx is None else None
    model = None if config.onnx is None else file_fingerprint(config.onnx)
    return fingerprint(config.clusters, config.embeds_pixels, model, learned)


def pixels(x: Tensor) -> Tensor:
    """Images (R, C, H, W) averaged to at most 8×8, in rows (R, C·h·w)."""
    return F.avg_pool2d(x, -(-x.shape[-1] // 8), ceil_mode=True).flatten(1)


def _embedding(folder: RunFolder, config: QueryConfig, public: ImageSet, seed: int, device: str) -> tuple[Embedding, str]:
    if config.embeds_pixels:
        return pixels, "pixels"
    if config.onnx is not None:
        return load_onnx(config.onnx), f"the output of {Path(config.onnx).name}"
    classifier = public_classifier(folder, config.classifier, public, seed=seed, device=device)
    return classifier.features, f"features of the {config.classifier.name} trained on the public labels"


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
    random, images = np.random.default_rng(seed), public.images
    if len(images) > max(_MOST_POINTS, count):
        images = images[np.sort(random.choice(len(images), max(_MOST_POINTS, count), replace=False))]
    rows = tried(embedding, public, device, "the embedding")[1].shape
    if len(rows) != 2 or rows[0] != min(8, len(public)):
        raise DataError(
            f"embedding: found shape {tuple(rows)} for {min(8, len(public))} images, expected ({min(8, len(public))}, d)"
        )
    points = batched(embedding, images, device=device)
    centres = kmeans(points, count, random, iterations=iterations, device=device)
    # Labels by the function that the query will use, so that an image and its cluster agree.
    found = torch.from_numpy(centres)
    function = _nearest_centre(embedding, found)
    nearest = batched(lambda x: _best(function(x)), public.images, device=device).astype(np.int64)
    if (nearest < 0).any():
        raise DataError(f"embedding: not finite for {(nearest < 0).sum()} of the {len(public)} public images")
    used, labels = np.unique(nearest, return_inverse=True)
    return found[used], labels


def kmeans(
    points: np.ndarray, count: int, random: np.random.Generator, *, iterations: int = _ITERATIONS, device: str = "cpu"
) -> np.ndarray:  # fmt: skip
    """Centres (at most ``count``, d) of points (n, d), in their precision; one that ends without points is left out."""
    rows = torch.from_numpy(points).to(device)
    middle = rows.mean(0)
    rows = rows - middle  # squared distances are differences of squared lengths: these must not be large beside them
    centres = rows[_seeded(rows, count, random)]
    for _ in range(iterations):
        labels = _nearest(rows, centres)
        sums = torch.zeros(centres.shape, dtype=torch.float64, device=device)
        for own, block in zip(labels.split(4096), rows.split(4096), strict=True):
            sums.index_add_(0, own, block.double())
        members = torch.bincount(labels, minlength=len(centres))[:, None]
        updated = (sums / members)[members[:, 0] > 0].to(rows)
        if updated.shape == centres.shape and torch.allclose(updated, centres):
            break
        centres = updated
    return (centres + middle).cpu().numpy()


def _best(scores: Tensor) -> Tensor:
    """The label (R,) of each row's highest score, −1 where one is not finite."""
    return torch.where(scores.isfinite().all(1), scores.argmax(1), -1)


def _nearest_centre(embedding: Embedding, centres: Tensor) -> SemanticFunction:
    """Scores (R, labels): minus the distance to each centre."""

    def scores(x: Tensor) -> Tensor:
        features = embedding(x).float()
        # Without a matrix product, whose rounding may depend on the other rows: equal features have equal scores, whatever else
        # is in the batch.
        return -torch.cdist(features, centres.to(features.device), compute_mode="donot_use_mm_for_euclid_dist")

    return scores


def _seeded(points: Tensor, count: int, random: np.random.Generator) -> list[int]:
    """k-means++ (Arthur & Vassilvitskii 2007): each centre far from those before it."""
    chosen = [int(random.integers(len(points)))]
    norms = points.square().sum(1)
    squared = torch.full_like(norms, torch.inf)
    for draw in random.random(count - 1):
        last = chosen[-1]
        squared = torch.minimum(squared, (norms + norms[last] - 2 * (points @ points[last])).clamp_min(0))
        squared[last] = 0
        below = squared.double().cumsum(0).cpu().numpy()
        total = below[-1]
        found = np.searchsorted(below, draw * total, side="right") if total > 0 else int(draw * len(points))
        chosen.append(min(int(found), len(points) - 1))
    return chosen


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    norms = centres.square().sum(1)
    return torch.cat([(norms - 2 * block @ centres.T).argmin(1) for block in points.split(4096)])
