"""How far can a query be trusted? Would its choice of labels have been the same without the noise?

Two answers, neither of which costs any privacy. On a *stand-in*: held-out images of public labels play the sensitive classes,
their own label is struck out, and the choice on their noiseless table is compared with noisy ones. And on the *noisy table*
itself, once it is drawn: what it most likely was without noise, noised again. That is post-processing.
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


def likely_table(noisy: np.ndarray, total: float) -> np.ndarray:
    """The most likely noiseless table behind a noisy one: votes are not negative and ``total`` in all (both public facts).

    That is the Euclidean projection on a simplex (Held, Wolfe & Crowder 1974): one threshold is taken from every cell.
    """
    ordered = np.sort(noisy.ravel())[::-1]
    excess = (np.cumsum(ordered) - total) / np.arange(1, ordered.size + 1)
    threshold = excess[np.flatnonzero(ordered > excess)[-1]]
    return np.maximum(noisy - threshold, 0.0)


def concentration(table: np.ndarray, k: int, assignment: str, total: float) -> float:
    """Share of the ``total`` votes that the chosen labels hold in the rows of their classes."""
    return float(sum(table[c, labels].sum() for c, labels in enumerate(assign_labels(table, k, assignment))) / total)


def question(
    noise_of: Callable[[float], float], *, k: int, votes_per_image: int, population: int, assignment: str,
    stand_ins: Sequence[np.ndarray] = (), query: dict[str, Any] | None = None, share: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of query-check.json: agreement at several shares of ε, on the stand-ins and on the drawn table.

    ``noise_of`` gives σ₁ of a share; ``share`` is the run's own. ``query``: the content of query.json, once there is one.
    """
    total = votes_per_image * population
    drawn = None if query is None else likely_table(np.asarray(query["counts"], np.float64), total)
    rows = []
    for at in sorted({*SHARES, *([share] if share is not None else [])}):
        rows.append({"share": at, **_at(noise_of(at), votes_per_image, k, assignment, stand_ins, drawn), "own": at == share})
    if query is not None and not any(row["own"] for row in rows):  # σ₁ was set by hand
        sigma = query["noise_multiplier"]
        rows.append({"share": None, **_at(sigma, votes_per_image, k, assignment, stand_ins, drawn), "own": True})
    n_labels = stand_ins[0].shape[1] if stand_ins else 0 if query is None else len(query["labels"])
    result: dict[str, Any] = {
        "labels_per_class": k, "rows": rows, "uniform_share": k / n_labels if n_labels else None,
        "stand_in_share": _mean([concentration(t, k, assignment, total) for t in stand_ins]), "chosen_share": None,
    }  # fmt: skip
    if query is not None and drawn is not None:
        result["chosen_share"] = concentration(drawn, k, assignment, total)
    result["verdict"] = verdict(result)
    return result


def _at(
    sigma: float, votes: int, k: int, assignment: str, stand_ins: Sequence[np.ndarray], drawn: np.ndarray | None
) -> dict[str, Any]:
    std = sigma * math.sqrt(votes)
    found = [agreement(table, k, std, assignment) for table in stand_ins]
    stand_in = {"labels": _mean([a.labels for a in found]), "votes": _mean([a.votes for a in found])} if found else None
    table = asdict(agreement(drawn, k, std, assignment)) if drawn is not None else None
    return {"noise_multiplier": sigma, "noise_std": std, "stand_in": stand_in, "table": table}


def check_text(check: dict[str, Any]) -> str:
    """The check as lines for a terminal."""
    lines = [f"{'share of ε':>10} {'σ₁':>9} {'noise':>8}   same labels, votes kept"]
    lines.append(f"{'':>10} {'':>9} {'(votes)':>8}   {'on public stand-ins':<22}{'on the drawn table':<22}")
    for row in check["rows"]:
        share = f"{100 * row['share']:g} %" if row["share"] is not None else "set"
        cells = [_cell(row[name]) for name in ("stand_in", "table")]
        mark = "  ← this run" if row["own"] else ""
        line = f"{share:>10} {row['noise_multiplier']:>9.4g} {row['noise_std']:>8.4g}   {cells[0]:<22}{cells[1]:<22}"
        lines.append(line.rstrip() + mark)
    if check["uniform_share"] is not None:
        held = [f"{name} {100 * check[key]:.0f} %" for key, name in (("chosen_share", "here"), ("stand_in_share", "on stand-ins"))
                if check[key] is not None]  # fmt: skip
        lines.append(f"votes that the chosen labels hold: {', '.join(held)}; {100 * check['uniform_share']:.0f} % if at random")
    return "\n".join([*lines, check["verdict"]])


def verdict(check: dict[str, Any]) -> str:
    """What the figures of this run's share say, in a sentence."""
    own = next((row for row in check["rows"] if row["own"]), None)
    found = None if own is None else own["table"] or own["stand_in"]
    if found is None:
        return "Nothing can be said: the public set has too few labels for a stand-in, and no table is drawn yet."
    held = check["chosen_share"] if check["chosen_share"] is not None else check["stand_in_share"]
    if held is not None and held < 1.5 * check["uniform_share"]:
        return (
            "The labels do not tell the classes apart: those chosen hold hardly more votes than chance would give them. Take "
            "another public set or another semantic function."
        )
    if found["votes"] >= 0.95:
        return f"The noise hardly changes the choice: it keeps {100 * found['votes']:.0f} % of the votes."
    if found["votes"] >= 0.75:
        return f"The noise changes some of the choice: it keeps {100 * found['votes']:.0f} % of the votes."
    return (
        f"The query is too noisy to trust: its choice keeps {100 * found['votes']:.0f} % of the votes. Raise query.share, or "
        "take fewer and coarser labels (query.clusters)."
    )


def _cell(value: dict[str, float] | None) -> str:
    return "–" if value is None else f"{100 * value['labels']:.0f} %, {100 * value['votes']:.0f} %"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
