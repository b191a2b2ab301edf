"""Files and pages of deployment against the code: every setting, port, path, image and test they name exists."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from xml.etree import ElementTree

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic.alias_generators import to_camel

from brn_core.worker.ranks import _GRACE_SECONDS
from brn_core.worker.settings import Settings as TrainSettings
from service.errors import ServiceError
from service.settings import Settings

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SERVICE_NAMES = {f"BRN_SERVICE_{field.upper()}" for field in Settings.model_fields}
TRAIN_NAMES = {f"BRN_{field.upper()}" for field in TrainSettings.model_fields}
COMPOSE_NAMES = {"BRN_BIND", "BRN_PORT", "SERVICE_MEMORY", "WORKER_MEMORY", "CLICKHOUSE_MEMORY", "CLICKHOUSE_PASSWORD"}
"""Of the compose files alone."""
COMPOSE_FILES = ["docker-compose.yml", "docker-compose.cluster.yml"]
ANSWERED = {"BRN_SERVICE_STORE", "BRN_SERVICE_HOST", "BRN_SERVICE_PORT", "BRN_SERVICE_PUBLISHED_ON"} | {
    "BRN_SERVICE_CLUSTER",
    "BRN_URL", "BRN_TOKEN", "BRN_SPOOL", "BRN_DATA", "BRN_RANKS",
    "BRN_SYNC", "BRN_CONFIG", "BRN_DUMP_CONFIG", "BRN_PAPER", "BRN_SEEDS", "BRN_REGIMES", "BRN_OUTPUT",
}  # fmt: skip
"""Settings to which the compose files and images have an answer of their own, or which are for a command line."""
PORT = Settings.model_fields["port"].default


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def settings_of(image: str) -> set[str]:
    name = image.rpartition("/")[2].partition(":")[0]
    return {"brn-serve": SERVICE_NAMES, "brn-train": TRAIN_NAMES}[name]


@pytest.mark.parametrize("page", ["deploy.md", "operations.md", "security.md"])
def test_every_setting_that_a_page_names_exists(page: str) -> None:
    named = set(re.findall(r"\bBRN_[A-Z_]+\b", (DOCS / page).read_text(encoding="utf-8")))
    assert named
    assert named <= SERVICE_NAMES | TRAIN_NAMES | COMPOSE_NAMES


# -------- compose


class _Compose(yaml.SafeLoader):
    """YAML with compose's own tag: what is reset is empty."""


_Compose.add_constructor("!reset", lambda loader, node: [])


def compose(name: str) -> Any:
    return yaml.load((ROOT / name).read_text(encoding="utf-8"), Loader=_Compose)


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_a_compose_file_sets_nothing_but_settings_and_mounts_nothing_that_it_does_not_declare(name: str) -> None:
    file = compose(name)
    ours = {name: part for name, part in file["services"].items() if part["image"] in ("brn-serve", "brn-train")}
    assert len(ours) >= 2
    for part in ours.values():
        given = part["environment"]
        assert given.keys() <= settings_of(part["image"])
        own = given.keys() & ANSWERED
        handed_on = {name for name, value in given.items() if value is None}
        handed_on |= {name for name in given.keys() - own if str(given[name]).startswith(f"${{{name}:-")}
        assert handed_on == settings_of(part["image"]) - ANSWERED, "every other setting is handed on"
        assert (ROOT / part["build"]["dockerfile"]).is_file()
        assert part["read_only"]
        assert part["cap_drop"] == ["ALL"]
    mounted = set()
    for part in file["services"].values():
        assert set(part.get("depends_on", [])) <= file["services"].keys()
        for volume in part.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume).partition(":")[0]
            assert source in file["volumes"] or (ROOT / source).is_file()
            mounted.add(source)
        for port in part.get("ports", []):
            assert port.startswith("${BRN_BIND:-127.0.0.1}:"), "published on this machine alone, unless told otherwise"
            assert port.endswith(f":{PORT}")
    assert file["volumes"].keys() <= mounted
    worker = file["services"]["worker"]["environment"]["BRN_URL"]
    host, _, port = worker.removeprefix("http://").partition(":")
    assert host in file["services"]
    assert int(port) == PORT


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_what_a_compose_file_starts_may_be_left_running(name: str) -> None:
    for service, part in compose(name)["services"].items():
        assert part["restart"] in ("unless-stopped", "on-failure:3")
        assert int(part["logging"]["options"]["max-file"]) > 1, "logs are rotated"
        assert part["logging"]["options"]["max-size"]
        assert part["deploy"]["resources"]["limits"]["memory"]
        assert all("size=" in mount for mount in part.get("tmpfs", [])), "what lies in memory is limited"
        if service != "worker":  # a training has no port to ask: its process is its health
            assert part["healthcheck"]["test"]
        if part["image"].startswith("brn-"):
            assert int(part["stop_grace_period"].removesuffix("s")) > 2 * _GRACE_SECONDS
            assert part["deploy"]["resources"]["limits"]["pids"]


