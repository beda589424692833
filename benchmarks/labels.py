"""What learned labels are worth: the same synthetic images with the labels they were drawn for, and with those that `label` gave.

    python benchmarks/labels.py RUN [RUN …] [--seeds 3] [--guidance 1 0.6] [--black 0] [--per-class N] [--out FILE]

RUN is a finished run folder with ``label.steps`` set, whose test images are where its configuration says. Its synthetic images
are judged with both, or others that are drawn anew from its model as these options say. Each set of
labels is judged by the run's own `evaluate` settings, with as many trainings. Figures are of real images: not private.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from privimage_fast.config import load_config
from privimage_fast.data import ImageSet
from privimage_fast.dp.ledger import Ledger
from privimage_fast.opening import autocast_of, device_of
from privimage_fast.pipeline import Run
from privimage_fast.stages.evaluate import utility
from privimage_fast.stages.sample import draw
from privimage_fast.stages.saved import load_pretrained


def compared(
    folder: Path, seeds: int, device: str, guidance: float | None, black: int | None, per_class: int | None
) -> dict[str, Any]:  # fmt: skip
    """Accuracy on real test images of classifiers that saw the images with either labels; mean, and spread over trainings."""
    config = load_config(folder / "config.yaml")
    run = Run(replace(config, out=str(folder), device=device))
    saved = load_pretrained(folder / "model")
    if saved.labeller is None or run.test is None:
        raise SystemExit(f"{folder}: labels were not learned (label.steps), or there are no test images")
    drawn, sampler = np.repeat(np.arange(len(saved.class_names)), per_class or config.sample.per_class), config.sample.sampler
    if guidance is None and black is None and per_class is None:
        with np.load(folder / "synthetic.npz", allow_pickle=False) as arrays:
            images, learned = arrays["images"], arrays["labels"]
    else:
        sampler = replace(sampler, guidance=sampler.guidance if guidance is None else guidance)
        sampler = replace(sampler, black=sampler.black if black is None else black)
        size, low = config.sample.batch_size, autocast_of(config.precision, device)
        images = np.concatenate([
            draw(saved.model, drawn[i : i + size], sampler, seed=config.seed, first=i, device=device, autocast=low)
            for i in range(0, len(drawn), size)
        ])  # fmt: skip
        learned = saved.labeller.labels(images, device)
    result: dict[str, Any] = {
        "run": folder.name, "epsilon": Ledger.read(folder / "ledger.jsonl").epsilon(), "images": len(images),
        "guidance": sampler.guidance, "black": sampler.black or 0, "kept": float(np.mean(learned == drawn)),
        "labeller on test images": float(np.mean(saved.labeller.labels(run.test.images, device) == run.test.labels)),
    }  # fmt: skip
    for name, labels in (("drawn", drawn), ("learned", learned)):
        synthetic = ImageSet(images, labels, saved.class_names, name=name)
        metrics = utility(replace(config.evaluate, seeds=seeds), synthetic, run.test, seed=config.seed, device=device)
        result[name] = {
            m["name"]: {"value": m["value"], "spread": m["spread"]} for m in metrics if m["name"].startswith("accuracy")
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of the judge with each labels (3)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[None], help="draw anew with these")
    parser.add_argument("--black", type=int, help="draw anew with this sample.sampler.black")
    parser.add_argument("--per-class", type=int, help="draw anew so many of each class")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (auto)")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    a = parser.parse_args()
    rows = []
    for folder, guidance in itertools.product(a.runs, a.guidance):
        rows.append(compared(folder, a.seeds, device_of(a.device), guidance, a.black, a.per_class))
        print(json.dumps(rows[-1]), flush=True)
        if a.out:
            a.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
