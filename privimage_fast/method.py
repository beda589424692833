"""The method in Python: :class:`PrivImage` over one run folder."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from privimage_fast.config import RunConfig, build_config
from privimage_fast.data import ImageSet
from privimage_fast.models.labeller import Labeller
from privimage_fast.models.training import Drawable
from privimage_fast.opening import autocast_of, device_of
from privimage_fast.pipeline import Run
from privimage_fast.planning import Plan
from privimage_fast.stages.folder import RunError, RunFolder
from privimage_fast.stages.query import SemanticFunction
from privimage_fast.stages.sample import draw
from privimage_fast.stages.saved import check_target, load_pretrained, save_pretrained


class PrivImage:
    """The method in Python.

    Args:
        config: a :class:`RunConfig`, or None for the defaults.
        sections: whole sections or single values over it, e.g. ``PrivImage(privacy={"epsilon": 3}, model={"preset": "small"})``.

    Example:
        >>> model = pf.PrivImage(privacy={"epsilon": 10})                             # doctest: +SKIP
        >>> print(model.plan("public/", "sensitive/").table())                        # doctest: +SKIP
        >>> model.fit("public/", "sensitive/", out="runs/a")                          # doctest: +SKIP
        >>> images = model.sample(100)                                                # doctest: +SKIP
    """

    def __init__(self, config: RunConfig | None = None, **sections: Any) -> None:
        self.config = build_config(sections, config)
        self._run: Run | None = None
        self._model: Drawable | None = None
        self._labeller: Labeller | None = None
        self._sampler = self.config.sample.sampler
        self._class_names: tuple[str, ...] = ()
        self._pretrained: dict[str, Any] = {}
        self._companions: dict[str, Any] = {}  # what a saved model came with, to be saved with it again

    def plan(self, public: ImageSet | str, private: ImageSet | str) -> Plan:
        """σ, steps, memory and rough time, before anything is spent."""
        return self._bind(public, private, None, None).plan()

    def fit(
        self, public: ImageSet | str, private: ImageSet | str, *, out: str | Path | None = None, resume: bool = False,
        semantic_function: SemanticFunction | None = None,
    ) -> PrivImage:  # fmt: skip
        """query → select → pretrain → warmup → finetune → label. ``resume`` goes on with an interrupted run in its folder."""
        run = self._bind(public, private, out, semantic_function)
        try:
            with run.opened(resume=resume):
                run.query()
                run.select()
                run.pretrain()
                run.warmup()
                model, labeller = run.finetune().drawable.eval(), run.label()
                run.report()
        except BaseException as error:
            if out is None and run.folder.begun:  # nobody else knows where it is
                error.add_note(f"what was charged for is in {run.folder.path}; go on with that as out, and resume=True")
            raise
        # All at once: weights of a run that was cut off must not be saved with the ledger of the one before.
        # Not the run's configuration: N, δ and steps of this set would be taken for those of the next.
        self._run, self._model, self._labeller, self._class_names = run, model, labeller, run.private.label_names
        self._sampler = run.config.sample.sampler
        return self

    def sample(
        self, n: int, labels: np.ndarray | None = None, *, seed: int | None = None, relabel: bool = True
    ) -> ImageSet:  # fmt: skip
        """n synthetic images, drawn for as many of each class as n allows, or for the given labels (n,).

        Where the model has a labeller, the labels that come with them are its own; ``relabel`` False leaves those that the images
        are drawn for.
        """
        model = self._fitted()
        if n < 1:
            raise ValueError(f"n must be at least 1, found {n}")
        if labels is None:
            labels = np.arange(n) % len(self._class_names)
        labels = np.asarray(labels)
        if labels.shape != (n,) or labels.min() < 0 or labels.max() >= len(self._class_names):
            raise ValueError(f"labels must be {n} whole numbers in [0, {len(self._class_names)}), found {labels!r}")
        seed = self.config.seed if seed is None else seed
        size, device = self.config.sample.batch_size, device_of(self.config.device)
        autocast = autocast_of(self.config.precision, device)
        parts = [
            draw(model, labels[start : start + size], self._sampler, seed=seed, first=start, device=device, autocast=autocast)
            for start in range(0, n, size)
        ]
        images = np.concatenate(parts)
        if relabel and self._labeller is not None:
            labels = self._labeller.labels(images, device)
        return ImageSet(images, labels.astype(np.int64), self._class_names, name="synthetic")

    def evaluate(self, test: ImageSet | str) -> dict[str, Any]:
        """Metrics against real test images; not private."""
        if self._run is None:
            raise RunError("evaluate needs the run it was fitted in; call fit first")
        self._run.test_on(test)
        with self._run.opened(resume=True):
            result = self._run.evaluate()
            self._run.report()
        assert result is not None
        return result

    def privacy_spent(self) -> dict[str, Any]:
        """ε as composed from the ledger, δ, and what they refer to."""
        if self._run is not None:
            return self._run.spent()
        self._fitted()
        return dict(self._pretrained)

    def save_pretrained(self, path: str | Path) -> None:
        """Weights as safetensors, configuration, ledger, and the card without figures that are not private."""
        check_target(path)
        if self._run is None:
            save_pretrained(self._fitted(), path, class_names=self._class_names, labeller=self._labeller, **self._companions)
        else:
            self._run.save(self._fitted(), path, self._labeller)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> PrivImage:
        """A model that can be sampled from. Reads safetensors and JSON only."""
        saved = load_pretrained(path)
        described = saved.described
        self = cls(sample={"sampler": described["sampler"]} if "sampler" in described else {})
        self._model, self._class_names, self._labeller = saved.model, saved.class_names, saved.labeller
        self._pretrained = described.get("privacy", {})
        folder = RunFolder(path)
        texts = {name: file.read_text() for name, file in (("ledger", folder.ledger), ("card", folder.card)) if file.exists()}
        sampler = self.config.sample.sampler if "sampler" in described else None
        self._companions = {"privacy": described.get("privacy"), "sampler": sampler, **texts}
        return self

    def _fitted(self) -> Drawable:
        if self._model is None:
            raise RunError("there is no model yet; call fit, or PrivImage.from_pretrained")
        return self._model

    def _bind(
        self, public: ImageSet | str, private: ImageSet | str, out: str | Path | None, semantic_function: SemanticFunction | None
    ) -> Run:
        sources = {"public": public, "private": private}
        for name, source in sources.items():
            if not isinstance(source, ImageSet | str | Path | list):  # whose text would be pixel values
                raise TypeError(
                    f"{name}: give a folder, a file or pf.ImageSet(images, labels, label_names) of uint8 (n, H, W, 1 or 3), "
                    f"found {type(source).__name__}"
                )
        sets = {name: s for name, s in sources.items() if isinstance(s, ImageSet)}
        data = replace(self.config.data, **{name: str(s) for name, s in sources.items() if name not in sets})
        if sets:  # in-memory images bring their own size
            first = next(iter(sets.values()))
            data = replace(data, resolution=first.resolution, channels=first.channels)
        config = replace(self.config, data=data, out=str(out or tempfile.mkdtemp(prefix="privimage-")))
        return Run(config, semantic_function=semantic_function, **sets)
