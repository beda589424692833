"""How far can a query be trusted? Would its choice of labels have been the same without the noise?

Two answers, neither of which costs any privacy. On a *stand-in*: held-out images of public labels play the sensitive classes,
their own label is struck out, and the choice on their noiseless table is compared with noisy ones. And on the *noisy table*
itself, once it is drawn: how many of all votes the chosen labels truly hold, estimated without bias. That is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from privimage_fast.data import ImageSet, train_test_split
from privimage_fast.models.classifier import batched
from privimage_fast.stages.clusters import majority_labels
from privimage_fast.stages.query import SemanticFunction
from privimage_fast.stages.select import assign_labels

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_DRAWS, _STAND_INS, _MOST_IMAGES = 20, 3, 20_000
# Of the run's own noise, how much is added to choose by, so that something is left to count with: an eighth more noise in all.
_SPLIT = 0.5


@dataclass(frozen=True)
class Agreement:
    """Of noisy choices with the noiseless one. labels: share of the chosen labels that are the same; votes: noiseless votes of
    the labels chosen noisily ÷ of those chosen without noise, at most 1. Labels that look alike to the query may change places,
    so votes can stay near 1 where labels fall."""

    labels: float
    votes: float


def agreement(
    table: np.ndarray, k: int, noise_std: float, assignment: str = "optimal", *, draws: int = _DRAWS, seed: int = 0
) -> Agreement:
    """Simulates the choice of k labels a class from table (classes, labels) float64 under noise, ``draws`` times."""
    wanted = assign_labels(table, k, assignment)
    most = sum(table[c, labels].sum() for c, labels in enumerate(wanted))
    random, same, kept = np.random.default_rng(seed), 0, 0.0
    for _ in range(draws):
        chosen = assign_labels(table + noise_std * random.standard_normal(table.shape), k, assignment)
        same += sum(len(set(a) & set(b)) for a, b in zip(chosen, wanted, strict=True))
        kept += sum(table[c, labels].sum() for c, labels in enumerate(chosen))
    return Agreement(same / (draws * k * len(table)), min(1.0, kept / (draws * most)) if most > 0 else 1.0)


def stand_in_tables(
    semantic_function: SemanticFunction, public: ImageSet, asked: ImageSet, *, n_classes: int, population: int,
    votes_per_image: int, seed: int, device: str = "cpu",
) -> list[np.ndarray]:  # fmt: skip
    """Noiseless tables (classes, labels) of public labels that play sensitive classes, each scaled to ``population`` images.

    ``asked``: the public set by the labels that the function scores, which may be clusters. Of the tenth of the public set that
    the package's own classifier is not trained on. An image's own label gets no vote, nor does a cluster that most images of
    that label make up: a sensitive image has no label of its own among the public ones either. Empty where there are too few
    labels to play classes.
    """
    home = np.arange(public.n_classes) if asked is public else majority_labels(asked, public)
    if public.n_classes < n_classes or len(home) - np.bincount(home).max() < votes_per_image:
        return []
    held_out = train_test_split(public, 0.1, seed)[1]
    random = np.random.default_rng(seed)
    if len(held_out) > _MOST_IMAGES:
        held_out = held_out.subset(np.sort(random.choice(len(held_out), _MOST_IMAGES, replace=False)))
    scores = batched(semantic_function, held_out.images, device=device)
    scores[held_out.labels[:, None] == home] = -np.inf
    best = np.argpartition(-scores, votes_per_image - 1, axis=1)[:, :votes_per_image]
    votes = np.zeros((public.n_classes, asked.n_classes))
    np.add.at(votes, (held_out.labels[:, None], best), 1)
    present = np.flatnonzero(votes.sum(1))
    if len(present) < n_classes:
        return []
    tables = []
    for _ in range(_STAND_INS):
        table = votes[random.choice(present, n_classes, replace=False)]
        # As many images in each class, and as many in all as the sensitive set has.
        tables.append(table / table.sum(1, keepdims=True) * (votes_per_image * population / n_classes))
    return tables


@dataclass(frozen=True)
class Held:
    """Share of all votes that chosen labels hold, estimated, and its standard error."""

    share: float
    error: float


def held_share(
    noisy: np.ndarray, k: int, assignment: str, *, noise_std: float, at: float, total: float, draws: int = _DRAWS, seed: int = 0
) -> Held:
    """What a choice under noise of std ``at`` > ``noise_std`` holds of ``total`` votes, from a table with noise of ``noise_std``
    (a table without noise is taken as it is).

    The labels with most noisy votes have luck on their side, so the table that chose them cannot say what they hold. Hence it
    is split (data thinning, Rasines & Young 2023): with W as the table's own noise and g > 0, noisy + g·W and noisy − W/g are
    independent, both around the noiseless votes. The first chooses, the second counts.
    """
    if noise_std == 0:
        return Held(concentration(noisy, k, assignment, total), 0.0)
    g = math.sqrt((at / noise_std) ** 2 - 1)
    random, found = np.random.default_rng(seed), []
    for _ in range(draws):
        own = noise_std * random.standard_normal(noisy.shape)
        chosen, counts = assign_labels(noisy + g * own, k, assignment), noisy - own / g
        found.append(sum(counts[c, labels].sum() for c, labels in enumerate(chosen)))
    # The table's own noise stays in all draws; W's is averaged out.
    error = noise_std * math.sqrt(len(noisy) * k * (1 + 1 / (g**2 * draws)))
    return Held(float(np.mean(found) / total), error / total)


def concentration(table: np.ndarray, k: int, assignment: str, total: float) -> float:
    """Share of the ``total`` votes of a noiseless table that the labels chosen from it hold in the rows of their classes."""
    return float(sum(table[c, labels].sum() for c, labels in enumerate(assign_labels(table, k, assignment))) / total)


def question(
    noise_of: Callable[[float], float], *, k: int, votes_per_image: int, population: int, assignment: str,
    stand_ins: Sequence[np.ndarray] = (), query: dict[str, Any] | None = None, share: float | None = None,
    noise_multiplier: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of query-check.json: agreement at several shares of the budget on the stand-ins, and what the choice holds of
    the drawn table's votes.

    ``noise_of`` gives σ₁ of a share; ``share`` is the run's own, or where there is none ``noise_multiplier``. ``query``: the
    content of query.json, once there is one.
    """
    total = votes_per_image * population

    def row(of: float | None, sigma: float) -> dict[str, Any]:
        std = sigma * math.sqrt(votes_per_image)
        found = [agreement(table, k, std, assignment) for table in stand_ins]
        stand_in = {"labels": _mean([a.labels for a in found]), "votes": _mean([a.votes for a in found])} if found else None
        return {"share": of, "noise_multiplier": sigma, "noise_std": std, "stand_in": stand_in, "table": None, "own": of == share}

    rows = [row(at, noise_of(at)) for at in sorted({*SHARES, *([share] if share is not None else [])})]
    if share is None and noise_multiplier is not None:  # σ₁ was set by hand
        rows.append(row(None, noise_multiplier))
    n_labels = stand_ins[0].shape[1] if stand_ins else 0 if query is None else len(query["labels"])
    result: dict[str, Any] = {
        "labels_per_class": k, "rows": rows, "uniform_share": k / n_labels if n_labels else None,
        "stand_in_share": _mean([concentration(t, k, assignment, total) for t in stand_ins]), "chosen_share": None,
    }  # fmt: skip
    if query is not None:
        noisy, drawn = np.asarray(query["counts"], np.float64), query["noise_multiplier"] * math.sqrt(votes_per_image)
        for line in rows:
            least = drawn * math.sqrt(1 + _SPLIT**2)  # less noise than was drawn, nothing can be said of
            at = max(line["noise_std"], least) if line["own"] else line["noise_std"]
            if at >= least:
                line["table"] = asdict(held_share(noisy, k, assignment, noise_std=drawn, at=at, total=total))
                if line["own"]:
                    result["chosen_share"] = line["table"]["share"]
    result["verdict"] = verdict(result)
    return result


