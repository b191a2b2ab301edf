"""Settings of the service: environment variables `BRN_SERVICE_*`, overridden by command-line flags in `__main__`."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Final, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, field_validator, model_validator
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
    cluster: str = Field(
        default="",
        pattern=r"^\w*$",
        description="Name of the ClickHouse cluster (in its `remote_servers`) on whose servers the tables are made and "
        "replicated; unset: the one server of `BRN_SERVICE_STORE` keeps them alone.",
    )
    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8321, ge=0, le=65535, description="TCP port to listen on; 0 takes a free one.")
    token: SecretStr | None = Field(
        default=None,
        min_length=8,
        description="Bearer token that every /v1 request must carry; unset: no token, and only this machine is served.",
    )
    read_token: SecretStr | None = Field(
        default=None,
        min_length=8,
        description="A second bearer token, which may only read; wants `BRN_SERVICE_TOKEN` to be set too.",
    )
    published_on: str | None = Field(
        default=None,
        description="In a container: the host's address at which its port is published. If that is a loopback address "
        "no token is needed, whatever the address listened on.",
    )
    max_body_bytes: int = Field(
        default=16 * 2**20, ge=1024, description="Largest request body that is read, in bytes; larger ones get 413."
    )
    max_batch_bytes: int = Field(
        default=128 * 2**20,
        ge=2**16,
        description="Most memory one batch may take when decompressed, in bytes; larger ones get 413.",
    )
    queue_bytes: int = Field(
        default=256 * 2**20,
        ge=2**20,
        description="Most memory that batches on their way to the store may take together, in bytes; when it is taken, "
        "ranks get 429 and send again later.",
    )
    max_batch_rows: int = Field(default=500_000, ge=1, description="Most rows one batch may hold over all its tables.")
    min_free_bytes: int = Field(
        default=64 * 2**20,
        ge=0,
        description="Free space of an embedded store's disk below which batches get 507, in bytes: the engine needs "
        "some to merge and to delete.",
    )
    readers: int = Field(
        default=4, ge=1, le=64, description="Store connections for queries; more wait for a free one. Writing has one."
    )
    diagnosis_seconds: float = Field(
        default=1.0, ge=0, description="Least time between two background diagnoses of a run, in seconds."
    )
    webhook: SecretStr | None = Field(
        default=None,
        description="URL that gets a JSON post for every new warning of a run, tried again while it does not answer; "
        "unset: none.",
    )
    keep_days: float | None = Field(
        default=None,
        gt=0,
        description="A run to which nothing came for so many days is deleted with all its rows, unless it has the tag "
        "`keep`; unset: runs are kept.",
    )
    thin_days: float | None = Field(
        default=None,
        gt=0,
        description="Steps that came more than so many days ago are thinned out, unless their run has the tag `keep`; "
        "unset: every step is kept.",
    )
    thin_every: int = Field(
        default=10, ge=2, description="One in so many old steps is kept where they are thinned out."
    )
    events_seconds: float = Field(
        default=0.25, gt=0, description="Time between two looks for news on an event stream, in seconds."
    )
    event_streams: int = Field(
        default=256,
        ge=1,
        description="Most event streams that are open at once, one for each page that someone looks at; more get 503, "
        "and such a page asks again and again instead.",
    )
    shutdown_seconds: float = Field(
        default=5.0, gt=0, description="How long running requests may take to end when the process stops, in seconds."
    )
    client_requests_per_second: float = Field(
        default=500,
        gt=0,
        description="Requests that one address may send a second for good, twice as many at once; more get 429. Behind "
        "a proxy all clients share its address, unless `BRN_SERVICE_TRUSTED_PROXIES` names it.",
    )
    trusted_proxies: str = Field(
        default="",
        description="Addresses or networks of your own proxies, with commas: of a request from one of them the client "
        "is whom it adds to `X-Forwarded-For`. Unset: that header, which anybody can send, means nothing.",
    )
    access_log: bool = Field(
        default=False, description="Log every request as one line of JSON: address, method, path, status, seconds."
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
            if _is_server_address(value):
                return value
            # nothing of it is repeated: what cannot be taken apart may hold a password anywhere
            raise ValueError(
                "must be clickhouse://user:password@host:port/database with nothing after it; "
                "write / ? # @ in a password as %2F %3F %23 %40"
            )
        raise ValueError(
            "must be chdb://PATH or clickhouse://user:password@host:port/database, "
            f"got a text that starts with {value.partition('://')[0][:20]!r}"  # not all of it: it may hold a password
        )

    @field_validator("trusted_proxies")
    @classmethod
    def _are_networks(cls, value: str) -> str:
        for one in filter(None, (part.strip() for part in value.split(","))):
            try:
                ip_network(one)
            except ValueError as error:  # nor `*`: who trusts everybody believes any client
                raise ValueError(f"must be addresses or networks like 127.0.0.1, 10.0.0.0/8, got {one!r}") from error
        return value

    @field_validator("webhook")
    @classmethod
    def _is_url(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or value.get_secret_value().startswith(("http://", "https://")):
            return value
        raise ValueError("must be a URL that begins with http:// or https://")

    @model_validator(mode="after")
    def _read_token_is_another(self) -> Self:
        if self.read_token is not None and (self.token is None or self.read_token == self.token):
            raise ValueError("the token that may only read wants another one that may write (BRN_SERVICE_TOKEN)")
        return self

    @model_validator(mode="after")
    def _cluster_wants_a_server(self) -> Self:
        if self.cluster and self.store_path is not None:
            raise ValueError("BRN_SERVICE_CLUSTER wants a server: set BRN_SERVICE_STORE to clickhouse://...")
        return self

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
    def is_exposed(self) -> bool:
        """Whether other machines can reach the address listened on."""
        return not _is_loopback(self.published_on or self.host)


def _is_server_address(store: str) -> bool:
    try:
        parts = urlsplit(store)
        _ = parts.port  # raises where it is none
    except ValueError:
        return False
    return parts.netloc.count("@") <= 1 and not set(parts.path[1:]) & {"/", "@"} and not set(store) & {"?", "#"}


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False
