"""The schema trainer and service share: statistics, tables, and the records of a run. No torch here.

A *batch* is what one rank sends at once: a few tables (below), each an Arrow IPC stream whose schema metadata names
the table, one stream after the other in one request body. Rank and sequence number travel in the request, the run in
its path, so no row repeats them. `(run, rank, seq)` identifies a batch: the store takes each once.

Non-finite numbers are values (a diverging run is the run people look at); *missing* is null, never zero.
"""

from __future__ import annotations

import io
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Final, Literal

import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, StringConstraints

SCHEMA_VERSION: Final = 1

MEDIA_TYPE: Final = "application/vnd.apache.arrow.stream"

QUANTILES: Final = (0, 5, 25, 50, 75, 95, 100)
"""Percentiles over the channels of a layer at which r and d are recorded."""

PROBE_FEATURES: Final = 24
"""Fixed random features of the model's input: the first 8 linear, the other 16 rectified."""

Group = Literal["statistics", "correction", "gap", "noise", "health"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One statistic of one layer at one step on one rank: a column of the `layers` table.

    Attributes:
        name: column name, the name in REST queries.
        label: short text for an axis, with its unit.
        group: which selector group it belongs to.
        meaning: one sentence with the formula, over the layer's channels c.
        neutral: the value that means "no effect", or None where there is none.
        nullable: whether rows may lack it (its first steps, or a batch of one sample).
    """

    name: str
    label: str
    group: Group
    meaning: str
    neutral: float | None = None
    nullable: bool = False


def _quantile_metrics(symbol: str, formula: str, neutral: float) -> tuple[Metric, ...]:
    return tuple(
        Metric(
            f"{symbol}_q{q:02d}",
            f"{symbol}, {q}th percentile of channels",
            "correction",
            f"{q}th percentile over channels of the unclipped {symbol} = {formula}.",
            neutral,
        )
        for q in QUANTILES
    )


METRICS: Final[tuple[Metric, ...]] = (
    Metric("samples", "samples in the batch", "statistics", "N, the samples this rank normalized together."),
    Metric("mu_b", "mu_B, mean of channels", "statistics", "Mean over channels of the batch mean mu_B."),
    Metric(
        "sigma_b",
        "sigma_B, mean of channels",
        "statistics",
        "Mean over channels of the batch standard deviation sigma_B = sqrt(biased variance + eps).",
    ),
    Metric(
        "mu",
        "mu, mean of channels",
        "statistics",
        "Mean over channels of the moving mean, before the step's update.",
    ),
    Metric(
        "sigma",
        "sigma, mean of channels",
        "statistics",
        "Mean over channels of the moving standard deviation, before the step's update (eps included).",
    ),
    *_quantile_metrics("r", "sigma_B / sigma", 1.0),
    *_quantile_metrics("d", "(mu_B - mu) / sigma", 0.0),
    Metric(
        "r_min",
        "lower limit of r",
        "correction",
        "Lower limit of r in force at this step; 1 for batch normalization.",
        1.0,
    ),
    Metric(
        "r_max",
        "r_max",
        "correction",
        "Upper limit of r in force at this step; 1 for batch normalization.",
        1.0,
    ),
    Metric("d_max", "d_max", "correction", "Limit of |d| in force at this step; 0 for batch normalization.", 0.0),
    Metric(
        "clip_r",
        "channels with r clipped (share)",
        "correction",
        "Share of channels with r outside [r_min, r_max].",
        0.0,
    ),
    Metric("clip_d", "channels with d clipped (share)", "correction", "Share of channels with |d| > d_max.", 0.0),
    Metric(
        "gap",
        "train-inference gap (sigma²)",
        "gap",
        "Mean over channels of (r - 1)² + d²: how far inference is from batch normalization on this batch.",
        0.0,
    ),
    Metric(
        "residual",
        "gap left after clipping (sigma²)",
        "gap",
        "Mean over channels of (r - clip(r))² + (d - clip(d))²: the gap that the limits in force leave uncorrected.",
        0.0,
    ),
    Metric(
        "d_squared",
        "d², mean of channels",
        "gap",
        "Mean over channels of d²: the part of the gap from means.",
        0.0,
    ),
    Metric("log_r", "ln r, mean of channels", "gap", "Mean over channels of ln r: drift of scale.", 0.0),
    Metric(
        "mean_noise",
        "expected d² if i.i.d. (sampling noise)",
        "noise",
        "Mean over channels of s²_y / (N sigma²), s²_y the unbiased variance over samples of their spatial means.",
        0.0,
        nullable=True,
    ),
    Metric(
        "scale_noise",
        "expected (r - 1)² if i.i.d. (sampling noise)",
        "noise",
        "Mean over channels of kappa / 4N, kappa = Var_n(q_n) / sigma⁴, q_n the sample's mean of (x - mu_B)².",
        0.0,
        nullable=True,
    ),
    Metric(
        "mean_diff1",
        "fast variance of mu_B, first differences (sigma²)",
        "noise",
        "Mean over channels of (mu_B,t - mu_B,t-1)² / 2 sigma².",
        nullable=True,
    ),
    Metric(
        "mean_diff2",
        "fast variance of mu_B, second differences (sigma²)",
        "noise",
        "Mean over channels of (mu_B,t+1 - 2 mu_B,t + mu_B,t-1)² / 6 sigma²; a linear drift leaves it unchanged.",
        nullable=True,
    ),
    Metric(
        "scale_diff2",
        "fast variance of ln sigma_B, second differences",
        "noise",
        "Mean over channels of the squared second difference of ln sigma_B, / 6.",
        nullable=True,
    ),
    Metric(
        "adjacency_noise",
        "sampling noise from neighbouring samples",
        "noise",
        "Mean over channels of sum_n (y_n+1 - y_n)² / (2 (N - 1) N sigma²); mean_noise if order carries nothing.",
        nullable=True,
    ),
    Metric("dead_channels", "dead channels", "health", "Channels whose batch variance is below 100 eps.", 0.0),
    Metric(
        "nonfinite_channels",
        "non-finite channels",
        "health",
        "Channels whose mu_B or sigma_B is NaN or infinite.",
        0.0,
    ),
)

METRIC: Final[Mapping[str, Metric]] = {metric.name: metric for metric in METRICS}

_step = pa.field("step", pa.uint64(), nullable=False)
_layer = pa.field("layer", pa.uint16(), nullable=False)


def _vector(name: str) -> pa.Field:
    return pa.field(name, pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False)


TABLES: Final[Mapping[str, pa.Schema]] = {
    # one row a layer and recorded step
    "layers": pa.schema([_step, _layer, *(pa.field(m.name, pa.float32(), nullable=m.nullable) for m in METRICS)]),
    # one row a recorded step: each vector has PROBE_FEATURES entries. Over the samples n of the batch, y_n a feature:
    # mean = mean of y_n; var = unbiased variance of y_n; adjacency = sum_n (y_n+1 - y_n)² / (2 (N - 1))
    "probe": pa.schema(
        [
            _step,
            pa.field("samples", pa.uint32(), nullable=False),
            _vector("mean"),
            _vector("var"),
            _vector("adjacency"),
        ]
    ),
    # one row a value; names are the user's, those starting with "brn/" are ours (SCALAR_* below)
    "scalars": pa.schema(
        [
            _step,
            pa.field("name", pa.string(), nullable=False),
            pa.field("value", pa.float64(), nullable=False),
        ]
    ),
    # one row a layer and snapshot: each vector has one entry a channel
    "channels": pa.schema([_step, _layer, *map(_vector, ("mu_b", "sigma_b", "between_var", "mu", "sigma", "r", "d"))]),
}
"""Arrow schema of each table a batch may hold."""

# The shadow pass: the same batch, same weights, once as trained and once in inference mode.
SCALAR_SHADOW_TRAIN_LOSS: Final = "brn/shadow_train_loss"
SCALAR_SHADOW_EVAL_LOSS: Final = "brn/shadow_eval_loss"
SCALAR_SHADOW_DISAGREEMENT: Final = "brn/shadow_disagreement"
# The recorder's own account: seconds between calls of step(), and recorded steps that were dropped so far.
SCALAR_STEP_TIME: Final = "brn/step_time_seconds"
SCALAR_DROPPED: Final = "brn/dropped_steps"

MAX_SCALAR_NAME: Final = 200
"""Most characters of a scalar's name; at least one."""

MAX_FAILURE: Final = 500
"""Most characters of what is said of a failed run."""

MAX_NOTES: Final = 10_000
"""Most characters of a run's notes."""

RUN_ID_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
RunId = Annotated[str, StringConstraints(pattern=RUN_ID_PATTERN)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=200, strip_whitespace=True)]
Tag = Annotated[str, StringConstraints(min_length=1, max_length=60, strip_whitespace=True)]
LayerKind = Literal["BatchRenorm", "BatchNorm", "SyncBatchNorm"]
_Count = Annotated[int, Field(ge=0)]
DroppedByRank = dict[_Count, _Count]
DroppedByProcess = dict[_Count, dict[_Count, _Count]]
RunStatus = Literal["running", "finished", "failed"]


