"""ε, σ and steps: contract figures, independent oracles, properties, refusals, and peers' accounting faults."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from privimage_fast.dp import accounting
from privimage_fast.dp.accounting import (
    BudgetError,
    DPSGDEvent,
    GaussianEvent,
    affordable_steps,
    cross_check,
    default_delta,
    epsilon,
    event_from_dict,
    event_to_dict,
    merge_events,
    solve_noise_multiplier,
)

Q, STEPS, DELTA = 4096 / 60000, 2200, 1e-5
RUN = [DPSGDEvent(2.0, Q, STEPS), GaussianEvent(50.0)]

sigmas = st.floats(0.6, 30.0)
rates = st.floats(1e-3, 1.0)
counts = st.integers(1, 3000)
events = st.one_of(st.builds(GaussianEvent, sigmas), st.builds(DPSGDEvent, sigmas, rates, counts))


def test_contract_figures_of_three_accountants() -> None:
    found = cross_check(RUN, DELTA)
    assert found["pld"] == pytest.approx(8.358, abs=0.01)
    assert found["prv"] == pytest.approx(8.368, abs=0.01)
    assert found["rdp"] == pytest.approx(9.015, abs=0.01)


def gaussian_delta(sigma: float, eps: float, sensitivity: float = 1.0) -> float:
    """Exact δ(ε) of the Gaussian mechanism (Balle and Wang 2018, theorem 8)."""
    mu = sensitivity / sigma
    return norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)


def subsampled_delta(sigma: float, q: float, eps: float) -> float:
    """δ(ε) of one Poisson-subsampled Gaussian by quadrature, the worse of adding and removing the image."""
    x = np.linspace(-15 * sigma, 1 + 15 * sigma, 400_001)
    without, with_ = norm.pdf(x, 0, sigma), (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma)
    excess = [np.maximum(a - math.exp(eps) * b, 0) for a, b in ((with_, without), (without, with_))]
    return max(float(np.trapezoid(e, x)) if hasattr(np, "trapezoid") else float(np.trapz(e, x)) for e in excess)  # noqa: NPY201


@pytest.mark.parametrize("sigma", [0.7, 2.0, 50.0])
def test_gaussian_is_tight_and_add_or_remove_not_substitution(sigma: float) -> None:
    value = epsilon([GaussianEvent(sigma)], DELTA)
    assert gaussian_delta(sigma, value) <= DELTA  # a bound
    assert gaussian_delta(sigma, value * 0.999 - 1e-4) > DELTA  # and a tight one
    # Under substitution the sum moves by two sensitivities; that accounting must not pass for this one, or back.
    assert gaussian_delta(sigma, value, sensitivity=2.0) > 10 * DELTA


@pytest.mark.parametrize(("sigma", "q"), [(1.0, 0.1), (2.0, Q), (0.8, 1 / 3)])
def test_one_subsampled_step_against_quadrature(sigma: float, q: float) -> None:
    value = epsilon([DPSGDEvent(sigma, q, 1)], DELTA)
    assert subsampled_delta(sigma, q, value) <= DELTA
    assert subsampled_delta(sigma, q, value * 0.998) > DELTA


def test_adjacency_and_unit_are_stated_and_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (accounting.ADJACENCY, accounting.UNIT) == ("add_or_remove_one", "image")
    monkeypatch.setattr(accounting, "ADJACENCY", "replace_one")
    with pytest.raises(KeyError):  # another adjacency is another accounting, never a relabelling
        epsilon(RUN, DELTA)


def test_empty_and_noiseless() -> None:
    for accountant in ("pld", "prv", "rdp"):
        assert epsilon([], DELTA, accountant=accountant) == 0.0
        assert epsilon([RUN[0], GaussianEvent(0.0)], DELTA, accountant=accountant) == math.inf
    assert epsilon([DPSGDEvent(0.0, 0.1, 1)], DELTA) == math.inf


def test_extremes_stay_bounded_in_time() -> None:
    start = time.monotonic()
    values = [
        epsilon([DPSGDEvent(sigma, q, n)], DELTA)
        for sigma, q, n in [(1e-4, Q, 1), (0.01, Q, 2200), (0.1, 0.5, 2200), (1e6, 1e-6, 100), (1.0, 1e-9, 100)]
    ]
    assert values[:3] == [math.inf] * 3 and 0 <= values[3] < 1e-3 and 0 <= values[4] < 1e-3
    assert 100 < epsilon([DPSGDEvent(0.5, Q, 2200)], DELTA) < 200
    assert time.monotonic() - start < 20
    assert cross_check([DPSGDEvent(0.1, 0.5, 2200)], DELTA)["prv"] is None  # beyond PRV's range, said so


@pytest.mark.parametrize(("sigma", "q", "n"), [(16.6, Q, 2200), (0.5, Q, 100), (5.0, 1e-4, 50_000), (1.0, 1 / 3, 60)])
def test_never_below_a_finer_grid_nor_above_rdp(sigma: float, q: float, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [DPSGDEvent(sigma, q, n)]
    value, choose = epsilon(run, DELTA), accounting._discretisation
    assert value <= epsilon(run, DELTA, accountant="rdp")
    monkeypatch.setattr(accounting, "_discretisation", lambda c: choose(c) / 2)
    finer = epsilon(run, DELTA)
    assert finer * (1 - 1e-4) <= value <= finer * (1 + 1e-3)  # 1e-4: the finer grid has more round-off


# ------------------------------------------------------------------------------------------------------- properties


@settings(max_examples=8, deadline=None)
@given(sigmas, rates, counts, st.floats(1.02, 3.0))
def test_epsilon_is_monotone(sigma: float, q: float, n: int, factor: float) -> None:
    """More noise costs less; a higher rate or more steps cost more (up to the accountant's resolution)."""
    value, slack = epsilon([DPSGDEvent(sigma, q, n)], DELTA), 1 + 1e-4
    assert epsilon([DPSGDEvent(sigma * factor, q, n)], DELTA) <= value * slack + 1e-6
    assert epsilon([DPSGDEvent(sigma, q / factor, n)], DELTA) <= value * slack + 1e-6
    assert epsilon([DPSGDEvent(sigma, q, math.ceil(n * factor))], DELTA) * slack + 1e-6 >= value


@settings(max_examples=8, deadline=None)
@given(st.lists(events, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_merging_and_order_do_not_matter(run: list, random) -> None:
    split = []
    for event in run:
        if isinstance(event, DPSGDEvent) and event.steps > 1:
            cut = random.randint(1, event.steps - 1)
            split += [replace(event, steps=cut), replace(event, steps=event.steps - cut)]
        else:
            split.append(event)
    random.shuffle(split)
    assert merge_events(split) == merge_events(run)
    assert epsilon(split, DELTA) == pytest.approx(epsilon(run, DELTA), rel=1e-9)


def test_thousands_of_one_step_records_cost_one_composition() -> None:
    epsilon(RUN, DELTA)
    start = time.monotonic()
    assert epsilon([DPSGDEvent(2.0, Q, 1)] * STEPS + [RUN[1]], DELTA) == epsilon(RUN, DELTA)
    assert time.monotonic() - start < 3


def test_gaussians_fold_exactly() -> None:
    """Four queries at σ are one at σ/2; whole-set DP-SGD steps are Gaussians as well."""
    assert epsilon([GaussianEvent(8.0)] * 4, DELTA) == epsilon([GaussianEvent(4.0)], DELTA)
    assert epsilon([DPSGDEvent(8.0, 1.0, 4)], DELTA) == epsilon([GaussianEvent(4.0)], DELTA)


@settings(max_examples=100, deadline=None)
@given(events)
def test_json_round_trip_is_exact(event) -> None:
    """What is charged is bit for bit what is run (peer's fault: σ of the command was not the σ accounted)."""
    assert event_from_dict(json.loads(json.dumps(event_to_dict(event)))) == event


def test_numpy_numbers_become_plain_ones() -> None:
    event = DPSGDEvent(np.float64(2), np.float64(0.5), np.int64(3))
    assert event == DPSGDEvent(2.0, 0.5, 3) and type(event.steps) is int and type(event.sample_rate) is float


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "laplace", "noise_multiplier": 1.0},
        {"noise_multiplier": 1.0},
        {"kind": ["gaussian"], "noise_multiplier": 1.0},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": 1.0, "steps": 2},
        {"kind": "gaussian", "noise_multiplier": "1.0"},
        {"kind": "gaussian", "noise_multiplier": True},
        {"kind": "gaussian", "noise_multiplier": -1.0},
        {"kind": "gaussian", "noise_multiplier": math.nan},
        {"kind": "gaussian", "noise_multiplier": math.inf},
        {"kind": "dpsgd", "noise_multiplier": 1.0, "sample_rate": 0.0, "steps": 1},
        {"kind": "dpsgd", "noise_multiplier": 1.0, "sample_rate": 1.5, "steps": 1},
        {"kind": "dpsgd", "noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 0},
        {"kind": "dpsgd", "noise_multiplier": 1.0, "sample_rate": 0.5, "steps": 1.0},
        {"kind": "dpsgd", "noise_multiplier": 1.0, "sample_rate": 0.5, "steps": True},
        ["gaussian", 1.0],
    ],
)
def test_bad_events_are_refused(values) -> None:
    with pytest.raises(BudgetError):
        event_from_dict(values)


def test_out_of_range_arguments_name_the_value() -> None:
    ok = {"target_epsilon": 1.0, "delta": DELTA, "sample_rate": Q, "steps": 10}
    for change in ({"target_epsilon": 0.0}, {"target_epsilon": 501.0}, {"delta": 0.0}, {"delta": 1.0}, {"steps": 0}):
        with pytest.raises(BudgetError, match=next(iter(change))):
            solve_noise_multiplier(**{**ok, **change})
    with pytest.raises(BudgetError, match="sample_rate"):
        solve_noise_multiplier(**{**ok, "sample_rate": 1.01})
    with pytest.raises(BudgetError, match="delta"):
        epsilon(RUN, 1e-11)
    with pytest.raises(BudgetError, match="accountant"):
        epsilon(RUN, DELTA, accountant="gdp")
    with pytest.raises(BudgetError, match="at most"):
        epsilon([DPSGDEvent(2.0, Q, accounting.MAX_STEPS), RUN[1]], DELTA)
    with pytest.raises(BudgetError, match="population"):
        default_delta(1)


def test_default_delta() -> None:
    assert default_delta(60_000) == pytest.approx(1 / (60_000 * math.log(60_000)))


# ---------------------------------------------------------------------------------------------------------- solving


@pytest.mark.parametrize(("target", "prior"), [(1.0, [GaussianEvent(50.0)]), (10.0, [GaussianEvent(5.0)]), (10.0, [])])
def test_solved_noise_is_safe_and_minimal(target: float, prior: list) -> None:
    start = time.monotonic()
    sigma = solve_noise_multiplier(target_epsilon=target, delta=DELTA, sample_rate=Q, steps=STEPS, prior_events=prior)
    assert time.monotonic() - start < 10  # measured under 1.5 s on two busy cores
    assert epsilon([*prior, DPSGDEvent(sigma, Q, STEPS)], DELTA) <= target
    assert epsilon([*prior, DPSGDEvent(sigma / 1.001, Q, STEPS)], DELTA) > target


@settings(max_examples=4, deadline=None)
@given(st.floats(0.3, 20.0), rates, counts)
def test_solved_noise_is_safe_anywhere(target: float, q: float, n: int) -> None:
    try:
        sigma = solve_noise_multiplier(target_epsilon=target, delta=DELTA, sample_rate=q, steps=n)
    except BudgetError as error:
        assert "is met even by" in str(error)
        return
    assert epsilon([DPSGDEvent(sigma, q, n)], DELTA) <= target
    assert epsilon([DPSGDEvent(sigma / 1.001, q, n)], DELTA) > target


def test_prior_events_that_fill_the_budget_are_refused() -> None:
    with pytest.raises(BudgetError, match="already costs"):
        solve_noise_multiplier(target_epsilon=1.0, delta=DELTA, sample_rate=Q, steps=10, prior_events=[GaussianEvent(1.0)])


def test_affordable_steps_are_the_most_that_fit() -> None:
    step, prior = DPSGDEvent(2.0, Q), [GaussianEvent(50.0)]
    n = affordable_steps(target_epsilon=5.0, delta=DELTA, event=step, prior_events=prior)
    assert epsilon([*prior, replace(step, steps=n)], DELTA) <= 5.0 < epsilon([*prior, replace(step, steps=n + 1)], DELTA)
    assert affordable_steps(target_epsilon=5.0, delta=DELTA, event=step, prior_events=prior, at_most=7) == 7
    assert affordable_steps(target_epsilon=5.0, delta=DELTA, event=step, prior_events=[GaussianEvent(0.5)]) == 0
    assert affordable_steps(target_epsilon=5.0, delta=DELTA, event=DPSGDEvent(0.0, Q)) == 0
    with pytest.raises(BudgetError, match="one step"):
        affordable_steps(target_epsilon=5.0, delta=DELTA, event=replace(step, steps=2))


def test_the_query_is_in_the_figure_and_its_price_is_shown() -> None:
    """Peer's fault: the logged ε left the query out. A noisy query is nearly free, a sharp one is not."""
    query, training = GaussianEvent(50.0), RUN[0]
    without = epsilon([training], DELTA)
    assert 0 < epsilon([query, training], DELTA) - without < 0.002
    asked = {"target_epsilon": 10.0, "delta": DELTA, "sample_rate": training.sample_rate, "steps": training.steps}
    assert 0 <= solve_noise_multiplier(**asked, prior_events=[query]) / solve_noise_multiplier(**asked) - 1 < 0.002
    assert epsilon([GaussianEvent(1.0), training], DELTA) > without + 0.5


def test_nominal_batch_is_no_substitute_for_the_rate() -> None:
    """Peer's fault: a nominal batch of 19,384 was really q = 1/3. The event takes the rate, and the rate matters."""
    assert epsilon([DPSGDEvent(10.0, 1 / 3, 500)], DELTA) > 1.03 * epsilon([DPSGDEvent(10.0, 19_384 / 60_000, 500)], DELTA)
    with pytest.raises(BudgetError, match="sample_rate"):
        DPSGDEvent(10.0, 19_384, 500)


def test_accounting_and_ledger_load_neither_torch_nor_opacus() -> None:
    code = (
        "import sys, privimage_fast.dp.accounting, privimage_fast.dp.ledger as l\n"
        "bad = {'torch', 'opacus', 'dp_accounting'} & set(sys.modules)\n"
        "assert not bad, bad\n"
        "l.accounting.epsilon([l.accounting.GaussianEvent(2.0)], 1e-5)\n"
        "bad = {'torch', 'opacus'} & set(sys.modules)\n"
        "assert not bad, bad\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
