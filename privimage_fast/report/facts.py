"""What the run folder says, read and checked, as plain values for the templates. A missing or damaged file leaves a gap
that says so; it never stops a report."""

from __future__ import annotations

import base64
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from markupsafe import Markup

from privimage_fast.report.heatmap import HeatMap, heat_map
from privimage_fast.report.privacy import Privacy, read_privacy, without_folder

T = TypeVar("T")

STAGES = ("query", "select", "pretrain", "warmup", "finetune", "label", "sample", "evaluate")
READ_REAL_IMAGES = ("query", "warmup", "finetune", "label", "evaluate")  # their running times say something of those images
CLASSIFIER, FINETUNED = "checkpoints/classifier.safetensors", "checkpoints/finetune.safetensors"
MEANS = "means.safetensors"
# What decoders and the checks below raise on a file that is not what a stage writes.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, OSError, RecursionError, EOFError, ArithmeticError,
               NotImplementedError, yaml.YAMLError, zipfile.BadZipFile, zlib.error)  # fmt: skip
MAX_TEXT_BYTES, MAX_PICTURE_BYTES = 64 * 2**20, 16 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_LABELS, MAX_CLASSES = 2_000_000, 10_000


@dataclass(frozen=True)
class Metric:
    name: str
    value: Any
    unit: str
    private: bool
    detail: str
    spread: Any = None


@dataclass(frozen=True)
class PublicClassifier:
    """How the classifier of public labels does on held-out public images, as it was written when it was trained."""

    accuracy: float
    chance: float
    images: int
    poor: bool


@dataclass(frozen=True)
class Picture:
    """`data` is base64, so it needs no escaping."""

    data: Markup
    width: int
    height: int


@dataclass(frozen=True)
class Release:
    """A file or folder of the run, and whether the guarantee covers it."""

    what: str
    path: str
    covered: bool
    why: str


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
    classifier: PublicClassifier | None
    pictures: dict[str, Picture]
    metrics: list[Metric]
    outdated: bool  # the metrics are of an earlier synthetic set
    steps: int | None  # noised steps that the released weights have taken
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
    def key_metric(self) -> Metric | None:
        return next((m for m in self.metrics if m.value is not None), None)

    @property
    def steps_text(self) -> str | None:
        """How many noised steps the model took, beside the plan's."""
        planned = self.setting("finetune", "steps")
        if self.steps is None:
            return None
        if not isinstance(planned, int) or self.steps >= planned:
            return f"{self.steps:,}"
        return f"{self.steps:,} of {planned:,} planned: repeated steps took the rest of the budget"

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
        return (
            ", which a classifier labels whose last layer is trained on the sensitive ones under noise"
            if "label" in self.finished
            else ""
        )

    def source(self, which: str) -> str:
        """A data set's name. Of a path the last part only: a card is published, a home folder should not be."""
        value = self.setting("data", which)
        if isinstance(value, list) and all(isinstance(v, str) for v in value):
            return " + ".join(v if v.startswith("embedded:") else Path(v).name for v in value) or "not stated"
        if not isinstance(value, str):
            return "not stated" if value is None else "given in Python"
        return value if value.startswith("embedded:") else Path(value).name or "not stated"


