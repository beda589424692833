"""What K, the batch and the number of steps are worth: how much of a DP step is signal, on public images alone.

    python benchmarks/multiplicity.py --public letters.npz --stand-in clipart.npz [--epsilon 10] [--population 60000]

A network of the preset `small` learns ``--public``; ``--stand-in``, public images too, plays the sensitive set, so that nothing
measured here costs privacy. Signal is the norm of the mean clipped gradient ÷ C, before any training on the stand-in and after
``--training`` ordinary steps on half of it. Noise is what the accountant asks for on that mean, σ·√parameters ÷ batch. A mean of
few gradients is mostly their scatter: what counts is the inner product of means of images that have none in common, whose error
is a jackknife's over these groups. The same images are looked at whatever K is.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from privimage_fast.data import open_image_set
from privimage_fast.dp.accounting import solve_noise_multiplier
from privimage_fast.dp.engine import clipped_grad
from privimage_fast.models.edm import Denoiser, DenoisingLoss, EDMConfig, denoising_batch, to_float
from privimage_fast.models.unet import PRESETS

MULTIPLICITIES, BATCHES, STEPS = (1, 2, 4, 8, 16), (512, 1024, 2048, 4096, 8192), (150, 300, 600, 1200)
GROUPS, ROWS, SMALL = 8, 1024, 1e-6  # groups of images that have none in common; rows at a time; a C that every gradient reaches


def taught(model: Denoiser, images: Tensor, labels: Tensor, steps: int, batch: int) -> None:
    """Ordinary training, in place."""
    training, random = model.public_training(lr=2e-3, ema_decay=0.98, label_dropout=0.1), torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = torch.randint(len(images), (batch,), generator=random)
        training.step(images[rows], labels[rows], random, 2e-3 * min(1.0, (step + 1) / 50))
    training.finish()


def signal(model: Denoiser, images: Tensor, labels: Tensor, multiplicity: int) -> dict[str, float]:
    """Of the mean clipped gradient, in units of C: its norm, and the standard error of the norm's square."""
    random, means, norms = torch.Generator().manual_seed(1), [], []
    for group in torch.arange(len(images)).chunk(GROUPS):
        total = torch.zeros(())
        for part in group.split(max(1, ROWS // multiplicity)):
            batch = denoising_batch(
                images[part], labels[part], edm=model.edm, num_classes=model.num_classes, multiplicity=multiplicity,
                label_dropout=0.1, generator=random,
            )  # fmt: skip
            found = clipped_grad(
                model, DenoisingLoss(multiplicity), batch.args(), max_grad_norm=SMALL, multiplicity=multiplicity
            )  # fmt: skip
            total = total + torch.cat([g.flatten() for g in found.grads.values()]).double() / SMALL
            norms.append(found.norms)
        means.append(total / len(group))
    products = torch.stack(means) @ torch.stack(means).T

    def square(kept: Tensor) -> Tensor:
        n = len(kept)
        return (products[kept][:, kept].sum() - products[kept, kept].sum()) / (n * (n - 1))

    every = torch.arange(len(means))
    without = torch.stack([square(every[every != left]) for left in every])
    error = ((len(means) - 1) * without.var(correction=0)).sqrt()
    return {
        "signal": math.sqrt(max(0.0, float(square(every)))), "error of its square": float(error),
        "median norm": float(torch.cat(norms).median()), "images": len(images),
    }  # fmt: skip


def noises(epsilon: float, population: int, parameters: int) -> list[dict[str, Any]]:
    """Of every number of steps and batch: σ, and the norm of the noise on the mean ÷ C."""
    delta, found = 1 / (population * math.log(population)), []
    for steps in STEPS:
        for batch in (b for b in BATCHES if b <= population):
            sigma = solve_noise_multiplier(target_epsilon=epsilon, delta=delta, sample_rate=batch / population, steps=steps)
            found.append({"steps": steps, "batch": batch, "sigma": sigma, "noise": sigma * math.sqrt(parameters) / batch})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", required=True)
    parser.add_argument("--stand-in", required=True)
    parser.add_argument("--resolution", type=int, default=28)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--epsilon", type=float, nargs="+", default=[10.0, 1.0])
    parser.add_argument("--population", type=int, default=60_000, help="of the sensitive set that is planned for")
    parser.add_argument("--training", type=int, default=300, help="steps on each set")
    parser.add_argument("--images", type=int, default=2048, help="of the stand-in that each figure is taken from")
    parser.add_argument("--out", type=Path, default=Path("multiplicity.json"))
    args = parser.parse_args()
    torch.manual_seed(0)
    sets = []
    for source in (args.public, args.stand_in):
        found = open_image_set(source, resolution=args.resolution, channels=1)
        order = torch.randperm(len(found))
        sets.append((to_float(torch.from_numpy(found.images))[order], torch.from_numpy(found.labels)[order]))
    (public, public_labels), (images, labels) = sets
    classes = int(max(public_labels.max(), labels.max())) + 1
    model = Denoiser(
        PRESETS["small"], EDMConfig(p_mean=-0.5), resolution=args.resolution, channels=1, num_classes=classes, patch=args.patch
    )
    model.measure(public[:4096])
    half, rows, batch = len(images) // 2, [], min(128, len(public))
    looked_at = slice(half, half + args.images)
    if len(images[looked_at]) < 3 * GROUPS:
        parser.error(f"--stand-in has {len(images)} images; half of them, or --images, must be at least {3 * GROUPS}")
    taught(model, public, public_labels, args.training, batch)
    for when in ("before", "after"):
        if when == "after":
            taught(model, images[:half], labels[:half], args.training, batch)
        for k in MULTIPLICITIES:
            rows.append({"training": when, "multiplicity": k, **signal(model, images[looked_at], labels[looked_at], k)})
            print(json.dumps(rows[-1]), flush=True)
    parameters = sum(p.numel() for p in model.parameters())
    noise = {f"{epsilon:g}": noises(epsilon, args.population, parameters) for epsilon in args.epsilon}
    for epsilon, found in noise.items():
        print(f"ε = {epsilon}: noise on the mean ÷ C, by batch " + ", ".join(map(str, BATCHES)))
        for steps in STEPS:
            print(f"{steps} steps: " + ", ".join(f"{f['noise']:.3f}" for f in found if f["steps"] == steps))
    machine = {"processor": platform.processor() or platform.machine(), "torch": torch.__version__}
    settings = {"population": args.population, "parameters": parameters, "training": args.training}
    args.out.write_text(json.dumps({**machine, **settings, "signal": rows, "noise": noise}, indent=1) + "\n")


if __name__ == "__main__":
    main()
