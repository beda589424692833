"""Pre-training on the selected public images: ordinary training, no privacy involved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from privimage_fast.data import ImageSet
from privimage_fast.models.edm import to_float
from privimage_fast.models.training import ImageModel, PublicTraining, step_generator
from privimage_fast.progress import progress_bar
from privimage_fast.stages.folder import RunFolder, fingerprint, set_fingerprint, timed
from privimage_fast.stages.interrupt import interrupts_held


@dataclass(frozen=True)
class PretrainConfig:
    """Ordinary training on public images.

    Args:
        steps: optimizer steps.
        batch_size: images a step.
        lr: learning rate of Adam, warmed up over the first `warmup` steps.
        warmup: steps in which the learning rate rises.
        ema_decay: decay of the averaged weights that fine-tuning starts from.
        label_dropout: share of labels replaced by the empty one, which makes guidance possible.
        checkpoint_seconds: how often progress is saved.
    """

    steps: int = 4000
    batch_size: int = 256
    lr: float = 1e-3
    warmup: int = 50
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"pretrain.{name} must be positive, found {getattr(self, name)}")
        check_averaging("pretrain", self.ema_decay, self.label_dropout)


_MEASURED = 4096  # images, at most, of which the model takes the scale


def check_averaging(section: str, ema_decay: float, label_dropout: float) -> None:
    """What every section of training settings has."""
    if not 0 <= ema_decay < 1 or not 0 <= label_dropout <= 1:
        raise ValueError(f"{section}.ema_decay {ema_decay} must be in [0, 1), and label_dropout {label_dropout} in [0, 1]")


def run_pretrain(
    folder: RunFolder, config: PretrainConfig, *, model: ImageModel, public: ImageSet, indices: np.ndarray, labels: np.ndarray,
    seed: int, device: str = "cpu", autocast: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Trains ``model`` in place and leaves its averaged weights in it and in checkpoints/pretrain.safetensors.

    Resumes from its last checkpoint; each step's randomness is a function of (seed, step), so the result is the same.
    ``autocast``: dtype the network may compute in, if its family bears it.
    """
    subset = public.subset(indices) if len(indices) else None
    described = (set_fingerprint(subset), fingerprint(labels.tobytes())) if subset is not None else None
    shapes = [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    stamp = fingerprint(config, seed, described, shapes, model.drawable.describe())
    path, progress_path = folder.checkpoint("pretrain"), folder.checkpoint("pretrain-progress")
    model.to(device)
    if path.exists() and folder.finished("pretrain", stamp):
        model.load_state_dict(folder.load_tensors(path, "pretrain")[0])
        return
    with timed(folder, "pretrain", stamp):
        if subset is not None:
            some = np.random.default_rng(seed).permutation(len(subset))[:_MEASURED]  # a stride could meet one kind only
            model.measure(to_float(torch.from_numpy(subset.images[some])))
            _train(folder, config, model, subset.images, labels, stamp, seed, device, autocast if model.low_precision else None)
        folder.save_tensors(path, model.state_dict(), {"fingerprint": stamp, "steps": config.steps if subset is not None else 0})
    progress_path.unlink(missing_ok=True)


def _train(
    folder: RunFolder, config: PretrainConfig, model: ImageModel, images: np.ndarray, labels: np.ndarray, stamp: str, seed: int,
    device: str, autocast: torch.dtype | None,
) -> None:  # fmt: skip
    training = model.public_training(lr=config.lr, ema_decay=config.ema_decay, label_dropout=config.label_dropout)
    pixels, targets = (torch.from_numpy(a).to(device) for a in (images, labels))

    def step(random: torch.Generator, lr: float) -> Tensor:
        rows = torch.randint(len(images), (config.batch_size,), generator=random, device=device)
        return training.step(to_float(pixels[rows]), targets[rows], random, lr)

    train_resumably(
        folder, "pretrain", stamp, training, step, steps=config.steps, lr=config.lr, warmup=config.warmup, seed=seed,
        checkpoint_seconds=config.checkpoint_seconds, device=device, autocast=autocast,
    )  # fmt: skip


def train_resumably(
    folder: RunFolder, stage: str, stamp: str, training: PublicTraining, step: Callable[[torch.Generator, float], Tensor], *,
    steps: int, lr: float, warmup: int, seed: int, checkpoint_seconds: float, device: str, autocast: torch.dtype | None,
) -> None:  # fmt: skip
    """Training without DP-SGD, from its last checkpoint if there is one.

    ``step(random, lr)`` makes one step and returns a loss to show.

    Each step's randomness is a function of (seed, step) alone.
    """
    path, kind = folder.checkpoint(f"{stage}-progress"), torch.device(device).type
    start = 0
    if path.exists():
        tensors, metadata = folder.load_tensors(path, stage)
        if metadata.get("fingerprint") == stamp:  # else of other settings; it may simply begin again
            training.load_state_dict(tensors)
            start = int(metadata["steps"])
    saved = time.perf_counter()
    bar = progress_bar(range(start, steps), desc=stage, unit="step", initial=start, total=steps)

    def save(done: int) -> None:
        folder.save_tensors(path, training.state_dict(), {"fingerprint": stamp, "steps": done})

    with interrupts_held("the step at hand is finished and saved") as interrupted:
        for number in bar:
            if interrupted():
                save(number)
                raise KeyboardInterrupt
            random = step_generator(stage, seed, number, device)
            with torch.autocast(kind, autocast, enabled=autocast is not None):
                loss = step(random, lr * min(1.0, (number + 1) / max(1, warmup)))
            if number % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            if time.perf_counter() - saved > checkpoint_seconds:
                save(number + 1)
                saved = time.perf_counter()
        if interrupted():
            save(steps)
    training.finish()