HIDDEN: Final = "(hidden)"

# Names whose values are secret. A number stays under most of them: `tokens` may count, `pass` may be the third of five.
_SECRET_ALWAYS: Final = re.compile(r"secret|credential|(?:^|_)(?:\w*passwords?|passwd|pwd|passphrases?)$")
_SECRET_TEXT: Final = re.compile(
    r"(?:api|access|private|encryption|signing|auth|license|ssh)_?key"
    r"|(?:^|_)(?:\w*token|pass|auth|authorization|bearer|cookies?)$"
    r"|(?:^|(?:api|auth|access|refresh|bearer)_)tokens$"
)
# `sort_key` and `image_key` name what is looked up: under other keys only what looks like a key is hidden.
_OTHER_KEY: Final = re.compile(r"_key$")
_LIKE_A_KEY: Final = re.compile(r"\S{16,}")
_SPECIAL_TOKEN: Final = re.compile(r"[<\[].*[>\]]")  # a tokenizer's "pad_token": "<pad>" is none
# A password may hold a slash, but `host:80/path@2` has none. Lengths are bounded: any text takes linear time.
_USER_IN_URL: Final = re.compile(r"(?<=://)(?:[^/@\s]{1,500}|[^/@:\s]{0,200}:(?!\d+/)[^@?#\s]{0,300})@")
_ASSIGNMENT: Final = re.compile(r"(?<![\w.-])(-{0,2}[A-Za-z_][\w.-]{0,60}=|--?[A-Za-z_][\w.-]{0,60} +)([^\s&#\"',;]+)")
_BEARER: Final = re.compile(r"(\bbearer +)[\w.~+/=-]{8,}", re.IGNORECASE)

