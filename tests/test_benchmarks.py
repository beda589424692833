"""The benchmarks run, and README's tables can be made of what they write: one tiny case each, no time is looked at."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    assert {e["extra_info"]["subject"] for e in steps} >= {"plain", "ours", "ours-lean", "opacus-hooks"}
    for entry in steps:
        assert len(entry["stats"]["data"]) == entry["stats"]["rounds"] == 2
        assert min(entry["stats"]["data"]) > 0
    measured = [e["extra_info"]["peak_growth_bytes"] for e in steps if e["extra_info"]["subject"] in ("plain", "ours-lean")]
    assert measured
    assert min(measured) > 0
    refused = [e["extra_info"]["refused"] for e in steps if e["extra_info"]["multiplicity"] > 1]
    assert all(r["opacus-hooks"] == "no multiplicity" for r in refused)


def test_tables_are_written_between_the_markers_of_the_readme(results: Path) -> None:
    readme = results / "README.md"
    before = (ROOT / "README.md").read_text()
    readme.write_text(before)
    command = [sys.executable, str(BENCHMARKS / "table.py"), "--results", str(results)]
    command += ["--readme", str(readme), "--images", str(results / "images")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("table written") == 3
    page = readme.read_text()
    assert "| tiny U-Net, K=1, " in page
    assert "no multiplicity" in page
    assert "| 3→4, 3×3, 6², K=1 | " in page
    assert "| rows | 4: " in page
    assert (results / "images" / "growth.png").stat().st_size > 1000
    # Nothing outside the markers moved.
    assert page.split("<!-- table: dp_step -->")[0] == before.split("<!-- table: dp_step -->")[0]
    assert page.rsplit("<!-- end -->", 1)[1] == before.rsplit("<!-- end -->", 1)[1]

    readme.write_text(page.replace("<!-- table: ops -->", ""))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    assert "no '<!-- table: ops -->'" in done.stderr


def test_comparisons_are_means_over_seeds_at_the_ratio_of_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    table = importlib.import_module("table")

    def run(variant: str, accuracy: float, epsilon: float | str = 10.0, ratio: float | None = 0.1) -> dict[str, Any]:
        settings = {"privacy.epsilon": epsilon, "select.max_image_ratio": ratio}
        metrics = {"accuracy, trained on synthetic, tested on real": accuracy, "Fréchet distance FD-x": 3.0}
        return {"variant": variant, "settings": settings, "metrics": metrics}

    runs = [run("privimage", 0.5), run("privimage", 0.6), run("privimage", 0.99, ratio=0.01), run("privimage", 0.3, epsilon=1.0)]
    runs += [run("pdp-diffusion", 0.2, ratio=None), run("non-private", 0.7, epsilon="inf")]
    (tmp_path / "mnist-cpu").mkdir()
    (tmp_path / "mnist-cpu" / "results.json").write_text(json.dumps({"runs": runs}))
    assert table.grids(tmp_path).splitlines() == [
        "| public images used | MNIST +D, ε = 10 | MNIST +D, ε = 1 |",
        "| --- | --- | --- |",
        "| the selected subset (PrivImage as published) | 55.0 ± 7.1 | 30.0 |",
        "| all public images (PDP-Diffusion) | 20.0 | – |",
        "| the subset, no noise: *not private* | 70.0 | – |",
    ]
