"""The newest rows of live runs, in memory: a diagnosis takes in what came since the last one and reads nothing again.

Filled from the store once (`service.windows`), and from then on from the batches as they are put.

Shape suffixes: N rows, T recorded steps.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Final

import numpy as np

from service.batches import Batch
from service.diagnosis.stream import Known
from service.diagnosis.window import Bools, Floats, Ints, NonFinite, Opening

KEPT_BYTES: Final = 256 * 2**20
"""Most memory that the rows of all runs together may take; of more, the runs are dropped that were longest not asked
about, and read from the store when they are."""

WAITING_ROWS: Final = 400_000
"""Rows of all runs together that may wait for a diagnosis; of more, those of the run with most are let go of, and its
diagnosis reads the store instead."""


class Newest:
    """The newest `most` recorded steps of a table; of rows that came twice that of the batch with the larger seq.

    Args:
        most: steps that are kept.
        places: how many rows a step may have, by rank (K,) or by rank and layer (K, L).
        columns: by name, the shape of one value.

    Attributes:
        steps_T: recorded steps, oldest first.
    """

    def __init__(self, most: int, places: tuple[int, ...], columns: Mapping[str, tuple[int, ...]]) -> None:
        self._most = most
        self._places = places
        self._shapes = dict(columns)
        self._begin = self._end = 0
        self._allocate(0)
        self.steps_T = self._steps

    @property
    def present(self) -> Bools:
        """(T, *places) where there is a row."""
        return np.asarray(self._seqs[self._begin : self._end] >= 0)

    def column(self, name: str) -> Floats:
        """(T, *places, *shape), NaN where there is no row. A view: it changes when more is taken."""
        return self._columns[name][self._begin : self._end]

    @property
    def size_bytes(self) -> int:
        return sum(array.nbytes for array in (self._steps, self._seqs, *self._columns.values()))

    def take(self, step_N: Ints, place: tuple[Ints, ...], seq_N: Ints, columns: Mapping[str, Floats]) -> None:
        """Takes rows in, in any order of steps; of several of one step and place in one call the last stands.

        Args:
            step_N: of each row.
            place: index of each row into `places`.
            seq_N: of the batch that each came with.
            columns: (N, *shape) by name.
        """
        if not len(step_N):
            return
        self._make_room(np.setdiff1d(step_N, self.steps_T))
        index = (self._begin + np.searchsorted(self.steps_T, step_N), *place)
        newer_N = (step_N >= self.steps_T[0]) & (self._seqs[index] < seq_N)
        if not newer_N.all():
            index, seq_N = tuple(at_N[newer_N] for at_N in index), seq_N[newer_N]
            columns = {name: values[newer_N] for name, values in columns.items()}
        self._seqs[index] = seq_N
        for name, values in columns.items():
            self._columns[name][index] = values

    def _make_room(self, fresh_T: Ints) -> None:
        if not len(fresh_T):
            return
        known_T, end = self.steps_T, self._end + len(fresh_T)
        if end <= len(self._steps) and (not len(known_T) or fresh_T[0] > known_T[-1]):  # as nearly always
            self._steps[self._end : end] = fresh_T
            self._end, self._begin = end, max(self._begin, end - self._most)
            self.steps_T = self._steps[self._begin : end]
            return
        steps_T = np.union1d(known_T, fresh_T)[-self._most :]
        begin, old_seqs, old_columns = self._begin, self._seqs, self._columns
        self._allocate(len(steps_T) + max(32, len(steps_T) // 4))
        self._begin, self._end = 0, len(steps_T)
        self._steps[: self._end] = steps_T
        self.steps_T = self._steps[: self._end]
        kept = np.flatnonzero(known_T >= steps_T[0])
        at = np.searchsorted(steps_T, known_T[kept])
        self._seqs[at] = old_seqs[begin + kept]
        for name, values in self._columns.items():
            values[at] = old_columns[name][begin + kept]

    def _allocate(self, steps: int) -> None:
        self._steps: Ints = np.zeros(steps, np.int64)
        self._seqs: Ints = np.full((steps, *self._places), -1, np.int64)
        self._columns: dict[str, Floats] = {
            name: np.full((steps, *self._places, *shape), np.nan) for name, shape in self._shapes.items()
        }


class Recent:
    """What a diagnosis looks at of one run. Whoever reads or changes it holds `lock`; `offer` waits for nobody.

    Attributes:
        version: differs after every batch, and from that of any other run.
        ranks, layers: how many places there are.
        tables: `probe` and `layers`; None before they were read from the store.
        scalars: by name.
        nonfinite: the first non-finite row.
        first_sigma_L: of the run's first steps.
        known: what the last diagnosis computed.
        opening: what is stored of the opening of the limits, as it was when the run had reached `opening_step`.
        size_bytes: of all these arrays, as it was when that was measured last.
        waiting_rows: of the batches that nobody asked for yet.
    """

    def __init__(self, key: Hashable, ranks: int, layers: int) -> None:
        self.key = key
        self.ranks, self.layers = ranks, layers
        self.lock = threading.Lock()
        self.version = 0
        self.tables: dict[str, Newest] | None = None
        self.scalars: dict[str, Newest] = {}
        self.nonfinite: NonFinite | None = None
        self.first_sigma_L: Floats = np.full(layers, np.nan)
        self.known = Known()
        self.opening: Opening | None = None
        self.opening_step: int | None = None
        self.size_bytes = 0
        self._guard = threading.Lock()  # of what follows
        self._waiting: list[Batch] = []
        self._lost = False
        self.waiting_rows = 0

    def measure(self) -> None:
        tables = (*(self.tables or {}).values(), *self.scalars.values())
        self.size_bytes = sum(table.size_bytes for table in tables)

    def offer(self, batch: Batch, version: int) -> None:
        """Keeps a batch until it is asked for."""
        with self._guard:
            self.version = version
            if not self._lost:
                self._waiting.append(batch)
                self.waiting_rows += batch.rows

    def lose(self) -> None:
        """Lets go of the batches that wait, and of those to come until it is asked for them."""
        with self._guard:
            self._waiting, self._lost, self.waiting_rows = [], True, 0

    def arrived(self) -> list[Batch] | None:
        """Batches that came since this was asked last, by rising seq; None where there were too many to keep."""
        with self._guard:
            batches = None if self._lost else sorted(self._waiting, key=lambda batch: batch.seq)
            self._waiting, self._lost, self.waiting_rows = [], False, 0
        return batches


class RecentRuns:
    """The runs of which the newest rows are in memory."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, Recent] = OrderedDict()
        self._version = 0
        self._lock = threading.Lock()

    def of(self, run_id: str, key: Hashable, ranks: int, layers: int) -> Recent:
        """Of a run; empty where it is new here or where `key` differs from the last one, and from now on told all."""
        with self._lock:
            found = self._runs.get(run_id)
            if found is None or found.key != key or (found.ranks, found.layers) != (ranks, layers):
                found = self._runs[run_id] = Recent(key, ranks, layers)
                self._version += 1
                found.version = self._version
            self._runs.move_to_end(run_id)
            while len(self._runs) > 1 and sum(own.size_bytes for own in self._runs.values()) > KEPT_BYTES:
                self._runs.popitem(last=False)
            return found

    def version(self, run_id: str) -> int:
        """`Recent.version` of a run; 0 where it is not here, as of one that was never here."""
        with self._lock:
            found = self._runs.get(run_id)
            return 0 if found is None else found.version

    def offer(self, batches: Sequence[Batch]) -> None:
        """Takes note of batches that were just stored."""
        with self._lock:
            for batch in batches:
                if (own := self._runs.get(batch.run.record.id)) is not None:
                    self._version += 1
                    own.offer(batch, self._version)
            while sum(own.waiting_rows for own in self._runs.values()) > WAITING_ROWS:
                max(self._runs.values(), key=lambda own: own.waiting_rows).lose()

    def forget(self, run_id: str) -> None:
        """Lets go of a run."""
        with self._lock:
            self._runs.pop(run_id, None)
