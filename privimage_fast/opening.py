"""What a run is opened with, and held to before a stage begins: sets read and apart, a device, nulls filled, public numbers
sound, the folder charged for what it holds.
"""

from __future__ import annotations

import logging
import math
from dataclasses import fields, replace
from pathlib import Path

import torch

from privimage_fast.config import ConfigError, DataConfig, RunConfig, differing_keys
from privimage_fast.data import DataError, ImageSet, Limits, images_in_both, join, open_image_set
from privimage_fast.dp.accounting import DPSGDEvent, GaussianEvent, default_delta, epsilon
from privimage_fast.dp.ledger import Ledger
from privimage_fast.planning import fill_clusters, fill_warmup, query_noise_multiplier, questions, reserved
from privimage_fast.stages.clusters import check_clusters
from privimage_fast.stages.folder import RUN_FOLDERS, RunError, RunFolder
from privimage_fast.stages.label import LabelConfig, check_images
from privimage_fast.stages.sample import plain_ends
from privimage_fast.stages.saved import LABELLER
from privimage_fast.stages.select import labels_per_class

logger = logging.getLogger(__name__)

_NAMED = 5  # classes that an error names: of hundreds nobody reads all

# Keys that may change when a run folder is opened again: nothing that was trained or charged depends on them.
_REOPENABLE = ("out", "device", "precision", "sample.", "evaluate.")


def open_source(data: DataConfig, name: str, source: str | None = None) -> ImageSet:
    """The set that ``data`` names "public", "private" or "test", or another source in its place, in the size it asks for."""
    source = source or getattr(data, name)
    if not source:
        raise ConfigError(f"data.{name} is not set; give a folder, a file or embedded:NAME")
    # Clusters need no labels, and sets in a list may have one each.
    limits = Limits(min_classes=1) if name == "public" else None
    try:
        sets = [
            open_image_set(
                s, resolution=data.resolution, channels=data.channels, format=data.format, skip_bad=data.skip_bad,
                limits=limits,
            ) for s in ([source] if isinstance(source, str) else source)
        ]  # fmt: skip
    except DataError as error:
        raise DataError(f"data.{name}: {error}") from error
    images = join(sets) if len(sets) > 1 else sets[0]
    for skipped in images.skipped:
        logger.warning("skipped %s: %s", skipped.path, skipped.reason)
    return images


def resolve(c: RunConfig, saved: RunConfig | None, *, images: int, n_classes: int, public: ImageSet) -> RunConfig:
    """Fills every null and every "auto" number from the saved run, or from the data, so that the saved configuration says what
    was done.

    images, n_classes: of the sensitive set.
    """
    filled = saved or c
    population = c.privacy.population or filled.privacy.population or images
    delta = c.privacy.delta or filled.privacy.delta or default_delta(population)
    query_noise = filled.query.noise_multiplier if c.query.noise_multiplier is None else c.query.noise_multiplier
    if query_noise is None:
        query_noise = query_noise_multiplier(c.privacy.epsilon, delta, c.query.share)
    query = replace(c.query, noise_multiplier=query_noise)
    if query.clusters == "auto":
        kept = saved.query if saved is not None else query
        if isinstance(kept.clusters, int):
            votes = query.votes_per_image or kept.votes_per_image or 1
            query = replace(query, clusters=kept.clusters, votes_per_image=min(votes, kept.clusters))
        else:
            query = fill_clusters(
                query, population=population, n_classes=n_classes, labels_per_class=c.select.labels_per_class,
                public_images=len(public),
            )  # fmt: skip
    each = c.select.labels_per_class or filled.select.labels_per_class
    if each is None or (saved is None and c.select.mode in ("semantic", "random")):
        clustered = query.clusters is not None
        each = labels_per_class(c.select, n_labels=query.n_labels(public), n_classes=n_classes, clusters=clustered)
    nulls = [name for name in ("modes", "rounds", "noise_multiplier", "lowest_level") if getattr(c.warmup, name) is None]
    warmup = replace(c.warmup, **{name: getattr(filled.warmup, name) for name in nulls})
    if c.warms_up:
        warmup = fill_warmup(replace(c, warmup=warmup), delta, population=population, n_classes=n_classes)
    label_noise = filled.label.noise_multiplier if c.label.noise_multiplier is None else c.label.noise_multiplier
    if label_noise is None and c.relabels:
        label_noise = query_noise_multiplier(c.privacy.epsilon, delta, c.label.share) * math.sqrt(c.label.steps)
    label = replace(c.label, noise_multiplier=label_noise)
    if saved is not None and not label.steps:  # the rest is not used, and is kept for whoever takes labels up again
        label = replace(saved.label, steps=0)
    steps = c.finetune.steps or filled.finetune.steps
    if steps is None and c.privacy.train:
        steps = c.finetune.total_steps(population)
    model = c.model
    if saved is not None and model.edm.sigma_data is None:  # earlier versions had a number where nothing is said
        model = replace(model, edm=replace(model.edm, sigma_data=saved.model.edm.sigma_data))
    sampler, known = c.sample.sampler, filled.sample.sampler
    if None in (sampler.black, sampler.white):
        # Runs of earlier versions know neither, and keep their images as they are.
        ends = plain_ends(public) if saved is None else (known.black or 0, known.white or 0)
        black, white = (end if given is None else given for given, end in zip((sampler.black, sampler.white), ends, strict=True))
        sampler = replace(sampler, black=black, white=white)
    multiplicity = c.finetune.multiplicity or filled.finetune.multiplicity or c.model.default_multiplicity
    return replace(
        c,
        privacy=replace(c.privacy, population=population, delta=delta),
        model=model,
        query=replace(query, votes_per_image=query.votes_per_image or each),
        select=replace(c.select, labels_per_class=each),
        warmup=warmup,
        finetune=replace(c.finetune, steps=steps, multiplicity=multiplicity),
        label=label,
        sample=replace(c.sample, sampler=sampler),
    )


