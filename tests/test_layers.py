"""Imports run one way: csrc → ops → dp → models → stages → pipeline → cli; data and accounting know no torch model code."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import privimage_fast

ROOT = Path(privimage_fast.__file__).parent
# Layer → layers it may import (its own always). `report` reads files of a run; `config` composes the stages' dataclasses.
ALLOWED = {
    "ops": set(),
    "dp": {"ops"},
    "utils": {"dp"},  # these two: import paths for scripts written for Opacus
    "validators": {"dp"},
    "progress": set(),
    "data": {"progress"},
    "models": {"dp", "ops", "progress"},
    "stages": {"models", "data", "dp", "ops", "progress"},
    "report": {"data", "dp"},
    "config": {"stages", "models"},
    "planning": {"config", "stages", "models", "dp"},
    "opening": {"planning", "config", "stages", "data", "dp"},
    "pipeline": {"opening", "planning", "config", "report", "stages", "models", "data", "dp", "ops"},
    "method": {"pipeline", "opening", "planning", "config", "stages", "models", "data"},
    "compare": {"pipeline", "opening", "planning", "config", "report", "stages", "data", "dp"},
    "cli": {"compare", "pipeline", "config", "report", "stages", "data", "dp", "ops"},
    "__main__": {"cli"},
}
# The first things to read are the last to import: accounting and the ledger work without torch, data without models.
NO_TORCH = ["dp.accounting", "dp.ledger", "dp.sampling", "dp.noise", "data", "report"]


def imported(path: Path) -> set[str]:
    """First component below the package of everything imported, lazily or not."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "privimage_fast":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{path}: relative imports hide the layer")
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("privimage_fast.")}
    return found - {"__version__", "_C"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_runs_back(path: Path) -> None:
    layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if layer == "__init__":
        return  # the lazy exports
    assert layer in ALLOWED, f"{path} belongs to no layer"
    assert imported(path) <= ALLOWED[layer] | {layer}


@pytest.mark.parametrize("module", NO_TORCH)
def test_imports_no_torch(module: str) -> None:
    code = f"import sys, privimage_fast.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_native_code_includes_no_torch_header_and_one_file_knows_pybind() -> None:
    sources = [p for p in (Path(__file__).parents[1] / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"}]
    assert sources
    for path in sources:
        text = path.read_text()
        assert "torch/" not in text and "ATen" not in text, path
        assert ("pybind11" in text) == (path.name == "bindings.cpp"), path
