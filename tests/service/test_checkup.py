"""`brn-serve --diagnose`: the same findings from a store, a spool and exported files, and the exit codes."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pyarrow as pa
import pytest
from rich.console import Console
from synthetic import clustered_tables, create, layer_rows, run_record, send

from brn_core.spool import Spool
from brn_core.wire import RunUpdate, encode_batch
from service import windows
from service.checkup import checkup, exit_code, print_diagnosis
from service.diagnosis.finding import Diagnosis, Severity, Verdict
from service.errors import CannotStart
from service.recordings import recording
from service.settings import Settings
from service.store import Store


@pytest.fixture(scope="module")
def run_id(client: httpx.Client) -> str:
    """A finished run of clustered batches."""
    create(client, run_record("checked", name="checked")).raise_for_status()
    send(client, "checked", clustered_tables()).raise_for_status()
    client.patch("/v1/runs/checked", json={"status": "finished"}).raise_for_status()
    return "checked"


def exported(client: httpx.Client, run_id: str, folder: Path, file_format: str, *tables: str) -> Path:
    folder.mkdir()
    for table in tables:
        answer = client.get(f"/v1/runs/{run_id}/export", params={"table": table, "format": file_format})
        (folder / f"{table}.{file_format}").write_bytes(answer.raise_for_status().content)
    return folder


def spooled(folder: Path, run: str = "checked") -> Path:
    """What a recorder leaves where no service ever answered, in two batches."""
    own = Spool(folder).folder(run, 0)
    record = run_record(run, name="checked")
    for seq, steps in enumerate((slice(0, 120), slice(120, None))):
        rows = {
            name: table.filter([step in range(200)[steps] for step in table.column("step").to_pylist()])
            for name, table in clustered_tables().items()
        }
        own.put(record, seq, 100, encode_batch(rows))
    own.put_end(record, RunUpdate(status="finished"))
    return folder


def diagnose(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "service", "--diagnose", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def printed(diagnosis: Diagnosis) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_diagnosis(console, diagnosis)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_spool_gives_the_findings_of_the_store_and_a_warning_its_exit_code(
    store: Store, run_id: str, tmp_path: Path
) -> None:
    process = diagnose(spooled(tmp_path / "spool"))
    expected = windows.diagnosis(store, run_id)

    assert expected.verdict.code == "NH-CLUSTER"
    assert exit_code(expected) in (4, 5)
    out, err = process.communicate(timeout=300)
    assert (out, process.returncode) == (printed(expected), exit_code(expected)), err


def test_a_run_of_a_store_that_a_service_has_open_is_asked_from_the_service(
    client: httpx.Client, settings: Settings, store: Store, run_id: str
) -> None:
    console = Console(file=io.StringIO(), width=80)
    port = urlsplit(str(client.base_url)).port
    code = checkup(settings.model_copy(update={"port": port}), run_id, console)

    assert code == exit_code(windows.diagnosis(store, run_id))
    assert console.file.getvalue() == printed(windows.diagnosis(store, run_id))  # type: ignore[attr-defined]
    with pytest.raises(CannotStart, match="there is no run 'unheard-of'"):
        checkup(settings.model_copy(update={"port": port}), "unheard-of", console)


def test_what_cannot_be_looked_at_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    process = diagnose("unheard-of", "--store", f"chdb://{tmp_path / 'store'}")
    out, err = process.communicate(timeout=300)

    assert (out, process.returncode) == ("", 1)
    assert err.count("\n") == 1
    assert "there is no run 'unheard-of'" in err


@pytest.mark.parametrize(
    ("code", "severity", "expected"),
    [
        ("HEALTHY", "ok", 0),
        ("NH-COUPLED", "info", 0),
        ("NO_DATA", "info", 3),
        ("WARMUP", "ok", 3),
        ("NH-WITHHELD", "info", 3),
        ("NH-SMALL", "warning", 4),
        ("NH-GAP", "critical", 5),
    ],
)
def test_exit_codes_tell_healthy_unjudged_warned_and_critical_apart(
    code: str, severity: Severity, expected: int
) -> None:
    verdict = Verdict(code=code, severity=severity, summary="Said.")
    assert exit_code(Diagnosis(run="run", step=1, verdict=verdict, findings=())) == expected


def test_the_printed_findings_have_numbers_and_remedy(store: Store, run_id: str) -> None:
    text = " ".join(printed(windows.diagnosis(store, run_id)).split())
    finding = windows.diagnosis(store, run_id).findings[0]

    assert finding.evidence is not None
    assert finding.remedy is not None
    for part in (finding.code, finding.summary, f"{finding.evidence.value:.3g}", finding.remedy.text):
        assert part in text


def rows_of(parts: Any, table: str) -> list[dict[str, Any]]:
    return [row for part in parts for row in part.tables.get(table, pa.table({})).to_pylist()]


@pytest.mark.parametrize("file_format", ["parquet", "arrow"])
def test_an_exported_file_holds_its_run_and_every_row(
    client: httpx.Client, run_id: str, tmp_path: Path, file_format: str
) -> None:
    found = recording(exported(client, run_id, tmp_path / "files", file_format, "probe") / f"probe.{file_format}")

    assert found.record == run_record("checked", name="checked")
    assert found.status == "finished"
    assert rows_of(found.parts, "probe") == clustered_tables()["probe"].to_pylist()


def test_of_steps_that_were_sent_twice_an_exported_file_gives_the_newer(client: httpx.Client, tmp_path: Path) -> None:
    create(client, run_record("resumed", layers=1)).raise_for_status()
    send(client, "resumed", {"layers": layer_rows([0, 1], 1, gap=1.0)}, seq=2).raise_for_status()
    send(client, "resumed", {"layers": layer_rows([1, 2], 1, gap=2.0)}, seq=3).raise_for_status()
    found = recording(exported(client, "resumed", tmp_path / "files", "arrow", "layers"))

    assert [(row["step"], row["gap"]) for row in rows_of(found.parts, "layers")] == [(0, 1.0), (1, 2.0), (2, 2.0)]


def test_a_path_without_one_readable_run_says_what_it_holds(client: httpx.Client, run_id: str, tmp_path: Path) -> None:
    spooled(tmp_path / "two", "one")
    spooled(tmp_path / "two", "other")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.parquet").write_text("no table")

    with pytest.raises(CannotStart, match=r"holds 2 runs \(one, other\)"):
        recording(tmp_path / "two")
    assert recording(tmp_path / "two" / "one").record.id == "one"
    with pytest.raises(CannotStart, match="neither a recorder's spool nor exported tables"):
        recording(tmp_path / "empty")
    with pytest.raises(CannotStart, match="is no exported table"):
        recording(tmp_path / "text.parquet")
    with pytest.raises(CannotStart, match="csv cannot say"):
        recording(exported(client, run_id, tmp_path / "files", "csv", "scalars") / "scalars.csv")
