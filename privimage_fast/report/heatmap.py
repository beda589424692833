"""Geometry of the noisy histogram's heat map; the template draws it as SVG, so text stays text and colours follow the page.

One hue whose opacity grows with the count: order is carried by lightness alone, which colour-blind readers and grey
printers keep, and which turns around with a dark page.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from privimage_fast.report.text import visible

MAX_ROWS, MAX_COLUMNS = 60, 80
CELL = 16
_CHARACTER, _LONGEST = 6.6, 18


@dataclass(frozen=True)
class Cell:
    x: int
    y: int
    opacity: str
    chosen: bool
    title: str


@dataclass(frozen=True)
class HeatMap:
    """`rows` and `columns` are (position, shown, full name); positions are in pixels from the top left corner."""

    width: int
    height: int
    left: int
    top: int
    rows: list[tuple[int, str, str]]
    columns: list[tuple[int, str, str]]
    turned: bool
    cells: list[Cell]
    chosen: list[Cell]
    largest: float
    left_out: str


def heat_map(query: dict[str, Any], selection: dict[str, Any] | None) -> HeatMap:
    """Chosen labels come first, in the order of the classes that chose them, so that a good query shows as a diagonal."""
    counts, labels, classes = query["counts"], query["labels"], query["classes"]
    picks = [(e["class"], label) for e in (selection or {}).get("classes", []) for label in e["labels"]]
    rows = list(range(len(classes)))[:MAX_ROWS]
    place = {label: i for i, label in enumerate(labels)}
    first = [place[label] for _, label in picks if label in place]
    rest = [int(i) for i in np.argsort(-counts.max(0), kind="stable")]
    columns = list(dict.fromkeys([*first, *rest]))[:MAX_COLUMNS]
    picked = set(picks)
    largest = max(float(counts.max()), 1e-9)
    shown_rows, shown_columns = [_short(classes[r]) for r in rows], [_short(labels[c]) for c in columns]
    left = 8 + int(_CHARACTER * max(map(len, shown_rows)))
    longest = max(map(len, shown_columns))
    turned = longest > 2
    top = 8 + int(_CHARACTER * longest) if turned else 18
    cells = [
        Cell(
            left + j * CELL,
            top + i * CELL,
            f"{max(0.0, float(counts[r, c]) / largest):.2f}",
            (classes[r], labels[c]) in picked,
            f"{visible(classes[r])} → {visible(labels[c])}: {counts[r, c]:.1f}",
        )
        for i, r in enumerate(rows)
        for j, c in enumerate(columns)
    ]
    hidden = [
        f"{total - shown} of {total} {what}"
        for what, shown, total in (("classes", len(rows), len(classes)), ("labels", len(columns), len(labels)))
        if shown < total
    ]
    return HeatMap(
        width=left + len(columns) * CELL + 2,
        height=top + len(rows) * CELL + 2,
        left=left,
        top=top,
        rows=[(top + i * CELL + CELL // 2, shown_rows[i], classes[r]) for i, r in enumerate(rows)],
        columns=[(left + j * CELL + CELL // 2, shown_columns[j], labels[c]) for j, c in enumerate(columns)],
        turned=turned,
        cells=cells,
        chosen=[cell for cell in cells if cell.chosen],
        largest=largest,
        left_out=" and ".join(hidden),
    )


def _short(name: str) -> str:
    name = visible(name)
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
