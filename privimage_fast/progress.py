"""Progress bars that bear reading wherever they go: at once and often on a terminal, a line in half a minute in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

_SECONDS_IN_A_LOG = 30.0


class _Lines:
    """What tqdm writes over itself on a terminal, as lines of their own on stderr."""

    encoding = "utf-8"

    def write(self, text: str) -> None:
        if shown := text.strip():
            sys.stderr.write(f"{shown}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(steps: Iterable[T], *, delay: float = 0.0, **options: Any) -> tqdm[T]:
    """A bar over ``steps`` that goes when they are done, first shown after ``delay`` seconds; ``options`` are tqdm's."""
    if not _is_watched():
        # Looked at in every step: tqdm would otherwise guess how many to leave out, and write what it saw last when it is late.
        options |= {"mininterval": _SECONDS_IN_A_LOG, "miniters": 1, "file": _Lines(), "ncols": 100}
        delay = max(delay, _SECONDS_IN_A_LOG)  # what is done before that needs no line
    return tqdm(steps, leave=False, delay=delay, **options)


def _is_watched() -> bool:
    """Whether somebody sees stderr as it is written: a terminal, or a notebook, whose stderr says that it is none."""
    return "ipykernel" in sys.modules or bool(getattr(sys.stderr, "isatty", lambda: False)())
