"""Prints ratios to the plain step from a pytest-benchmark JSON file, as a Markdown table.

python benchmarks/table.py benchmarks/results/dp_step.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict


def table(path: str) -> str:
    """One row a group: median of each subject divided by the plain median, with the quartiles of its own rounds."""
    with open(path) as handle:
        result = json.load(handle)
    groups: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for entry in result["benchmarks"]:
        groups[entry["group"]][entry["name"].split("[")[0].removeprefix("test_")] = entry["stats"]
    subjects = sorted({name for group in groups.values() for name in group} - {"plain"})
    lines = [
        "| network | plain step | " + " | ".join(f"{s} ÷ plain" for s in subjects) + " |",
        "|---" * (len(subjects) + 2) + "|",
    ]
    for name, group in sorted(groups.items()):
        plain = group["plain"]["median"]
        cells = [
            f"{group[s]['median'] / plain:.2f} ({group[s]['q1'] / plain:.2f}–{group[s]['q3'] / plain:.2f})" if s in group else "–"
            for s in subjects
        ]
        lines.append(f"| {name} | {plain * 1e3:.1f} ms | " + " | ".join(cells) + " |")
    machine = result["machine_info"]["cpu"]
    lines.append(
        f"\n{machine.get('brand_raw', 'unknown CPU')}, {result['datetime'][:10]}, commit {result['commit_info']['id'][:10]}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
