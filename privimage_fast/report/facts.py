"""What the run folder says, read and checked, as plain values for the templates. A missing or damaged file leaves a gap
that says so; it never stops a report."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from privimage_fast.report import files
from privimage_fast.report.heatmap import HeatMap, heat_map
from privimage_fast.report.privacy import Privacy, read_privacy
from privimage_fast.report.releases import MEANS, Release, releases

STAGES = ("query", "select", "pretrain", "warmup", "finetune", "label", "sample", "evaluate")
READ_REAL_IMAGES = ("query", "warmup", "finetune", "label", "evaluate")  # their running times say something of those images
CLASSIFIER, FINETUNED = "checkpoints/classifier.safetensors", "checkpoints/finetune.safetensors"
LABELLER = "model/labeller.safetensors"


@dataclass
class Facts:
    name: str
    config_text: str | None
    config: dict[str, Any]
    privacy: Privacy
    query: dict[str, Any] | None
    kept: tuple[float, float] | None  # of the labels that images were drawn for, in all and in the class that keeps fewest
    means: dict[str, Any] | None  # of the class means: noise_multiplier, noise_std, max_norm, modes, rounds, trust of each class
    heat: HeatMap | None
    selection: dict[str, Any] | None
    check: dict[str, Any] | None
    classifier: files.PublicClassifier | None
    pictures: dict[str, files.Picture]
    metrics: list[files.Metric]
    outdated: bool  # the metrics are of an earlier synthetic set
    steps: int | None  # noised steps that the released weights have taken
    label_steps: int | None  # and those of the layer that labels images, None where no layer does
    class_counts: list[tuple[str, int]]
    image_shape: str | None
    timings: list[tuple[str, float | None, bool]]
    secret_times: bool  # a time is written that the stages leave out today
    releases: list[Release]
    problems: list[str]
    finished: frozenset[str]
    has_neighbours: bool

    @property
    def compared(self) -> bool:
        """Whether evaluation has read the sensitive images that were trained on, and left something of it."""
        return self.has_neighbours or any("training" in m.name or "membership" in m.name for m in self.metrics)

    @property
    def images(self) -> int | None:
        return sum(n for _, n in self.class_counts) if self.class_counts else None

    @property
    def key_metric(self) -> files.Metric | None:
        return next((m for m in self.metrics if m.value is not None), None)

    @property
    def steps_text(self) -> str | None:
        """How many noised steps the model took, beside the plan's."""
        return _taken(self.steps, self.setting("finetune", "steps"))

    @property
    def label_steps_text(self) -> str | None:
        """The same of the layer that labels images."""
        return _taken(self.label_steps, self.setting("label", "steps"))

    @property
    def open_stages(self) -> list[str]:
        tested = self.setting("data", "test") or self.setting("data", "holdout")
        left_out = {"warmup": not self.warms_up, "label": not self.relabels, "evaluate": not tested}
        return [stage for stage in STAGES if stage not in self.finished and not left_out.get(stage)]

    @property
    def warms_up(self) -> bool:
        """Whether the configuration asks for class means; one of an earlier version does not know them."""
        unused = self.setting("model", "family") == "gan" and self.setting("model", "adversarial", "moments") == 0
        return bool(self.setting("warmup", "steps")) and self.setting("privacy", "train") is not False and not unused

    @property
    def relabels(self) -> bool:
        """Whether the configuration asks for labels from a privately trained layer."""
        return bool(self.setting("label", "steps")) and self.setting("privacy", "train") is not False

    @property
    def labels_given_up(self) -> bool:
        """Whether labels were charged, and nothing here has them."""
        return not self.relabels and any(charges.stage == "label" for charges in self.privacy.charges)

    def setting(self, *keys: str) -> Any:
        """A value of the resolved configuration, None where it is not there."""
        value: Any = self.config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    @property
    def method(self) -> str:
        """How the second half of the method was done."""
        if self.setting("model", "family") == "gan" and self.setting("privacy", "train") is False:
            return "and a GAN that is trained on those public images draws the synthetic set."
        if self.setting("model", "family") == "gan":
            learns = "the discriminator and from noisy class means" if self.means else "the discriminator alone"
            return (
                "a GAN is pre-trained on those public images, its discriminator fine-tuned on the sensitive ones with DP-SGD, "
                f"and its generator, which learns from {learns}, draws the synthetic set{self._labelled}."
            )
        if self.setting("privacy", "train") is False:
            return "and a diffusion model that is trained on those public images draws the synthetic set."
        warmed = "warmed up on noisy class means, " if self.means else ""
        return (
            f"a diffusion model is pre-trained on those public images, {warmed}then fine-tuned on the sensitive ones with "
            f"DP-SGD, and draws the synthetic set{self._labelled}."
        )

    @property
    def _labelled(self) -> str:
        if self.label_steps is None:
            return ""
        noised = "" if self.privacy.epsilon is not None and math.isinf(self.privacy.epsilon) else " under noise"
        return f", which a classifier labels whose last layer is trained on the sensitive ones{noised}"

    def source(self, which: str) -> str:
        """A data set's name. Of a path the last part only: a card is published, a home folder should not be."""
        value = self.setting("data", which)
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return " + ".join(v if v.startswith("embedded:") else Path(v).name for v in value) or "not stated"
        if not isinstance(value, str):
            return "not stated" if value is None else "given in Python"
        return value if value.startswith("embedded:") else Path(value).name or "not stated"


