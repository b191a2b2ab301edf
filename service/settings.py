"""Settings of the service: environment variables `BRN_SERVICE_*`, overridden by command-line flags in `__main__`."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Final

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

EMBEDDED: Final = "chdb://"
SERVER: Final = ("clickhouse://", "clickhouses://")


class Settings(BaseSettings):
    """Where the service listens, where it stores, and what it accepts. Read once at start and passed down."""

    model_config = SettingsConfigDict(env_prefix="BRN_SERVICE_", frozen=True, extra="forbid", env_ignore_empty=True)

    store: str = Field(
        default="chdb://.brn/store",
        description="Where rows live: `chdb://PATH` (embedded, relative or absolute directory) or "
        "`clickhouse://user:password@host:8123/database` (`clickhouses://` for TLS).",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8321, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    token: SecretStr | None = Field(
        default=None,
        min_length=8,
        description="Bearer token that every /v1 request must carry; unset: no token, and only this machine is served.",
    )
    trusted_network: bool = Field(
        default=False,
        description="Listen beyond this machine without a token. For a container whose port is published to "
        "127.0.0.1 only.",
    )
    max_body_bytes: int = Field(
        default=16 * 2**20, ge=1024, description="Largest request body that is read, in bytes; larger ones get 413."
    )
    max_batch_rows: int = Field(default=500_000, ge=1, description="Most rows one batch may hold over all its tables.")
    readers: int = Field(
        default=4, ge=1, le=64, description="Store connections for queries; more wait for a free one. Writing has one."
    )
    diagnosis_seconds: float = Field(
        default=1.0, ge=0, description="Least time between two background diagnoses of a run, in seconds."
    )
    events_seconds: float = Field(
        default=0.25, gt=0, description="Time between two looks for news on an event stream, in seconds."
    )
    shutdown_seconds: float = Field(
        default=5.0, gt=0, description="How long running requests may take to end when the process stops, in seconds."
    )
    log_level: str = Field(
        default="info", pattern="^(debug|info|warning|error)$", description="Least severe log line that is written."
    )

    @field_validator("store")
    @classmethod
    def _known_store(cls, value: str) -> str:
        if value.startswith(EMBEDDED) and value.removeprefix(EMBEDDED).strip("/"):
            return value
        if value.startswith(SERVER):
            return value
        raise ValueError(
            "must be chdb://PATH or clickhouse://user:password@host:port/database, "
            f"got a text that starts with {value.partition('://')[0][:20]!r}"  # not all of it: it may hold a password
        )

    @property
    def store_path(self) -> Path | None:
        """Directory of the embedded store; None where a server keeps the rows."""
        return Path(self.store.removeprefix(EMBEDDED)) if self.store.startswith(EMBEDDED) else None

    @property
    def store_shown(self) -> str:
        """The store's address without user and password, for people to read."""
        scheme, _, rest = self.store.partition("://")
        return f"{scheme}://{rest.rpartition('@')[2]}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address listened on."""
        if self.host == "localhost":
            return True
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return False
