"""The results of a comparison, from the folders of its runs: JSON, CSV, a Markdown table, plots and a sheet of images."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from privimage_fast.compare.grid import Cell, Comparison
from privimage_fast.compare.plots import image_rows, plot_figures
from privimage_fast.compare.runner import Outcome, code_of, is_finished, last_error
from privimage_fast.data.atomic import atomic_write_text
from privimage_fast.dp.accounting import BudgetError, epsilon
from privimage_fast.dp.ledger import Ledger
from privimage_fast.report import epsilon_text
from privimage_fast.stages.evaluate import ACCURACY, EvaluateConfig
from privimage_fast.stages.folder import RunFolder

NOT_PRIVATE = (
    "Accuracies and distances are computed on real images without noise: **not private**. ε is what the run itself spent; each "
    "run asked its own query and drew its own noise, so on one sensitive set their ε add up."
)


@dataclass(frozen=True)
class Row:
    """One finished run."""

    cell: Cell
    epsilon: float
    delta: float
    public_images: int
    public_share: float
    parameters: int
    metrics: Mapping[str, float | None]
    private: frozenset[str]  # metrics that are computed from what is private already
    network: str  # that distances are on
    code: str | None  # that made the run

    @property
    def distance_name(self) -> str | None:
        """FID, or the Fréchet distance on the run's network."""
        return next((n for n in self.metrics if (n == "FID" or n.startswith("Fréchet")) and ", class " not in n), None)


@dataclass(frozen=True)
class Summary:
    """Runs that differ by their seed alone: mean and standard deviation (None of one run) of each figure."""

    variant: str
    settings: Mapping[str, Any]
    runs: tuple[Row, ...]

    def figure(self, of: Callable[[Row], float | None]) -> tuple[float | None, float | None]:
        values = [v for v in map(of, self.runs) if v is not None]
        if not values:
            return None, None
        return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def accuracy(row: Row) -> float | None:
    return row.metrics.get(ACCURACY)


def distance(row: Row) -> float | None:
    return row.metrics.get(row.distance_name) if row.distance_name else None


def write_results(comparison: Comparison, outcomes: Sequence[Outcome] = ()) -> Path:
    """Writes results.json, results.csv, table.md, the plots and sheet.png into the comparison's folder; the path of table.md.

    Reads finished runs only; those that failed or are open are named in the table.
    """
    rows = [read_row(cell) for cell in comparison.cells if is_finished(cell)]
    summaries = summarise(rows)
    out, together = comparison.out, spent_together(comparison.out)
    failed = {o.cell.name: o.error for o in outcomes if o.error is not None}
    unfinished = [c for c in comparison.cells if not is_finished(c)]
    errors = {c.name: _kind_of(c, failed.get(c.name)) for c in unfinished if c.name in failed or last_error(c)}
    open_cells = [c.name for c in unfinished if c.name not in errors]
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "note": NOT_PRIVATE.replace("*", ""), "epsilon_together": _plain(together.epsilon), "delta_together": together.delta,
        "ledgers_together": together.ledgers,
        "runs": [_run_record(row) for row in rows],
        "failed": errors, "open": open_cells,
    }  # fmt: skip
    atomic_write_text(out / "results.json", json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    atomic_write_text(out / "results.csv", _csv(rows))
    pictures = plot_figures(comparison, summaries, out, {"accuracy": accuracy, "distance": distance})
    pictures += image_rows(summaries, out / "sheet.png")
    atomic_write_text(out / "table.md", markdown(comparison, summaries, errors, open_cells, together, pictures))
    return out / "table.md"


def read_row(cell: Cell) -> Row:
    """What a finished run's folder says."""
    folder = RunFolder(cell.config.out)
    selection = folder.read_json(folder.selection, "select")
    metrics = folder.read_json(folder.metrics, "evaluate")["metrics"]
    ledger = Ledger.read(folder.ledger)
    spent = ledger.epsilon()
    protected = math.isfinite(spent) and not ledger.seeded
    with safe_open(folder.model / "model.safetensors", framework="np") as tensors:
        parameters = sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())
    return Row(
        cell, spent, ledger.header.delta, selection["selected_images"], selection["ratio"], parameters,
        {m["name"]: m["value"] for m in metrics},
        frozenset(m["name"] for m in metrics if m["private"] and protected), _network(folder, cell.config.evaluate),
        code_of(cell),
    )  # fmt: skip


