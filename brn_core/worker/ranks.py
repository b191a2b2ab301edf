"""The processes of a run: which of them this one is, and starting all of them on this host. No torch here.

`brn-train --ranks N` starts N processes of itself with the environment variables of torchrun, so there is one way to
be a rank, whoever started it.

    what happens                    what the user sees
    a rank fails                    its traceback, one line that names it, here and in the run; the others are ended
    a rank is killed                one line that names it and the signal, likewise; the others are ended (with
                                    --ranks 1 there is no other process that could say so; with --ranks 0 there is)
    Ctrl-C, SIGTERM, SIGHUP         every rank closes its recording and ends; a second Ctrl-C does not wait
    this process is killed          every rank notices at its next step and ends (`Rank.launcher_alive`)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Final

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_PEER_LOST: Final = 75
"""This rank ended because another one did: the other one has the reason."""
EXIT_INTERRUPTED: Final = 130

_RENDEZVOUS = "_BRN_RENDEZVOUS"
_LAUNCHER = "_BRN_LAUNCHER"
_FOLDER = "_BRN_FOLDER"
_RUN = "run"
_GRACE_SECONDS = 10.0
"""How long ranks may take to close their recording before they are killed."""
_NOTICE_SECONDS = 3.0
"""How long ranks may take to notice by themselves that one is lost; an interrupt would disturb their closing."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Rank:
    """One process of a run.

    Attributes:
        rank: global rank, 0 ... world_size - 1.
        local_rank: rank among the processes of this host; the index of its CUDA device.
        local_world_size: processes of the run on this host.
        rendezvous: where the ranks find each other, as an init method of torch.distributed.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    rendezvous: str = "env://"
    launcher: int | None = None
    folder: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Rank | None:
        """The rank that torchrun (or `launch`) made of this process, or None where nobody did."""
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return None
        world_size = int(environment["WORLD_SIZE"])
        launcher = environment.get(_LAUNCHER)
        return cls(
            rank=int(environment["RANK"]),
            world_size=world_size,
            local_rank=int(environment.get("LOCAL_RANK", "0")),
            local_world_size=int(environment.get("LOCAL_WORLD_SIZE", str(world_size))),
            rendezvous=environment.get(_RENDEZVOUS, "env://"),
            launcher=None if launcher is None else int(launcher),
            folder=environment.get(_FOLDER),
        )

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def launcher_alive(self) -> bool:
        """Whether the process that launched this rank is still there (always true where `launch` did not)."""
        return self.launcher is None or os.getppid() == self.launcher

    def announce(self, run_id: str) -> None:
        """Tells the launcher which run this is, once it has an id."""
        if self.folder is not None:  # local: ranks of --paper train runs of their own, each as the first of one
            (Path(self.folder) / f"{_RUN}-{self.local_rank}").write_text(run_id)

    def report_failure(self, text: str) -> None:
        """Says why this rank failed: to the launcher, which prints one rank's text only; else on stderr."""
        if self.folder is None:
            print(text.rstrip(), file=sys.stderr)
        else:
            (Path(self.folder) / f"failure-{self.rank}").write_text(text)


def launch(command: Sequence[str], ranks: int, on_failure: Callable[[str, str], object] = lambda run, why: None) -> int:
    """Runs a command in `ranks` processes on this host, each told its rank.

    Args:
        command: what is run.
        ranks: how many times.
        on_failure: called with the run's id and why it failed, if it had an id by then.

    Returns:
        The exit code of the whole.
    """
    with tempfile.TemporaryDirectory(prefix="brn-ranks-") as folder, _Signals() as signals:
        processes = [
            # A session of its own: the terminal's Ctrl-C reaches this process only, which passes it on once.
            subprocess.Popen(
                command,
                env=os.environ | _environment(rank, ranks, folder),
                start_new_session=True,
            )
            for rank in range(ranks)
        ]
        codes, culprit = _wait(processes, signals)
        if signals.received:
            return EXIT_INTERRUPTED
        if not any(codes):
            return 0
        why = _why(codes, culprit, Path(folder))
        announced = Path(folder) / f"{_RUN}-{culprit or 0}"
        if announced.exists():
            on_failure(announced.read_text(), why)
        return EXIT_USAGE if culprit is not None and codes[culprit] == EXIT_USAGE else EXIT_FAILED


def _environment(rank: int, ranks: int, folder: str) -> dict[str, str]:
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        # A file instead of a port: nothing to be taken, nothing to be reached from outside.
        _RENDEZVOUS: (Path(folder) / "rendezvous").as_uri(),
        _LAUNCHER: str(os.getpid()),
        _FOLDER: folder,
    }
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # else gloo looks the host's name up, which fails on many laptops
    return environment


class _Signals:
    """Counts the signals that ask this process to end, for the time of a `with`."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[number] = signal.signal(number, self._count)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal() gave back

    def _count(self, _number: int, _frame: FrameType | None) -> None:
        self.received += 1


def _wait(processes: Sequence[subprocess.Popen[bytes]], signals: _Signals) -> tuple[list[int], int | None]:
    """Exit codes in rank order, and the rank that failed first.

    When one rank fails or a signal comes, the others are asked to end, and after a while killed. A rank that waits for
    a lost one in a collective is told so by gloo or NCCL; the request is for those that do something else.
    """
    culprit: int | None = None
    failed_at: float | None = None
    asked_at: float | None = None
    while None in (codes := [process.poll() for process in processes]):
        now = time.monotonic()
        if culprit is None:
            culprit = next((rank for rank, code in enumerate(codes) if code not in (None, 0, EXIT_PEER_LOST)), None)
        if failed_at is None and any(codes):
            failed_at = now
        if asked_at is None and (signals.received or (failed_at is not None and now > failed_at + _NOTICE_SECONDS)):
            asked_at = now
            _send(processes, signal.SIGINT)
        if signals.received > 1 or (asked_at is not None and now > asked_at + _GRACE_SECONDS):
            _send(processes, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    ended = [process.wait() for process in processes]
    if culprit is None:
        culprit = next((rank for rank, code in enumerate(ended) if code not in (0, EXIT_PEER_LOST)), None)
    return ended, culprit


def _send(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def _why(codes: Sequence[int], culprit: int | None, folder: Path) -> str:
    """Why the run failed, in a line; prints it, below what the rank that failed first has said itself."""
    if culprit is None:
        why, said = "the ranks lost each other and none of them says why", ""
    else:
        reason = folder / f"failure-{culprit}"
        said = reason.read_text().rstrip() if reason.exists() else ""
        code = codes[culprit]
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        why = f"rank {culprit} of {len(codes)} ended with {how}{hint}"
    if said:
        print(said, file=sys.stderr)
    if culprit is None or codes[culprit] != EXIT_USAGE:
        print(f"brn-train: {why}; the run has ended", file=sys.stderr)
    return f"{why}: {said.splitlines()[-1]}" if said else why
