"""Figures on data: traces, axes, units in labels, hover text, what is marked and what is not."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from brn_core import wire
from dashboard.figures.frame import plain
from dashboard.figures.layer_map import layer_map
from dashboard.figures.palette import PALETTES, Palette
from dashboard.figures.scalars import panels, scalar_panels
from dashboard.figures.scales import scale
from dashboard.figures.schedule import STATISTICS, Phase, caption, phases, schedule_view
from service.schemas import Buckets, Heatmap, Scalars, ScalarSeries, Series

PLAN = wire.Schedule(bn_steps=10, r_steps=40, d_steps=25, r_max=3.0, d_max=5.0)
RENORM = [wire.Layer(index=0, name="bn1", kind="BatchRenorm", channels=4, eps=1e-5, momentum=0.01)]
PLAIN_NORM = [RENORM[0].model_copy(update={"kind": "BatchNorm"})]
MARKUP = "<b onclick=alert(1)>%{x}&amp;"


def planned_limits(step: int) -> tuple[float, float]:
    ramp_r, ramp_d = (min(1.0, max(0.0, (step - 10) / (end - 10))) for end in (40, 25))
    return 1 + 2 * ramp_r, 5 * ramp_d


def series(steps: Sequence[int], *, limits: Any = planned_limits, layer: int | None = 0, **columns: Any) -> Series:
    """Constant r and d bands under the limits given; `columns` replaces whole columns."""
    r_max, d_max = (np.array(column, dtype=float) for column in zip(*map(limits, steps), strict=True))
    values: dict[str, Any] = {name: np.ones(len(steps)) for name in STATISTICS}
    values |= {f"r_q{q:02d}": np.full(len(steps), r) for q, r in ((5, 0.6), (25, 0.9), (50, 1.1), (75, 1.3), (95, 1.9))}
    values |= {f"d_q{q:02d}": np.full(len(steps), d) for q, d in ((5, -2), (25, -1), (50, 0.1), (75, 1), (95, 2))}
    values |= {"r_min": 1 / r_max, "r_max": r_max, "d_max": d_max, "clip_r": np.full(len(steps), 0.25)}
    values |= columns
    buckets = {name: [None if v is None else float(v) for v in column] for name, column in values.items()}
    return Series(
        run="r",
        layer=layer,
        rank=None,
        bucket_steps=1,
        steps=list(steps),
        series={
            name: Buckets(min=column, mean=column, max=[v if v is None else 2 * v for v in column])
            for name, column in buckets.items()
        },
    )


def heatmap(stat: str, values: list[list[float | None]], layers: list[str] | None = None) -> Heatmap:
    names = layers or [f"block{i}.bn" for i in range(len(values))]
    steps = [10 * (j + 1) for j in range(len(values[0]))]
    return Heatmap(run="r", stat=stat, rank=None, bucket_steps=10, steps=steps, layers=names, values=values)


def scalars(bucket_steps: int = 1, **curves: list[float | None]) -> Scalars:
    made = {
        name.replace("__", "/"): ScalarSeries(steps=list(range(1, len(v) + 1)), min=v, mean=v, max=v)
        for name, v in curves.items()
    }
    return Scalars(run="r", names=sorted(made), bucket_steps=bucket_steps, series=made)


def trace(figure: go.Figure, name: str) -> Any:
    (found,) = [t for t in figure.data if t.name == name]
    return found


@pytest.mark.parametrize("function", [schedule_view, layer_map, scalar_panels])
def test_every_figure_says_which_question_it_answers(function: Any) -> None:
    first = inspect.getdoc(function).splitlines()[0]  # type: ignore[union-attr]
    assert first.endswith("?")


class TestPhases:
    def test_are_batch_norm_then_ramp_then_full(self) -> None:
        steps = list(range(0, 61, 5))
        r_max, d_max = (np.array(c) for c in zip(*map(planned_limits, steps), strict=True))
        expected = [Phase("batch norm", 0, 15), Phase("ramp", 15, 40), Phase("full", 40, 60)]
        assert phases(steps, r_max, d_max, PLAN) == expected

    def test_without_a_plan_the_limits_are_full_where_they_rest(self) -> None:
        found = phases([1, 2, 3, 4], np.array([1.0, 2, 3, 3]), np.array([0.0, 1, 1, 1]), None)
        assert [p.name for p in found] == ["batch norm", "ramp", "full"]

    def test_without_a_plan_limits_that_still_move_are_a_ramp(self) -> None:
        found = phases([1, 2, 3], np.array([1.0, 2, 3]), np.array([0.0, 1, 2]), None)
        assert [p.name for p in found] == ["batch norm", "ramp"]

    def test_steps_without_limits_belong_to_no_phase(self) -> None:
        assert phases([1, 2], np.array([math.nan] * 2), np.array([math.nan] * 2), PLAN) == []

    def test_their_names_and_borders_are_drawn(self) -> None:
        figure = schedule_view(series(range(0, 61)), planned=PLAN)
        names = [a.text for a in figure.layout.annotations if a.text in ("batch norm", "ramp", "full")]
        assert names == ["batch norm", "ramp", "full"]
        borders = [s.x0 for s in figure.layout.shapes if s.type == "line"]
        assert borders == [11, 40]


class TestScheduleView:
    def test_draws_r_and_d_inside_their_limits(self) -> None:
        figure = schedule_view(series(range(0, 61)), layers=RENORM, planned=PLAN)
        for symbol, axis in (("r", "y"), ("d", "y2")):
            median = trace(figure, f"{symbol}: median, 25–75 % and 5–95 % of channels")
            assert (median.yaxis, len(median.x)) == (axis, 61)
            for low, high in ((5, 95), (25, 75)):
                band = trace(figure, f"{symbol}, {low}–{high} % of channels")
                assert band.fill == "toself"
                assert (min(band.y[:-1]), max(band.y[:-1])) == tuple(
                    pytest.approx(series([0]).series[f"{symbol}_q{q:02d}"].mean[0]) for q in (low, high)
                )
        r_limits = [t for t in figure.data if t.name == "limits in force" and t.yaxis == "y"]
        assert [float(t.y[-1]) for t in r_limits] == pytest.approx([1 / 3, 3])
        d_limits = [t for t in figure.data if t.name == "limits in force" and t.yaxis == "y2"]
        assert [float(t.y[-1]) for t in d_limits] == pytest.approx([-5, 5])

    def test_axes_and_hover_text_have_units(self) -> None:
        figure = schedule_view(series(range(0, 61)), planned=PLAN)
        assert figure.layout.yaxis.title.text == "r = σ_B / σ (ratio)"
        assert figure.layout.yaxis.type == "log"
        assert figure.layout.yaxis2.title.text == "d = (μ_B − μ) / σ (σ)"
        assert figure.layout.yaxis3.title.text == "clipped (share)"
        assert figure.layout.xaxis3.title.text == "step"
        d = trace(figure, "d: median, 25–75 % and 5–95 % of channels")
        assert "%{y:.4~g}</b> σ" in d.hovertemplate
        np.testing.assert_allclose(d.customdata[60], [-2, -1, 1, 2, -5, 5])

    def test_clip_rates_are_not_drawn_while_the_limits_are_shut(self) -> None:
        figure = schedule_view(series(range(0, 61)), planned=PLAN)
        rates = np.asarray(trace(figure, "r clipped").y)
        assert np.isnan(rates[:11]).all()
        np.testing.assert_allclose(rates[11:], 0.25)
        highest = np.asarray(trace(figure, "r clipped, highest").y)
        np.testing.assert_allclose(highest[11:], 0.5)

    def test_limits_and_data_are_inside_the_axes(self) -> None:
        figure = schedule_view(series(range(0, 61)), planned=PLAN)
        low, high = figure.layout.yaxis.range
        assert 10**low < 1 / 3 < 3 < 10**high
        low, high = figure.layout.yaxis2.range
        assert low < -5 < 5 < high

    def test_one_wild_first_step_does_not_set_the_scale(self) -> None:
        wild = np.full(1000, 2.0)
        wild[0] = 500
        figure = schedule_view(series(range(1000), d_q95=wild))
        assert figure.layout.yaxis2.range[1] < 10

    def test_plain_batch_norm_shows_what_batch_renorm_would_correct(self) -> None:
        figure = schedule_view(series(range(5), limits=lambda step: (1.0, 0.0)), layers=PLAIN_NORM)
        assert "This run uses BatchNorm" in figure.layout.meta["caption"]
        assert "what Batch Renorm would correct" in figure.layout.meta["caption"]
        assert [a.text for a in figure.layout.annotations if "=" in a.text] == ["r = 1", "d = 0"]
        assert figure.layout.yaxis3.title.text == "gap (σ²)"
        assert not [t for t in figure.data if "clipped" in (t.name or "")]
        assert len(trace(figure, "train-inference gap").y) == 5

    def test_the_first_non_finite_step_is_marked_and_said(self) -> None:
        r = [1.1, 1.1, math.nan, math.inf]
        figure = schedule_view(series(range(4), r_q50=r, limits=lambda step: (3.0, 5.0)), layers=RENORM)
        mark = trace(figure, "not finite from step 2")
        assert (list(mark.x), mark.marker.symbol) == ([2], "x")
        assert [s.x0 for s in figure.layout.shapes if s.line.color == PALETTES["light"].alarm] == [2]
        assert figure.layout.meta["caption"].startswith("From step 2 on r or d is NaN or infinite. At step 1 (bn1)")

    def test_a_missing_value_is_a_gap_and_no_alarm(self) -> None:
        figure = schedule_view(series(range(4), r_q50=[1.1, None, 1.1, 1.1]))
        assert not [t for t in figure.data if "not finite" in (t.name or "")]
        assert np.isnan(trace(figure, "r: median, 25–75 % and 5–95 % of channels").y[1])

    def test_a_band_breaks_where_values_are_missing(self) -> None:
        figure = schedule_view(series(range(5), r_q05=[0.6, 0.6, None, 0.6, 0.6]))
        x = np.asarray(trace(figure, "r, 5–95 % of channels").x)
        assert 2 not in x
        assert np.isnan(x).sum() == 2  # two closed parts

    def test_everything_non_finite_is_still_a_figure(self) -> None:
        nothing = dict.fromkeys(STATISTICS, [math.nan] * 3)
        figure = schedule_view(series(range(3), **nothing), planned=PLAN)
        assert figure.layout.meta["caption"].startswith("From step 0 on r or d is NaN or infinite")
        json.loads(figure.to_json())

    def test_another_layer_starts_its_y_axes_afresh_and_keeps_the_steps_in_view(self) -> None:
        one, other = (schedule_view(series(range(5), layer=layer)).layout for layer in (0, 1))
        assert one.yaxis.uirevision != other.yaxis.uirevision
        assert one.uirevision == other.uirevision
        assert one.xaxis.uirevision is None

    def test_no_rows_says_so(self) -> None:
        empty = Series(run="r", layer=None, rank=None, bucket_steps=1, steps=[], series={})
        assert "No rows yet" in schedule_view(empty).layout.annotations[0].text

    def test_one_step_is_drawn_as_points(self) -> None:
        figure = schedule_view(series([7]))
        assert trace(figure, "r: median, 25–75 % and 5–95 % of channels").mode == "markers"

    def test_caption_gives_limits_spread_and_clipping_at_the_newest_step(self) -> None:
        text = caption(series(range(61)), layers=RENORM, planned=PLAN)
        assert text.startswith("At step 60 (bn1) r may move in 0.333 to 3 and d in ±5; half of all channels have r ")
        assert "between 0.9 and 1.3 and d between −1 and 1" in text
        assert "Clipped: 25 % of r" in text

    def test_caption_says_when_the_limits_will_open(self) -> None:
        assert "the limits open at step 10" in caption(series(range(5)), layers=RENORM, planned=PLAN)


class TestLayerMap:
    def test_rows_are_layers_in_the_networks_order_from_the_top(self) -> None:
        figure = layer_map(heatmap("gap", [[1.0, 2.0], [3.0, 4.0]], ["stem", "head"]))
        cells = figure.data[0]
        assert (list(cells.y), figure.layout.yaxis.autorange) == (["stem", "head"], "reversed")
        assert list(cells.x) == [10, 20]
        np.testing.assert_allclose(cells.customdata, [[1, 2], [3, 4]])
        assert figure.layout.xaxis.title.text == "step"

    def test_hover_text_has_the_value_with_its_label_and_unit(self) -> None:
        template = layer_map(heatmap("gap", [[1.0]])).data[0].hovertemplate
        assert "train-inference gap (sigma²): <b>%{customdata:.4~g}</b>" in template
        assert "step %{x:,}" in template

    def test_non_finite_cells_are_marked_and_missing_ones_are_not(self) -> None:
        figure = layer_map(heatmap("gap", [[1.0, math.nan, math.inf], [1.0, None, 1.0]]))
        overlay = trace(figure, "not finite")
        np.testing.assert_array_equal(np.asarray(overlay.z) == 1, [[False, True, True], [False, False, False]])
        assert np.isnan(figure.data[0].z[1][1])
        first = trace(figure, "first not finite")
        assert (list(first.x), list(first.y)) == ([20], ["block0.bn"])

    def test_the_selected_layer_is_outlined(self) -> None:
        figure = layer_map(heatmap("gap", [[1.0], [2.0]]), selected=1)
        assert [(s.y0, s.y1) for s in figure.layout.shapes] == [(0.5, 1.5)]
        assert not layer_map(heatmap("gap", [[1.0]]), selected=9).layout.shapes

    def test_layers_of_equal_names_keep_rows_of_their_own(self) -> None:
        assert len(set(layer_map(heatmap("gap", [[1.0], [2.0]], ["bn", "bn"])).data[0].y)) == 2

    def test_hundreds_of_layers_stay_on_a_screen_and_their_names_apart(self) -> None:
        figure = layer_map(heatmap("gap", [[1.0]] * 300))
        assert figure.layout.height <= 940
        assert len(figure.layout.yaxis.tickvals) <= 60

    def test_names_are_text_never_markup(self) -> None:
        figure = layer_map(heatmap("gap", [[1.0]], [MARKUP]))
        assert "<b" not in figure.data[0].y[0]
        assert "<b" not in figure.layout.yaxis.ticktext[0]

    def test_no_rows_says_so(self) -> None:
        empty = Heatmap(run="r", stat="gap", rank=None, bucket_steps=1, steps=[], layers=["a"], values=[[]])
        assert "No rows yet" in layer_map(empty).layout.annotations[0].text

    @pytest.mark.parametrize("metric", wire.METRICS, ids=lambda m: m.name)
    def test_every_statistic_is_drawn_even_without_a_finite_value(self, metric: wire.Metric) -> None:
        for values in ([[math.nan, None]], [[0.0, 1.0]], [[1.0, 1.0]], [[-3.0, 1e6]], [[0.0, 0.0]]):
            drawn = layer_map(heatmap(metric.name, values)).data[0]
            assert drawn.zmin < drawn.zmax
            assert np.isfinite([drawn.zmin, drawn.zmax]).all()
            assert drawn.colorbar.tickvals[0] == pytest.approx(drawn.zmin)


def color_at(metric: wire.Metric, value: float, palette: Palette) -> str:
    """The colour of a lone cell, or `between` where it falls between two stops of the scale."""
    shown = scale(metric, np.array([[value]]), palette)
    place = float(np.clip((shown.z[0, 0] - shown.low) / (shown.high - shown.low), 0, 1))
    return next((color for stop, color in shown.colors if math.isclose(stop, place, abs_tol=1e-9)), "between")


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("metric", [m for m in wire.METRICS if m.neutral is not None], ids=lambda m: m.name)
def test_no_effect_always_has_the_neutral_colour(metric: wire.Metric, theme: Any) -> None:
    assert metric.neutral is not None
    assert color_at(metric, metric.neutral, PALETTES[theme]) == PALETTES[theme].neutral


def test_a_ratio_and_its_inverse_are_equally_far_from_neutral() -> None:
    shown = scale(wire.METRIC["r_q50"], np.array([[0.5, 2.0]]), PALETTES["light"])
    assert shown.z[0, 0] == -shown.z[0, 1]


def test_ends_of_a_scale_do_not_move_with_every_step() -> None:
    scales = [scale(wire.METRIC["d_q50"], np.array([[v]]), PALETTES["light"]) for v in (1.1, 1.3, 1.9)]
    assert {(s.low, s.high) for s in scales} == {(-2, 2)}


class TestScalars:
    def test_loss_comes_first_then_accuracy_then_the_rest_then_ours(self) -> None:
        names = [wire.SCALAR_STEP_TIME, "zeta", "val_acc", "train_loss", wire.SCALAR_SHADOW_EVAL_LOSS]
        titles = [panel.title for panel in panels(names)]
        assert titles == ["train_loss", "val_acc", "zeta", "loss by mode", "step time (ms)"]

    def test_shadow_losses_share_a_panel(self) -> None:
        figure = scalar_panels(scalars(loss=[1.0], brn__shadow_train_loss=[1.0], brn__shadow_eval_loss=[2.0]))
        assert trace(figure, "training").yaxis == trace(figure, "inference").yaxis == "y2"

    def test_times_are_drawn_in_milliseconds(self) -> None:
        figure = scalar_panels(scalars(brn__step_time_seconds=[0.025]))
        assert figure.data[0].y[0] == pytest.approx(25)
        assert figure.layout.annotations[0].text == "step time (ms)"

    def test_divergence_is_marked_where_it_begins_and_said(self) -> None:
        figure = scalar_panels(scalars(loss=[1.0, 0.5, math.nan, math.nan]))
        assert list(trace(figure, "not finite").x) == [3]
        assert "loss: NaN or infinite from step 3 on." in figure.layout.meta["caption"]

    def test_a_bucket_is_explained(self) -> None:
        caption = scalar_panels(scalars(bucket_steps=20, loss=[1.0])).layout.meta["caption"]
        assert "mean of 20 steps" in caption

    @pytest.mark.parametrize("columns", [1, 2, 3])
    def test_panels_do_not_overlap(self, columns: int) -> None:
        figure = scalar_panels(scalars(**{f"s{i}": [1.0, 2.0] for i in range(7)}), columns=columns)
        boxes = [
            (*figure.layout[f"xaxis{i or ''}"].domain, *figure.layout[f"yaxis{i or ''}"].domain)
            for i in ["", *range(2, 8)]
        ]
        for i, (left, right, low, high) in enumerate(boxes):
            for other_left, other_right, other_low, other_high in boxes[:i]:
                assert right <= other_left or other_right <= left or high <= other_low or other_high <= low

    def test_names_are_text_never_markup(self) -> None:
        answer = scalars(loss=[1.0])
        answer = answer.model_copy(update={"series": {MARKUP: answer.series["loss"]}})
        figure = scalar_panels(answer)
        assert "<b" not in figure.layout.annotations[0].text
        assert "<b" not in figure.data[0].name

    def test_no_scalars_says_how_to_send_some(self) -> None:
        assert "recorder.step(loss" in scalar_panels(scalars()).layout.annotations[0].text


def test_text_is_escaped_and_cut_in_the_middle() -> None:
    assert plain("<a href=x>&") == "&lt;a href=x&gt;&amp;"
    assert plain("features.block1.bn", 11) == "featu…k1.bn"
    assert plain("short", 11) == "short"


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a: str, b: str) -> float:
    """Ratio of WCAG 2.2."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_and_curves_have_the_contrast_of_wcag_aa(theme: Any) -> None:
    palette = PALETTES[theme]
    for color in (palette.text, palette.muted):
        assert contrast(color, palette.surface) >= 4.5
    for color in (palette.r, palette.d, palette.limit, palette.alarm, *palette.series):
        assert contrast(color, palette.surface) >= 3
