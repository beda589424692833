"""Poisson sampling: the right probability, independence, secrecy, and micro-batches that never touch unsampled data."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from privimage_fast.dp.sampling import OSRandom, PoissonSampler, SeededRandom, even_micro_batch, expected_padded, micro_batches

N, DRAWS = 400, 3000


class Fixed:
    """Randomness that is exactly these 64-bit integers."""

    seeded = True

    def __init__(self, *values: int) -> None:
        self.values = values

    def random_bytes(self, count: int) -> bytes:
        return np.array(self.values, dtype="<u8").tobytes()[:count]


@pytest.fixture(scope="module")
def inclusion() -> np.ndarray:
    """(DRAWS, N) of 0/1 at q = 1/3, fixed seed."""
    sampler, table = PoissonSampler(N, 1 / 3, SeededRandom(7)), np.zeros((DRAWS, N))
    for row in table:
        row[sampler.draw()] = 1
    return table


def test_batch_sizes_are_binomial_not_fixed(inclusion: np.ndarray) -> None:
    sizes = inclusion.sum(1)
    edges = stats.binom.ppf(np.linspace(0, 1, 11)[1:-1], N, 1 / 3)
    cells = np.searchsorted(edges, sizes)  # cell i: edges[i-1] < size <= edges[i]
    probability = np.diff(np.concatenate([[0], stats.binom.cdf(edges, N, 1 / 3), [1]]))
    assert stats.chisquare(np.bincount(cells, minlength=10), probability * DRAWS).pvalue > 1e-3


def test_each_image_is_included_at_the_rate(inclusion: np.ndarray) -> None:
    z = (inclusion.sum(0) - DRAWS / 3) / math.sqrt(DRAWS * 2 / 9)
    assert stats.kstest(z, "norm").pvalue > 1e-3 and abs(z).max() < 4.5
    # Peer's fault: a nominal batch of 19,384 for what was really q = 1/3; a rate 3 % off is seen here.
    total = inclusion.sum()
    assert abs(total / (N * DRAWS) - 1 / 3) < 4 * math.sqrt(2 / 9 / (N * DRAWS)) < abs(19_384 / 60_000 - 1 / 3)


def test_images_and_draws_are_independent(inclusion: np.ndarray) -> None:
    centred = inclusion - 1 / 3
    between_images = (centred[:, :-1] * centred[:, 1:]).sum() / (2 / 9) / math.sqrt(DRAWS * (N - 1))
    between_draws = (centred[:-1] * centred[1:]).sum() / (2 / 9) / math.sqrt((DRAWS - 1) * N)
    assert abs(between_images) < 4 and abs(between_draws) < 4


@given(st.floats(1e-12, 1.0, exclude_max=True))
def test_realised_probability_never_exceeds_the_accounted(q: float) -> None:
    """⌊q·2⁶⁴⌋ of the 2⁶⁴ integers are accepted: at most q of them, and less than one short."""
    limit = math.floor(Fraction(q) * 2**64)
    drawn = PoissonSampler(3, q, Fixed(0, limit - 1, limit)).draw()
    assert drawn.tolist() == [0, 1]
    assert Fraction(limit, 2**64) <= Fraction(q) < Fraction(limit + 1, 2**64)


def test_whole_set_at_rate_one_and_chunks() -> None:
    assert PoissonSampler(5, 1.0).draw().tolist() == [0, 1, 2, 3, 4]
    drawn = PoissonSampler(2**20 + 100_000, 0.5, SeededRandom(1)).draw()
    assert drawn.dtype == np.int64 and (np.diff(drawn) > 0).all() and drawn[-1] >= 2**20
    late = (drawn >= 2**20).sum()
    assert abs(late - 50_000) < 5 * math.sqrt(25_000)


def test_expected_batch_size_is_public_and_not_rounded() -> None:
    sampler = PoissonSampler(1000, 1 / 3)
    assert sampler.expected_batch_size == pytest.approx(1000 / 3, rel=1e-15)
    assert sampler.sample_rate == 1 / 3


def test_global_seeds_do_not_reach_the_sampling() -> None:
    """Peer's fault: a seed set to a constant before the secret draw."""
    drawn = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        drawn.append(PoissonSampler(2000, 0.5).draw().tolist())
    assert drawn[0] != drawn[1]