_Shown = Literal["all", "no keys", "numbers", "nothing"]


def without_secrets(config: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """A run's settings without what should not be stored: all that stands below a name like `api_key`, `passwords` or
    `credentials`, and in texts what `text_without_secrets` hides.
    """
    return {name: _without_secrets(value, _shown(name)) for name, value in config.items()}


def text_without_secrets(text: str) -> str:
    """A text without users and passwords in URLs, values after names like `?token=` or `--api-key`, bearer tokens."""
    text = _BEARER.sub(rf"\1{HIDDEN}", _USER_IN_URL.sub(f"{HIDDEN}@", text))
    return _ASSIGNMENT.sub(_assignment_without_secret, text)


def url_without_user(url: str) -> str:
    """A URL as it may be shown: without user and password."""
    return _USER_IN_URL.sub("", url)


def _shown(name: str) -> _Shown:
    """What may be shown of the value of a name."""
    plain = re.sub(r"\W", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)).lower()
    if _SECRET_ALWAYS.search(plain):
        return "nothing"
    if _SECRET_TEXT.search(plain):
        return "numbers"
    return "no keys" if _OTHER_KEY.search(plain) else "all"


def _assignment_without_secret(found: re.Match[str]) -> str:
    name, value = found.groups()
    shown = _shown(name.strip("-= "))
    return f"{name}{HIDDEN}" if _is_hidden(value, shown) else found[0]


def _is_hidden(text: str, shown: _Shown) -> bool:
    match shown:
        case "all":
            return False
        case "no keys":
            return _LIKE_A_KEY.fullmatch(text) is not None
        case "numbers":
            return not _SPECIAL_TOKEN.fullmatch(text)
        case "nothing":
            return True