def read_facts(run_dir: Path) -> Facts:
    """Everything the three outputs say. Reads only files of `run_dir`."""
    run_dir, problems = Path(run_dir), []
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir}: no such run folder; give the --out of a run")
    reader = _Reader(run_dir, problems)
    config_text = reader.text("config.yaml")
    config = reader.shaped("config.yaml", lambda: _mapping(yaml.safe_load(config_text or "") or {})) or {}
    budget = reader.shaped("budget.json", lambda: _mapping_or_none(reader.json("budget.json")))
    query = reader.shaped("query.json", lambda: _query(reader.json("query.json")))
    selection = reader.shaped("selection.json", lambda: _selection(reader.json("selection.json")))
    seconds = reader.shaped("stages.json", lambda: _seconds(reader.json("stages.json"))) or {}
    metrics = reader.shaped("metrics.json", lambda: _metrics(reader.json("metrics.json"))) or []
    measured = reader.shaped("metrics.json", lambda: _measured_set(reader.json("metrics.json"))) if metrics else None
    drawn = reader.shaped("stages.json", lambda: _drawn_set(reader.json("stages.json"))) if seconds else None
    counted = reader.shaped("synthetic.npz", lambda: _count(run_dir / "synthetic.npz", query))
    sheets = {name: run_dir / "samples" / f"{name}.png" for name in ("before", "after", "public", "means")}
    means = reader.shaped(MEANS, lambda: _means(run_dir / MEANS))
    found = {name: reader.shaped(f"samples/{path.name}", partial(_picture, path)) for name, path in sheets.items()}
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
        kept=reader.shaped("labels.json", lambda: _kept(reader.json("labels.json"))),
        means=means,
        heat=heat_map(query, selection) if query else None,
        selection=selection,
        check=reader.shaped("query-check.json", lambda: _check(reader.json("query-check.json"))),
        classifier=reader.shaped(CLASSIFIER, lambda: _classifier(run_dir / CLASSIFIER)),
        pictures={name: picture for name, picture in found.items() if picture},
        metrics=metrics,
        outdated=bool(metrics) and measured is not None and drawn is not None and measured != drawn,
        steps=reader.shaped(FINETUNED, lambda: _steps(run_dir / FINETUNED)),
        class_counts=counted[0] if counted else [],
        image_shape=counted[1] if counted else None,
        timings=[(stage, seconds.get(stage), stage in READ_REAL_IMAGES) for stage in STAGES],
        secret_times=secret_times,
        releases=_releases(run_dir, metrics, secret_times, {charges.stage for charges in privacy.charges}),
        problems=problems,
        finished=frozenset(seconds),
        has_neighbours=(run_dir / "samples" / "neighbours-not-private.png").exists(),
    )


# -------------------------------------------------------------------------------------------------------------- files


@dataclass
class _Reader:
    run_dir: Path
    problems: list[str]

    def text(self, name: str) -> str | None:
        path = self.run_dir / name
        if not path.is_file():
            return None
        if path.stat().st_size > MAX_TEXT_BYTES:
            self.problems.append(f"{name}: larger than {MAX_TEXT_BYTES // 2**20} MiB, left out")
            return None
        return path.read_bytes().decode("utf-8", errors="replace")

    def json(self, name: str) -> Any:
        text = self.text(name)
        return None if text is None else json.loads(text)

    def shaped(self, name: str, read: Callable[[], T]) -> T | None:
        """What `read` makes of a file, or None and a line in the report when it is not what a stage writes."""
        try:
            return read()
        except _UNREADABLE as error:
            reason = without_folder(str(error).splitlines()[0] if str(error) else type(error).__name__, self.run_dir)
            self.problems.append(f"{name}: cannot be read ({reason})")
            return None


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} found, a mapping expected")
    return value


def _mapping_or_none(value: Any) -> dict[str, Any] | None:
    return None if value is None else _mapping(value)


