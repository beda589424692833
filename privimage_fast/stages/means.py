"""Noisy means of the sensitive classes, or of several modes of each, which a model is warmed up on.

Formal guarantee: an image adds one vector to one row — of its class the centre that is nearest to it; the centres are known
beforehand — its pixels less that centre, scaled to an L2 norm of at most C, and a constant b that counts it, and nothing to any
other row. So one image more or less changes the table by at most √(C² + b²) in L2, Gaussian noise of σ times that covers every
cell, and the event is charged before an image is read. Everything that is made of the table afterwards is post-processing,
the centres of another round too: k-means as Lloyd's, whose every update is one such mechanism, from public images on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
from privimage_fast.stages.clusters import kmeans
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, set_fingerprint
from privimage_fast.stages.interrupt import interrupts_held

STAGE = "warmup"

# b ÷ C: what the count takes of the sensitivity. At a half, counts cost the pixels an eighth more noise.
_COUNT = 0.5
# Whole numbers: residuals in units of 1/1024 grey level, what is added up in 1/4096 of those. So norms and sums are exact, and
# what an image adds is the same to the last bit wherever it stands and whoever else is there; floats would round by both.
_UNIT, _PARTS = 1024, 4096
_IMAGES = 2048
_POSED = 4096  # public images, of all and of each class, that a question is made from at most
_EACH = 8  # public images that a class's cluster is made from at least, on average


@dataclass(frozen=True)
class Question:
    """All that is fixed before an image is read.

    Args:
        centres: (classes·modes, channels, height, width) float64 in [−1, 1], whole multiples of 1/1024 grey level, those of a
            class one after the other: public, or made of earlier noisy answers.
        modes: of each class.
        max_norm: C.
        basis: (components, channels·height·width) float64, orthonormal rows in which public images vary, most of it first.
    """

    centres: Tensor
    modes: int
    max_norm: float
    basis: Tensor

    @property
    def classes(self) -> Tensor:
        """(classes·modes,) int64: whose each row is."""
        return torch.arange(len(self.centres)) // self.modes

    @property
    def count(self) -> float:
        """b, the constant entry."""
        return _COUNT * self.max_norm

    @property
    def sensitivity(self) -> float:
        """What one image more or less changes, in L2."""
        return math.hypot(self.max_norm, self.count)


def pose(
    public: ImageSet, *, n_classes: int, chosen: np.ndarray, labels: np.ndarray, modes: int, max_norm: float | None, seed: int
) -> Question:  # fmt: skip
    """What will be asked: around the mean of each class's chosen public images, or of all public ones where it has none; of
    several modes around the means of that many clusters of them.

    chosen, labels: indices into ``public`` and their classes, as the selection left them. A ``max_norm`` of None takes what nine
    in ten of those images keep to.
    """
    random = np.random.default_rng(seed)
    rest = _floats(public.images[random.permutation(len(public))[:_POSED]])
    centres, lengths = [], []
    for c in range(n_classes):
        own = chosen[labels == c]
        if modes > 1:
            some = _floats(public.images[random.permutation(own)[:_POSED]]) if len(own) else rest
            # Clusters of few images are those images, and near to nothing else: C is taken from images they were not made of.
            fitted, count = some[::2], min(modes, max(1, len(some) // (2 * _EACH)))
            clusters = torch.from_numpy(kmeans(fitted.numpy(), count, random))
            found = torch.cat([clusters, clusters[:1].expand(modes - len(clusters), -1)])  # no image is nearer to a copy
            lengths.append(_nearest(some[1::2] if len(some) > 1 else some, found))
        elif len(own):
            found = sum((_floats(public.images[part]).sum(0) for part in _parts(own)), torch.zeros(1))[None] / len(own)
            lengths += [_nearest(_floats(public.images[part]), found) for part in _parts(own)]
        else:
            found = rest.mean(0, keepdim=True)
        centres.append(found)
    if max_norm is None:
        distances = torch.cat(lengths) if lengths else _nearest(rest, centres[0])
        max_norm = max(float(np.quantile(distances.numpy(), 0.9)), 1e-3)
    shape = public.channels, public.resolution, public.resolution
    return Question(_on_grid(torch.cat(centres)).view(-1, *shape), modes, max_norm, _components(rest - rest.mean(0), seed))


def _nearest(images: Tensor, centres: Tensor) -> Tensor:
    """The distance (images,) of each image to the centre that is nearest to it."""
    return torch.cdist(images, centres).amin(1)


def _on_grid(centres: Tensor) -> Tensor:
    """In whole multiples of 1/1024 grey level."""
    return ((centres + 1) * 127.5 * _UNIT).round() / (127.5 * _UNIT) - 1


def run_means(
    folder: RunFolder, *, public: ImageSet, chosen: np.ndarray, labels: np.ndarray, modes: int, max_norm: float | None, seed: int,
    rounds: int, private: ImageSet, noise_multiplier: float, ledger: Ledger, noise_key: NoiseKey,
) -> ClassMeans:  # fmt: skip
    """Asks ``rounds`` times, each time around what was answered before, or returns what was answered. ``public`` to ``seed``: of
    :func:`pose`.

    Raises:
        RunError: the folder holds the answer to another question (its cost is spent).
    """
    # Of what the question is made from: its own last bits may differ on another machine.
    posed = (set_fingerprint(public), fingerprint(chosen.tobytes(), labels.tobytes()), max_norm, seed)
    several = () if modes == rounds == 1 else (modes, rounds)
    stamp = fingerprint(posed, noise_multiplier, private.label_names, *several)
    answered = 0
    if folder.means.exists():
        described = folder.load_tensors(folder.means, STAGE)[1]
        if described["fingerprint"] != stamp:
            raise RunError(
                f"{folder.means} answers a question with other settings; its privacy is spent, so it is not asked again here. "
                "Restore the settings, or start over with another --out"
            )
        answered = described.get("rounds", 1)  # so far: each is kept as soon as it is there
        if answered == rounds:
            return load_means(folder)
    question = pose(
        public, n_classes=len(private.label_names), chosen=chosen, labels=labels, modes=modes, max_norm=max_norm, seed=seed
    )  # fmt: skip
    event, public_centres = GaussianEvent(noise_multiplier), question.centres
    std, doubt = event.noise_multiplier * question.sensitivity, torch.zeros(len(public_centres), dtype=torch.float64)
    for number in range(answered, rounds):
        if number:
            tensors, _ = folder.load_tensors(folder.means, STAGE)
            doubt, public_centres = tensors["doubt"], tensors["public"]
            question = replace(question, centres=_on_grid(tensors["means"].to(torch.float64)))
        with interrupts_held("the answer is waited for and kept, since it is charged"):
            ledger.charge(event, stage=STAGE)  # before the data is touched
            sums = clipped_sums(private, question)
            sums += std * torch.from_numpy(noise_key.gaussian(tuple(sums.shape), step=number, stream=Stream.MEANS))
            means, doubt = denoised(sums, question, std, public=public_centres, doubt=doubt)
            folder.save_tensors(
                folder.means,
                {
                    "means": means.images, "trust": means.trust, "classes": means.classes, "weights": means.weights,
                    "sums": sums, "centres": question.centres, "public": public_centres, "doubt": doubt,
                },
                {
                    "fingerprint": stamp, "noise_multiplier": noise_multiplier, "noise_std": std, "max_norm": question.max_norm,
                    "trust": means.whole().trust.tolist(), "modes": modes, "rounds": number + 1,
                },
            )  # fmt: skip
    return load_means(folder)


def load_means(folder: RunFolder) -> ClassMeans:
    tensors, _ = folder.load_tensors(folder.means, STAGE)
    means = ClassMeans.one_each(tensors["means"], tensors["trust"])
    return replace(means, **{name: tensors[name] for name in ("classes", "weights") if name in tensors})


def pictures(folder: RunFolder, class_names: tuple[str, ...]) -> ImageSet:
    """Three a mean, for looking at: the public centre, the noisy mean as it came, and what was made of both; of a class the means
    that stand for most come first.
    """
    tensors, metadata = folder.load_tensors(folder.means, STAGE)
    means, centres = load_means(folder), tensors["centres"]
    raw = _noisy_means(tensors["sums"], _COUNT * metadata["max_norm"])[0].view_as(centres) + centres
    three = torch.stack([tensors.get("public", centres).float(), raw.float(), means.images], 1)
    order = np.lexsort((-means.weights.numpy(), means.classes.numpy()))
    labels = means.classes.numpy()[order].repeat(3)
    return ImageSet(to_uint8(three[order].flatten(0, 1)).numpy(), labels, class_names, name="means")


def clipped_sums(images: ImageSet, question: Question) -> Tensor:
    """The exact table (classes·modes, pixels + 1) float64: sums of clipped residuals, and b for each image in the last column.

    Distances are compared in whole numbers too, so that an image goes to the same row whoever else is there.
    """
    scale = 127.5 * _UNIT
    centres = np.rint((question.centres.flatten(1).numpy() + 1) * scale).astype(np.int64)
    table, counts = np.zeros(centres.shape, np.int64), np.zeros(len(centres), np.int64)
    for part in _parts(np.arange(len(images))):
        rows = first = images.labels[part] * question.modes
        pixels = images.images[part].transpose(0, 3, 1, 2).reshape(len(rows), -1).astype(np.int64) * _UNIT
        residual = pixels - centres[rows]
        squared = np.square(residual).sum(1)
        for mode in range(1, question.modes):
            other = pixels - centres[first + mode]
            length = np.square(other).sum(1)
            nearer = length < squared
            residual[nearer], squared[nearer] = other[nearer], length[nearer]
            rows = np.where(nearer, first + mode, rows)
        norm = np.sqrt(squared.astype(np.float64))
        # A whisker below C for what the root and the product round; towards zero, so that no entry grows.
        factor = np.minimum(1.0, question.max_norm * (1 - 1e-12) * scale / np.maximum(norm, 1.0))
        np.add.at(table, rows, np.trunc(residual * factor[:, None] * _PARTS).astype(np.int64))
        counts += np.bincount(rows, minlength=len(centres))
    sums = np.concatenate([table / (scale * _PARTS), question.count * counts[:, None]], 1)
    return torch.from_numpy(sums)


def denoised(
    sums: Tensor, question: Question, std: float, *, public: Tensor | None = None, doubt: Tensor | float = 0.0
) -> tuple[ClassMeans, Tensor]:
    """Means from the noisy table, shrunk towards the centres by what its own noise leaves of it (empirical Bayes).

    In the public images' principal components the means vary most in the first ones; what varies no more than noise is noise.
    ``public``: centres that were public, from which trust is measured, where the question's own are answers already; ``doubt``
    (rows,): the squared length of what may be noise in those. Returns the means, and that of them.
    """
    residuals, counts = _noisy_means(sums, question.count)
    found, noise = residuals @ question.basis.T, std / counts
    doubt = doubt + torch.zeros(len(sums), dtype=torch.float64)
    for first, last in pairwise(_blocks(found.shape[1])):
        part, weight = found[:, first:last], 1 / noise.clamp(min=1e-9) ** 4
        signal = ((part**2 - noise**2) * weight).sum() / (weight.sum() * (last - first))
        signal = signal.clamp(0.0, question.max_norm**2 / (last - first))  # a mean of clipped residuals is no longer than C
        kept = signal / (signal + noise**2).clamp(min=1e-30)
        part *= kept
        doubt += ((last - first) * kept * noise**2)[:, 0]  # the posterior's variance; a later round need not mend an earlier one
    images = (found @ question.basis).view_as(question.centres) + question.centres
    length = (images - (question.centres if public is None else public)).flatten(1).square().sum(1)
    trust = length / (length + doubt).clamp(min=1e-30)
    counted = sums[:, -1].view(-1, question.modes).clamp(min=0.0)
    counted = torch.where(counted.sum(1, keepdim=True) > 0, counted, 1.0)  # where nothing was counted, alike
    weights = (counted / counted.sum(1, keepdim=True)).flatten()
    images, trust, weights = (t.to(torch.float32) for t in (images.clamp(-1, 1), trust, weights))
    return ClassMeans(images, trust, question.classes, weights), doubt


def _noisy_means(sums: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """Mean residuals (rows, pixels) and noisy counts (rows, 1), which are taken to be one at least."""
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
