from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings

API = Path(__file__).parents[2] / "docs" / "api.md"


def test_defaults_serve_this_machine_only_from_an_embedded_store() -> None:
    settings = Settings()
    assert not settings.is_exposed
    assert settings.store_path == Path(".brn/store")
    assert settings.token is None


def test_environment_sets_and_empty_variables_leave_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BRN_SERVICE_PORT", "9000")
    monkeypatch.setenv("BRN_SERVICE_TOKEN", "")
    settings = Settings()
    assert settings.port == 9000
    assert settings.token is None


@pytest.mark.parametrize("store", ["chdb://", "chdb:///", "sqlite:///x", "/tmp/x", "clickhouse:host"])
def test_unknown_stores_are_refused(store: str) -> None:
    with pytest.raises(ValidationError, match="must be chdb://PATH or clickhouse://"):
        Settings(store=store)


def test_a_refused_store_does_not_show_its_password() -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(store="postgres://me:hunter22@host/db")
    assert "hunter22" not in caught.value.errors()[0]["msg"]


def test_a_server_store_has_no_path_and_is_shown_without_its_password() -> None:
    settings = Settings(store="clickhouse://me:hunter22@host:8123/brn")
    assert settings.store_path is None
    assert settings.store_shown == "clickhouse://host:8123/brn"


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", False),
        ("::1", False),
        ("[::1]", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("::", True),
        ("my.host", True),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert Settings(host=host).is_exposed is expected
    # in a container it is the host's port that counts
    assert Settings(host="0.0.0.0", published_on=host).is_exposed is expected


def test_a_cluster_wants_a_server_and_a_plain_name() -> None:
    with pytest.raises(ValidationError, match="BRN_SERVICE_CLUSTER wants a server"):
        Settings(cluster="brn")
    with pytest.raises(ValidationError, match="cluster"):
        Settings(store="clickhouse://me:pw@host:8123/brn", cluster="a` b")


def test_a_token_is_not_shown_when_settings_are_printed() -> None:
    assert "correct horse" not in repr(Settings(token="correct horse"))


def test_every_setting_is_documented() -> None:
    text = API.read_text()
    missing = [name for name in Settings.model_fields if f"`BRN_SERVICE_{name.upper()}`" not in text]
    assert not missing


@pytest.mark.parametrize(
    "store",
    [
        "clickhouse://me:hun/ter22@host/brn",
        "clickhouse://me:1/ter22@host/brn",
        "clickhouse://me:1@ter22@host/brn",
        "clickhouse://host/brn?password=ter22",
        "clickhouse://me:hun#ter22@host/brn",
        "clickhouse://me:hun[ter22@host/brn",
    ],
)
def test_a_server_address_that_could_hide_a_password_is_refused_and_not_repeated(store: str) -> None:
    command = [sys.executable, "-m", "service", "--store", store]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "BRN_SERVICE_STORE" in ended.stderr
    assert "ter22" not in ended.stderr + ended.stdout


@pytest.mark.parametrize("proxies", ["*", "proxy.example", "127.0.0.1,*"])
def test_a_trusted_proxy_is_an_address_or_a_network(proxies: str) -> None:
    with pytest.raises(ValidationError, match="must be addresses or networks"):
        Settings(trusted_proxies=proxies)
