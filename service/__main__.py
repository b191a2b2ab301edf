"""`python -m service`: the REST service alone, without the dashboard (`brn-serve` serves both).

With `--diagnose` it prints the findings of one run instead, see `service.checkup`.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import logging
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import uvicorn
from fastapi import FastAPI
from pydantic import ValidationError
from rich.console import Console

from service.app import create_app
from service.checkup import checkup
from service.errors import CannotStart
from service.settings import Settings

AppFactory = Callable[[Settings], FastAPI]

_FLAGS: Final = ("host", "port", "store")
"""Settings that have a command-line flag."""

SWITCH_SECONDS: Final = 0.0005
"""How long a thread may hold the interpreter while others want it. Batches pass through four threads, each of which
gives it up whenever it decodes or waits for the disk: at Python's own 0.005 they spend most of their way waiting for it
(benchmarks/ingest.py: a fifth fewer rows a second, and twice the p99)."""

_HEAP: Final = {"M_TRIM_THRESHOLD": (-1, 16 * 2**20), "M_MMAP_THRESHOLD": (-3, 4 * 2**20), "M_ARENA_MAX": (-8, 2)}
"""What glibc is told of its heap: the parameter's number in malloc.h, and its value. Left to itself it opens a heap for
every few threads and takes blocks of up to 32 MB out of them, and what is freed there stays with the process: after
seven minutes of benchmarks/soak.py 390 MB, beside 50 to 110 MB in use. A threshold below the arrays of a diagnosis (up
to 3 MB for eight ranks) makes the kernel clear pages for each of them anew: twice the time of its rules."""


def main() -> int:
    return serve(create_app)


def serve(
    app_factory: AppFactory, argv: Sequence[str] | None = None, *, prog: str = "python -m service", epilog: str = ""
) -> int:
    """Reads settings, takes the port, opens the store and serves until SIGINT or SIGTERM; or diagnoses one run.

    Args:
        app_factory: makes the application; the dashboard passes its own.
        argv: command line without the program's name; None: the process's.
        prog: name in the help text.
        epilog: what the help text says at its end.

    Returns:
        Exit code: 0 after a clean stop, 1 where it cannot start (one line on stderr says what to do); with
        `--diagnose` what `service.checkup` says.
    """
    try:
        settings, subject = _settings(prog, argv, epilog)
        if subject is not None:
            return checkup(settings, subject, Console())
        _check_exposure(settings)
        logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger("clickhouse_connect").setLevel(logging.CRITICAL)  # what it logs it raises too
        give_freed_memory_back()
        with _listening_socket(settings) as listener:
            app = app_factory(settings)
            return _run(app, settings, listener)
    except CannotStart as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1


def give_freed_memory_back() -> None:
    """Tells glibc how to treat what is freed; does nothing where the C library is another one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in _HEAP.values():
            mallopt(parameter, value)


class _Server(uvicorn.Server):
    """Tells open event streams to end before it waits for connections to close; they would never end by themselves."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        app = self.config.app
        assert isinstance(app, FastAPI)
        app.state.closing.set()
        await super().shutdown(sockets)


def _run(app: FastAPI, settings: Settings, listener: socket.socket) -> int:
    config = _config(app, settings)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving on http://{shown}:{port} (store {settings.store_shown})", flush=True)
    # uvicorn raises the signal again once it has stopped cleanly: both then end as KeyboardInterrupt, exit code 0.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.setswitchinterval(SWITCH_SECONDS)
    with suppress(KeyboardInterrupt):
        _Server(config).run(sockets=[listener])
    return 0


def _config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_level="warning" if settings.log_level == "info" else settings.log_level,  # no line a request
        access_log=False,  # `Guard` has its own, without queries
        timeout_graceful_shutdown=max(1, round(settings.shutdown_seconds)),
        lifespan="on",
        server_header=False,
        # uvicorn believes this machine's own processes by default: whoever reaches it there could take any address
        proxy_headers=bool(settings.trusted_proxies.strip()),
        forwarded_allow_ips=settings.trusted_proxies,
    )


def _settings(prog: str, argv: Sequence[str] | None, epilog: str = "") -> tuple[Settings, str | None]:
    """Settings, and what to diagnose (None: serve)."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Takes, stores and serves normalization statistics. Flags override BRN_SERVICE_* variables.",
        epilog=epilog,
    )
    fields = Settings.model_fields
    for name in _FLAGS:
        parser.add_argument(f"--{name}", help=fields[name].description)
    parser.add_argument(
        "--diagnose",
        metavar="RUN|PATH",
        help="Print the findings of a run of the store, of a recorder's spool folder, or of exported tables, and end. "
        "Exit code: 0 no warning, 1 could not look, 3 nothing could be judged, 4 warning, 5 critical.",
    )
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    subject = given.pop("diagnose", None)
    try:
        return Settings(**given), subject
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else "read_token"  # the one rule over several fields
        flag = f" (or --{field})" if field in _FLAGS else ""
        raise CannotStart(f"BRN_SERVICE_{field.upper()}{flag}: {first['msg'].removeprefix('Value error, ')}") from error


def _check_exposure(settings: Settings) -> None:
    if settings.is_exposed and settings.token is None:
        raise CannotStart(
            f"refusing to listen on {settings.published_on or settings.host} without a token, anyone could read and "
            "delete runs: set BRN_SERVICE_TOKEN=$(openssl rand -hex 16), or use --host 127.0.0.1"
        )


def _listening_socket(settings: Settings) -> socket.socket:
    """The port, taken before the store is opened so that a second start fails fast and harms nothing."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio sends small answers at once only on sockets that say they are TCP; else each waits 40 ms for an ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise CannotStart(
                f"port {settings.port} on {settings.host} is taken: stop what listens there, or use another --port"
            ) from error
        raise CannotStart(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from error
    return listener


if __name__ == "__main__":
    sys.exit(main())
