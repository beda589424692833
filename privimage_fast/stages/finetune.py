"""Fine-tuning on the sensitive images with DP-SGD.

Formal guarantee: each step is one Poisson-subsampled Gaussian mechanism on the sum of clipped per-image gradients — all rows
of an image (its noise levels, its pairs of real and fake) are one gradient, clipped once. Its event is in the ledger before the
batch is drawn. A resumed run charges what it repeats, and stops early rather than pass the target ε. The loop is the same for
all families; what a row, its loss and the released weights are is the family's (``models.training.PrivateTraining``).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privimage_fast.data import ImageSet
from privimage_fast.dp.accounting import DPSGDEvent, Event, solve_noise_multiplier
from privimage_fast.dp.engine import check_per_sample
from privimage_fast.dp.graphs import CapturedStep
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.dp.planner import MemoryBudgetError, Plan, default_memory_budget, make_plan
from privimage_fast.dp.rules import UncoveredParameterError
from privimage_fast.dp.sampling import MicroBatch, PoissonSampler, SecretRandom, even_micro_batch, mersenne_state, micro_batches
from privimage_fast.models.edm import to_float
from privimage_fast.models.training import ImageModel, PrivateTraining, averaging_decay, below, prefixed
from privimage_fast.progress import progress_bar
from privimage_fast.stages.budget import affordable
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, timed
from privimage_fast.stages.interrupt import interrupts_held
from privimage_fast.stages.pretrain import check_averaging

logger = logging.getLogger(__name__)

STAGE = "finetune"

# Rows of a micro-batch by kind of device; the GPU's figure is for an H100's 132 multiprocessors and was not measured.
MOST_ROWS = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class FinetuneConfig:
    """DP-SGD. Every value here is public.

    Args:
        steps: noised steps; null derives them from `epochs`.
        epochs: expected passes over the set when `steps` is null.
        batch_size: the *expected* batch size; the sample rate is batch_size / population.
        multiplicity: K, what is drawn for each image of a batch, under one clip: noise levels (diffusion) or pairs of real and
            fake (gan); null is 8 or 1.
        max_grad_norm: C. Adam does not feel its scale; at the published 1e-3 nearly every gradient is clipped.
        lr, ema_decay, label_dropout: as in pre-training.
        physical_batch_size: images at a time, at most; null chooses by `memory_budget_mib` and speed.
        memory_budget_mib: memory that a micro-batch may take, over parameters and optimizer state. null is 1024 on a CPU, and on
            a GPU most of what is free when fine-tuning begins. A budget that does not hold one image is refused before anything
            is spent.
        checkpoint_steps: how often progress is saved; a killed run repeats, and pays for, fewer steps than this.
    """

    steps: int | None = None
    epochs: float = 150.0
    batch_size: int = 4096
    multiplicity: int | None = None
    max_grad_norm: float = 1e-3
    lr: float = 3e-4
    ema_decay: float = 0.999
    label_dropout: float = 0.1
    physical_batch_size: int | None = None
    memory_budget_mib: int | None = None
    checkpoint_steps: int = 10

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "max_grad_norm", "lr", "checkpoint_steps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"finetune.{name} must be positive, found {getattr(self, name)}")
        for name in ("steps", "multiplicity", "physical_batch_size", "memory_budget_mib"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"finetune.{name} must be ≥ 1 or null, found {getattr(self, name)}")
        check_averaging("finetune", self.ema_decay, self.label_dropout)

    def sample_rate(self, population: int) -> float:
        if self.batch_size > population:
            raise RunError(f"finetune.batch_size {self.batch_size} exceeds the population {population}; lower it")
        return self.batch_size / population

    def total_steps(self, population: int) -> int:
        return self.steps or max(1, round(self.epochs / self.sample_rate(population)))

    def memory_budget(self, device: torch.device) -> int:
        """In bytes."""
        return default_memory_budget(device) if self.memory_budget_mib is None else self.memory_budget_mib * 2**20

    def training(self, model: ImageModel) -> PrivateTraining:
        return model.private_training(
            lr=self.lr, ema_decay=self.ema_decay, label_dropout=self.label_dropout,
            multiplicity=self.multiplicity or model.default_multiplicity,
        )  # fmt: skip


def run_finetune(
    folder: RunFolder, config: FinetuneConfig, *, model: ImageModel, private: ImageSet, population: int, target_epsilon: float,
    delta: float, ledger: Ledger, noise_key: NoiseKey, randomness: SecretRandom, seed: int, device: str = "cpu",
    autocast: torch.dtype | None = None, reserved: Sequence[DPSGDEvent] = (),
) -> None:  # fmt: skip
    """Fine-tunes ``model`` in place; leaves its released weights in it and in checkpoints/finetune.safetensors.

    σ is solved from what the ledger holds already, so query and means are in it, and from what is ``reserved`` of the budget for
    later stages; an infinite ``target_epsilon`` trains without noise.
    ``autocast``: dtype the network may compute in, if its family bears it; norms, sums and noise stay in float32 or better.

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
        progress_path.unlink(missing_ok=True)  # of an interruption in the last step
        model.load_state_dict(folder.load_tensors(path, STAGE)[0])
        return
    charged = _charged(ledger)
    if path.exists() or (charged and not progress_path.exists() and ledger.steps_charged(STAGE) > config.checkpoint_steps):
        logger.warning("fine-tuning begins again: %d steps in the ledger have no checkpoint", ledger.steps_charged(STAGE))
    # To the very end: a last step that is charged, but of no file, would be repeated.
    with (
        interrupts_held("the step at hand is finished and saved: it is charged") as interrupted,
        timed(folder, STAGE, stamp),
    ):
        noise_multiplier = _noise_multiplier(charged, [*ledger.events(), *reserved], target_epsilon, delta, sample_rate, steps)
        training = config.training(model)
        optimizer = PrivateOptimizer(
            training.module, max_grad_norm=config.max_grad_norm, noise_multiplier=noise_multiplier,
            expected_batch_size=sample_rate * population, update=UpdateRule("adam", lr=config.lr, betas=training.betas),
            ema_decay=config.ema_decay if training.averages else 0.0, multiplicity=training.rows,
            noise_key=noise_key,
        )  # fmt: skip
        pixels, labels = (torch.from_numpy(a).to(device) for a in (private.images, private.labels))
        optimizer.memory_budget = config.memory_budget(torch.device(device))  # of what the set, weights and their state leave
        if progress_path.exists():
            _restore(folder, optimizer, training, stamp)
        event = DPSGDEvent(noise_multiplier, sample_rate, 1)
        prior = [*ledger.events(), *reserved]
        steps = min(steps, optimizer.steps + affordable(event, prior, target_epsilon, delta, steps - optimizer.steps))
        record = budget_record(config, population, target_epsilon, delta, noise_multiplier, steps, ledger, later=reserved)
        folder.write_json(folder.budget, record)
        check_rows(model, training)
        autocast = autocast if model.low_precision else None
        with torch.autocast(torch.device(device).type, autocast, enabled=autocast is not None):
            physical = plan_finetune(model, config, population, optimizer.memory_budget).physical_batch_size
        stand_in = _stand_in(model, training, physical)  # made-up images: none of the set is read for the capture
        captured = CapturedStep(optimizer, training.loss, stand_in, autocast=autocast)
        _train(folder, config, captured, training, pixels, labels, steps, event, ledger, randomness, stamp, seed, interrupted)
        training.finish(optimizer.ema_state())
        folder.save_tensors(path, model.state_dict(), {"fingerprint": stamp, "steps": optimizer.steps})
    progress_path.unlink(missing_ok=True)