def check_text(check: dict[str, Any]) -> str:
    """The check as lines for a terminal."""
    lines = [f"{'share of':>10} {'σ₁':>9} {'noise':>8}   {'same labels, votes kept':<26}votes that the chosen hold"]
    lines.append(f"{'the budget':>10} {'':>9} {'(votes)':>8}   {'on public stand-ins':<26}on the drawn table")
    for row in check["rows"]:
        share = f"{100 * row['share']:g} %" if row["share"] is not None else "set"
        found = row["stand_in"]
        agreed = "–" if found is None else f"{100 * found['labels']:.0f} %, {100 * found['votes']:.0f} %"
        mark = "  ← this run" if row["own"] else ""
        line = f"{share:>10} {row['noise_multiplier']:>9.4g} {row['noise_std']:>8.4g}   {agreed:<26}{held_text(row['table']):<22}"
        lines.append(line.rstrip() + mark)
    if check["uniform_share"] is not None:
        held = [f"{name} {100 * check[key]:.1f} %" for key, name in (("chosen_share", "here"), ("stand_in_share", "on stand-ins"))
                if check[key] is not None]  # fmt: skip
        lines.append(f"votes that the chosen labels hold: {', '.join(held)}; {100 * check['uniform_share']:.1f} % if at random")
    return "\n".join([*lines, check["verdict"]])


