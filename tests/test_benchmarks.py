"""The benchmarks run, and the pages' tables can be made of what they write: one tiny case each, no time is looked at."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from privimage_fast.data import ImageSet, save_npz
from privimage_fast.models.edm import EDMConfig

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "--smoke", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
    command += [f"--benchmark-json={folder / 'all.json'}"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist; the process begun here is none.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")} | {"OMP_NUM_THREADS": "1"}
    # Not from the repository: the package that is measured is the installed one.
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for name in ("dp_step", "ops", "growth"):
        shutil.copy(folder / "all.json", folder / f"{name}.json")
    return folder


def test_raw_results_say_where_they_come_from(results: Path) -> None:
    result = json.loads((results / "all.json").read_text())
    assert {"torch", "opacus", "numpy"} <= result["machine_info"]["versions"].keys()
    assert result["machine_info"]["threads"] == 1
    steps = [e for e in result["benchmarks"] if e["name"].startswith("test_step[")]
    subjects = {f"{name}{layout}" for name in ("plain", "ours") for layout in ("", "-channels-last")}
    assert {e["extra_info"]["subject"] for e in steps} == subjects | {"ours-lean", "opacus-hooks", "opacus-ghost"}
    for entry in steps:
        assert len(entry["stats"]["data"]) == entry["stats"]["rounds"] == 2
        assert min(entry["stats"]["data"]) > 0
    measured = [e["extra_info"]["peak_growth_bytes"] for e in steps if e["extra_info"]["subject"] in ("plain", "ours-lean")]
    assert measured
    assert min(measured) > 0
    refused = [e["extra_info"]["refused"] for e in steps if e["extra_info"]["multiplicity"] > 1]
    assert all(r["opacus-hooks"] == "no multiplicity" for r in refused)
    one = next(e["extra_info"]["refused"] for e in steps if e["extra_info"]["multiplicity"] == 1)
    assert set(one) == {"opacus-hooks-channels-last", "opacus-ghost-channels-last"}
    assert all("wrong gradients of channels-last" in reason for reason in one.values())


def test_tables_are_written_between_the_markers_of_both_pages(results: Path) -> None:
    pages = [results / "README.md", results / "docs" / "measured.md"]
    pages[1].parent.mkdir(exist_ok=True)
    before = [(ROOT / page.relative_to(results)).read_text() for page in pages]
    for page, text in zip(pages, before, strict=True):
        page.write_text(text)
    command = [sys.executable, str(BENCHMARKS / "table.py"), "--results", str(results)]
    command += ["--pages", *map(str, pages), "--images", str(results / "images")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("table written") == 4
    readme, measured = (page.read_text() for page in pages)
    assert "| tiny U-Net, 0.0 M | " in readme
    assert "raw: [dp_step.json](dp_step.json)" in readme
    assert "| tiny U-Net, K=1, " in measured
    assert "no multiplicity" in measured
    assert "raw: [dp_step.json](../dp_step.json)" in measured  # links lead there from where the page is
    assert "| 3→4, 3×3, 6², K=1 | " in measured
    assert "| rows | 4: " in measured
    assert (results / "images" / "growth.png").stat().st_size > 1000
    for old, new, first in zip(before, (readme, measured), ("dp_step_short", "dp_step"), strict=True):  # nothing else moved
        assert new.split(f"<!-- table: {first} -->")[0] == old.split(f"<!-- table: {first} -->")[0]
        assert new.rsplit("<!-- end -->", 1)[1] == old.rsplit("<!-- end -->", 1)[1]

    pages[1].write_text(measured.replace("<!-- table: ops -->", ""))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no '<!-- table: ops -->'" in done.stderr
    assert pages[0].read_text() == readme


def test_tables_of_a_gpu_are_of_its_file_and_of_the_one_before(tmp_path: Path) -> None:
    step = {"rows": 8, "rows/s": 100.0, "median": 0.5}
    steps = [
        {"what": "plain, K=8", **step}, {"what": "plain compiled, K=8", **step, "median": 0.8},
        {"what": "DP captured, K=8", **step, "median": 0.6, "÷ plain": 1.2},
    ]  # fmt: skip
    kernels = [{"what": "weighted sum", "GB/s": 2000, "share of copy": 0.9}]
    result = {
        "parts": {"steps": steps, "kernels": kernels}, "device": "GPU", "torch": "2", "cuda": "13", "commit": "abc",
        "dirty": False, "datetime": "2026-11-27T00:00",
    }  # fmt: skip
    for name in ("gpu", "gpu-before"):
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    page.write_text("<!-- table: gpu_short -->\n<!-- end -->\n<!-- table: gpu -->\n<!-- end -->\n")
    command = [sys.executable, str(BENCHMARKS / "table.py"), "--results", str(tmp_path), "--pages", str(page)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    text = page.read_text()
    assert "| 8 | 100 | 1.20 | 0.75 |" in text
    assert "| DP captured, K=8 | 8 | 100 | 100 (8) | 1.20 | 0.75 |" in text
    assert "| weighted sum | 2,000 GB/s | 0.90 of a copy |" in text
    assert text.count("[gpu.json](gpu.json)") == 2 and text.count("[gpu-before.json](gpu-before.json)") == 1


def on_public_images(script: str, sets: dict[str, int], folder: Path, *options: str) -> dict[str, Any]:
    """What a script writes that takes public sets by the options named here, each with images of its own seed."""
    command = [sys.executable, str(BENCHMARKS / script), "--resolution", "8", "--out", str(folder / "out.json"), *options]
    for option, seed in sets.items():
        images = np.random.default_rng(seed).integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
        path = folder / f"set-{seed}.npz"
        save_npz(ImageSet(images, np.arange(60) % 3, ("a", "b", "c"), name="public"), path)
        command += [option, str(path)]
    subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def test_what_is_signal_in_a_step_is_measured_on_public_images(tmp_path: Path) -> None:
    options = ["--patch", "1", "--training", "2", "--population", "600", "--epsilon", "10"]
    found = on_public_images("multiplicity.py", {"--public": 0, "--stand-in": 1}, tmp_path, *options)
    assert [(r["training"], r["multiplicity"]) for r in found["signal"]] == [
        (when, k) for when in ("before", "after") for k in (1, 2, 4, 8, 16)
    ]
    for row in found["signal"]:
        assert 0 <= row["signal"] <= 1 + 1e-6 and row["median norm"] > 0 and row["images"] == 30
    assert {(n["steps"], n["batch"]) for n in found["noise"]["10"]} == {(s, 512) for s in (150, 300, 600, 1200)}
    assert all(n["noise"] == n["sigma"] * found["parameters"] ** 0.5 / n["batch"] for n in found["noise"]["10"])


def test_the_signal_is_that_of_the_mean_and_not_of_its_scatter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that point anywhere have a mean of some length, here 1/√640, and no signal; of those that agree all is signal.

    Of many repetitions the squares lie around 0, as far as the error says.
    """
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    multiplicity = importlib.import_module("multiplicity")
    images, labels, draws = torch.zeros(640, 1, 8, 8), torch.zeros(640, dtype=torch.int64), torch.Generator().manual_seed(0)
    model, together = SimpleNamespace(edm=EDMConfig(), num_classes=1), 0.0

    def clipped(module: Any, loss: Any, args: Any, *, max_grad_norm: float, multiplicity: int) -> Any:
        each = torch.randn(len(args[0]), 400, generator=draws) * (1 - together) + together
        each = each / each.norm(dim=1, keepdim=True) * max_grad_norm
        return SimpleNamespace(grads={"w": each.sum(0)}, norms=torch.ones(len(each)))

    monkeypatch.setattr(multiplicity, "clipped_grad", clipped)
    found = [multiplicity.signal(model, images, labels, 1) for _ in range(40)]
    # Half of them at 0: a square below it has no root. The plain mean's length is never below 0.03.
    assert 8 <= sum(f["signal"] == 0 for f in found) <= 32
    assert max(f["signal"] for f in found) < 0.03
    errors = np.array([f["error of its square"] for f in found])
    assert np.median(errors) == pytest.approx(np.sqrt(2 / 400) / 640 * np.sqrt(8 / 7), rel=0.4)
    together = 1.0
    assert multiplicity.signal(model, images, labels, 1)["signal"] == pytest.approx(1, rel=1e-4)


