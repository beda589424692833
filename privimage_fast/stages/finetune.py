"""Fine-tuning on the sensitive images with DP-SGD.

Formal guarantee: each step is one Poisson-subsampled Gaussian mechanism on the sum of clipped per-image gradients — the K
noise levels and label drops of an image are one gradient, clipped once. Its event is in the ledger before the batch is
drawn. A resumed run charges what it repeats, and stops early rather than pass the target ε.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from privimage_fast.data import ImageSet
from privimage_fast.dp.accounting import DPSGDEvent, affordable_steps, solve_noise_multiplier
from privimage_fast.dp.engine import check_per_sample
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.dp.planner import Plan, make_plan
from privimage_fast.dp.sampling import MicroBatch, PoissonSampler, SecretRandom, micro_batches
from privimage_fast.models.edm import Denoiser, DenoisingLoss, denoising_batch, to_float
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, timed

logger = logging.getLogger(__name__)

STAGE = "finetune"


@dataclass(frozen=True)
class FinetuneConfig:
    """DP-SGD. Every value here is public.

    Args:
        steps: noised steps; null derives them from `epochs`.
        epochs: expected passes over the set when `steps` is null.
        batch_size: the *expected* batch size; the sample rate is batch_size / population.
        multiplicity: K, noise levels drawn for each image of a batch; they share one clip.
        max_grad_norm: C. Adam does not feel its scale; at the published 1e-3 nearly every gradient is clipped.
        lr, ema_decay, label_dropout: as in pre-training.
        physical_batch_size: images at a time, at most; null chooses by `memory_budget_mib` and speed.
        memory_budget_mib: memory that a micro-batch may take, over parameters and optimizer state. A budget that does not hold
            one image is refused before anything is spent.
        checkpoint_steps: how often progress is saved; a killed run repeats, and pays for, fewer steps than this.
    """

    steps: int | None = None
    epochs: float = 150.0
    batch_size: int = 4096
    multiplicity: int = 8
    max_grad_norm: float = 1e-3
    lr: float = 3e-4
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    physical_batch_size: int | None = None
    memory_budget_mib: int = 1024
    checkpoint_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "multiplicity", "max_grad_norm", "lr", "memory_budget_mib", "checkpoint_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"finetune.{name} must be positive, found {getattr(self, name)}")
        for name in ("steps", "physical_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"finetune.{name} must be ≥ 1 or null, found {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.label_dropout <= 1:
            raise ValueError(f"finetune.ema_decay {self.ema_decay} and label_dropout {self.label_dropout} must be in [0, 1)")

    def sample_rate(self, population: int) -> float:
        if self.batch_size > population:
            raise RunError(f"finetune.batch_size {self.batch_size} exceeds the population {population}; lower it")
        return self.batch_size / population

    def total_steps(self, population: int) -> int:
        return self.steps or max(1, round(self.epochs / self.sample_rate(population)))


def run_finetune(
    folder: RunFolder, config: FinetuneConfig, *, model: Denoiser, private: ImageSet, population: int, target_epsilon: float,
    delta: float, ledger: Ledger, noise_key: NoiseKey, randomness: SecretRandom, seed: int, device: str = "cpu",
) -> None:  # fmt: skip
    """Fine-tunes ``model`` in place; leaves its averaged weights in it and in checkpoints/finetune.safetensors.

    σ is solved from what the ledger holds already, so the query is in it; an infinite ``target_epsilon`` trains without noise.

    Raises:
        RunError: a checkpoint of other settings, or one for which the ledger holds no charge.
        BudgetError: the ledger already holds the whole budget.
    """
    sample_rate, steps = config.sample_rate(population), config.total_steps(population)
    shapes = [(n, tuple(p.shape)) for n, p in model.named_parameters()]
    stamp = fingerprint(config, population, target_epsilon, delta, seed, shapes)
    path, progress_path = folder.checkpoint("finetune"), folder.checkpoint("finetune-progress")
    model.to(device)
    if path.exists() and folder.finished(STAGE, stamp):
        model.load_state_dict(folder.load_tensors(path, STAGE)[0])
        return
    charged = _charged(ledger)
    if path.exists() or (charged and not progress_path.exists() and ledger.steps_charged(STAGE) > config.checkpoint_steps):
        logger.warning("fine-tuning begins again: %d steps in the ledger have no checkpoint", ledger.steps_charged(STAGE))
    with timed(folder, STAGE, stamp):
        noise_multiplier = _noise_multiplier(charged, ledger, target_epsilon, delta, sample_rate, steps)
        optimizer = PrivateOptimizer(
            model, max_grad_norm=config.max_grad_norm, noise_multiplier=noise_multiplier,
            expected_batch_size=sample_rate * population, update=UpdateRule("adam", lr=config.lr), ema_decay=config.ema_decay,
            multiplicity=config.multiplicity, memory_budget=config.memory_budget_mib * 2**20, noise_key=noise_key,
        )  # fmt: skip
        if progress_path.exists():
            _restore(folder, optimizer, stamp)
        event = DPSGDEvent(noise_multiplier, sample_rate, 1)
        steps = min(steps, optimizer.steps + _affordable(event, ledger, target_epsilon, delta, steps - optimizer.steps))
        folder.write_json(
            folder.budget, budget_record(config, population, target_epsilon, delta, noise_multiplier, steps, ledger)
        )
        _check_model(model, config)
        _train(folder, config, optimizer, private, steps, event, ledger, randomness, stamp, device)
        with torch.no_grad():
            for name, average in optimizer.ema_state().items():
                model.get_parameter(name).copy_(average)
        folder.save_tensors(path, model.state_dict(), {"fingerprint": stamp, "steps": optimizer.steps})
    progress_path.unlink(missing_ok=True)


def budget_record(
    config: FinetuneConfig, population: int, target_epsilon: float, delta: float, noise_multiplier: float, steps: int,
    ledger: Ledger | None = None, query_noise_multiplier: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The content of budget.json: the public parameters of the run, as planned and as used."""
    if ledger is not None:
        queries = [r for r in ledger.records() if r.stage == "query"]
        query_noise_multiplier = queries[-1].event.noise_multiplier if queries else None
    return {
        "target_epsilon": target_epsilon if np.isfinite(target_epsilon) else "inf", "delta": delta, "population": population,
        "sample_rate": config.sample_rate(population), "steps": steps, "noise_multiplier": noise_multiplier,
        "max_grad_norm": config.max_grad_norm, "multiplicity": config.multiplicity,
        "expected_batch_size": config.batch_size, "query_noise_multiplier": query_noise_multiplier,
    }  # fmt: skip


