"""The routes below /v1 that answer questions, in JSON or, where a table fits, in Arrow."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Protocol

import pyarrow as pa
from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import StreamingResponse

from brn_core import wire
from service import answers, windows
from service.answers.comparison import Axis
from service.answers.files import MEDIA_TYPES, FileFormat
from service.routes import From, Points, Rank, RunPath, Stat, StoreOf, To, problems
from service.schemas import (
    Channels,
    Comparison,
    Findings,
    Heatmap,
    Layers,
    Probe,
    Ranks,
    Scalars,
    Series,
    Statistic,
    Statistics,
    Summary,
    WhatIf,
)

router = APIRouter(prefix="/v1", tags=["queries"], responses=problems(401, 422, 503))

Accept = Annotated[str, Header(description=f"{wire.MEDIA_TYPE} for Arrow with all digits, else JSON.")]
LayerIndex = Annotated[int | None, Query(ge=0, description="Index of a layer; left out: over all layers.")]

_OR_ARROW: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {wire.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}},
    **problems(404),
}


class _Tabular(Protocol):
    """An answer that has a table, too."""

    def model_dump_json(self) -> str: ...

    def table(self) -> pa.Table: ...


def _sent(answer: _Tabular, accept: str) -> Response:
    """The answer as asked for. Made here and not by FastAPI, which would check every number of it once more."""
    headers = {"Vary": "Accept"}
    if wire.MEDIA_TYPE not in accept:
        return Response(answer.model_dump_json(), media_type="application/json", headers=headers)
    table = answer.table()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return Response(sink.getvalue().to_pybytes(), media_type=wire.MEDIA_TYPE, headers=headers)


@router.get("/statistics", summary="What can be asked for: the statistics of a layer")
def list_statistics() -> Statistics:
    """Name, label, formula and neutral value of every statistic."""
    return Statistics(
        statistics=[
            Statistic(
                name=metric.name,
                label=metric.label,
                group=metric.group,
                meaning=metric.meaning,
                neutral=metric.neutral,
                nullable=metric.nullable,
            )
            for metric in wire.METRICS
        ]
    )


@router.get("/compare", summary="Runs beside each other", response_model=Comparison, responses=_OR_ARROW)
def get_comparison(
    store: StoreOf,
    run: Annotated[list[str], Query(description="Ids of 2 to 20 runs.")],
    stat: Annotated[list[str], Query(description="Names of statistics, see /v1/statistics.")],
    by: Annotated[Axis, Query(description="x: steps, or the fraction of the planned steps.")] = "step",
    layer: LayerIndex = None,
    rank: Rank = None,
    points: Points = 300,
    accept: Accept = "",
) -> Response:
    """Statistics on one axis; settings in which the runs differ; every scalar at the newest step of each."""
    return _sent(answers.compare(store, run, stat, by=by, layer=layer, rank=rank, points=points), accept)


@router.get("/runs/{run}/layers", summary="The run's normalization layers", responses=problems(404))
def get_layers(run: RunPath, store: StoreOf) -> Layers:
    return Layers(layers=answers.layers(store, run))


@router.get(
    "/runs/{run}/summary",
    summary="Every statistic of every layer, now",
    response_model=Summary,
    responses=_OR_ARROW,
)
def get_summary(run: RunPath, store: StoreOf, accept: Accept = "") -> Response:
    return _sent(answers.summary(store, run), accept)


@router.get("/runs/{run}/series", summary="Statistics over steps", response_model=Series, responses=_OR_ARROW)
def get_series(
    run: RunPath,
    store: StoreOf,
    stat: Annotated[list[str], Query(description="Names of statistics, see /v1/statistics.")],
    layer: LayerIndex = None,
    rank: Rank = None,
    from_step: From = None,
    to_step: To = None,
    points: Points = 500,
    accept: Accept = "",
) -> Response:
    """Minimum, mean and maximum a bucket of steps; the newest point is always in."""
    found = answers.series(
        store, run, stat, layer=layer, rank=rank, from_step=from_step, to_step=to_step, points=points
    )
    return _sent(found, accept)


@router.get("/runs/{run}/heatmap", summary="One statistic, layers x steps", response_model=Heatmap, responses=_OR_ARROW)
def get_heatmap(
    run: RunPath,
    store: StoreOf,
    stat: Stat,
    rank: Rank = None,
    from_step: From = None,
    to_step: To = None,
    points: Points = 300,
    accept: Accept = "",
) -> Response:
    found = answers.heatmap(store, run, stat, rank=rank, from_step=from_step, to_step=to_step, points=points)
    return _sent(found, accept)


@router.get(
    "/runs/{run}/scalars", summary="Loss and other scalars over steps", response_model=Scalars, responses=_OR_ARROW
)
def get_scalars(
    run: RunPath,
    store: StoreOf,
    name: Annotated[list[str] | None, Query(description="Names of scalars; left out: all.")] = None,
    rank: Rank = None,
    from_step: From = None,
    to_step: To = None,
    points: Points = 500,
    accept: Accept = "",
) -> Response:
    found = answers.scalars(store, run, name, rank=rank, from_step=from_step, to_step=to_step, points=points)
    return _sent(found, accept)


@router.get("/runs/{run}/probe", summary="The input probe over steps", response_model=Probe, responses=_OR_ARROW)
def get_probe(
    run: RunPath,
    store: StoreOf,
    rank: Rank = None,
    from_step: From = None,
    to_step: To = None,
    points: Points = 200,
    accept: Accept = "",
) -> Response:
    """What the data stream was like: the probe's features, and the ratios that the rules judge batches by."""
    found = answers.probe(store, run, rank=rank, from_step=from_step, to_step=to_step, points=points)
    return _sent(found, accept)


