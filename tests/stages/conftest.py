"""A run with learned labels, for the tests that only look at it or copy it."""

from __future__ import annotations

import pytest
from tiny import LABEL, run_all

from privimage_fast.pipeline import Run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_all(tmp_path_factory.mktemp("label") / "a", label=LABEL)