def _without_secrets(value: JsonValue, shown: _Shown) -> JsonValue:
    match value:
        case dict():
            return {
                name: _without_secrets(one, _shown(name) if shown in ("all", "no keys") else shown)
                for name, one in value.items()
            }
        case list():
            flags = [one if isinstance(one, str) and one.startswith("-") else "" for one in ["", *value]]
            # ["--token", "..."]: the name stands before its value
            return [
                _without_secrets(one, _shown(flag.lstrip("-")) if shown == "all" and not own else shown)
                for flag, own, one in zip(flags, flags[1:], value, strict=False)
            ]
        case None | bool() | "":
            return value
        case str() if shown in ("all", "no keys") and not _is_hidden(value, shown):
            return text_without_secrets(value)
        case str() if not _is_hidden(value, shown):
            return value
        case int() | float() if shown != "nothing":
            return value
        case _:
            return HIDDEN


# Hiding may lengthen a text by some signs: it is cut again.
Notes = Annotated[
    str, StringConstraints(max_length=MAX_NOTES), AfterValidator(lambda text: text_without_secrets(text)[:MAX_NOTES])
]
Failure = Annotated[
    str,
    StringConstraints(max_length=MAX_FAILURE),
    AfterValidator(lambda text: text_without_secrets(text)[:MAX_FAILURE]),
]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Layer(_Record):
    """One normalization layer of a run, in the order of the network's modules."""

    index: int = Field(ge=0, lt=65536, description="Position in the network; the `layer` column of every row.")
    name: Name = Field(description="Module path, for example `layer3.0.bn1`.")
    kind: LayerKind
    channels: int = Field(ge=1, description="Number of normalized features.")
    eps: float = Field(ge=0, description="Added to the variance inside the root.")
    momentum: float | None = Field(
        description="Weight of the new batch in the moving statistics; null for a cumulative average."
    )


class Schedule(_Record):
    """The planned limits: batch norm until `bn_steps`, then linear to `r_max` and `d_max` (Ioffe 2017, section 4)."""

    bn_steps: int = Field(ge=0, description="Steps with r_max = 1 and d_max = 0.")
    r_steps: int = Field(ge=0, description="Step at which r_max is reached.")
    d_steps: int = Field(ge=0, description="Step at which d_max is reached.")
    r_max: float = Field(ge=1)
    d_max: float = Field(ge=0)


class RunCreate(_Record):
    """What a trainer says of its run before it sends rows. Saying it twice is harmless."""

    id: RunId
    name: Name
    world_size: int = Field(default=1, ge=1, description="Number of ranks that will send rows.")
    batch_size: int | None = Field(default=None, ge=1, description="Samples a rank and step.")
    planned_steps: int | None = Field(default=None, ge=1)
    schedule: Schedule | None = Field(default=None, description="Null where no schedule is planned.")
    config: Annotated[dict[str, JsonValue], AfterValidator(without_secrets)] = Field(
        default_factory=dict, description="The user's own settings; what looks like a secret is kept as `(hidden)`."
    )
    tags: tuple[Tag, ...] = ()
    notes: Notes = ""
    failure: Failure = Field(default="", description="Why the run failed, and which rank; said at its end.")
    dropped_steps: int = Field(
        default=0, ge=0, description="Recorded steps that will never be stored, of all ranks; said at their ends."
    )
    dropped_by_rank: DroppedByRank = Field(
        default_factory=dict, description="The same of each rank that said so.", exclude_if=operator.not_
    )
    dropped_by_process: DroppedByProcess = Field(
        default_factory=dict,
        description="The same of each rank's processes: a training that is resumed has several.",
        exclude_if=operator.not_,
    )
    layers: tuple[Layer, ...] = Field(default=(), max_length=65536)


class RunUpdate(_Record):
    """A change to a run: only what is given changes."""

    name: Name | None = None
    tags: tuple[Tag, ...] | None = None
    notes: Notes | None = None
    status: RunStatus | None = None
    failure: Failure | None = None
    dropped_by_process: DroppedByProcess | None = Field(
        default=None,
        description="Recorded steps that will never be stored, by rank and process, all that a process has dropped so "
        "far. A process is any number that no other process of the rank has.",
    )


