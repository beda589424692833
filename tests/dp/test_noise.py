"""Noise keys: full-size noise, used once, secret, and out of reach of every global seed."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random

import numpy as np
import pytest
from scipy import stats

from privimage_fast.dp.noise import NoiseKey, NoiseReuseError, Stream


def test_moments_of_a_million_draws_and_one_per_cent_is_seen() -> None:
    draws = NoiseKey.from_seed(1).gaussian(1_000_000, step=0, stream=Stream.STEP)
    assert draws.dtype == np.float64 and draws.shape == (1_000_000,)

    def wrong(x: np.ndarray) -> bool:
        """Mean, variance, kurtosis and tail of N(0, 1), each at about 5 standard errors."""
        n = x.size
        return (
            abs(x.mean()) > 5 / math.sqrt(n)
            or abs(x.var() - 1) > 5 * math.sqrt(2 / n)
            or abs((x**4).mean() - 3) > 5 * math.sqrt(96 / n)
            or abs((np.abs(x) > 3).mean() - 0.0026998) > 5 * math.sqrt(0.0027 / n)
        )

    assert not wrong(draws)
    assert wrong(0.99 * draws) and wrong(1.01 * draws)  # the test itself can fail
    assert stats.kstest(draws[:100_000], "norm").pvalue > 1e-3


def test_places_are_independent() -> None:
    key = NoiseKey.from_seed(2)
    places = [(0, Stream.QUERY, 0), (0, Stream.STEP, 0), (1, Stream.STEP, 0), (0, Stream.STEP, 1)]
    draws = np.stack([key.gaussian(20_000, step=s, stream=t, rank=r) for s, t, r in places])
    correlation = np.corrcoef(draws) - np.eye(len(places))
    assert np.abs(correlation).max() < 5 / math.sqrt(20_000)


def test_a_place_is_used_once() -> None:
    """The same noise on two releases cancels in their difference."""
    key = NoiseKey.from_seed(3)
    key.gaussian(4, step=5, stream=Stream.STEP)
    with pytest.raises(NoiseReuseError, match="step 5"):
        key.gaussian(4, step=5, stream=Stream.STEP)
    with pytest.raises(NoiseReuseError):
        key.use_bytes(step=5, stream=Stream.STEP)  # the fused kernel's way in shares the register
    assert len(key.use_bytes(step=6, stream=Stream.STEP)) == 32
    with pytest.raises(NoiseReuseError):
        key.gaussian(4, step=6, stream=Stream.STEP)
    key.gaussian(4, step=5, stream=Stream.QUERY)
    key.gaussian(4, step=5, stream=Stream.STEP, rank=1)


def test_kernel_bytes_and_gaussian_are_the_same_noise() -> None:
    from privimage_fast import ops

    raw = NoiseKey.from_seed(4).use_bytes(step=2, stream=Stream.STEP, rank=1)
    expected = ops.gaussian_noise(raw, step=2, rank=1, stream=int(Stream.STEP), n=6)
    drawn = NoiseKey.from_seed(4).gaussian((2, 3), step=2, stream=Stream.STEP, rank=1)
    assert drawn.shape == (2, 3) and np.array_equal(drawn.ravel(), expected)


def test_global_seeds_do_not_reach_the_noise() -> None:
    """Peer's fault: the seed was fixed to 0 right before the query noise, which made it a public constant."""
    import torch

    drawn = []
    for _ in range(2):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        drawn.append(NoiseKey.from_os().gaussian(8, step=0, stream=Stream.QUERY))
    assert not np.array_equal(*drawn)


def test_query_noise_is_gaussian_not_uniform() -> None:
    """Peer's fault: query noise from a uniform generator. Uniform draws of variance 1 never pass √3."""
    draws = NoiseKey.from_seed(5).gaussian((100, 1000), step=0, stream=Stream.QUERY)
    assert np.abs(draws).max() > 3.5 and stats.kstest(draws.ravel(), "norm").pvalue > 1e-3


def test_key_is_not_stored_shown_or_copied() -> None:
    key = NoiseKey.from_os()
    raw = key.use_bytes(step=0, stream=Stream.STEP)
    for store in (pickle.dumps, copy.copy, copy.deepcopy, lambda k: k.__getstate__(), vars):
        with pytest.raises(TypeError):
            store(key)
    for text in (repr(key), str(key), f"{key}", repr([key])):
        assert raw.hex() not in text and repr(raw) not in text and "secret" in text


def test_seeded_is_marked() -> None:
    assert NoiseKey.from_seed(1).seeded and "NOT PRIVATE" in repr(NoiseKey.from_seed(1))
    assert not NoiseKey.from_os().seeded
    with pytest.raises(AttributeError):
        NoiseKey.from_seed(1).seeded = False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_another_key() -> None:
    key = NoiseKey.from_os()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # only plain calls here: the parent's threads do not exist in the child
        try:
            os.write(write, key.use_bytes(step=0, stream=Stream.STEP))
        finally:
            os._exit(0)
    os.close(write)
    theirs = os.read(read, 64)
    os.waitpid(child, 0)
    os.close(read)
    assert len(theirs) == 32 and theirs != key.use_bytes(step=0, stream=Stream.STEP)


@pytest.mark.parametrize("place", [{"step": -1}, {"step": 2**32}, {"step": 1.5}, {"step": True}, {"rank": -1}])
def test_bad_places_are_refused(place: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(place))):
        NoiseKey.from_seed(1).use_bytes(**{"step": 0, "stream": Stream.STEP, **place})


def test_unknown_stream_is_refused() -> None:
    with pytest.raises(ValueError):
        NoiseKey.from_seed(1).use_bytes(step=0, stream=99)


def test_a_short_kernel_answer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One value broadcast over a table would be the same noise in every cell."""
    from privimage_fast import ops

    monkeypatch.setattr(ops, "gaussian_noise", lambda key, **kw: np.zeros(1))
    with pytest.raises(RuntimeError, match="1 values"):
        NoiseKey.from_seed(1).gaussian((2, 3), step=0, stream=Stream.QUERY)
