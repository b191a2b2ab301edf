"""What `brn-train` can be told, in one typed class: the flag `--batch-size 32` and `BRN_BATCH_SIZE=32` are the same."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict, SettingsError

from brn_core.wire import RUN_ID_PATTERN, RunId

Probability = Annotated[float, Field(gt=0, le=1)]


class Settings(BaseSettings):
    """Train a network with batch normalization or Batch Renormalization and stream what the normalization does.

    Every flag can be given as an environment variable too: --batch-size 32 is BRN_BATCH_SIZE=32. The flag wins.
    """

    model_config = SettingsConfigDict(
        env_prefix="BRN_",
        env_ignore_empty=True,
        frozen=True,
        cli_prog_name="brn-train",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
    )

    # -- what is trained
    dataset: Literal["digits", "synthetic"] = Field(
        "digits", description="digits: 1,797 real 8x8 images that scikit-learn brings; synthetic: made images."
    )
    image_channels: int = Field(3, ge=1, description="Channels of a synthetic image.")
    image_size: int = Field(32, ge=2, description="Height and width of a synthetic image, in pixels.")
    sampler: Literal["iid", "few-labels"] = Field(
        "iid", description="How a batch is drawn. few-labels: every batch holds --labels-per-batch random classes."
    )
    labels_per_batch: int = Field(2, ge=1, description="Classes in a batch of the few-labels sampler.")
    norm: Literal["bn", "brn"] = Field("brn", description="Batch normalization or Batch Renormalization.")
    norm_momentum: Probability = Field(
        0.1, description="alpha, the weight of a new batch in the moving statistics (time constant 1/alpha steps)."
    )

    # -- how it is trained
    steps: int = Field(1_000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Samples that one rank normalizes together.")
    lr: float = Field(
        0.05, gt=0, allow_inf_nan=False, description="Learning rate at step 0; it follows a cosine to zero."
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(5e-4, ge=0, allow_inf_nan=False, description="Weight decay of SGD.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seeds weights and batches; same seed, same run (on the CPU).")
    eval_every: int = Field(100, ge=0, description="Steps between evaluations of the test split; 0: at the end only.")
    ranks: int = Field(
        1,
        ge=0,
        le=64,
        description="Processes to train with on this host; 0: one for each CUDA device. Not with torchrun.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if there is one, else the CPU.")

    # -- the limits of r and d
    r_max: float = Field(3.0, ge=1, allow_inf_nan=False, description="Final limit of r (and 1/r).")
    d_max: float = Field(5.0, ge=0, allow_inf_nan=False, description="Final limit of |d|.")
    bn_steps: int | None = Field(None, ge=0, description="Steps with r_max = 1, d_max = 0. Default: by --steps.")
    r_steps: int | None = Field(None, ge=0, description="Step that reaches --r-max. Default: by --steps.")
    d_steps: int | None = Field(None, ge=0, description="Step that reaches --d-max. Default: by --steps.")

    # -- where it is recorded
    url: str = Field("http://127.0.0.1:8321", description="The service that takes the rows.")
    token: str | None = Field(None, repr=False, description="Bearer token of the service, where it wants one.")
    run_name: str | None = Field(None, max_length=200, description="Name of the run. Default: by its settings.")
    run_id: RunId | None = Field(None, description="Id of the run in the service. Default: a new one.")
    spool: str = Field(".brn/spool", description="Folder that keeps rows while the service does not answer.")
    record_every: int = Field(1, ge=0, description="Record every n-th step; 0: record nothing.")
    shadow_every: int = Field(50, ge=0, description="Steps between inference-mode passes of a batch; 0: none.")
    summary: bool = Field(True, description="Print accuracy and findings at the end.")

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.sampler == "few-labels" and self.labels_per_batch > self.batch_size:
            raise ValueError(
                f"labels_per_batch must be <= batch_size, got {self.labels_per_batch} labels in {self.batch_size}"
            )
        if not re.match(r"https?://[^/]", self.url):
            raise ValueError(f"url must begin with http:// or https:// and a host, got {self.url!r}")
        return self

    @property
    def name(self) -> str:
        """What the run is called where the user gave no name: `digits brn, 2 labels a batch of 32`."""
        if self.run_name:
            return self.run_name
        batches = "i.i.d. batches" if self.sampler == "iid" else f"{self.labels_per_batch} labels a batch"
        return f"{self.dataset} {self.norm}, {batches} of {self.batch_size}"

    def recorded(self) -> dict[str, Any]:
        """What is stored with the run: all but secrets and this machine's own addresses and folders."""
        return self.model_dump(mode="json", exclude={"token", "url", "spool", "summary", "run_id", "run_name"})


class UsageError(Exception):
    """Settings that cannot be: one line that says which, what was got and what is allowed."""


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Settings from command-line arguments and the environment.

    Raises:
        UsageError: an unknown flag or a value that does not fit; one line.
        SystemExit: the arguments asked for help.
    """
    try:
        return CliApp.run(Settings, cli_args=list(arguments), cli_exit_on_error=False)
    except ValidationError as error:
        raise UsageError("; ".join(_sentence(part) for part in error.errors())) from None
    except SettingsError as error:
        message = str(error).removeprefix("error parsing CLI: ")
        raise UsageError(f"{message}{_suggestion(message)}") from None


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def _sentence(error: Any) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    if not error["loc"]:
        return message
    field = str(error["loc"][0])
    if error["type"] == "string_pattern_mismatch":
        message = f"must match {RUN_ID_PATTERN}"
    return f"{flag(field)} (BRN_{field.upper()}): {message[0].lower()}{message[1:]}, got {error['input']!r}"


def _suggestion(message: str) -> str:
    unknown = re.search(r"unrecognized arguments: (--\S+)", message)
    if unknown is None:
        return "; --help lists all flags"
    near = difflib.get_close_matches(unknown[1], [flag(name) for name in Settings.model_fields], n=1)
    return f"; did you mean {near[0]}? --help lists all flags" if near else "; --help lists all flags"
