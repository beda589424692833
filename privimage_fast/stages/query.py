"""Semantic query (PrivImage §4.1): which public labels do the sensitive images of each class look like?

Formal guarantee: each sensitive image adds 1 to the cells of its k top labels in the row of its class, so adding or
removing one image changes the class × label table by √k in L2. Gaussian noise of standard deviation σ₁·√k is added to
every cell: one Gaussian mechanism with noise multiplier σ₁. The event is in the ledger before the first sensitive image
is looked at, and the noisy table is drawn once and kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.stats import binom
from torch import Tensor, nn

from privimage_fast.data import ImageSet, train_test_split
from privimage_fast.dp.accounting import GaussianEvent
from privimage_fast.dp.ledger import Ledger
from privimage_fast.dp.noise import NoiseKey, Stream
from privimage_fast.dp.precision import full_precision
from privimage_fast.models.classifier import Classifier, ClassifierConfig, batched, train_classifier
from privimage_fast.models.edm import to_float
from privimage_fast.progress import progress_bar
from privimage_fast.stages.folder import RunError, RunFolder, fingerprint, set_fingerprint, timed
from privimage_fast.stages.interrupt import interrupts_held

logger = logging.getLogger(__name__)

# Any callable: float images (R, C, H, W) in [−1, 1] → scores (R, labels) of the public set's labels, higher meaning more alike,
# each image scored by itself. A classifier's logits, similarities of an embedding with texts, nearness to clusters (clusters.py).
SemanticFunction = Callable[[Tensor], Tensor]

EMBEDDINGS = ("pixels", "network")

# Rows of every call while votes are counted.
_VOTERS = 512


@dataclass(frozen=True)
class QueryConfig:
    """The query.

    Args:
        noise_multiplier: σ₁; null lets `share` decide; 0, no noise, is for runs that are not private only.
        share: part of the budget the query takes, as its share of the squared Gaussian-DP parameter μ² of the target.
        votes_per_image: labels each sensitive image votes for; null takes as many as `select` gives each class (3 where
            `clusters` is auto).
        clusters: ask for so many clusters of the public images (k-means) in place of their labels: finer, and no labels needed.
            "auto" takes as many as the noise lets tell apart: fewer where ε or the sensitive set is small. null asks for the
            labels.
        embedding: where clusters are found: "pixels" (averaged to at most 8×8) or "network" (the output of `onnx`, or features of
            the classifier); null is network where `onnx` is set, else pixels.
        onnx: path of an ONNX model (input float NCHW in [−1, 1]) that scores the public labels, or embeds images for `clusters`;
            null trains a classifier on the public set.
        classifier: the one that is trained.
    """

    noise_multiplier: float | None = None
    share: float = 0.02
    votes_per_image: int | None = None
    clusters: int | Literal["auto"] | None = None
    embedding: str | None = None
    onnx: str | None = None
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)

    def __post_init__(self) -> None:
        if self.noise_multiplier is not None and not self.noise_multiplier >= 0:
            raise ValueError(f"query.noise_multiplier must be ≥ 0 or null, found {self.noise_multiplier}")
        if not 0 < self.share < 1:
            raise ValueError(f"query.share must be between 0 and 1, found {self.share}")
        if self.votes_per_image is not None and self.votes_per_image < 1:
            raise ValueError(f"query.votes_per_image must be ≥ 1 or null, found {self.votes_per_image}")
        count = self.clusters
        if count not in (None, "auto") and (not isinstance(count, int) or isinstance(count, bool) or count < 2):
            raise ValueError(f"query.clusters must be a whole number ≥ 2, auto or null, found {count!r}")
        if self.embedding not in (None, *EMBEDDINGS):
            raise ValueError(f"query.embedding must be {', '.join(EMBEDDINGS)} or null, found {self.embedding!r}")
        if self.clusters is None and self.embedding is not None:
            raise ValueError(f"query.embedding is {self.embedding}, but no clusters are asked for; set query.clusters")
        if self.embedding == "pixels" and self.onnx is not None:
            raise ValueError("query.embedding is pixels, so the model of query.onnx would not be used; leave one of them out")

    def n_labels(self, public: ImageSet) -> int:
        """Labels that are asked for, once "auto" is a number; a few clusters may turn out empty."""
        return self.clusters if isinstance(self.clusters, int) else public.n_classes

    @property
    def embeds_pixels(self) -> bool:
        return self.embedding != "network" and self.onnx is None


def run_query(
    folder: RunFolder, config: QueryConfig, *, public: ImageSet, private: ImageSet, votes_per_image: int,
    noise_multiplier: float, ledger: Ledger, noise_key: NoiseKey, seed: int, device: str = "cpu",
    semantic_function: SemanticFunction | None = None, described: str = "given by the user",
) -> dict[str, Any]:  # fmt: skip
    """Draws the noisy class × label table once, or returns the one that was drawn; the content of query.json.

    ``public`` has the labels that are asked for; ``described``: what ``semantic_function`` is, where one is given.

    Raises:
        RunError: an earlier query of this folder was made with other settings (its cost is spent).
    """
    stamp = fingerprint(config, votes_per_image, noise_multiplier, public.label_names, private.label_names)
    if folder.query.exists():
        kept = folder.read_json(folder.query, "query")
        if kept["fingerprint"] != stamp:
            raise RunError(
                f"{folder.query} holds a query with other settings; its privacy is spent, so it is not repeated here. "
                "Restore the settings, or start over with another --out"
            )
        if not folder.recorded("query"):  # interrupted once the answer was kept
            folder.record("query", stamp, 0.0)
        return kept
    if not 1 <= votes_per_image <= public.n_classes:
        raise RunError(f"votes_per_image is {votes_per_image}, expected 1 … {public.n_classes} (the public labels)")
    with timed(folder, "query", stamp):
        semantic_function, described = semantic_function_of(
            folder, config, public=public, seed=seed, device=device, given=semantic_function, given_is=described
        )
        event = GaussianEvent(noise_multiplier)
        with interrupts_held("the answer is waited for and kept, since it is charged"):
            ledger.charge(event, stage="query")  # before the data is touched
            counts = vote(semantic_function, private, n_labels=public.n_classes, votes_per_image=votes_per_image, device=device)
            std = event.noise_multiplier * math.sqrt(votes_per_image)
            noisy = counts + std * noise_key.gaussian(counts.shape, step=0, stream=Stream.QUERY)
            result = {
                "fingerprint": stamp, "labels": list(public.label_names), "classes": list(private.label_names),
                "counts": noisy.tolist(), "votes_per_image": votes_per_image, "noise_std": std,
                "noise_multiplier": event.noise_multiplier, "semantic_function": described,
                "labelling": labelling_fingerprint(public),
            }  # fmt: skip
            folder.write_json(folder.query, result)
    return result


def labelling_fingerprint(asked: ImageSet) -> str:
    """Of which label each public image has: what a table of votes is good for."""
    return fingerprint(asked.labels.tobytes())


def vote(
    semantic_function: SemanticFunction, images: ImageSet, *, n_labels: int, votes_per_image: int, device: str = "cpu"
) -> np.ndarray:
    """The exact table (classes, labels) float64: one vote for each of an image's ``votes_per_image`` best labels.

    An image whose scores are not finite votes for nothing, which is within the sensitivity. Every call has as many rows, the last
    filled up with blank ones: another shape could round otherwise, and so one image more could move the votes of others.
    """
    table = np.zeros((images.n_classes, n_labels))
    for start in progress_bar(range(0, len(images), _VOTERS), desc="query", unit="batch"):
        part = slice(start, start + _VOTERS)
        voters = images.images[part]
        rows = np.zeros((_VOTERS, *voters.shape[1:]), voters.dtype)
        rows[: len(voters)] = voters
        with full_precision(torch.device(device)):
            scores = batched(semantic_function, rows, device=device, batch_size=_VOTERS)[: len(voters)]
        finite = np.isfinite(scores).all(1)
        best = np.argpartition(-scores[finite], votes_per_image - 1, axis=1)[:, :votes_per_image]
        np.add.at(table, (images.labels[part][finite][:, None], best), 1)
    return table


def semantic_function_of(
    folder: RunFolder, config: QueryConfig, *, public: ImageSet, seed: int, device: str = "cpu",
    given: SemanticFunction | None = None, given_is: str = "given by the user",
) -> tuple[SemanticFunction, str]:  # fmt: skip
    """The function that asks, tried on public images, and what it is: the given one, an ONNX model, or a classifier trained here.

    Raises:
        RunError: its scores have another shape, or depend on the other images of a batch.
    """
    if given is not None:
        function, described = given, given_is
    elif config.onnx is not None:
        function, described = load_onnx(config.onnx), f"ONNX model {Path(config.onnx).name}"
    else:
        function = public_classifier(folder, config.classifier, public, seed=seed, device=device)
        described = f"{config.classifier.name} trained on the public set's {public.n_classes} labels"
    _check_scores(function, public, device)
    return function, described


def public_classifier(folder: RunFolder, config: ClassifierConfig, public: ImageSet, *, seed: int, device: str) -> Classifier:
    """The classifier of public labels, trained once a folder; also the feature network of the evaluation."""
    path, stamp = folder.checkpoint("classifier"), fingerprint(config, seed, set_fingerprint(public))
    if path.exists():
        tensors, metadata = folder.load_tensors(path, "query")
        if metadata.get("fingerprint") == stamp:
            model = Classifier(config, channels=public.channels, num_classes=public.n_classes)
            model.load_state_dict(tensors)
            return model.to(device).eval()
    train, held_out = train_test_split(public, 0.1, seed)
    model, accuracy = train_classifier(
        train.images, train.labels, num_classes=public.n_classes, config=config, seed=seed,
        validation=(held_out.images, held_out.labels), device=device, description="public classifier",
    )  # fmt: skip
    # Of always naming the commonest label, which of unequal labels is better than guessing.
    chance = float(np.bincount(held_out.labels).max() / len(held_out)) if len(held_out) else float("nan")
    poor = near_chance(accuracy, chance, len(held_out))
    if poor:
        logger.warning(
            "the classifier trained on the %d public labels names %.1f %% of %d held-out public images right, hardly better than "
            "chance (%.1f %%): labels that are chosen by it mean little, and distances measured on it look better than they are. "
            "Give query.classifier more epochs or width, or bring a public set with more images of each label",
            public.n_classes, 100 * accuracy, len(held_out), 100 * chance,
        )  # fmt: skip
    measured = {"public_accuracy": accuracy, "chance": chance, "held_out": len(held_out), "near_chance": poor}
    folder.save_tensors(path, model.state_dict(), {"fingerprint": stamp, **(measured if len(held_out) else {})})
    return model


def near_chance(accuracy: float, chance: float, images: int) -> bool:
    """Whether so many right of ``images`` held-out ones are hardly better than ``chance``.

    That is less than twice chance (of few labels: less than a tenth of the way from chance to 1), or so little more that one in a
    hundred blind guesses would do as well (one guess: the best of many epochs is luckier).
    """
    if not images:
        return False
    luck = binom.sf(round(accuracy * images) - 1, images, chance)
    return accuracy < min(2 * chance, chance + 0.1 * (1 - chance)) or bool(luck > 0.01)


def load_onnx(path: str | Path) -> SemanticFunction:
    """A user's classifier from an ONNX file: one input float NCHW in [−1, 1], first output scores (R, labels)."""
    path = Path(path)
    try:
        import onnxruntime
    except ImportError as error:
        raise RunError("an ONNX classifier needs onnxruntime: pip install 'privimage-fast[onnx]'") from error
    if not path.is_file():
        raise RunError(f"query.onnx: no file {path}")
    try:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RunError(f"query.onnx: {path} cannot be loaded as an ONNX model ({str(error).splitlines()[0]})") from error
    name = session.get_inputs()[0].name

    def scores(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.cpu().numpy()})[0])

    return scores


