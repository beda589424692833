"""What patches and measured preconditioning are worth, on public images alone: ordinary training for the same time.

    python benchmarks/preconditioning.py --images letters.npz [--minutes 3] [--seeds 2] [--out preconditioning.json]

``letters.npz``: any labelled set, such as `privimage data prepare letters --resolution 28` makes. Nothing private is in it, so
these choices cost nothing. Each variant of the preset `small` trains until its share of processor time is used. Then, on a
held-out tenth: the error of denoising at several noise levels, and the energy distance (Székely & Rizzo 2013) of samples.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from privimage_fast.data import open_image_set
from privimage_fast.models.edm import Denoiser, EDMConfig, SamplerConfig, to_float
from privimage_fast.models.unet import PRESETS

VARIANTS: dict[str, dict[str, Any]] = {
    "published": {"sigma_data": 0.5},
    "noise levels doubled": {"p_mean": -0.5, "sigma_data": 0.5},
    "measured": {"p_mean": -0.5},
    "patches of 2": {"p_mean": -0.5, "patch": 2, "sigma_data": 0.5},
    "patches of 2, measured": {"p_mean": -0.5, "patch": 2},
    "patches of 2, measured, published noise levels": {"patch": 2},
}
LEVELS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0)
BATCH, LR, HELD_OUT, DRAWN = 128, 2e-3, 10, 400


def trained(images: Tensor, labels: Tensor, seconds: float, seed: int, *, patch: int = 1, **edm: Any) -> tuple[Denoiser, int]:
    """A denoiser after so many seconds of processor time, and its steps."""
    torch.manual_seed(seed)
    _, channels, _, resolution = images.shape
    model = Denoiser(
        PRESETS["small"], EDMConfig(**edm), resolution=resolution, channels=channels, num_classes=int(labels.max()) + 1,
        patch=patch,
    )  # fmt: skip
    model.measure(images[:4096])
    training = model.public_training(lr=LR, ema_decay=0.99, label_dropout=0.1)
    random, steps, began = torch.Generator().manual_seed(seed), 0, time.process_time()
    while time.process_time() - began < seconds:
        rows = torch.randint(len(images), (BATCH,), generator=random)
        training.step(images[rows], labels[rows], random, LR * min(1.0, (steps + 1) / 50))
        steps += 1
    training.finish()
    return model, steps


@torch.no_grad()
def judged(model: Denoiser, images: Tensor, labels: Tensor) -> dict[str, Any]:
    random = torch.Generator().manual_seed(1)
    images, labels = images[:DRAWN], labels[:DRAWN]
    errors = []
    for level in LEVELS:
        noisy = images + level * torch.randn(images.shape, generator=random)
        errors.append(float((model(noisy, torch.full((len(images),), level), labels) - images).square().mean()))
    latents = torch.randn((len(labels), *model.latent_shape), generator=random)
    drawn = model.draw(labels, SamplerConfig(steps=10), latents).clamp(-1, 1)
    a, b = drawn.flatten(1), images.flatten(1)
    distance = 2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()
    return {"mean squared error": dict(zip(map(str, LEVELS), errors, strict=True)), "energy distance": float(distance)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True)
    parser.add_argument("--resolution", type=int, default=28)
    parser.add_argument("--minutes", type=float, default=3.0, help="of processor time, for each variant")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("preconditioning.json"))
    args = parser.parse_args()
    found = open_image_set(args.images, resolution=args.resolution, channels=1)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    images, labels = to_float(torch.from_numpy(found.images))[order], torch.from_numpy(found.labels)[order]
    kept = len(images) // HELD_OUT
    runs = []
    for seed in range(args.seeds):
        for name, options in VARIANTS.items():
            model, steps = trained(images[kept:], labels[kept:], 60 * args.minutes, seed, **options)
            runs.append({"variant": name, "seed": seed, "steps": steps, **judged(model, images[:kept], labels[:kept])})
            print(json.dumps(runs[-1]), flush=True)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    result = {"torch": torch.__version__, **machine, "minutes": args.minutes, "images": len(images), "runs": runs}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
