"""Sending what the spool holds: a slice at a time beside a training, or all of it by a command."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from brn_core.client import Answer, Client
from brn_core.spool import Spool, SpoolFolder
from brn_core.wire import RunCreate


@dataclass(slots=True)
class Drained:
    """What draining one spool folder did, in batches.

    Attributes:
        sent: stored by the service.
        steps: recorded steps in those.
        refused: set aside.
        refused_steps: recorded steps in those.
        left: still in the folder.
        refusal: why the last of the refused ones was.
        problem: why the folder is not empty.
        unavailable: the answer that ended it; None where the service was not to blame.
        acknowledgement: the newest one.
    """

    sent: int = 0
    steps: int = 0
    refused: int = 0
    refused_steps: int = 0
    left: int = 0
    refusal: str | None = None
    problem: str | None = None
    unavailable: Answer | None = None
    acknowledgement: Mapping[str, Any] | None = None

    @property
    def stuck(self) -> bool:
        """Whether the folder is at fault, so that trying again soon is of no use."""
        return self.problem is not None and self.unavailable is None


def drain(
    client: Client,
    folder: SpoolFolder,
    *,
    registration: RunCreate | None = None,
    until: float | None = None,
    deadline: float | None = None,
) -> Drained:
    """Send a folder's batches, oldest first, then the run's undelivered end; stop where the service is unavailable.

    Args:
        client: where to.
        folder: what to send.
        registration: of the run; by default the folder's own.
        until: `time.monotonic()` at which to stop between two batches.
        deadline: `time.monotonic()` beyond which no request may last.
    """
    done = Drained()
    try:
        _drain(done, client, folder, registration or folder.registration(), until, deadline)
    except OSError as error:
        done.left = max(done.left, 1)
        done.problem = f"{folder.path} cannot be emptied: {error}"
    return done


def _drain(
    done: Drained,
    client: Client,
    folder: SpoolFolder,
    run: RunCreate | None,
    until: float | None,
    deadline: float | None,
) -> None:
    def seconds_left() -> float | None:
        return None if deadline is None else deadline - time.monotonic()

    parcels = folder.parcels()
    done.left = len(parcels)
    if run is None:
        done.left = max(done.left, 1)
        done.problem = f"{folder.path}: run.json is missing or damaged; nothing was sent"
        return
    waiting = deque(parcels)
    while waiting:
        parcel = waiting.popleft()
        if until is not None and time.monotonic() >= until:
            return
        if (body := parcel.body()) is not None:
            answer = client.send(run, folder.rank, parcel.seq, body, within_seconds=seconds_left())
            if answer.outcome == "unavailable":
                if answer.status == 500:
                    folder.postpone(parcel)
                done.problem, done.unavailable = answer.detail, answer
                return
            if answer.status == 413 and (halves := folder.part(parcel, body)):  # a proxy takes less than the service
                waiting.extendleft(reversed(halves))
                done.left += len(halves) - 1
                continue
            if answer.outcome == "refused":
                done.refused, done.refused_steps = done.refused + 1, done.refused_steps + parcel.steps
                done.refusal = answer.detail
                folder.set_aside(parcel)
            else:
                done.sent, done.steps = done.sent + 1, done.steps + parcel.steps
                done.acknowledgement = answer.acknowledgement
                parcel.remove()
        done.left -= 1
    while (end := folder.end()) is not None:
        answer = client.update(run, end, within_seconds=seconds_left())
        if answer.outcome == "unavailable":
            done.left, done.problem, done.unavailable = 1, answer.detail, answer
            return
        if folder.end() == end:  # else its process has put its last word there meanwhile
            folder.remove_end()
    folder.tidy()


def sync(directory: Path, url: str, token: str | None) -> int:
    """Send what a spool directory holds; print one line a run and rank.

    Returns:
        The process's exit code: 0 nothing waits any more, 1 something does, 2 directory, url or token cannot be.
    """
    try:
        if not directory.is_dir():
            raise NotADirectoryError(f"{directory} is no directory; name the recorder's spool directory")
        folders = Spool(directory).folders()
        client = Client(url, token=token)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not folders:
        print(f"{directory}: nothing to send")
    left = False
    with client:
        for folder in folders:
            report = drain(client, folder)
            print(
                f"{folder.run} rank {folder.rank}: sent {report.sent} batches ({report.steps} steps), "
                f"refused {report.refused}, left {report.left}"
            )
            for wrong in filter(None, (report.refusal, report.problem)):
                print(f"error: {wrong}", file=sys.stderr)
            left |= report.left > 0
            if report.unavailable is not None:
                break
    return int(left)