def _query(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    labels, classes = [str(v) for v in value["labels"]], [str(v) for v in value["classes"]]
    counts = np.asarray(value["counts"], dtype=np.float64)
    if counts.shape != (len(classes), len(labels)) or counts.size == 0 or not np.isfinite(counts).all():
        raise ValueError(f"counts of shape {counts.shape} for {len(classes)} classes and {len(labels)} labels")
    numbers = {name: float(value[name]) for name in ("noise_std", "noise_multiplier")}
    return {
        "labels": labels, "classes": classes, "counts": counts, "votes_per_image": int(value["votes_per_image"]),
        "semantic_function": str(value.get("semantic_function", "not stated")), **numbers,
    }  # fmt: skip


def _selection(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    classes = [
        {"class": str(entry["class"]), "labels": [str(v) for v in entry["labels"]], "images": int(entry["images"])}
        for entry in value.get("classes") or []
    ]
    return {
        "mode": str(value["mode"]), "assignment": str(value.get("assignment", "")), "classes": classes,
        "public_images": int(value["public_images"]), "selected_images": int(value["selected_images"]),
        "ratio": float(value["ratio"]),
    }  # fmt: skip


def _check(value: Any) -> dict[str, Any] | None:
    """How the choice of labels fares under noise, by the query's share of the budget."""
    if value is None:
        return None

    def agreed(found: Any) -> tuple[float, float] | None:
        return None if found is None else (_fraction(found["labels"]), _fraction(found["votes"]))

    def held(found: Any) -> tuple[float, float] | None:
        """An unbiased estimate may lie beside the fractions. What was kept there before it was one is left out."""
        return None if found is None or "share" not in found else (float(found["share"]), float(found["error"]))

    rows = [
        {
            "share": None if r["share"] is None else float(r["share"]), "noise_multiplier": float(r["noise_multiplier"]),
            "noise_std": float(r["noise_std"]), "stand_in": agreed(r["stand_in"]), "table": held(r["table"]),
            "own": r["own"] is True,
        }
        for r in value["rows"][:100]
    ]  # fmt: skip
    uniform = None if value["uniform_share"] is None else _fraction(value["uniform_share"])
    return {"rows": rows, "verdict": str(value["verdict"]), "uniform_share": uniform}


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) <= 1 + 1e-9:
        raise ValueError(f"{value!r} is no fraction")
    return float(value)


def _kept(value: Any) -> tuple[float, float] | None:
    return None if value is None else (_fraction(value["kept"]), min(_fraction(part) for part in value["kept_of_class"]))


def _seconds(value: Any) -> dict[str, float | None] | None:
    if value is None:
        return None
    # Stages that read sensitive images leave their time out.
    seconds = {str(stage): float(record["seconds"]) if "seconds" in record else None for stage, record in value.items()}
    if not all(s is None or (math.isfinite(s) and s >= 0) for s in seconds.values()):
        raise ValueError("a time is not a finite number of seconds")
    return seconds


def _metrics(value: Any) -> list[Metric] | None:
    """Accuracy first. What does not say that it is private is not."""
    if value is None:
        return None
    metrics = [
        Metric(
            str(m["name"]),
            m.get("value"),
            str(m.get("unit") or ""),
            m.get("private") is True,
            str(m.get("detail") or ""),
            m.get("spread"),
        )
        for m in value["metrics"]
    ]
    return sorted(metrics, key=lambda m: "accuracy" not in m.name.lower())


def _measured_set(value: Any) -> str | None:
    """Which synthetic set the metrics are of; figures of older versions do not say."""
    name = value.get("synthetic")
    return None if name is None else str(name)


def _drawn_set(value: Any) -> str | None:
    name = value.get("sample", {}).get("fingerprint")
    return None if name is None else str(name)


def _described(path: Path) -> dict[str, Any] | None:
    """What a stage wrote of its tensors, from the header of a safetensors file: its length in 8 bytes, then JSON."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 0 < length <= MAX_HEADER_BYTES:
            raise ValueError(f"header of {length} bytes")
        header = json.loads(file.read(length))
    return _mapping(json.loads(header["__metadata__"]["privimage"]))


def _classifier(path: Path) -> PublicClassifier | None:
    described = _described(path)
    if described is None or "near_chance" not in described:
        return None  # of a version that did not say
    accuracy, chance = (_fraction(described[name]) for name in ("public_accuracy", "chance"))
    return PublicClassifier(accuracy, chance, int(described["held_out"]), described["near_chance"] is True)


def _steps(path: Path) -> int | None:
    described = _described(path)
    return None if described is None else int(described["steps"])


def _means(path: Path) -> dict[str, Any] | None:
    described = _described(path)
    names = ("noise_multiplier", "noise_std", "max_norm")
    if described is None:
        return None
    trust = [_fraction(value) for value in described["trust"]][:MAX_CLASSES]
    several = {name: int(described.get(name, 1)) for name in ("modes", "rounds")}
    return {name: float(described[name]) for name in names} | several | {"trust": trust}


def _count(path: Path, query: dict[str, Any] | None) -> tuple[list[tuple[str, int]], str] | None:
    """Images a class and their shape. The images themselves are not decoded, only their header is read."""
    if not path.is_file():
        return None
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo("labels.npy").file_size > 16 * MAX_LABELS:
            raise ValueError(f"more than {MAX_LABELS:,} labels")
        with archive.open("images.npy") as file:
            version = np.lib.format.read_magic(file)
            header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version](file)
        named = "label_names.npy" in archive.namelist() and archive.getinfo("label_names.npy").file_size < MAX_LABELS
    shape = header[0]
    with np.load(path, allow_pickle=False) as arrays:
        labels = arrays["labels"]
        names = [str(n) for n in arrays["label_names"]] if named else (query or {}).get("classes", [])
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(shape) != 4 or shape[0] != len(labels):
        raise ValueError(f"images {shape} and labels {labels.dtype} {labels.shape} do not fit together")
    values, counts = np.unique(labels, return_counts=True)
    if len(values) > MAX_CLASSES:
        raise ValueError(f"more than {MAX_CLASSES:,} classes")
    rows = [(names[v] if 0 <= v < len(names) else f"class {v}", int(n)) for v, n in zip(values.tolist(), counts, strict=True)]
    return rows, "×".join(str(n) for n in shape[1:])


def _picture(path: Path) -> Picture | None:
    """A PNG as it is, for embedding. Only its header is looked at: the browser decodes it."""
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_PICTURE_BYTES:
        raise ValueError(f"larger than {MAX_PICTURE_BYTES // 2**20} MiB")
    data = path.read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 33:
        raise ValueError("not a PNG file")
    width, height = struct.unpack(">II", data[16:24])
    return Picture(Markup(base64.b64encode(data).decode()), width, height)


def _releases(run_dir: Path, metrics: list[Metric], secret_times: bool, asked: set[str]) -> list[Release]:
    """``asked``: the stages that the ledger charges."""
    learned = {"warmup": "noisy class means", "finetune": "noised gradient sums", "label": "noised gradient sums"}
    seen = " and ".join(dict.fromkeys(text for stage, text in learned.items() if stage in asked))
    training = f"trained on {seen} only; all intermediate weights are covered" if seen else "trained on public images only"
    rows = [
        Release("Synthetic images", "synthetic.npz", True, "drawn from the private model; drawing more costs nothing"),
        Release("Model weights", "model/", True, training),
        Release("Checkpoints", "checkpoints/", True, training + "; the pre-trained ones saw the noisy histogram at most"),
        Release("Noisy histogram", "query.json", True, "Gaussian noise was added before it was written; drawn once"),
        Release("Check of the query", "query-check.json", True, "computed from public images and the noisy histogram"),
        Release("Chosen public labels", "selection.json", True, "computed from the noisy histogram alone"),
        Release("Noisy class means and counts", MEANS, True, "Gaussian noise was added before they were written"),
        Release("Sheet of class means", "samples/means.png", True, "computed from the noisy class means"),
        Release(
            "Labels of synthetic images",
            "model/labeller.safetensors",
            True,
            "the layer that gives them is trained on noised gradient sums only; labels follow from it and the images",
        ),
        Release("Labels that changed", "labels.json", True, "computed from the private model and its labels"),
        Release("Sheet before fine-tuning", "samples/before.png", True, "drawn from the model that saw public images only"),
        Release("Sheet of synthetic images", "samples/after.png", True, "drawn from the private model"),
        Release(
            "Sheet of public images",
            "samples/public.png",
            True,
            "real images of the public set, chosen by the histogram; that set itself gets no protection",
        ),
        Release("Ledger and budget", "ledger.jsonl", True, "public parameters only; no loss, norm or realised batch size"),
        Release("Configuration", "config.yaml", True, "public, provided no value was tuned by looking at the sensitive set"),
    ]
    figures = any(not m.private for m in metrics)
    rows += [
        Release("Card", "README.md", not figures, "contains the metrics" if figures else "computed from the files above"),
        Release("Report", "report.html", not (figures or secret_times),
                "contains metrics or running times that are not private" if figures or secret_times
                else "computed from the files above; with real images of the public set"),
        Release("Card of the model", "model/README.md", True, "the card without what is not private"),
    ]  # fmt: skip
    if any(m.private for m in metrics):
        rows.append(Release("Metrics marked private", "metrics.json", True, "computed from synthetic images alone"))
    if figures:
        rows.append(Release("Metrics marked not private", "metrics.json", False, "computed on real images, without noise"))
    rows += [
        Release(
            "Nearest sensitive images", "samples/neighbours-not-private.png", False, "SHOWS SENSITIVE IMAGES: do not pass on"
        ),
        Release("Running times", "stages.json", False, "include those of stages that read real images")
        if secret_times
        else Release("Running times", "stages.json", True, "of stages that read no real image; the others' are not written"),
    ]
    # Card and report are about to be written, if they are not there.
    written = {"README.md", "report.html", "model/README.md" if (run_dir / "model").is_dir() else ""}
    return [row for row in rows if row.path in written or (run_dir / row.path).exists()]
