"""Evaluation against real images that were kept out of training. Its figures are *not* private, and marked so.

Protocol: classifiers see synthetic images only; the epoch, and of several classifiers the one that counts, are chosen on a
synthetic split; accuracy is reported on real test images. Distances are measured on a named network, never called FID unless
it is Inception. Memorisation and membership inference also read the training images, so they run only when asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from privimage_fast.data import ImageSet, train_test_split
from privimage_fast.data.atomic import atomic_path
from privimage_fast.data.sheet import image_sheet
from privimage_fast.models.classifier import Classifier, ClassifierConfig, classifier_accuracy, train_classifier
from privimage_fast.stages import metrics as measures
from privimage_fast.stages.features import (
    NETWORKS,
    FeatureNetwork,
    inception_network,
    lite0_network,
    lite0_parts,
    public_network,
)
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, timed

logger = logging.getLogger(__name__)

ACCURACY = "accuracy, trained on synthetic, tested on real"  # the key figure of a run, by which runs are compared
_NEIGHBOURS, _DENSITY_NEIGHBOURS = 3, 5
_LEAST_SYNTHETIC = 10  # a tenth of them is the split by which epochs are chosen


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured.

    Args:
        classifier: the network trained on synthetic images, and how it is trained.
        architectures: several of them instead, as arch, arch:width or arch:width:blocks with the training of `classifier`, e.g.
            [cnn, resnet:16:3, wrn:160:4]; the one that is best on synthetic images counts.
        seeds: trainings of each, whose mean and spread are reported.
        max_images: at most so many images of each kind enter distances (near copies are looked for among all training images).
        network: where distances are measured: public (the classifier of the public labels) or lite0 (ImageNet, for colour).
        inception: path of Inception as TorchScript or ONNX; distances are then measured on it, not on `network`, and called FID.
        per_class: distances and the rest also class by class.
        memorisation: also compare synthetic images with the *sensitive training images*: near copies, and membership inference.
        neighbours: also write a sheet of the *sensitive training images* nearest to synthetic ones. Not private: never
            publish it.
    """

    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    architectures: tuple[str, ...] = ()
    seeds: int = 1
    max_images: int = 5000
    network: str = "public"
    inception: str | None = None
    per_class: bool = False
    memorisation: bool = False
    neighbours: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "architectures", tuple(self.architectures))
        if self.max_images < 10:
            raise ValueError(f"evaluate.max_images must be ≥ 10, found {self.max_images}")
        if self.seeds < 1:
            raise ValueError(f"evaluate.seeds must be ≥ 1, found {self.seeds}")
        if self.network not in NETWORKS:
            raise ValueError(f"evaluate.network must be one of {', '.join(NETWORKS)}; found {self.network!r}")
        try:
            self.classifiers()
        except ValueError as error:
            raise ValueError(f"evaluate.architectures: {error}") from error

    def classifiers(self) -> list[ClassifierConfig]:
        """Those to train: `architectures`, or `classifier` alone."""
        return [self.classifier.with_architecture(text) for text in self.architectures] or [self.classifier]


