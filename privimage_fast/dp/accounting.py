"""What a run costs: events, ε from events, σ from ε. Public values only, and no torch.

A stage that spends privacy describes what it did by an *event*, a frozen record of public numbers; ε is composed from
events alone, by the functions below. Nothing here touches data, noise or sampling, and none of those import this.

The reported figure is the pessimistic privacy loss distribution (PLD) of Google's dp-accounting [1, 2]. Opacus'
PRV [3] and RDP [4] accountants serve as cross-checks by other people's code, and are imported only when asked for.

[1] Koskela, Jälkö, Honkela, "Computing Tight Differential Privacy Guarantees Using FFT", AISTATS 2020.
[2] Doroshenko et al., "Connect the Dots: Tighter Discrete Approximations of PLDs", PETS 2022.
[3] Gopi, Lee, Wutschitz, "Numerical Composition of Differential Privacy", NeurIPS 2021.
[4] Mironov, Talwar, Zhang, "Rényi Differential Privacy of the Sampled Gaussian Mechanism", 2019.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

# Adjacency and unit, explicit and in this one place: two sets are neighbours when one holds one image more.
ADJACENCY = "add_or_remove_one"
UNIT = "image"

MAX_STEPS = 10**6  # together; dp-accounting computes size**steps in integers, which beyond this takes minutes
MAX_EPSILON = 500.0  # beyond, exp(−loss) underflows in the accountant; "pld" then says infinity
MIN_NOISE_MULTIPLIER, MAX_NOISE_MULTIPLIER = 1e-2, 1e6  # where `solve_noise_multiplier` looks
_MIN_PLD_DELTA = 1e-10  # below, the round-off of the FFT (about 1e-13) is no longer negligible against δ
_PLD_SLACK = 1e-3  # ε is read at δ·(1 − this): room for round-off: masses short by 1e-8 were measured
_MIN_PLD_NOISE = 1e-3  # less noise than this counts as none; its loss is beyond 1e5 anyway
_MAX_PLD_POINTS = 2**20
_SOLVE_TOLERANCE = 4e-4


class BudgetError(ValueError):
    """A privacy parameter out of range, or a budget that cannot be met. The message names the values."""


# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True)
class GaussianEvent:
    """One Gaussian mechanism on the whole set. `noise_multiplier` = standard deviation / L2 sensitivity."""

    noise_multiplier: float

    def __post_init__(self) -> None:
        _set_real(self, "noise_multiplier", low=0.0)


@dataclass(frozen=True)
class DPSGDEvent:
    """`steps` Gaussian mechanisms, each on a fresh Poisson sample of the set.

    Args:
        noise_multiplier: standard deviation of the noise on the *sum* / clipping norm; 0 means no privacy.
        sample_rate: probability q in (0, 1] with which each image enters each step's batch, independently.
        steps: how many, 1 or more; empty batches count.
    """

    noise_multiplier: float
    sample_rate: float
    steps: int = 1

    def __post_init__(self) -> None:
        _set_real(self, "noise_multiplier", low=0.0)
        _set_real(self, "sample_rate", low=0.0, high=1.0)
        if self.sample_rate == 0:
            raise BudgetError("sample_rate is 0; it must be in (0, 1]")
        steps = self.steps
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or not 1 <= steps <= MAX_STEPS:
            raise BudgetError(f"steps is {steps!r}; it must be an integer from 1 to {MAX_STEPS}")
        object.__setattr__(self, "steps", int(steps))


Event = GaussianEvent | DPSGDEvent
_KINDS: dict[str, type[GaussianEvent] | type[DPSGDEvent]] = {"gaussian": GaussianEvent, "dpsgd": DPSGDEvent}


def _set_real(event: object, name: str, *, low: float, high: float = math.inf) -> None:
    """Replace a field by a plain float, or refuse it (bool, text, NaN, infinity, out of [low, high])."""
    value = getattr(event, name)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BudgetError(f"{name} is {value!r}; it must be a number")
    if not (math.isfinite(value) and low <= value <= high):
        raise BudgetError(f"{name} is {value!r}; it must be finite and in [{low}, {high}]")
    object.__setattr__(event, name, float(value))


def event_to_dict(event: Event) -> dict[str, Any]:
    """The event as plain JSON values. Floats survive `json` bit for bit, so what is charged is what was run."""
    for kind, cls in _KINDS.items():
        if type(event) is cls:
            return {"kind": kind, **{f.name: getattr(event, f.name) for f in fields(cls)}}
    raise BudgetError(f"{event!r} is not an event; known kinds are {sorted(_KINDS)}")


def event_from_dict(values: dict[str, Any]) -> Event:
    """The inverse of `event_to_dict`. An unknown kind, a missing or unknown field, or a bad value: BudgetError."""
    if not isinstance(values, dict) or not isinstance(values.get("kind"), str) or values["kind"] not in _KINDS:
        raise BudgetError(f"{values!r} is not an event; `kind` must be one of {sorted(_KINDS)}")
    cls = _KINDS[values["kind"]]
    expected, found = {f.name for f in fields(cls)}, set(values) - {"kind"}
    if expected != found:
        raise BudgetError(f"event {values!r} has fields {sorted(found)}; {values['kind']} has {sorted(expected)}")
    return cls(**{name: values[name] for name in expected})


def merge_events(events: Iterable[Event]) -> dict[tuple[float, float], int]:
    """Equal mechanisms added up: {(noise_multiplier, sample_rate): count}; a Gaussian event has sample_rate 1.

    Composition does not depend on the order, so a ledger of thousands of one-step records costs one composition.
    """
    counts: dict[tuple[float, float], int] = {}
    for event in events:
        if isinstance(event, GaussianEvent):
            key, count = (event.noise_multiplier, 1.0), 1
        elif isinstance(event, DPSGDEvent):
            key, count = (event.noise_multiplier, event.sample_rate), event.steps
        else:
            raise BudgetError(f"{event!r} is not an event")
        counts[key] = counts.get(key, 0) + count
    if sum(counts.values()) > MAX_STEPS:
        raise BudgetError(f"{sum(counts.values())} mechanisms in all; the accountants take at most {MAX_STEPS}")
    return counts


# ------------------------------------------------------------------------------------------------- ε from events


def epsilon(events: Iterable[Event], delta: float, *, accountant: str = "pld") -> float:
    """ε of all `events` together at `delta`, add/remove-one adjacency, unit one image.

    Args:
        events: in any order; none at all gives 0, one without noise gives infinity.
        delta: in (0, 1).
        accountant: "pld" (reported), or a cross-check through Opacus: "prv" or "rdp".

    Raises:
        BudgetError: δ out of range (for "pld": below 1e-10), an unknown accountant, more than MAX_STEPS mechanisms, or
            a "prv" beyond its numerical range.

    Formal guarantees: with "pld" and "rdp" the mechanisms together are (returned ε, δ)-DP up to floating-point
    round-off. "pld" discretises pessimistically. Its grid is bounded in memory: where the loss is huge (tiny σ) it gets
    coarser, hence looser, and never optimistic. Past ε = MAX_EPSILON, or below σ = 1e-3, it says infinity.
    """
    _check_delta(delta)
    counts = merge_events(events)
    if accountant not in ("pld", "prv", "rdp"):
        raise BudgetError(f"accountant is {accountant!r}; it must be 'pld', 'prv' or 'rdp'")
    if not counts:
        return 0.0
    if any(sigma == 0 for sigma, _ in counts):
        return math.inf
    if accountant == "pld":
        return _epsilon_pld(_fold_gaussians(counts), delta)
    return _epsilon_opacus(counts, delta, accountant)


def cross_check(events: Iterable[Event], delta: float) -> dict[str, float | None]:
    """{"pld": ε, "prv": ε, "rdp": ε} of the same events. "pld" is the reported one; None: out of "prv"'s range."""
    events = list(events)
    result: dict[str, float | None] = {}
    for accountant in ("pld", "prv", "rdp"):
        try:
            result[accountant] = epsilon(events, delta, accountant=accountant)
        except BudgetError:
            if accountant != "prv":
                raise
            result[accountant] = None
    return result


