"""What earlier runs left in the spool: sent beside a run's own rows, a folder after the other, to the same service."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path

from brn_core.drain import Drained
from brn_core.spool import Spool, SpoolFolder, without_login

logger = logging.getLogger("brn_core")


class Leftovers:
    """The folders of other runs that are to be sent.

    Left alone are those of a process that is still at work, and those meant for another service (the log names them).

    Args:
        spool: where they lie.
        run: id of the run that sends them; its own folders are none.
        url: of the service.
    """

    def __init__(self, spool: Spool, run: str, url: str) -> None:
        self._spool = spool
        self._run = run
        self._here = without_login(url)
        self._hopeless: set[Path] = set()
        self._sent: defaultdict[Path, int] = defaultdict(int)
        self._refused: defaultdict[Path, int] = defaultdict(int)

    def next(self) -> SpoolFolder | None:
        """The folder to send from now; None where none is left, for the rest of the process.

        Raises:
            OSError: the spool cannot be read.
        """
        elsewhere = []
        for folder in self._spool.folders():
            if folder.run == self._run or folder.path in self._hopeless or folder.in_use():
                continue
            meant_for = folder.meant_for()
            if meant_for == self._here:
                return folder
            elsewhere.append(f"{folder.run} (for {meant_for or 'an unknown service'})")
        if elsewhere:
            where = self._spool.directory
            logger.info(
                "%s also holds rows of %s; send them with brn-train --sync %s --url URL",
                where, ", ".join(dict.fromkeys(elsewhere)), where,
            )  # fmt: skip
        return None

    def note(self, folder: SpoolFolder, drained: Drained) -> None:
        """What came of sending a part of a folder. The steps count to nobody's drops: their recorder is gone."""
        self._sent[folder.path] += drained.steps
        self._refused[folder.path] += drained.refused_steps
        if drained.stuck:
            self._hopeless.add(folder.path)
        elif not drained.left:
            logger.info(
                "sent what run %s had left in the spool: %d steps, %d more were refused",
                folder.run, self._sent.pop(folder.path), self._refused.pop(folder.path),
            )  # fmt: skip