def run_evaluate(
    folder: RunFolder, config: EvaluateConfig, *, synthetic: ImageSet, test: ImageSet, feature_network: Classifier,
    weights: str, seed: int, private: ImageSet | None = None, protected: bool = True, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Writes metrics.json and returns its content. ``private`` (training images): for `memorisation` and `neighbours` only.

    protected: whether the synthetic images are differentially private at all; of others no figure is.
    Its "synthetic" is the fingerprint of the sampling, by which figures of an earlier synthetic set are known as such.
    """
    if test.label_names != synthetic.label_names:
        raise RunError(f"the test set's classes {test.label_names} are not the synthetic ones {synthetic.label_names}")
    network = distance_network(config, feature_network, device)
    # Never taken from an earlier call: telling one test set from another would need a hash of sensitive images on disk, and
    # their number stands beside figures that are not private only.
    with timed(folder, "evaluate", fingerprint(config, weights, seed, len(synthetic))):
        metrics = utility(config, synthetic, test, seed=seed, device=device)
        metrics += fidelity(config, synthetic, test, network, seed=seed)
        if config.memorisation and private is not None:
            metrics += copying(config, synthetic, private, test, seed=seed)
        if config.neighbours and private is not None:
            _neighbour_sheet(folder, synthetic, private)
        metrics = [{**metric, "private": metric["private"] and protected} for metric in metrics]
        result = {"metrics": metrics, "synthetic": folder.fingerprint_of("sample")}
        folder.write_json(folder.metrics, result)
    return result


def check_evaluation(config: EvaluateConfig, *, synthetic: int, test: int) -> None:
    """Before anything is spent: are there images enough, and is the network there?

    Raises:
        RunError: fewer synthetic or test images than distances and the synthetic split take, or lite0 without its packages.
    """
    for what, found, least in (("synthetic", synthetic, _LEAST_SYNTHETIC), ("test", test, _DENSITY_NEIGHBOURS + 1)):
        if found < least:
            more = "raise sample.per_class" if what == "synthetic" else "give more, or none (data.test null and data.holdout 0)"
            raise RunError(f"{found} {what} images are too few to evaluate with; at least {least} are needed: {more}")
    if config.network == "lite0" and config.inception is None:
        lite0_parts()


def distance_network(config: EvaluateConfig, feature_network: Classifier, device: str = "cpu") -> FeatureNetwork:
    """The network that the configuration names; ``feature_network`` is the classifier of the public labels."""
    if config.inception is not None:
        return inception_network(config.inception, device)
    return lite0_network(device) if config.network == "lite0" else public_network(feature_network, device)


def utility(config: EvaluateConfig, synthetic: ImageSet, test: ImageSet, *, seed: int, device: str) -> list[dict[str, Any]]:
    """Accuracy on real test images of classifiers that saw synthetic images only.

    In each of `config.seeds` trainings the classifier that is best on held-out synthetic images counts; the real test images
    decide nothing.
    """
    classifiers = config.classifiers()
    on_synthetic, on_real = np.zeros((2, config.seeds, len(classifiers)))
    for i in range(config.seeds):
        train, held_out = train_test_split(synthetic, 0.1, seed + i)
        for j, classifier in enumerate(classifiers):
            model, on_synthetic[i, j] = train_classifier(
                train.images, train.labels, num_classes=synthetic.n_classes, config=classifier, seed=seed + i,
                validation=(held_out.images, held_out.labels), device=device, description=f"evaluate {classifier.name}",
            )  # fmt: skip
            on_real[i, j] = classifier_accuracy(model, test.images, test.labels, device=device)
    best = on_synthetic.argmax(axis=1)
    rows, names = np.arange(config.seeds), [c.name for c in classifiers]
    chosen = sorted({names[j] for j in best})
    network = f"{' or '.join(chosen)} ({config.classifier.epochs} epochs)"
    if len(classifiers) > 1:
        network += f", the best of {', '.join(names)} on synthetic images"
    detail = f"{network}; epoch chosen on a synthetic split; {len(train)} synthetic and {len(test)} real test images"
    metrics = [
        _metric(ACCURACY, on_real[rows, best], "fraction", private=False, detail=detail),
        _metric("accuracy, trained and tested on synthetic", on_synthetic[rows, best], "fraction", private=True,
                detail=f"{network}; sees synthetic images only"),
    ]  # fmt: skip
    if len(classifiers) > 1:
        metrics += [
            _metric(f"accuracy of {name}, tested on real", on_real[:, j], "fraction", private=False,
                    detail="trained on synthetic images; epoch chosen on a synthetic split")
            for j, name in enumerate(names)
        ]  # fmt: skip
    return metrics


def fidelity(
    config: EvaluateConfig, synthetic: ImageSet, test: ImageSet, network: FeatureNetwork, *, seed: int
) -> list[dict[str, Any]]:
    """Fréchet distance, precision, recall, density and coverage between synthetic and real test images."""
    random = np.random.default_rng(seed)
    (fake, fake_labels), (real, real_labels) = (_features(s, config.max_images, random, network) for s in (synthetic, test))
    detail = f"{real.shape[1]} features of {network.described}; {len(fake)} synthetic, {len(real)} real images"
    metrics = _distances(real, fake, network, "", detail)
    if config.per_class:
        for c, name in enumerate(test.label_names):
            of_real, of_fake = real[real_labels == c], fake[fake_labels == c]
            if min(len(of_real), len(of_fake)) <= _DENSITY_NEIGHBOURS:
                logger.warning("evaluate: class %s has too few images for distances of its own", name)
                continue
            few = f"{len(of_fake)} synthetic, {len(of_real)} real images of the class; a distance of few images reads high"
            metrics += _distances(of_real, of_fake, network, f", class {name}", few)
    return metrics


def _distances(real: np.ndarray, fake: np.ndarray, network: FeatureNetwork, what: str, detail: str) -> list[dict[str, Any]]:
    title = network.distance if network.distance == "FID" else f"Fréchet distance {network.distance}"
    precision, recall = measures.precision_recall(real, fake, _NEIGHBOURS)
    density, coverage = measures.density_coverage(real, fake, _DENSITY_NEIGHBOURS)
    near, dense = (f"{detail}; {k} nearest neighbours" for k in (_NEIGHBOURS, _DENSITY_NEIGHBOURS))
    rows = [
        (title + what, measures.frechet_distance(real, fake), "", detail),
        (f"precision ({network.name}{what})", precision, "fraction", near),
        (f"recall ({network.name}{what})", recall, "fraction", near),
        (f"density ({network.name}{what})", density, "", dense),
        (f"coverage ({network.name}{what})", coverage, "fraction", dense),
    ]
    return [_metric(name, value, unit, private=False, detail=text) for name, value, unit, text in rows]


def copying(config: EvaluateConfig, synthetic: ImageSet, private: ImageSet, test: ImageSet, *, seed: int) -> list[dict[str, Any]]:
    """Are synthetic images nearer to the training images than to as many held-out ones, and does that give members away?

    Distances are between pixels. The attack says of a real image that it was trained on the more surely, the nearer some
    synthetic image is to it (Chen et al. 2020, GAN-Leaks, full black box).
    """
    random = np.random.default_rng(seed)
    count = min(len(private), len(test), config.max_images)
    fake = _pixels(_some(synthetic, config.max_images, random))
    train, held_out = (_pixels(_some(s, count, random)) for s in (private, test))
    tolerance = 4 * np.sqrt(fake.shape[1])  # four grey levels of 255, root mean square
    found = measures.memorisation(fake, train, held_out)
    assert found.to_held_out is not None and found.nearer_to_train is not None
    members, others = (-measures.nearest_neighbours(real, fake)[1][:, 0] for real in (train, held_out))
    attack = measures.membership_inference(members, others)
    # Copies are looked for among all training images: among as many as were held out, most copies would be of others.
    nearest = np.full(len(fake), np.inf)
    for start in range(0, len(private), config.max_images):  # all at once, in float64, might not fit
        block = private.subset(np.arange(start, min(len(private), start + config.max_images)))
        nearest = np.minimum(nearest, measures.nearest_neighbours(fake, _pixels(block))[1][:, 0])
    copies = float(np.mean(nearest <= tolerance))
    sizes = f"pixels of {len(fake)} synthetic images against {count} training and {count} held-out ones"
    away = np.median(found.to_held_out)
    ratio = float(np.median(found.to_train) / away) if away > 0 else float("nan")
    return [
        _metric("nearest real image is a training image", found.nearer_to_train, "fraction", private=False,
                detail=f"{sizes}; 50 % if nothing was memorised"),
        _metric("distance to training ÷ to held-out images", ratio, "", private=False,
                detail=f"{sizes}; medians of nearest-neighbour distances; 1 if nothing was memorised"),
        _metric("near copies of training images", copies, "fraction", private=False,
                detail=f"pixels of {len(fake)} synthetic images against all training images; within four grey levels a pixel "
                       "(root mean square)"),
        _metric("membership inference, AUC", attack.auc, "fraction", private=False,
                detail=f"{sizes}; score: nearness of the nearest synthetic image; 50 % is a guess"),
        _metric(f"membership inference, true positives at {100 * attack.fpr:g} % false ones", attack.tpr, "fraction",
                private=False, detail=f"{sizes}; {100 * attack.fpr:g} % is a guess"),
    ]  # fmt: skip


def _metric(name: str, values: float | Sequence[float] | np.ndarray, unit: str, *, private: bool, detail: str) -> dict[str, Any]:
    """One row of metrics.json; of several values their mean, and their standard deviation as the spread."""
    values = np.atleast_1d(np.asarray(values, np.float64))
    finite = bool(np.isfinite(values).all())
    several = len(values) > 1
    return {
        "name": name,
        "value": float(values.mean()) if finite else None,
        "spread": float(values.std(ddof=1)) if finite and several else None,
        "unit": unit,
        "private": private,
        "detail": f"{detail}; mean and standard deviation of {len(values)} trainings" if several else detail,
    }


def _some(images: ImageSet, count: int, random: np.random.Generator) -> ImageSet:
    if len(images) <= count:
        return images
    return images.subset(np.sort(random.choice(len(images), count, replace=False)))


def _features(
    images: ImageSet, count: int, random: np.random.Generator, network: FeatureNetwork
) -> tuple[np.ndarray, np.ndarray]:
    part = _some(images, count, random)
    return network.features(part.images), part.labels


def _pixels(images: ImageSet) -> np.ndarray:
    return images.images.reshape(len(images), -1).astype(np.float32)


def _neighbour_sheet(folder: RunFolder, synthetic: ImageSet, private: ImageSet, *, rows: int = 10, nearest: int = 5) -> None:
    """samples/neighbours-not-private.png: a synthetic image (left) and the sensitive images nearest to it in pixels."""
    queries = np.linspace(0, len(synthetic) - 1, rows).astype(int)
    indices, _ = measures.nearest_neighbours(_pixels(synthetic.subset(queries)), _pixels(private), k=min(nearest, len(private)))
    cells = np.concatenate(
        [np.concatenate([synthetic.images[q : q + 1], private.images[i]]) for q, i in zip(queries, indices, strict=True)]
    )
    folder.samples.mkdir(exist_ok=True)
    sheet: Image.Image = image_sheet(cells, rows, 1 + indices.shape[1], scale=max(1, 48 // synthetic.resolution))
    with atomic_path(folder.samples / "neighbours-not-private.png") as temporary:
        sheet.save(temporary, format="PNG")