def _network(folder: RunFolder, config: EvaluateConfig) -> str:
    """On which network a run's distances are; one of the public labels is another wherever it was trained otherwise."""
    if config.inception is not None or config.network != "public":
        return config.inception or config.network
    path = folder.checkpoint("classifier")
    return str(folder.load_tensors(path, "evaluate")[1].get("fingerprint")) if path.exists() else "unknown"


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """Rows of one variant and one setting together, in the order of the cells."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.cell.name.rpartition("_seed=")[0], []).append(row)
    return [Summary(runs[0].cell.variant, runs[0].cell.settings, tuple(runs)) for runs in groups.values()]


@dataclass(frozen=True)
class Together:
    """ε of so many ledgers as one release on one sensitive set, at the largest δ; None if it cannot be computed."""

    epsilon: float | None
    delta: float | None
    ledgers: int


def spent_together(out: Path) -> Together:
    """Of every ledger below ``out``: runs that failed, were interrupted, or are no longer in the grid have spent as well."""
    paths = sorted(out.glob("runs/*/ledger.jsonl"))
    delta = None
    try:
        ledgers = [Ledger.read(path) for path in paths]
        delta = max((ledger.header.delta for ledger in ledgers), default=None)
        events = [event for ledger in ledgers for event in ledger.events()]
        found = 0.0 if delta is not None else None
        if events and delta is not None:
            found = epsilon(events, delta)
    except (BudgetError, ValueError, ArithmeticError):
        found = None
    return Together(found, delta, len(paths))


def markdown(
    comparison: Comparison, summaries: Sequence[Summary], errors: Mapping[str, str], open_cells: Sequence[str],
    together: Together, pictures: Sequence[Path],
) -> str:  # fmt: skip
    """The table: a line a variant and setting, means over seeds."""
    keys = list(dict.fromkeys(key for s in summaries for key in s.settings))
    names = list(dict.fromkeys(r.distance_name for s in summaries for r in s.runs if r.distance_name))
    head = ["variant", *keys, "ε spent", "public images", "parameters", "runs", "accuracy ↑", *[f"{n} ↓" for n in names]]
    lines = [f"# {comparison.out.name}", "", NOT_PRIVATE, "", _line(head), _line(["---"] * len(head))]
    for s in summaries:
        first = s.runs[0]
        share = s.figure(lambda row: row.public_share)[0]
        cells = [s.variant, *[_value(s.settings.get(key)) for key in keys], epsilon_text(max(r.epsilon for r in s.runs))]
        cells += [f"{first.public_images:,} ({100 * (share or 0):.1f} %)", f"{first.parameters:,}", str(len(s.runs))]
        cells.append(_figure(*s.figure(accuracy), 100, ".1f", " %"))
        cells += [_figure(*s.figure(lambda row, name=name: row.metrics.get(name)), 1, ".3g", "") for name in names]
        lines.append(_line(cells))
    finished = sum(len(s.runs) for s in summaries)
    lines += ["", f"{finished} of {len(comparison.cells)} runs finished; figures are means ± standard deviations over seeds."]
    if together.ledgers > 1 and together.epsilon is not None and math.isfinite(together.epsilon):
        lines.append(
            f"All {together.ledgers} ledgers below `runs/` (unfinished and earlier runs too) as one release: "
            f"ε = {epsilon_text(together.epsilon)} at δ = {together.delta:.3g}."
        )
    elif together.ledgers > 1 and together.epsilon is not None:
        lines.append("All runs as one release have no finite ε.")
    elif together.ledgers > 1:
        lines.append("ε of all runs as one release could not be computed: a ledger below `runs/` is damaged.")
    if comparison.share_public_training and len(comparison.seeds) > 1:
        lines.append("Seeds share the public classifier and, of one subset, the pre-training: the spread leaves these out.")
    networks = {r.network for s in summaries for r in s.runs}
    if len(networks) > 1:
        lines.append(
            f"**Distances are on {len(networks)} different networks**, since seeds, public sets or classifiers differ, and "
            "cannot be compared from one to another."
        )
    states = {r.code for s in summaries for r in s.runs}
    if len(states) > 1:
        lines.append(f"The runs were made by {len(states)} different states of the package's code (`code` in results.json).")
    lines += [f"- failed: {name}: {kind}; see runs/{name}/error.txt" for name, kind in errors.items()]
    lines += [f"- not run yet: {name}" for name in open_cells]
    lines += ["", *[f"![{path.stem}]({path.name})" for path in pictures]]
    return "\n".join(lines).rstrip() + "\n"


def _kind_of(cell: Cell, error: str | None) -> str:
    """An error's class, or how its process died: what it says may name a sensitive file, and tables are passed on."""
    named = re.match(r"[A-Za-z_]\w*", error or "")
    return last_error(cell) or (named[0] if named else "an error")


def _run_record(row: Row) -> dict[str, Any]:
    return {
        "name": row.cell.name, "variant": row.cell.variant, "seed": row.cell.seed,
        "settings": {key: _plain(value) for key, value in row.cell.settings.items()}, "epsilon": _plain(row.epsilon),
        "delta": row.delta, "public_images": row.public_images, "public_share": row.public_share,
        "parameters": row.parameters, "code": row.code, "private_metrics": sorted(row.private), "metrics": dict(row.metrics),
    }  # fmt: skip


def _csv(rows: Sequence[Row]) -> str:
    records = [_run_record(row) for row in rows]
    private = {name for row in rows for name in row.private}  # a run with an infinite ε has none all the same
    flat = []
    for record in records:
        plain = {k: v for k, v in record.items() if not isinstance(v, dict | list)}
        metrics = {name if name in private else f"{name} (not private)": v for name, v in record["metrics"].items()}
        flat.append({**plain, **record["settings"], **metrics})
    columns = list(dict.fromkeys(key for r in flat for key in r))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _plain(value: Any) -> Any:
    """JSON has no infinity: it is written as the word."""
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else None
    return list(value) if isinstance(value, tuple) else value


def _figure(mean: float | None, spread: float | None, scale: float, digits: str, unit: str) -> str:
    if mean is None:
        return "n/a"
    around = f" ± {scale * spread:{digits}}" if spread is not None else ""
    return f"{scale * mean:{digits}}{around}{unit}"


def _value(value: Any) -> str:
    if value is None:
        return "–"
    return "∞" if value == math.inf else f"{value:g}" if isinstance(value, float) else str(value)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in cells) + " |"
