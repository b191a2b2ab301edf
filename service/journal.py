"""The journal of an embedded store: batches as they came, on disk before the engine has them.

An engine that keeps columns wants few large inserts, a rank wants its acknowledgement at once. So a batch is written
here first, many with one wait for the disk, and is acknowledged; the engine gets it a moment later with all that came
meanwhile. What the engine has is cut off. After a sudden end, the next process finds here what the engine may lack.

The journal is a folder of files that are only appended to, each cut off as a whole. An entry is a fixed header, a head
(JSON) and a body (Arrow, as it was sent), with their lengths and a checksum over both: one that broke off, when the
process or the machine did, is known by them. It was never acknowledged.
"""

from __future__ import annotations

import json
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

_HEADER: Final = struct.Struct("<4sIQI")
"""Mark, bytes of the head, bytes of the body, checksum of both."""

_MARK: Final = b"BRN1"


@dataclass(frozen=True, slots=True)
class Entry:
    """A batch as it came, and which life of its run it belongs to.

    Attributes:
        run_id: of the run.
        created_at: when that was created, to the millisecond: one that was deleted and made anew is another run.
        rank: global rank that recorded the rows.
        seq: the batch's number.
        received_at: when it came, to the millisecond.
        body: its tables, `wire.encode_batch`.
    """

    run_id: str
    created_at: datetime
    rank: int
    seq: int
    received_at: datetime
    body: bytes

    def packed(self) -> bytes:
        head = json.dumps(
            [self.run_id, _to_ms(self.created_at), self.rank, self.seq, _to_ms(self.received_at)]
        ).encode()
        check = zlib.crc32(self.body, zlib.crc32(head))
        return b"".join((_HEADER.pack(_MARK, len(head), len(self.body), check), head, self.body))


class Journal:
    """Entries on disk, in the order they came. Not thread-safe: one thread at a time appends or turns the page.

    Args:
        folder: of its files; made when the first entry is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        numbers = [int(path.stem) for path in self._pages()]
        self._number = max(numbers, default=0)
        self._file: int | None = None  # of the page that is being written
        self._size = 0

    def _pages(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.page"))

    def entries(self) -> Iterator[Entry]:
        """What was appended and not cut off; what broke off at the end of a page is left out."""
        for page in self._pages():
            yield from _read(page)

    def append(self, entries: Sequence[Entry]) -> None:
        """Writes entries; when this returns they are on disk. Waits for the disk once.

        Raises:
            OSError: none of them counts as written (one may come back from `entries` all the same).
        """
        data = b"".join(entry.packed() for entry in entries)
        file = self._open()
        try:
            written = 0
            while written < len(data):
                written += os.write(file, memoryview(data)[written:])
            os.fdatasync(file)
        except OSError:
            # What stands behind a broken entry could not be read again: take it back, or go on with another page.
            try:
                os.ftruncate(file, self._size)
                os.lseek(file, self._size, os.SEEK_SET)
            except OSError:
                self.turn()
            raise
        self._size += len(data)

    def turn(self) -> int:
        """Ends the page; what is appended from now on survives a `cut` up to the number given back."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        return self._number

    def cut(self, number: int) -> None:
        """Forgets all pages up to this one: the engine has their entries, on disk."""
        for page in self._pages():
            if int(page.stem) <= number:
                page.unlink(missing_ok=True)

    def close(self) -> None:
        """Ends the page; the folder goes when nothing is left in it."""
        self.turn()
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _open(self) -> int:
        if self._file is None:
            if not self._folder.is_dir():
                self._folder.mkdir()
                _sync_folder(self._folder.parent)
            self._number += 1
            path = self._folder / f"{self._number:012d}.page"
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            try:
                _sync_folder(self._folder)
            except OSError:  # its name may not outlive a power failure: nothing is acknowledged by this page
                os.close(file)
                raise
            self._file, self._size = file, 0
        return self._file


def _read(page: Path) -> Iterator[Entry]:
    with page.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        while header := file.read(_HEADER.size):
            entry = None
            if len(header) == _HEADER.size:
                mark, head_bytes, body_bytes, check = _HEADER.unpack(header)
                if mark == _MARK and head_bytes + body_bytes <= size - file.tell():
                    head, body = file.read(head_bytes), file.read(body_bytes)
                    if zlib.crc32(body, zlib.crc32(head)) == check:
                        entry = _entry(head, body)
            if entry is None:
                log.info("%s ends in a batch that broke off and was never acknowledged", page)
                return
            yield entry


def _entry(head: bytes, body: bytes) -> Entry:
    run_id, created_at, rank, seq, received_at = json.loads(head)
    return Entry(run_id, _of_ms(created_at), rank, seq, _of_ms(received_at), body)


def _to_ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def _of_ms(moment: int) -> datetime:
    return datetime.fromtimestamp(moment / 1000, UTC)


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
