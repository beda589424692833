"""Warming the pre-trained model up on noisy class means, before DP-SGD: after "From easy to hard" (Li et al., DP-FETA, 2025).

Of their idea this keeps that means come before images. Means are asked for of all images, one or several a class
(``stages.means``). A diffusion model is taught them at high noise levels only, where the mean is the right answer; a GAN's images
are held to them on average, here and while it is fine-tuned. The training is post-processing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from privimage_fast.models.edm import to_float
from privimage_fast.models.training import ImageModel
from privimage_fast.stages.folder import RunFolder, fingerprint, timed
from privimage_fast.stages.means import STAGE
from privimage_fast.stages.pretrain import check_averaging, train_resumably


@dataclass(frozen=True)
class WarmupConfig:
    """Noisy class means of the sensitive images, and training on them before DP-SGD.

    Args:
        steps: optimizer steps on the means; 0 asks for none and charges nothing.
        share: of the budget, as `query.share`, when `noise_multiplier` is null. null takes what leaves noise of about 0.1 on a
            pixel of a class's mean (of black −1 to white 1), from 2 to 25 %: small sets and a small ε need more. Several modes
            take 10 %.
        modes: means a class: its images are told apart by which of so many public, then earlier noisy, means is the nearest.
            null takes as many, up to 16, as leave noise of about 0.05 on a pixel; a GAN has use for one only.
        rounds: how often that is asked, each time around the last answer; null takes 1 for one mode and 3 for several.
        noise_multiplier: σ₂, standard deviation of a round's noise ÷ what one image can change; null derives it from `share`;
            0, no noise, is for runs that are not private only.
        max_norm: C, to which an image's difference from its centre (the mean of public images chosen for the class) is scaled
            down, in units of [−1, 1]; null takes what nine in ten of those public images keep to.
        batch_size: images a step, of which a third are public; of a GAN the generator draws the others.
        lr: learning rate of Adam.
        ema_decay: decay of the averaged weights that fine-tuning starts from.
        label_dropout: share of labels replaced by the empty one.
        lowest_level: from which noise level σ on a diffusion model is taught the means; null takes 1 for one mode and 0.6 for
            several, and above 14 px as many times that as an image is wider.
        highest_level: up to which.
    """

    steps: int = 150
    share: float | None = None
    modes: int | None = None
    rounds: int | None = None
    noise_multiplier: float | None = None
    max_norm: float | None = None
    batch_size: int = 144
    lr: float = 1e-3
    ema_decay: float = 0.98
    label_dropout: float = 0.1
    lowest_level: float | None = None
    highest_level: float = 80.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 3:
            raise ValueError(f"warmup.steps must be ≥ 0 and batch_size ≥ 3, found {self.steps} and {self.batch_size}")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"warmup.share must be in (0, 1) or null, found {self.share}")
        if self.noise_multiplier is not None and not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"warmup.noise_multiplier must be ≥ 0 and finite, or null, found {self.noise_multiplier}")
        for name in ("modes", "rounds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"warmup.{name} must be ≥ 1 or null, found {getattr(self, name)}")
        for name in ("max_norm", "lr", "lowest_level"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"warmup.{name} must be positive and finite, found {getattr(self, name)}")
        lowest = self.lowest_level or lowest_level(self.modes or 1)
        if not lowest < self.highest_level < math.inf:
            raise ValueError(f"warmup.highest_level must be above lowest_level {lowest}, found {self.highest_level}")
        check_averaging("warmup", self.ema_decay, self.label_dropout)


def lowest_level(modes: int, resolution: int = 14) -> float:
    """σ from which on a mean is the right answer: means of kinds of images are nearer to images than means of whole classes.

    Found at 14 px. Of twice as many pixels along a side four show what one showed, so the same is known at twice the noise.
    """
    return (1.0 if modes == 1 else 0.6) * max(1.0, resolution / 14)


def run_warmup(
    folder: RunFolder, config: WarmupConfig, *, model: ImageModel, images: np.ndarray, labels: np.ndarray,
    seed: int, device: str = "cpu", autocast: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Trains ``model``, which has its ``means``, in place; leaves its averaged weights in it and in the folder.

    ``images`` (uint8 NHWC), ``labels``: the chosen public images, perhaps none, and the classes they stand for.
    """
    assert model.means is not None
    assert config.lowest_level is not None
    found = model.means
    inputs = (images, labels, *(t.cpu().numpy() for t in (found.images, found.trust, found.classes, found.weights)))
    weights = [(name, fingerprint(t.detach().cpu().numpy().tobytes())) for name, t in model.state_dict().items()]
    stamp = fingerprint(config, seed, [fingerprint(a.tobytes()) for a in inputs], weights)
    path = folder.checkpoint(STAGE)
    model.to(device)
    model.means = model.means.to(device)
    if path.exists() and folder.finished(STAGE, stamp):
        model.load_state_dict(folder.load_tensors(path, STAGE)[0])
        return
    shown = config.batch_size // 3 if len(images) else 0
    training = model.mean_training(
        lr=config.lr, ema_decay=config.ema_decay, label_dropout=config.label_dropout, rows=config.batch_size - shown,
        noise_levels=(config.lowest_level, config.highest_level),
    )  # fmt: skip
    pixels, classes = torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)

    def step(random: torch.Generator, lr: float) -> Tensor:
        rows = torch.randint(max(1, len(pixels)), (shown,), generator=random, device=device)
        return training.step(to_float(pixels[rows]), classes[rows], random, lr)

    with timed(folder, STAGE, stamp):
        train_resumably(
            folder, STAGE, stamp, training, step, steps=config.steps, lr=config.lr, warmup=20, seed=seed,
            checkpoint_seconds=60.0, device=device, autocast=autocast if model.low_precision else None,
        )  # fmt: skip
        folder.save_tensors(path, model.state_dict(), {"fingerprint": stamp, "steps": config.steps})
    folder.checkpoint(f"{STAGE}-progress").unlink(missing_ok=True)