def _check_delta(delta: float) -> None:
    if isinstance(delta, bool) or not isinstance(delta, numbers.Real) or not 0 < delta < 1:
        raise BudgetError(f"delta is {delta!r}; it must be in (0, 1), usually 1/(N ln N) for N images")


def _fold_gaussians(counts: dict[tuple[float, float], int]) -> dict[tuple[float, float], int]:
    """All mechanisms on the whole set as one: Gaussians with σ_i compose to exactly σ = (Σ σ_i⁻²)^(−1/2)."""
    folded = {key: n for key, n in counts.items() if key[1] < 1}
    precision = math.fsum(n / sigma / sigma for (sigma, q), n in counts.items() if q == 1)
    if precision > 0:
        sigma = 1 / math.sqrt(precision) if math.isfinite(precision) else 0.0
        folded[(sigma, 1.0)] = 1
    return folded


def _epsilon_pld(counts: dict[tuple[float, float], int], delta: float) -> float:
    """PLD ε of folded `counts`; see `epsilon` for what it promises."""
    if delta < _MIN_PLD_DELTA:
        raise BudgetError(f"delta is {delta!r}; PLD needs {_MIN_PLD_DELTA:g} or more (accountant='rdp' does not)")
    if any(sigma < _MIN_PLD_NOISE for sigma, _ in counts):
        return math.inf

    from dp_accounting import SelfComposedDpEvent, dp_event
    from dp_accounting import privacy_accountant as base
    from dp_accounting.pld import PLDAccountant

    relation = {"add_or_remove_one": base.NeighboringRelation.ADD_OR_REMOVE_ONE}[ADJACENCY]
    accountant = PLDAccountant(relation, _discretisation(counts))
    for (sigma, q), n in sorted(counts.items()):
        event = dp_event.GaussianDpEvent(sigma)
        accountant.compose(SelfComposedDpEvent(event if q == 1 else dp_event.PoissonSampledDpEvent(q, event), n))
    with np.errstate(over="ignore"):  # an infinite quotient is compared, not used
        value = float(accountant.get_epsilon(delta * (1 - _PLD_SLACK)))
    return value if value <= MAX_EPSILON else math.inf  # and so is a NaN, which is no bound


