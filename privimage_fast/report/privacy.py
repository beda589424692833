"""What the ledger proves, set beside what the stages say they did. ε comes from the ledger's records and nothing else."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from privimage_fast.dp import accounting
from privimage_fast.dp.accounting import BudgetError, DPSGDEvent, Event
from privimage_fast.dp.ledger import Ledger, LedgerError
from privimage_fast.report.text import epsilon_text, number_text


@dataclass(frozen=True)
class Banner:
    """A warning that stands above everything else."""

    title: str
    text: str


@dataclass(frozen=True)
class Charges:
    """Equal charges of one stage, added up."""

    stage: str
    mechanism: str
    noise_multiplier: float
    sample_rate: float | None
    records: int
    steps: int
    epsilon_alone: float


@dataclass(frozen=True)
class Compared:
    """One public parameter as planned and as the ledger has it."""

    name: str
    planned: Any
    charged: Any
    verdict: str
    sound: bool = True


@dataclass(frozen=True)
class Check:
    accountant: str
    role: str
    epsilon: float | None
    difference: str


@dataclass
class Privacy:
    """What the ledger proves. `epsilon` None: nothing can be said."""

    epsilon: float | None = None
    delta: float | None = None
    target: float | None = None
    population: int | None = None
    adjacency: str = ""
    unit: str = ""
    created: str = ""
    seeded: bool = False
    records: int = 0
    steps: int = 0
    sessions: int = 0
    replays: int = 0
    replayed: str = ""
    charges: list[Charges] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    banners: list[Banner] = field(default_factory=list)
    events: tuple[Event, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the run may be called differentially private at all."""
        return self.epsilon is not None and math.isfinite(self.epsilon) and not self.banners


@lru_cache(maxsize=32)
def _epsilon(events: tuple[Event, ...], delta: float) -> float:
    return accounting.epsilon(events, delta)


@lru_cache(maxsize=4)
def _cross_check(events: tuple[Event, ...], delta: float) -> dict[str, float | None]:
    return accounting.cross_check(events, delta)


def cross_checks(privacy: Privacy) -> list[Check]:
    """The reported ε beside two figures by other people's code; empty where there is nothing to check."""
    if not privacy.events or privacy.epsilon is None or privacy.delta is None:
        return []
    reported = Check("PLD (dp-accounting)", "reported: pessimistic privacy loss distribution", privacy.epsilon, "")
    try:
        found = _cross_check(privacy.events, privacy.delta)
    except (BudgetError, ImportError, ValueError, ArithmeticError) as error:
        return [reported, Check("PRV, RDP (Opacus)", f"could not be computed: {error}", None, "")]
    roles = {
        "prv": "cross-check: estimate of the same figure plus its stated error",
        "rdp": "cross-check: a looser bound",
    }
    checks = [
        Check(f"{name.upper()} (Opacus)", role, found.get(name), _difference(found.get(name), privacy.epsilon))
        for name, role in roles.items()
    ]
    return [reported, *checks]


def _difference(value: float | None, reported: float) -> str:
    if value is None:
        return "outside its numerical range"
    if not (math.isfinite(value) and math.isfinite(reported)) or reported == 0:
        return "both infinite" if value == reported == math.inf else "–"
    return f"{100 * (value / reported - 1):+.1f} %"


def read_privacy(
    run_dir: Path, budget: dict[str, Any], query: dict[str, Any] | None, means: dict[str, Any] | None,
    config: dict[str, Any], finished: set[str],
) -> Privacy:  # fmt: skip
    """The ledger of `run_dir` and how the plan compares. `finished`: stages that have ended: their steps must be there."""
    path = run_dir / "ledger.jsonl"
    if not path.is_file():
        results = ("query.json", "means.safetensors", "synthetic.npz", "model", "checkpoints/finetune.safetensors")
        touched = [name for name in results if (run_dir / name).exists()]
        text = "There is no ledger.jsonl, so nothing can be said about ε."
        if touched:
            text += f" The folder holds {', '.join(touched)} all the same: treat everything in it as not private."
        return Privacy(banners=[Banner("NO STATEMENT: the ledger is missing", text)])
    try:
        ledger = Ledger.read(path)
        delta, events = ledger.header.delta, tuple(ledger.events())
        privacy = Privacy(
            epsilon=_epsilon(events, delta),
            delta=delta,
            target=ledger.header.target_epsilon,
            population=ledger.header.population,
            adjacency=ledger.header.adjacency.replace("_", " "),
            unit=ledger.header.unit,
            created=ledger.header.created.replace("T", " ").replace("+00:00", " UTC"),
            seeded=ledger.seeded or _insecure(config),
            records=len(events),
            steps=sum(_steps(event) for event in events),
            sessions=len({record.session for record in ledger.records()}),
            charges=_charges(ledger),
            events=events,
        )
    except (LedgerError, BudgetError, OSError) as error:
        what = "ε cannot be computed" if isinstance(error, BudgetError) else "the ledger is damaged"
        text = f"The ledger cannot be used, so nothing can be said about ε. {without_folder(str(error), run_dir)}"
        return Privacy(banners=[Banner(f"NO STATEMENT: {what}", text)])
    if not (config.get("label") or {}).get("steps"):  # none, or given up: what was charged of them is all there will be
        budget = {**budget, "label_steps": None}
    _compare(privacy, ledger, budget, {"query": query, "warmup": means}, finished)
    privacy.banners = _banners(privacy)
    return privacy


