"""Noisy class means of the sensitive images, which a diffusion model is warmed up on.

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
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, set_fingerprint

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
        stamp: of what the others were made from; their last bits may differ on another machine.
    """

    centres: Tensor
    max_norm: float
    basis: Tensor
    stamp: str = ""

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

    chosen, labels: indices into ``public`` and their classes, as the selection left them. A ``max_norm`` of None takes what three
    quarters of those images keep to.
    """
    stamp = fingerprint(set_fingerprint(public), chosen.tobytes(), labels.tobytes(), max_norm, seed)
    rest = _floats(public.images[np.random.default_rng(seed).permutation(len(public))[:4096]])
    centres = rest.mean(0).repeat(n_classes, 1)
    residuals = [rest - rest.mean(0)]
    for c in np.unique(labels[labels < n_classes]):
        own = _floats(public.images[chosen[labels == c]])
        centres[c] = own.mean(0)
        residuals.append(own - centres[c])
    centres = ((centres + 1) * 127.5 * _UNIT).round() / (127.5 * _UNIT) - 1
    if max_norm is None:
        norms = torch.cat(residuals[1:] or residuals).norm(dim=1)
        max_norm = max(float(norms.quantile(0.75) if len(norms) < 2**23 else norms.median()), 1e-3)
    return Question(centres.view(n_classes, *_shape(public)), max_norm, _components(residuals[0], seed), stamp)


def run_means(
    folder: RunFolder, question: Question, *, private: ImageSet, noise_multiplier: float, ledger: Ledger, noise_key: NoiseKey
) -> Tensor:  # fmt: skip
    """Asks once, or returns what was answered: estimated class means (classes, channels, height, width) float32 in [−1, 1].

    Raises:
        RunError: the folder holds the answer to another question (its cost is spent).
    """
    stamp = fingerprint(question.stamp, noise_multiplier, private.label_names)
    if folder.means.exists():
        tensors, metadata = folder.load_tensors(folder.means, STAGE)
        if metadata["fingerprint"] != stamp:
            raise RunError(
                f"{folder.means} answers a question with other settings; its privacy is spent, so it is not asked again here. "
                "Restore the settings, or start over with another --out"
            )
        return tensors["means"]
    event = GaussianEvent(noise_multiplier)
    ledger.charge(event, stage=STAGE)  # before the data is touched
    std = event.noise_multiplier * question.sensitivity
    sums = clipped_sums(private, question)
    sums += std * torch.from_numpy(noise_key.gaussian(tuple(sums.shape), step=0, stream=Stream.MEANS))
    means = denoised(sums, question, std)
    metadata = {"fingerprint": stamp, "noise_multiplier": noise_multiplier, "noise_std": std, "max_norm": question.max_norm}
    folder.save_tensors(folder.means, {"means": means, "sums": sums}, metadata)
    return means


def pictures(folder: RunFolder, question: Question, class_names: tuple[str, ...]) -> ImageSet:
    """Three a class, for looking at: its centre, the noisy mean as it came, and what was made of it."""
    tensors, _ = folder.load_tensors(folder.means, STAGE)
    raw = _noisy_means(tensors["sums"], question)[0].view_as(question.centres) + question.centres
    three = torch.stack([question.centres.float(), raw.float(), tensors["means"]], 1).flatten(0, 1)
    return ImageSet(to_uint8(three).numpy(), np.repeat(np.arange(len(class_names)), 3), class_names, name="means")


def clipped_sums(images: ImageSet, question: Question) -> Tensor:
    """The exact table (classes, pixels + 1) float64: sums of clipped residuals, and b for each image in the last column."""
    scale = 127.5 * _UNIT
    centres = np.rint((question.centres.flatten(1).numpy() + 1) * scale).astype(np.int64)
    table = np.zeros(centres.shape, np.int64)
    for start in range(0, len(images), _IMAGES):
        labels = images.labels[start : start + _IMAGES]
        pixels = images.images[start : start + _IMAGES].transpose(0, 3, 1, 2).reshape(len(labels), -1)
        residual = pixels.astype(np.int64) * _UNIT - centres[labels]
        norm = np.sqrt(np.square(residual).sum(1).astype(np.float64))
        # A whisker below C for what the root and the product round; towards zero, so that no entry grows.
        factor = np.minimum(1.0, question.max_norm * (1 - 1e-12) * scale / np.maximum(norm, 1.0))
        np.add.at(table, labels, np.trunc(residual * factor[:, None] * _PARTS).astype(np.int64))
    counts = np.bincount(images.labels, minlength=len(centres))
    sums = np.concatenate([table / (scale * _PARTS), question.count * counts[:, None]], 1)
    return torch.from_numpy(sums)


def denoised(sums: Tensor, question: Question, std: float) -> Tensor:
    """Class means from the noisy table, shrunk towards the centres by what its own noise leaves of it (empirical Bayes).

    In the public images' principal components the means vary most in the first ones; what varies no more than noise is noise.
    """
    residuals, counts = _noisy_means(sums, question)
    found, noise = residuals @ question.basis.T, std / counts
    for first, last in pairwise(_blocks(found.shape[1])):
        part, weight = found[:, first:last], 1 / noise.clamp(min=1e-9) ** 4
        signal = ((part**2 - noise**2) * weight).sum() / (weight.sum() * (last - first))
        signal = signal.clamp(0.0, question.max_norm**2 / (last - first))  # a mean of clipped residuals is no longer than C
        part *= signal / (signal + noise**2).clamp(min=1e-30)
    means = (found @ question.basis).view_as(question.centres) + question.centres
    return means.clamp(-1, 1).to(torch.float32)


def _noisy_means(sums: Tensor, question: Question) -> tuple[Tensor, Tensor]:
    """Mean residuals (classes, pixels) and noisy counts (classes, 1), which are taken to be one at least."""
    counts = (sums[:, -1:] / question.count).clamp(min=1.0)
    return sums[:, :-1] / counts, counts


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


def _shape(images: ImageSet) -> tuple[int, int, int]:
    return images.channels, images.resolution, images.resolution
