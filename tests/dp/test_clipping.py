"""Clipping strategies: the bound each one states, from both sides, and what adaptive clipping releases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from privimage_fast.dp.clipping import AdaptiveClipping, AutomaticClipping, FlatClipping, PerLayerClipping, make_clipping

NAMES = ("a", "b", "c")


def gradients(samples: int, scale: float, seed: int = 0) -> dict[str, Tensor]:
    r = torch.Generator().manual_seed(seed)
    return {n: torch.randn(samples, 7, generator=r, dtype=torch.float64) * scale * (i + 1) for i, n in enumerate(NAMES)}


def clipped(strategy: FlatClipping | PerLayerClipping, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    factors = strategy.factors({n: g.square().sum(1) for n, g in grads.items()})
    return {n: g * (factors if isinstance(factors, Tensor) else factors[n])[:, None].double() for n, g in grads.items()}


def norms(grads: dict[str, Tensor]) -> Tensor:
    return torch.sqrt(sum(g.square().sum(1) for g in grads.values()))


STRATEGIES = {
    "flat": lambda c: FlatClipping(c),
    "per_layer": lambda c: PerLayerClipping.split(NAMES, c),
    "automatic": lambda c: AutomaticClipping(c),
    "adaptive": lambda c: AdaptiveClipping(c, unclipped_num_std=10.0),
}


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
@pytest.mark.parametrize("c", [1e-3, 1.0, 7.0])
def test_a_contribution_is_within_the_stated_sensitivity(kind: str, scale: float, c: float) -> None:
    strategy = STRATEGIES[kind](c)
    assert strategy.sensitivity == pytest.approx(c, rel=1e-12)
    assert float(norms(clipped(strategy, gradients(50, scale))).max()) <= strategy.sensitivity * (1 + 1e-6)


@pytest.mark.parametrize("kind", STRATEGIES)
def test_large_gradients_use_the_whole_sensitivity(kind: str) -> None:
    """Less would be noise for nothing."""
    assert norms(clipped(STRATEGIES[kind](1.0), gradients(20, 1e6))).min() > 1 - 1e-5


@pytest.mark.parametrize("kind", ["flat", "per_layer", "adaptive"])
def test_small_gradients_are_left_alone(kind: str) -> None:
    grads = gradients(5, 1e-6)
    for n, g in clipped(STRATEGIES[kind](1.0), grads).items():
        torch.testing.assert_close(g, grads[n])


def test_automatic_clipping_is_c_over_norm_plus_gamma() -> None:
    grads = gradients(6, 0.01)
    norm = norms(grads)
    found = norms(clipped(AutomaticClipping(2.0, gamma=0.05), grads))
    torch.testing.assert_close(found, 2.0 * norm / (norm + 0.05), rtol=1e-6, atol=0)


def test_per_layer_bounds_hold_for_each_and_their_norm_is_the_sensitivity() -> None:
    strategy = PerLayerClipping.split(NAMES, [0.5, 1.0, 2.0])
    assert strategy.sensitivity == pytest.approx(math.sqrt(0.25 + 1 + 4))
    for bound, g in zip([0.5, 1.0, 2.0], clipped(strategy, gradients(9, 100.0)).values(), strict=True):
        found = g.norm(dim=1)
        assert float(found.max()) <= bound * (1 + 1e-6) and float(found.min()) >= bound * (1 - 1e-5)
    strategy.max_grad_norm = 1.0
    assert strategy.sensitivity == pytest.approx(1.0) and strategy.bounds["b"] == pytest.approx(2 * strategy.bounds["a"])


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_sample_that_is_not_finite_has_factor_zero_everywhere(kind: str, bad: float) -> None:
    sq = {n: torch.tensor([1.0, 4.0], dtype=torch.float64) for n in NAMES}
    sq["b"][1] = bad
    factors = STRATEGIES[kind](1.0).factors(sq)
    for f in [factors] if isinstance(factors, Tensor) else factors.values():
        assert f[0] > 0 and f[1] == 0


def test_combined_noise_multiplier_of_adaptive_clipping() -> None:
    strategy = AdaptiveClipping(1.0, unclipped_num_std=3.0)
    sigma = strategy.gradient_noise_multiplier(1.1)
    assert sigma > 1.1  # the count takes its share
    assert (sigma**-2 + (2 * 3.0) ** -2) ** -0.5 == pytest.approx(1.1, rel=1e-12)
    assert strategy.gradient_noise_multiplier(0.0) == 0
    with pytest.raises(ValueError, match="more than half the noise multiplier"):
        strategy.gradient_noise_multiplier(6.0)


def test_the_count_moves_by_half_with_one_sample() -> None:
    """The sensitivity on which the combined multiplier rests: clipped or not, a sample changes Σ(1[·] − ½) by exactly ½."""
    for extra in (0.1, 50.0):
        counts = []
        for sq in ([1.0, 9.0], [1.0, 9.0, extra**2]):
            strategy = AdaptiveClipping(2.0, unclipped_num_std=1.0)
            strategy.factors({"a": torch.tensor(sq, dtype=torch.float64)})
            counts.append(strategy._count)
        assert abs(counts[1] - counts[0]) == 0.5


def test_adaptive_bound_follows_the_noised_share_over_the_public_size() -> None:
    strategy = AdaptiveClipping(1.0, target_unclipped_quantile=0.5, clipbound_learning_rate=0.2, unclipped_num_std=4.0)
    strategy.factors({"a": torch.tensor([0.25, 0.25, 4.0], dtype=torch.float64)})  # 2 of 3 unclipped: Σ(b − ½) = ½
    strategy.update(normal=1.5, expected_batch_size=10.0)  # not 3, the realised size
    assert strategy.max_grad_norm == pytest.approx(math.exp(-0.2 * (0.5 + (0.5 + 4.0 * 1.5) / 10 - 0.5)), rel=1e-12)
    before = strategy.max_grad_norm
    strategy.update(normal=0.0, expected_batch_size=10.0)  # an empty batch after it: the count began anew
    assert strategy.max_grad_norm == pytest.approx(before)


def test_adaptive_bound_finds_the_quantile_and_keeps_its_limits() -> None:
    strategy = AdaptiveClipping(50.0, target_unclipped_quantile=0.8, unclipped_num_std=1e-6, min_clipbound=0.1, max_clipbound=60)
    sq = torch.linspace(0.01, 1, 100, dtype=torch.float64).square()  # norms evenly in (0, 1]
    for _ in range(200):
        strategy.factors({"a": sq})
        strategy.update(0.0, 100.0)
    assert strategy.max_grad_norm == pytest.approx(0.8, abs=0.03)
    for _ in range(200):
        strategy.update(0.0, 1e-3)  # share ½ < 0.8: up
    assert strategy.max_grad_norm <= 60
    strategy.update(1e9, 1.0)
    assert strategy.max_grad_norm == 0.1


@pytest.mark.parametrize(
    ("kind", "bound", "options", "message"),
    [
        ("round", 1.0, {}, "must be 'flat', 'per_layer', 'automatic' or 'adaptive'"),
        ("flat", [1.0, 2.0], {}, "one bound"),
        ("flat", 0.0, {}, "positive"),
        ("flat", math.nan, {}, "positive"),
        ("flat", math.inf, {}, "positive"),
        ("per_layer", [1.0, 2.0], {}, "2 bounds for 3 trainable parameters"),
        ("per_layer", [1.0, 2.0, -1.0], {}, "'c'"),
        ("automatic", 1.0, {"gamma": 0.0}, "gamma"),
        ("adaptive", 1.0, {}, "unclipped_num_std"),
        ("adaptive", 1.0, {"unclipped_num_std": 1.0, "min_clipbound": 2.0, "max_clipbound": 1.0}, "must be larger"),
        ("adaptive", 1.0, {"unclipped_num_std": 1.0, "target_unclipped_quantile": 2.0}, r"in \[0, 1\]"),
    ],
)
def test_bad_options_are_answered(kind: str, bound: object, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_clipping(kind, bound, NAMES, dict(options))


def test_a_parameter_without_a_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="no bound for 'c'"):
        PerLayerClipping.split(("a", "b"), 1.0).factors({n: torch.ones(2, dtype=torch.float64) for n in NAMES})
