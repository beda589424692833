"""What the data layer says when an input is bad, and how it goes on without it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class DataError(ValueError):
    """Bad image data. The message names the thing, what was found, what was expected and what to do."""


class SkippedFile(NamedTuple):
    """One input that `skip_bad=True` left out: its path (or `file.npz[17]` for a row of an array) and why."""

    path: str
    reason: str


@dataclass
class Faults:
    """Decides for a loader what a bad file means: the end (`skip_bad=False`) or an entry in `skipped`.

    Only faults of single files or rows come here. A fault that makes the whole source meaningless is raised as
    `DataError` where it is found, whatever `skip_bad` says.
    """

    skip_bad: bool
    skipped: list[SkippedFile] = field(default_factory=list)

    def report(self, path: str, reason: str) -> None:
        if not self.skip_bad:
            raise DataError(f"{path}: {reason}. Mend or remove it, or leave such files out: --skip-bad, skip_bad=True")
        self.skipped.append(SkippedFile(path, reason))
