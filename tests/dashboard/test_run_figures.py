"""Figures of the layer, rank, advisor and comparison pages, on data: traces, axes, units, and what the captions say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from brn_core import wire
from dashboard.figures import advice as advisor
from dashboard.figures import causes as cause_views
from dashboard.figures import effective_batch as batch_views
from dashboard.figures import moments as moment_views
from dashboard.figures import schedule as schedules
from dashboard.figures.channels import channel_map, channel_scatter
from dashboard.figures.comparison import Curve, Panel, comparison
from dashboard.figures.evidence import evidence, rows_by_unit
from dashboard.figures.frame import Steps, in_view, rolling, without_data
from dashboard.figures.palette import PALETTES
from dashboard.figures.rank_spread import rank_curves, rank_spread
from dashboard.figures.scalars import scalar_panels
from dashboard.figures.sparkline import sparkline
from service.answers import History, Recorded
from service.answers.what_if import Spread
from service.schemas import (
    Buckets,
    Channel,
    Channels,
    Outlier,
    Probe,
    ProbeWindow,
    RankHealth,
    Ranks,
    Scalars,
    ScalarSeries,
    Series,
)

LIGHT = PALETTES["light"]
NAN = float("nan")


def series(steps: Sequence[int], rank: int | None = None, **columns: Any) -> Series:
    """One value broadcast to every step, or one a step; the band is the mean ± 10 %."""

    def buckets(value: Any) -> Buckets:
        mean = [float(v) if v is not None else None for v in np.broadcast_to(np.array(value, object), len(steps))]
        return Buckets(
            min=[None if v is None else 0.9 * v for v in mean],
            mean=mean,
            max=[None if v is None else 1.1 * v for v in mean],
        )

    found = {name: buckets(value) for name, value in columns.items()}
    return Series(run="r", layer=0, rank=rank, bucket_steps=1, steps=list(steps), series=found)


def trace(figure: go.Figure, name: str) -> Any:
    (found,) = [trace for trace in figure.data if trace.name == name]
    return found


def titles(figure: go.Figure) -> list[str]:
    layout = figure.layout.to_plotly_json()
    return [axis.get("title", {}).get("text", "") for name, axis in layout.items() if name.startswith("yaxis")]


@pytest.mark.parametrize(
    "figure",
    [
        moment_views.moments,
        batch_views.effective_batch,
        channel_map,
        channel_scatter,
        cause_views.causes,
        evidence,
        rank_spread,
        rank_curves,
        advisor.advice,
        comparison,
        sparkline,
    ],
)
def test_every_figure_says_which_question_it_answers(figure: Any) -> None:
    assert figure.__doc__.split("\n")[0].endswith("?")


class TestMoments:
    def test_batches_have_a_band_and_the_moving_statistics_a_line(self) -> None:
        figure = moment_views.moments(series(range(5), mu_b=0.5, mu=0.25, sigma_b=2.0, sigma=1.0))
        assert trace(figure, "mu_b").y.tolist() == [0.5] * 5
        assert trace(figure, "mu").y.tolist() == [0.25] * 5
        assert trace(figure, "mu_b, extremes").fill == "toself"
        assert titles(figure) == ["mean (activation)", "deviation (activation)"]

    def test_the_caption_says_what_inference_does_differently(self) -> None:
        figure = moment_views.moments(series(range(5), mu_b=0.5, mu=0.25, sigma_b=2.0, sigma=1.0))
        assert "0.25 σ off, at 2 times the scale" in figure.layout.meta["caption"]

    def test_nothing_finite_is_said(self) -> None:
        figure = moment_views.moments(series(range(3), mu_b=NAN, mu=0.0, sigma_b=NAN, sigma=1.0))
        assert figure.layout.meta["caption"] == "No step has finite statistics."


class TestEffectiveBatch:
    def test_a_batch_is_worth_one_plus_the_rest_over_f(self) -> None:
        found = series(range(1, 401), samples=32, mean_diff1=0.4, mean_noise=0.1)
        figure = batch_views.effective_batch(found)
        assert trace(figure, "effective, by this layer").y[-1] == pytest.approx(1 + 31 / 4)
        assert trace(figure, "samples in the batch").y[-1] == 32
        assert figure.layout.yaxis.title.text == "samples"

    def test_the_probe_has_points_of_its_own_and_the_first_word(self) -> None:
        window = ProbeWindow(first_step=1, last_step=100, between=3.1, within=1.0, order=1.0)
        probe = Probe(
            run="r", rank=None, bucket_steps=1, steps=[], samples=[], mean=[], var=[], adjacency=[], windows=[window]
        )
        figure = batch_views.effective_batch(series(range(1, 401), samples=32, mean_diff1=0.1, mean_noise=0.1), probe)
        assert trace(figure, "effective, by the input probe").y.tolist() == pytest.approx([11.0])
        assert figure.layout.meta["caption"].startswith("By the input probe a batch of 32 is worth 11 independent")

    def test_no_more_independent_samples_are_said_than_there_are(self) -> None:
        figure = batch_views.effective_batch(series(range(1, 401), samples=8, mean_diff1=0.05, mean_noise=0.1))
        assert "worth 8 independent" in figure.layout.meta["caption"]


GAP = {"gap": 1.0, "residual": 0.1, "scale_diff2": 0.0, "scale_noise": 0.0}


class TestCauses:
    @pytest.mark.parametrize(
        ("fast", "noise", "expected"),
        [
            (0.5, 0.5, {"sampling": 0.5, "clustered": 0, "slow": 0.5}),
            (0.5, 0.1, {"sampling": 0.1, "clustered": 0.4, "slow": 0.5}),
            (0.11, 0.1, {"sampling": 0.11, "clustered": 0, "slow": 0.89}),  # a tenth more is chance
        ],
    )
    def test_shares_are_noise_excess_and_rest(self, fast: float, noise: float, expected: dict[str, float]) -> None:
        found = cause_views.parts(series(range(300), mean_diff2=fast, mean_noise=noise, **GAP))
        for part, share in expected.items():
            assert found[part][-1] == pytest.approx(share), part
        assert sum(share[-1] for share in found.values()) == pytest.approx(1)

    def test_the_rest_is_the_ranks_from_where_they_are_known_to_differ(self) -> None:
        found = cause_views.parts(series(range(300), mean_diff2=0.2, mean_noise=0.2, **GAP), skewed_from=200)
        assert (found["rank"][199], found["slow"][199]) == (0, pytest.approx(0.8))
        assert (found["rank"][200], found["slow"][200]) == (pytest.approx(0.8), 0)

    def test_missing_statistics_leave_a_gap_in_the_shares(self) -> None:
        noise = [None, None, *[0.2] * 298]
        found = cause_views.parts(series(range(300), mean_diff2=noise, mean_noise=noise, **GAP))
        assert np.isnan(found["sampling"][:2]).all()
        assert not np.isnan(found["sampling"][2:]).any()

    def test_the_caption_names_layer_gap_remainder_and_cause(self) -> None:
        found = series(range(300), mean_diff2=0.5, mean_noise=0.1, **(GAP | {"gap": 0.6}))
        caption = cause_views.causes(found, layer="stem.bn").layout.meta["caption"]
        assert "stem.bn has a gap of 0.6 σ², of which clipping leaves 17%; 67% of it is batches that are no" in caption

    def test_the_losses_of_a_shadow_pass_stand_above(self) -> None:
        curve = ScalarSeries(steps=[1, 2], min=[1, 1], mean=[1, 1], max=[1, 1])
        shadow = Scalars(
            run="r", names=[], bucket_steps=1, series=dict.fromkeys([n for n, _ in cause_views.SHADOW], curve)
        )
        found = series(range(300), mean_diff2=0.5, mean_noise=0.1, **GAP)
        with_losses = cause_views.causes(found, shadow)
        assert titles(with_losses) == ["loss", "gap (σ²)", "share of the gap"]
        assert trace(with_losses, "inference mode").yaxis == "y"
        assert titles(cause_views.causes(found)) == ["gap (σ²)", "share of the gap"]


class TestChannels:
    HISTORY = History(0, [10, 20], np.array([[1.0, 2.0], [1.0, NAN]]), np.array([[0.0, 3.0], [0.5, 0.0]]))

    def test_one_row_a_channel_and_one_column_a_snapshot(self) -> None:
        drawn = trace(channel_map(self.HISTORY), "gap")
        assert drawn.x == ("10", "20")
        np.testing.assert_allclose(drawn.customdata, [[0, 10], [0.25, NAN]])
        assert "(σ²)" in drawn.hovertemplate

    def test_what_is_not_finite_is_marked(self) -> None:
        marked = trace(channel_map(self.HISTORY, "r"), "not finite").z
        np.testing.assert_array_equal(marked, [[NAN, NAN], [NAN, 1]])

    def test_channels_outside_the_limits_are_apart_and_counted(self) -> None:
        figure = channel_scatter(snapshot(r=[1.0, 4.0, 1.0, NAN], d=[0.0, 0.0, -6.0, 0.0]), 3.0, 5.0)
        assert trace(figure, "inside").customdata.tolist() == [0]
        assert trace(figure, "clipped").customdata.tolist() == [1, 2]
        assert "3 outside the limits, 1 of them NaN or infinite" in figure.layout.meta["caption"]
        (box,) = figure.layout.shapes
        assert (box.x0, box.x1, box.y0, box.y1) == (-5.0, 5.0, 1 / 3, 3.0)

    def test_shut_limits_clip_nothing(self) -> None:
        figure = channel_scatter(snapshot(r=[1.0, 4.0], d=[0.0, 1.0]), 1.0, 0.0)
        assert "nothing is corrected" in figure.layout.meta["caption"]
        assert not figure.layout.shapes


def snapshot(r: list[float], d: list[float]) -> Channels:
    worst = [Channel(layer=0, name="bn", channel=1, r=r[1], d=d[1], gap=1.0)]
    return Channels(run="r", layer=0, rank=0, steps=[7], step=7, values={"r": r, "d": d}, worst=worst)


class TestEvidence:
    def test_statistics_of_one_unit_share_a_panel(self) -> None:
        assert rows_by_unit(["gap", "mean_noise", "clip_r"]) == [["gap", "mean_noise"], ["clip_r"]]
        assert rows_by_unit(["sigma", "sigma_b", "log_r"]) == [["sigma", "sigma_b"], ["log_r"]]

    @pytest.mark.parametrize("metric", wire.METRICS, ids=lambda metric: metric.name)
    def test_every_statistic_can_be_drawn(self, metric: wire.Metric) -> None:
        figure = evidence(series(range(3), **{metric.name: 1.0}))
        assert trace(figure, metric.name).y.tolist() == [1.0] * 3


def ranks(spread: list[float | None], outlier: Outlier | None = None, world_size: int = 4) -> Ranks:
    health = [
        RankHealth(rank=k, last_step=9, behind_steps=0, received_at=None, step_time_seconds=0.1)
        for k in range(world_size)
    ]
    return Ranks(
        run="r",
        from_step=1,
        to_step=9,
        world_size=world_size,
        layers=[f"<b>{i}" for i in range(len(spread))],
        mu_spread=spread,
        sigma_spread=spread,
        farthest_rank=[2 if value else None for value in spread],
        farthest_distance=spread,
        outlier=outlier,
        ranks=health,
    )


class TestRanks:
    def test_each_layer_has_its_spread_and_its_farthest_rank(self) -> None:
        figure = rank_spread(ranks([0.5, 0.0, None]))
        assert trace(figure, "mu_b").x[:2].tolist() == [0.5, 0.0]
        assert [a.text for a in figure.layout.annotations if a.text.startswith("rank")] == ["rank 2"]
        assert figure.layout.yaxis.ticktext[0] == "&lt;b&gt;0"

    def test_the_rank_that_stands_apart_is_named(self) -> None:
        figure = rank_spread(ranks([0.5], Outlier(rank=2, distance=3.0, others=0.5)))
        assert "rank 2 stands apart in most layers: its median distance is 3" in figure.layout.meta["caption"]

    def test_one_rank_has_nothing_to_compare(self) -> None:
        assert "one rank" in rank_spread(ranks([0.0], world_size=1)).layout.annotations[0].text

    def test_curves_have_one_line_a_rank(self) -> None:
        figure = rank_curves([series(range(3), rank=k, mu_b=k, sigma_b=1.0) for k in range(7)])
        assert len([t for t in figure.data if t.yaxis in ("y", "y1")]) == 7
        looks = {(t.line.color, t.line.dash) for t in figure.data}
        assert len(looks) == 7


def recorded(steps: int, quantiles: Sequence[float]) -> Recorded:
    rows = np.tile(np.asarray(quantiles, float), (steps, 1))
    channels, at = np.full(steps, 64), np.arange(steps)
    return Recorded(np.arange(steps), Spread(np.log(rows), channels, at, steps), Spread(rows - 1, channels, at, steps))


class TestAdvice:
    RUN = series(range(10), **dict.fromkeys(schedules.STATISTICS, 1.0))
    TRIED = wire.Schedule(bn_steps=3, r_steps=5, d_steps=5, r_max=1.5, d_max=0.5)

    def test_limits_and_clip_rates_are_those_of_the_schedule_tried(self) -> None:
        found = recorded(10, (0.4, 0.5, 0.8, 1, 1.25, 2, 2.5))
        replayed = advisor.tried_on(self.RUN, found, self.TRIED)
        assert replayed.series["r_max"].mean == [1.0, 1.0, 1.0, 1.0, 1.25, *[1.5] * 5]
        assert replayed.series["d_max"].mean[-1] == 0.5
        assert (replayed.series["clip_r"].mean[3], replayed.series["clip_r"].mean[9]) == (
            None,
            found.clip_rates(self.TRIED)[0][9],
        )
        assert replayed.series["r_q50"] == self.RUN.series["r_q50"]  # what was measured stays

    def test_the_caption_has_the_worst_and_the_final_rate(self) -> None:
        found = recorded(10, (0.4, 0.5, 0.8, 1, 1.25, 2, 2.5))
        caption = advisor.advice(self.RUN, found, self.TRIED).layout.meta["caption"]
        assert "of r at most" in caption
        assert "at its final limit" in caption

    def test_a_limit_that_never_opens_is_said(self) -> None:
        shut = self.TRIED.model_copy(update={"d_max": 0.0})
        caption = advisor.advice(self.RUN, recorded(10, (1,) * 7), shut).layout.meta["caption"]
        assert "the limit of d stays shut" in caption


def curve(run: str, y: list[float], group: str | None = None) -> Curve:
    return Curve(run, run, group, np.arange(len(y), dtype=float), np.array(y))


class TestComparison:
    def test_each_run_is_a_line_of_its_own_look(self) -> None:
        runs = tuple(curve(f"run {i}", [0.0, i]) for i in range(12))
        figure = comparison([Panel("loss", runs)], by_fraction=False)
        assert [t.name for t in figure.data] == [own.name for own in runs]
        assert len({(t.line.color, t.line.dash) for t in figure.data}) == 12

    def test_groups_are_means_with_extremes(self) -> None:
        runs = (curve("a", [0, 1, 2], "x"), curve("b", [2, 3, 4], "x"), curve("c", [9, 9, 9], "y"))
        figure = comparison([Panel("loss", runs)], by_fraction=False)
        mean = trace(figure, "x (2 runs)")
        assert (mean.y[0], mean.y[-1]) == (1.0, 3.0)
        band = trace(figure, "x (2 runs), extremes")
        assert (np.nanmin(band.y), np.nanmax(band.y)) == (0.0, 4.0)
        assert trace(figure, "y (1 run)").y[0] == 9.0

    @pytest.mark.parametrize(("y", "ticks"), [([0.02, 0.2], "D2"), ([1e-9, 1.0], 2), ([0.02, 0.021], None)])
    def test_ticks_of_a_log_axis_never_overlap(self, y: list[float], ticks: object) -> None:
        figure = comparison([Panel("gap", (curve("a", [*y, np.nan, 0.0]),), log=True)], by_fraction=False)
        assert figure.layout.yaxis.dtick == ticks

    def test_a_narrow_one_leaves_the_names_to_the_tables(self) -> None:
        runs = [Panel("loss", (curve("a run", [0, 1]), curve("b run", [0, 1])))]
        assert "a run" in comparison(runs, by_fraction=False).layout.annotations[0].text
        assert comparison(runs, by_fraction=False, compact=True).layout.annotations[0].text == "loss"

    def test_fractions_are_per_cent_of_the_plan(self) -> None:
        figure = comparison([Panel("loss", (curve("a", [0, 1]),))], by_fraction=True)
        assert figure.layout.xaxis.tickformat == ".0%"
        assert figure.layout.xaxis.title.text == "share of the planned steps"

    def test_names_are_text_never_markup(self) -> None:
        figure = comparison([Panel("<i>", (curve("<script>", [0, 1], "<b>"),))], by_fraction=False)
        assert "<script" not in figure.to_json()
        assert "&lt;i&gt;" in figure.layout.annotations[0].text
        assert "&lt;b&gt;" in figure.layout.annotations[0].text


class TestSparkline:
    def test_rises_with_the_gap_on_an_axis_that_is_every_runs(self) -> None:
        def end(values: list[float]) -> float:
            return float(sparkline(values).partition('cy="')[2].partition('"')[0])

        assert end([0.001, 10.0]) < end([0.001, 0.1]) < end([0.1, 0.001])

    def test_nan_has_a_sign_and_a_break(self) -> None:
        drawn = sparkline([0.1, NAN, 0.1])
        assert 'class="alarm"' in drawn
        assert drawn.count("M") >= 2

    def test_without_numbers_there_is_none(self) -> None:
        assert sparkline([]) == sparkline([None, NAN]) == ""


class TestInView:
    def test_a_range_and_a_mark_are_put_on_every_x_axis(self) -> None:
        figure = moment_views.moments(series(range(100), mu_b=0, mu=0, sigma_b=1, sigma=1))
        seen = in_view(figure, Steps(10, 20, (12, 15)), LIGHT)
        assert [tuple(axis.range) for axis in (seen.layout.xaxis, seen.layout.xaxis2)] == [(10, 20)] * 2
        assert [(shape.x0, shape.x1, shape.yref) for shape in seen.layout.shapes] == [
            (12, 15, "y domain"),
            (12, 15, "y2 domain"),
        ]

    def test_another_range_takes_the_place_of_a_zoom_and_the_same_does_not(self) -> None:
        def revision(steps: Steps) -> str:
            figure = moment_views.moments(series(range(9), mu_b=0, mu=0, sigma_b=1, sigma=1))
            return str(in_view(figure, steps, LIGHT).layout.xaxis.uirevision)

        assert revision(Steps(1, 5)) == revision(Steps(1, 5)) != revision(Steps(2, 5))

    def test_a_phase_that_began_before_still_has_its_name(self) -> None:
        run = series(range(100), **dict.fromkeys(schedules.STATISTICS, 1.0)).model_copy(update={"layer": None})
        seen = in_view(schedules.schedule_view(run), Steps(50, 90), LIGHT)
        (name,) = [text for text in seen.layout.annotations if text.text == "full"]
        assert name.x == 50

    def test_a_figure_without_data_stays_as_it_is(self) -> None:
        assert not in_view(without_data("none", LIGHT, height=90), Steps(1, 2, (1, 2)), LIGHT).layout.shapes


def test_rolling_means_look_back_and_leave_what_is_missing() -> None:
    np.testing.assert_allclose(rolling(np.array([1.0, 3, NAN, 5]), 2), [1, 2, NAN, 5])


def test_smoothed_scalars_keep_their_points_faint() -> None:
    own = ScalarSeries(steps=[1, 2, 3], min=[1, 2, 3], mean=[1, 2, 3], max=[1, 2, 3])
    answer = Scalars(run="r", names=["loss"], bucket_steps=1, series={"loss": own})
    figure = scalar_panels(answer, smooth=2)
    assert trace(figure, "as recorded").y.tolist() == [1, 2, 3]
    assert trace(figure, "loss").y.tolist() == [1, 1.5, 2.5]
    assert "means over 2 points" in figure.layout.meta["caption"]
