"""Round-robin timing, recorded as pytest-benchmark results.

Subjects that are compared take turns inside one process, so that whatever slows the machine down hits all of them; a
ratio is taken inside a round, and its median and quartiles over the rounds are what is quoted.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pytest_benchmark.fixture import BenchmarkFixture

Times = dict[str, list[float]]


def interleave(
    subjects: Mapping[str, Callable[[], object]], *, rounds: int, seconds: float, warmup: int = 1, at_most: int = 25
) -> Times:
    """Seconds of every subject in every round; at least ``rounds``, more while ``seconds`` last. Odd rounds run backwards."""
    for _ in range(warmup):
        for step in subjects.values():
            step()
    times: Times = {name: [] for name in subjects}
    began = time.perf_counter()
    for index in range(max(rounds, at_most)):
        if index >= rounds and time.perf_counter() - began > seconds:
            break
        for name in list(subjects)[:: -1 if index % 2 else 1]:
            start = time.perf_counter()
            subjects[name]()
            times[name].append(time.perf_counter() - start)
    return times


class _Replay:
    """A clock that makes the next rounds as long as they were when the subjects took turns."""

    def __init__(self) -> None:
        self._readings: deque[float] = deque()

    def load(self, durations: Sequence[float]) -> None:
        self._readings.clear()
        for d in durations:
            self._readings += (0.0, d)

    def __call__(self) -> float:
        return self._readings.popleft()


replay = _Replay()


def record(benchmark: BenchmarkFixture, group: str, durations: Sequence[float], **extra: Any) -> None:
    """Puts measured rounds into pytest-benchmark's statistics; the test must be marked ``benchmark(timer=replay)``."""
    replay.load(durations)
    benchmark.group = group
    benchmark.extra_info.update(extra)
    benchmark.pedantic(lambda: None, rounds=len(durations))