def _discretisation(counts: dict[tuple[float, float], int]) -> float:
    """Spacing of the PLD grid in nats: a power of two, so that finer grids contain coarser ones.

    Rounding to a grid of spacing h adds at most about h²/4 to the variance s² of one step's loss, so ε grows by a
    relative (h/s)²/8; h ≤ s/32 keeps that near 1e-4. Finer would not be better: round-off in the cells' masses grows as
    h shrinks (at s/128 and 10⁶ steps the masses add up to more than 2). The composed grid needs about 16·32·√steps
    points; when that or the long tails of a small σ pass the memory bound, h doubles. As nested grids only get more
    pessimistic with h, and h only grows as the loss does, ε stays monotone in σ, q and steps across the switches.
    """
    finest, mean, variance, reach = math.inf, 0.0, 0.0, 0.0
    for (sigma, q), n in counts.items():
        step_mean, step_variance, step_reach = _loss_moments(sigma, q)
        mean, variance, reach = mean + n * step_mean, variance + n * step_variance, max(reach, step_reach)
        if q < 1:
            finest = min(finest, math.sqrt(step_variance))
    # The whole-set mechanism is rounded once, so its error is measured against the variance of everything.
    finest = min(finest, math.sqrt(variance)) / 32
    log_tail = 35.0  # −ln of the mass (1e-15) that the composition may cut off, and that it adds to δ
    width = mean + 2 * math.sqrt(2 * variance * log_tail) + reach * log_tail / 3  # Bernstein
    interval = 2.0 ** math.floor(math.log2(max(finest, 1e-9)))
    while width / interval > _MAX_PLD_POINTS:
        interval *= 2
    return interval


def _loss_moments(sigma: float, q: float) -> tuple[float, float, float]:
    """Mean, variance and largest value (up to a mass of e⁻⁵⁰) of ln(P/Q) under P, for P = (1−q)·Q + q·N(1, σ²) and
    Q = N(0, σ²): the loss of one step when the image is present [4]. Nats. Only the grid depends on it, no bound does.
    """
    x = np.concatenate([np.linspace(m - 10 * sigma, m + 10 * sigma, 2001) for m in (0.0, 1.0)])
    log_ratio = (2 * x - 1) / (2 * sigma * sigma)
    loss = np.logaddexp(math.log1p(-q), math.log(q) + log_ratio) if q < 1 else log_ratio
    bell = np.exp(-0.5 * np.linspace(-10, 10, 2001) ** 2)
    weight = np.concatenate([(1 - q) * bell, q * bell]) / bell.sum()
    mean = float(weight @ loss)
    return abs(mean), max(float(weight @ (loss - mean) ** 2), 1e-30), float(np.abs(loss).max())