def check_apart(*, public: ImageSet, private: ImageSet, test: ImageSet | None) -> None:
    """Refuses a public or test set that holds sensitive images; fewer than one in a hundred are only told. The first of all
    checks: with the same folder twice every other answer would mislead.

    Who gives one folder for two sets must not get a run that claims ε for images it was pre-trained on. Few equal images
    (blank ones, say) may be in both by chance. The answer goes to the owner's terminal and nowhere else.

    Raises:
        ConfigError: naming the set, and how many images it has in common with the sensitive one.
    """
    apart = {
        "public": (public, "public images are trained on without noise, so ε would mean nothing for them"),
        "test": (test, "the quality of images would be judged by the very ones that they were learned from"),
    }
    for name, (images, why) in apart.items():
        shared = 0 if images is None else images_in_both(images, private)
        if images is None or not shared:
            continue
        if shared > max(1, min(len(images), len(private)) // 100):
            raise ConfigError(
                f"data.{name} and data.private have {shared:,} images in common (of {len(images):,} and {len(private):,}): "
                f"{why}; give another {name} set, or take them out of one of the two"
            )
        logger.warning(
            "data.%s and data.private have %d images in common, pixel for pixel: %s. The run goes on, for it is at most one in a "
            "hundred; take them out of one of the two if they are not blank", name, shared, why,
        )  # fmt: skip


def check_inputs(c: RunConfig, folder: RunFolder, *, public: ImageSet, private: ImageSet, test: ImageSet | None) -> None:
    """Finds out before anything is spent what would stop a later stage.

    Raises:
        ConfigError: a test set of other classes, files that are not there, or networks that do not fit the images.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            c.model.build(resolution=c.data.resolution, channels=c.data.channels, num_classes=private.n_classes)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if c.model.unused_sizes:
        logger.warning("%s", c.model.unused_sizes)
    if test is not None and test.label_names != private.label_names:
        odd = [
            f"only {name} has {', '.join(names[:_NAMED])}" + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
            for name, one, other in (("data.test", test, private), ("data.private", private, test))
            if (names := sorted(set(one.label_names) - set(other.label_names)))
        ]  # fmt: skip
        raise ConfigError(
            f"data.test has other classes than data.private: {'; '.join(odd) or 'the same names in another order'}. The test set "
            "needs the same class folders (or label_names)"
        )
    if c.select.mode == "semantic" and not folder.query.exists():
        check_clusters(c.query, public)
    for key, path in (("query.onnx", c.query.onnx), ("evaluate.inception", c.evaluate.inception)):
        if path and not Path(path).is_file():
            raise ConfigError(f"{key}: no file {path}")


def check_public_numbers(c: RunConfig, *, images: int) -> None:
    """Of a resolved configuration, before anything is spent. ``images``: found in the sensitive set.

    Raises:
        ConfigError: a stated N below what was found, a δ that promises nothing, questions that leave nothing to fine-tune with.
        RunError: batches larger than the set.
    """
    population, delta = c.privacy.population, c.privacy.delta
    assert population is not None and delta is not None
    if population < images:
        raise ConfigError(
            f"privacy.population states {population} sensitive images, but {images} were found: state at least as many, for δ "
            "has to be small against 1/N, and the card tells N; null takes the number found"
        )
    if delta >= 1 / population:
        raise ConfigError(
            f"privacy.delta is {delta:g}, which lets one of the {population} images be published as it is: it must be well "
            f"below 1/N = {1 / population:.3g}; null takes 1/(N ln N) = {default_delta(population):.3g}"
        )
    if delta > 0.5 / population:
        logger.warning(
            "privacy.delta is %.3g, close to 1/N = %.3g: a mechanism that publishes one image in two sets keeps that promise. "
            "null takes 1/(N ln N) = %.3g", delta, 1 / population, default_delta(population),
        )  # fmt: skip
    if not c.privacy.train:
        return
    if c.warms_up and c.model.family == "gan" and (c.warmup.modes or 1) > 1:
        raise ConfigError(
            f"warmup.modes is {c.warmup.modes}, but a GAN's images are held to one mean a class, and the others would be paid "
            "for in vain; leave warmup.modes out, or take model.family diffusion"
        )
    if c.relabels:
        check_images(images)
        if c.label.noise_multiplier == 0 and math.isfinite(c.privacy.epsilon):
            raise ConfigError(
                "label.noise_multiplier is 0: without noise nothing is private. Leave it out, or set privacy.epsilon to .inf"
            )
    c.finetune.sample_rate(population)
    asked = [*questions(c), *reserved(c)]
    if not asked or math.isinf(c.privacy.epsilon):
        return
    spent = epsilon(asked, delta)
    if spent >= c.privacy.epsilon:
        parts = {"the query": c.select.mode == "semantic", "the class means": c.warms_up, "the labels": c.relabels}
        names = " and ".join(name for name, is_asked in parts.items() if is_asked)
        raise ConfigError(
            f"{names} alone cost ε = {spent:.4g} of {c.privacy.epsilon:g}, and nothing is left to fine-tune with: lower "
            "query.share, warmup.share or label.share (or raise their noise_multiplier); warmup.steps 0 leaves the means out, "
            "label.steps 0 the labels"
        )


def check_reopened(folder: RunFolder, c: RunConfig, saved: RunConfig) -> None:
    """Whether a run may go on with the resolved configuration ``c``: what was trained or charged has to be as it was begun.
    Learned labels may be given up, and taken up again where they were paid for.

    Raises:
        RunError: naming the keys that differ.
    """
    free = _REOPENABLE if c.warms_up or saved.warms_up else (*_REOPENABLE, "warmup.")
    if not saved.data.holdout:  # with a share held out, a test set of its own would be trained on more images
        free += ("data.test",)
    if saved.label.steps and not c.label.steps:
        free += ("label.steps",)
        logger.warning(
            "label.steps is 0 now: images get the labels that they are drawn for. What others were charged stays charged; "
            "label.steps %d takes them up again", saved.label.steps,
        )  # fmt: skip
    elif folder.ledger.exists() and not saved.label.steps and Ledger.read(folder.ledger).steps_charged("label"):
        free += ("label.steps",)
    changed = [key for key in differing_keys(saved, c) if not key.startswith(free)]
    if changed:
        raise RunError(
            f"{folder.path} was started with other settings ({', '.join(changed)}); restore them, or choose another --out"
        )


def check_place(out: Path, data: DataConfig) -> None:
    """Refuses a run folder among images: its sheets would be taken for some of them, and they would be published with it.

    Raises:
        ConfigError: it is one of the image sets, or lies in one, or holds one, or holds folders or pictures that are no run's.
    """
    place = out.resolve()
    for name in ("public", "private", "test"):
        given = getattr(data, name)
        for source in [given] if isinstance(given, str) else given or []:
            path = Path(source).resolve()
            if path.exists() and (place == path or place in path.parents or (path.is_dir() and path in place.parents)):
                raise ConfigError(
                    f"out is {out}, and data.{name} is {source}: a run needs a folder of its own; choose another --out"
                )
    if place.is_dir() and not RunFolder(place).config.exists():
        strange = [
            entry.name for entry in place.iterdir()
            if (entry.is_dir() and entry.name not in RUN_FOLDERS) or entry.suffix.lower() in (".png", ".jpg", ".jpeg")
        ]  # fmt: skip
        if strange:
            raise ConfigError(f"out is {out}, which holds {sorted(strange)[0]} and is no run's folder; choose another --out")


def tell_settings(c: RunConfig, given: RunConfig) -> None:
    """Of a new run: what changes its images that the configuration did not ask for, and warns of what is not used."""
    ends = (("black", "values up to {} are drawn as 0"), ("white", "the {} highest values are drawn as 255"))
    for name, what in ends:
        value = getattr(c.sample.sampler, name)
        if value and getattr(given.sample.sampler, name) is None:
            logger.info("sample.sampler.%s is %d: %s, as public images have them; 0 leaves them", name, value, what.format(value))
    if c.label.steps and not c.privacy.train:
        logger.warning("label.steps is not used: privacy.train is false, and labels are learned from sensitive images as well")
    unused = [f"label.{f.name}" for f in fields(LabelConfig) if getattr(c.label, f.name) != getattr(LabelConfig(), f.name)]
    if unused and not c.label.steps:
        logger.warning("%s: not used, since label.steps is 0 and no labels are learned; 100 does", ", ".join(unused))


def check_ledger(folder: RunFolder) -> None:
    """What the folder holds of the sensitive images must be in its ledger: a lost ledger would read as ε = 0.

    Raises:
        RunError: naming the file that has no charge.
    """
    records = Ledger.read(folder.ledger).records() if folder.ledger.exists() else []
    advice = f"Restore {folder.ledger}, or start over with another --out: nothing can be said about ε without it"
    asked: list[tuple[Path, str, float, int]] = []
    if folder.query.exists():
        asked.append((folder.query, "query", folder.read_json(folder.query, "query")["noise_multiplier"], 1))
    if folder.means.exists():
        answered = folder.load_tensors(folder.means, "warmup")[1]
        asked.append((folder.means, "warmup", answered["noise_multiplier"], answered.get("rounds", 1)))
    for path, stage, sigma, rounds in asked:
        if sum(r.stage == stage and r.event == GaussianEvent(sigma) for r in records) < rounds:
            what = "an answer" if rounds == 1 else f"{rounds} answers"
            raise RunError(f"{path} holds {what} with σ = {sigma:g} that the ledger does not charge. {advice}")
    names = ("finetune", "finetune-progress", "label", "label-progress")
    weights = [(folder.checkpoint(name), name.partition("-")[0]) for name in names]
    for path, stage in (*weights, (folder.model / LABELLER, "label")):
        charged = sum(r.event.steps for r in records if r.stage == stage and isinstance(r.event, DPSGDEvent))
        if path.exists():
            tensors, metadata = folder.load_tensors(path, stage)
            taken = int(tensors["steps"] if path.stem == "finetune-progress" else metadata["steps"])
            if taken > charged:
                raise RunError(f"{path} has taken {taken} steps, the ledger charges {charged}. {advice}")


def device_of(name: str) -> str:
    """The torch device of a configured name; "auto" is the GPU where there is one."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda") and not name.startswith("cuda:"):
        raise ConfigError(f"device must be auto, cpu or cuda, found {name!r}")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError("device is cuda, but torch finds no CUDA device; use --device cpu, or see `privimage doctor`")
    return name


def autocast_of(precision: str, device: str) -> torch.dtype | None:
    """What networks may compute in beside float32."""
    low = precision == "bfloat16" or (precision == "auto" and torch.device(device).type == "cuda")
    return torch.bfloat16 if low else None
