"""Fixtures for the op tests: every native kernel is run at every instruction set this machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from privimage_fast.ops import native

LEVELS = native._C.build_info()["isa_usable"] if native._C else ["no extension"]


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if native._C is None:
        if os.environ.get("PRIVIMAGE_REQUIRE_NATIVE", "0") not in ("", "0"):
            pytest.fail(f"PRIVIMAGE_REQUIRE_NATIVE is set, but the extension is absent: {native.IMPORT_ERROR}")
        pytest.skip("the extension is not built")
    before = native._C.build_info()["isa"]
    assert native._C.set_cpu_isa(request.param)
    yield request.param
    native._C.set_cpu_isa(before)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
