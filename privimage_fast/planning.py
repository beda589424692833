"""What a run will cost, from public numbers and steps timed on random images. Nothing here reads an image."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor

from privimage_fast.config import ConfigError, RunConfig
from privimage_fast.dp.accounting import DPSGDEvent, GaussianEvent, epsilon, solve_noise_multiplier
from privimage_fast.dp.graphs import CapturedStep
from privimage_fast.dp.noise import NoiseKey
from privimage_fast.dp.optimizer import PrivateOptimizer, UpdateRule
from privimage_fast.dp.planner import Plan as StepPlan
from privimage_fast.dp.sampling import expected_padded
from privimage_fast.models.labeller import row_entries
from privimage_fast.models.replay import forget
from privimage_fast.models.training import ImageModel, PrivateTraining
from privimage_fast.stages.finetune import budget_record, plan_finetune
from privimage_fast.stages.query import QueryConfig
from privimage_fast.stages.warmup import WarmupConfig, lowest_level


@dataclass(frozen=True)
class Plan:
    """What a run will cost, from public numbers and a timed step on random images."""

    epsilon: float
    delta: float
    population: int
    sample_rate: float
    steps: int
    noise_multiplier: float
    query_noise_multiplier: float | None
    query_noise: float | None  # standard deviation on a cell of the table of votes
    query_votes: float | None  # of a class, of classes of equal size
    means_noise_multiplier: float | None
    means_pixel_noise: float | None  # about, on a pixel of a class mean, of images in [−1, 1]
    means_modes: int  # means a class
    means_rounds: int
    epsilon_without_query: float  # and without the means and labels
    label_noise_multiplier: float | None
    label_steps: int
    label_bytes: int  # of the sensitive images' features
    labels_per_class: int
    selection: str  # what is chosen of the public set, in words
    parameters: int
    private_parameters: int  # trained on sensitive images
    step: StepPlan
    pretrain_seconds: float
    warmup_seconds: float
    finetune_seconds: float
    label_seconds: float  # of drafts
    sample_seconds: float

    def table(self) -> str:
        """The plan as aligned lines of text."""
        query = means = "none"
        if self.query_noise_multiplier is not None:
            noise, votes = self.query_noise or 0.0, self.query_votes or 0.0
            query = f"σ₁ = {self.query_noise_multiplier:.4g}: noise of {noise:.3g} on a cell, of about {votes:.3g} votes a class"
            if 3 * noise > votes / self.labels_per_class:  # even if all were for the labels that are to be chosen
                query += " (little but noise: more images, fewer classes, a larger ε or query.share)"
        total = self.pretrain_seconds + self.warmup_seconds + self.finetune_seconds + self.label_seconds + self.sample_seconds
        if self.means_noise_multiplier is not None:
            each = f" in each of {self.means_rounds} rounds" if self.means_rounds > 1 else ""
            what = f" of each of {self.means_modes} a class" if self.means_modes > 1 else ""
            means = f"σ₂ = {self.means_noise_multiplier:.4g}{each}: noise of about {self.means_pixel_noise:.2g} on a pixel{what}"
            if (self.means_pixel_noise or 0.0) > _DROWNED:
                means += " (little but noise: more images, fewer classes, a larger ε or warmup.share, or warmup.steps 0)"
        beside = "" if self.private_parameters == self.parameters else " the discriminator; the generator's beside"
        drafts = f", drafts {_minutes(self.label_seconds)}" if self.label_seconds else ""
        warmed = f", warm up {_minutes(self.warmup_seconds)}" if self.warmup_seconds else ""
        rows = [
            ("budget", f"ε = {self.epsilon:g}, δ = {self.delta:.3g}, N = {self.population} (public)"),
            ("query", query),
            ("class means", means),
            ("selection", self.selection),
            ("DP-SGD", f"σ = {self.noise_multiplier:.4f}, q = {self.sample_rate:.4g}, {self.steps} steps; alone they cost ε = "
                       f"{self.epsilon_without_query:.3f}" if self.steps else "none: trained on public images only"),
            ("labels", "as they are drawn for" if self.label_noise_multiplier is None else
                       f"σ₃ = {self.label_noise_multiplier:.4g} in each of {self.label_steps} steps of a linear layer on "
                       f"{self.label_bytes / 2**20:.0f} MiB of features" +
                       (f" (with some {_FEW:,} images or fewer it gained nothing where it was tried, or cost points)"
                        if self.population <= _FEW else "")),
            ("network", f"{self.parameters:,} parameters" + ("" if self.private_parameters == self.parameters else
                        f", {self.private_parameters:,} of them (the discriminator) trained by DP-SGD")),
            ("micro-batch", f"{self.step.physical_batch_size} images, up to {self.step.peak_bytes / 2**20:.0f} MiB to fine-tune"
                            + beside),
            ("rough time", f"{_minutes(total)}: pre-train {_minutes(self.pretrain_seconds)}{warmed}, fine-tune "
                           f"{_minutes(self.finetune_seconds)}{drafts}, sample {_minutes(self.sample_seconds)} "
                           "(classifiers apart)"),
        ]  # fmt: skip
        return "\n".join(f"{name:<12} {value}" for name, value in rows)


def make_plan(
    c: RunConfig, model: ImageModel, *, n_labels: int, n_classes: int, autocast: torch.dtype | None = None
) -> Plan:  # fmt: skip
    """The plan of a resolved configuration. ``model``: on the device that will train it; its weights are changed.

    n_labels: labels that the query would ask for; n_classes: of the sensitive set; autocast: dtype the networks may compute in.
    """
    assert c.privacy.population and c.privacy.delta and c.select.labels_per_class
    rate = c.finetune.sample_rate(c.privacy.population) if c.privacy.train else 0.0
    queried, votes = c.select.mode == "semantic", c.query.votes_per_image or c.select.labels_per_class
    prior, modes = questions(c), c.warmup.modes or 1
    sigma, steps = 0.0, (c.finetune.steps or 0) if c.privacy.train else 0
    if math.isfinite(c.privacy.epsilon) and steps:
        sigma = solve_noise_multiplier(
            target_epsilon=c.privacy.epsilon, delta=c.privacy.delta, sample_rate=rate, steps=steps,
            prior_events=[*prior, *reserved(c)],
        )  # fmt: skip
    device = str(next(model.parameters()).device)
    with _casting(device, autocast if model.low_precision else None):
        step = plan_finetune(model, c.finetune, c.privacy.population)
    networks = (model, c.finetune.training(model).module)
    parameters, private_parameters = (sum(p.numel() for p in network.parameters()) for network in networks)
    images_a_step = expected_padded(step.physical_batch_size, c.finetune.batch_size, c.privacy.population)[1]
    seconds = _step_seconds(model, c, device, step.physical_batch_size, autocast)
    images = c.sample.per_class * n_classes
    return Plan(
        epsilon=c.privacy.epsilon, delta=c.privacy.delta, population=c.privacy.population, sample_rate=rate,
        steps=steps, noise_multiplier=sigma,
        query_noise_multiplier=c.query.noise_multiplier if queried else None,
        query_noise=c.query.noise_multiplier * math.sqrt(votes) if queried and c.query.noise_multiplier is not None else None,
        query_votes=c.privacy.population * votes / n_classes if queried else None,
        means_noise_multiplier=c.warmup.noise_multiplier if c.warms_up else None,
        means_pixel_noise=modes * _pixel_noise(c, c.warmup.noise_multiplier, c.privacy.population, n_classes)
        if c.warms_up and c.warmup.noise_multiplier is not None else None,
        means_modes=modes, means_rounds=c.warmup.rounds or 1,
        epsilon_without_query=epsilon([DPSGDEvent(sigma, rate, steps)] if steps else [], c.privacy.delta),
        label_noise_multiplier=c.label.noise_multiplier if c.relabels else None, label_steps=c.label.steps,
        label_bytes=4 * c.privacy.population * row_entries(c.label.classifier),
        labels_per_class=c.select.labels_per_class,
        selection=_selection_text(c, n_labels=n_labels, n_classes=n_classes),
        parameters=parameters, private_parameters=private_parameters, step=step,
        pretrain_seconds=0.0 if c.select.mode == "none" else seconds.public * c.pretrain.batch_size * c.pretrain.steps,
        warmup_seconds=seconds.public * c.warmup.batch_size * c.warmup.steps if c.warms_up else 0.0,
        finetune_seconds=(seconds.private * images_a_step + seconds.after_step) * steps,
        label_seconds=seconds.draw * c.label.drafts * n_classes if c.relabels else 0.0,
        sample_seconds=seconds.draw * images,
    )  # fmt: skip


def planned_budget(c: RunConfig, plan: Plan) -> dict[str, Any]:
    """The content of budget.json as planned, of a resolved configuration."""
    return budget_record(
        c.finetune, plan.population, plan.epsilon, plan.delta, plan.noise_multiplier, plan.steps,
        query_noise_multiplier=plan.query_noise_multiplier, means_noise_multiplier=plan.means_noise_multiplier,
        means_rounds=plan.means_rounds if plan.means_noise_multiplier is not None else None, later=reserved(c),
    )  # fmt: skip


@dataclass(frozen=True)
class _Seconds:
    """An image's share of drawing, of a public and of a private step, and what a private step takes beside its images."""

    draw: float
    public: float
    private: float
    after_step: float


