"""Runs the cells of a comparison, one after the other. What is finished is not run again; what fails is reported."""

from __future__ import annotations

import fcntl
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

from privimage_fast.compare.grid import Cell, Comparison
from privimage_fast.compare.shared import SharedTraining
from privimage_fast.config import DataConfig
from privimage_fast.data import ImageSet
from privimage_fast.data.atomic import atomic_write_text
from privimage_fast.pipeline import Run
from privimage_fast.stages.folder import RunError, RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: `error` is None for a finished one. `state`: done, kept (finished earlier), failed or open."""

    cell: Cell
    state: str
    error: str | None = None


def run_comparison(comparison: Comparison, *, wanted: Callable[[Cell], bool] = lambda cell: True) -> list[Outcome]:
    """Runs every wanted cell that is not finished; goes on with the next where one fails.

    Every run has its own folder, query, noise and ledger. A failed run's traceback is in its folder as error.txt, and the next
    call takes it up again.

    Raises:
        RunError: another process works on the same comparison, or there is nothing to compare against.
    """
    with _locked(comparison):
        read, shared, outcomes = read_sets(), SharedTraining(comparison.out / "shared"), []
        for number, cell in enumerate(comparison.cells, 1):
            if is_finished(cell):
                outcomes.append(Outcome(cell, "kept"))
                continue
            if not wanted(cell):
                outcomes.append(Outcome(cell, "open"))
                continue
            logger.info("run %d of %d: %s", number, len(comparison.cells), cell.name)
            outcomes.append(_attempt(cell, read, shared))
    return outcomes


def states(comparison: Comparison) -> list[Outcome]:
    """What is there, without running anything."""
    return [Outcome(cell, "kept" if is_finished(cell) else "open") for cell in comparison.cells]


def is_finished(cell: Cell) -> bool:
    path = RunFolder(cell.config.out).path / "cell.json"
    try:
        return path.is_file() and json.loads(path.read_text()).get("fingerprint") == cell.stamp
    except (ValueError, AttributeError):
        return False


def _attempt(cell: Cell, read: Callable[[DataConfig], dict[str, ImageSet]], shared: SharedTraining) -> Outcome:
    folder = RunFolder(cell.config.out)
    try:
        run_cell(Run(cell.config, **read(cell.config.data)), shared)
        folder.write_json(folder.path / "cell.json", {"fingerprint": cell.stamp})
        (folder.path / "error.txt").unlink(missing_ok=True)
        return Outcome(cell, "done")
    except Exception as error:  # whatever it is, the other runs are wanted all the same
        reason = f"{type(error).__name__}: {error}"
        logger.error("run %s failed and is left out: %s", cell.name, reason)
        if folder.path.is_dir():
            atomic_write_text(folder.path / "error.txt", traceback.format_exc())
        return Outcome(cell, "failed", reason)


def run_cell(run: Run, shared: SharedTraining) -> None:
    """Every stage of one run, with public training taken from `shared` and left there."""
    with run.opened(resume=True):
        if run.test is None:
            raise RunError("there is nothing to compare by: set data.test or data.holdout in `base`")
        shared.offer_labels(run)
        run.query()
        shared.keep_labels(run)
        run.select()
        if shared.offer_pretrain(run):
            logger.info("pre-training: shared with an earlier run")
        run.pretrain()
        shared.keep_pretrain(run)
        for stage in (run.finetune, run.sample, run.evaluate, run.report):
            stage()
        shared.keep_labels(run)


def read_sets() -> Callable[[DataConfig], dict[str, ImageSet]]:
    """A reader of the sets that a configuration names; what several runs name is read once."""

    @cache
    def read(data: DataConfig, name: str) -> ImageSet:
        return Run.open_source(data, name)

    def of(data: DataConfig) -> dict[str, ImageSet]:
        # A list is no key of a cache.
        hashable = replace(data, public=data.public if isinstance(data.public, str) else tuple(data.public))  # type: ignore[arg-type]
        names = ["public", "private", *(["test"] if data.test else [])]
        return {name: read(hashable, name) for name in names}

    return of


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