def _insecure(config: dict[str, Any]) -> bool:
    """Whether the configuration asks for seeded noise: then a banner stands even before the first charge."""
    section = config.get("privacy")
    return isinstance(section, dict) and section.get("secure") is False


def _steps(event: Event) -> int:
    return event.steps if isinstance(event, DPSGDEvent) else 1


def _charges(ledger: Ledger) -> list[Charges]:
    groups: dict[tuple[str, float, float | None], list[Event]] = {}
    for record in ledger.records():
        rate = record.event.sample_rate if isinstance(record.event, DPSGDEvent) else None
        groups.setdefault((record.stage, record.event.noise_multiplier, rate), []).append(record.event)
    return [
        Charges(
            stage,
            "Gaussian on the whole set" if rate in (None, 1.0) else "DP-SGD step on a Poisson sample",
            sigma,
            rate,
            len(events),
            sum(_steps(event) for event in events),
            _epsilon(tuple(events), ledger.header.delta),
        )
        for (stage, sigma, rate), events in groups.items()
    ]


def _compare(
    privacy: Privacy, ledger: Ledger, budget: dict[str, Any], asked: dict[str, dict[str, Any] | None], finished: set[str]
) -> None:  # fmt: skip
    """`asked`: what the answers to each question have left, None where there is none.

    The plan beside the ledger. Steps charged beyond the plan are replays; fewer under a finished model are a gap.
    """
    rows, header = privacy.compared, ledger.header
    target = math.inf if header.target_epsilon is None else header.target_epsilon

    def same(name: str, planned: Any, charged: Any) -> None:
        if planned is None:
            return
        equal = _number(planned) == _number(charged)
        rows.append(Compared(name, number_text(planned), number_text(charged), "equal" if equal else "DIFFERS", equal))

    if budget:
        wanted = math.inf if budget.get("target_epsilon") == "inf" else budget.get("target_epsilon")
        if wanted is not None:
            equal = _number(wanted) == target
            planned, charged = ("none" if _number(v) == math.inf else number_text(v) for v in (wanted, target))
            rows.append(Compared("target ε", planned, charged, "equal" if equal else "DIFFERS", equal))
        same("δ", budget.get("delta"), header.delta)
        same("N, images (stated)", budget.get("population"), header.population)
    for stage, planned, planned_sigma, planned_rate in (
        *(
            (stage, left.get("rounds", 1) if left else None, left.get("noise_multiplier") if left else None, None)
            for stage, left in asked.items()
        ),
        ("finetune", budget.get("steps"), budget.get("noise_multiplier"), budget.get("sample_rate")),
        ("label", budget.get("label_steps"), budget.get("label_noise_multiplier"), 1.0),
    ):
        charged = [c for c in privacy.charges if c.stage == stage]
        steps = ledger.steps_charged(stage)
        if not charged and not asked.get(stage) and stage not in finished:
            continue
        label = {"query": "query", "warmup": "class means", "finetune": "fine-tuning", "label": "labels"}[stage]
        if charged:
            same(f"{label}: noise multiplier σ", planned_sigma, charged[-1].noise_multiplier)
            same(f"{label}: sample rate q", planned_rate, charged[-1].sample_rate)
        if not isinstance(planned, int) or isinstance(planned, bool):
            continue
        extra = steps - planned
        what = "draw" if stage in asked else "step"
        if extra > 0:
            verdict = f"{extra:,} {what}{'s' if extra > 1 else ''} repeated after an interruption, charged again"
            privacy.replays += extra
            privacy.replayed = f"{privacy.replayed}; {label}: {verdict}".removeprefix("; ")
        elif extra == 0:
            verdict = "equal"
        else:
            complete = stage in asked or stage in finished
            verdict = "FEWER CHARGED THAN TAKEN" if complete else f"{-extra:,} still to do"
            rows.append(Compared(f"{label}: {what}s", f"{planned:,}", f"{steps:,}", verdict, not complete))
            continue
        rows.append(Compared(f"{label}: {what}s", f"{planned:,}", f"{steps:,}", verdict))


def _banners(privacy: Privacy) -> list[Banner]:
    banners = []
    if privacy.seeded:
        text = "Noise and sampling come from a known seed and can be reproduced, so they protect nobody. This mode is for tests; "
        text += "ε is what the same run would cost with secret randomness."
        banners.append(Banner("NOT PRIVATE: seeded test mode", text))
    if privacy.epsilon is not None and math.isinf(privacy.epsilon):
        text = "ε is infinite: some step ran without noise, or with so little that no bound holds. Nothing here is protected."
        banners.append(Banner("NO PRIVACY: ε is infinite", text))
    elif privacy.epsilon is not None and privacy.target is not None and privacy.epsilon > privacy.target:
        text = f"The ledger adds up to ε = {epsilon_text(privacy.epsilon)}, above the target {privacy.target:g}."
        banners.append(Banner("OVER BUDGET", text))
    if wrong := [row.name for row in privacy.compared if not row.sound]:
        text = f"What the stages wrote does not fit the ledger ({', '.join(wrong)}); do not rely on ε before this is explained."
        banners.append(Banner("LEDGER AND RUN DISAGREE", text))
    return banners


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return value if value == math.inf else math.nan
    return float(value)


def without_folder(text: str, run_dir: Path) -> str:
    return text.replace(f"{run_dir}/", "")
