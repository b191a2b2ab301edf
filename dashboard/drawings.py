"""The figures of a run or of a comparison: which questions they ask the service. Pages and reports draw the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final, TypeAlias, TypedDict

import numpy as np
import plotly.graph_objects as go
from fastapi import Request

from brn_core.wire import METRIC, Schedule
from dashboard.figures import causes as cause_views
from dashboard.figures import effective_batch as batch_views
from dashboard.figures import layer_map as layer_maps
from dashboard.figures import moments as moment_views
from dashboard.figures import probe as probe_views
from dashboard.figures import rank_spread as rank_views
from dashboard.figures import schedule as schedules
from dashboard.figures.advice import advice
from dashboard.figures.channels import ChannelStatistic, channel_map, channel_scatter
from dashboard.figures.comparison import Curve, Panel, comparison
from dashboard.figures.evidence import evidence
from dashboard.figures.frame import Steps, finite, in_view, without_data
from dashboard.figures.palette import PALETTES, Palette, Theme
from dashboard.figures.scalars import scalar_panels
from dashboard.views import DEFAULT_STATISTIC, evidence_of, finding_named
from service import answers, windows
from service.answers.comparison import Axis
from service.answers.curves import scalar_names
from service.answers.records import known, known_runs
from service.errors import Invalid
from service.memo import Memo
from service.schemas import Comparison, Run, Series
from service.store import Store

MOST_RUNS: Final = 100
"""Runs that a page compares."""


class Span(TypedDict):
    """A range of steps, in the words of the service's questions."""

    from_step: int | None
    to_step: int | None


