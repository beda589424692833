"""Pre-training of the denoiser on the selected public images: ordinary EDM training, no privacy involved."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from privimage_fast.data import ImageSet
from privimage_fast.models.edm import Denoiser, DenoisingLoss, denoising_batch, to_float
from privimage_fast.stages.folder import RunFolder, fingerprint, set_fingerprint, timed


@dataclass(frozen=True)
class PretrainConfig:
    """Ordinary training on public images.

    Args:
        steps: optimizer steps.
        batch_size: images a step.
        lr: learning rate of Adam, warmed up over the first `warmup` steps.
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
        if not 0 <= self.ema_decay < 1 or not 0 <= self.label_dropout <= 1:
            raise ValueError(f"pretrain.ema_decay {self.ema_decay} and label_dropout {self.label_dropout} must be in [0, 1)")


def run_pretrain(
    folder: RunFolder, config: PretrainConfig, *, model: Denoiser, public: ImageSet, indices: np.ndarray, labels: np.ndarray,
    seed: int, device: str = "cpu",
) -> None:  # fmt: skip
    """Trains ``model`` in place and leaves its averaged weights in it and in checkpoints/pretrain.safetensors.

    Resumes from its last checkpoint; each step's randomness is a function of (seed, step), so the result is the same.
    """
    subset = public.subset(indices) if len(indices) else None
    described = (set_fingerprint(subset), fingerprint(labels.tobytes())) if subset is not None else None
    stamp = fingerprint(config, seed, described, [(n, tuple(p.shape)) for n, p in model.named_parameters()])
    path, progress_path = folder.checkpoint("pretrain"), folder.checkpoint("pretrain-progress")
    model.to(device)
    if path.exists() and folder.finished("pretrain", stamp):
        model.load_state_dict(folder.load_tensors(path, "pretrain")[0])
        return
    with timed(folder, "pretrain", stamp):
        if subset is not None:
            _train(folder, config, model, subset.images, labels, stamp, seed, device)
        folder.save_tensors(path, model.state_dict(), {"fingerprint": stamp, "steps": config.steps if subset is not None else 0})
    progress_path.unlink(missing_ok=True)


def _train(
    folder: RunFolder, config: PretrainConfig, model: Denoiser, images: np.ndarray, labels: np.ndarray, stamp: str, seed: int,
    device: str,
) -> None:  # fmt: skip
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.Adam(parameters.values(), lr=config.lr, fused=True)
    ema = [p.detach().clone() for p in parameters.values()]
    path = folder.checkpoint("pretrain-progress")
    start = _restore(folder, stamp, parameters, optimizer, ema) if path.exists() else 0
    loss_fn, saved = DenoisingLoss(), time.perf_counter()
    pixels, targets = torch.from_numpy(images), torch.from_numpy(labels)
    progress = tqdm(range(start, config.steps), desc="pretrain", unit="step", initial=start, total=config.steps, leave=False)
    for step in progress:
        random = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(images), (config.batch_size,), generator=random)
        batch = denoising_batch(
            to_float(pixels[rows]), targets[rows], edm=model.edm, num_classes=model.num_classes, multiplicity=1,
            label_dropout=config.label_dropout, generator=random,
        )  # fmt: skip
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
        loss = loss_fn(model, *(t.to(device) for t in batch.args())).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        # The average forgets its first, untrained weights quickly: the decay grows with the steps taken.
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(ema, list(parameters.values()), 1 - decay)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
        if time.perf_counter() - saved > config.checkpoint_seconds:
            _save(folder, stamp, step + 1, parameters, optimizer, ema)
            saved = time.perf_counter()
    with torch.no_grad():
        for p, average in zip(parameters.values(), ema, strict=True):
            p.copy_(average)


def _save(
    folder: RunFolder, stamp: str, steps: int, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer,
    ema: list[torch.Tensor],
) -> None:  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    for (name, p), average in zip(parameters.items(), ema, strict=True):
        tensors |= {f"parameter/{name}": p, f"ema/{name}": average}
        tensors |= {f"adam/{key}/{name}": value for key, value in optimizer.state[p].items()}
    folder.save_tensors(folder.checkpoint("pretrain-progress"), tensors, {"fingerprint": stamp, "steps": steps})


def _restore(
    folder: RunFolder, stamp: str, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer,
    ema: list[torch.Tensor],
) -> int:  # fmt: skip
    tensors, metadata = folder.load_tensors(folder.checkpoint("pretrain-progress"), "pretrain")
    if metadata.get("fingerprint") != stamp:
        return 0  # of other settings; public training may simply begin again
    with torch.no_grad():
        for (name, p), average in zip(parameters.items(), ema, strict=True):
            p.copy_(tensors[f"parameter/{name}"])
            average.copy_(tensors[f"ema/{name}"])
            optimizer.state[p] = {
                key: tensors[f"adam/{key}/{name}"].to(p.device if key != "step" else "cpu")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return int(metadata["steps"])
