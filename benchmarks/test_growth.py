"""How the price of a private step grows with rows, multiplicity, resolution and width: the package's U-Net, against plain."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from cases import NETWORKS, Case, unet
from pytest_benchmark.fixture import BenchmarkFixture
from rounds import Times, interleave, record, replay
from subjects import prepare

from privimage_fast.models.unet import PRESETS

SMALL = PRESETS["small"]
AXES: dict[str, tuple[int, ...]] = {
    "rows": (4, 8, 16, 32, 64), "multiplicity": (1, 2, 4, 8, 16), "resolution": (8, 16, 24, 32), "width": (8, 16, 32, 64),
}  # fmt: skip
SUBJECTS = ("plain", "plain-channels-last", "ours", "ours-channels-last")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    points = [(axis, value) for axis, values in AXES.items() for value in values]
    metafunc.parametrize(("axis", "value"), points[:1] if metafunc.config.getoption("--smoke") else points)
    metafunc.parametrize("subject", SUBJECTS)


def _case(axis: str, value: int) -> Case:
    """16 rows, K = 1, 16×16, width 16, but for the one axis."""
    resolution = value if axis == "resolution" else 16
    width = value if axis == "width" else SMALL.base_channels
    name = f"U-Net, width {width}, {resolution}×{resolution}"
    NETWORKS[name] = unet(replace(SMALL, base_channels=width, head_channels=min(width, SMALL.head_channels)), resolution, 3)
    return Case(name, value if axis == "multiplicity" else 1, value if axis == "rows" else 16)


@cache
def _times(axis: str, value: int, smoke: bool) -> Times:
    steps, _ = prepare(_case(axis, value), None, list(SUBJECTS))
    return interleave(steps, rounds=1 if smoke else 5, seconds=0 if smoke else 2, warmup=0 if smoke else 1)


@pytest.mark.benchmark(timer=replay)
def test_growth(benchmark: BenchmarkFixture, axis: str, value: int, subject: str, smoke: bool) -> None:
    times = _times(axis, value, smoke)[subject]
    record(benchmark, f"growth: {axis} = {value}", times, axis=axis, value=value, subject=subject)