def test_preconditioning_is_compared_on_public_images(tmp_path: Path) -> None:
    runs = on_public_images("preconditioning.py", {"--images": 0}, tmp_path, "--minutes", "0.001", "--seeds", "1")["runs"]
    assert [run["variant"] for run in runs][:1] == ["published"] and len({run["variant"] for run in runs}) == len(runs) == 6
    for run in runs:
        assert run["steps"] >= 1 and math.isfinite(run["energy distance"])
        assert all(error > 0 for error in run["mean squared error"].values())


def test_the_table_takes_the_faster_layout_and_says_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    table = importlib.import_module("table")
    seconds = {
        "plain": 1.0, "plain-channels-last": 2.0, "ours": 3.0, "ours-channels-last": 1.5, "ours-lean": 2.0,
        "opacus-hooks": 6.0, "opacus-ghost": 8.0,
    }  # fmt: skip
    entries = [
        {
            "name": "test_step[x]", "group": "net, K=1", "stats": {"data": [s, s], "median": s},
            "extra_info": {"subject": name, "parameters": 10**6, "refused": {"opacus-ghost-channels-last": "wrong"}},
        } for name, s in seconds.items()
    ]  # fmt: skip
    lines = table.dp_step({"benchmarks": entries}).splitlines()
    cells = [f"{v:.2f} ({v:.2f}–{v:.2f})" for v in (1.5, 2.0, 6.0, 8.0)]
    assert lines[-1] == "- net, K=1: Opacus ghost, channels last: wrong"
    assert lines[2] == f"| net, K=1, 1.0 M | 1000 ms | {' | '.join(cells)} |"
    more = [entry | {"group": "net, K=8"} for entry in entries if not entry["extra_info"]["subject"].startswith("opacus")]
    short = table.dp_step_short({"benchmarks": [*more, *entries]}).splitlines()  # in one row, whichever ran first
    assert short[2:] == ["| net, 1.0 M | 1.50 | 1.50 (K = 8) | 6.00 | 8.00 |"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_gradients_count_as_growth_for_every_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours has its buffer before the first reading, the others allocate gradients in the step: both are 4 bytes a parameter."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cases, subjects, memory = (importlib.import_module(name) for name in ("cases", "subjects", "memory"))
    case = cases.Case("tiny ViT", 1, rows=4)
    size = 4 * cases.parameters(case.build().model)
    for name in ("plain", "ours", "ours-channels-last", "ours-lean", "opacus-hooks"):
        make = subjects.SUBJECTS[name]
        assert getattr(make(case, None, 2**26), "gradient_bytes", 0) == (size if name.startswith("ours") else 0)

    def step() -> None:
        pass

    step.gradient_bytes = 1 << 30  # type: ignore[attr-defined]
    monkeypatch.setitem(subjects.SUBJECTS, "still", lambda case, built, budget: step)
    assert 1 << 30 <= memory._measure(case, "still", None) < (1 << 30) + (1 << 24)


def test_a_lean_step_has_the_budget_less_its_sum_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cases, subjects = (importlib.import_module(name) for name in ("cases", "subjects"))
    given, make = [], subjects.PrivateOptimizer

    def made(*arguments: Any, **options: Any) -> Any:
        given.append(options["memory_budget"])
        return make(*arguments, **options)

    monkeypatch.setattr(subjects, "PrivateOptimizer", made)
    case = cases.Case("tiny ViT", 1, rows=4)
    for name in ("ours-lean", "ours"):
        subjects.SUBJECTS[name](case, None, 2**26)
    assert given == [2**26 - 4 * cases.parameters(case.build().model), None]


def test_comparisons_are_means_over_seeds_at_the_ratio_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    table = importlib.import_module("table")

    def run(variant: str, accuracy: float, epsilon: float | str = 10.0, ratio: float | None = 0.1, preset: str = "small") -> Any:
        settings = {"privacy.epsilon": epsilon, "select.max_image_ratio": ratio, "model.preset": preset}
        metrics = {"accuracy, trained on synthetic, tested on real": accuracy, "Fréchet distance FD-x": 3.0}
        return {"name": str(next(number)), "variant": variant, "settings": settings, "metrics": metrics}

    number = itertools.count()
    runs = [run("privimage", 0.5), run("privimage", 0.6), run("privimage", 0.99, ratio=0.01), run("privimage", 0.3, epsilon=1.0)]
    runs += [run("pdp-diffusion", 0.2, ratio=None), run("non-private", 0.7, epsilon="inf")]
    runs += [run("privimage-means", 0.81, epsilon="inf"), run("privimage-means", 0.99, preset="base")]
    (tmp_path / "mnist-cpu").mkdir()
    (tmp_path / "mnist-cpu" / "results.json").write_text(json.dumps({"runs": runs}))
    (tmp_path / "mnist-cpu" / "later").mkdir()  # one cell more, and one that was run again
    later = [run("random", 0.4), runs[3] | {"metrics": run("privimage", 0.35)["metrics"]}]
    (tmp_path / "mnist-cpu" / "later" / "results.json").write_text(json.dumps({"runs": later}))
    (tmp_path / "labelled-baselines-cpu").mkdir()  # another grid of the same column
    (tmp_path / "labelled-baselines-cpu" / "results.json").write_text(json.dumps({"runs": [run("blind-labels", 0.25)]}))
    assert table.grids(tmp_path).splitlines() == [
        "| public images used | MNIST +D, ε = 10 | MNIST +D, ε = 1 |",
        "| --- | --- | --- |",
        "| the selected subset (PrivImage as published) | 55.0 ± 7.1 | 35.0 |",
        "| as many public images, blindly | 40.0 | – |",
        "| all public images (PDP-Diffusion) | 20.0 | – |",
        "| as many public labels, dealt to the classes blindly | 25.0 | – |",
        "| the selected subset, the same steps without noise: *not private* | 70.0 | – |",
        "| the same with class means: *not private* | 81.0 | – |",
    ]