def tried(function: SemanticFunction, public: ImageSet, device: str, what: str) -> tuple[Tensor, Tensor]:
    """Its outputs for a few public images, together and alone.

    Raises:
        RunError: it fails; ``what`` names it.
    """
    if isinstance(function, nn.Module):
        function.eval()
    x = to_float(torch.from_numpy(public.images[:: max(1, len(public) // 8)][:8])).to(device)
    try:
        with torch.inference_mode():
            return function(x), torch.cat([function(x[i : i + 1]) for i in range(len(x))])
    except Exception as error:
        raise RunError(f"{what} fails on images of shape {tuple(x.shape)}: {error}") from error


def _check_scores(semantic_function: SemanticFunction, public: ImageSet, device: str) -> None:
    """Tries the function on a few public images, so that a wrong one fails before anything is charged."""
    together, alone = tried(semantic_function, public, device, "the semantic function")
    found, rows = tuple(together.shape), len(alone)
    if found != (rows, public.n_classes):
        raise RunError(
            f"the semantic function gives shape {found} for {rows} images, expected ({rows}, {public.n_classes}): one score "
            "for each label of the public set"
        )
    if not torch.allclose(together.float(), alone.float(), rtol=1e-3, atol=1e-3):
        raise RunError(
            "the semantic function scores an image otherwise alone than in a batch, so one image could move other images' votes; "
            "put the model in eval() mode, or score each image by itself"
        )
