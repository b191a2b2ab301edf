"""Batches that could not be sent, as files: they outlive the service's absence and the training process.

Layout, one folder a run and rank, complete in itself so that any process can send it later:

    DIR/<run>/rank-<rank>/run.json                      the run's registration (wire.RunCreate)
                          <seq>-<steps>.arrow           one batch, the body as it would have been sent
                          end.json                      the run's last update (wire.RunUpdate), if it was not delivered
                          refused/<seq>-<steps>.arrow   batches the service refused, kept for inspection

A file appears whole or not at all (written beside, then renamed). Sending one twice is harmless: the service takes each
(run, rank, seq) once. `python -m brn_core.spool DIR --url URL` sends what a folder holds.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from brn_core.wire import RUN_ID_PATTERN, RunCreate, RunUpdate

DEFAULT_LIMIT_BYTES: Final = 256 * 1024 * 1024

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

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Move it to the folder's `refused/`: it is not sent again and does not count to the limit."""
        target = self.path.parent / "refused" / self.path.name
        target.parent.mkdir(exist_ok=True)
        self.path.replace(target)


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
            OSError: the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "run.json").exists():
            _write(self.path / "run.json", registration.model_dump_json().encode())
        dropped = self._make_room(len(body))
        if len(body) > self._limit_bytes:
            return dropped + steps
        _write(self.path / f"{seq:020d}-{steps}.arrow", body)
        return dropped

    def put_end(self, registration: RunCreate, update: RunUpdate) -> None:
        """Keep the run's last update, to be sent after its batches.

        Raises:
            OSError: the folder cannot be written.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        _write(self.path / "run.json", registration.model_dump_json().encode())
        _write(self.path / "end.json", update.model_dump_json(exclude_unset=True).encode())

    def put_aside(self, registration: RunCreate, seq: int, steps: int, body: bytes) -> None:
        """Keep a batch that the service refused, for inspection.

        Raises:
            OSError: the folder cannot be written.
        """
        (self.path / "refused").mkdir(parents=True, exist_ok=True)
        _write(self.path / "run.json", registration.model_dump_json().encode())
        _write(self.path / "refused" / f"{seq:020d}-{steps}.arrow", body)

    def parcels(self) -> list[Parcel]:
        """What waits to be sent, oldest first."""
        return sorted(self._parcels_in(self.path))

    def registration(self) -> RunCreate | None:
        """The run's registration, or None where it is missing or unreadable."""
        return _read(self.path / "run.json", RunCreate)

    def end(self) -> RunUpdate | None:
        """The run's undelivered last update, if there is one."""
        return _read(self.path / "end.json", RunUpdate)

    def remove_end(self) -> None:
        (self.path / "end.json").unlink(missing_ok=True)

    def tidy(self) -> None:
        """Remove the folder when nothing in it waits or was refused."""
        try:
            left = {entry.name for entry in self.path.iterdir()}
        except OSError:
            return
        if left - {"run.json"}:
            return
        (self.path / "run.json").unlink(missing_ok=True)
        for folder in (self.path, self.path.parent):
            try:
                folder.rmdir()
            except OSError:  # another rank's folder, or a batch put meanwhile
                return

    def _make_room(self, needed: int) -> int:
        sizes = [(parcel, _size(parcel.path)) for parcel in self.parcels()]
        used = sum(size for _, size in sizes)
        dropped = 0
        for parcel, size in sizes:
            if used + needed <= self._limit_bytes:
                break
            parcel.remove()
            used -= size
            dropped += parcel.steps
        return dropped

    @staticmethod
    def _parcels_in(folder: Path) -> Iterator[Parcel]:
        try:
            entries = list(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return
        for entry in entries:
            if match := _PARCEL.match(entry.name):
                yield Parcel(int(match[1]), int(match[2]), entry)


class Spool:
    """A directory of spooled batches, of any number of runs and ranks.

    Args:
        directory: where the files lie; made when first needed.
        limit_bytes: most bytes of batches kept for each run and rank.
    """

    def __init__(self, directory: str | Path, *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> None:
        if limit_bytes < 1:
            raise ValueError(f"limit_bytes must be >= 1, got {limit_bytes}")
        self.directory = Path(directory)
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


def _write(path: Path, content: bytes) -> None:
    # the writer's process id keeps two writers of one name apart; no fsync: a file cut by a power failure is refused
    # by the service's checks and set aside
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


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
    """Send what a spool directory holds; print one line a run and rank. Returns the process's exit code."""
    from brn_core.shipper import Client, drain

    parser = argparse.ArgumentParser(
        prog="python -m brn_core.spool", description="Send the batches that a training process left in its spool."
    )
    parser.add_argument("directory", type=Path, help="the spool directory, for example .brn/spool")
    parser.add_argument("--url", required=True, help="the service, for example http://127.0.0.1:8321")
    parser.add_argument("--token", help="bearer token of the service (default: the environment's BRN_TOKEN)")
    options = parser.parse_args(arguments)
    try:
        if not options.directory.is_dir():
            raise NotADirectoryError(f"{options.directory} is no directory; name the recorder's spool directory")
        folders = Spool(options.directory).folders()
        client = Client(options.url, token=options.token or os.environ.get("BRN_TOKEN"))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not folders:
        print(f"{options.directory}: nothing to send")
        return 0
    with client:
        for folder in folders:
            report = drain(client, folder)
            print(
                f"{folder.run} rank {folder.rank}: sent {report.sent} batches ({report.steps} steps), "
                f"refused {report.refused}, left {report.left}"
            )
            if report.problem is not None:
                print(f"error: {report.problem}", file=sys.stderr)
            if report.left:
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
