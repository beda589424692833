"""Runs the cells of a comparison, in turn or several at a time. What is finished is not run again; what fails is reported."""

from __future__ import annotations

import fcntl
import json
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import privimage_fast
from privimage_fast.compare.grid import Cell, Comparison
from privimage_fast.compare.shared import SharedTraining
from privimage_fast.compare.workers import Workers
from privimage_fast.config import DataConfig
from privimage_fast.data import ImageSet
from privimage_fast.data.atomic import atomic_write_text
from privimage_fast.opening import device_of, open_source
from privimage_fast.pipeline import Run
from privimage_fast.stages.folder import RunError, RunFolder, file_fingerprint, fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: `error` is None for a finished one. `state`: done, kept (finished earlier), failed or open."""

    cell: Cell
    state: str
    error: str | None = None


def run_comparison(
    comparison: Comparison, *, wanted: Callable[[Cell], bool] = lambda cell: True, jobs: int = 1
) -> list[Outcome]:  # fmt: skip
    """Runs every wanted cell that is not finished; goes on with the next where one fails.

    Every run has its own folder, query, noise and ledger. A failed run's traceback is in its folder as error.txt, and the next
    call takes it up again.

    Args:
        jobs: runs at a time. More than one are made by processes of their own, which share this one's threads; small networks
            gain by it. A script that asks for it needs the usual ``if __name__ == "__main__":``.

    Raises:
        RunError: another process works on the same comparison, there is nothing to compare against, or several jobs would each
            take most of a GPU's memory.
    """
    with _locked(comparison):
        cells = [cell for cell in comparison.cells if wanted(cell) and not is_finished(cell)]
        done = _side_by_side(cells, comparison.out, jobs) if jobs > 1 and len(cells) > 1 else _in_turn(cells, comparison.out)
        ended: dict[str, Outcome] = {}
        for number, outcome in enumerate(done, 1):
            ended[outcome.cell.name] = outcome
            logger.info("%d of %d runs: %s %s", number, len(cells), outcome.cell.name, outcome.state)
            if outcome.error:
                logger.error("run %s failed and is left out: %s", outcome.cell.name, outcome.error)
    return [ended.get(outcome.cell.name, outcome) for outcome in states(comparison)]


def _in_turn(cells: Sequence[Cell], out: Path) -> Iterator[Outcome]:
    read, shared = read_sets(), SharedTraining(out / "shared")
    for cell in cells:
        logger.info("run %s", cell.name)
        yield _attempt(cell, read, shared)


def _side_by_side(cells: Sequence[Cell], out: Path, jobs: int) -> Iterator[Outcome]:
    for cell in cells:
        if device_of(cell.config.device) != "cpu" and cell.config.finetune.memory_budget_mib is None:
            raise RunError(
                f"{jobs} jobs on one GPU would each take most of its memory: set finetune.memory_budget_mib in `base`, or run "
                "one at a time"
            )
    # Public training is made once, and whoever needs it meanwhile waits: different training comes first.
    first = {cell.training_key: cell for cell in reversed(cells)}
    cells = sorted(cells, key=lambda cell: first[cell.training_key] is not cell)
    shared = str(out / "shared")
    workers = Workers(_attempt_elsewhere, jobs=jobs, died=_died)
    yield from workers.results([(cell, shared) for cell in cells])


def _died(task: tuple[Cell, str], why: str) -> Outcome:
    _leave_error(task[0], why)
    return Outcome(task[0], "failed", why)


def _attempt_elsewhere(task: tuple[Cell, str]) -> Outcome:
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter(f"{task[0].name}: %(message)s"))
    return _attempt(task[0], _read_here(), SharedTraining(Path(task[1])))


def states(comparison: Comparison) -> list[Outcome]:
    """What is there, without running anything."""
    return [Outcome(cell, "kept" if is_finished(cell) else "open") for cell in comparison.cells]


def is_finished(cell: Cell) -> bool:
    path = RunFolder(cell.config.out).path / "cell.json"
    try:
        return path.is_file() and json.loads(path.read_text()).get("fingerprint") == cell.stamp
    except (ValueError, AttributeError):
        return False


@cache
def code_fingerprint() -> str:
    """Of the package's Python files and kernels: a configuration says nothing of what a later version makes of it."""
    root = Path(privimage_fast.__file__).parent
    files = sorted([*root.rglob("*.py"), *root.glob("*.so")])
    return fingerprint([(str(path.relative_to(root)), file_fingerprint(path)) for path in files])


def code_of(cell: Cell) -> str | None:
    """That which ended a finished run; None of one that was made before it was written down."""
    return json.loads((RunFolder(cell.config.out).path / "cell.json").read_text()).get("code")


def last_error(cell: Cell) -> str | None:
    """What kind of error a failed attempt left: the first line of error.txt. None where there was none, or a later one went well.

    The rest is for the owner: a message may name a sensitive file, and tables are passed on.
    """
    path = Path(cell.config.out) / "error.txt"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return lines[0] if lines else None


def _attempt(cell: Cell, read: Callable[[DataConfig], dict[str, ImageSet]], shared: SharedTraining) -> Outcome:
    folder, code = RunFolder(cell.config.out), code_fingerprint()  # as it is read, and not as it may be edited meanwhile
    try:
        run_cell(Run(cell.config, **read(cell.config.data)), shared)
        folder.write_json(folder.path / "cell.json", {"fingerprint": cell.stamp, "code": code})
        (folder.path / "error.txt").unlink(missing_ok=True)
        return Outcome(cell, "done")
    except Exception as error:  # whatever it is, the other runs are wanted all the same
        reason = f"{type(error).__name__}: {error}"
        _leave_error(cell, f"{type(error).__name__}\n\n{traceback.format_exc()}")
        return Outcome(cell, "failed", reason)


def _leave_error(cell: Cell, text: str) -> None:
    folder = Path(cell.config.out)
    if folder.is_dir():
        atomic_write_text(folder / "error.txt", text)


def run_cell(run: Run, shared: SharedTraining) -> None:
    """Every stage of one run, with public training taken from `shared` and left there."""
    with run.opened(resume=True):
        if run.test is None:
            raise RunError("there is nothing to compare by: set data.test or data.holdout in `base`")
        shared.labels(run)
        run.query()
        run.select()
        with shared.pretraining(run) as found:
            if found:
                logger.info("pre-training: shared with an earlier run")
            run.pretrain()
        for stage in (run.warmup, run.finetune, run.label, run.sample, run.evaluate, run.report):
            stage()


def read_sets() -> Callable[[DataConfig], dict[str, ImageSet]]:
    """A reader of the sets that a configuration names; what several runs name is read once."""

    @cache
    def read(data: DataConfig, name: str) -> ImageSet:
        return open_source(data, name)

    def of(data: DataConfig) -> dict[str, ImageSet]:
        # A list is no key of a cache.
        hashable = replace(data, public=data.public if isinstance(data.public, str) else tuple(data.public))  # type: ignore[arg-type]
        names = ["public", "private", *(["test"] if data.test else [])]
        return {name: read(hashable, name) for name in names}

    return of


@cache
def _read_here() -> Callable[[DataConfig], dict[str, ImageSet]]:
    """One reader a process."""
    return read_sets()


@contextmanager
def _locked(comparison: Comparison) -> Iterator[None]:
    try:
        comparison.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot create {comparison.out}: {error.strerror}; choose another --out") from error
    with open(comparison.out / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process is working in {comparison.out}; wait for it or choose another --out") from error
        yield
