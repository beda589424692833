"""The run folder: where each stage finds what earlier ones left, and leaves its own, whole or not at all."""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from privimage_fast.data import ImageSet
from privimage_fast.data.atomic import atomic_path, atomic_write_text
from privimage_fast.dp.ledger import Ledger

logger = logging.getLogger(__name__)

SENSITIVE_STAGES = ("query", "warmup", "finetune", "label", "evaluate")
CHARGED_STAGES = SENSITIVE_STAGES[:-1]
RUN_FOLDERS = ("checkpoints", "samples", "model", "synthetic")


class RunError(RuntimeError):
    """The run folder does not hold what a stage needs, or holds what contradicts the request."""


class RunFolder:
    """Paths and files of one run. Every write is atomic, so that a killed run leaves no half-written file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    config = property(lambda self: self.path / "config.yaml")
    ledger = property(lambda self: self.path / "ledger.jsonl")
    query = property(lambda self: self.path / "query.json")
    query_check = property(lambda self: self.path / "query-check.json")
    selection = property(lambda self: self.path / "selection.json")
    means = property(lambda self: self.path / "means.safetensors")
    budget = property(lambda self: self.path / "budget.json")
    metrics = property(lambda self: self.path / "metrics.json")
    synthetic = property(lambda self: self.path / "synthetic.npz")
    samples = property(lambda self: self.path / "samples")
    labels = property(lambda self: self.path / "labels.json")
    model = property(lambda self: self.path / "model")
    card = property(lambda self: self.path / "README.md")
    stages = property(lambda self: self.path / "stages.json")

    @property
    def begun(self) -> bool:
        """Whether anything was charged or finished here; a configuration alone, of a run that was refused, binds nobody."""
        if not self.config.exists():
            return False
        results = (self.stages, self.query, self.means, self.model, self.synthetic, self.metrics)
        weights = (self.checkpoint(name) for name in ("finetune", "finetune-progress"))
        if any(path.exists() for path in (*results, *weights)):
            return True
        return self.ledger.exists() and bool(Ledger.read(self.ledger).records())

    def create(self) -> None:
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot create the run folder {self.path}: {error.strerror}; choose another --out") from error

    def checkpoint(self, name: str) -> Path:
        return self.path / "checkpoints" / f"{name}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Refuses a second process on the same folder for as long as the context lasts."""
        self.create()
        with open(self.path / ".lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"another process is working in {self.path}; wait for it or choose another --out") from error
            yield

    def write_json(self, path: Path, value: Any) -> None:
        atomic_write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def read_json(self, path: Path, stage: str) -> Any:
        """The JSON of a stage's file; names the stage to run where it is missing."""
        if not path.exists():
            raise RunError(f"{path} is missing; run `privimage {stage}` first")
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise RunError(f"{path} is not valid JSON ({error}); restore it, or {_begin_again(stage)}") from error

    def save_tensors(self, path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        with atomic_path(path) as temporary:
            # Views of one flat tensor share storage, which safetensors refuses: each is written as its own.
            own = {name: t.detach().to("cpu").clone().contiguous() for name, t in tensors.items()}
            try:
                save_file(own, temporary, metadata={"privimage": json.dumps(metadata)})
            except (SafetensorError, OSError) as error:
                raise RunError(f"{path} cannot be written ({error}); make room, and go on with --resume") from error

    def load_tensors(self, path: Path, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        with _reading(path, stage) as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, _metadata(handle)

    def described(self, path: Path, stage: str) -> dict[str, Any]:
        """What was saved beside the tensors, without reading them."""
        with _reading(path, stage) as handle:
            return _metadata(handle)

    def finished(self, stage: str, fingerprint: str) -> bool:
        """Whether the stage has ended before, with the same inputs."""
        record = self._records().get(stage)
        return record is not None and record["fingerprint"] == fingerprint

    def recorded(self, stage: str) -> bool:
        return stage in self._records()

    def fingerprint_of(self, stage: str) -> str | None:
        """That under which the stage ended last; None where it has not."""
        return self._records().get(stage, {}).get("fingerprint")

    def record(self, stage: str, fingerprint: str, seconds: float) -> None:
        records = self._records()
        before = records.get(stage, {})
        spent = before.get("seconds", 0.0) if before.get("fingerprint") == fingerprint else 0.0
        records[stage] = {"fingerprint": fingerprint}
        # How long a stage took tells, if faintly, how many sensitive images its batches drew: not written down.
        if stage not in SENSITIVE_STAGES:
            records[stage]["seconds"] = round(spent + seconds, 2)
        self.write_json(self.stages, records)

    def _records(self) -> dict[str, Any]:
        return self.read_json(self.stages, "run") if self.stages.exists() else {}


@contextmanager
def _reading(path: Path, stage: str) -> Iterator[Any]:
    if not path.exists():
        raise RunError(f"{path} is missing; run `privimage {stage}` first")
    try:
        with safe_open(path, framework="pt") as handle:
            yield handle
    except Exception as error:
        raise RunError(f"{path} cannot be read as safetensors ({error}); restore it, or {_begin_again(stage)}") from error


def _metadata(handle: Any) -> dict[str, Any]:
    return json.loads((handle.metadata() or {}).get("privimage", "{}"))


def _begin_again(stage: str) -> str:
    paid = ": what it charged before stays charged, and it charges anew" if stage in CHARGED_STAGES else ""
    return f"delete it and run `privimage {stage}` again{paid}"


@contextmanager
def timed(folder: RunFolder, stage: str, fingerprint: str) -> Iterator[None]:
    """Records the stage as finished when the block ends without an error."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    logger.info("%s: %.0f s", stage, seconds)
    folder.record(stage, fingerprint, seconds)


def fingerprint(*parts: Any) -> str:
    """A short hash of configuration and public inputs, by which a resumed stage knows its own work."""
    return sha256(repr(parts).encode()).hexdigest()[:16]


def file_fingerprint(path: str | Path) -> str:
    """Hash of a file's content, or of nothing where there is none: whoever opens it says so."""
    path = Path(path)
    return sha256(path.read_bytes() if path.is_file() else b"").hexdigest()[:16]


def set_fingerprint(images: ImageSet) -> str:
    """Hash of a *public* image set. Never used on the sensitive one: the hash would be written down."""
    digest = sha256(images.images.tobytes())
    digest.update(images.labels.tobytes())
    return digest.hexdigest()[:16]
