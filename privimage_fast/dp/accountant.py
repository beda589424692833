"""The running account of an engine: what was charged, and ε of it. Public values only, and no torch.

The shape is that of Opacus' accountants (``history``, ``step``, ``get_epsilon``); ε comes from
:mod:`privimage_fast.dp.accounting`.
"""

from __future__ import annotations

import secrets
from collections import Counter
from typing import Any

from privimage_fast.dp import accounting
from privimage_fast.dp.accounting import DPSGDEvent, Event

MECHANISMS = ("pld", "prv", "rdp")


class Accountant:
    """Charges in order, by the process that made them.

    Args:
        mechanism: "pld" (pessimistic, the package's own figure), or "prv" or "rdp" by Opacus' code.

    Loading a state adds what other processes charged and keeps what this one did: going back to an earlier checkpoint does not
    take back what was spent since.
    """

    def __init__(self, mechanism: str = "pld") -> None:
        if mechanism == "gdp":
            raise ValueError("accountant 'gdp' is a central limit approximation, no bound; use 'pld', 'prv' or 'rdp'")
        if mechanism not in MECHANISMS:
            raise ValueError(f"accountant is {mechanism!r}; it must be 'pld', 'prv' or 'rdp'")
        self._mechanism, self._own = mechanism, secrets.token_hex(8)
        self._runs: dict[str, Counter[Event]] = {self._own: Counter()}

    def mechanism(self) -> str:
        return self._mechanism

    def charge(self, event: Event) -> None:
        """Adds one mechanism; a DP-SGD event of n steps counts as n."""
        if isinstance(event, DPSGDEvent):
            self._runs[self._own][DPSGDEvent(event.noise_multiplier, event.sample_rate)] += event.steps
        else:
            self._runs[self._own][event] += 1

    def step(self, *, noise_multiplier: float, sample_rate: float) -> None:
        """Opacus' name for charging one DP-SGD step."""
        self.charge(DPSGDEvent(noise_multiplier, sample_rate))

    def events(self) -> list[Event]:
        """Everything charged, equal mechanisms together."""
        counts = sum(self._runs.values(), Counter())
        return [
            DPSGDEvent(event.noise_multiplier, event.sample_rate, count) if isinstance(event, DPSGDEvent) else event
            for event, count in counts.items()
            for _ in range(1 if isinstance(event, DPSGDEvent) else count)
        ]

    @property
    def history(self) -> list[tuple[float, float, int]]:
        """[(noise_multiplier, sample_rate, steps)]; a pass without Poisson sampling has sample_rate 1."""
        return [(sigma, q, n) for (sigma, q), n in accounting.merge_events(self.events()).items()]

    def get_epsilon(self, delta: float) -> float:
        """ε of everything charged, at ``delta``. BudgetError as in :func:`privimage_fast.dp.accounting.epsilon`."""
        return accounting.epsilon(self.events(), delta, accountant=self._mechanism)

    def __len__(self) -> int:
        return sum(sum(counts.values()) for counts in self._runs.values())

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        runs = {
            run: [[accounting.event_to_dict(event), count] for event, count in counts.items()]
            for run, counts in self._runs.items()
        }
        return {"mechanism": self._mechanism, "runs": runs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Adds the charges of :meth:`state_dict`; nothing charged here is forgotten. ValueError for what is no such state."""
        if not isinstance(state, dict) or not isinstance(state.get("runs"), dict):
            raise ValueError(
                f"not an accountant's state: expected a dict with 'mechanism' and 'runs', found {type(state).__name__}"
            )
        loaded: dict[str, Counter[Event]] = {}
        for run, entries in state["runs"].items():
            loaded[str(run)] = Counter()
            for values, count in entries:
                event = accounting.event_from_dict(values)
                if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= accounting.MAX_STEPS:
                    raise ValueError(f"an accountant's state holds the count {count!r} for {event}; expected a positive integer")
                loaded[str(run)][event] += count
        for run, counts in loaded.items():
            self._runs[run] = self._runs.get(run, Counter()) | counts  # the larger count of each
