"""A folder and a zip file, seen alike: names of files, and their bytes, each checked against `Limits` first."""

from __future__ import annotations

import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import Protocol

from privimage_fast.data.errors import DataError
from privimage_fast.data.limits import Limits

_JUNK = frozenset(("thumbs.db", "desktop.ini", "__macosx"))
_MAX_DEPTH = 8
_DEFLATE_CEILING = 1040  # deflate cannot shrink by more than about 1,032; a header that claims more lies
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, EOFError, ValueError,
               struct.error)  # fmt: skip


class Tree(Protocol):
    """Files by relative POSIX name. `folders`: top-level folders, empty ones included. `unsafe`: refused names."""

    path: str
    names: list[str]
    folders: list[str]
    unsafe: list[tuple[str, str]]

    def read(self, name: str) -> bytes:
        """The bytes of one file; `DataError` with the reason only."""

    def close(self) -> None: ...


class FolderTree:
    """A folder. Symbolic links are followed (data sets are often linked together); hidden and system files are
    left out; anything that is not a regular file (a pipe would block for ever) is refused."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self._root, self._limits = str(path), path, limits
        self.names: list[str] = []
        self.folders: list[str] = []
        self.unsafe: list[tuple[str, str]] = []
        try:
            self._walk(path, "", 0)
        except OSError as error:
            raise DataError(f"{error.filename or path}: cannot be listed ({error.strerror})") from error
        self.names.sort()
        self.folders.sort()

    def _walk(self, folder: Path, prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise DataError(f"{folder}: folders are nested more than {_MAX_DEPTH} deep (does a link point upwards?)")
        with os.scandir(folder) as entries:
            for entry in entries:
                name = prefix + entry.name
                if _is_junk(entry.name):
                    continue
                if entry.is_dir():
                    if depth == 0:
                        self.folders.append(entry.name)
                    self._walk(Path(entry.path), name + "/", depth + 1)
                    continue
                self.names.append(name)
                if len(self.names) > self._limits.max_images + 1000:
                    limit = f"{self._limits.max_images:,}"
                    raise DataError(f"{self.path}: more than {limit} files; raise Limits.max_images")

    def read(self, name: str) -> bytes:
        try:
            path = self._root / name
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise DataError("not a regular file")
            if status.st_size > self._limits.max_file_bytes:
                raise DataError(_too_large(status.st_size, self._limits))
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})") from error

    def close(self) -> None:
        pass


class ZipTree:
    """A zip archive. Nothing is ever extracted to disk; sizes, ratios and names are checked on its directory."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path, self._limits = str(path), limits
        self._zip = open_zip(path, limits)
        self._members: dict[str, zipfile.ZipInfo] = {}
        self.unsafe: list[tuple[str, str]] = []
        folders: set[str] = set()
        for info in self._zip.infolist():
            name = info.filename
            if any(_is_junk(part) for part in name.rstrip("/").split("/")[:1] + name.rstrip("/").split("/")[-1:]):
                continue
            if not is_safe_name(name.rstrip("/")):
                self.unsafe.append((name, "its name leads out of the archive or is malformed"))
                continue
            if "/" in name:
                folders.add(name.split("/")[0])
            if info.is_dir():
                continue
            if name in self._members:
                self.unsafe.append((name, "the archive holds two files of this name; the second one is meant here"))
                continue
            self._members[name] = info
        self.names, self.folders = sorted(self._members), sorted(folders)
        total = sum(info.file_size for info in self._members.values())
        if total > limits.max_total_bytes:
            self.close()
            raise DataError(
                f"{path}: its files take {total:,} bytes uncompressed, limit {limits.max_total_bytes:,}; "
                "raise Limits.max_total_bytes if that is meant"
            )

    def read(self, name: str) -> bytes:
        info = self._members.get(name)
        if info is None:
            raise DataError("not in the archive")
        if info.file_size > self._limits.max_file_bytes:
            raise DataError(_too_large(info.file_size, self._limits))
        if info.file_size > 2**20 and info.file_size > self._limits.max_zip_ratio * max(1, info.compress_size):
            raise DataError(
                f"{info.compress_size:,} bytes would unpack to {info.file_size:,}, more than "
                f"{self._limits.max_zip_ratio} times (Limits.max_zip_ratio)"
            )
        return read_member(self._zip, info)

    def close(self) -> None:
        self._zip.close()


def open_zip(path: Path, limits: Limits) -> zipfile.ZipFile:
    """Opens a zip whose size and directory are within `limits`; `DataError` naming `path` otherwise."""
    try:
        size = path.stat().st_size
        if size > limits.max_total_bytes:
            raise DataError(f"{path}: {size:,} bytes, limit {limits.max_total_bytes:,}; if meant, raise Limits.max_total_bytes")
        _check_directory(path, size, limits)
        return zipfile.ZipFile(path)
    except DataError:
        raise
    except (*_ZIP_ERRORS, UnicodeError) as error:
        raise DataError(f"{path}: not a readable zip archive, damaged or truncated ({error})") from error


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """All bytes of a member, as many as its header declares; `DataError` with the reason only."""
    check_member(info)
    try:
        data = archive.read(info)
    except _ZIP_ERRORS as error:
        raise DataError(f"cannot be unpacked, the archive is damaged ({error})") from error
    if len(data) != info.file_size:
        raise DataError(f"unpacks to {len(data):,} bytes, its header declares {info.file_size:,}")
    return data


def check_member(info: zipfile.ZipInfo) -> None:
    """Refuses a member that is encrypted, compressed in an unusual way, or whose sizes contradict each other."""
    if info.flag_bits & 1:
        raise DataError("encrypted; write the archive without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"compressed by method {info.compress_type}; expected stored or deflate")
    stored = info.compress_type == zipfile.ZIP_STORED
    most = info.compress_size if stored else _DEFLATE_CEILING * (info.compress_size + 1)
    if info.file_size > most or (stored and info.file_size < most):
        raise DataError(
            f"its header declares {info.file_size:,} bytes from {info.compress_size:,} compressed ones, which is impossible"
        )


def is_safe_name(name: str) -> bool:
    """Whether a name from a file stays inside its container: relative, no '..', no backslash, no NUL."""
    parts = name.split("/")
    drive = len(parts[0]) == 2 and parts[0][1] == ":"
    return not (drive or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts))


def suffix(name: str) -> str:
    """Lower-case suffix of a POSIX name, with its dot."""
    return PurePosixPath(name).suffix.lower()


def _check_directory(path: Path, size: int, limits: Limits) -> None:
    """Bounds the archive's directory before zipfile reads all of it into memory, several times its size."""
    with path.open("rb") as file:
        file.seek(max(0, size - 65_536 - 128))  # the longest comment, and the end records with room to spare
        tail = file.read()
    end, end64 = tail.rfind(b"PK\x05\x06"), tail.rfind(b"PK\x06\x06")
    directory = struct.unpack_from("<I", tail, end + 12)[0] if end >= 0 else 0
    if directory == 0xFFFFFFFF and end64 >= 0:
        directory = struct.unpack_from("<Q", tail, end64 + 40)[0]
    if directory > 256 * (limits.max_images + 1000):
        raise DataError(
            f"{path}: its directory alone takes {directory:,} bytes, too many for {limits.max_images:,} images; "
            "raise Limits.max_images if that is meant"
        )


def _too_large(size: int, limits: Limits) -> str:
    return f"{size:,} bytes, limit for one file {limits.max_file_bytes:,} (Limits.max_file_bytes)"


def _is_junk(name: str) -> bool:
    return (name.startswith(".") and name not in (".", "..")) or name.lower() in _JUNK