def budget_record(
    config: FinetuneConfig, population: int, target_epsilon: float, delta: float, noise_multiplier: float, steps: int,
    ledger: Ledger | None = None, query_noise_multiplier: float | None = None, means_noise_multiplier: float | None = None,
    means_rounds: int | None = None, later: Sequence[DPSGDEvent] = (),
) -> dict[str, Any]:  # fmt: skip
    """The content of budget.json: the public parameters of the run, as planned and as used.

    later: steps that are reserved for labels.
    """
    if ledger is not None:
        query_noise_multiplier, means_noise_multiplier = (
            next((r.event.noise_multiplier for r in reversed(ledger.records()) if r.stage == stage), None)
            for stage in ("query", "warmup")
        )
        means_rounds = sum(r.stage == "warmup" for r in ledger.records()) or None
    return {
        "target_epsilon": target_epsilon if np.isfinite(target_epsilon) else "inf", "delta": delta, "population": population,
        "sample_rate": config.sample_rate(population) if steps else None, "steps": steps, "noise_multiplier": noise_multiplier,
        "max_grad_norm": config.max_grad_norm, "multiplicity": config.multiplicity,
        "expected_batch_size": config.batch_size, "query_noise_multiplier": query_noise_multiplier,
        "means_noise_multiplier": means_noise_multiplier, "means_rounds": means_rounds,
        "label_noise_multiplier": later[0].noise_multiplier if later else None,
        "label_steps": sum(event.steps for event in later) or None,
    }  # fmt: skip


