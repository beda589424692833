"""A whole run in seconds: 8×8 images of bars, a few steps, a network of a few thousand parameters."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from privimage_fast.config import RunConfig, build_config
from privimage_fast.data import ImageSet, save_npz
from privimage_fast.dp.accounting import DPSGDEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.pipeline import Run


def bars(n: int, classes: int, seed: int, *, prefix: str) -> ImageSet:
    """Class c is a bright column at c (of 8), with noise."""
    random = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    images = random.integers(0, 60, (n, 8, 8, 1))
    images[np.arange(n), :, labels % 8, 0] += 180
    return ImageSet(images.astype(np.uint8), labels, tuple(f"{prefix}{c}" for c in range(classes)), name=prefix)


PUBLIC = bars(240, 6, 0, prefix="letter")
PRIVATE = bars(120, 3, 1, prefix="digit")
TEST = bars(30, 3, 2, prefix="digit")

SECTIONS: dict[str, Any] = {
    "data": {"resolution": 8, "channels": 1},
    "privacy": {"epsilon": 5.0, "delta": 1e-3},
    "query": {"classifier": {"width": 8, "epochs": 2, "batch_size": 32}},
    "select": {"labels_per_class": 2},
    "model": {
        "preset": "custom",
        "unet": {"base_channels": 8, "channel_mult": [1, 1], "blocks": 1, "attention_levels": [1], "head_channels": 8},
    },
    "pretrain": {"steps": 6, "batch_size": 16, "checkpoint_seconds": 0.0},
    "warmup": {"steps": 4, "batch_size": 12},
    "finetune": {"steps": 8, "batch_size": 30, "multiplicity": 2, "physical_batch_size": 16, "checkpoint_steps": 3},
    "sample": {"per_class": 12, "batch_size": 12, "sampler": {"steps": 3}},
    "evaluate": {"classifier": {"width": 8, "epochs": 2, "batch_size": 16}},
}

STEPS = SECTIONS["finetune"]["steps"]

# A section for labels from a privately trained layer.
LABEL: dict[str, Any] = {"steps": 4, "drafts": 9, "classifier": {"width": 4, "epochs": 1, "batch_size": 16}}


def tiny_config(out: Path, **sections: Any) -> RunConfig:
    return build_config(sections, build_config({**SECTIONS, "out": str(out)}))


def run_all(out: Path, *, resume: bool = False, test: Any = TEST, **sections: Any) -> Run:
    run = Run(tiny_config(out, **sections), public=PUBLIC, private=PRIVATE, test=test)
    with run.opened(resume=resume):
        run.all()
    return run


def write_run(folder: Path, **finetune: Any) -> tuple[list[str], Path]:
    """The same run by command: its sets and configuration in ``folder``; the command line, and the ledger it will write."""
    for name, images in (("public", PUBLIC), ("private", PRIVATE), ("test", TEST)):
        save_npz(images, folder / f"{name}.npz")
    data = {**SECTIONS["data"], **{name: str(folder / f"{name}.npz") for name in ("public", "private", "test")}}
    sections = {**SECTIONS, "data": data, "finetune": {**SECTIONS["finetune"], **finetune}, "out": str(folder / "out")}
    (folder / "run.yaml").write_text(yaml.safe_dump(sections))
    command = [sys.executable, "-P", "-m", "privimage_fast", "run", "--config", str(folder / "run.yaml")]
    return command, folder / "out" / "ledger.jsonl"


def wait_for_lines(ledger: Path, lines: int, process: subprocess.Popen[Any]) -> None:
    """Until the ledger has more than so many, within two minutes of a process that goes on."""
    deadline = time.monotonic() + 120
    while not (ledger.exists() and ledger.read_bytes().count(b"\n") > lines):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def dpsgd(run: Run) -> list[DPSGDEvent]:
    return [r.event for r in Ledger.read(run.folder.ledger).records() if r.stage == "finetune"]
