"""Sampling: synthetic images from a trained model, as many for each class. Post-processing, at no privacy cost."""

from __future__ import annotations

import logging
import math
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from privimage_fast.data import ImageSet, atomic_path, class_sheet, save_folder, save_npz, save_zip
from privimage_fast.models.edm import SamplerConfig, to_uint8
from privimage_fast.models.labeller import Labeller
from privimage_fast.models.replay import forget
from privimage_fast.models.training import Drawable
from privimage_fast.progress import progress_bar
from privimage_fast.stages.folder import RunFolder, fingerprint, timed

logger = logging.getLogger(__name__)

_HAZE = 7  # levels of 255

FORMATS = ("npz", "zip", "folder")


@dataclass(frozen=True)
class SampleConfig:
    """What is sampled and how it is written.

    Args:
        per_class: images drawn for each class; equal counts, so that the images do not tell the sizes of the sensitive classes.
            With `label.steps` some get another class's label.
        batch_size: images sampled at a time.
        formats: any of npz, zip (EDM layout) and folder (class per sub-folder); npz is always written.
        sampler: method, steps, noise levels, guidance.
    """

    per_class: int = 1000
    batch_size: int = 500
    formats: tuple[str, ...] = ("npz",)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "formats", tuple(self.formats))
        if self.per_class < 1 or self.batch_size < 1:
            raise ValueError(f"sample.per_class and batch_size must be ≥ 1, found {self.per_class} and {self.batch_size}")
        unknown = set(self.formats) - set(FORMATS)
        if unknown:
            raise ValueError(f"sample.formats may hold {', '.join(FORMATS)}; found {', '.join(sorted(unknown))}")


def run_sample(
    folder: RunFolder, config: SampleConfig, *, model: Drawable, class_names: Sequence[str], weights: str, seed: int,
    device: str = "cpu", autocast: torch.dtype | None = None, labeller: Labeller | None = None,
) -> ImageSet:  # fmt: skip
    """Samples synthetic.npz (and the other formats) batch by batch; an interrupted run goes on with the next batch.

    Image i follows from (seed, i), up to rounding, whatever the batch size. ``autocast``: dtype the network may compute in.

    ``labeller``: gives the images their labels, in place of those they are drawn for; classes then differ in size.
    ``weights`` names the state of both (its fingerprint), so that samples of other weights are not taken for its own.
    """
    # Latents are of the second kind: of (seed, number), no longer of a batch.
    stamp = fingerprint(config, tuple(class_names), weights, seed, str(autocast), "latents 2")
    if folder.synthetic.exists() and folder.finished("sample", stamp):
        return _load(folder, class_names)
    if folder.synthetic.exists():
        _tell_earlier(folder, config, len(class_names))
    with timed(folder, "sample", stamp):
        labels = np.repeat(np.arange(len(class_names)), config.per_class)
        parts = folder.path / "checkpoints" / f"sample-{stamp}"
        images = draw_resumably(parts, config, model=model, labels=labels, seed=seed, device=device, autocast=autocast)
        folder.labels.unlink(missing_ok=True)
        if labeller is not None:
            found = labeller.labels(images, device)
            _tell_labels(folder, labels, found, class_names)
            labels = found
        synthetic = ImageSet(images, labels, tuple(class_names), name="synthetic")
        save_npz(synthetic, folder.synthetic)
        if "zip" in config.formats:
            save_zip(synthetic, folder.path / "synthetic.zip")
        if "folder" in config.formats:
            save_folder(synthetic, folder.path / "synthetic", overwrite=True)
        _remove_copies(folder, config)
        shutil.rmtree(parts)
        save_sheet(folder, "after", synthetic)
    return synthetic


def draw_resumably(
    parts: Path, config: SampleConfig, *, model: Drawable, labels: np.ndarray, seed: int, device: str = "cpu",
    autocast: torch.dtype | None = None, description: str = "sample",
) -> np.ndarray:  # fmt: skip
    """uint8 NHWC images for labels (n,), batch by batch; those that the folder ``parts`` holds already are not drawn again.

    The caller removes the folder when it has made of them what it wants.
    """
    parts.mkdir(exist_ok=True)
    images = []
    for i, start in enumerate(progress_bar(range(0, len(labels), config.batch_size), desc=description, unit="batch")):
        path = parts / f"{i}.npy"
        if not path.exists():
            part = draw(
                model, labels[start : start + config.batch_size], config.sampler, seed=seed, first=start, device=device,
                autocast=autocast,
            )  # fmt: skip
            with atomic_path(path) as temporary, open(temporary, "wb") as handle:
                np.save(handle, part)
        images.append(np.load(path))
    return np.concatenate(images)


def draw(
    model: Drawable, labels: np.ndarray, config: SamplerConfig, *, seed: int, first: int = 0, device: str = "cpu",
    autocast: torch.dtype | None = None,
) -> np.ndarray:  # fmt: skip
    """uint8 NHWC images ``first``, ``first`` + 1, … of a seed, for labels (n,)."""
    kind = torch.device(device).type
    model.eval().to(device)
    if kind == "cuda":
        model.to(memory_format=torch.channels_last)
    noise = latents(seed, range(first, first + len(labels)), model.latent_shape).to(device)
    with torch.autocast(kind, autocast, enabled=autocast is not None, cache_enabled=False):
        images = model.draw(torch.from_numpy(labels).to(device), config, noise)
    return cleaned(to_uint8(images.float()).cpu().numpy(), config)