@dataclass(frozen=True, slots=True)
class Look:
    """How a figure is to be drawn: what a page's address says.

    Attributes:
        theme: colours.
        compact: for a narrow screen.
        columns: panels beside each other.
        steps: the steps to look at.
        layer, rank, stat: of what.
        smooth: points that scalars are averaged over.
    """

    theme: Theme = "light"
    compact: bool = False
    columns: int = 3
    steps: Steps = field(default_factory=Steps)
    layer: int | None = None
    rank: int | None = None
    stat: str = DEFAULT_STATISTIC
    smooth: int = 1

    @property
    def palette(self) -> Palette:
        return PALETTES[self.theme]

    @property
    def span(self) -> Span:
        """The steps to ask for: a little more than is looked at, so that lines run to the border."""
        first, last = self.steps.first, self.steps.last
        if first is None or last is None:
            return {"from_step": None, "to_step": None}
        more = max(1, (last - first) // 20)
        return {"from_step": max(0, first - more), "to_step": last + more}


def _without_layers(look: Look) -> go.Figure:
    return without_data("This run has no normalization layers.", look.palette, height=160)


def schedule(store: Store, run_id: str, look: Look) -> go.Figure:
    run = answers.run(store, run_id)
    if not run.layers:
        return _without_layers(look)
    answer = answers.series(
        store,
        run_id,
        schedules.STATISTICS,
        layer=look.layer,
        rank=look.rank,
        extremes=schedules.EXTREMES,
        **look.span,
    )
    figure = schedules.schedule_view(
        answer, layers=run.layers, planned=run.schedule, compact=look.compact, palette=look.palette
    )
    return in_view(figure, look.steps, look.palette)


def heatmap(store: Store, run_id: str, look: Look) -> go.Figure:
    if not answers.layers(store, run_id):
        return _without_layers(look)
    answer = answers.heatmap(store, run_id, look.stat, rank=look.rank, **look.span)
    figure = layer_maps.layer_map(answer, selected=look.layer, compact=look.compact, palette=look.palette)
    return in_view(figure, look.steps, look.palette)


def scalars(store: Store, run_id: str, look: Look) -> go.Figure:
    answer = answers.scalars(store, run_id, rank=look.rank, **look.span)
    elsewhere = {name for name, _ in cause_views.SHADOW}  # drawn above the gap
    answer = answer.model_copy(update={"series": {k: v for k, v in answer.series.items() if k not in elsewhere}})
    figure = scalar_panels(answer, columns=look.columns, smooth=look.smooth, palette=look.palette)
    return in_view(figure, look.steps, look.palette)


def causes(store: Store, run_id: str, look: Look) -> go.Figure:
    run = answers.run(store, run_id)
    if not run.layers:
        return _without_layers(look)
    layer = look.layer or 0
    answer = answers.series(store, run_id, cause_views.STATISTICS, layer=layer, **look.span)
    there = scalar_names(store, run_id)
    names = [name for name, _ in cause_views.SHADOW if name in there]
    shadow = answers.scalars(store, run_id, names, **look.span) if names else None
    skew = [f.since for f in windows.diagnosis(store, run_id).findings if f.code == "NH-RANKSKEW"]
    figure = cause_views.causes(
        answer,
        shadow,
        layer=run.layers[layer].name if layer < len(run.layers) else "",
        skewed_from=min(skew, default=None),
        compact=look.compact,
        palette=look.palette,
    )
    return in_view(figure, look.steps, look.palette)


def finding_evidence(store: Store, run_id: str, look: Look, key: str) -> go.Figure:
    """The statistics that a finding of this name rests on, or a figure that says that it is gone."""
    found = finding_named(windows.diagnosis(store, run_id), key)
    asked = evidence_of(found) if found is not None else None
    if asked is None:
        return without_data("This finding is no longer made.", look.palette, height=140)
    if asked.route == "scalars":
        there = scalar_names(store, run_id)
        names = [name for name in asked.names if name in there]
        shown = answers.scalars(store, run_id, names, rank=asked.rank, **look.span)
        figure = scalar_panels(shown, columns=look.columns, palette=look.palette)
    elif asked.route == "probe" and found is not None and found.ranks:
        ranks = rank_views.shown_ranks(answers.run(store, run_id).world_size, found.ranks)
        probes = [answers.probe(store, run_id, rank=rank, **look.span) for rank in ranks]
        figure = probe_views.inputs_of_ranks(probes, palette=look.palette)
    elif asked.route == "probe":
        figure = probe_views.clustering(answers.probe(store, run_id, points=1, **look.span), palette=look.palette)
    elif asked.route == "heatmap" and asked.stats:
        answer = answers.heatmap(store, run_id, asked.stats[0], rank=asked.rank, **look.span)
        figure = layer_maps.layer_map(answer, compact=look.compact, palette=look.palette)
    elif asked.stats:
        answer_of = answers.series(store, run_id, asked.stats, layer=asked.layer, rank=asked.rank, **look.span)
        figure = evidence(answer_of, compact=look.compact, palette=look.palette)
    else:
        return without_data("This finding names no statistic over steps.", look.palette, height=140)
    return in_view(figure, look.steps, look.palette)


def moments(store: Store, run_id: str, look: Look) -> go.Figure:
    answer = answers.series(store, run_id, moment_views.STATISTICS, layer=look.layer or 0, rank=look.rank, **look.span)
    return in_view(moment_views.moments(answer, palette=look.palette), look.steps, look.palette)


def effective_batch(store: Store, run_id: str, look: Look) -> go.Figure:
    answer = answers.series(store, run_id, batch_views.STATISTICS, layer=look.layer or 0, **look.span)
    probe = answers.probe(store, run_id, points=1, **look.span)
    return in_view(
        batch_views.effective_batch(answer, probe, compact=look.compact, palette=look.palette), look.steps, look.palette
    )


def channels(store: Store, run_id: str, look: Look, of: ChannelStatistic = "gap") -> go.Figure:
    found = answers.history(store, run_id, look.layer or 0, rank=look.rank)
    return channel_map(found, of, palette=look.palette)


def snapshot(store: Store, run_id: str, look: Look, step: int | None = None) -> go.Figure:
    layer = look.layer or 0
    found = answers.channels(store, run_id, layer=layer, step=step, rank=look.rank, worst=1)
    r_max, d_max = 1.0, 0.0
    if found.step is not None:
        at = answers.series(
            store, run_id, ["r_max", "d_max"], layer=layer, from_step=found.step, to_step=found.step, points=1
        )
        r_max, d_max = (float(finite(at.series[s].mean)[-1]) if at.steps else 0.0 for s in ("r_max", "d_max"))
    return channel_scatter(found, max(1.0, np.nan_to_num(r_max, nan=1.0)), np.nan_to_num(d_max), palette=look.palette)


def rank_spread(store: Store, run_id: str, look: Look) -> go.Figure:
    found = answers.ranks(store, run_id, from_step=look.steps.first, to_step=look.steps.last)
    return rank_views.rank_spread(found, compact=look.compact, palette=look.palette)


def rank_curves(store: Store, run_id: str, look: Look) -> go.Figure:
    run = answers.run(store, run_id)
    if not run.layers:
        return _without_layers(look)
    outlier = answers.ranks(store, run_id, from_step=look.steps.first, to_step=look.steps.last).outlier
    always = (outlier.rank,) if outlier is not None else ()
    curves = [
        answers.series(store, run_id, rank_views.STATISTICS, layer=look.layer or 0, rank=rank, points=300, **look.span)
        for rank in rank_views.shown_ranks(run.world_size, always)
    ]
    return in_view(rank_views.rank_curves(curves, compact=look.compact, palette=look.palette), look.steps, look.palette)


Tried: TypeAlias = tuple[Series, answers.Recorded]
"""What the schedule advisor reads of a run: its curves, and the percentiles that clip rates are computed from."""


def advisor(store: Store, run_id: str, look: Look, tried: Schedule, kept: Memo[Tried]) -> go.Figure:
    """The schedule `tried` on a run; `kept` holds what was read of it, for the next move of a slider."""

    def read() -> Tried:
        curves = answers.series(store, run_id, schedules.STATISTICS, layer=look.layer, extremes=schedules.EXTREMES)
        return curves, answers.recorded(store, run_id, layer=look.layer)

    curves, recorded = kept.get((run_id, look.layer, *known(store, run_id).cursor), read)
    return advice(curves, recorded, tried, compact=look.compact, palette=look.palette)


def group_of(run: Run, group: str) -> str | None:
    """What a run is averaged with: runs of the same tags, or of the same value of a setting; None: alone."""
    if not group:
        return None
    if group == "tag":
        return ", ".join(run.tags) or "no tag"
    value: object = run.config
    for part in group.removeprefix("config.").split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return f"{group.removeprefix('config.')} = {'–' if value is None else value}"


def compared(
    store: Store, found: Comparison, runs: Sequence[Run], look: Look, *, by: Axis, scalar: str, group: str = ""
) -> go.Figure:
    """A scalar and a statistic of several runs over each other."""
    fraction = by == "fraction"
    of_scalar: list[Curve] = []
    of_stat: list[Curve] = []
    curves = answers.scalar_of(store, found, scalar)
    for own, run, curve in zip(found.runs, runs, curves, strict=True):
        grouped = group_of(run, group)
        buckets = own.series[look.stat]
        of_stat.append(Curve(run.id, run.name, grouped, finite(own.x), finite(buckets.mean)))
        x, y = np.asarray(curve.steps, dtype=float), finite(curve.mean)
        x = x / own.total_steps if fraction and own.total_steps else x
        of_scalar.append(Curve(run.id, run.name, grouped, x, y))
    panels = [Panel(METRIC[look.stat].label, tuple(of_stat), log=METRIC[look.stat].group in ("gap", "noise"))]
    if scalar:
        panels.insert(0, Panel(scalar, tuple(of_scalar)))
    return comparison(panels, by_fraction=fraction, compact=look.compact, palette=look.palette)


def comparison_of(
    store: Store, run_ids: Sequence[str], stats: Sequence[str], by: Axis = "step"
) -> tuple[Comparison, list[Run]]:
    """The service's answer for so many runs as a page shows; without `stats` only in what they differ.

    Raises:
        NotFound, Invalid: as `answers.compare`.
    """
    if len(run_ids) > MOST_RUNS:
        raise Invalid(f"a page compares up to {MOST_RUNS} runs, got {len(run_ids)}: choose fewer")
    found = answers.compare(store, run_ids, stats, by=by, points=200, most=MOST_RUNS)
    now = datetime.now(UTC)
    return found, [state.run(now) for state in known_runs(store, [own.run for own in found.runs])]


def store_of(request: Request) -> Store:
    store: Store = request.app.state.store
    return store
