"""Progress bars that bear reading wherever they go: at once and often on a terminal, twice a minute in a log file."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

_SECONDS_IN_A_LOG = 30.0


def progress_bar(steps: Iterable[T], *, delay: float = 0.0, **options: Any) -> tqdm[T]:
    """A bar over ``steps`` that goes when they are done, first shown after ``delay`` seconds; ``options`` are tqdm's."""
    if not sys.stderr.isatty():
        options |= {"mininterval": _SECONDS_IN_A_LOG, "maxinterval": _SECONDS_IN_A_LOG}
        delay = max(delay, _SECONDS_IN_A_LOG)  # what is done before that needs no line
    return tqdm(steps, leave=False, delay=delay, **options)
