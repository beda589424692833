"""Everything there is to check and measure on a GPU, in parts, within ten minutes.

    python benchmarks/gpu.py                              # all parts; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --parts ceilings,kernels     # some of them
    python benchmarks/gpu.py --parts job --job-share 1    # the whole job instead of a tenth of it
    python benchmarks/gpu.py --rehearse                   # toy sizes on the CPU: runs the script's code, measures nothing

Run it from a source checkout, with the package installed or built for the GPU. Figures compare only inside one run: read
the shares and ratios. Each part is a process of its own, with its own time: what one breaks or hangs leaves the others alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from gpu_checks import every_kernel
from gpu_machine import ROOT, Machine, Row, provenance
from gpu_parts import PARTS

from privimage_fast import ops

# Seconds a part may take; together the ten minutes. One that ends early leaves its rest to the later ones.
SECONDS = {
    "tests": 110, "ceilings": 25, "kernels": 50, "steps": 135, "profile": 25, "memory": 40, "sampling": 40, "job": 105,
    "sanitize": 50, "build": 20,
}  # fmt: skip
# What a part needs besides torch and numpy: module → package. A machine without network may have neither.
_DRAWING = {"safetensors": "safetensors", "PIL": "pillow", "tqdm": "tqdm"}
NEEDS: dict[str, dict[str, str]] = {
    "tests": {"pytest": "pytest", "hypothesis": "hypothesis", "scipy": "scipy", **_DRAWING},
    "sampling": _DRAWING,
    "job": {"jsonargparse": "jsonargparse", "dp_accounting": "dp-accounting", "scipy": "scipy", "yaml": "pyyaml", **_DRAWING},
}  # fmt: skip
ROW = "row: "  # begins a line that a part's process has for the script

# (part, beginning of the row's name, key): goal, and whether more is better.
GOALS: dict[tuple[str, str, str], tuple[float, bool]] = {
    ("steps", "DP captured, K=8", "÷ plain"): (1.10, False),
    ("steps", "DP captured, K=1", "÷ plain"): (1.25, False),
    ("steps", "DP captured, K=8", "rows/s"): (25_000, True),
    ("kernels", "conv 3×3 64→64 32×32 K=8 bfloat16 stored", "share of GEMM"): (0.60, True),
    ("kernels", "conv 3×3 128→128 32×32 K=8 bfloat16 stored", "share of GEMM"): (0.60, True),
    ("kernels", "conv 3×3 256→256 32×32 K=8 bfloat16 stored", "share of GEMM"): (0.60, True),
    ("kernels", "noise + Adam + EMA", "share of copy"): (0.80, True),
    ("memory", "U-Net of", "GiB"): (10, False),
    ("job", "the whole job", "of the whole"): (600, False),
}


def goals(part: str, row: Row) -> dict[str, str]:
    """The goals that a row has, beside what was reached: 1 is reached, more is better."""
    found = {}
    for (of, name, key), (goal, more) in GOALS.items():
        value = row.get(key)
        if of == part and row["what"].startswith(name) and isinstance(value, int | float) and value > 0:
            share = value / goal if more else goal / value
            found[key] = f"{value:.4g}, goal {'≥' if more else '≤'} {goal:g}, share of goal {share:.2f}"
    return found


def line(row: Row, reached: dict[str, str]) -> str:
    cells = []
    for key, value in row.items():
        if key != "what":
            shown = f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)
            cells.append(f"{key} {reached.get(key, shown)}")
    return f"{row['what']}: " + ", ".join(cells)


def run_part(name: str, seconds: float, options: argparse.Namespace) -> list[Row]:
    """Rows of a part, printed as they come; what it had measured stays when it fails or its time is up."""
    command = [sys.executable, __file__, "--child", name, "--seconds", f"{seconds:.0f}", "--job-share", str(options.job_share)]
    rows: list[Row] = []
    errors: list[str] = []
    late = threading.Event()
    process = subprocess.Popen(
        [*command, *(["--rehearse"] if options.rehearse else [])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None

    def stop() -> None:
        """The part and what it has started: a left-over test run would disturb the parts to come."""
        late.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(seconds, stop)
    reader = threading.Thread(target=lambda: errors.extend(process.stderr), daemon=True)
    timer.start()
    reader.start()
    try:
        for text in process.stdout:
            if text.startswith(ROW):
                row = json.loads(text.removeprefix(ROW))
                reached = goals(name, row)
                rows[:] = [r for r in rows if r["what"] != row["what"]]  # measured once more: with fewer rows, see `steps`
                rows.append(row | ({"goals": reached} if reached else {}))
                print(line(row, reached), flush=True)
        process.wait()
    except BaseException:
        stop()
        raise
    finally:
        timer.cancel()
    reader.join(5)
    if process.returncode:
        why = f"not finished in {seconds:.0f} s" if late.is_set() else "".join(errors)[-800:].strip()
        rows.append({"what": name, "failed": why or f"exit status {process.returncode}"})
        print(line(rows[-1], {}), flush=True)
    return rows


def missing(parts: Sequence[str]) -> dict[str, list[str]]:
    """Part → packages that it needs and that are not installed."""
    found = {part: [p for module, p in NEEDS.get(part, {}).items() if importlib.util.find_spec(module) is None] for part in parts}
    return {part: packages for part, packages in found.items() if packages}


def child(name: str, machine: Machine, share: float) -> None:
    part = PARTS[name]
    for row in part(machine, share) if name == "job" else part(machine):
        print(ROW + json.dumps(row, default=str), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/gpu.json, or build/)")
    parser.add_argument("--minutes", type=float, default=10, help="for all parts together (default: 10)")
    parser.add_argument("--job-share", type=float, default=0.1, help="share of the job's steps and samples (default: 0.1)")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes on the CPU; its figures mean nothing")
    parser.add_argument("--every-kernel", action="store_true", help=argparse.SUPPRESS)  # what compute-sanitizer watches
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=600, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    wanted = [p.strip() for p in options.parts.split(",") if p.strip()]
    unknown = [p for p in wanted if p not in PARTS]
    if unknown:
        parser.error(f"--parts: no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not 0 < options.job_share <= 1:
        parser.error(f"--job-share is {options.job_share}, expected more than 0 and at most 1")
    if not options.rehearse and not torch.cuda.is_available():
        print(
            "gpu.py: torch finds no GPU, so nothing was measured; --rehearse runs the script at toy sizes on the CPU",
            file=sys.stderr,
        )
        return 2
    info = ops.build_info()
    if not options.rehearse and not info.cuda_built:
        print(f"gpu.py: this build has no CUDA kernels ({info.cuda_status}); build with PRIVIMAGE_CUDA=1", file=sys.stderr)
        return 2
    machine = Machine(torch.device("cpu" if options.rehearse else "cuda"), options.rehearse, options.seconds)
    if options.every_kernel:
        every_kernel(machine)
        return 0
    if options.child:
        child(options.child, machine, options.job_share)
        return 0
    # What means nothing is not left among the results.
    out = options.out or (ROOT / "build" / "gpu.json" if options.rehearse else ROOT / "benchmarks" / "results" / "gpu.json")
    end = time.perf_counter() + 60 * options.minutes
    results: dict[str, Any] = {
        "rehearsal": options.rehearse, **provenance(sys.argv[1:] if argv is None else argv), "device": info.cuda_device,
        "torch": torch.__version__, "cuda": torch.version.cuda, "triton": importlib.util.find_spec("triton") is not None,
        "build": asdict(info), "parts": {},
    }  # fmt: skip

    def write() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")

    absent = missing(wanted)
    for part, packages in absent.items():
        results["parts"][part] = [{"what": part, "skipped": f"not installed: {', '.join(packages)}"}]
        print(f"Skipped: {part} needs {', '.join(packages)}; pip install {' '.join(packages)}", flush=True)
    wanted = [part for part in wanted if part not in absent]
    write()
    for i, name in enumerate(wanted):
        left = end - time.perf_counter()
        later = sum(SECONDS[n] for n in wanted[i + 1 :])
        print(f"\n## {name}", flush=True)
        if left < 5:
            results["parts"][name] = [{"what": name, "failed": "not started: out of time"}]
            print(line(results["parts"][name][0], {}), flush=True)
        else:
            results["parts"][name] = run_part(name, min(left, max(SECONDS[name], left - later)), options)
        write()
    if absent:
        print(f"\nSkipped, for want of packages: {', '.join(absent)}")
    failed = [f"{name}: {row['what']}" for name, rows in results["parts"].items() for row in rows if "failed" in row]
    if failed:
        print("\nFailed: " + "; ".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