def _taken(steps: int | None, planned: Any) -> str | None:
    if steps is None:
        return None
    if not isinstance(planned, int) or steps >= planned:
        return f"{steps:,}"
    return f"{steps:,} of {planned:,} planned: repeated steps took the rest of the budget"


def read_facts(run_dir: Path) -> Facts:
    """Everything the three outputs say. Reads only files of `run_dir`."""
    run_dir, problems = Path(run_dir), []
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run folder; give the --out of a run")
    reader = files.Reader(run_dir, problems)
    config_text = reader.text("config.yaml")
    config = reader.shaped("config.yaml", lambda: files.mapping(yaml.safe_load(config_text or "") or {})) or {}
    budget = reader.shaped("budget.json", lambda: files.mapping_or_none(reader.json("budget.json")))
    query = reader.shaped("query.json", lambda: files.query(reader.json("query.json")))
    selection = reader.shaped("selection.json", lambda: files.selection(reader.json("selection.json")))
    seconds = reader.shaped("stages.json", lambda: files.seconds(reader.json("stages.json"))) or {}
    metrics = reader.shaped("metrics.json", lambda: files.metrics(reader.json("metrics.json"))) or []
    measured = reader.shaped("metrics.json", lambda: files.measured_set(reader.json("metrics.json"))) if metrics else None
    drawn = reader.shaped("stages.json", lambda: files.drawn_set(reader.json("stages.json"))) if seconds else None
    counted = reader.shaped("synthetic.npz", lambda: files.count(run_dir / "synthetic.npz", query))
    sheets = {name: run_dir / "samples" / f"{name}.png" for name in ("before", "after", "public", "means")}
    means = reader.shaped(MEANS, lambda: files.means(run_dir / MEANS))
    found = {name: reader.shaped(f"samples/{path.name}", partial(files.picture, path)) for name, path in sheets.items()}
    privacy = read_privacy(run_dir, budget or {}, query, means, config, set(seconds))
    if not privacy.holds:  # "computed from synthetic images alone" is worth nothing then
        metrics = [replace(metric, private=False) for metric in metrics]
    secret_times = any(seconds.get(stage) is not None for stage in READ_REAL_IMAGES)
    return Facts(
        name=run_dir.resolve().name,
        config_text=config_text,
        config=config,
        privacy=privacy,
        query=query,
        kept=reader.shaped("labels.json", lambda: files.kept(reader.json("labels.json"))),
        means=means,
        heat=heat_map(query, selection) if query else None,
        selection=selection,
        check=reader.shaped("query-check.json", lambda: files.check(reader.json("query-check.json"))),
        classifier=reader.shaped(CLASSIFIER, lambda: files.classifier(run_dir / CLASSIFIER)),
        pictures={name: picture for name, picture in found.items() if picture},
        metrics=metrics,
        outdated=bool(metrics) and measured is not None and drawn is not None and measured != drawn,
        steps=reader.shaped(FINETUNED, lambda: files.steps(run_dir / FINETUNED)),
        label_steps=reader.shaped(LABELLER, lambda: files.steps(run_dir / LABELLER)),
        class_counts=counted[0] if counted else [],
        image_shape=counted[1] if counted else None,
        timings=[(stage, seconds.get(stage), stage in READ_REAL_IMAGES) for stage in STAGES],
        secret_times=secret_times,
        releases=releases(run_dir, metrics, secret_times, {charges.stage for charges in privacy.charges}),
        problems=problems,
        finished=frozenset(seconds),
        has_neighbours=(run_dir / "samples" / "neighbours-not-private.png").exists(),
    )
