"""Measures of one set of images against another, as pure functions on feature arrays (numpy and scipy only).

A feature array is (images, features), any real dtype; all arithmetic is float64. Nothing here adds noise: a number
computed from sensitive features is *not private*, and whoever writes it down has to say so.
Distances are taken a block of rows at a time, so no n × m matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_BLOCK_BYTES = 64 << 20  # one block of the distance matrix
_ROUNDING = 1e-12  # of ‖x‖² + ‖y‖²: what ‖x‖² + ‖y‖² − 2x·y can be off by in float64
_SPARE = 8  # candidates beyond k that are measured again exactly, so rounding cannot swap a neighbour out


@dataclass(frozen=True)
class Memorisation:
    """How close synthetic images come to the images they were trained on; a statement about real people, not private.

    to_train, to_held_out: (n,) float64, distance of each synthetic image to its nearest one of either set (the second
    is None without held-out images). duplicate_rate: share of synthetic images within `tolerance` of a training image.
    nearer_to_train: share whose nearest image overall is a training image, ties counting one half. expected: what that
    share would be had the synthetic images never met the training images, n_train / (n_train + n_held_out).
    """

    to_train: NDArray[np.float64]
    to_held_out: NDArray[np.float64] | None
    duplicate_rate: float
    nearer_to_train: float | None
    expected: float | None


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """Fréchet distance between Gaussians fitted to a (n, d) and b (m, d): ‖μ_a−μ_b‖² + tr(Σ_a + Σ_b − 2(Σ_aΣ_b)^½).

    FID (Heusel et al. 2017, eq. 6) when the features are Inception's. Covariances divide by n−1. With centred data
    A = Q_a R_a the roots of the eigenvalues of Σ_aΣ_b are the singular values of R_a R_bᵀ / √((n−1)(m−1)), so neither
    covariance is formed nor squared and n < d needs no ridge. Raises ValueError on n < 2, on widths that differ and on
    non-finite features.
    """
    a, b = _pair(a, b, "a", "b")
    for name, x in (("a", a), ("b", b)):
        if len(x) < 2:
            raise ValueError(f"{name} has {len(x)} row(s); a covariance needs at least 2")
    mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
    root_a = np.linalg.qr(a - mean_a, mode="r") / np.sqrt(len(a) - 1)
    root_b = np.linalg.qr(b - mean_b, mode="r") / np.sqrt(len(b) - 1)
    cross = np.linalg.svd(root_a @ root_b.T, compute_uv=False).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + (root_a**2).sum() + (root_b**2).sum() - 2 * cross
    return max(float(distance), 0.0)  # rounding alone takes it below zero


def nearest_neighbours(queries: ArrayLike, references: ArrayLike, k: int = 1) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The k nearest of references (m, d) to each of queries (n, d), in Euclidean distance.

    Returns indices (n, k) int64 and distances (n, k) float64, nearest first; of a few equally near, the lower index
    first. A query that is itself a reference finds itself, at distance 0. Raises ValueError unless 1 <= k <= m, the
    widths agree and all features are finite.
    """
    queries, references = _pair(queries, references, "queries", "references")
    if not 1 <= k <= len(references):
        raise ValueError(f"k is {k}; with {len(references)} references it must lie between 1 and {len(references)}")
    indices = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k), np.float64)
    candidates = min(k + _SPARE, len(references))
    exact_rows = max(1, _BLOCK_BYTES // (8 * candidates * max(1, references.shape[1])))
    for start, squared in _squared_distances(queries, references):
        near = np.argpartition(squared, candidates - 1, axis=1)[:, :candidates]
        for row in range(0, len(near), exact_rows):
            index = near[row : row + exact_rows]
            at = slice(start + row, start + row + len(index))
            exact = np.sqrt(((queries[at, None, :] - references[index]) ** 2).sum(axis=2))
            order = np.lexsort((index, exact), axis=1)[:, :k]
            indices[at] = np.take_along_axis(index, order, axis=1)
            distances[at] = np.take_along_axis(exact, order, axis=1)
    return indices, distances


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of fake (m, d) against real (n, d) (Kynkäänniemi et al. 2019, eq. 1-3).

    Precision is the share of fake rows inside some real row's ball, whose radius is the distance to that row's k-th
    nearest other real row; recall swaps the two sets. Both lie in [0, 1]. Raises ValueError when a set has k rows or
    fewer, on widths that differ and on non-finite features.
    """
    real, fake = _pair(real, fake, "real", "fake")
    for name, x in (("real", real), ("fake", fake)):
        if len(x) <= k:
            raise ValueError(f"{name} has {len(x)} row(s); k = {k} needs at least {k + 1}")
    return _covered(fake, real, k), _covered(real, fake, k)


def density_coverage(real: ArrayLike, fake: ArrayLike, k: int = 5) -> tuple[float, float]:
    """Density and coverage of fake (m, d) against real (n, d) (Naeem et al. 2020, eq. 3-4).

    Density counts how many real rows' balls (radius: distance to the k-th nearest other real row) a fake row lies in,
    over k; it may exceed 1, and one outlier cannot raise it much. Coverage is the share of real rows with a fake row in
    their ball. Raises ValueError as precision_recall does.
    """
    real, fake = _pair(real, fake, "real", "fake")
    if len(real) <= k:
        raise ValueError(f"real has {len(real)} row(s); k = {k} needs at least {k + 1}")
    squared_radii = nearest_neighbours(real, real, k + 1)[1][:, k] ** 2
    inside, reached = 0, np.zeros(len(real), bool)
    for within in _within(fake, real, squared_radii):
        inside += int(within.sum())
        reached |= within.any(axis=0)
    return inside / (k * len(fake)), _share(reached)


@dataclass(frozen=True)
class MembershipInference:
    """How well an attacker tells members from others by a score; not private.

    auc: probability that a random member scores higher than a random other, ties counting one half; 0.5 is a guess.
    tpr: share of members above the threshold that at most the share ``fpr`` of others exceeds.
    """

    auc: float
    tpr: float
    fpr: float


def membership_inference(members: ArrayLike, others: ArrayLike, fpr: float = 0.01) -> MembershipInference:
    """Scores (n,) of members and (m,) of others, higher meaning "member" → how well they are told apart.

    Raises ValueError on empty or non-finite scores.
    """
    members, others = np.asarray(members, np.float64).ravel(), np.sort(np.asarray(others, np.float64).ravel())
    for name, scores in (("members", members), ("others", others)):
        if len(scores) == 0 or not np.isfinite(scores).all():
            raise ValueError(f"{name}: expected at least one score, all finite")
    below, not_above = np.searchsorted(others, members, "left"), np.searchsorted(others, members, "right")
    auc = float((below + not_above).mean() / (2 * len(others)))
    threshold = others[-1 - int(fpr * len(others))]
    return MembershipInference(auc, _share(members > threshold), fpr)


def memorisation(
    synthetic: ArrayLike, train: ArrayLike, held_out: ArrayLike | None = None, tolerance: float = 0.0
) -> Memorisation:
    """Distances of synthetic (n, d) to train (m, d) and, if given, to held_out (h, d), drawn as train was.

    If generation owed nothing to single training images, train and held-out images would be equally likely to be the
    nearest; `nearer_to_train` well above `expected` says that images were memorised. `tolerance` is the distance, in
    the features' unit, up to which an image counts as a duplicate. Raises ValueError as nearest_neighbours does.
    """
    to_train = nearest_neighbours(synthetic, train)[1][:, 0]
    duplicates = _share(to_train <= tolerance)
    if held_out is None:
        return Memorisation(to_train, None, duplicates, None, None)
    to_held_out = nearest_neighbours(synthetic, held_out)[1][:, 0]
    nearer = _share(to_train < to_held_out) + _share(to_train == to_held_out) / 2
    n_train, n_held_out = len(np.asarray(train)), len(np.asarray(held_out))
    return Memorisation(to_train, to_held_out, duplicates, nearer, n_train / (n_train + n_held_out))


def _share(flags: NDArray[np.bool_]) -> float:
    return float(np.mean(flags))


def _covered(points: NDArray[np.float64], centres: NDArray[np.float64], k: int) -> float:
    # Each centre is its own nearest neighbour, so its k-th other one is at position k.
    squared_radii = nearest_neighbours(centres, centres, k + 1)[1][:, k] ** 2
    return sum(int(within.any(axis=1).sum()) for within in _within(points, centres, squared_radii)) / len(points)


def _within(
    points: NDArray[np.float64], centres: NDArray[np.float64], squared_radii: NDArray[np.float64]
) -> Iterator[NDArray[np.bool_]]:
    """Yields, a block of points at a time, which of the centres' balls each lies in, (rows, centres)."""
    squared_norms = (centres**2).sum(axis=1)
    for start, squared in _squared_distances(points, centres):
        slack = _ROUNDING * ((points[start : start + len(squared)] ** 2).sum(axis=1)[:, None] + squared_norms)
        yield squared <= squared_radii + slack


def _squared_distances(
    queries: NDArray[np.float64], references: NDArray[np.float64]
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yields (first row, squared distances of a block of query rows to all references, (rows, m) float64)."""
    # Centring keeps ‖x‖² + ‖y‖² − 2x·y from cancelling when the features share a large offset.
    centre = references.mean(axis=0)
    references = references - centre
    reference_norms = (references**2).sum(axis=1)
    rows = max(1, _BLOCK_BYTES // (8 * len(references)))
    for start in range(0, len(queries), rows):
        block = queries[start : start + rows] - centre
        yield start, (block**2).sum(axis=1)[:, None] + reference_norms - 2 * (block @ references.T)


def _pair(x: ArrayLike, y: ArrayLike, x_name: str, y_name: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    arrays = []
    for name, value in ((x_name, x), (y_name, y)):
        array = np.asarray(value, dtype=np.float64)
        if array.ndim != 2:
            raise ValueError(f"{name} has shape {array.shape}; expected (images, features)")
        if len(array) == 0:
            raise ValueError(f"{name} has no rows")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds features that are not finite")
        arrays.append(array)
    if arrays[0].shape[1] != arrays[1].shape[1]:
        widths = f"{x_name} has {arrays[0].shape[1]} features an image and {y_name} has {arrays[1].shape[1]}"
        raise ValueError(f"{widths}; they must agree")
    return arrays[0], arrays[1]