def held_text(found: dict[str, float] | None) -> str:
    return "–" if found is None else f"{100 * found['share']:.1f} ± {100 * found['error']:.1f} %"


def verdict(check: dict[str, Any]) -> str:
    """What the figures of this run's share say: of the drawn table once there is one, else of the stand-ins."""
    own = next((row for row in check["rows"] if row["own"]), None)
    stand_in, drawn = (own["stand_in"], own["table"]) if own else (None, None)
    chance = check["uniform_share"]
    if drawn is not None:
        least, most = drawn["share"] - 2 * drawn["error"], drawn["share"] + 2 * drawn["error"]
        found = f"the chosen labels hold {held_text(drawn)} of the votes, and chance would give them {100 * chance:.1f} %"
        if most < 1.5 * chance:
            return f"The labels do not tell the classes apart: {found}. Take another public set or another semantic function."
        if least < 1.5 * chance:
            return (
                f"Too noisy to tell whether the choice is better than chance: {found}. Raise query.share, take fewer and coarser "
                "labels (query.clusters auto), or a public set that fits better."
            )
        return f"{found[0].upper()}{found[1:]}.{_of_stand_ins(stand_in)}"
    if stand_in is None:
        return "Nothing can be said: the public set has too few labels for a stand-in, and no table is drawn yet."
    if stand_in["votes"] < 0.75:
        return (
            f"The query is too noisy to trust: a choice for public stand-ins keeps {100 * stand_in['votes']:.0f} % of the votes. "
            "Raise query.share, or take fewer and coarser labels (query.clusters auto)."
        )
    if check["stand_in_share"] < 1.5 * chance:
        return (
            "The labels do not tell the classes apart: those chosen for public stand-ins hold hardly more votes than chance "
            "would give them. Take another public set or another semantic function."
        )
    change = "hardly changes the choice" if stand_in["votes"] >= 0.95 else "changes some of the choice"
    return f"The noise {change} for public stand-ins: it keeps {100 * stand_in['votes']:.0f} % of the votes."


def _of_stand_ins(found: dict[str, float] | None) -> str:
    """Of a choice that is better than chance: would less noise have made it better still?"""
    if found is None:
        return ""
    kept = f"keeps {100 * found['votes']:.0f} % of the votes"
    if found["votes"] >= 0.95:
        return f" The noise hardly changes a choice for public stand-ins: it {kept}."
    advice = " A larger query.share, or fewer and coarser labels (query.clusters auto), may choose better."
    return f" The noise changes some of the choice for public stand-ins: it {kept}.{advice if found['votes'] < 0.75 else ''}"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
