"""Labels of the synthetic images from a classifier whose last layer is trained privately, in place of those they were drawn for.

A conditional model draws some images that look like another class than the one asked for. Whoever learns from them learns that.
What tells the classes of *synthetic* images apart is learned from drafts, which cost nothing; what tells those of *sensitive*
images apart by the same features is a linear layer, which bears far more noise than a network.

Formal guarantee: an image's row has a length of at most 1 and follows from that image alone (``models.labeller``). A step adds up
its outer product with the error of the softmax, each scaled down to an L2 norm of at most C = 1, over *all* images, so one image
more or less changes the sum by at most C; Gaussian noise of σC covers every entry. That is one Gaussian mechanism, charged before
an image is read. Sums are of whole multiples of 2⁻³⁰ and exact, so that what an image adds is the same whoever else is there.
Normalisation is by the public N. The labels are post-processing.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from privimage_fast.data import ImageSet
from privimage_fast.data.split import train_test_split
from privimage_fast.dp.accounting import DPSGDEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey, Stream
from privimage_fast.dp.precision import full_precision
from privimage_fast.models.classifier import ClassifierConfig, batched, train_classifier
from privimage_fast.models.labeller import HEAD_BITS, ROW_BITS, ROWS, Labeller, check_width
from privimage_fast.models.training import Drawable
from privimage_fast.progress import progress_bar
from privimage_fast.stages.budget import affordable
from privimage_fast.stages.folder import RunError, RunFolder, file_fingerprint, fingerprint, timed
from privimage_fast.stages.interrupt import interrupts_held
from privimage_fast.stages.sample import SampleConfig, draw_resumably
from privimage_fast.stages.saved import LABELLER

logger = logging.getLogger(__name__)

STAGE = "label"

CLIP = 1.0  # C
_ERROR_BITS = 16
MOST_IMAGES = 2 ** (53 - ROW_BITS - _ERROR_BITS)  # so many products, each at most 1, add up exactly in float64's 53 bits
_MOST_WEIGHT = 2.0**16  # of the layer: the logit of a row of length 1 stays below 2²³, and 14 + 16 bits are left behind the point
_ADDED = 4096  # rows of every call of a sum
# Momentum; learning rate at most; learning rate at which noise of 1 on the normalised gradient would have been too much.
_MOMENTUM, _MOST_LR, _LR_IN_NOISE = 0.9, 16.0, 0.012
_BEFORE = 60  # steps on drafts, without noise, that the layer begins with


@dataclass(frozen=True)
class LabelConfig:
    """Labels from a privately trained last layer, in place of those that images were drawn for.

    Args:
        steps: noised steps of that layer, each on all sensitive images; 100 does. 0 leaves the labels as they were drawn, and
            charges nothing.
        share: of the budget, as `query.share`, when `noise_multiplier` is null.
        noise_multiplier: σ₃ of a step, standard deviation of its noise ÷ what one image can change; null derives it from `share`;
            0, no noise, is for runs that are not private only.
        lr: learning rate; null takes what the noise bears: 16, or 0.012 ÷ (σ₃ ÷ N) where that is less.
        drafts: images of each class that are drawn to learn features from; they are not part of the synthetic set.
        classifier: whose features they are; its width is at most 64.
    """

    steps: int = 0
    share: float = 0.1
    noise_multiplier: float | None = None
    lr: float | None = None
    drafts: int = 500
    classifier: ClassifierConfig = field(default_factory=lambda: ClassifierConfig(width=16, epochs=8))

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"label.steps must be ≥ 0, found {self.steps}")
        if self.drafts < 6:
            raise ValueError(f"label.drafts must be ≥ 6, found {self.drafts}")
        if not 0 < self.share < 1:
            raise ValueError(f"label.share must be in (0, 1), found {self.share}")
        if self.noise_multiplier is not None and not 0 <= self.noise_multiplier < math.inf:
            raise ValueError(f"label.noise_multiplier must be ≥ 0 and finite, or null, found {self.noise_multiplier}")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ValueError(f"label.lr must be positive and finite, or null, found {self.lr}")
        try:
            check_width(self.classifier)
        except ValueError as error:
            raise ValueError(f"label.{error}") from error

    def learning_rate(self, population: int) -> float:
        """From public numbers: of little noise the most that converges, of more what keeps the layer from drifting."""
        assert self.noise_multiplier is not None
        noise = self.noise_multiplier * CLIP / population
        return self.lr or min(_MOST_LR, _LR_IN_NOISE / max(noise, 1e-12))


def check_images(count: int) -> None:
    """RunError where there are more sensitive images than sums are exact for."""
    if count > MOST_IMAGES:
        raise RunError(f"label.steps takes at most {MOST_IMAGES:,} sensitive images, found {count:,}; set it to 0")


def run_label(
    folder: RunFolder, config: LabelConfig, *, model: Drawable, weights: str, sample: SampleConfig, private: ImageSet,
    population: int, target_epsilon: float, delta: float, ledger: Ledger, noise_key: NoiseKey, seed: int, device: str = "cpu",
    autocast: torch.dtype | None = None,
) -> Labeller:  # fmt: skip
    """The labeller of a model's images; trained once a folder, and kept in checkpoints/label.safetensors.

    weights: fingerprint of the model; sample: how drafts are drawn. An interrupted run goes on with the step it was at. If the
    layer is gone, or another model's, what was charged stays charged, and what the budget still allows is done anew.

    Raises:
        RunError: more sensitive images than sums are exact for, or no step that the budget still allows.
    """
    check_images(len(private))
    assert config.noise_multiplier is not None
    stamp = fingerprint(config, population, target_epsilon, delta, seed, weights, private.label_names)
    path, features_path, progress_path = (folder.checkpoint(STAGE + part) for part in ("", "-features", "-progress"))
    found = kept_labeller(folder, config, private, weights)
    if found is not None:
        _remove_parts(folder)  # of an interruption in the last step
        if not folder.recorded(STAGE):
            folder.record(STAGE, stamp, 0.0)
        return found.to(device)
    if not (features_path.exists() and folder.described(features_path, STAGE).get("fingerprint") == stamp):
        began = time.perf_counter()  # of drafts, not of sensitive images: it may be told
        _learn_features(folder, config, model, sample, private, stamp, seed, device, autocast)
        logger.info("%s: features from drafts: %.0f s", STAGE, time.perf_counter() - began)
    labeller, event = _fresh(config, private), DPSGDEvent(config.noise_multiplier, 1.0, 1)
    labeller.load_state_dict(folder.load_tensors(features_path, STAGE)[0])
    labeller.to(device).eval()
    # To the very end: a last step that is charged, but of no file, would be repeated.
    with (
        interrupts_held("the step at hand is finished and saved: it is charged") as interrupted,
        timed(folder, STAGE, stamp),
    ):
        features, velocity, taken = file_fingerprint(features_path), torch.zeros_like(labeller.head, device="cpu"), 0
        if progress_path.exists():
            tensors, described = folder.load_tensors(progress_path, STAGE)
            if described["features"] == features:
                velocity, taken = tensors["velocity"], int(described["steps"])
                labeller.head.copy_(tensors["head"])
        lost = ledger.steps_charged(STAGE) - taken
        if lost:
            logger.warning("label: of the steps in the ledger %d are of no layer that is kept; they stay charged", lost)
        steps = taken + affordable(event, ledger.events(), target_epsilon, delta, config.steps - taken)
        if not steps:
            raise RunError(
                f"the budget allows no step of the layer that labels images: {lost} are charged, but {path} is gone, or another "
                "model's. Restore it, or go on with --label.steps 0: images then keep the labels that they are drawn for"
            )
        if steps > taken:  # written to, so that there is room before a step is paid for
            rows = torch.ones(len(private), len(labeller.head), device=device)
        for step in progress_bar(range(taken, steps), desc=STAGE, unit="step", initial=taken, total=steps):
            if interrupted():
                raise KeyboardInterrupt
            ledger.charge(event, stage=STAGE)  # before the data is touched
            if step == taken:
                embedded(labeller, private, device, out=rows)
                labels = torch.from_numpy(private.labels).to(device)
            gradient = clipped_sums(rows, labels, labeller.head).cpu()
            # A place for each charge: a step that is tried again after an error has another, as its noise is another.
            place = ledger.steps_charged(STAGE) - 1
            noise = noise_key.gaussian(tuple(gradient.shape), step=place, stream=Stream.LABELS)
            gradient += event.noise_multiplier * CLIP * torch.from_numpy(noise)
            lr = config.learning_rate(population) * min(1.0, 2 * (1 - step / config.steps))
            head, velocity = _descended(labeller.head.cpu(), velocity, gradient / population, lr)
            labeller.head.copy_(head)
            # Every one: what is charged and lost would have to be paid for again.
            folder.save_tensors(progress_path, {"head": head, "velocity": velocity}, {"features": features, "steps": step + 1})
        labeller.steps = steps
        folder.save_tensors(path, labeller.state_dict(), {"weights": weights, "steps": steps})
    _remove_parts(folder)
    return labeller


def kept_labeller(folder: RunFolder, config: LabelConfig, private: ImageSet, weights: str) -> Labeller | None:
    """That of the model with the fingerprint ``weights``: the folder's, or the one that is published with its model. Of
    ``private`` channels and classes only are looked at.
    """
    for path in (folder.checkpoint(STAGE), folder.model / LABELLER):
        if path.exists() and (described := folder.described(path, STAGE)).get("weights") == weights:
            labeller = _fresh(config, private)
            labeller.load_state_dict(folder.load_tensors(path, STAGE)[0])
            labeller.steps = int(described["steps"])
            return labeller.eval()
    return None


def _remove_parts(folder: RunFolder) -> None:
    """What only an interrupted stage needs."""
    for part in ("-features", "-progress"):
        folder.checkpoint(STAGE + part).unlink(missing_ok=True)
    for drafts in (folder.path / "checkpoints").glob(f"{STAGE}-drafts-*"):
        shutil.rmtree(drafts)


def _fresh(config: LabelConfig, private: ImageSet) -> Labeller:
    return Labeller(config.classifier, channels=private.channels, num_classes=private.n_classes)


def embedded(labeller: Labeller, images: ImageSet, device: str = "cpu", out: Tensor | None = None) -> Tensor:
    """Rows (n, d) float32 of images, each of length at most 1. Calls of one shape, the last filled up with blank images."""
    if out is None:
        out = torch.empty(len(images), len(labeller.head), device=device)
    for start in progress_bar(range(0, len(images), ROWS), desc=f"{STAGE}: features", unit="batch"):
        part = images.images[start : start + ROWS]
        filled = np.zeros((ROWS, *part.shape[1:]), part.dtype)
        filled[: len(part)] = part
        with full_precision(torch.device(device)):
            found = batched(labeller.rows, filled, device=device, batch_size=ROWS)[: len(part)]
        out[start : start + ROWS] = torch.from_numpy(found)
    return out


def clipped_sums(rows: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    """Σ over images of the gradient of the cross-entropy by the head, each scaled down to an L2 norm of at most C.

    rows (n, d) float32, labels (n,) int64, head (d, classes) float64 → (d, classes) float64, exact.
    """
    sums = torch.zeros_like(head)
    for part, named in zip(rows.split(_ADDED), labels.split(_ADDED), strict=True):
        missing = _ADDED - len(part)  # calls of one shape; a row of zeros adds nothing
        part, named = F.pad(part, (0, 0, 0, missing)).double(), F.pad(named, (0, missing))
        error = (part @ head).softmax(1) - F.one_hot(named, head.shape[1])
        norms = error.norm(dim=1, keepdim=True) * part.norm(dim=1, keepdim=True)
        error = error * (CLIP * (1 - 1e-9) / norms.clamp_min(CLIP))
        sums += part.T @ ((error * 2**_ERROR_BITS).trunc() / 2**_ERROR_BITS)  # towards zero: no longer than before
    return sums


def _learn_features(
    folder: RunFolder, config: LabelConfig, model: Drawable, sample: SampleConfig, private: ImageSet, stamp: str, seed: int,
    device: str, autocast: torch.dtype | None,
) -> None:  # fmt: skip
    """From drafts of the model; leaves them, and the layer that drafts teach, in checkpoints/label-features.safetensors.

    A third of the drafts teaches the classifier nothing: of images that it knows by heart its features would tell the labels that
    they were drawn for.
    """
    labeller = _fresh(config, private)
    drawn_by = fingerprint(stamp, sample.batch_size, sample.sampler, str(autocast))
    parts = folder.path / "checkpoints" / f"{STAGE}-drafts-{drawn_by}"
    wanted = np.repeat(np.arange(private.n_classes), config.drafts)
    # Other images than the synthetic ones.
    drafts_seed = int.from_bytes(sha256(f"{STAGE} {seed}".encode()).digest()[:8], "little")
    images = draw_resumably(
        parts, sample, model=model, labels=wanted, seed=drafts_seed, device=device, autocast=autocast, description="label: drafts"
    )  # fmt: skip
    seen, unseen = train_test_split(ImageSet(images, wanted, private.label_names, name="drafts"), 1 / 3, seed)
    labeller.classifier, _ = train_classifier(
        seen.images, seen.labels, num_classes=private.n_classes, config=config.classifier, seed=seed, device=device,
        description="label: classifier",
    )  # fmt: skip
    labeller.to(device).eval()
    with torch.no_grad():
        labeller.fit_rows(torch.from_numpy(batched(labeller.features, unseen.images, device=device, batch_size=ROWS)).to(device))
    rows, labels = embedded(labeller, unseen, device), torch.from_numpy(unseen.labels).to(device)
    head, velocity = labeller.head, torch.zeros_like(labeller.head)
    for _ in range(_BEFORE):
        head, velocity = _descended(head, velocity, clipped_sums(rows, labels, head) / len(rows), _MOST_LR)
    labeller.head.copy_(head)
    folder.save_tensors(folder.checkpoint(f"{STAGE}-features"), labeller.state_dict(), {"fingerprint": stamp})


def _descended(head: Tensor, velocity: Tensor, gradient: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """A step with momentum. The layer stays in whole multiples of 2⁻¹⁶ and so small that logits are exact as well."""
    velocity = _MOMENTUM * velocity + gradient
    head = (head - lr * velocity).clamp(-_MOST_WEIGHT, _MOST_WEIGHT)
    return (head * 2**HEAD_BITS).round() / 2**HEAD_BITS, velocity
