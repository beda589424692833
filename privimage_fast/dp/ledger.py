"""The ledger: what was spent on a data set, one line a charge, written before the data is touched.

A JSON Lines file. The first line is the header (the public promise: target ε, δ, adjacency, unit, N), each further line
one charge. ε is composed from these lines and from nothing else, so a run that crashes, resumes or repeats steps cannot
forget what it spent. Public values only, and no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import operator
import os
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from privimage_fast.dp import accounting
from privimage_fast.dp.accounting import BudgetError, DPSGDEvent, Event

FORMAT, VERSION = "privimage-ledger", 1
MAX_FILE_BYTES = 2**30
_LOOK_AHEAD = 20_000  # steps that one exact check may clear in advance

logger = logging.getLogger(__name__)


class LedgerError(ValueError):
    """The file is not a sound ledger, is in use, or was asked for something it must refuse. Names file and line."""


class OverBudgetError(LedgerError):
    """The charge would pass the target ε. Nothing was written, so the data must not be touched."""


@dataclass(frozen=True)
class Header:
    """What the ledger promises; all public. `target_epsilon` None: spending is recorded but not limited."""

    target_epsilon: float | None
    delta: float
    population: int
    adjacency: str = accounting.ADJACENCY
    unit: str = accounting.UNIT
    seeded: bool = False
    created: str = ""


@dataclass(frozen=True)
class Record:
    """One charge. `time` is when the session that wrote it began, not the charge: see `Ledger.charge`."""

    seq: int
    time: str
    session: str
    stage: str
    event: Event
    seeded: bool
    note: str | None = None


class Ledger:
    """Opens, or creates, the ledger at `path` for charging, alone. Use it as a context manager, or call `close`.

    Args:
        path: the .jsonl file; its folder must exist.
        target_epsilon, delta, population: the promise. A ledger that holds records keeps the one it began with.
        seeded: this session's noise or sampling can be reproduced (tests): every record is marked NOT PRIVATE.

    Raises:
        LedgerError: another process holds it, the file is damaged, or the promise differs from the file's.

    Formal guarantees: when `charge` returns, the record is on the disk, so at any crash the ledger holds at least every
    mechanism whose data was touched. With a target, `epsilon()` of what `charge` accepted never passes it. The digest
    chain finds accidental edits; it cannot find an owner who rewrites the file or cuts off its last lines.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        target_epsilon: float | None,
        delta: float,
        population: int,
        seeded: bool = False,
    ) -> None:
        now = datetime.now(UTC).replace(microsecond=0).isoformat()
        target = None if target_epsilon is None else float(target_epsilon)
        promise = Header(target, float(delta), operator.index(population), seeded=bool(seeded), created=now)
        _check_header(promise)
        self._begin(Path(path), seeded, now)
        try:
            try:
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
                created = True
            except FileExistsError:
                self._fd, created = os.open(self.path, os.O_RDWR | os.O_CLOEXEC), False
            self._lock()
            if created:
                self._write_header(promise)
            else:
                self._load(_read_bytes(self.path))
                if not self._records:  # nothing binds yet, not even the mode of whoever opened it before
                    os.ftruncate(self._fd, 0)
                    self._write_header(promise)
                elif not _same_promise(self.header, promise):
                    raise LedgerError(_promise_text(self.path, self.header, promise))
        except BaseException:
            self.close()
            raise

    @classmethod
    def resume(cls, path: str | os.PathLike[str], *, seeded: bool = False) -> Ledger:
        """Open an existing ledger for charging under the promise it holds. FileNotFoundError if there is none."""
        header = cls.read(path).header
        return cls(
            path,
            target_epsilon=header.target_epsilon,
            delta=header.delta,
            population=header.population,
            seeded=seeded,
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Ledger:
        """Open for reports: no lock, no writing, every check. A half-written last line is left out with a warning."""
        ledger = cls.__new__(cls)
        ledger._begin(Path(path), False, "")
        ledger._load(_read_bytes(ledger.path))
        return ledger

    # ---------------------------------------------------------------------------------------------------- reading

    def records(self) -> list[Record]:
        """All charges in order."""
        return list(self._records)

    def events(self) -> list[Event]:
        """All charged events in order: query, training steps and replays alike."""
        return [record.event for record in self._records]

    def epsilon(self, delta: float | None = None, accountant: str = "pld") -> float:
        """ε of everything charged, at the header's δ unless another is given. Composed from the records only."""
        return accounting.epsilon(self.events(), self.header.delta if delta is None else delta, accountant=accountant)

    def steps_charged(self, stage: str) -> int:
        """Mechanisms charged to `stage`, replays after a crash included."""
        events = [record.event for record in self._records if record.stage == stage]
        return sum(event.steps if isinstance(event, DPSGDEvent) else 1 for event in events)

    @property
    def seeded(self) -> bool:
        """True once anything ran in seeded test mode; reports then say NOT PRIVATE."""
        return self.header.seeded or any(record.seeded for record in self._records)

    # --------------------------------------------------------------------------------------------------- charging

    def charge(self, event: Event, *, stage: str, note: str | None = None) -> Record:
        """Write one record to the disk, then return; only then may the caller touch the data.

        Args:
            event: what is about to be done; its parameters must be the very ones that will run.
            stage: "query", "finetune", … (a word).
            note: public text, 200 characters at most. Never a loss, a norm or a realised batch size.

        Raises:
            OverBudgetError: it would pass the target ε. LedgerError: opened by `read`, closed, or the disk refused.

        The record carries the session's start, not its own time: the time between two steps tells how many
        micro-batches the secret draw needed, and what is not private is not written.
        """
        self._check_writable()
        if not stage or not stage.replace("-", "").replace("_", "").isalnum() or len(stage) > 40:
            raise LedgerError(f"stage is {stage!r}; it must be a word of 40 characters at most")
        if note is not None and (not isinstance(note, str) or len(note) > 200):
            raise LedgerError("note must be text of 200 characters at most")
        allowance = self._allow(event)
        seq, session = len(self._records) + 1, self._session
        record = Record(seq, self._started, session, stage, event, self._session_seeded, note)
        try:
            self._append(_record_values(record))
        except OSError as error:
            self._broken = True  # the line may or may not be there; reopening reads what is
            raise LedgerError(f"{self.path}: the charge could not be written ({error}); do not touch the data") from error
        self._records.append(record)
        self._allowance = allowance
        return record

    def _allow(self, event: Event) -> tuple[tuple[float, float], int] | None:
        """Refuse `event` if it passes the target; else how many steps of its kind stay allowed after it.

        One exact check clears many steps of one σ and q ahead, and each step then counts down: a composition at every
        step would cost more than the step. Any other kind of event in between makes the allowance void.
        """
        target, delta = self.header.target_epsilon, self.header.delta
        if target is None:
            accounting.event_to_dict(event)  # refuses what is no event
            return None
        if isinstance(event, DPSGDEvent):
            kind = (event.noise_multiplier, event.sample_rate)
            left = self._allowance[1] if self._allowance is not None and self._allowance[0] == kind else 0
            if left < event.steps:
                step = DPSGDEvent(*kind)
                left = accounting.affordable_steps(
                    target_epsilon=target,
                    delta=delta,
                    event=step,
                    prior_events=self.events(),
                    at_most=max(_LOOK_AHEAD, event.steps),
                )
            if left >= event.steps:
                return kind, left - event.steps
        elif accounting.epsilon([*self.events(), event], delta) <= target:
            return None
        raise OverBudgetError(
            f"{self.path}: {event} is refused: it would pass target_epsilon {target} at delta {delta}; "
            f"ε = {self.epsilon():.4f} is spent in {len(self._records)} records"
        )

    # ------------------------------------------------------------------------------------------------------- file

    def _begin(self, path: Path, seeded: bool, started: str) -> None:
        self.path, self._fd, self._pid, self._broken = path, -1, os.getpid(), False
        self._session, self._session_seeded, self._started = secrets.token_hex(8), bool(seeded), started
        self._records: list[Record] = []
        self._allowance: tuple[tuple[float, float], int] | None = None
        self._chain = ""  # digest of the last sound line
        self._sound_bytes, self._tail = 0, b""  # end of the last sound line; what is written there before the next

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it when the process dies
        except BlockingIOError:
            raise LedgerError(f"{self.path}: in use by another run; two runs at once could each spend the same budget") from None

    def _check_writable(self) -> None:
        if self._fd < 0:
            raise LedgerError(f"{self.path}: not open for charging (closed, or opened by Ledger.read)")
        if self._pid != os.getpid():  # a forked child shares the lock, and both would write the same seq
            raise LedgerError(f"{self.path}: only the process that opened the ledger may charge")
        if self._broken:
            raise LedgerError(f"{self.path}: an earlier charge failed; open the ledger again")

    def _write_header(self, header: Header) -> None:
        self._chain, self._sound_bytes, self._tail = "", 0, b""
        self._append({"format": FORMAT, "version": VERSION, **vars(header)})
        self.header = header
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # without it the file itself can be gone after a power cut
        finally:
            os.close(folder)

    def _append(self, values: dict[str, Any]) -> None:
        line, digest = _encode(values, self._chain)
        os.ftruncate(self._fd, self._sound_bytes)  # drops a half-written line; nothing else is ever cut
        data = self._tail + line + b"\n"
        view, at = memoryview(data), self._sound_bytes
        while view:
            written = os.pwrite(self._fd, view, at)
            view, at = view[written:], at + written
        os.fsync(self._fd)
        self._chain, self._sound_bytes, self._tail = digest, at, b""

    def _load(self, data: bytes) -> None:
        *lines, last = data.split(b"\n")
        for number, line in enumerate(lines, start=1):
            self._load_line(number, line)
            self._sound_bytes += len(line) + 1
        if last:
            try:
                # Complete but for its newline: kept, since counting a charge too many is safe and losing one is not.
                self._load_line(len(lines) + 1, last)
                self._sound_bytes, self._tail = len(data), b"\n"
            except LedgerError:
                if not lines or _is_json(last):  # damaged, not cut off while it was written
                    raise
                logger.warning(
                    "%s, line %d: left out, it was cut off while being written (its data was never touched)",
                    self.path,
                    len(lines) + 1,
                )
        if self._chain == "":
            raise LedgerError(
                f"{self.path}: empty, not even a header. If the run folder is new, delete the file; if the data was "
                f"used before, restore the ledger from a copy"
            )

    def _load_line(self, number: int, line: bytes) -> None:
        where = f"{self.path}, line {number}"
        try:
            values = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise LedgerError(f"{where}: not JSON ({error}); the ledger is damaged, restore it from a copy") from None
        if not isinstance(values, dict):
            raise LedgerError(f"{where}: {type(values).__name__} found, an object expected")
        digest = values.pop("digest", None)
        expected = _encode(values, self._chain)[1]
        if digest != expected:
            raise LedgerError(f"{where}: does not match its digest: it, or a line before it, was edited or removed")
        try:
            if number == 1:
                self.header = _header_from(values)
            else:
                self._records.append(_record_from(values, expected_seq=number - 1))
        except (BudgetError, LedgerError, TypeError, KeyError) as error:
            raise LedgerError(f"{where}: {error}") from None
        self._chain = expected

    def close(self) -> None:
        """Give the lock back. Charging is refused from here on; reading goes on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# --------------------------------------------------------------------------------------------------------- the lines


def _encode(values: dict[str, Any], chain: str) -> tuple[bytes, str]:
    """The line of `values` with its digest, SHA-256 over the previous line's digest and this line: 32 hex digits."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True, allow_nan=False)
    digest = hashlib.sha256(f"{chain}\n{text}".encode()).hexdigest()[:32]
    return json.dumps({**values, "digest": digest}, ensure_ascii=True, allow_nan=False).encode(), digest


def _record_values(record: Record) -> dict[str, Any]:
    values = {**vars(record), "event": accounting.event_to_dict(record.event)}
    return {name: value for name, value in values.items() if name != "note" or value is not None}


def _record_from(values: dict[str, Any], *, expected_seq: int) -> Record:
    record = Record(**{**values, "event": accounting.event_from_dict(values["event"])})
    if type(record.seq) is not int or record.seq != expected_seq:
        raise LedgerError(f"seq is {record.seq!r}, {expected_seq} expected: a record is missing or doubled")
    texts = (record.time, record.session, record.stage, record.note or "")
    if not all(isinstance(text, str) for text in texts) or type(record.seeded) is not bool:
        raise LedgerError(f"a field has a wrong type: {values}")
    return record


def _header_from(values: dict[str, Any]) -> Header:
    found = (values.pop("format", None), values.pop("version", None))
    if found != (FORMAT, VERSION):
        raise LedgerError(f"format and version are {found}; {(FORMAT, VERSION)} expected")
    header = Header(**values)
    _check_header(header)
    return header


def _check_header(header: Header) -> None:
    target, population = header.target_epsilon, header.population
    accounting.epsilon([], header.delta)  # refuses a bad delta
    if target is not None and (type(target) not in (int, float) or not 0 < target <= accounting.MAX_EPSILON):
        raise BudgetError(f"target_epsilon is {target!r}; it must be in (0, {accounting.MAX_EPSILON:g}], or None")
    if type(population) is not int or population < 1:
        raise BudgetError(f"population is {population!r}; it must be an integer of 1 or more, stated as a public value")
    if (header.adjacency, header.unit) != (accounting.ADJACENCY, accounting.UNIT):
        raise LedgerError(
            f"adjacency {header.adjacency!r} and unit {header.unit!r} are not what this package accounts for: "
            f"{accounting.ADJACENCY!r}, {accounting.UNIT!r}"
        )
    if type(header.seeded) is not bool or not isinstance(header.created, str):
        raise LedgerError("seeded must be true or false and created a text")


def _same_promise(old: Header, new: Header) -> bool:
    return (old.target_epsilon, old.delta, old.population) == (new.target_epsilon, new.delta, new.population)


def _promise_text(path: Path, old: Header, new: Header) -> str:
    return (
        f"{path}: it was begun with target_epsilon {old.target_epsilon}, delta {old.delta}, population "
        f"{old.population}, and holds records; asked for {new.target_epsilon}, {new.delta}, {new.population}. What was "
        f"spent under one promise cannot be moved to another: keep the old values or use a new folder and new data"
    )


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
        return True
    except (ValueError, RecursionError):
        return False


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _read_bytes(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise LedgerError(f"{path}: {size} bytes; a ledger has at most {MAX_FILE_BYTES}")
    return path.read_bytes()