def _charged(ledger: Ledger) -> list[DPSGDEvent]:
    return [r.event for r in ledger.records() if r.stage == STAGE and isinstance(r.event, DPSGDEvent)]


def _noise_multiplier(
    charged: list[DPSGDEvent], prior: list[Event], target_epsilon: float, delta: float, sample_rate: float, steps: int
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
        target_epsilon=target_epsilon, delta=delta, sample_rate=sample_rate, steps=steps, prior_events=prior
    )


def check_rows(model: ImageModel, training: PrivateTraining) -> None:
    """The clip bound rests on images being apart: seen on stand-in noise before any sensitive image is read.

    Raises:
        UncoveredParameterError: the module mixes images, or one image's rows depend on another image of the batch.
    """
    module = copy.deepcopy(training.module)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():  # a layer that begins at zero would hide what is behind it
        for p in module.parameters():
            p += 0.01 * torch.randn(p.shape, generator=random).to(p)
    check_per_sample(module, training.loss, _stand_in(model, training, 2), multiplicity=training.rows)
    before, after = (_stand_in(model, training, 2, last=last) for last in (1.0, -0.5))
    for one, other in zip(before, after, strict=True):
        if not torch.allclose(one[: training.rows], other[: training.rows], rtol=1e-4, atol=1e-5):
            raise UncoveredParameterError(
                f"{type(model).__name__} makes an image's rows from other images of its batch as well (batch normalisation in "
                "the generator?), so clipping cannot bound one image"
            )


def _train(
    folder: RunFolder, config: FinetuneConfig, captured: CapturedStep, training: PrivateTraining, pixels: Tensor, labels: Tensor,
    steps: int, event: DPSGDEvent, ledger: Ledger, randomness: SecretRandom, stamp: str, seed: int,
    interrupted: Callable[[], bool],
) -> None:  # fmt: skip
    optimizer = captured.optimizer
    device = optimizer.flat.data.device
    sampler = PoissonSampler(len(pixels), event.sample_rate, randomness)
    path = folder.checkpoint("finetune-progress")
    bar = progress_bar(range(optimizer.steps, steps), desc=STAGE, unit="step", initial=optimizer.steps, total=steps)

    def save() -> None:
        tensors = optimizer.state_dict() | prefixed("training/", training.state_dict())
        folder.save_tensors(path, tensors, {"fingerprint": stamp})

    if 0 < steps <= optimizer.steps:  # the budget ended before this call; what the last steps were paid for is used all the same
        training.after_step(steps - 1, seed, last=True)
    for step in bar:
        if interrupted():
            save()
            raise KeyboardInterrupt
        ledger.charge(event, stage=STAGE)  # before the batch is drawn
        # Noise levels, latents and label drops go to places in the batch. Were they known, an image more would shift those of all
        # later images, and the sum would change by far more than C; drawn in secret they are independent of who is in.
        random = secret_generator(randomness, device)
        for part in micro_batches(sampler.draw(), captured.samples):
            batch = training.batch(*_images(part, pixels, labels), random)
            captured.accumulate(batch, torch.from_numpy(part.weights))
        # A short run must not average over its own beginning; the schedule is a function of the step alone.
        optimizer.ema_decay = averaging_decay(config.ema_decay, step) if training.averages else 0.0
        captured.step()
        training.after_step(step, seed, last=step + 1 == steps)
        if (step + 1) % config.checkpoint_steps == 0 and step + 1 < steps:
            save()


