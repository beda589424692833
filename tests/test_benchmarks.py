"""The benchmarks run, and README's tables can be made of what they write: one tiny case each, no time is looked at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "--smoke", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
    command += [f"--benchmark-json={folder / 'all.json'}"]
    # Not from the repository: the package that is measured is the installed one.
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
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
