"""Evaluation against real images that were kept out of training. Its figures are *not* private, and marked so.

Protocol: classifiers see synthetic images only, the epoch is chosen on a synthetic split, accuracy is reported on real test
images. Distances are measured on a named network, never called FID unless it is Inception.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from privimage_fast.data import ImageSet, train_test_split
from privimage_fast.data.atomic import atomic_path
from privimage_fast.data.sheet import image_sheet
from privimage_fast.models.classifier import Classifier, ClassifierConfig, batched, classifier_accuracy, train_classifier
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, timed
from privimage_fast.stages.metrics import frechet_distance, nearest_neighbours, precision_recall


@dataclass(frozen=True)
class EvaluateConfig:
    """What is measured.

    Args:
        classifier: the network trained on synthetic images.
        max_images: at most so many images of each kind enter distances.
        neighbours: also write a sheet of the *sensitive training images* nearest to synthetic ones. Not private: never
            publish it.
    """

    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    max_images: int = 5000
    neighbours: bool = False

    def __post_init__(self) -> None:
        if self.max_images < 10:
            raise ValueError(f"evaluate.max_images must be ≥ 10, found {self.max_images}")


def run_evaluate(
    folder: RunFolder, config: EvaluateConfig, *, synthetic: ImageSet, test: ImageSet, feature_network: Classifier,
    weights: str, seed: int, private: ImageSet | None = None, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """Writes metrics.json and returns its content. ``private`` (training images) is read for `neighbours` only."""
    if test.label_names != synthetic.label_names:
        raise RunError(f"the test set's classes {test.label_names} are not the synthetic ones {synthetic.label_names}")
    stamp = fingerprint(config, weights, seed, len(synthetic), len(test))
    # Never taken from an earlier call: telling one test set from another would need a hash of sensitive images on disk.
    with timed(folder, "evaluate", stamp):
        metrics = utility(config, synthetic, test, seed=seed, device=device)
        metrics += fidelity(config, synthetic, test, feature_network, seed=seed, device=device)
        if config.neighbours and private is not None:
            _neighbour_sheet(folder, synthetic, private)
        result = {"metrics": metrics}
        folder.write_json(folder.metrics, result)
    return result


def utility(config: EvaluateConfig, synthetic: ImageSet, test: ImageSet, *, seed: int, device: str) -> list[dict[str, Any]]:
    """Accuracy on real test images of a classifier that saw synthetic images only."""
    train, held_out = train_test_split(synthetic, 0.1, seed)
    model, on_synthetic = train_classifier(
        train.images, train.labels, num_classes=synthetic.n_classes, config=config.classifier, seed=seed,
        validation=(held_out.images, held_out.labels), device=device, description="evaluate",
    )  # fmt: skip
    accuracy = classifier_accuracy(model, test.images, test.labels, device=device)
    network = f"CNN (width {config.classifier.width}, {config.classifier.epochs} epochs)"
    return [
        _metric("accuracy, trained on synthetic, tested on real", accuracy, "fraction", private=False,
                detail=f"{network}; epoch chosen on a synthetic split; {len(train)} synthetic and {len(test)} real test images"),
        _metric("accuracy, trained and tested on synthetic", on_synthetic, "fraction", private=True,
                detail=f"{network}; sees synthetic images only"),
    ]  # fmt: skip


def fidelity(
    config: EvaluateConfig, synthetic: ImageSet, test: ImageSet, network: Classifier, *, seed: int, device: str
) -> list[dict[str, Any]]:
    """Fréchet distance, precision and recall between synthetic and real test images on the network's features."""
    random = np.random.default_rng(seed)
    fake, real = (_features(network, _some(s, config.max_images, random), device) for s in (synthetic, test))
    name = f"public-cnn{network.width}"
    precision, recall = precision_recall(real, fake)
    detail = f"{real.shape[1]} features of the CNN trained on the public labels; {len(fake)} synthetic, {len(real)} real images"
    return [
        _metric(f"Fréchet distance FD-{name}", frechet_distance(real, fake), "", private=False, detail=detail),
        _metric(f"precision ({name})", precision, "fraction", private=False, detail=detail + "; 3 nearest neighbours"),
        _metric(f"recall ({name})", recall, "fraction", private=False, detail=detail + "; 3 nearest neighbours"),
    ]


def _metric(name: str, value: float, unit: str, *, private: bool, detail: str) -> dict[str, Any]:
    return {
        "name": name,
        "value": float(value) if np.isfinite(value) else None,
        "unit": unit,
        "private": private,
        "detail": detail,
    }


def _some(images: ImageSet, count: int, random: np.random.Generator) -> np.ndarray:
    if len(images) <= count:
        return images.images
    return images.images[np.sort(random.choice(len(images), count, replace=False))]


def _features(network: Classifier, images: np.ndarray, device: str) -> np.ndarray:
    return batched(network.features, images, device=device)


def _neighbour_sheet(folder: RunFolder, synthetic: ImageSet, private: ImageSet, *, rows: int = 10, nearest: int = 5) -> None:
    """samples/neighbours-not-private.png: a synthetic image (left) and the sensitive images nearest to it in pixels."""
    queries = np.linspace(0, len(synthetic) - 1, rows).astype(int)
    flat = (s.reshape(len(s), -1).astype(np.float32) for s in (synthetic.images[queries], private.images))
    indices, _ = nearest_neighbours(*flat, k=min(nearest, len(private)))
    cells = np.concatenate(
        [np.concatenate([synthetic.images[q : q + 1], private.images[i]]) for q, i in zip(queries, indices, strict=True)]
    )
    folder.samples.mkdir(exist_ok=True)
    sheet: Image.Image = image_sheet(cells, rows, 1 + indices.shape[1], scale=max(1, 48 // synthetic.resolution))
    with atomic_path(folder.samples / "neighbours-not-private.png") as temporary:
        sheet.save(temporary, format="PNG")
