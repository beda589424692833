"""The files of a run folder that a report reads, each checked: what no stage writes raises, and leaves a gap in the report."""

from __future__ import annotations

import base64
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml
from markupsafe import Markup

from privimage_fast.report.privacy import without_folder

T = TypeVar("T")

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


@dataclass
class Reader:
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


def mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__} found, a mapping expected")
    return value


def mapping_or_none(value: Any) -> dict[str, Any] | None:
    return None if value is None else mapping(value)


def query(value: Any) -> dict[str, Any] | None:
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


def selection(value: Any) -> dict[str, Any] | None:
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


def check(value: Any) -> dict[str, Any] | None:
    """How the choice of labels fares under noise, by the query's share of the budget."""
    if value is None:
        return None

    def agreed(found: Any) -> tuple[float, float] | None:
        return None if found is None else (fraction(found["labels"]), fraction(found["votes"]))

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
    uniform = None if value["uniform_share"] is None else fraction(value["uniform_share"])
    return {"rows": rows, "verdict": str(value["verdict"]), "uniform_share": uniform}


def fraction(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= float(value) <= 1 + 1e-9:
        raise ValueError(f"{value!r} is no fraction")
    return float(value)


def kept(value: Any) -> tuple[float, float] | None:
    return None if value is None else (fraction(value["kept"]), min(fraction(part) for part in value["kept_of_class"]))


def seconds(value: Any) -> dict[str, float | None] | None:
    if value is None:
        return None
    # Stages that read sensitive images leave their time out.
    seconds = {str(stage): float(record["seconds"]) if "seconds" in record else None for stage, record in value.items()}
    if not all(s is None or (math.isfinite(s) and s >= 0) for s in seconds.values()):
        raise ValueError("a time is not a finite number of seconds")
    return seconds


def metrics(value: Any) -> list[Metric] | None:
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


def measured_set(value: Any) -> str | None:
    """Which synthetic set the metrics are of; figures of older versions do not say."""
    name = value.get("synthetic")
    return None if name is None else str(name)


def drawn_set(value: Any) -> str | None:
    name = value.get("sample", {}).get("fingerprint")
    return None if name is None else str(name)


def metadata(path: Path) -> dict[str, Any] | None:
    """What a stage wrote of its tensors, from the header of a safetensors file: its length in 8 bytes, then JSON."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 0 < length <= MAX_HEADER_BYTES:
            raise ValueError(f"header of {length} bytes")
        header = json.loads(file.read(length))
    return mapping(json.loads(header["__metadata__"]["privimage"]))


def classifier(path: Path) -> PublicClassifier | None:
    described = metadata(path)
    if described is None or "near_chance" not in described:
        return None  # of a version that did not say
    accuracy, chance = (fraction(described[name]) for name in ("public_accuracy", "chance"))
    return PublicClassifier(accuracy, chance, int(described["held_out"]), described["near_chance"] is True)


def steps(path: Path) -> int | None:
    described = metadata(path)
    return None if described is None else int(described["steps"])


def means(path: Path) -> dict[str, Any] | None:
    described = metadata(path)
    names = ("noise_multiplier", "noise_std", "max_norm")
    if described is None:
        return None
    trust = [fraction(value) for value in described["trust"]][:MAX_CLASSES]
    several = {name: int(described.get(name, 1)) for name in ("modes", "rounds")}
    return {name: float(described[name]) for name in names} | several | {"trust": trust}


def count(path: Path, query: dict[str, Any] | None) -> tuple[list[tuple[str, int]], str] | None:
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
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    if len(names) > MAX_CLASSES:
        raise ValueError(f"more than {MAX_CLASSES:,} classes")
    # A class that no image has, where labels are learned, is the one to be told of.
    rows = [(name, found.pop(v, 0)) for v, name in enumerate(names)] + [(f"class {v}", n) for v, n in found.items()]
    return rows, "×".join(str(n) for n in shape[1:])


def picture(path: Path) -> Picture | None:
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
