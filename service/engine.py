"""The engine that keeps the tables: ClickHouse's dialect, embedded (chDB) or on a server, behind one class.

Only names from the wire schema ever become SQL; everything else travels as a bound parameter.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import clickhouse_connect
import pyarrow as pa
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError, DatabaseError, OperationalError

from brn_core.wire import TABLES
from service.errors import CannotStart, StoreFull, StoreInUse, Unavailable
from service.settings import Settings

log = logging.getLogger(__name__)

DATABASE: Final = "brn"

_NOT_ENOUGH_SPACE: Final = 243  # ClickHouse's error code


class Engine:
    """Connections to the engine. Safe to use from many threads.

    A few connections write (one a table), others read, one removes: readers never wait for a writer, nor it for them.

    Attributes:
        embedded: the engine runs in this process, which is its only writer.
        cluster: of the servers that keep the tables together; empty where one does.

    Raises:
        CannotStart: on opening, when the store is locked, not writable or not reachable.
    """

    def __init__(self, settings: Settings) -> None:
        path = settings.store_path
        self.embedded = path is not None
        self.cluster = settings.cluster
        self._settings = settings
        self._lock_file = _lock(path) if path is not None else None
        self._write_lock = threading.RLock()
        self._take_lock = threading.Lock()
        self._own = threading.local()  # the connection that this thread reads by, while it holds a lock
        self._readers: queue.LifoQueue[Client] = queue.LifoQueue()
        self._clients: list[Client] = []
        try:
            with cannot_start(settings):
                self._writer, self._taker = self._connect(), self._connect()
                self._writers = {table: self._connect() for table in TABLES}
                self._remover = self._connect()
                for _ in range(settings.readers):
                    self._readers.put(self._connect())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Waits for the statements that run, then lets go of the store and its lock."""
        with self._write_lock:
            while self._clients:
                self._clients.pop().close()
            if self._lock_file is not None:
                self._lock_file.close()
                self._lock_file = None

    def rows(self, sql: str, **parameters: Any) -> pa.Table:
        """The answer to a query; `{name:Type}` in it stands for the parameter `name`."""
        with self.reader() as client, _store_errors():
            return client.query_arrow(sql, parameters=parameters)

    @contextmanager
    def reader(self) -> Iterator[Client]:
        """A connection to read by. Who writes or takes batches has one of its own, and never waits for readers."""
        own: Client | None = getattr(self._own, "client", None)
        if own is not None:
            yield own
            return
        client = self._readers.get()
        try:
            yield client
        finally:
            self._readers.put(client)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds off other writers, for what reads, decides and then writes. Takes a lock."""
        with self._write_lock, self._reading_by(self._writer):
            yield

    @contextmanager
    def taking(self) -> Iterator[None]:
        """Holds off others who decide which batches are new. Takes a lock, after that of `writing` if both."""
        with self._take_lock, self._reading_by(self._taker):
            yield

    @contextmanager
    def _reading_by(self, client: Client) -> Iterator[None]:
        outer = getattr(self._own, "client", None)
        self._own.client = client
        try:
            yield
        finally:
            self._own.client = outer

    def insert(self, table: str, rows: pa.Table, token: str | None = None) -> None:
        """Inserts rows as one block, which is on disk when this returns. The caller holds `writing()`.

        Args:
            table: of the wire or of the store.
            rows: with all its columns.
            token: a server drops an insert whose token it has seen.
        """
        settings = None if token is None else {"insert_deduplication_token": f"{token}/{table}"}
        with _store_errors():
            self._writers.get(table, self._writer).insert_arrow(table, rows, settings=settings)

    def command(self, sql: str, **parameters: Any) -> Any:
        """Runs a statement that makes, changes or fills tables."""
        return self._writer.command(sql, parameters=parameters)

    def remove(self, sql: str, **parameters: Any) -> None:
        """Runs a statement that removes rows; others read and write meanwhile. One at a time."""
        with _store_errors():
            self._remover.command(sql, parameters=parameters)

    def _connect(self) -> Client:
        options: dict[str, Any] = {
            "settings": {
                "output_format_arrow_string_as_string": 1,
                "output_format_arrow_compression_method": "none",
                "join_use_nulls": 1,  # a run without batches has null for its last step, not 0
            },
            "autogenerate_session_id": False,
        }
        path = self._settings.store_path
        if path is not None:
            options.pop("autogenerate_session_id")
            dsn, database = f"chdb://{path.resolve()}", DATABASE
        else:
            dsn, _, database = self._settings.store.rpartition("/")
            options["secure"] = self._settings.store.startswith("clickhouses://")
        if self.cluster:
            # Acknowledged once most servers have it, so that losing one loses nothing.
            options["settings"]["insert_quorum"] = "auto"
        if not self._clients:
            on = f" ON CLUSTER `{self.cluster}`" if self.cluster else ""
            with clickhouse_connect.get_client(dsn=dsn) as first:
                first.command(f"CREATE DATABASE IF NOT EXISTS `{_identifier(database)}`{on}")
        client = clickhouse_connect.get_client(dsn=dsn, database=database, **options)
        self._clients.append(client)
        return client


@contextmanager
def cannot_start(settings: Settings) -> Iterator[None]:
    """What the engine or the disk says while the store is opened, as one line."""
    try:
        yield
    except (ClickHouseError, OSError) as error:
        raise CannotStart(f"the store {settings.store_shown} cannot be opened: {first_line(error)}") from error


def beside(path: Path, ending: str) -> Path:
    """The file `PATH.ending` beside an embedded store."""
    return path.resolve().with_name(f"{path.name}.{ending}")


def _lock(path: Path) -> IO[str]:
    """Takes the lock beside an embedded store, so that a second process gets a clear line, not the engine's."""
    file = beside(path, "lock")
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(f"no permission to write in {path}")
        handle = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise CannotStart(
            f"cannot write the store at {path}: {error.strerror or error}; name another folder with --store chdb://PATH"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        holder = handle.read(20).strip() or "unknown"
        handle.close()
        raise StoreInUse(
            f"the store at {path} is in use by process {holder}: stop it, or name another with --store chdb://PATH"
        ) from error
    handle.truncate(0)
    handle.write(f"{os.getpid()}\n")
    handle.flush()
    return handle


def _identifier(name: str) -> str:
    if not name.replace("_", "").isalnum():
        raise CannotStart(f"the store's address must end in /DATABASE (letters, digits, _), got {name!r}")
    return name


@contextmanager
def _store_errors() -> Iterator[None]:
    """The engine's errors, and those of the files it reads, as ours. A statement it rejects is our mistake (500)."""
    try:
        yield
    except (DatabaseError, OSError) as error:
        if is_full(error):
            raise StoreFull(
                "the store's disk is full: nothing was stored; free some space and send it again"
            ) from error
        if isinstance(error, OperationalError):
            log.error("the store does not answer: %s", first_line(error))
            raise Unavailable("the store does not answer; try again later") from error
        raise


def is_full(error: DatabaseError | OSError) -> bool:
    """Whether an error says that the disk has no space left."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return error.code == _NOT_ENOUGH_SPACE or os.strerror(errno.ENOSPC) in str(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, not too long; engines append stack traces."""
    return (str(error) or type(error).__name__).splitlines()[0][:300]
