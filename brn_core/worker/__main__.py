"""`brn-train`: train a network, stream what normalization does to it, and say at the end what was found."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from brn_core.client import Client
from brn_core.drain import sync
from brn_core.wire import MAX_FAILURE, RunCreate, RunUpdate
from brn_core.worker.paper_table import check_table
from brn_core.worker.ranks import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_USAGE, Rank, launch
from brn_core.worker.settings import Settings, UsageError, parse_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `brn-train`; returns the exit code: 0 trained (or all sent), 1 failed, 2 usage, 130 Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        settings = parse_settings(arguments)
        if settings.dump_config:
            print(settings.as_yaml(), end="")
            return 0
        if settings.sync is not None:
            return sync(Path(settings.sync), settings.url, settings.token)
        rank = Rank.from_environment(os.environ)
        ranks = _ranks_here(settings) if rank is None else rank.world_size
        if settings.paper:
            check_table(settings, ranks)
            # its runs meet one after the other, each at a place of its own; torchrun has but one
            if rank is not None and rank.launcher is None:
                raise UsageError("--paper starts its own ranks: give --ranks instead of torchrun")
        # --ranks 0 is for what nobody watches: also of a rank that is alone somebody is left to say that it was killed
        if rank is None and (ranks > 1 or settings.ranks == 0):
            command = [sys.executable, "-m", "brn_core.worker", *arguments]
            return launch(command, ranks, partial(_say_failed, settings))
        if rank is not None and settings.ranks not in (0, 1, rank.world_size):
            raise UsageError(f"--ranks {settings.ranks}, but torchrun started {rank.world_size}: leave --ranks out")
    except UsageError as error:
        print(f"brn-train: {error}", file=sys.stderr)
        return EXIT_USAGE
    return run(settings, rank or Rank())


def _ranks_here(settings: Settings) -> int:
    """Ranks to start. On the CPU the paper's table gets two, if nobody said: one of its regimes is about ranks."""
    if settings.paper and "ranks" not in settings.model_fields_set:
        return _devices_here(settings) or 2
    return settings.ranks or _devices_here(settings) or 1


def _devices_here(settings: Settings) -> int:
    """CUDA devices of this host; 0 if none is wanted."""
    if settings.device == "cpu":
        return 0
    import torch  # seconds: only for those who ask for it

    return torch.cuda.device_count()


def _say_failed(settings: Settings, run_id: str, why: str) -> None:
    """Has the service show the run as failed, with the rank that is to blame: that one could not say so itself."""
    with Client(settings.url, token=settings.token) as client:
        client.update(RunCreate(id=run_id, name=settings.name), RunUpdate(status="failed", failure=why[:MAX_FAILURE]))


def run(settings: Settings, rank: Rank) -> int:
    """Trains as one rank; every way to end is a line of its own."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the recording is closed then, as on Ctrl-C
    console = Console() if rank.is_first else None
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_LogHandler(rank, console)], force=True)
    try:
        # torch takes seconds to import: --help, usage errors and the launcher do without it
        from brn_core.worker.replica import is_lost_peer
        from brn_core.worker.summary import print_summary
        from brn_core.worker.train import LauncherLostError, train

        try:
            if settings.paper:
                from brn_core.worker.paper import run_paper

                run_paper(settings, rank, console)
                return 0
            outcome = train(settings, rank, console)
        except (UsageError, LauncherLostError) as error:
            rank.report_failure(f"brn-train: {error}")
            return EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
        except Exception as error:
            if rank.world_size > 1 and is_lost_peer(error):
                print(f"rank {rank.rank}: lost another rank", file=sys.stderr)
                return EXIT_PEER_LOST
            rank.report_failure(traceback.format_exc())
            return EXIT_FAILED
        if console is not None and settings.summary:
            print_summary(console, settings, outcome)
    except KeyboardInterrupt:
        if console is not None:
            console.print("interrupted")
        return EXIT_INTERRUPTED
    return 0


class _LogHandler(logging.Handler):
    """Puts a log line above the progress bar (first rank), or on stderr with the rank's number."""

    def __init__(self, rank: Rank, console: Console | None) -> None:
        super().__init__()
        self._rank, self._console = rank, console

    def emit(self, record: logging.LogRecord) -> None:
        if self._console is not None:
            self._console.print(self.format(record), soft_wrap=True, highlight=False, markup=False)
        else:
            print(f"rank {self._rank.rank}: {self.format(record)}", file=sys.stderr)


def _end(code: int) -> NoReturn:
    """Ends the process; one of several ranks at once, without the interpreter's own end.

    DistributedDataParallel keeps the threads of its process group beyond the group's end. One that still has a tensor
    to drop while the interpreter ends makes C++ abort, or wait for ever. All that had to be closed is closed by now.
    """
    if Rank.from_environment(os.environ) is None:
        sys.exit(code)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _end(main())
