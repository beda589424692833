"""What runs of a comparison share: checkpoints of *public* training, linked into a run before it would make its own.

Nothing here decides whether a checkpoint fits: a stage compares the fingerprint that it finds with its own, as on resuming,
and trains again if they differ. So a wrong offer costs time and never a wrong result. Nothing of the sensitive images is
shared: every run asks its own query, under its own ledger.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path

from privimage_fast.pipeline import Run
from privimage_fast.stages.clusters import clusters_key
from privimage_fast.stages.folder import fingerprint
from privimage_fast.stages.select import selected_subset

_RECORD = "stage.json"


class SharedTraining:
    """A folder of checkpoints by fingerprint. Each entry appears whole, by a rename."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def offer_labels(self, run: Run) -> None:
        """The classifier of the public labels, and their clusters."""
        for name in ("classifier", "clusters"):
            self._offer(run, self._labels_key(run, name))

    def keep_labels(self, run: Run) -> None:
        for name in ("classifier", "clusters"):
            self._keep(run, self._labels_key(run, name), [run.folder.checkpoint(name)], None)

    def offer_pretrain(self, run: Run) -> bool:
        return self._offer(run, self._pretrain_key(run), "pretrain")

    def keep_pretrain(self, run: Run) -> None:
        self._keep(run, self._pretrain_key(run), [run.folder.checkpoint("pretrain")], "pretrain")

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

    def _offer(self, run: Run, key: str, stage: str | None = None) -> bool:
        entry = self.path / key
        if not entry.is_dir():
            return False
        checkpoints = [path for path in entry.iterdir() if path.name != _RECORD]
        if any((run.folder.path / "checkpoints" / path.name).exists() for path in checkpoints):
            return False
        for path in checkpoints:
            link(path, run.folder.path / "checkpoints" / path.name)
        if stage is not None:
            run.folder.record(stage, json.loads((entry / _RECORD).read_text())["fingerprint"], 0.0)
        return True

    def _keep(self, run: Run, key: str, paths: list[Path], stage: str | None) -> None:
        entry = self.path / key
        if entry.exists() or not all(path.exists() for path in paths):
            return
        temporary = self.path / f".{key}.{secrets.token_hex(4)}"
        temporary.mkdir(parents=True)
        try:
            for path in paths:
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
