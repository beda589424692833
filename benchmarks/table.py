"""Tables and plots of README and docs/measured.md, from the raw results.

    python benchmarks/table.py [--results benchmarks/results] [--pages README.md docs/measured.md] [--images docs/images]

A table goes between ``<!-- table: NAME -->`` and ``<!-- end -->`` wherever these stand. Ratios are taken round by round and given
as median (quartiles), in README's short tables as medians alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def _entries(result: Entry, test: str) -> dict[str, dict[str, Entry]]:
    """Group → subject → benchmark, of one test function, in the order in which they ran."""
    groups: dict[str, dict[str, Entry]] = defaultdict(dict)
    for entry in result["benchmarks"]:
        if entry["name"].split("[")[0] == test:
            groups[entry["group"]][entry["extra_info"]["subject"]] = entry
    return dict(groups)


def _rounds(entry: Entry) -> list[float]:
    return entry["stats"]["data"]


def fastest(group: dict[str, Entry], *names: str) -> Entry:
    """Of the same thing in several layouts, the one with the smaller median."""
    return min((group[n] for n in names if n in group), key=lambda e: e["stats"]["median"])


def ratio(above: Entry, below: Entry) -> tuple[float, float, float]:
    """Median and quartiles of above/below over rounds."""
    values = [a / b for a, b in zip(_rounds(above), _rounds(below), strict=True)]
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def _cell(value: tuple[float, float, float]) -> str:
    return f"{value[0]:.2f} ({value[1]:.2f}–{value[2]:.2f})"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _source(result: Entry, link: str) -> str:
    machine, commit = result["machine_info"], result["commit_info"]
    versions = machine["versions"]
    cpu = machine["cpu"].get("brand_raw", "unknown CPU")
    waits = "".join(f", {name}={value}" for name, value in sorted(machine.get("environment", {}).items()))
    return (
        f"\n*{cpu}, {machine['threads']} threads{waits}, kernels {machine['privimage_fast']['isa']}; torch {versions['torch']}, "
        f"Opacus {versions['opacus']}, diffusers {versions['diffusers']}; {result['datetime'][:10]}, commit {commit['id'][:10]}"
        f"{' with changes' if commit['dirty'] else ''}; raw: [{Path(link).name}]({link})*"
    )


def dp_step(result: Entry) -> str:
    """One row a network and K: time ÷ plain and peak memory ÷ plain."""
    names = (("ours", ("ours", "ours-channels-last")), ("ours, lean", ("ours-lean",)))
    names += tuple((f"Opacus {way}", (f"opacus-{way}", f"opacus-{way}-channels-last")) for way in ("hooks", "ghost"))
    rows = []
    footnotes: dict[str, list[str]] = defaultdict(list)
    for name, group in _entries(result, "test_step").items():
        plain = fastest(group, "plain", "plain-channels-last")
        facts = plain["extra_info"]
        peaks = [e["extra_info"].get("peak_growth_bytes") for n, e in group.items() if n.startswith("plain")]
        base = min((peak for peak in peaks if peak), default=0)  # measured in one layout only
        row = [f"{name}, {facts['parameters'] / 1e6:.1f} M", f"{plain['stats']['median'] * 1e3:.0f} ms"]
        for title, subjects in names:
            found = [s for s in subjects if s in group]
            refusals = {s: facts["refused"][s] for s in subjects if s in facts["refused"]}
            reason = refusals.get(subjects[0], "not run")
            for subject, why in (refusals or ({} if found else {subjects[0]: reason})).items():
                if why != "no multiplicity":
                    layout = ", channels last" if subject.endswith("-channels-last") else ""
                    footnotes[f"{title}{layout}: {why}"].append(name)
            if not found:
                row.append("no multiplicity" if reason == "no multiplicity" else "refused")
                continue
            entry = fastest(group, *found)
            measured = [group[s]["extra_info"].get("peak_growth_bytes") for s in found]
            memory = next((peak for peak in measured if peak), None)  # in one layout only
            row.append(_cell(ratio(entry, plain)) + (f"; {memory / base:.2f}" if memory and base else ""))
        row[1] += f"; {base / 2**20:.0f} MiB" if base else ""
        rows.append(row)
    table = _markdown(["network, parameters", "plain: time; memory", *(f"{title} ÷ plain" for title, _ in names)], rows)
    notes = "".join(f"\n- {', '.join(cases)}: {text}" for text, cases in footnotes.items())
    return table + ("\n\nRefused:" + notes if notes else "") + "\n"


def dp_step_short(result: Entry) -> str:
    """The same in times alone: K = 1 beside Opacus, and the larger K, which Opacus does not have."""
    rows: dict[str, list[str]] = {}
    for name, group in _entries(result, "test_step").items():
        network, _, multiplicity = name.rpartition(", K=")
        plain = fastest(group, "plain", "plain-channels-last")

        def times(*subjects: str, group: dict[str, Entry] = group, plain: Entry = plain) -> str:
            found = [s for s in subjects if s in group]
            return f"{ratio(fastest(group, *found), plain)[0]:.2f}" if found else "–"

        ours = times("ours", "ours-channels-last")
        row = rows.setdefault(f"{network}, {plain['extra_info']['parameters'] / 1e6:.1f} M", ["–"] * 4)
        if multiplicity == "1":
            row[:] = [ours, row[1], *(times(f"opacus-{w}", f"opacus-{w}-channels-last") for w in ("hooks", "ghost"))]
        else:
            row[1] = f"{ours} (K = {multiplicity})"
    head = ["DP step ÷ plain step, time", "ours, K = 1", "ours, K > 1", "Opacus hooks, K = 1", "Opacus ghost, K = 1"]
    return _markdown(head, [[name, *row] for name, row in rows.items()]) + "\n"


def ops(result: Entry) -> str:
    """Weight gradients in GFLOP/s beside the peak and oneDNN; norms; the step; the weighted sum."""
    rows = []
    for group in _entries(result, "test_weight_grad").values():
        library = fastest(group, "onednn", "onednn-channels-last")
        ours = fastest(group, "ours", "ours-channels-last")

        def rate(entry: Entry) -> float:
            return entry["extra_info"]["flop"] / entry["stats"]["median"] / 1e9

        rows.append([
            ours["extra_info"]["layer"], f"{rate(ours):.0f}", f"{rate(library):.0f}", f"{rate(group['sgemm']):.0f}",
            _cell(ratio(library, ours)), _cell(ratio(group["ours-norm-only"], ours)), _cell(ratio(group["unfold-bmm"], ours)),
        ])  # fmt: skip
    head = [
        "layer, 16 rows", "ours, GFLOP/s", "oneDNN, batched", "sgemm", "oneDNN ÷ ours", "norm only ÷ ours", "unfold + bmm ÷ ours",
    ]  # fmt: skip
    text = [_markdown(head, rows)]
    rows = [
        [g["gram"]["extra_info"]["layer"], f"{g['direct']['stats']['median'] * 1e3:.2f} ms", _cell(ratio(g["gram"], g["direct"]))]
        for g in _entries(result, "test_norm").values()
    ]
    text.append(_markdown(["norms alone, 16 rows", "direct", "Gram ÷ direct"], rows))
    rows = []
    for name, group in _entries(result, "test_noise_adam_ema").items():
        ours = group["ours"]
        torch_ops = fastest(group, "torch-fused", "torch-foreach", "torch-flat")
        per_element = ours["stats"]["median"] / ours["extra_info"]["elements"] * 1e9
        rows.append([name, f"{per_element:.2f} ns an element", _cell(ratio(torch_ops, ours)), _cell(ratio(ours, group["copy"]))])
    for name, group in _entries(result, "test_weighted_sum").items():
        ours = group["ours"]
        speed = ours["extra_info"]["bytes"] / ours["stats"]["median"] / 1e9
        rows.append([name, f"{speed:.1f} GB/s", _cell(ratio(group["torch"], ours)), _cell(ratio(ours, group["copy"]))])
    text.append(_markdown(["pass over memory", "ours", "torch ops ÷ ours", "ours ÷ copy of as many elements"], rows))
    return "\n\n".join(text) + "\n"


def growth(result: Entry) -> str:
    """Time ÷ plain along each axis."""
    rows: dict[str, list[str]] = defaultdict(list)
    for axis, value, (middle, low, high) in _growth_points(result):
        rows[axis].append(f"{value}: {_cell((middle, low, high))}")
    return _markdown(["axis", "ours ÷ plain, time"], [[axis, " · ".join(cells)] for axis, cells in rows.items()]) + "\n"


def _growth_points(result: Entry) -> list[tuple[str, int, tuple[float, float, float]]]:
    points = []
    for group in _entries(result, "test_growth").values():
        ours, plain = fastest(group, "ours", "ours-channels-last"), fastest(group, "plain", "plain-channels-last")
        points.append((ours["extra_info"]["axis"], ours["extra_info"]["value"], ratio(ours, plain)))
    return points


def plot_growth(result: Entry, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes: dict[str, list[tuple[int, tuple[float, float, float]]]] = defaultdict(list)
    for axis, value, spread in _growth_points(result):
        axes[axis].append((value, spread))
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3 * len(axes), 2.6), sharey=True, squeeze=False, layout="constrained")
    for panel, (axis, points) in zip(panels[0], axes.items(), strict=True):
        values, middle = [p[0] for p in points], [p[1][0] for p in points]
        error = [[p[1][0] - p[1][1] for p in points], [p[1][2] - p[1][0] for p in points]]
        panel.errorbar(values, middle, error, marker="o", capsize=3)
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(values, [str(v) for v in values])
        panel.set_xlabel(axis)
    panels[0][0].set_ylabel("DP step ÷ plain step, time")
    panels[0][0].set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# Table → file of results, and what makes it.
TABLES: dict[str, tuple[str, Callable[[Entry], str]]] = {
    "dp_step_short": ("dp_step", dp_step_short),
    "dp_step": ("dp_step", dp_step),
    "ops": ("ops", ops),
    "growth": ("growth", growth),
}


def gpu_short(result: Entry) -> str:
    """Steps of the 3.7 M U-Net, the DP step from CUDA graphs beside the plain ones."""
    rows = []
    for k in (1, 8):
        steps = {
            row["what"].removesuffix(f", K={k}"): row for row in result["parts"].get("steps", [])
            if "median" in row and row["what"].endswith(f", K={k}")
        }  # fmt: skip
        if "DP captured" not in steps:
            continue
        ours = steps["DP captured"]
        ratios = [f"{ours['median'] / steps[n]['median']:.2f}" if n in steps else "–" for n in ("plain", "plain compiled")]
        rows.append([str(k), f"{ours['rows/s']:,.0f}", *ratios])
    head = ["K", "rows a second, DP step", "÷ the plain step's time, with the same kernels", "÷ torch.compile's plain step"]
    return _markdown(head, rows) + "\n"


def gpu(result: Entry, before: Entry | None) -> str:
    """Steps of the 3.7 M U-Net, beside what they were in an earlier run; kernels as shares of what the device reaches."""
    seconds = {row["what"]: row["median"] for row in result["parts"].get("steps", []) if "median" in row}
    earlier = {row["what"]: row for row in (before or {"parts": {}})["parts"].get("steps", [])}
    rows = []
    for row in result["parts"].get("steps", []):
        if "median" in row and "compiled model" not in row["what"]:  # which compiles nothing under the engine
            old = earlier.get(row["what"], {})
            compiled = seconds.get(f"plain compiled, {row['what'].rsplit(', ', 1)[-1]}")
            ratios = [
                f"{row['÷ plain']:.2f}" if "÷ plain" in row else "–",
                f"{row['median'] / compiled:.2f}" if compiled else "–",
            ]
            was = f"{old['rows/s']:,.0f} ({old['rows']})" if "rows/s" in old else "–"
            rows.append([row["what"], str(row["rows"]), f"{row['rows/s']:,.0f}", was, *ratios])
    table = _markdown(["step", "rows at a time", "rows/s", "earlier the same day (rows)", "÷ plain", "÷ plain compiled"], rows)
    shares = []
    for row in result["parts"].get("kernels", []):
        of = next((key for key in ("share of GEMM", "share of copy") if key in row), None)
        if of and not row["what"].endswith(
            (" stored in bfloat16", " norm only")
        ):  # as fast as those that are stored; see the JSON
            rate = f"{row['TFLOP/s']:.0f} TFLOP/s" if "TFLOP/s" in row else f"{row['GB/s']:,.0f} GB/s"
            shares.append([row["what"], rate, f"{row[of]:.2f} of {'a matrix product' if of.endswith('GEMM') else 'a copy'}"])
    return "\n\n".join([table, _markdown(["kernel", "rate", "share"], shares)]) + "\n"


def _gpu_source(result: Entry, link: str, earlier: str | None = None) -> str:
    before = f", earlier [{Path(earlier).name}]({earlier})" if earlier else ""
    return (
        f"\n*{result['device']}; torch {result['torch']}, CUDA {result['cuda']}; {result['datetime'][:10]}, commit "
        f"{(result['commit'] or 'unknown')[:10]}{' with changes' if result['dirty'] else ''}; raw: "
        f"[{Path(link).name}]({link}){before}*"
    )


# The baselines' names with the diffusion model and with the GAN.
VARIANTS = {
    "**the selected subset, class means**": ("privimage-means", "privimage-gan-means"),
    "**a subset chosen by clusters, class means**": ("privimage-clusters-means", "privimage-clusters-gan-means"),
    "a subset of as many clusters as the noise bears, class means": (
        "privimage-auto-clusters-means",
        "privimage-auto-clusters-gan-means",
    ),
    "as many public images, blindly; class means": ("random-means", "random-gan-means"),
    "all public images, class means": ("pdp-means", "pdp-gan-means"),
    "as many public labels, dealt to the classes blindly; class means": ("blind-labels-means",),
    "all public labels, dealt to the classes blindly; class means": ("all-labels-means",),
    "no public images, class means": ("dpdm-means", "dpgan-means"),
    "the selected subset (PrivImage as published)": ("privimage", "privimage-gan"),
    "a subset chosen by clusters": ("privimage-clusters", "privimage-clusters-gan"),
    "a subset of as many clusters as the noise bears": ("privimage-auto-clusters", "privimage-auto-clusters-gan"),
    "as many public images, blindly": ("random", "random-gan"),
    "all public images (PDP-Diffusion)": ("pdp-diffusion", "pdp-gan"),
    "as many public labels, dealt to the classes blindly": ("blind-labels",),
    "all public labels, dealt to the classes blindly": ("all-labels",),
    "no pre-training (DPDM, DPGAN)": ("dpdm", "dpgan"),
    "the subset, never fine-tuned": ("public-only", "public-only-gan"),
    "the clusters' subset, never fine-tuned": ("public-only-clusters", "public-only-clusters-gan"),
    "the selected subset, the same steps without noise: *not private*": ("non-private", "non-private-gan"),
    "the same with class means: *not private*": ("privimage-means, no noise", "privimage-gan-means, no noise"),
}
# Column → the grids that it is made of.
GRIDS = {
    "MNIST +D": ("mnist-cpu", "labelled-baselines-cpu"),
    "MNIST +G": ("mnist-gan-cpu",),
    "F-MNIST +D": ("fashion-cpu", "fashion-labelled-baselines-cpu"),
    "F-MNIST +G": ("fashion-gan-cpu",),
}


def grids(folder: Path) -> str:
    """Accuracy of each variant in each finished comparison at the base's ratio, at ε = 10 and 1: mean ± deviation (runs)."""
    columns: dict[str, dict[str, list[float]]] = {}
    for title, names in GRIDS.items():
        # Cells that were run later lie in folders below, or in the next grid; of one that was run again the last counts.
        paths = [p for n in names for p in (folder / n / "results.json", *sorted((folder / n).glob("*/results.json")))]
        found = [json.loads(path.read_text())["runs"] for path in paths if path.exists()]
        runs = {run["name"]: run for part in found for run in part}
        for run in runs.values():
            accuracy = next(v for key, v in run["metrics"].items() if key.startswith("accuracy, trained on synthetic, tested"))
            settings, variant, epsilon = run["settings"], run["variant"], run["settings"]["privacy.epsilon"]
            if epsilon == "inf":  # whatever it is set beside
                variant, epsilon = variant if variant.startswith("non-private") else f"{variant}, no noise", 10
            plain = {"select.max_image_ratio": 0.1, "model.preset": "small"}  # where a grid has such an axis
            usual = all(settings.get(key, value) in (None, value) for key, value in plain.items())
            if usual and accuracy is not None and epsilon in (1, 10):
                columns.setdefault(f"{title}, ε = {epsilon:g}", defaultdict(list))[variant].append(100 * accuracy)
    rows = []
    for label, variants in VARIANTS.items():
        found = [next((c[n] for n in variants if n in c), []) for c in columns.values()]
        if any(found):
            rows.append([label, *map(_mean, found)])
    return _markdown(["public images used", *columns], rows)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