def test_both_compose_files_train_alike() -> None:
    one, other = (compose(name)["services"]["worker"] for name in COMPOSE_FILES)
    for part in (one, other):
        del part["depends_on"], part["environment"]["BRN_URL"]
    assert one == other


def test_the_file_for_hosts_without_a_gpu_takes_back_the_reservation_and_nothing_else() -> None:
    resources = {"reservations": {"devices": []}}
    assert compose("docker/cpu.yml") == {"services": {"worker": {"deploy": {"resources": resources}}}}


def test_the_example_of_the_environment_has_what_compose_files_ask_for_and_only_settings() -> None:
    read = {
        name for file in COMPOSE_FILES for name in re.findall(r"\$\{(\w+)", (ROOT / file).read_text(encoding="utf-8"))
    }
    example = set(re.findall(r"^(\w+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert read <= example
    assert example <= SERVICE_NAMES | TRAIN_NAMES | COMPOSE_NAMES
    assert example & COMPOSE_NAMES == COMPOSE_NAMES


def test_replicas_of_the_cluster_share_one_server_and_the_front_knows_them_all() -> None:
    services = compose("docker-compose.cluster.yml")["services"]
    replicas = {name: part for name, part in services.items() if part["image"] == "brn-serve"}
    assert len(replicas) == 2
    for part in replicas.values():
        store = part["environment"]["BRN_SERVICE_STORE"].replace("${CLICKHOUSE_PASSWORD:?set it in .env}", "secret")
        settings = Settings(store=store, cluster=part["environment"]["BRN_SERVICE_CLUSTER"])
        assert settings.store_path is None
        assert "secret" not in settings.store_shown
        assert settings.store_shown == "clickhouse://clickhouse:8123/brn"
    network = compose("docker-compose.cluster.yml")["networks"]["default"]["ipam"]["config"][0]
    address = services["front"]["networks"]["default"]["ipv4_address"]
    assert ip_address(address) in ip_network(network["subnet"])
    assert ip_address(address) not in ip_network(network["ip_range"]), "no other container may get it"
    for part in replicas.values():
        trusted = part["environment"]["BRN_SERVICE_TRUSTED_PROXIES"]
        assert trusted == f"${{BRN_SERVICE_TRUSTED_PROXIES:-{address}}}"
    front = (ROOT / "docker" / "cluster.nginx.conf").read_text(encoding="utf-8")
    servers = re.findall(r"^\s+server (\S+):8321 (resolve)?", front, flags=re.MULTILINE)
    assert {name for name, _ in servers} == replicas.keys()
    assert all(resolve for _, resolve in servers), "looked up again: one may come back under another address"
    assert "\nresolver 127.0.0.11 " in front
    assert "    zone replicas " in front, "without which nginx refuses `resolve`"
    assert f"listen {PORT};" in front


def test_the_cluster_of_the_replicas_is_the_servers_and_every_name_in_it_is_a_container() -> None:
    services = compose("docker-compose.cluster.yml")["services"]
    mounted = {
        name: ElementTree.parse(ROOT / volume.split(":")[0]).getroot()
        for name, part in services.items()
        for volume in part.get("volumes", ())
        if ".xml:" in volume
    }
    server, keeper = mounted["clickhouse"], mounted["keeper"]
    assert {cluster.tag for cluster in server.find("remote_servers")} == {
        services["service-1"]["environment"]["BRN_SERVICE_CLUSTER"]
    }
    hosts = {host.text for host in server.iterfind("remote_servers//host")}
    assert hosts == {"clickhouse"}
    assert server.findtext("macros/replica") in hosts
    assert server.findtext("zookeeper/node/host") == keeper.findtext("keeper_server//hostname") == "keeper"
    assert server.findtext("zookeeper/node/port") == keeper.findtext("keeper_server/tcp_port")
    (kept,) = [volume for volume in services["keeper"]["volumes"] if not volume.startswith(".")]
    for path in ("log_storage_path", "snapshot_storage_path"):
        assert keeper.findtext(f"keeper_server/{path}").startswith(kept.split(":")[1])


@pytest.mark.parametrize("conf", [(ROOT / "docker" / "cluster.nginx.conf").read_text(), *blocks("deploy.md", "nginx")])
def test_a_proxy_takes_what_the_service_takes_and_does_not_hold_events_back(conf: str) -> None:
    (megabytes,) = re.findall(r"client_max_body_size (\d+)m;", conf)
    assert int(megabytes) * 2**20 == Settings.model_fields["max_body_bytes"].default
    assert "proxy_buffering off;" in conf
    assert conf.count("{") == conf.count("}")


def test_caddy_hands_everything_on_to_the_service_and_holds_nothing_back() -> None:
    (conf,) = blocks("deploy.md", "caddyfile")
    assert f"reverse_proxy 127.0.0.1:{PORT} {{" in conf
    assert "flush_interval -1" in conf
    assert "max_size" not in conf, "Caddy limits no body by itself"
    assert conf.count("{") == conf.count("}")


# -------- systemd


def test_the_unit_starts_the_service_on_the_store_that_it_may_write() -> None:
    (text,) = blocks("deploy.md", "ini")
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    service = unit["Service"]
    assert service["ExecStart"].endswith("/bin/brn-serve")
    name, _, value = service["Environment"].partition("=")
    assert name in SERVICE_NAMES
    store = Settings(store=value).store_path
    assert store is not None
    assert store.parent == Path("/var/lib") / service["StateDirectory"]
    assert float(service["TimeoutStopSec"]) > Settings.model_fields["shutdown_seconds"].default


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze on the PATH")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    (text,) = blocks("deploy.md", "ini")
    file = tmp_path / "brn-serve.service"
    file.write_text(text.replace("/opt/brn/bin/brn-serve", sys.executable), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, check=False)
    assert not [line for line in done.stderr.splitlines() if file.name in line], done.stderr


# -------- Kubernetes


class _Part(BaseModel):
    """A part of a manifest, of which we know every field that we use: a misspelt one is refused."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)


class Metadata(_Part):
    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")


class Labels(_Part):
    labels: dict[str, str]


class SecretKey(_Part):
    name: str
    key: str


class ValueFrom(_Part):
    secret_key_ref: SecretKey


class Variable(_Part):
    name: str
    value: str | None = None
    value_from: ValueFrom | None = None


class HttpGet(_Part):
    path: str
    port: str


class Probe(_Part):
    http_get: HttpGet
    timeout_seconds: int = 1
    failure_threshold: int = 3


class ContainerPort(_Part):
    name: str
    container_port: int


class Mount(_Part):
    name: str
    mount_path: str


class Volume(_Part):
    name: str
    persistent_volume_claim: dict[Literal["claimName"], str] | None = None
    empty_dir: dict[Literal["medium", "sizeLimit"], str] | None = None


class Locked(_Part):
    allow_privilege_escalation: Literal[False]
    read_only_root_filesystem: Literal[True]
    capabilities: dict[Literal["drop"], list[Literal["ALL"]]]


class Container(_Part):
    name: str
    image: str
    args: list[str] = []
    ports: list[ContainerPort] = []
    env: list[Variable]
    liveness_probe: Probe | None = None
    readiness_probe: Probe | None = None
    startup_probe: Probe | None = None
    resources: dict[Literal["requests", "limits"], dict[str, str | int]]
    security_context: Locked
    volume_mounts: list[Mount]


class PodSecurity(_Part):
    run_as_non_root: Literal[True]
    run_as_user: int
    fs_group: int


class PodSpec(_Part):
    enable_service_links: Literal[False]
    automount_service_account_token: Literal[False]
    restart_policy: Literal["Always", "OnFailure", "Never"] = "Always"
    termination_grace_period_seconds: float
    security_context: PodSecurity
    containers: list[Container]
    volumes: list[Volume]


class Template(_Part):
    metadata: Labels
    spec: PodSpec


class DeploymentSpec(_Part):
    replicas: int
    strategy: dict[Literal["type"], str]
    selector: dict[Literal["matchLabels"], dict[str, str]]
    template: Template


class JobSpec(_Part):
    backoff_limit: int
    template: Template


class ServicePort(_Part):
    name: str
    port: int
    target_port: str


class ServiceSpec(_Part):
    selector: dict[str, str]
    ports: list[ServicePort]


class ClaimSpec(_Part):
    access_modes: list[Literal["ReadWriteOnce"]]
    resources: dict[Literal["requests"], dict[Literal["storage"], str]]


class _Manifest(_Part):
    metadata: Metadata


class Deployment(_Manifest):
    api_version: Literal["apps/v1"]
    kind: Literal["Deployment"]
    spec: DeploymentSpec


class Job(_Manifest):
    api_version: Literal["batch/v1"]
    kind: Literal["Job"]
    spec: JobSpec


class KubernetesService(_Manifest):
    api_version: Literal["v1"]
    kind: Literal["Service"]
    spec: ServiceSpec


class Claim(_Manifest):
    api_version: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    spec: ClaimSpec


Manifest = Annotated[Deployment | Job | KubernetesService | Claim, Field(discriminator="kind")]


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    """Of the page, by kind."""
    found = [part for block in blocks("deploy.md", "yaml") for part in yaml.safe_load_all(block)]
    parsed = [TypeAdapter[Any](Manifest).validate_python(part) for part in found]
    by_kind = {part.kind: part for part in parsed}
    assert by_kind.keys() == {"Deployment", "Job", "Service", "PersistentVolumeClaim"}
    assert len(parsed) == len(by_kind)
    return by_kind


def test_manifests_name_only_settings_volumes_and_ports_that_exist(manifests: dict[str, Any]) -> None:
    for kind in ("Deployment", "Job"):
        pod = manifests[kind].spec.template.spec
        for container in pod.containers:
            assert {variable.name for variable in container.env} <= settings_of(container.image)
            assert {mount.name for mount in container.volume_mounts} == {volume.name for volume in pod.volumes}
            file = "service" if kind == "Deployment" else "worker"
            dockerfile = (ROOT / "docker" / f"{file}.Dockerfile").read_text(encoding="utf-8")
            assert f"--uid {pod.security_context.run_as_user} " in dockerfile
            assert "VOLUME /var/lib/brn" in dockerfile
            assert "/var/lib/brn" in {mount.mount_path for mount in container.volume_mounts}
            assert not set(container.args) - {"--ranks", "0", "--checkpoint", "/var/lib/brn/checkpoint", "--resume"}
            for port in container.ports:
                assert port.container_port == PORT
    deployment, service = manifests["Deployment"], manifests["Service"]
    assert service.spec.selector == deployment.spec.template.metadata.labels
    assert deployment.spec.selector["matchLabels"] == deployment.spec.template.metadata.labels
    (port,) = service.spec.ports
    assert port.target_port == deployment.spec.template.spec.containers[0].ports[0].name
    (url,) = (v.value for v in manifests["Job"].spec.template.spec.containers[0].env if v.name == "BRN_URL")
    assert url == f"http://{service.metadata.name}:{port.port}"
    claim = deployment.spec.template.spec.volumes[0].persistent_volume_claim
    assert claim["claimName"] == manifests["PersistentVolumeClaim"].metadata.name


def test_an_embedded_store_is_never_given_to_two_pods(manifests: dict[str, Any]) -> None:
    spec = manifests["Deployment"].spec
    assert (spec.replicas, spec.strategy["type"]) == (1, "Recreate")
    assert spec.template.spec.termination_grace_period_seconds > Settings.model_fields["shutdown_seconds"].default


def test_no_service_in_the_manifests_sets_our_settings_by_its_name(manifests: dict[str, Any]) -> None:
    name = manifests["Service"].metadata.name.replace("-", "_").upper()
    linked = {f"{name}_SERVICE_HOST", f"{name}_SERVICE_PORT", f"{name}_PORT"}
    assert not linked & (SERVICE_NAMES | TRAIN_NAMES)
    assert {"BRN_SERVICE_HOST", "BRN_SERVICE_PORT"} <= SERVICE_NAMES, "what a Service named brn would set"


def test_probes_ask_routes_that_answer(manifests: dict[str, Any], client: httpx.Client) -> None:
    (container,) = manifests["Deployment"].spec.template.spec.containers
    probes = [container.liveness_probe, container.readiness_probe, container.startup_probe]
    for probe in probes:
        assert client.get(probe.http_get.path).status_code == 200
        assert probe.http_get.port == container.ports[0].name
    assert container.liveness_probe.http_get.path == "/healthz", "a store that is away is no reason to be killed"


# -------- operations and security


def test_every_number_to_watch_is_one_of_those_served(client: httpx.Client) -> None:
    served = set()
    for family in text_string_to_metric_families(client.get("/metrics").raise_for_status().text):
        served |= {family.name} | {sample.name for sample in family.samples}
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    # A counter with labels has no sample before it counts: there its family stands for it.
    named = {name.removesuffix("_total") for name in re.findall(r"\bbrn_[a-z]+(?:_[a-z]+)+", text)}
    assert len(named) >= 6
    assert named <= served - {"brn_core"}


def test_every_status_that_the_service_answers_is_explained_to_the_operator() -> None:
    text = (DOCS / "operations.md").read_text(encoding="utf-8")
    section = text.partition("## What a status means")[2].partition("\n## ")[0]
    explained = {int(number) for number in re.findall(r"^\| (\d{3}) \|", section, flags=re.MULTILINE)}
    assert explained == {error.status for error in (ServiceError, *ServiceError.__subclasses__())}


def test_every_line_of_the_threat_model_names_tests_that_exist() -> None:
    tests = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        tests |= set(re.findall(r"def (test_\w+)\(", file.read_text(encoding="utf-8")))
    text = (DOCS / "security.md").read_text(encoding="utf-8")
    lines = [line for line in re.findall(r"^\| (.+) \|$", text, flags=re.MULTILINE) if not line.endswith("| |")][1:]
    assert len(lines) >= 15
    for line in lines:
        held = re.findall(r"`(test_\w+)`", line.rpartition("|")[2])
        assert held, f"no test holds: {line}"
        assert set(held) <= tests, f"no such test: {set(held) - tests}"