def secret_generator(randomness: SecretRandom, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator whose whole state is secret; ``manual_seed`` would keep 32 bits of whatever it is given."""
    if torch.device(device).type != "cpu":
        generator = torch.Generator(device)
        generator.set_state(philox_state(randomness))
        return generator
    generator = torch.Generator()
    state = generator.get_state()
    fields = state.numpy()
    # at::CPUGeneratorImplStateLegacy: seed (8 bytes), left (4), seeded (4), next (8), 624 words of 8 bytes each, …
    fields[8:12] = np.array([1], dtype="<i4").view(np.uint8)  # the words are mixed before the first draw
    fields[24 : 24 + 8 * 624] = mersenne_state(randomness).astype("<u8").view(np.uint8)
    generator.set_state(state)
    return generator


def philox_state(randomness: SecretRandom) -> Tensor:
    """State of torch's generator on GPUs, (16,) uint8: a key of 64 bits and the place it begins at, a multiple of 4 below 2⁶².

    124 secret bits: fewer than in a Mersenne twister, and more than anybody can try.
    """
    key, place = np.frombuffer(randomness.random_bytes(16), dtype="<u8")
    words = np.array([key, place >> np.uint64(2) << np.uint64(2) & np.uint64(2**62 - 1)], dtype="<u8")
    return torch.from_numpy(words.view(np.uint8).copy())


def _images(part: MicroBatch, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Images and labels of one micro-batch; padding is blank, so that no record's data stands in for it."""
    indices = torch.from_numpy(part.indices).to(pixels.device)
    blank, rows = indices < 0, indices.clamp_min(0)
    return to_float(pixels[rows]).masked_fill(blank[:, None, None, None], 0.0), labels[rows].masked_fill(blank, 0)


def plan_finetune(model: ImageModel, config: FinetuneConfig, population: int, memory_budget: int | None = None) -> Plan:
    """How micro-batches are done: the way of each layer, and the images at a time that the memory budget allows.

    Looks at one stand-in image. Without ``physical_batch_size`` a micro-batch has at most ``MOST_ROWS``, since more gains
    nothing, and as many images as leave little to pad.
    ``memory_budget`` in bytes is by default the config's.

    Raises:
        MemoryBudgetError: the budget does not hold one image; in terms of the configuration's keys.
    """
    training = config.training(model)
    device = next(training.module.parameters()).device
    most = config.physical_batch_size or max(1, MOST_ROWS.get(device.type, MOST_ROWS["cpu"]) // training.rows)
    budget = memory_budget or config.memory_budget(device)

    def plan(size: int) -> Plan:
        return make_plan(
            training.module, training.loss, _stand_in(model, training, 1), multiplicity=training.rows,
            memory_budget=budget, batch_size=size,
        )  # fmt: skip

    try:
        if config.physical_batch_size:
            return plan(min(most, config.batch_size))
        while True:
            even = even_micro_batch(most, config.batch_size, population)
            found = plan(even)
            if found.physical_batch_size == even:
                return found
            most = max(found.physical_batch_size, even * 7 // 8)  # too many for the memory: somewhat fewer, or what surely fits
    except MemoryBudgetError as error:
        raise MemoryBudgetError(_budget_text(config, model, training.rows, budget, error.needed), error.needed) from error


def _budget_text(config: FinetuneConfig, model: ImageModel, rows: int, budget: int, needed: int) -> str:
    found = f"is {config.memory_budget_mib}" if config.memory_budget_mib else f"is null, here {budget / 2**20:.0f}"
    several = (config.multiplicity or model.default_multiplicity) > 1
    return (
        f"finetune.memory_budget_mib {found} MiB, but one image ({rows} rows) needs {needed / 2**20:.1f} MiB: set it to "
        f"{-(-needed // 2**20)} or more, {'lower finetune.multiplicity, ' if several else ''}or take a smaller network "
        "(model.preset)"
    )


def _stand_in(model: ImageModel, training: PrivateTraining, images: int, last: float = 1.0) -> list[Tensor]:
    """A batch of noise in the shape of the real ones, on the model's device; the last image is multiplied by ``last``."""
    random = torch.Generator().manual_seed(0)
    noise = torch.rand((images, model.channels, model.resolution, model.resolution), generator=random) * 2 - 1
    labels = torch.arange(images) % model.num_classes
    if last != 1:
        noise[-1] *= last
        labels[-1] = (labels[-1] + 1) % model.num_classes
    device = next(training.module.parameters()).device
    return [t.to(device) for t in training.batch(noise, labels, random)]


def _restore(folder: RunFolder, optimizer: PrivateOptimizer, training: PrivateTraining, stamp: str) -> None:
    tensors, metadata = folder.load_tensors(folder.checkpoint("finetune-progress"), STAGE)
    if metadata.get("fingerprint") != stamp:
        raise RunError(
            f"{folder.checkpoint('finetune-progress')} was made with other settings; its steps are spent. Restore the settings, "
            "or start over with another --out"
        )
    optimizer.load_state_dict({name: t for name, t in tensors.items() if not name.startswith("training/")})
    training.load_state_dict(below("training/", tensors))
