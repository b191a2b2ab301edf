"""`brn-train`: train a network, stream what normalization does to it, and say at the end what was found."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from rich.console import Console

from brn_core.worker.ranks import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_PEER_LOST, EXIT_USAGE, Rank, launch
from brn_core.worker.settings import Settings, UsageError, parse_settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `brn-train`; returns the exit code: 0 trained, 1 failed, 2 usage, 130 Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        settings = parse_settings(arguments)
        rank = Rank.from_environment(os.environ)
        if rank is None and (ranks := settings.ranks or _devices_here(settings)) > 1:
            return launch([sys.executable, "-m", "brn_core.worker", *arguments], ranks)
        if rank is not None and settings.ranks not in (0, 1, rank.world_size):
            raise UsageError(f"--ranks {settings.ranks}, but torchrun started {rank.world_size}: leave --ranks out")
    except UsageError as error:
        print(f"brn-train: {error}", file=sys.stderr)
        return EXIT_USAGE
    return run(settings, rank or Rank())


def _devices_here(settings: Settings) -> int:
    """Ranks that make use of every CUDA device of this host; one where there is none, or none is wanted."""
    if settings.device == "cpu":
        return 1
    import torch  # seconds: only for those who ask for it

    return max(1, torch.cuda.device_count())


def run(settings: Settings, rank: Rank) -> int:
    """Trains as one rank; every way to end is a line of its own."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the recording is closed then, as on Ctrl-C
    console = Console() if rank.is_first else None
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_LogHandler(rank, console)], force=True)
    try:
        # torch takes seconds to import: --help, usage errors and the launcher do without it
        from brn_core.worker.summary import print_summary
        from brn_core.worker.train import LauncherLostError, is_lost_peer, train

        try:
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


if __name__ == "__main__":
    sys.exit(main())
