"""Answers from the store: what is drawn, listed, compared and exported. Down-sampling happens in SQL.

Down-sampling. A bucket holds `w` consecutive steps, `intDiv(step, w)`, where `w` is the smallest of 1, 2, 5, 10, 20,
50, ... that needs no more buckets than the points asked for. So buckets are aligned to absolute steps and depend on
steps only: the same question over the same rows always has the same answer, and every statistic shares its buckets.
A bucket is drawn at the newest step in it, hence the newest point is always in. A step that was recorded twice (a run
that went on from a checkpoint) counts twice.

Numbers. Missing is null. `mean` is the plain mean: a NaN in the bucket makes it NaN, so that a single bad step cannot
hide. `min` and `max` are over the numbers that are not NaN (infinities count), so that the band stays readable; a
bucket of nothing but NaN has NaN for all three. Sums run in the engine's order, so a mean is the same each time up to
its last bits; answers in JSON are rounded far above those.
"""

from service.answers.buckets import bucket_width
from service.answers.comparison import compare, scalar_of
from service.answers.curves import heatmap, scalars, series, summary
from service.answers.files import export
from service.answers.records import NOT_YET, is_stored, layers, page, run, runs, stored_run, tags
from service.answers.snapshots import History, channels, history
from service.answers.spread import ranks
from service.answers.stream import probe
from service.answers.what_if import Recorded, recorded, schedule

__all__ = [
    "NOT_YET",
    "History",
    "Recorded",
    "bucket_width",
    "channels",
    "compare",
    "export",
    "heatmap",
    "history",
    "is_stored",
    "layers",
    "page",
    "probe",
    "ranks",
    "recorded",
    "run",
    "runs",
    "scalar_of",
    "scalars",
    "schedule",
    "series",
    "stored_run",
    "summary",
    "tags",
]