class Pages:
    """The pages that tables go into, as they will be."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.texts = {path: path.read_text() for path in paths}
        self.done: list[str] = []

    def fill(self, name: str, table: str, source: Callable[..., str] | None = None, *raw: Path) -> None:
        """Writes a table between its markers; ``source(*links)`` goes under it, with links to ``raw`` from where the page is.

        Raises:
            ValueError: no page has the markers.
        """
        pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        found = [path for path, text in self.texts.items() if pattern.search(text)]
        if not found:
            raise ValueError(
                f"no '<!-- table: {name} -->' … '<!-- end -->' in {', '.join(map(str, self.texts))}; put the markers where the "
                "table should go"
            )
        for path in found:
            links = [Path(os.path.relpath(r, path.parent)).as_posix() for r in raw]
            content = table + (source(*links) + "\n" if source else "")
            self.texts[path] = pattern.sub(lambda m, content=content: m[1] + content + m[2], self.texts[path])
            self.done.append(f"{name}: table written to {path}")

    def save(self) -> None:
        for path, text in self.texts.items():
            path.write_text(text)
        print("\n".join(self.done))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--pages", type=Path, nargs="+", default=[Path("README.md"), Path("docs/measured.md")])
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    pages = Pages(options.pages)
    for name, (stem, make) in TABLES.items():
        raw = options.results / f"{stem}.json"
        if not raw.exists():
            print(f"{raw} is not there: table {name} stays as it is")
            continue
        result = json.loads(raw.read_text())
        pages.fill(name, make(result), functools.partial(_source, result), raw)
        if name == "growth":
            options.images.mkdir(parents=True, exist_ok=True)
            plot_growth(result, options.images / "growth.png")
    measured, earlier = options.results / "gpu.json", options.results / "gpu-before.json"
    if measured.exists():
        result = json.loads(measured.read_text())
        before = json.loads(earlier.read_text()) if earlier.exists() else None
        source = functools.partial(_gpu_source, result)
        pages.fill("gpu_short", gpu_short(result), source, measured)
        pages.fill("gpu", gpu(result, before), source, measured, *([earlier] if before else []))
    if (options.results / "grids").is_dir():
        pages.fill("grids", grids(options.results / "grids") + "\n")
    pages.save()


if __name__ == "__main__":
    main()