@router.get("/runs/{run}/ranks", summary="How far ranks differ, by layer", response_model=Ranks, responses=_OR_ARROW)
def get_ranks(
    run: RunPath, store: StoreOf, from_step: From = None, to_step: To = None, accept: Accept = ""
) -> Response:
    """Over a range of steps, the newest 100 recorded where none is given; and which ranks are behind or missing."""
    return _sent(answers.ranks(store, run, from_step=from_step, to_step=to_step), accept)


@router.get(
    "/runs/{run}/channels", summary="Snapshots of single channels", response_model=Channels, responses=_OR_ARROW
)
def get_channels(
    run: RunPath,
    store: StoreOf,
    layer: Annotated[int | None, Query(ge=0, description="Layer whose values are wanted; left out: none.")] = None,
    step: Annotated[int | None, Query(ge=0, description="Step of a snapshot; left out: the newest.")] = None,
    rank: Annotated[int | None, Query(ge=0, description="Left out: the lowest that took the snapshot.")] = None,
    worst: Annotated[int, Query(ge=0, le=1000, description="How many of the worst channels.")] = 20,
    accept: Accept = "",
) -> Response:
    return _sent(answers.channels(store, run, layer=layer, step=step, rank=rank, worst=worst), accept)


@router.get(
    "/runs/{run}/schedule", summary="What other limits would have clipped", response_model=WhatIf, responses=_OR_ARROW
)
def get_schedule(
    run: RunPath,
    store: StoreOf,
    r_max: Annotated[float, Query(ge=1, description="Upper limit of r to try.")] = 3.0,
    d_max: Annotated[float, Query(ge=0, description="Limit of |d| to try.")] = 5.0,
    rate: Annotated[float, Query(gt=0, lt=1, description="Share of channels that may be clipped.")] = 0.01,
    bn_steps: Annotated[
        int | None, Query(ge=0, lt=2**53, description="Steps of batch norm in the fit; left out: as planned.")
    ] = None,
    layer: LayerIndex = None,
    rank: Rank = None,
    from_step: From = None,
    to_step: To = None,
    points: Points = 200,
    accept: Accept = "",
) -> Response:
    """Clip rates for any limits, from stored percentiles and snapshots; the tightest limits under a rate."""
    found = answers.schedule(
        store,
        run,
        r_max=r_max,
        d_max=d_max,
        rate=rate,
        bn_steps=bn_steps,
        layer=layer,
        rank=rank,
        from_step=from_step,
        to_step=to_step,
        points=points,
    )
    return _sent(found, accept)


@router.get("/runs/{run}/findings", summary="What is wrong, why, what to do", responses=problems(404))
def get_findings(run: RunPath, store: StoreOf) -> Findings:
    """Verdict and findings with evidence and remedy, for the rows stored now."""
    return windows.diagnosis(store, run)


@router.get(
    "/runs/{run}/export",
    summary="A table as a file",
    response_class=StreamingResponse,
    responses={
        200: {"content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in MEDIA_TYPES.values()}},
        **problems(404),
    },
)
def get_export(
    run: RunPath,
    store: StoreOf,
    table: Annotated[Literal["layers", "probe", "scalars", "channels"], Query()] = "layers",
    file_format: Annotated[FileFormat, Query(alias="format")] = "parquet",
    from_step: From = None,
    to_step: To = None,
) -> StreamingResponse:
    """Every row in full precision, sent as it is read."""
    parts = answers.export(store, run, table, file_format, from_step=from_step, to_step=to_step)
    headers = {"Content-Disposition": f'attachment; filename="{run}-{table}.{file_format}"'}
    return StreamingResponse(parts, media_type=MEDIA_TYPES[file_format], headers=headers)
