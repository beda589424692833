"""Selection: the public images whose labels the query chose, relabelled with the sensitive class that chose them.

Works on the noisy table only, so it is post-processing and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from privimage_fast.data import ImageSet
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, timed

MODES = ("semantic", "random", "all", "none")


@dataclass(frozen=True)
class SelectConfig:
    """Which part of the public set is pre-trained on.

    Args:
        mode: "semantic" (the query's labels), "random" (as many images drawn blindly), "all", or "none" (no pre-training).
        labels_per_class: public labels for each sensitive class; null derives it from `ratio`.
        ratio: share of the public labels (or clusters) to take in all; at least one a class.
        max_image_ratio: at most this share of the public images, drawn blindly from those that the mode gives; null takes all.
            Where the labels are few, this is how 1 % is had.
        assignment: "optimal" maximises the votes of all classes together; "ordered" is the published rule, in which each
            class in turn takes its best labels not yet taken.
    """

    mode: str = "semantic"
    labels_per_class: int | None = None
    ratio: float = 0.05
    max_image_ratio: float | None = None
    assignment: str = "optimal"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"select.mode must be one of {', '.join(MODES)}, found {self.mode!r}")
        if self.assignment not in ("optimal", "ordered"):
            raise ValueError(f"select.assignment must be optimal or ordered, found {self.assignment!r}")
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise ValueError(f"select.labels_per_class must be ≥ 1 or null, found {self.labels_per_class}")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"select.ratio must be in (0, 1], found {self.ratio}")
        if self.max_image_ratio is not None and not 0 < self.max_image_ratio <= 1:
            raise ValueError(f"select.max_image_ratio must be in (0, 1] or null, found {self.max_image_ratio}")


def labels_per_class(config: SelectConfig, *, n_labels: int, n_classes: int, clusters: bool = False) -> int:
    """k ≥ 1 labels a class, however small the ratio; refused where the classes cannot all have k disjoint labels.

    ``clusters``: the labels are clusters.
    """
    # A ratio never asks for more than can be dealt out evenly: a whole set of 98 labels is 9 for each of ten classes.
    k = config.labels_per_class or max(1, min(round(n_labels * config.ratio / n_classes), n_labels // n_classes))
    # The whole set, or none of it, is taken without labels.
    if k * n_classes > n_labels and config.mode in ("semantic", "random"):
        found = f"the public images fall into {n_labels} clusters" if clusters else f"the public set has {n_labels}"
        advice = (
            "raise query.clusters, if enough images differ"
            if clusters
            else "set query.clusters auto, or bring one with more labels"
        )
        raise RunError(
            f"{n_classes} classes with {k} labels each need {k * n_classes} public labels, but {found}; "
            + ("lower select.labels_per_class, or " if k > 1 else "")
            + advice
            + (" (if that is the folder around the label folders, give the folder inside it)" if n_labels == 1 else "")
        )
    return k


def assign_labels(counts: np.ndarray, k: int, assignment: str) -> list[list[int]]:
    """For each row of the noisy table (classes, labels), its k labels, best first; no label is given twice."""
    classes, labels = counts.shape
    if assignment == "optimal":
        rows, columns = linear_sum_assignment(np.repeat(counts, k, axis=0), maximize=True)
        chosen = [columns[rows // k == c] for c in range(classes)]
    else:
        free, chosen = np.ones(labels, bool), []
        for row in counts:
            best = np.argsort(-np.where(free, row, -np.inf), kind="stable")[:k]
            free[best] = False
            chosen.append(best)
    return [sorted((int(i) for i in picks), key=lambda i: -row[i]) for picks, row in zip(chosen, counts, strict=True)]


def run_select(
    folder: RunFolder, config: SelectConfig, *, public: ImageSet, class_names: tuple[str, ...], query: dict[str, Any] | None,
    labels_each: int, seed: int, n_labels: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Writes selection.json and returns it. ``query`` is the content of query.json, for mode "semantic" only.

    ``n_labels``: of the label space that a query would ask, where those are not the labels of ``public``.
    """
    stamp = fingerprint(config, labels_each, seed, None if query is None else query["counts"])
    if folder.selection.exists() and folder.finished("select", stamp):
        return folder.read_json(folder.selection, "select")
    with timed(folder, "select", stamp):
        result: dict[str, Any] = {
            "mode": config.mode,
            "public_images": len(public),
            "labels_per_class": labels_each,
            "seed": seed,
        }
        if config.mode == "semantic":
            if query is None:
                raise RunError("select.mode semantic needs the query; run `privimage query` first")
            chosen = assign_labels(np.asarray(query["counts"]), labels_each, config.assignment)
            per_label = public.class_counts()
            result["assignment"] = config.assignment
            result["classes"] = [
                {"class": name, "labels": [public.label_names[i] for i in picks], "images": int(per_label[picks].sum())}
                for name, picks in zip(class_names, chosen, strict=True)
            ]
            result["selected_images"] = sum(entry["images"] for entry in result["classes"])
        else:
            # As many as the semantic choice would take on average, so that the two can be compared.
            share = labels_each * len(class_names) / (n_labels or public.n_classes)
            sizes = {"all": len(public), "none": 0, "random": round(share * len(public))}
            result["selected_images"] = sizes[config.mode]
        if config.max_image_ratio is not None:
            most = max(1, round(config.max_image_ratio * len(public)))
            result["selected_images"] = min(result["selected_images"], most)
        result["ratio"] = result["selected_images"] / len(public)
        if config.mode != "none" and result["selected_images"] == 0:
            raise RunError("the selection is empty: the chosen labels have no public images")
        folder.write_json(folder.selection, result)
    return result


def selected_subset(selection: dict[str, Any], public: ImageSet, class_names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Indices into the public set and the class label of each; label len(class_names) is the empty one.

    Only the semantic selection says which class an image resembles; the others are trained on unconditionally. Where fewer
    images were selected than the mode gives, they are drawn by the selection's seed.
    """
    if selection["mode"] == "none":
        return np.arange(0), np.arange(0)
    labels = np.full(len(public), len(class_names))
    if selection["mode"] == "semantic":
        of_label = np.full(public.n_classes, -1)
        index = {name: i for i, name in enumerate(public.label_names)}
        for c, entry in enumerate(selection["classes"]):
            for name in entry["labels"]:
                of_label[index[name]] = c
        labels = of_label[public.labels]
    indices = np.flatnonzero(labels >= 0)
    if len(indices) > selection["selected_images"]:
        random = np.random.default_rng(selection["seed"])
        indices = np.sort(random.choice(indices, selection["selected_images"], replace=False))
    return indices, labels[indices]
