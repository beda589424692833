"""Poisson sampling from secret randomness, and micro-batches of one fixed shape. Knows nothing of noise or accounting.

The accountants assume that each image enters each batch by its own coin of probability q, and that nobody knows the
coins. A shuffled pass over the set, a batch of fixed size, or a guessable generator all break that assumption.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
from scipy.special import bdtrc

_CHUNK = 2**20  # images decided at a time: 8 MiB of random bytes


class SecretRandom(Protocol):
    """A source of random bytes. `seeded` is True when they can be reproduced, which only tests may want."""

    seeded: bool

    def random_bytes(self, count: int) -> bytes: ...


class OSRandom:
    """The operating system's cryptographic generator. No state here, so nothing to seed, to copy or to leak by fork."""

    seeded = False

    def random_bytes(self, count: int) -> bytes:
        return os.urandom(count)


class SeededRandom:
    """Reproducible bytes, SHAKE-256 of (seed, call number). NOT PRIVATE: for tests; the ledger has to be marked."""

    seeded = True

    def __init__(self, seed: int) -> None:
        self._seed, self._calls = int(seed), 0

    def random_bytes(self, count: int) -> bytes:
        self._calls += 1
        return hashlib.shake_256(f"privimage sampling {self._seed} {self._calls}".encode()).digest(count)


def mersenne_state(randomness: SecretRandom) -> np.ndarray:
    """624 secret words (uint32): the whole state of a Mersenne twister. A seed would leave 2³² states to try."""
    return np.frombuffer(randomness.random_bytes(4 * 624), dtype="<u4")


class PoissonSampler:
    """Draws batches: each of `population` images is in with probability `sample_rate`, independently of everything.

    Args:
        population: number of images N. Its use here and in `expected_batch_size` makes N a public value.
        sample_rate: q in (0, 1], the very value the DP-SGD event carries. Never derive it from a batch size by int().
        randomness: where the coins come from; leave it out outside tests.

    Formal guarantees: an image is drawn when 64 secret bits, read as an integer, are below ⌊q·2⁶⁴⌋. q is taken as the
    exact rational that the float is, so the realised probability is at most the accounted q, by less than 2⁻⁶⁴. Coins
    of different images and of different draws share no bits.
    """

    def __init__(self, population: int, sample_rate: float, randomness: SecretRandom | None = None) -> None:
        if isinstance(population, bool) or int(population) != population or population < 1:
            raise ValueError(f"population is {population!r}; it must be an integer of 1 or more")
        rate = float(sample_rate)
        if not 0 < rate <= 1:  # NaN fails too
            raise ValueError(f"sample_rate is {sample_rate!r}; it must be in (0, 1]")
        threshold = math.floor(Fraction(rate) * 2**64)
        if threshold == 0:
            raise ValueError(f"sample_rate is {sample_rate!r}; below 2⁻⁶⁴ no image is ever drawn")
        self.population, self.sample_rate = int(population), rate
        self.randomness: SecretRandom = OSRandom() if randomness is None else randomness
        self._threshold = threshold

    @property
    def expected_batch_size(self) -> float:
        """q·N: a public constant, the divisor of every step, whatever the draw (the realised size is private)."""
        return self.sample_rate * self.population

    @property
    def seeded(self) -> bool:
        return self.randomness.seeded

    def draw(self) -> np.ndarray:
        """One batch: sorted int64 indices in 0 … N−1, shape (any number, 0 included,)."""
        if self._threshold == 2**64:  # q = 1; the threshold would not fit in 64 bits
            return np.arange(self.population, dtype=np.int64)
        limit, found = np.uint64(self._threshold), []
        for start in range(0, self.population, _CHUNK):
            size = min(_CHUNK, self.population - start)
            coins = np.frombuffer(self.randomness.random_bytes(8 * size), dtype="<u8")
            found.append(np.flatnonzero(coins < limit).astype(np.int64) + start)
        return np.concatenate(found)


@dataclass(frozen=True)
class MicroBatch:
    """A part of a drawn batch in a fixed shape. Padding has index −1 and weight 0.

    The caller puts blank rows where the index is −1: padding never reads an image's data, which would otherwise pass
    through the network in a step that did not draw it.

    indices: (P,) int64; weights: (P,) float32, 1 for a drawn image and 0 for padding.
    """

    indices: np.ndarray
    weights: np.ndarray


def expected_padded(size: int, expected_batch_size: float, population: int) -> tuple[float, float]:
    """Micro-batches of ``size`` that a draw from ``population`` takes, and their rows, padding included: both expected."""
    above = size * np.arange(-(-population // size))  # P(N > 0) + P(N > size) + …, of a binomial N
    parts = float(bdtrc(above, population, min(1.0, expected_batch_size / population)).sum())
    return parts, parts * size


def even_micro_batch(most: int, expected_batch_size: float, population: int) -> int:
    """The size, at most ``most``, at which a drawn batch leaves little to pad; of public numbers alone.

    Parts that divide the *expected* batch are the worst choice: every other draw is a little larger and takes one more part,
    nearly all of it padding. A part costs what ``most`` / 16 images do, whatever its size.
    """
    if most < 1:
        raise ValueError(f"most is {most}; it must be 1 or more")
    most = min(most, population)

    def cost(size: int) -> float:
        parts, rows = expected_padded(size, expected_batch_size, population)
        return rows + parts * most / 16

    return min(range(most, most // 4, -1), key=cost)


def micro_batches(indices: np.ndarray, physical_batch_size: int) -> Iterator[MicroBatch]:
    """`indices` in order, `physical_batch_size` at a time, the last one padded; an empty draw gives none.

    One shape for every draw keeps CUDA graphs and compiled code valid. An empty draw must still be noised, stepped and
    charged: that is the caller's step, not a micro-batch's.
    """
    size = physical_batch_size
    if isinstance(size, bool) or int(size) != size or size < 1:
        raise ValueError(f"physical_batch_size is {size!r}; it must be an integer of 1 or more")
    indices = np.asarray(indices, dtype=np.int64)
    if indices.ndim != 1 or (indices.size and indices.min() < 0):
        raise ValueError(f"indices must be a 1-D array of indices of 0 or more, found shape {indices.shape}")
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        padded, weights = np.full(size, -1, dtype=np.int64), np.zeros(size, dtype=np.float32)
        padded[: len(part)], weights[: len(part)] = part, 1.0
        yield MicroBatch(padded, weights)