# Sensitive images with which labels from a private layer were seen not to pay.
_FEW = 5000

# Rows that are timed together. On a CPU a few tell; on a GPU so few would take as long as thousands, which is what runs there.
_TIMED_ROWS = {"cpu": 64, "cuda": 4096}


def _casting(device: str, dtype: torch.dtype | None) -> torch.autocast:
    """As the stages compute; without a cache, which would keep casts of weights that have moved since."""
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None, cache_enabled=False)


def _step_seconds(
    model: ImageModel, config: RunConfig, device: str, micro_batch: int, autocast: torch.dtype | None
) -> _Seconds:  # fmt: skip
    """Times each part on random images (fastest of several). Changes the model's weights.

    What a GPU will replay from CUDA graphs is timed so: of small networks launches are most of an eager step.
    micro_batch: images of a private step that fit in its memory.
    """
    rows = _TIMED_ROWS.get(torch.device(device).type, _TIMED_ROWS["cpu"])
    private = config.finetune.training(model)
    # Each part with as many rows as it has at a time: of eight images alone the calls, not the images, would be timed.
    count, many = max(1, min(rows // private.rows, micro_batch)), min(rows, config.pretrain.batch_size)
    drawn = min(rows, config.sample.batch_size)
    random = torch.Generator(device).manual_seed(0)
    shape = (max(count, many), model.channels, model.resolution, model.resolution)
    images = torch.rand(shape, generator=random, device=device) * 2 - 1  # where the run has them as well
    labels = torch.zeros(max(count, many, drawn), dtype=torch.int64, device=device)
    # One step of a sampler tells what all of them take.
    sampler = replace(config.sample.sampler, steps=2)
    passes = [model.drawable.network_evaluations(options) for options in (config.sample.sampler, sampler)]

    def draw() -> None:
        noise = torch.randn(drawn, *model.drawable.latent_shape, generator=random, device=device)
        model.drawable.draw(labels[:drawn], sampler, noise).sum().item()

    with _casting(device, autocast):
        drawing = _best(draw) / drawn * passes[0] / passes[1]
    forget(model.drawable)
    low = autocast if model.low_precision else None
    public = _public_seconds(model, config, images[:many], labels[:many], random, low)
    if not (config.privacy.train and config.finetune.steps):
        return _Seconds(drawing, public, 0.0, 0.0)
    return _Seconds(drawing, public, *_private_seconds(config, private, images[:count], labels[:count], random, low))


def _public_seconds(
    model: ImageModel, config: RunConfig, images: Tensor, labels: Tensor, random: torch.Generator, autocast: torch.dtype | None
) -> float:  # fmt: skip
    """Of an image, in a step of public training; its state is gone afterwards."""
    c = config.pretrain
    public = model.public_training(lr=1e-6, ema_decay=c.ema_decay, label_dropout=c.label_dropout)

    def public_step() -> None:
        public.step(images, labels, random, 1e-6).item()

    with _casting(str(images.device), autocast):
        seconds = _best(public_step) / len(images)
        public.finish()
    return seconds


def _private_seconds(
    config: RunConfig, private: PrivateTraining, images: Tensor, labels: Tensor, random: torch.Generator,
    autocast: torch.dtype | None,
) -> tuple[float, float]:  # fmt: skip
    """Of an image, in a private step, and of what a step takes beside its images."""
    optimizer = PrivateOptimizer(
        private.module, max_grad_norm=1.0, noise_multiplier=1.0, expected_batch_size=len(images), multiplicity=private.rows,
        update=UpdateRule("adam", lr=1e-6), ema_decay=0.5 if private.averages else 0.0, noise_key=NoiseKey.from_seed(0),
    )  # fmt: skip
    # Of what weights and their state leave, as in the run, and not the fastest way whatever it takes.
    optimizer.memory_budget = config.finetune.memory_budget(images.device)
    captured = CapturedStep(optimizer, private.loss, private.batch(images, labels, random), autocast=autocast)

    def private_accumulate() -> None:
        captured.accumulate(private.batch(images, labels, random))[0].sum().item()

    def after_steps() -> None:
        for step in range(private.round):
            captured.step()
            private.after_step(step, 0)
        optimizer.flat.data[0].item()  # waits for the GPU

    return _best(private_accumulate) / len(images), _best(after_steps) / private.round


def _best(work: Callable[[], None], enough: float = 1.0) -> float:
    """Seconds of the fastest of two to ten tries, as many as fit in ``enough`` seconds: a neighbour on the machine may slow a
    single one tenfold."""
    work()  # warms up
    times: list[float] = []
    while len(times) < 2 or (len(times) < 10 and sum(times) < enough):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def _selection_text(c: RunConfig, *, n_labels: int, n_classes: int) -> str:
    """What the plan says of the selection; above all where it has nothing to leave out."""
    mode, each, ratio = c.select.mode, c.select.labels_per_class, c.select.max_image_ratio
    assert each is not None
    if mode == "none":
        return "none: nothing is pre-trained on public images"
    capped = "" if ratio is None else f", at most {100 * ratio:g} % of the images"
    if mode == "all":
        return f"none: all public images{capped}, without their labels"
    what = "cluster" if c.query.clusters else "public label"
    labels = f"{each} {what}{'s' if each > 1 else ''} a class"
    if mode == "random":
        return f"as many public images as {labels} would bring{capped}, drawn blindly"
    if each * n_classes < n_labels:
        return f"{labels}, {each * n_classes} of {n_labels}{capped}"
    advice = "more clusters" if c.query.clusters else "query.clusters, or a public set with more labels"
    return (
        f"{labels}, which is all {n_labels} of them{capped}: no {what} is left out, and the query only buys which class takes "
        f"which; to select, take {'fewer labels_per_class, ' if each > 1 else ''}{advice}"
    )


def query_noise_multiplier(target_epsilon: float, delta: float, share: float) -> float:
    """σ₁ such that the query takes ``share`` of μ², where μ-GDP (Dong et al. 2022, corollary 1) is what (ε, δ) allows."""
    if math.isinf(target_epsilon):
        return 0.0

    def excess(mu: float) -> float:
        left, right = norm.logcdf(-target_epsilon / mu + mu / 2), target_epsilon + norm.logcdf(-target_epsilon / mu - mu / 2)
        return math.exp(left) - math.exp(right) - delta

    mu = brentq(excess, min(1e-4, delta), 10 + 2 * math.sqrt(2 * target_epsilon) + target_epsilon)
    return 1 / (mu * math.sqrt(share))


# Votes of an image for clusters where none are set, and how many clusters there may be: one for so many public images, none so
# fine that a class's votes, were all for its part of a tenth of the clusters, gave each fewer than so many deviations of noise.
_CLUSTER_VOTES, _IMAGES_A_CLUSTER, _MOST_CLUSTERS, _VOTES_IN_NOISE = 3, 16, 2000, 14


def fill_clusters(
    query: QueryConfig, *, population: int, n_classes: int, labels_per_class: int | None, public_images: int
) -> QueryConfig:
    """As many clusters as the noise lets tell apart, in place of "auto": from public numbers only.

    Finer clusters choose better until noise drowns their votes. At least twice as many as are to be chosen, so that there is a
    choice. ``query`` has its σ₁.
    """
    votes = query.votes_per_image or _CLUSTER_VOTES
    most = min(_MOST_CLUSTERS, public_images // _IMAGES_A_CLUSTER)
    if query.noise_multiplier:
        noise = query.noise_multiplier * math.sqrt(votes)
        most = min(most, int(population * votes / (0.1 * _VOTES_IN_NOISE * noise)))
    count = min(public_images, max(most, 2 * n_classes * (labels_per_class or 1)))
    return replace(query, clusters=count, votes_per_image=min(votes, count))


# What is aimed at on a pixel of a class mean, of images in [−1, 1], what is too much, and what of the budget it may take.
_PIXEL_NOISE, _DROWNED, _LEAST_SHARE, _MOST_SHARE = 0.1, 0.5, 0.02, 0.25
# The same of several means a class, how many at most, and how often they are asked for.
_MODE_NOISE, _MODES_SHARE, _MOST_MODES, _ROUNDS = 0.05, 0.1, 16, 3


def fill_warmup(c: RunConfig, delta: float, *, population: int, n_classes: int) -> WarmupConfig:
    """The warm-up's nulls from public numbers: how many means a class, rounds, σ₂ of a round, and from which noise level on."""
    w = c.warmup
    asked = c.query.share if c.select.mode == "semantic" and c.query.noise_multiplier is None else 0.0
    asked += c.label.share if c.relabels and c.label.noise_multiplier is None else 0.0

    def noise(share: float, rounds: int) -> float:
        share = share if w.share is not None else min(share, max((1 - asked) / 2, 1e-3))  # the query's and the labels' are taken
        return math.sqrt(rounds) * query_noise_multiplier(c.privacy.epsilon, delta, share)

    modes, rounds, sigma = w.modes, w.rounds or _ROUNDS, w.noise_multiplier
    if modes is None:
        each = _pixel_noise(c, noise(w.share or _MODES_SHARE, rounds), population, n_classes)
        affordable = _MOST_MODES if each == 0 else min(_MOST_MODES, int(_MODE_NOISE / each))
        # A GAN has use for one, and a σ₂ of the user's is meant for one question.
        modes = 1 if c.model.family == "gan" or sigma is not None else max(1, affordable)
    if modes == 1:
        rounds = w.rounds or 1
    if sigma is None and (modes > 1 or w.share is not None):
        sigma = noise(w.share or _MODES_SHARE, rounds)
    elif sigma is None:
        wanted = _PIXEL_NOISE / _pixel_noise(c, 1.0, population, n_classes)
        sigma = min(max(wanted, noise(_MOST_SHARE, rounds)), noise(_LEAST_SHARE, rounds))
    level = w.lowest_level or lowest_level(modes, c.data.resolution)
    if level >= w.highest_level:
        raise ConfigError(
            f"warmup.highest_level is {w.highest_level:g}, but class means are taught from σ = {level:g} on at "
            f"{c.data.resolution} px; raise it, or set warmup.lowest_level"
        )
    return replace(w, modes=modes, rounds=rounds, noise_multiplier=sigma, lowest_level=level)


def _pixel_noise(c: RunConfig, noise_multiplier: float, population: int, n_classes: int) -> float:
    """On a mean of a class, of classes of equal size; residuals are about half as long as an image of ones, whatever C is."""
    length = 0.5 * c.data.resolution * math.sqrt(c.data.channels)
    return noise_multiplier * length * n_classes / population


def questions(c: RunConfig) -> list[GaussianEvent]:
    """What a resolved configuration asks of the whole set before fine-tuning."""
    asked = [c.query.noise_multiplier] if c.select.mode == "semantic" else []
    asked += [c.warmup.noise_multiplier] * (c.warmup.rounds or 1) if c.warms_up else []
    return [GaussianEvent(noise) for noise in asked if noise is not None]


def reserved(c: RunConfig) -> list[DPSGDEvent]:
    """What a resolved configuration keeps of the budget for labels, while it is fine-tuned."""
    sigma = c.label.noise_multiplier
    return [DPSGDEvent(sigma, 1.0, c.label.steps)] if c.relabels and sigma is not None else []


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
