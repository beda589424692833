"""What runs of a comparison share: checkpoints of *public* training, linked into a run before it would make its own.

Nothing here decides whether a checkpoint fits: a stage compares the fingerprint that it finds with its own, as on resuming,
and trains again if they differ. So a wrong offer costs time and never a wrong result. Nothing of the sensitive images is
shared: every run asks its own query, under its own ledger.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from privimage_fast.pipeline import Run
from privimage_fast.stages.clusters import clusters_key
from privimage_fast.stages.folder import fingerprint
from privimage_fast.stages.select import selected_subset

logger = logging.getLogger(__name__)

_RECORD = "stage.json"


class SharedTraining:
    """A folder of checkpoints by fingerprint. Each entry appears whole, by a rename; several processes may work with it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def labels(self, run: Run) -> None:
        """The classifier of public labels and the clusters: taken from here, or made and kept. Reads no sensitive image."""
        if run.config.query.clusters is not None and run.config.select.mode == "semantic":
            with self._made_once(run, self._labels_key(run, "clusters"), "clusters"):
                run.asked  # noqa: B018 - found, and left in the folder
        with self._made_once(run, self._labels_key(run, "classifier"), "classifier"):
            run.feature_network()

    @contextmanager
    def pretraining(self, run: Run) -> Iterator[bool]:
        """The same for the pre-trained network; whether it was there."""
        with self._made_once(run, self._pretrain_key(run), "pretrain", stage="pretrain") as found:
            yield found

    @contextmanager
    def _made_once(self, run: Run, key: str, checkpoint: str, *, stage: str | None = None) -> Iterator[bool]:
        """Who comes while another process is at it waits, and finds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        entry, path = self.path / key, run.folder.checkpoint(checkpoint)
        with open(self.path / f".{key}.lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                logger.info("waiting for another run that makes the same %s", checkpoint)
                fcntl.flock(handle, fcntl.LOCK_EX)
            found = self._offer(run, entry, path, stage)
            if found or entry.is_dir():
                fcntl.flock(handle, fcntl.LOCK_UN)  # nothing is left to make
            yield found
            self._keep(run, entry, path, stage)

    # ---- keys: of everything that the result depends on, so that offers fit

    def _public_key(self, run: Run) -> tuple[object, ...]:
        data, seed = run.config.data, run.config.public_seed
        return data.public, data.resolution, data.channels, data.format, run.config.seed if seed is None else seed

    def _labels_key(self, run: Run, name: str) -> str:
        query = run.config.query
        asked = clusters_key(query) if name == "clusters" else query.classifier
        return f"{name}-" + fingerprint(asked, self._public_key(run))

    def _pretrain_key(self, run: Run) -> str:
        selection = run.folder.read_json(run.folder.selection, "select")
        indices, labels = selected_subset(selection, run.asked, run.private.label_names)
        subset = (indices.tobytes(), labels.tobytes())
        return "pretrain-" + fingerprint(run.config.pretrain, run.config.model, self._public_key(run), subset)

    # ---- files

    def _offer(self, run: Run, entry: Path, path: Path, stage: str | None) -> bool:
        if path.exists() or not (entry / path.name).exists():
            return False
        link(entry / path.name, path)
        if stage is not None:
            run.folder.record(stage, json.loads((entry / _RECORD).read_text())["fingerprint"], 0.0)
        return True

    def _keep(self, run: Run, entry: Path, path: Path, stage: str | None) -> None:
        if entry.exists() or not path.exists():
            return
        temporary = entry.with_name(f".{entry.name}.{secrets.token_hex(4)}")
        temporary.mkdir()
        try:
            link(path, temporary / path.name)
            if stage is not None:
                records = json.loads(run.folder.stages.read_text())
                (temporary / _RECORD).write_text(json.dumps({"fingerprint": records[stage]["fingerprint"]}))
            temporary.rename(entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """A hard link, which costs no space (checkpoints are replaced, never written into), or a copy where there are none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
