"""What `brn-train` can be told, in one typed class.

The flag `--batch-size 32`, the environment's `BRN_BATCH_SIZE=32` and a line `batch_size: 32` in the file of `--config`
say the same; where they differ the flag wins, then the environment, then the file.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from brn_core.wire import RUN_ID_PATTERN, RunId, text_without_secrets, url_without_user
from brn_core.worker.faults import FAULTS, FaultName

SamplerKind = Literal[
    "iid", "few-labels", "label-groups", "stratified", "sorted", "dirichlet", "rank-skewed", "duplicates"
]
DatasetName = Literal["digits", "digit-pairs", "synthetic", "cifar10", "cifar100", "imagefolder"]
NormKind = Literal["bn", "brn", "syncbn", "gn", "frozen", "ema"]
AmpKind = Literal["none", "bf16", "fp16"]
Probability = Annotated[float, Field(gt=0, le=1)]

_ELSEWHERE: Final = {"token", "url", "data", "spool", "sync", "summary", "run_id", "run_name", "tags"} | {
    "paper",
    "seeds",
    "regimes",
    "output",
    "config",
    "dump_config",
    "checkpoint",
    "checkpoint_every",
    "resume",
}
"""Settings that say where things lie and what is shown, not what is trained; one is secret."""


class Settings(BaseSettings):
    """Train a network with batch normalization or Batch Renormalization and stream what the normalization does.

    Every flag can be given as an environment variable (--batch-size 32 is BRN_BATCH_SIZE=32) and in a YAML file
    (batch_size: 32) too. The flag wins, then the environment.
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

    fault: FaultName | None = Field(
        None,
        description="Train so that the service finds this: settings below change to what provokes it, unless given.",
    )

    # -- what is trained
    dataset: DatasetName = Field(
        "digits",
        description="digits: 1,797 real 8x8 images that scikit-learn brings. digit-pairs: two of them as two channels, "
        "100 classes. synthetic: made images. cifar10, cifar100, imagefolder: files in --data; nothing is downloaded.",
    )
    data: str = Field(
        "data",
        description="Folder of the files: cifar-10-batches-py or cifar-100-python as unpacked, or one that holds them; "
        "for imagefolder one with train/CLASS/* and val/CLASS/*.",
    )
    image_channels: int = Field(3, ge=1, description="Channels of a synthetic image.")
    image_size: int = Field(32, ge=2, description="Height and width of a synthetic or imagefolder image, in pixels.")
    model: str = Field(
        "small",
        description="small: three convolutions. resnet20, resnet56, ...: the residual networks for CIFAR. "
        "torchvision:NAME, timm:NAME: theirs, where installed.",
    )
    sampler: SamplerKind = Field(
        "iid",
        description="How a batch is drawn. iid: at random. few-labels: --labels-per-batch random classes in equal "
        "parts. label-groups: groups of --group-size samples that share a label, 16 x 2 in a batch of 32. stratified: "
        "all classes in equal parts. sorted: class after class, through --shuffle-buffer. "
        "dirichlet: class shares that change from batch to batch. rank-skewed: each rank has classes of its own. "
        "duplicates: every sample --copies times.",
    )
    labels_per_batch: int = Field(2, ge=1, description="Classes in a batch of the few-labels sampler.")
    group_size: int = Field(2, ge=1, description="Samples that share a label, of the label-groups sampler.")
    shuffle_buffer: int = Field(1, ge=1, description="Samples that the sorted sampler shuffles through; 1: none.")
    concentration: float = Field(
        0.3, gt=0, allow_inf_nan=False, description="Of the dirichlet sampler; towards 0 a batch has one class."
    )
    own_share: float = Field(
        1.0, ge=0, le=1, description="Share of a rank-skewed batch that is of the rank's own classes."
    )
    copies: int = Field(4, ge=1, description="Copies of a sample in a batch of the duplicates sampler.")
    norm: NormKind = Field(
        "brn",
        description="bn: batch normalization. brn: Batch Renormalization. syncbn: batch normalization over all ranks. "
        "gn: group normalization. frozen: statistics that never move. ema: moving statistics in training too.",
    )
    norm_sync: Literal["ema", "moments", "none"] = Field(
        "ema",
        description="Of brn over the ranks. ema: each normalizes its own batch, moving statistics are averaged. "
        "moments: all normalize together. none: each for itself.",
    )
    virtual_batch_size: int | None = Field(
        None, ge=1, description="Samples that bn or brn normalize together. Default: the batch."
    )
    norm_momentum: Probability = Field(
        0.1, description="alpha, the weight of a new batch in the moving statistics (time constant 1/alpha steps)."
    )

    # -- how it is trained
    steps: int = Field(1_000, ge=1, description="Optimizer steps.")
    batch_size: int = Field(32, ge=1, description="Samples that one rank normalizes together.")
    accumulate: int = Field(
        1,
        ge=1,
        le=64,
        description="Batches whose mean gradient makes one optimizer step; each is normalized by itself.",
    )
    lr: float = Field(
        0.05, gt=0, allow_inf_nan=False, description="Highest learning rate; it follows a cosine to zero."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps in which the learning rate rises to --lr first.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    weight_decay: float = Field(5e-4, ge=0, allow_inf_nan=False, description="Weight decay of SGD.")
    weight_ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay of a moving average of weights and moving statistics, which is then what is evaluated; "
        "for example 0.999. Default: none.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seeds weights and batches; same seed, same run (on the CPU).")
    eval_every: int = Field(100, ge=0, description="Steps between evaluations of the test split; 0: at the end only.")
    ranks: int = Field(
        1,
        ge=0,
        le=64,
        description="Processes to train with on this host; 0: one for each CUDA device. Not with torchrun.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: CUDA if there is one, else the CPU.")
    amp: AmpKind = Field(
        "none", description="Mixed precision. bf16: on the CPU and on newer GPUs. fp16: with a loss scale, on CUDA."
    )
    channels_last: bool = Field(False, description="Keep images as NHWC in memory: faster with --amp on CUDA.")
    compile: bool = Field(False, description="Compile the network with torch.compile.")

    # -- the paper's comparison
    paper: bool = Field(
        False,
        description="Train every regime of the Batch Renormalization paper under every normalization that is compared "
        "there, and print a table. Recorded where --url is given. All other settings hold for every run.",
    )
    seeds: int = Field(5, ge=1, description="Seeds of every row of that table: --seed and the next ones.")
    regimes: str = Field("all", description="Regimes of that table, by name with commas between; all: all of them.")
    output: str | None = Field(None, description="File for that table: .md, or .json with every run.")

    # -- the limits of r and d
    r_max: float = Field(3.0, ge=1, allow_inf_nan=False, description="Final limit of r (and 1/r).")
    d_max: float = Field(5.0, ge=0, allow_inf_nan=False, description="Final limit of |d|.")
    bn_steps: int | None = Field(None, ge=0, description="Steps with r_max = 1, d_max = 0. Default: by --steps.")
    r_steps: int | None = Field(None, ge=0, description="Step that reaches --r-max. Default: by --steps.")
    d_steps: int | None = Field(None, ge=0, description="Step that reaches --d-max. Default: by --steps.")

    # -- what is kept
    checkpoint: str | None = Field(
        None, description="Folder for checkpoints, shared by all hosts. Default: none are written."
    )
    checkpoint_every: int = Field(500, ge=1, description="Steps between checkpoints; there is one at the end as well.")
    resume: bool = Field(False, description="Go on from the checkpoint in --checkpoint; without one, start.")
    config: str | None = Field(None, description="YAML file of settings; flags and environment win over it.")
    dump_config: bool = Field(False, description="Print the settings but the token as YAML for --config, and end.")

    # -- where it is recorded
    url: str = Field("http://127.0.0.1:8321", description="The service that takes the rows.")
    token: str | None = Field(None, repr=False, description="Bearer token of the service, where it wants one.")
    run_name: str | None = Field(None, max_length=200, description="Name of the run. Default: by its settings.")
    run_id: RunId | None = Field(None, description="Id of the run in the service. Default: a new one.")
    tags: str = Field("", description="Labels of the run in the service, with commas between.")
    spool: str = Field(".brn/spool", description="Folder that keeps rows while the service does not answer.")
    sync: str | None = Field(None, description="Send what this spool folder holds to --url, and end: trains nothing.")
    record_every: int = Field(1, ge=0, description="Record every n-th step; 0: record nothing.")
    shadow_every: int = Field(50, ge=0, description="Steps between inference-mode passes of a batch; 0: none.")
    summary: bool = Field(True, description="Print accuracy and findings at the end.")

    @model_validator(mode="before")
    @classmethod
    def _of_fault(cls, given: dict[str, Any]) -> dict[str, Any]:
        name = given.get("fault")
        fault = FAULTS.get(name) if isinstance(name, str) else None
        return given if fault is None else {**fault.settings, **given}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.sampler == "few-labels" and self.labels_per_batch > self.batch_size:
            raise ValueError(
                f"labels_per_batch must be <= batch_size, got {self.labels_per_batch} labels in {self.batch_size}"
            )
        if self.virtual_batch_size is not None and self.norm not in ("bn", "brn"):
            raise ValueError(f"virtual_batch_size is for bn and brn, got norm {self.norm}")
        if self.virtual_batch_size is not None and self.norm == "brn" and self.norm_sync == "moments":
            raise ValueError("virtual_batch_size splits a batch and norm_sync moments joins batches: choose one")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps must be below steps, got {self.warmup_steps} of {self.steps}")
        if self.paper and self.checkpoint is not None:
            raise ValueError("paper trains many short runs and keeps no checkpoints: leave --checkpoint out")
        if self.resume and self.checkpoint is None:
            raise ValueError("resume goes on from a checkpoint: name its folder with --checkpoint")
        if not re.match(r"https?://[^/]", self.url):
            raise ValueError(
                f"url must begin with http:// or https:// and a host, got {text_without_secrets(self.url)!r}"
            )
        return self

    @property
    def name(self) -> str:
        """What the run is called where the user gave no name: `digits brn, 2 labels a batch of 32`."""
        if self.run_name:
            return self.run_name
        if self.fault:
            return f"fault {self.fault}"
        batches = {
            "iid": "i.i.d. batches",
            "few-labels": f"{self.labels_per_batch} labels a batch",
            "label-groups": f"groups of {self.group_size} with one label, batches",
            "stratified": "all labels in every batch",
            "sorted": "sorted by label" + f", shuffle buffer {self.shuffle_buffer}," * (self.shuffle_buffer > 1),
            "dirichlet": f"Dirichlet({self.concentration:g}) batches",
            "rank-skewed": f"{self.own_share:.0%} own labels a rank, batches",
            "duplicates": f"{self.copies} copies of each sample, batches",
        }[self.sampler]
        microbatches = f" in microbatches of {self.virtual_batch_size}" if self.virtual_batch_size else ""
        return f"{self.dataset} {self.norm}, {batches} of {self.batch_size}{microbatches}"

    def recorded(self) -> dict[str, Any]:
        """What is stored with the run: all but secrets and this machine's own addresses and folders."""
        return self.model_dump(mode="json", exclude=_ELSEWHERE)

    def training(self) -> dict[str, Any]:
        """What a resumed training has in common with the one it continues: all that decides what is learned."""
        return self.model_dump(mode="json", exclude=_ELSEWHERE | {"device", "ranks"})

    def as_yaml(self) -> str:
        """A file for `--config` that reproduces the run: every setting but the token and a user in the URL.

        Address and number of ranks are left out where nobody gave them: `paper` does otherwise if they are given.
        """
        unsaid = {"url", "ranks"} - self.model_fields_set
        content = self.model_dump(mode="json", exclude={"token", "sync", "config", "dump_config"} | unsaid)
        if "url" in content:
            content["url"] = url_without_user(self.url)
        return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The first wins; pydantic-settings puts the flags before all. What the file says comes as init arguments."""
        return env_settings, init_settings


class UsageError(Exception):
    """Settings that cannot be: one line that says which, what was got and what is allowed."""


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Settings from command-line arguments, the environment and the file that either of them names.

    Raises:
        UsageError: an unknown flag, a value that does not fit, a file that cannot be; one line.
        SystemExit: the arguments asked for help.
    """
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--config", nargs="?")  # without a name it is CliApp that complains
    path = named.parse_known_args(arguments)[0].config or os.environ.get("BRN_CONFIG")
    given = _read_config(Path(path)) if path else {}
    try:
        return CliApp.run(Settings, cli_args=list(arguments), cli_exit_on_error=False, **given)
    except ValidationError as error:
        raise UsageError("; ".join(_sentence(part) for part in error.errors())) from None
    except SettingsError as error:
        message = str(error).removeprefix("error parsing CLI: ")
        raise UsageError(f"{message}{_suggestion(message)}") from None


def _read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, by field; those without a value are left out.

    Raises:
        UsageError: it cannot be read, or names what is no setting.
    """
    try:
        content = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"--config {path} must be lines of `setting: value`, got a {type(content).__name__}")
    given = {str(name).replace("-", "_"): value for name, value in content.items()}
    for name in given:
        if name not in Settings.model_fields or name in ("config", "dump_config"):
            near = difflib.get_close_matches(name, Settings.model_fields, n=1)
            raise UsageError(
                f"--config {path}: unknown setting {name}" + (f"; did you mean {near[0]}?" if near else "")
            )
    return {name: value for name, value in given.items() if value is not None}


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
