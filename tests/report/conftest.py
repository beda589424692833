"""A run folder as the stages leave it, with a real ledger and a handful of small files."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from privimage_fast.dp.accounting import DPSGDEvent, GaussianEvent
from privimage_fast.dp.ledger import Ledger

DELTA, POPULATION, SIGMA, QUERY_SIGMA, RATE, STEPS = 1e-4, 1000, 2.0, 8.0, 0.1, 5


def write_ledger(path: Path, *, steps: int = STEPS, sigma: float = SIGMA, target: float | None = 10.0, **options: Any) -> None:
    with Ledger(path, target_epsilon=target, delta=DELTA, population=POPULATION, **options) as ledger:
        ledger.charge(GaussianEvent(QUERY_SIGMA), stage="query")
        for _ in range(steps):
            ledger.charge(DPSGDEvent(sigma, RATE), stage="finetune")


@cache
def ledger_bytes(**options: Any) -> bytes:
    """Each charge against a target costs a composition, so equal ledgers are written once."""
    with tempfile.TemporaryDirectory() as folder:
        write_ledger(Path(folder) / "ledger.jsonl", **options)
        return (Path(folder) / "ledger.jsonl").read_bytes()


def write_run(
    folder: Path,
    *,
    classes: tuple[str, ...] = ("cat", "dog"),
    labels: tuple[str, ...] = ("A", "B", "C"),
    metric: str = "accuracy",
    classifier: dict[str, Any] | None = None,
    **ledger: Any,
) -> Path:
    """A finished run. `ledger` goes to `write_ledger`; the plan says STEPS steps at SIGMA whatever is charged."""
    (folder / "samples").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "ledger.jsonl").write_bytes(ledger_bytes(**ledger))
    target = ledger.get("target", 10.0)
    write = {
        "query.json": {
            "fingerprint": "f", "labels": labels, "classes": classes, "votes_per_image": 1, "noise_std": QUERY_SIGMA,
            "counts": [[40.5, -3.0, 2.0], [1.0, 30.0, 5.0]], "noise_multiplier": QUERY_SIGMA, "semantic_function": "CNN",
        },
        "selection.json": {
            "mode": "semantic", "labels_per_class": 1, "assignment": "optimal", "public_images": 90, "selected_images": 60,
            "ratio": 2 / 3, "classes": [{"class": c, "labels": [n], "images": 30} for c, n in zip(classes, labels, strict=False)],
        },
        "budget.json": {
            "target_epsilon": "inf" if target is None else target, "delta": DELTA, "population": POPULATION, "sample_rate": RATE,
            "steps": STEPS, "noise_multiplier": ledger.get("sigma", SIGMA), "query_noise_multiplier": QUERY_SIGMA,
        },
        "metrics.json": {"metrics": [
            {"name": "distance on real", "value": 3.25, "unit": "", "private": False, "detail": "real images"},
            {"name": metric, "value": 0.784, "unit": "fraction", "private": False, "detail": "real test images"},
            {"name": "accuracy on synthetic", "value": None, "unit": "fraction", "private": True, "detail": "synthetic only"},
        ], "synthetic": "f"},
        "stages.json": {  # no time where real images are read
            "query": {"fingerprint": "f"}, "select": {"fingerprint": "f", "seconds": 0.5}, "pretrain": {"seconds": 64.0},
            "finetune": {"fingerprint": "f"}, "sample": {"fingerprint": "f", "seconds": 4000.0}, "evaluate": {},
        },
    }  # fmt: skip
    if classifier is not None:
        (folder / "checkpoints").mkdir()
        metadata = {"privimage": json.dumps({"fingerprint": "f", **classifier})}
        save_file({"weight": np.zeros(3, np.float32)}, folder / "checkpoints" / "classifier.safetensors", metadata=metadata)
    for name, value in write.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "config.yaml").write_text("data:\n  public: embedded:letters\n  private: /home/ward/patients\n")
    for i, name in enumerate(("before", "after", "public", "neighbours-not-private")):
        Image.fromarray(np.full((28 + i, 28), 60 * i, np.uint8)).save(folder / "samples" / f"{name}.png")
    labels_drawn = np.repeat([0, 1], [7, 4])
    np.savez(folder / "synthetic.npz", images=np.zeros((11, 14, 14, 1), np.uint8), labels=labels_drawn)
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes the run folder anew: `make_run(classes=…, labels=…, metric=…, steps=…, sigma=…, target=…, seeded=…)`."""

    def make(name: str = "run", **options: Any) -> Path:
        shutil.rmtree(tmp_path / name, ignore_errors=True)
        return write_run(tmp_path / name, **options)

    return make
