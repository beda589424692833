"""One DP step beside the plain step and beside Opacus: time in turns in one process, peak memory in a process each.

make bench          # writes benchmarks/results/dp_step.json; table.py makes tables of it
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import pytest
from cases import FULL, SMOKE, Case, parameters
from memory import peak_growth
from pytest_benchmark.fixture import BenchmarkFixture
from rounds import Times, interleave, record, replay
from subjects import LEAN, SUBJECTS, prepare


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = SMOKE if metafunc.config.getoption("--smoke") else FULL
    metafunc.parametrize("case", cases, ids=str)
    metafunc.parametrize("subject", list(SUBJECTS))


SIZED = ("ours", "ours-lean", "opacus-hooks", "opacus-ghost")  # and plain; a process each, so not every layout


@cache
def measured(case: Case, smoke: bool) -> tuple[Times, dict[str, str], dict[str, int]]:
    """Times, refusals and peak memory of all subjects: taken together, recorded one test at a time."""
    memory = {"plain": peak_growth(case, "plain")}
    budget = 2**26 if smoke else int(LEAN * memory["plain"])
    steps, refused = prepare(case, budget)
    times = interleave(steps, rounds=2 if smoke else 5, seconds=0 if smoke else 6, warmup=0 if smoke else 1)
    for name in ("ours-lean",) if smoke else SIZED:
        if name in steps:
            memory[name] = peak_growth(case, name, budget)
    return times, refused, memory


@pytest.mark.benchmark(timer=replay)
def test_step(benchmark: BenchmarkFixture, case: Case, subject: str, smoke: bool) -> None:
    if case.network.startswith("UNet2DModel") and importlib.util.find_spec("diffusers") is None:
        pytest.skip("diffusers is not installed")
    times, refused, memory = measured(case, smoke)
    facts: dict[str, Any] = {
        "network": case.network, "multiplicity": case.multiplicity, "rows": case.rows, "subject": subject,
        "parameters": parameters(case.build().model), "refused": refused,
    }  # fmt: skip
    if subject in refused:
        pytest.skip(f"{subject} refuses {case}: {refused[subject]}")
    record(benchmark, str(case), times[subject], **facts, peak_growth_bytes=memory.get(subject))
