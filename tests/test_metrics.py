"""Metrics against closed forms, brute force and sets whose answer is known without computing."""

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist

from privimage_fast.stages import metrics
from privimage_fast.stages.metrics import frechet_distance, memorisation, nearest_neighbours, precision_recall


def _with_moments(rng, n, mean, covariance):
    """n rows whose sample mean and sample covariance are exactly the given ones."""
    x = rng.standard_normal((n, len(mean)))
    x -= x.mean(axis=0)
    whiten = np.linalg.inv(np.linalg.cholesky(np.cov(x.T)))
    return x @ whiten.T @ np.linalg.cholesky(covariance).T + mean


def test_frechet_of_commuting_covariances_is_the_closed_form(rng):
    a = _with_moments(rng, 50, np.array([1.0, 2.0, 3.0]), np.diag([4.0, 9.0, 1.0]))
    b = _with_moments(rng, 41, np.array([0.0, 2.0, 5.0]), np.diag([1.0, 25.0, 1.0]))
    # squared mean gap 1 + 0 + 4, standard deviations apart by 1, 2 and 0
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 4, rel=1e-10)


def test_frechet_of_general_covariances_is_the_textbook_formula(rng):
    a, b = rng.standard_normal((200, 7)) @ rng.standard_normal((7, 7)), rng.standard_normal((90, 7)) + 0.3
    ca, cb = np.cov(a.T), np.cov(b.T)
    textbook = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * np.real(scipy.linalg.sqrtm(ca @ cb)))
    assert frechet_distance(a, b) == pytest.approx(textbook, rel=1e-8)


def test_frechet_with_fewer_images_than_features(rng):
    a, b = rng.standard_normal((5, 40)), rng.standard_normal((9, 40))
    eigenvalues = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(0)
    traces = np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.sqrt(eigenvalues).sum()
    assert frechet_distance(a, b) == pytest.approx(((a.mean(0) - b.mean(0)) ** 2).sum() + traces, rel=1e-5)


def test_frechet_is_zero_on_itself_symmetric_and_keeps_float32_offsets(rng):
    a = (rng.standard_normal((60, 8)) + 1000).astype(np.float32)
    b = (rng.standard_normal((70, 8)) * 2 + 1000).astype(np.float32)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-12)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(a - 1000, b - 1000), rel=1e-6)
    assert frechet_distance(a, b) > 1


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((4, 3)), "a has 1 row"),
        (np.zeros((4, 3)), np.zeros((4, 2)), "must agree"),
        (np.zeros(3), np.zeros((4, 3)), "expected \\(images, features\\)"),
        (np.zeros((0, 3)), np.zeros((4, 3)), "no rows"),
        (np.array([[0.0], [np.nan]]), np.zeros((4, 1)), "not finite"),
        (np.zeros((4, 1)), np.array([[0.0], [np.inf]]), "b holds features that are not finite"),
    ],
)
def test_frechet_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def test_neighbours_equal_brute_force_in_blocks(rng, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_BYTES", 8 * 53 * 3)  # three rows a block: 41 is not a multiple
    queries, references = rng.standard_normal((41, 6)) + 100, rng.standard_normal((53, 6)) + 100
    index, distance = nearest_neighbours(queries, references, k=5)
    brute = cdist(queries, references)
    np.testing.assert_array_equal(index, np.argsort(brute, axis=1)[:, :5])
    np.testing.assert_allclose(distance, np.sort(brute, axis=1)[:, :5], rtol=1e-12)
    assert index.dtype == np.int64 and distance.dtype == np.float64


def test_a_copy_is_at_distance_zero_exactly_and_ties_go_to_the_lower_index(rng):
    references = rng.standard_normal((20, 30)) * 1e3
    references[7] = references[3]
    index, distance = nearest_neighbours(references[[3, 11]], references, k=2)
    assert index[0].tolist() == [3, 7] and index[1, 0] == 11
    assert distance[0].tolist() == [0, 0] and distance[1, 0] == 0


@pytest.mark.parametrize("k", [0, 5])
def test_neighbours_refuse_k(k):
    with pytest.raises(ValueError, match=f"k is {k}"):
        nearest_neighbours(np.zeros((2, 2)), np.zeros((4, 2)), k)


def test_precision_recall_of_equal_and_of_disjoint_sets(rng):
    a = rng.standard_normal((80, 5))
    assert precision_recall(a, a.copy()) == (1.0, 1.0)
    assert precision_recall(a, a + 1e4) == (0.0, 0.0)


def test_precision_and_recall_are_not_swapped(rng):
    # Real has two modes and fake only one of them: every fake row is plausible, half of the real ones are reached.
    real = np.concatenate([rng.standard_normal((60, 3)) * 0.1, rng.standard_normal((60, 3)) * 0.1 + 50])
    fake = real[:60] + 1e-6
    assert precision_recall(real, fake) == (1.0, 0.5)


def test_precision_recall_equals_brute_force_in_blocks(rng, monkeypatch):
    monkeypatch.setattr(metrics, "_BLOCK_BYTES", 8 * 70 * 4)
    real, fake, k = rng.standard_normal((70, 4)), rng.standard_normal((65, 4)) * 0.8 + 0.7, 4

    def covered(points, centres):
        radii = np.sort(cdist(centres, centres), axis=1)[:, k]
        return (cdist(points, centres) <= radii).any(axis=1).mean()

    expected = covered(fake, real), covered(real, fake)
    assert precision_recall(real, fake, k) == pytest.approx(expected)
    assert 0 < expected[0] < 1 and 0 < expected[1] < 1


def test_precision_recall_with_repeated_rows_has_balls_of_radius_zero():
    points = np.repeat(np.arange(3.0)[:, None] * 1e3 + 0.1, 5, axis=0)
    assert precision_recall(points, points[:10], k=3) == (1.0, pytest.approx(2 / 3))


def test_precision_recall_needs_more_than_k_rows():
    with pytest.raises(ValueError, match="fake has 3 row"):
        precision_recall(np.zeros((9, 2)), np.zeros((3, 2)), k=3)


def test_memorisation_tells_copies_from_fresh_draws(rng):
    train, held_out = rng.standard_normal((200, 4)), rng.standard_normal((100, 4))
    copied = memorisation(train[:50] + 1e-9, train, held_out, tolerance=1e-6)
    assert copied.duplicate_rate == 1.0 and copied.nearer_to_train == 1.0
    fresh = memorisation(rng.standard_normal((600, 4)), train, held_out)
    assert fresh.duplicate_rate == 0.0
    assert fresh.expected == pytest.approx(2 / 3)
    assert fresh.nearer_to_train == pytest.approx(fresh.expected, abs=0.12)
    assert fresh.to_train.shape == fresh.to_held_out.shape == (600,)


def test_memorisation_without_held_out_claims_nothing_about_it(rng):
    result = memorisation(rng.standard_normal((5, 2)), rng.standard_normal((9, 2)))
    assert (result.to_held_out, result.nearer_to_train, result.expected) == (None, None, None)


def test_a_tie_between_train_and_held_out_counts_half():
    same = np.arange(6.0)[:, None]
    assert memorisation(same + 0.1, same, same).nearer_to_train == 0.5


@pytest.fixture
def rng():
    return np.random.default_rng(20240801)
