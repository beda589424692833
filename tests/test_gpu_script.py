"""benchmarks/gpu.py runs through: at toy sizes here, so that the one run on a GPU is not its first."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
pytestmark = pytest.mark.skipif(not SCRIPT.is_file(), reason="not a source checkout")


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("gpu")


def rows_of(gpu: Any, part: str, capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """What a part's own process would hand over."""
    gpu.child(part, gpu.Machine(torch.device("cpu"), True), 0.5)
    rows = [json.loads(line.removeprefix(gpu.ROW)) for line in capsys.readouterr().out.splitlines() if line.startswith(gpu.ROW)]
    assert rows and not any("failed" in row for row in rows), rows
    return {row["what"]: row for row in rows}


@pytest.mark.parametrize(
    ("part", "row", "key"),
    [
        ("sanitize", "compute-sanitizer", "result"), ("ceilings", "copy", "GB/s"),
        ("kernels", "noise + Adam + EMA", "share of copy"),
        ("kernels", "conv 3×3 64→64 32×32 K=8 bfloat16 stored", "share of GEMM"),
        ("memory", "U-Net of 0 M parameters, logical batch 4, K=8", "seconds"), ("sampling", "bfloat16", "images/s"),
        ("profile", "DP, K=8, 1", "ms"),
    ],
)  # fmt: skip
def test_a_part_measures_something(gpu: Any, part: str, row: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows_of(gpu, part, capsys)[row][key]
    assert isinstance(found, str) or (math.isfinite(found) and found > 0)


def test_every_kernel_is_sanitized(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ops, called = importlib.import_module("privimage_fast.ops"), set()
    names = {*ops._OP_NAMES, "conv_clipped_sum", "linear_clipped_sum"} - {"chacha20_block", "gaussian_noise"}

    def counted(name: str, op: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            called.add(name)
            return op(*args, **options)

        return call

    for name in names:
        monkeypatch.setattr(ops, name, counted(name, getattr(ops, name)))
    importlib.import_module("gpu_checks").every_kernel(gpu.Machine(torch.device("cpu"), True))
    assert called == names


def test_steps_compare_every_kind(gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(gpu, "steps", capsys)
    kinds = ("plain", "DP", "DP captured")
    assert list(rows) == [f"{kind}, K={k}" for k in (8, 1) for kind in kinds]
    for k in (8, 1):
        assert "÷ plain" not in rows[f"plain, K={k}"]
        for kind in kinds[1:]:
            row = rows[f"{kind}, K={k}"]
            assert row["÷ plain"] == pytest.approx(row["median"] / rows[f"plain, K={k}"]["median"])
            assert row["rows"] == 4 * k
            assert row["rows/s"] == pytest.approx(4 * k / row["median"])


def test_too_many_rows_for_one_step_are_too_many_for_all(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = sys.modules["gpu_parts"]
    step = parts._step

    def short_of_memory(machine: Any, kind: str, k: int, samples: int) -> Any:
        if kind == "DP captured" and k == 8 and samples > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return step(machine, kind, k, samples)

    monkeypatch.setattr(parts, "_step", short_of_memory)
    monkeypatch.setattr(parts, "STEPS", ("plain", "DP", "DP captured"))
    gpu.child("steps", gpu.Machine(torch.device("cpu"), True), 0.5)
    rows = [json.loads(line.removeprefix(gpu.ROW)) for line in capsys.readouterr().out.splitlines()]
    assert not any("failed" in row for row in rows)
    assert [row for row in rows if "out of memory at" in row] == [
        {"what": "DP captured, K=8", "out of memory at": at, "all repeated with": at // 2} for at in (32, 16)
    ]
    assert [row["rows"] for row in rows if row["what"] == "plain, K=8"] == [32, 16, 8]
    last = {row["what"]: row for row in rows}
    assert [last[f"{kind}, K=8"]["rows"] for kind in parts.STEPS] == [8, 8, 8]
    assert [last[f"{kind}, K=1"]["rows"] for kind in parts.STEPS] == [4, 4, 4]
    assert last["DP captured, K=8"]["÷ plain"] == last["DP captured, K=8"]["median"] / last["plain, K=8"]["median"]


@pytest.mark.parametrize(("gib", "samples"), [(120, 512), (78, 256), (20, 64), (0, 1), (None, 512)])
def test_rows_are_as_many_as_fit(gpu: Any, monkeypatch: pytest.MonkeyPatch, gib: int | None, samples: int) -> None:
    """A step that takes 1 GiB and 0.18 a sample: 93 GiB for 512."""
    parts = sys.modules["gpu_parts"]
    monkeypatch.setattr(parts, "_peak", lambda machine, k, n: int((1 + 0.18 * n) * 2**30))
    monkeypatch.setattr(parts.Machine, "free_bytes", lambda self: None if gib is None else gib * 2**30)
    assert parts._fitting(gpu.Machine(torch.device("cpu"), True), 8, 512) == samples


def test_a_part_whose_packages_are_missing_is_skipped_and_says_what_to_install(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "NEEDS", {"job": {"no_such_module": "no-such-package", "json": "json"}})
    out = tmp_path / "gpu.json"
    assert gpu.main(["--rehearse", "--parts", "job,ceilings", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Skipped: job needs no-such-package; pip install no-such-package\n") and "## job" not in shown
    assert shown.endswith("Skipped, for want of packages: job\n")
    parts = json.loads(out.read_text())["parts"]
    assert parts["job"] == [{"what": "job", "skipped": "not installed: no-such-package"}]
    assert [row["what"] for row in parts["ceilings"]] == ["bf16 GEMM", "copy"]


@pytest.mark.parametrize("part", ["sampling", "steps", pytest.param("job", marks=pytest.mark.slow)])
def test_a_part_needs_no_other_packages(part: str) -> None:
    """Fails if NEEDS leaves out what a bare machine lacks."""
    code = (
        "import sys\n"
        f"sys.path.insert(0, {str(SCRIPT.parent)!r})\n"
        "installed = 'opacus mlxtend matplotlib sklearn jsonargparse dp_accounting scipy yaml safetensors PIL hypothesis'\n"
        "import torch, gpu\n"
        f"for name in set(installed.split()) - set(gpu.NEEDS.get({part!r}, ())): sys.modules[name] = None\n"
        f"gpu.child({part!r}, gpu.Machine(torch.device('cpu'), True), 1.0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and '"failed"' not in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("job", ["query", "select", "pretrain", "warmup", "finetune", "sample", "the whole job"]), ("tests", ["pytest"]),
        ("build", ["runtime.cu", "clip_factors.cu"]),
    ],
)  # fmt: skip
def test_a_longer_part_runs(gpu: Any, part: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if part == "build" and gpu.PARTS["build"].__globals__["shutil"].which("nvcc") is None:
        pytest.skip("no nvcc")
    rows = rows_of(gpu, part, capsys)
    assert set(names) == set(rows)
    if part == "job":
        parts = [row["of the whole"] for name, row in rows.items() if name != "the whole job"]
        assert rows["the whole job"]["of the whole"] == pytest.approx(sum(parts))
        assert rows["finetune"]["of the whole"] == pytest.approx(2 * rows["finetune"]["seconds"])  # half of it was run


def test_a_part_that_breaks_or_hangs_leaves_the_others(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is a process of its own: here a script in the place of the part's."""
    script = tmp_path / "part.py"
    script.write_text(
        "import sys, time, os\n"
        "name = sys.argv[sys.argv.index('--child') + 1]\n"
        f'print(\'{gpu.ROW}\' + \'{{"what": "first", "share of copy": 0.4}}\', flush=True)\n'
        f'print(\'{gpu.ROW}\' + \'{{"what": "first", "share of copy": 0.5}}\', flush=True)\n'
        "if name == 'kernels': sys.exit('CUDA error: an illegal memory access was encountered')\n"
        "if name == 'steps': time.sleep(60)\n".replace("{{", "{").replace("}}", "}")
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "SECONDS", {**dict.fromkeys(gpu.SECONDS, 4), "memory": 12})
    out = tmp_path / "gpu.json"
    arguments = ["--rehearse", "--parts", "ceilings,kernels,steps,memory", "--out", str(out), "--minutes", "0.4"]
    assert gpu.main(arguments) == 1
    parts = json.loads(out.read_text())["parts"]
    assert [row["what"] for row in parts["ceilings"]] == ["first"] == [row["what"] for row in parts["memory"]]
    assert parts["memory"][0]["share of copy"] == 0.5  # of two rows of one name the later
    assert "illegal memory access" in parts["kernels"][1]["failed"] and "not finished in" in parts["steps"][1]["failed"]
    assert "Failed: kernels: kernels; steps: steps" in capsys.readouterr().out


def test_one_measurement_that_fails_leaves_the_others_of_its_part(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = sys.modules["gpu_parts"]
    step = parts._step
    monkeypatch.setattr(parts, "_step", lambda machine, kind, *a: 1 / 0 if kind == "DP" else step(machine, kind, *a))
    gpu.child("steps", gpu.Machine(torch.device("cpu"), True), 0.5)
    shown = capsys.readouterr().out
    assert '"what": "DP, K=8", "failed": "ZeroDivisionError' in shown
    assert '"what": "DP captured, K=8", "rows": 32, "rows/s"' in shown


def test_goals_stand_beside_what_was_reached(gpu: Any) -> None:
    found = gpu.goals("steps", {"what": "DP captured, K=8", "÷ plain": 1.375, "rows/s": 50_000.0})
    assert found == {"÷ plain": "1.375, goal ≤ 1.1, share of goal 0.80", "rows/s": "5e+04, goal ≥ 25000, share of goal 2.00"}
    assert gpu.goals("steps", {"what": "DP, K=8", "÷ plain": 1.0}) == {}
    assert gpu.goals("memory", {"what": "U-Net of 80 M", "GiB": 8.0})["GiB"].endswith("share of goal 1.25")
    assert {part for part, _, _ in gpu.GOALS} <= set(gpu.PARTS) == set(gpu.SECONDS) and sum(gpu.SECONDS.values()) <= 600


def test_a_process_for_each_part(tmp_path: Path) -> None:
    done = _run("--rehearse", "--parts", "ceilings", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["rehearsal"] and list(written["parts"]) == ["ceilings"]
    assert "## ceilings\nbf16 GEMM: TFLOP/s" in done.stdout


def test_what_does_not_exist_is_refused() -> None:
    done = _run("--parts", "ceilings,kernel")
    assert done.returncode == 2 and "no part is called kernel; there are tests, ceilings" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = _run("--parts", "ceilings")
    assert done.returncode == 2 and "torch finds no GPU, so nothing was measured" in done.stderr