def test_seeded_sampling_is_marked() -> None:
    assert PoissonSampler(10, 0.5, SeededRandom(0)).seeded and not PoissonSampler(10, 0.5).seeded
    assert not OSRandom().seeded
    a, b = (PoissonSampler(100, 0.5, SeededRandom(3)).draw() for _ in range(2))
    assert (a == b).all()
    assert (PoissonSampler(100, 0.5, SeededRandom(4)).draw().tolist()) != a.tolist()


@pytest.mark.parametrize("q", [0.0, -0.1, 1.1, math.nan, 2.0**-70])
def test_bad_rates_are_refused(q: float) -> None:
    with pytest.raises(ValueError, match="sample_rate"):
        PoissonSampler(10, q)


@pytest.mark.parametrize("population", [0, -1, 2.5, True])
def test_bad_populations_are_refused(population) -> None:
    with pytest.raises(ValueError, match="population"):
        PoissonSampler(population, 0.5)


@given(st.lists(st.integers(0, 50), unique=True, max_size=40), st.integers(1, 9))
def test_micro_batches_hold_each_index_once_in_one_shape(indices: list[int], size: int) -> None:
    batches = list(micro_batches(np.array(indices, dtype=np.int64), size))
    assert len(batches) == math.ceil(len(indices) / size)  # an empty draw gives none
    kept = []
    for batch in batches:
        assert batch.indices.shape == batch.weights.shape == (size,)
        assert (batch.indices.dtype, batch.weights.dtype) == (np.int64, np.float32)
        assert ((batch.indices == -1) == (batch.weights == 0)).all() and set(batch.weights) <= {0.0, 1.0}
        kept += batch.indices[batch.weights == 1].tolist()
    assert kept == indices


@pytest.mark.parametrize(
    ("expected", "size", "population"), [(50, 70, 900), (50, 7, 60), (4096, 4096, 60_000), (4096, 2141, 60_000), (3, 2, 3)]
)
def test_expected_padding_is_that_of_draws(expected: int, size: int, population: int) -> None:
    parts = np.ceil(np.random.default_rng(0).binomial(population, expected / population, 200_000) / size)
    found, rows = expected_padded(size, expected, population)
    assert found == pytest.approx(parts.mean(), rel=0.01) and rows == pytest.approx(parts.mean() * size, rel=0.01)


def test_even_micro_batches_leave_little_to_pad() -> None:
    for most, expected, population in (
        (4096, 4096, 60_000), (512, 4096, 5000), (256, 50, 600), (256, 2048, 60_000), (30, 30, 40), (1, 5, 6)
    ):  # fmt: skip
        size = even_micro_batch(most, expected, population)
        parts, rows = expected_padded(size, expected, population)
        assert 1 <= size <= most and rows <= expected_padded(most, expected, population)[1] * (1 + 1e-9)
        assert parts <= 4 * math.ceil(expected / most)
    assert expected_padded(4096, 4096, 60_000)[1] > 1.4 * 4096
    assert expected_padded(even_micro_batch(4096, 4096, 60_000), 4096, 60_000)[1] < 1.06 * 4096
    with pytest.raises(ValueError, match="most is 0"):
        even_micro_batch(0, 10, 20)


@pytest.mark.parametrize("population", [1, 60, 100, 4096])
def test_a_whole_set_is_padded_by_nothing(population: int) -> None:
    """At q = 1 each draw is the set; no micro-batch is larger than it."""
    assert even_micro_batch(5000, population, population) == population
    assert expected_padded(population, population, population) == (1, population)


def test_bad_micro_batches_are_refused() -> None:
    with pytest.raises(ValueError, match="physical_batch_size"):
        list(micro_batches(np.arange(3), 0))
    with pytest.raises(ValueError, match="indices"):
        list(micro_batches(np.array([-1, 2]), 2))