def _charged(ledger: Ledger) -> list[DPSGDEvent]:
    return [r.event for r in ledger.records() if r.stage == STAGE and isinstance(r.event, DPSGDEvent)]


def _noise_multiplier(
    charged: list[DPSGDEvent], ledger: Ledger, target_epsilon: float, delta: float, sample_rate: float, steps: int
) -> float:
    if np.isinf(target_epsilon):
        return 0.0
    if charged:  # σ was fixed when the first step was charged; solving again would count those steps twice
        if charged[-1].sample_rate != sample_rate:
            raise RunError(
                f"the ledger holds fine-tuning steps at sample rate {charged[-1].sample_rate:.6g}, the configuration asks for "
                f"{sample_rate:.6g}; restore finetune.batch_size and privacy.population, or choose another --out"
            )
        return charged[-1].noise_multiplier
    return solve_noise_multiplier(
        target_epsilon=target_epsilon, delta=delta, sample_rate=sample_rate, steps=steps, prior_events=ledger.events()
    )


def _affordable(event: DPSGDEvent, ledger: Ledger, target_epsilon: float, delta: float, wanted: int) -> int:
    if np.isinf(target_epsilon) or wanted < 1:
        return wanted
    allowed = affordable_steps(
        target_epsilon=target_epsilon, delta=delta, event=event, prior_events=ledger.events(), at_most=wanted
    )
    if allowed < wanted:
        logger.warning(
            "%d of the %d remaining steps fit in the budget: steps repeated after an interruption are charged again",
            allowed,
            wanted,
        )
    return min(allowed, wanted)


def _check_model(model: Denoiser, config: FinetuneConfig) -> None:
    """The clip bound rests on rows being independent: seen on stand-in noise before any sensitive image is read."""
    check_per_sample(model, DenoisingLoss(config.multiplicity), _stand_in(model, config, 2), multiplicity=config.multiplicity)


