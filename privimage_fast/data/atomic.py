"""Writing so that a reader sees the old file or the new one, never half of either."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary file name beside `path`; on a clean exit it becomes `path`, on any exception it is gone.

    The temporary name keeps the suffix of `path` (libraries choose a format by it). The folder of `path` is made
    if need be. File and folder are synced, so the result survives a power cut. An existing `path` is replaced, and
    left as it was if the block raises (KeyboardInterrupt included). `FileNotFoundError` if the block wrote nothing.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile.mkstemp: its files are readable by the owner only, whatever the umask says.
    temporary = temporary_beside(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync(path.parent)


def atomic_write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes `data` to `path` as a whole (see `atomic_path`)."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | os.PathLike, text: str) -> None:
    """Writes `text` as UTF-8, line ends as they are, to `path` as a whole (see `atomic_path`)."""
    atomic_write_bytes(path, text.encode("utf-8"))


def temporary_beside(path: Path) -> Path:
    """A fresh hidden name in the folder of `path`: the same file system, so that renaming is atomic."""
    return path.with_name(f".{path.stem[:100]}.{secrets.token_hex(6)}.tmp{path.suffix}")


def _sync(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except (PermissionError, IsADirectoryError):
        if path.is_dir():  # Windows opens no folders; its renames need no such sync
            return
        raise
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some network file systems sync files but not folders
            raise
    finally:
        os.close(handle)
