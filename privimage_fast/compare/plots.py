"""Pictures of a comparison: accuracy and distance along each axis, and synthetic images of each variant under one another."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from privimage_fast.compare.grid import Comparison, Grid, fixes, setting
from privimage_fast.data.atomic import atomic_path
from privimage_fast.data.sheet import image_sheet
from privimage_fast.stages.folder import RunFolder

if TYPE_CHECKING:
    from privimage_fast.compare.tables import Row, Summary

Figures = Mapping[str, Callable[["Row"], "float | None"]]
_COLUMNS = 20
# Dark enough on white and apart for colour-blind readers (Okabe & Ito); markers tell the rest.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#7F7F7F")
_MARKERS = "osD^vP*X"


def plot_figures(comparison: Comparison, summaries: Sequence[Summary], out: Path, figures: Figures) -> list[Path]:
    """<figure>-by-<axis>.png for each axis of a grid with two values or more; the paths written."""
    written: list[Path] = []
    for grid in comparison.grids:
        for key, values in grid.axes.items():
            if len(values) < 2:
                continue
            for name, figure in figures.items():
                lines = series(comparison, grid, key, summaries, figure)
                if sum(len(points) for points in lines.values()) < 2:
                    continue
                path = out / f"{name}-by-{key.rpartition('.')[2]}.png"
                while path in written:
                    path = path.with_stem(path.stem + "-again")
                label = name if name == "accuracy" else _distance_label(summaries)
                _draw(path, lines, key, label, ordered(values))
                written.append(path)
    return written


def series(
    comparison: Comparison, grid: Grid, key: str, summaries: Sequence[Summary], figure: Callable[[Row], float | None]
) -> dict[str, list[tuple[Any, float, float | None]]]:
    """Line → (value on the axis, mean, spread). A variant that fixes the axis has the same figure at every value."""
    lines: dict[str, list[tuple[Any, float, float | None]]] = {}
    for s in summaries:
        fixed = {k for k in s.settings if fixes(comparison.variants[s.variant], k)}
        # A run of another grid belongs to this one if it differs from the base in this grid's axes only.
        allowed = {k: grid.axes.get(k, (setting(comparison.base, k),)) for k in s.settings}
        if s.variant not in grid.variants or not all(v in allowed[k] for k, v in s.settings.items() if k not in fixed):
            continue
        mean, spread = s.figure(figure)
        if mean is None:
            continue
        rest = [f"{k.rpartition('.')[2]} {_text(s.settings[k])}" for k, v in grid.axes.items() if k != key and len(v) > 1]
        at = ordered(grid.axes[key]) if key in fixed else [s.settings[key]]
        lines.setdefault(", ".join([s.variant, *rest]), []).extend((value, mean, spread) for value in at)
    return lines


def ordered(values: Sequence[Any]) -> list[Any]:
    """Numbers by size, the rest as given."""
    numeric = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return sorted(values) if numeric else list(values)


def _distance_label(summaries: Sequence[Summary]) -> str:
    runs = [r for s in summaries for r in s.runs if r.distance_name]
    several = len({(r.distance_name, r.network) for r in runs}) > 1
    if several:
        return "distances, on different networks"
    return (runs[0].distance_name if runs else None) or "distance"


def _draw(path: Path, lines: Mapping[str, list[tuple[Any, float, float | None]]], key: str, label: str, at: list[Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    scale = 100 if label == "accuracy" else 1
    for i, (line, points) in enumerate(lines.items()):
        points = sorted(points, key=lambda p: at.index(p[0]))
        x = [at.index(value) for value, _, _ in points]
        y = [scale * mean for _, mean, _ in points]
        # Of one run nothing is known of the spread: no bar, not one of no length.
        error = [math.nan if spread is None else scale * spread for _, _, spread in points]
        axes.errorbar(
            x, y, error, label=line, color=_COLOURS[i % len(_COLOURS)], marker=_MARKERS[i % len(_MARKERS)],
            markersize=5, capsize=3, linewidth=1.5,
        )  # fmt: skip
    # Values stand at equal steps: ε goes to infinity, and sizes have names.
    axes.set_xticks(range(len(at)), [_text(v) for v in at])
    axes.set_xlabel("ε" if key == "privacy.epsilon" else key)
    axes.set_ylabel("accuracy on real test images, %" if label == "accuracy" else label)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")  # beside the lines, never on them
    axes.set_title("computed on real images: not private", fontsize=8, loc="right", color="#555555")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _text(value: Any) -> str:
    if value is None:
        return "all"
    return "∞" if value == math.inf else f"{value:g}" if isinstance(value, float) else str(value)


def image_rows(summaries: Sequence[Summary], path: Path) -> list[Path]:
    """A sheet with a row of synthetic images for each variant and setting, the classes in turn; the first seed's."""
    rows, labels = [], []
    for s in summaries:
        synthetic = RunFolder(s.runs[0].cell.config.out).synthetic
        if not synthetic.exists():
            continue
        with np.load(synthetic, allow_pickle=False) as arrays:
            images, of_class = arrays["images"], arrays["labels"]
        rows.append(images[_in_turn(of_class, _COLUMNS)])
        # The sheet's font has Latin letters only.
        settings = [f"{k.rpartition('.')[2]} {'inf' if v == math.inf else _text(v)}" for k, v in s.settings.items()]
        labels.append(" ".join([s.variant, *settings]))
    if not rows or len({r.shape for r in rows}) > 1:  # runs of several resolutions have no common sheet
        return []
    scale = max(1, 32 // rows[0].shape[1])
    sheet = image_sheet(np.concatenate(rows), len(rows), rows[0].shape[0], scale=scale, row_labels=labels)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")
    return [path]


def _in_turn(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first images: one of each class, then the next of each."""
    turn = np.zeros(len(labels), np.int64)
    for c in np.unique(labels):
        turn[labels == c] = np.arange((labels == c).sum())
    return np.lexsort((labels, turn))[:count]