def cleaned(images: np.ndarray, config: SamplerConfig) -> np.ndarray:
    """uint8 images whose nearly black, or nearly white, values are black, or white."""
    images = np.where(images <= (config.black or 0), np.uint8(0), images)
    return np.where(images >= 255 - (config.white or 0), np.uint8(255), images)


def plain_ends(public: ImageSet) -> tuple[int, int]:
    """SamplerConfig.black and white for images like the public ones: 0 where their values near that end mean something."""
    values = public.images[:: max(1, len(public) // 10_000)]
    at_black, near_black = np.mean(values == 0), np.mean((values > 0) & (values <= _HAZE))
    at_white, near_white = np.mean(values == 255), np.mean((values < 255) & (values >= 255 - _HAZE))
    plain = (at >= 0.1 and near <= 0.2 * at for at, near in ((at_black, near_black), (at_white, near_white)))
    black, white = (_HAZE if end else 0 for end in plain)
    return black, white


def latents(seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> torch.Tensor:
    """(n, *shape) float32 standard normal: the row of index i is a function of (seed, i) alone."""
    rows = np.empty((len(indices), math.prod(shape)), dtype=np.float32)
    for row, i in zip(rows, indices, strict=True):
        key = np.array([seed % 2**64, i], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(rows).view(-1, *shape)


def save_public_sheets(
    folder: RunFolder, sampler: SamplerConfig, *, model: Drawable, public: ImageSet, indices: np.ndarray, labels: np.ndarray,
    class_names: tuple[str, ...], seed: int, device: str = "cpu", autocast: torch.dtype | None = None,
) -> None:  # fmt: skip
    """What the model draws before it has seen a sensitive image (before.png), and what it was shown (public.png).

    indices: of the chosen public images; labels: the classes they stand for.
    """
    wanted = np.repeat(np.arange(min(20, len(class_names))), 12)
    before = draw(model, wanted, sampler, seed=seed, device=device, autocast=autocast)
    forget(model)  # fine-tuning moves the weights, and needs the memory
    save_sheet(folder, "before", ImageSet(before, wanted, class_names, name="before"))
    if len(indices) and labels.max() < len(class_names):
        order = np.random.default_rng(seed).permutation(len(indices))
        save_sheet(folder, "public", ImageSet(public.images[indices[order]], labels[order], class_names, name="public"))


def save_sheet(folder: RunFolder, name: str, images: ImageSet) -> None:
    """samples/<name>.png: one row a class."""
    folder.samples.mkdir(exist_ok=True)
    with atomic_path(folder.samples / f"{name}.png") as temporary:
        class_sheet(images).save(temporary, format="PNG")


def _tell_earlier(folder: RunFolder, config: SampleConfig, n_classes: int) -> None:
    """Says that an earlier synthetic set is replaced."""
    try:
        with np.load(folder.synthetic, allow_pickle=False) as arrays:
            earlier = len(arrays["labels"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        logger.warning("%s cannot be read, and is drawn anew", folder.synthetic)
        return
    wanted = config.per_class * n_classes
    fewer = "; sample.per_class brings the larger set back" if wanted < earlier else ""
    logger.info("the %d synthetic images in %s are replaced by %d%s", earlier, folder.path, wanted, fewer)


def _tell_labels(folder: RunFolder, drawn: np.ndarray, found: np.ndarray, class_names: Sequence[str]) -> None:
    """Writes labels.json: which part of the images drawn for each class kept its label. Warns of a class that lost most."""
    count = len(class_names)
    kept = np.bincount(drawn[drawn == found], minlength=count) / np.bincount(drawn, minlength=count)
    whole = float(np.mean(drawn == found))
    folder.write_json(folder.labels, {"kept": whole, "kept_of_class": kept.tolist()})
    if whole < 2 / count:
        logger.warning(
            "only %.0f %% of the synthetic images kept the label that they were drawn for, and %.0f %% would by chance: learned "
            "labels are worth little here; label.steps 0 leaves images theirs", 100 * whole, 100 / count,
        )  # fmt: skip
    for name, images in zip(class_names, np.bincount(found, minlength=count), strict=True):
        if images < 0.25 * len(found) / count:
            logger.warning(
                "class %s: only %d of %d synthetic images got its label. Look at samples/after.png: the model may not know this "
                "class; label.steps 0 leaves images the labels that they were drawn for", name, images, len(found),
            )  # fmt: skip


def _remove_copies(folder: RunFolder, config: SampleConfig) -> None:
    """Of an earlier set, in formats that are not asked for now: they would be taken for copies of this one."""
    if "zip" not in config.formats:
        (folder.path / "synthetic.zip").unlink(missing_ok=True)
    if "folder" not in config.formats and (folder.path / "synthetic").is_dir():
        shutil.rmtree(folder.path / "synthetic")


def _load(folder: RunFolder, class_names: Sequence[str]) -> ImageSet:
    with np.load(folder.synthetic, allow_pickle=False) as arrays:
        return ImageSet(arrays["images"], arrays["labels"], tuple(class_names), name="synthetic")
