"""Whether the data of a comparison is there, found out before its first run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from privimage_fast.compare.grid import Cell, Comparison, GridError
from privimage_fast.compare.runner import is_finished
from privimage_fast.data.embedded import PREFIX


def check_sources(comparison: Comparison, file: str | Path, wanted: Callable[[Cell], bool] = lambda cell: True) -> None:
    """Refuses a comparison whose runs would fail, one after the other, for want of a file.

    Raises:
        GridError: naming what is missing, and the comment at the top of ``file``, where a grid says how its data is made.
    """
    sources: dict[str, None] = {}  # in the order of the file
    for cell in comparison.cells:
        if wanted(cell) and not is_finished(cell):
            data = cell.config.data
            sources |= dict.fromkeys([*([data.public] if isinstance(data.public, str) else data.public), data.private])
            sources |= dict.fromkeys([data.test] if data.test else [])
    missing = [s for s in sources if s and not s.startswith(PREFIX) and not Path(s).exists()]
    if not missing:
        return
    hint = "paths are as seen from the current folder"
    if Path(file).read_text(encoding="utf-8").lstrip().startswith("#"):
        hint = f"the comment at the top of {file} says what is needed before it"
    raise GridError(f"no such file or folder: {', '.join(missing)}; {hint}")