def _train(
    folder: RunFolder, config: FinetuneConfig, optimizer: PrivateOptimizer, private: ImageSet, steps: int, event: DPSGDEvent,
    ledger: Ledger, randomness: SecretRandom, stamp: str, device: str,
) -> None:  # fmt: skip
    sampler = PoissonSampler(len(private), event.sample_rate, randomness)
    physical = plan_finetune(optimizer.module, config).physical_batch_size
    loss_fn = DenoisingLoss(config.multiplicity)
    pixels, labels = torch.from_numpy(private.images), torch.from_numpy(private.labels)
    path = folder.checkpoint("finetune-progress")
    progress = tqdm(range(optimizer.steps, steps), desc=STAGE, unit="step", initial=optimizer.steps, total=steps, leave=False)
    for step in progress:
        ledger.charge(event, stage=STAGE)  # before the batch is drawn
        # Noise levels, noise and label drops go to places in the batch. Were they known, an image more would shift those of all
        # later images, and the sum would change by far more than C; drawn in secret they are independent of who is in.
        random = torch.Generator().manual_seed(int.from_bytes(randomness.random_bytes(8), "little") >> 1)
        for part in micro_batches(sampler.draw(), physical):
            batch = _batch(part, pixels, labels, optimizer.module, config, random)
            optimizer.accumulate(loss_fn, [t.to(device) for t in batch], torch.from_numpy(part.weights).to(device))
        # A short run must not average over its own beginning; the schedule is a function of the step alone.
        optimizer.ema_decay = min(config.ema_decay, (1 + step) / (10 + step)) if config.ema_decay else 0.0
        optimizer.step()
        if (step + 1) % config.checkpoint_steps == 0 and step + 1 < steps:
            folder.save_tensors(path, optimizer.state_dict(), {"fingerprint": stamp})


def _batch(
    part: MicroBatch, pixels: Tensor, labels: Tensor, model: Any, config: FinetuneConfig, random: torch.Generator
) -> tuple[Tensor, ...]:
    """Images of one micro-batch as K rows each; padding is blank, so that no record's data stands in for it."""
    blank = torch.from_numpy(part.indices < 0)
    rows = torch.from_numpy(part.indices).clamp_min(0)
    images = to_float(pixels[rows]).masked_fill(blank[:, None, None, None], 0.0)
    return denoising_batch(
        images, labels[rows].masked_fill(blank, 0), edm=model.edm, num_classes=model.num_classes,
        multiplicity=config.multiplicity, label_dropout=config.label_dropout, generator=random,
    ).args()  # fmt: skip


def plan_finetune(model: Denoiser, config: FinetuneConfig) -> Plan:
    """How micro-batches are done: the way of each layer, and the images at a time that the memory budget allows.

    Looks at one stand-in image. Without ``physical_batch_size`` a micro-batch has at most 256 rows: more gains nothing.
    """
    most = config.physical_batch_size or max(1, 256 // config.multiplicity)
    return make_plan(
        model, DenoisingLoss(config.multiplicity), _stand_in(model, config, 1), multiplicity=config.multiplicity,
        memory_budget=config.memory_budget_mib * 2**20, batch_size=min(most, config.batch_size),
    )  # fmt: skip


def _stand_in(model: Denoiser, config: FinetuneConfig, images: int) -> list[Tensor]:
    """A batch of noise in the shape of the real ones, on the model's device."""
    random = torch.Generator().manual_seed(0)
    shape = (images, model.channels, model.resolution, model.resolution)
    batch = denoising_batch(
        torch.rand(shape, generator=random) * 2 - 1, torch.arange(images) % model.num_classes, edm=model.edm,
        num_classes=model.num_classes, multiplicity=config.multiplicity, label_dropout=config.label_dropout, generator=random,
    )  # fmt: skip
    device = next(model.parameters()).device
    return [t.to(device) for t in batch.args()]


def _restore(folder: RunFolder, optimizer: PrivateOptimizer, stamp: str) -> None:
    tensors, metadata = folder.load_tensors(folder.checkpoint("finetune-progress"), STAGE)
    if metadata.get("fingerprint") != stamp:
        raise RunError(
            f"{folder.checkpoint('finetune-progress')} was made with other settings; its steps are spent. Restore the settings, "
            "or start over with another --out"
        )
    optimizer.load_state_dict(tensors)