def with_drops(known: DroppedByProcess, said: DroppedByProcess) -> DroppedByProcess:
    """What is known after one more word on drops: a process that says it again replaces what it said before."""
    return known | {rank: known.get(rank, {}) | own for rank, own in said.items()}


def updated(run: RunCreate, update: RunUpdate) -> RunCreate:
    """A run's record after an update, all but the status, which is no part of it."""
    changes = update.model_dump(exclude_none=True, exclude={"status", "dropped_by_process"})
    if update.dropped_by_process:
        by_process = with_drops(run.dropped_by_process, update.dropped_by_process)
        by_rank = {rank: sum(own.values()) for rank, own in by_process.items()}
        changes |= {
            "dropped_steps": sum(by_rank.values()),
            "dropped_by_rank": by_rank,
            "dropped_by_process": by_process,
        }
    return run.model_copy(update=changes)


_END_OF_STREAM: Final = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow IPC: continuation mark, length 0


class WireError(ValueError):
    """A batch that does not follow the schema; the text says where."""


def encode_batch(tables: Mapping[str, pa.RecordBatch | pa.Table]) -> bytes:
    """One request body from tables of the schema; empty tables are left out.

    Raises:
        WireError: a table's name or columns are not in the schema.
    """
    sink = io.BytesIO()
    for name, table in tables.items():
        if table.num_rows == 0:
            continue
        schema = TABLES.get(name)
        if schema is None or not table.schema.equals(schema):
            raise WireError(f"table {name!r} does not follow the schema of version {SCHEMA_VERSION}")
        tagged = schema.with_metadata({"table": name, "version": str(SCHEMA_VERSION)})
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(sink, tagged, options=options) as writer:
            writer.write(table.replace_schema_metadata(tagged.metadata))
    return sink.getvalue()


_READ_OPTIONS: Final = pa.ipc.IpcReadOptions(use_threads=False)
"""Columns of a batch are small: handing them to threads takes longer than decompressing them."""


def decode_batch(body: bytes) -> dict[str, pa.Table]:
    """The tables of a request body, by name.

    Raises:
        WireError: not Arrow, an unknown table, version or column, a wrong type, a null where none may be.
    """
    tables: dict[str, pa.Table] = {}
    source = pa.BufferReader(body)
    while source.tell() < len(body):
        try:
            with pa.ipc.open_stream(source, options=_READ_OPTIONS) as reader:
                metadata = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
                table = reader.read_all()
                table.validate(full=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise WireError(f"the body is not a sequence of Arrow IPC streams: {_first_line(error)}") from error
        if not body[: source.tell()].endswith(_END_OF_STREAM):
            raise WireError("the body is cut off: an Arrow IPC stream in it has no end mark")
        name, version = metadata.get("table"), metadata.get("version")
        if version != str(SCHEMA_VERSION):
            raise WireError(
                f"schema version {version!r} is not understood; this service takes version {SCHEMA_VERSION}"
            )
        if name is None or name not in TABLES:
            raise WireError(f"unknown table {name!r}; known: {', '.join(TABLES)}")
        if name in tables:
            raise WireError(f"table {name!r} stands twice in one batch")
        tables[name] = _checked(name, table)
    if not tables:
        raise WireError("the batch is empty: no Arrow IPC stream in the body")
    return tables


def _checked(name: str, table: pa.Table) -> pa.Table:
    expected = TABLES[name]
    if not table.schema.remove_metadata().equals(expected):
        missing = [f.name for f in expected if f.name not in table.schema.names]
        unknown = [n for n in table.schema.names if n not in expected.names]
        wrong = [
            f"{f.name}: {'twice' if len(found) > 1 else found[0].type}, not {f.type}"
            for f in expected
            if (found := [g for g in table.schema if g.name == f.name]) and not (len(found) == 1 and found[0].equals(f))
        ]
        raise WireError(f"table {name!r}: missing columns {missing}, unknown columns {unknown}, wrong types {wrong}")
    for field in expected:
        if not field.nullable and table.column(field.name).null_count:
            raise WireError(f"table {name!r}: column {field.name!r} holds null; a missing row is left out instead")
    return table


def _first_line(error: Exception) -> str:
    return re.split(r"[\r\n]", str(error), maxsplit=1)[0][:200]
