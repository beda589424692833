"""Noisy class means of the sensitive images, which a model is warmed up on.

Formal guarantee: an image adds one vector to the row of its class — its pixels less the class's centre, which is known
beforehand, scaled to an L2 norm of at most C, and a constant b that counts it — and nothing to any other row. So one image more
or less changes the table by at most √(C² + b²) in L2, Gaussian noise of σ times that covers every cell, and the event is charged
before an image is read. Everything that is made of the table afterwards is post-processing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from privimage_fast.data import ImageSet
from privimage_fast.dp.accounting import GaussianEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey, Stream
from privimage_fast.models.edm import to_float, to_uint8
from privimage_fast.models.training import ClassMeans
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, set_fingerprint
from privimage_fast.stages.interrupt import interrupts_held

STAGE = "warmup"

# b ÷ C: what the count takes of the sensitivity. At a half, counts cost the pixels an eighth more noise.
_COUNT = 0.5
# Whole numbers: residuals in units of 1/1024 grey level, what is added up in 1/4096 of those. So norms and sums are exact, and
# what an image adds is the same to the last bit wherever it stands and whoever else is there; floats would round by both.
_UNIT, _PARTS = 1024, 4096
_IMAGES = 2048


@dataclass(frozen=True)
class Question:
    """All that is fixed before an image is read.

    Args:
        centres: (classes, channels, height, width) float64 in [−1, 1], whole multiples of 1/1024 grey level: public, or made of
            earlier noisy answers.
        max_norm: C.
        basis: (components, channels·height·width) float64, orthonormal rows in which public images vary, most of it first.
    """

    centres: Tensor
    max_norm: float
    basis: Tensor

    @property
    def count(self) -> float:
        """b, the constant entry."""
        return _COUNT * self.max_norm

    @property
    def sensitivity(self) -> float:
        """What one image more or less changes, in L2."""
        return math.hypot(self.max_norm, self.count)


def pose(
    public: ImageSet, *, n_classes: int, chosen: np.ndarray, labels: np.ndarray, max_norm: float | None, seed: int
) -> Question:  # fmt: skip
    """What will be asked: around the mean of each class's chosen public images, or of all public ones where it has none.

    chosen, labels: indices into ``public`` and their classes, as the selection left them. A ``max_norm`` of None takes what nine
    in ten of those images keep to.
    """
    rest = _floats(public.images[np.random.default_rng(seed).permutation(len(public))[:4096]])
    mean = rest.mean(0)
    centres, norms = mean.repeat(n_classes, 1), []
    for c in np.unique(labels[labels < n_classes]):
        own = [public.images[part] for part in _parts(chosen[labels == c])]
        centres[c] = sum(_floats(part).sum(0) for part in own) / sum(map(len, own))
        norms += [(_floats(part) - centres[c]).norm(dim=1) for part in own]
    if max_norm is None:
        lengths = torch.cat(norms) if norms else (rest - mean).norm(dim=1)
        max_norm = max(float(np.quantile(lengths.numpy(), 0.9)), 1e-3)
    centres = ((centres + 1) * 127.5 * _UNIT).round() / (127.5 * _UNIT) - 1
    shape = public.channels, public.resolution, public.resolution
    return Question(centres.view(n_classes, *shape), max_norm, _components(rest - mean, seed))


def run_means(
    folder: RunFolder, *, public: ImageSet, chosen: np.ndarray, labels: np.ndarray, max_norm: float | None, seed: int,
    private: ImageSet, noise_multiplier: float, ledger: Ledger, noise_key: NoiseKey,
) -> ClassMeans:  # fmt: skip
    """Asks once, or returns what was answered. ``public`` to ``seed``: of :func:`pose`.

    Raises:
        RunError: the folder holds the answer to another question (its cost is spent).
    """
    # Of what the question is made from: its own last bits may differ on another machine.
    posed = (set_fingerprint(public), fingerprint(chosen.tobytes(), labels.tobytes()), max_norm, seed)
    stamp = fingerprint(posed, noise_multiplier, private.label_names)
    if folder.means.exists():
        if folder.load_tensors(folder.means, STAGE)[1]["fingerprint"] != stamp:
            raise RunError(
                f"{folder.means} answers a question with other settings; its privacy is spent, so it is not asked again here. "
                "Restore the settings, or start over with another --out"
            )
        return load_means(folder)
    question = pose(
        public, n_classes=len(private.label_names), chosen=chosen, labels=labels, max_norm=max_norm, seed=seed
    )  # fmt: skip
    event = GaussianEvent(noise_multiplier)
    with interrupts_held("the means are waited for and kept, since they are charged"):
        ledger.charge(event, stage=STAGE)  # before the data is touched
        std = event.noise_multiplier * question.sensitivity
        sums = clipped_sums(private, question)
        sums += std * torch.from_numpy(noise_key.gaussian(tuple(sums.shape), step=0, stream=Stream.MEANS))
        means = denoised(sums, question, std)
        folder.save_tensors(
            folder.means,
            {"means": means.images, "trust": means.trust, "sums": sums, "centres": question.centres},
            {
                "fingerprint": stamp,
                "noise_multiplier": noise_multiplier,
                "noise_std": std,
                "max_norm": question.max_norm,
                "trust": means.trust.tolist(),
            },
        )
    return means


def load_means(folder: RunFolder) -> ClassMeans:
    tensors, _ = folder.load_tensors(folder.means, STAGE)
    return ClassMeans(tensors["means"], tensors["trust"])


def pictures(folder: RunFolder, class_names: tuple[str, ...]) -> ImageSet:
    """Three a class, for looking at: its centre, the noisy mean as it came, and what was made of both."""
    tensors, metadata = folder.load_tensors(folder.means, STAGE)
    centres = tensors["centres"]
    raw = _noisy_means(tensors["sums"], _COUNT * metadata["max_norm"])[0].view_as(centres) + centres
    three = torch.stack([centres.float(), raw.float(), tensors["means"]], 1).flatten(0, 1)
    return ImageSet(to_uint8(three).numpy(), np.repeat(np.arange(len(class_names)), 3), class_names, name="means")


def clipped_sums(images: ImageSet, question: Question) -> Tensor:
    """The exact table (classes, pixels + 1) float64: sums of clipped residuals, and b for each image in the last column."""
    scale = 127.5 * _UNIT
    centres = np.rint((question.centres.flatten(1).numpy() + 1) * scale).astype(np.int64)
    table = np.zeros(centres.shape, np.int64)
    for part in _parts(np.arange(len(images))):
        labels = images.labels[part]
        pixels = images.images[part].transpose(0, 3, 1, 2).reshape(len(labels), -1)
        residual = pixels.astype(np.int64) * _UNIT - centres[labels]
        norm = np.sqrt(np.square(residual).sum(1).astype(np.float64))
        # A whisker below C for what the root and the product round; towards zero, so that no entry grows.
        factor = np.minimum(1.0, question.max_norm * (1 - 1e-12) * scale / np.maximum(norm, 1.0))
        np.add.at(table, labels, np.trunc(residual * factor[:, None] * _PARTS).astype(np.int64))
    counts = np.bincount(images.labels, minlength=len(centres))
    sums = np.concatenate([table / (scale * _PARTS), question.count * counts[:, None]], 1)
    return torch.from_numpy(sums)


def denoised(sums: Tensor, question: Question, std: float) -> ClassMeans:
    """Class means from the noisy table, shrunk towards the centres by what its own noise leaves of it (empirical Bayes).

    In the public images' principal components the means vary most in the first ones; what varies no more than noise is noise.
    """
    residuals, counts = _noisy_means(sums, question.count)
    found, noise = residuals @ question.basis.T, std / counts
    doubt = torch.zeros_like(counts)
    for first, last in pairwise(_blocks(found.shape[1])):
        part, weight = found[:, first:last], 1 / noise.clamp(min=1e-9) ** 4
        signal = ((part**2 - noise**2) * weight).sum() / (weight.sum() * (last - first))
        signal = signal.clamp(0.0, question.max_norm**2 / (last - first))  # a mean of clipped residuals is no longer than C
        kept = signal / (signal + noise**2).clamp(min=1e-30)
        part *= kept
        doubt += (last - first) * kept * noise**2  # the posterior's variance
    images = (found @ question.basis).view_as(question.centres) + question.centres
    length = found.square().sum(1)
    trust = length / (length + doubt[:, 0]).clamp(min=1e-30)
    return ClassMeans(images.clamp(-1, 1).to(torch.float32), trust.to(torch.float32))


def _noisy_means(sums: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """Mean residuals (classes, pixels) and noisy counts (classes, 1), which are taken to be one at least."""
    counts = (sums[:, -1:] / count).clamp(min=1.0)
    return sums[:, :-1] / counts, counts


def _parts(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + _IMAGES] for start in range(0, len(rows), _IMAGES)]


def _blocks(components: int) -> list[int]:
    """Where blocks of components begin that share one estimate of their variance: fine first, then 16 at a time."""
    edges = [0, 1, 2, 4, 8, *range(16, components, 16)]
    return [edge for edge in edges if edge < components] + [components]


def _components(residuals: Tensor, seed: int, most: int = 512) -> Tensor:
    """Orthonormal rows, the principal components of the residuals (images, pixels), all of them where that is cheap."""
    images, pixels = residuals.shape
    if pixels <= 1024:
        return torch.linalg.eigh(residuals.T @ residuals)[1].T.flip(0).contiguous()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.svd_lowrank(residuals, q=min(most, images, pixels), niter=4)[2].T.contiguous()


def _floats(images: np.ndarray) -> Tensor:
    """uint8 NHWC → float64 (images, channels·height·width) in [−1, 1]."""
    return to_float(torch.from_numpy(images)).flatten(1).to(torch.float64)