def _epsilon_opacus(counts: dict[tuple[float, float], int], delta: float, name: str) -> float:
    from opacus.accountants import PRVAccountant, RDPAccountant

    history = [(sigma, q, n) for (sigma, q), n in sorted(counts.items())]
    orders = [*RDPAccountant.DEFAULT_ALPHAS, 80, 96, 128, 192, 256, 512]
    with warnings.catch_warnings(), np.errstate(divide="ignore", over="ignore"):
        warnings.simplefilter("ignore")  # "optimal order is the largest": looser, still a bound
        accountant: Any = RDPAccountant()
        accountant.history = history
        bound = float(accountant.get_epsilon(delta, alphas=orders))
        if name == "rdp":
            return bound
        if not bound < 300:  # its arrays grow with ε; and exp overflows in the end
            raise BudgetError(f"PRV is not computed at an RDP bound of ε = {bound:.4g} (limit 300): memory")
        accountant = PRVAccountant()
        accountant.history = history
        try:
            return float(accountant.get_epsilon(delta))
        except (RuntimeError, ValueError, MemoryError, FloatingPointError, OverflowError) as error:
            raise BudgetError(f"PRV failed on {history} at delta {delta}: {error}") from error


# ------------------------------------------------------------------------------------------------- σ, steps from ε


def solve_noise_multiplier(
    *, target_epsilon: float, delta: float, sample_rate: float, steps: int, prior_events: Sequence[Event] = ()
) -> float:
    """The smallest σ with which `steps` DP-SGD steps after `prior_events` stay within `target_epsilon`.

    Returns:
        σ, rounded up: within 1e-3 (relative) of the optimum and never below it.

    Raises:
        BudgetError: a value out of range, `prior_events` alone pass the target, or no σ in [0.01, 1e6] fits.

    Formal guarantees: `epsilon([*prior_events, DPSGDEvent(σ, sample_rate, steps)], delta) <= target_epsilon` has been
    evaluated, on the very σ that is returned.
    """
    _check_target(target_epsilon, delta, prior_events)
    trial = DPSGDEvent(1.0, sample_rate, steps)

    def spent(sigma: float) -> float:
        return epsilon([*prior_events, replace(trial, noise_multiplier=sigma)], delta)

    # ε falls with σ about as a power law, so a secant in (log σ, log ε) needs few compositions.
    low, high = 1.0, 1.0
    epsilon_low = epsilon_high = spent(1.0)
    while epsilon_high > target_epsilon:
        low, epsilon_low = high, epsilon_high
        high = min(high * 4, MAX_NOISE_MULTIPLIER)
        epsilon_high = spent(high)
        if epsilon_high > target_epsilon and high == MAX_NOISE_MULTIPLIER:
            raise BudgetError(
                f"no noise multiplier up to {high:g} keeps {steps} steps at sample rate {sample_rate} within "
                f"target_epsilon {target_epsilon} (delta {delta}, {_describe_prior(prior_events, delta)})"
            )
    while epsilon_low <= target_epsilon:
        high, epsilon_high = low, epsilon_low
        low = low / 2
        if low < MIN_NOISE_MULTIPLIER:
            raise BudgetError(
                f"target_epsilon {target_epsilon} is met even by a noise multiplier of {high:g}; at such an ε nothing "
                f"is protected. Choose a target_epsilon of 100 or less"
            )
        epsilon_low = spent(low)
    for trial_count in range(60):
        if high / low <= 1 + _SOLVE_TOLERANCE:
            break
        sigma = _secant(low, epsilon_low, high, epsilon_high, target_epsilon, trial_count)
        value = spent(sigma)
        if value <= target_epsilon:
            high, epsilon_high = sigma, value
        else:
            low, epsilon_low = sigma, value
    # Rounded up to five digits for people who copy it by hand; checked once more because rounding made a new value.
    digits = 4 - math.floor(math.log10(high))
    rounded = math.ceil(high * 10**digits) / 10**digits
    return rounded if rounded >= high and spent(rounded) <= target_epsilon else high


