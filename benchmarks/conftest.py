"""Options and machine facts of the benchmarks. ``--smoke`` runs each once on a tiny case, for the test-suite."""

from __future__ import annotations

import importlib.metadata
import os
from typing import Any

import pytest

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")  # as in tests/conftest.py


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="tiny cases, one round")


@pytest.fixture(scope="session")
def smoke(pytestconfig: pytest.Config) -> bool:
    return bool(pytestconfig.getoption("--smoke"))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    import torch

    from privimage_fast import ops

    info = ops.build_info()
    machine_info["privimage_fast"] = {"isa": info.isa, "openmp": info.openmp, "native": info.native}
    machine_info["threads"] = torch.get_num_threads()
    # How threads wait moves every figure of a small network, plain's more than ours.
    waits = ("OMP_", "GOMP_", "KMP_", "MKL_")
    machine_info["environment"] = {name: value for name, value in os.environ.items() if name.startswith(waits)}
    machine_info["torch_isa"] = torch.backends.cpu.get_cpu_capability()
    machine_info["versions"] = {}
    for name in ("torch", "opacus", "diffusers", "numpy"):
        try:
            machine_info["versions"][name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine_info["versions"][name] = "absent"
