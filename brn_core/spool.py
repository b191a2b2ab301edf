"""Batches that could not be sent, as files: they outlive the service's absence and the training process.

Layout, one folder a run and rank, complete in itself so that any process can send it later:

    DIR/<run>/rank-<rank>/run.json                      the run's registration (wire.RunCreate)
                          url                           the service it was meant for
                          lock                          held by the process that writes here, while it lives
                          <seq>-<steps>.arrow           one batch, the body as it would have been sent
                          end.json                      the run's last update (wire.RunUpdate), if it was not delivered
                          refused/<seq>-<steps>.arrow   the first batches that the service refused, for inspection

A file appears whole or not at all (written beside, synced to the disk, then renamed). Sending one twice is harmless:
the service takes each (run, rank, seq) once, so several processes may send from one folder (`drain`).
`python -m brn_core.spool DIR --url URL` and `brn-train --sync DIR` send what a folder holds.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit, urlunsplit

import pyarrow.compute as pc
from pydantic import BaseModel, ValidationError

from brn_core.atomic import replacing
from brn_core.wire import RUN_ID_PATTERN, RunCreate, RunUpdate, WireError, decode_batch, encode_batch, with_drops

if sys.platform != "win32":
    import fcntl

DEFAULT_LIMIT_BYTES: Final = 256 * 1024 * 1024
"""Most bytes of batches that wait, for each run and rank."""

REFUSED_LIMIT_BYTES: Final = 16 * 1024 * 1024
"""Most bytes of refused batches that are kept, for each run and rank: the first ones say what went wrong."""

RESERVE_BYTES: Final = 1024**3
"""Room on the disk that is left to checkpoints: nothing is spooled into the last GiB, nor the last fiftieth if less."""

_SLACK: Final = 16
"""A spool at its limit frees a sixteenth of it at once, so that it need not look through its files for every batch."""

_RANK: Final = re.compile(r"^rank-(\d{1,9})$")
_PARCEL: Final = re.compile(r"^(\d{20})-(\d{1,9})\.arrow$")
_Record = TypeVar("_Record", bound=BaseModel)


@dataclass(frozen=True, slots=True, order=True)
class Parcel:
    """One spooled batch. Parcels of one folder sort by age."""

    seq: int
    steps: int
    path: Path

    def body(self) -> bytes | None:
        """The bytes to send, or None where another process has taken the file meanwhile."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None

    def remove(self) -> bool:
        """Remove the file; False where another process has done so."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        return True


class SpoolFolder:
    """The spooled batches of one run and rank.

    Args:
        path: the folder; made when the first batch is put.
        run: run id.
        rank: global rank.
        limit_bytes: most bytes of batches kept; beyond it the oldest go first.
    """

    def __init__(self, path: Path, run: str, rank: int, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        self.path = path
        self.run = run
        self.rank = rank
        self._limit_bytes = limit_bytes
        # Bytes of batches at most: others may have sent some. None: not looked yet.
        self._used_bytes: int | None = None
        self.url: str | None = None  # of the service that the batches are meant for, where this process knows
        self._described = False
        self._lock: int | None = None  # a file descriptor
        self._postponed: set[int] = set()

    def put(self, registration: RunCreate, seq: int, steps: int, body: bytes) -> int:
        """Keep one batch.

        Args:
            registration: what to register the run with when the batch is sent, perhaps by another process.
            seq: sequence number of the batch.
            steps: recorded steps in it.
            body: the encoded batch.

        Returns:
            The number of recorded steps that were dropped to stay within the limit (this batch's own included).

        Raises:
            OSError: the folder cannot be written, or the disk is nearly full.
        """
        if len(body) > self._limit_bytes:
            return steps
        self._describe(registration)
        _leave_reserve(self.path, len(body))
        dropped = self._make_room(len(body))
        target = self.path / f"{seq:020d}-{steps}.arrow"
        try:
            _write(target, body)
        except FileNotFoundError:  # another process has sent everything, and tidied the folder away just now
            self._describe(registration)
            _write(target, body)
        self._used_bytes = (self._used_bytes or 0) + len(body)
        return dropped

    def put_end(self, registration: RunCreate, update: RunUpdate) -> None:
        """Keep the run's last update, to be sent after its batches, with what earlier processes have dropped.

        Raises:
            OSError: the folder cannot be written.
        """
        self._describe(registration)
        if (earlier := self.end()) is not None and earlier.dropped_by_process:
            together = with_drops(earlier.dropped_by_process, update.dropped_by_process or {})
            update = update.model_copy(update={"dropped_by_process": together})
        _write(self.path / "end.json", update.model_dump_json(exclude_unset=True).encode())

    def put_aside(self, registration: RunCreate, seq: int, steps: int, body: bytes) -> None:
        """Keep a batch that the service refused, for inspection, as long as there is room for refused ones.

        Raises:
            OSError: the folder cannot be written, or the disk is nearly full.
        """
        self._describe(registration)
        _leave_reserve(self.path, len(body))
        if self._room_for_refused(len(body)):
            _write(self.path / "refused" / f"{seq:020d}-{steps}.arrow", body)

    def set_aside(self, parcel: Parcel) -> None:
        """Move a batch to `refused/`, where it waits for nobody; without room there it is removed.

        Raises:
            OSError: the folder cannot be written.
        """
        if self._room_for_refused(_size(parcel.path)):
            with contextlib.suppress(FileNotFoundError):  # another process has done so
                parcel.path.replace(self.path / "refused" / parcel.path.name)
        else:
            parcel.remove()

    def part(self, parcel: Parcel, body: bytes) -> list[Parcel]:
        """Put two halves of a batch in its place; none where it is of one step or unreadable.

        The halves of seq have the numbers 2 seq and 2 seq + 1: no batch has them (numbers are microseconds since 1970,
        which double in 2082), and whoever parts the same batch again, after a kill in between, uses the same.

        Raises:
            OSError: the folder cannot be written.
        """
        try:
            tables = decode_batch(body)
        except WireError:
            return []
        steps = sorted({step for table in tables.values() for step in table["step"].to_pylist()})
        if len(steps) < 2 or parcel.seq >= 2**63:
            return []
        middle, halves = steps[len(steps) // 2], []
        for half, count in enumerate((len(steps) // 2, len(steps) - len(steps) // 2)):
            wanted = {
                name: table.filter(pc.greater_equal(table["step"], middle) if half else pc.less(table["step"], middle))
                for name, table in tables.items()
            }
            seq = 2 * parcel.seq + half
            path = self.path / f"{seq:020d}-{count}.arrow"
            _write(path, encode_batch({name: table for name, table in wanted.items() if table.num_rows}))
            halves.append(Parcel(seq, count, path))
        parcel.remove()
        return halves

    def parcels(self) -> list[Parcel]:
        """What waits to be sent, oldest first (see `postpone`).

        Raises:
            OSError: the folder is there but cannot be read.
        """
        return sorted(_parcels_in(self.path), key=lambda parcel: (parcel.seq in self._postponed, parcel))

    def postpone(self, parcel: Parcel) -> None:
        """Let this process send the others first: one batch that the service fails on holds up no other."""
        self._postponed.add(parcel.seq)

    def registration(self) -> RunCreate | None:
        """The run's registration, or None where it is missing or unreadable."""
        return _read(self.path / "run.json", RunCreate)

    def meant_for(self) -> str | None:
        """The service that the batches were to be sent to; None where it is not known."""
        try:
            return (self.path / "url").read_text()
        except OSError:
            return None

    def in_use(self) -> bool:
        """Whether a process that lives writes here: it sends its batches itself, and counts what is refused of them."""
        if sys.platform == "win32":
            return False
        try:
            lock = os.open(self.path / "lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        except OSError:  # another user's
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(lock)
        return False

    def release(self) -> None:
        """Write here no longer: from now on other processes may send what waits."""
        if self._lock is None:
            return
        if sys.platform != "win32":
            with contextlib.suppress(OSError):  # said, not only closed: a process forked meanwhile has it open too
                fcntl.flock(self._lock, fcntl.LOCK_UN)
        os.close(self._lock)
        self._lock = None

    def end(self) -> RunUpdate | None:
        """The run's undelivered last update, if there is one."""
        return _read(self.path / "end.json", RunUpdate)

    def reopen(self, registration: RunCreate) -> None:
        """Of an earlier process's undelivered end keep only what was dropped: the run goes on.

        Raises:
            OSError: the folder cannot be written.
        """
        end = self.end()
        if end is not None and end.dropped_by_process:
            self.put_end(registration, RunUpdate())
        else:
            self.remove_end()

    def remove_end(self) -> None:
        (self.path / "end.json").unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the folder when nothing in it waits or was refused, with what a killed writer left half-written."""
        try:
            entries = list(self.path.iterdir())
        except OSError:
            return
        partial = [entry for entry in entries if entry.name.endswith(".partial")]
        described_by = [entry for entry in entries if entry.name in ("run.json", "url", "lock")]
        if len(entries) - len(partial) > len(described_by) or not (
            described := _read(self.path / "run.json", RunCreate)
        ):
            return
        url = self.meant_for()
        for entry in [*partial, *described_by]:
            entry.unlink(missing_ok=True)
        try:
            self.path.rmdir()
        except OSError:  # a batch was put meanwhile, by a process that still saw run.json
            _write(self.path / "run.json", described.model_dump_json().encode())
            if url is not None:
                _write(self.path / "url", url.encode())
            return
        with contextlib.suppress(OSError):  # another rank's folder
            self.path.parent.rmdir()

    def _describe(self, registration: RunCreate) -> None:
        """Have run.json say what this process knows of the run, not what an earlier one did."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self._described or not (self.path / "run.json").exists():
            self._claim()
            _write(self.path / "run.json", registration.model_dump_json().encode())
            if self.url is not None:
                _write(self.path / "url", without_login(self.url).encode())
            self._described = True

    def _claim(self) -> None:
        """Hold the folder's lock; the kernel lets go of it when the process ends, however it ends."""
        if sys.platform == "win32":
            return
        self.release()
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(self._lock, fcntl.LOCK_SH)  # shared: waits only for the instant that `in_use` takes

    def _make_room(self, needed: int) -> int:
        if self._used_bytes is not None and self._used_bytes + needed <= self._limit_bytes:
            return 0
        sizes = [(parcel, _size(parcel.path)) for parcel in sorted(_parcels_in(self.path))]
        self._used_bytes = sum(size for _, size in sizes)
        if self._used_bytes + needed <= self._limit_bytes:
            return 0
        dropped = 0
        for parcel, size in sizes:
            if self._used_bytes + needed <= self._limit_bytes - self._limit_bytes // _SLACK:
                break
            self._used_bytes -= size
            if parcel.remove():
                dropped += parcel.steps
        return dropped

    def _room_for_refused(self, needed: int) -> bool:
        refused = self.path / "refused"
        refused.mkdir(parents=True, exist_ok=True)
        return sum(_size(parcel.path) for parcel in _parcels_in(refused)) + needed <= REFUSED_LIMIT_BYTES


class Spool:
    """A directory of spooled batches, of any number of runs and ranks.

    Args:
        directory: where the files lie; made when first needed. It stays where it is when the working directory changes.
        limit_bytes: most bytes of batches kept for each run and rank.
    """

    def __init__(self, directory: str | Path, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        if limit_bytes < 1:
            raise ValueError(f"limit_bytes must be >= 1, got {limit_bytes}")
        self.directory = Path(directory).expanduser().absolute()
        self._limit_bytes = limit_bytes

    def folder(self, run: str, rank: int) -> SpoolFolder:
        """The folder of one run and rank; nothing is made yet."""
        return SpoolFolder(self.directory / run / f"rank-{rank}", run, rank, limit_bytes=self._limit_bytes)

    def folders(self) -> list[SpoolFolder]:
        """Every folder that holds batches or an undelivered end, the longest untouched first.

        Raises:
            OSError: the directory is there but cannot be read.
        """
        found: list[tuple[float, SpoolFolder]] = []
        if not self.directory.exists():
            return []
        for run in self.directory.iterdir():
            if not re.match(RUN_ID_PATTERN, run.name) or not run.is_dir():
                continue
            for entry in run.iterdir():
                if match := _RANK.match(entry.name):
                    folder = self.folder(run.name, int(match[1]))
                    if folder.parcels() or folder.end() is not None:
                        found.append((_modified(entry), folder))
        return [folder for _, folder in sorted(found, key=lambda pair: pair[0])]


def without_login(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _parcels_in(folder: Path) -> list[Parcel]:
    try:
        entries = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = ((entry, _PARCEL.match(entry.name)) for entry in entries)
    return [Parcel(int(match[1]), int(match[2]), entry) for entry, match in matches if match]


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as file:
        file.write(content)


def _leave_reserve(folder: Path, needed: int) -> None:
    disk = shutil.disk_usage(folder)
    reserve = min(RESERVE_BYTES, disk.total // 50)
    if disk.total and disk.free - needed < reserve:
        text = f"the disk of {folder} is nearly full: {disk.free} bytes free, {reserve} of them are left to others"
        raise OSError(errno.ENOSPC, text)


def _read(path: Path, record: type[_Record]) -> _Record | None:
    try:
        return record.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `python -m brn_core.spool`; returns the process's exit code."""
    from brn_core.drain import sync

    parser = argparse.ArgumentParser(
        prog="python -m brn_core.spool", description="Send the batches that a training process left in its spool."
    )
    parser.add_argument("directory", type=Path, help="the spool directory, for example .brn/spool")
    parser.add_argument("--url", required=True, help="the service, for example http://127.0.0.1:8321")
    parser.add_argument("--token", help="bearer token of the service (default: the environment's BRN_TOKEN)")
    options = parser.parse_args(arguments)
    return sync(options.directory, options.url, options.token or os.environ.get("BRN_TOKEN"))


if __name__ == "__main__":
    sys.exit(main())