def _secant(low: float, epsilon_low: float, high: float, epsilon_high: float, target: float, count: int) -> float:
    """Next σ between `low` (ε above target) and `high` (ε within): a secant aimed a little to each side in turn, which
    closes the bracket from both ends, with every third step a bisection against a curve that is no power law.
    """
    if count % 3 == 2 or not math.isfinite(epsilon_low) or epsilon_high <= 0:
        return math.sqrt(low * high)
    slope = math.log(high / low) / math.log(epsilon_high / epsilon_low)
    nudge = _SOLVE_TOLERANCE / 3 * (1 if count % 3 == 0 else -1)
    sigma = math.exp(math.log(low) + slope * math.log(target / epsilon_low) + nudge)
    margin = (high / low) ** 0.02
    return min(max(sigma, low * margin), high / margin)


def affordable_steps(
    *,
    target_epsilon: float,
    delta: float,
    event: DPSGDEvent,
    prior_events: Sequence[Event] = (),
    at_most: int = MAX_STEPS,
) -> int:
    """How many further steps like `event` (whose `steps` must be 1) fit after `prior_events`: 0 … `at_most`.

    A caller who needs no more than some thousands says so in `at_most`: long compositions are slow.

    Raises:
        BudgetError: a value out of range. Prior events that already fill or pass the target give 0, not an error.

    Formal guarantees: for the returned n > 0, `epsilon([*prior_events, n × event], delta) <= target_epsilon` has been
    evaluated; n is the largest up to the accountant's own resolution (a relative 1e-4).
    """
    if not isinstance(event, DPSGDEvent) or event.steps != 1:
        raise BudgetError(f"event is {event!r}; it must be a DPSGDEvent of one step")
    _check_range(target_epsilon, delta)
    if event.noise_multiplier == 0:
        return 0

    def fits(count: int) -> bool:
        return epsilon([*prior_events, replace(event, steps=count)], delta) <= target_epsilon

    return _largest(fits, min(at_most, MAX_STEPS - sum(merge_events(prior_events).values())))


def _largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n in 0 … limit with fits(n), for a `fits` that is true up to some n and false from there on."""
    if limit < 1 or not fits(1):
        return 0
    if limit < MAX_STEPS // 10 and fits(limit):
        return limit
    good, bad = 1, 2
    while bad <= limit and fits(bad):
        good, bad = bad, bad * 8
    bad = min(bad, limit + 1)
    while bad - good > 1:
        middle = math.isqrt(good * bad) if bad > 2 * good else (good + bad) // 2
        middle = min(max(middle, good + 1), bad - 1)
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _check_range(target_epsilon: float, delta: float) -> None:
    real = isinstance(target_epsilon, numbers.Real) and not isinstance(target_epsilon, bool)
    if not real or not 0 < target_epsilon <= MAX_EPSILON:
        raise BudgetError(f"target_epsilon is {target_epsilon!r}; it must be in (0, {MAX_EPSILON:g}]")
    _check_delta(delta)


def _check_target(target_epsilon: float, delta: float, prior_events: Sequence[Event]) -> None:
    _check_range(target_epsilon, delta)
    spent = epsilon(prior_events, delta)
    if spent >= target_epsilon:
        raise BudgetError(
            f"what is charged beside it already costs ε = {spent:.4f} of target_epsilon {target_epsilon} at delta {delta}: "
            f"nothing is left for training. Give what is asked beside it more noise, or raise the target"
        )


def _describe_prior(events: Sequence[Event], delta: float) -> str:
    return f"of which {epsilon(events, delta):.4f} is spent before" if events else "nothing spent before"


# -------------------------------------------------------------------------------------------------------- planning


def default_delta(population: int) -> float:
    """δ = 1/(N ln N) for N images, N a public value. δ must be well under 1/N: a mechanism that publishes one record
    in N is (0, 1/N)-DP.
    """
    if isinstance(population, bool) or not isinstance(population, numbers.Integral) or population < 2:
        raise BudgetError(f"population is {population!r}; it must be an integer of 2 or more")
    return 1.0 / (int(population) * math.log(population))
