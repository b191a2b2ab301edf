"""What readers paste: each command of the pages is run here or elsewhere, or the page says that nobody ran it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import httpx
import pytest
import torch
from chromium import CHROMIUM
from synthetic import create, layer_rows, run_record, send, write_run
from torch import nn

from brn_core.worker.settings import parse_settings
from service.store import Store

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

RUN_BY = {
    r"make (demo( ONCE=1)?|test|test-containers)$": ".ci/run",
    r"make [a-z-]+$": "tests/test_docs_commands.py",
    r"docker compose (-f docker-compose.yml -f docker/cpu.yml )?up --build$": "tests/test_containers.py",
    r"docker compose (stop|start) service$|docker compose (stop|down -v)$": "tests/test_containers.py",
    r"docker compose run --rm --no-deps -T service tar ": "tests/test_containers.py",
    r"(/opt/brn/bin/)?pip install .*\[serve(,train)?\]'$": ".ci/release_check.py",
    r"pip wheel |python3 -m venv |(/opt/brn/bin/)?brn-serve( --store \S+)?$": "tests/test_release.py",
    r"brn-serve --diagnose ": "tests/service/test_checkup.py",
    r"brn-serve --report ": "tests/dashboard/test_views.py",
    r"curl .*127.0.0.1:8321": "tests/test_docs_commands.py",
    r"curl .*\$S\b": "tests/service/test_api.py",
    r"tar -C /var/lib/brn -cf ": "tests/test_docs_commands.py",
    r"brn-train|torchrun ": "tests/brn_core/test_worker_docs.py",
    r"python docs/screenshots.py URL RUN": "tests/test_docs_commands.py",
    r"python benchmarks/(layer|verdicts).py$": "benchmarks/results",
    r"apt-get install chromium$": ".ci/run",
    r"cp .env.example .env$|echo \"[A-Z_]+=": "tests/test_deploy_docs.py",
}
"""Where commands are run, or the dated tables that they wrote; what trains for hours, or on many GPUs, is read by the
program's parser there."""
PROGRAMS = "make|pip|pipx|docker|brn-serve|brn-train|python|curl|kubectl|systemctl|tar|apt-get"
NOT_RUN = {
    r"pipx install ": "the wheel",
    r"systemctl (stop|start) brn-serve$": "the systemd unit",
    r"kubectl ": "Kubernetes manifests",
    r"docker compose -f docker-compose.cluster.yml up --build$": "docker-compose.cluster.yml",
}
"""What nothing here can run, by the row of docs/deploy.md that says so."""


def commands(page: Path) -> list[str]:
    """What a page has readers type: lines of its shell blocks, without comments, and commands within its sentences.

    What goes on in the next line is one. Of a program and a bare option (`cp -a`) a sentence only speaks.
    """
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    sentences = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    typed = re.findall(rf"`((?:{PROGRAMS}) [^-`][^`]*|docker compose -[^`]*)`", sentences)
    typed = [command for command in typed if command != "docker compose"]
    return [bare for line in lines if (bare := re.sub(r"(^|\s{2,})#.*", "", line).strip())] + typed


def test_every_command_of_the_pages_is_run_by_something_or_said_not_to_be() -> None:
    told = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").partition("## What has run")[2]
    for page in PAGES:
        if page.name == "api.md":  # tests/service/test_api.py runs every block of it, and the parts of a JSON body too
            continue
        for command in commands(page):
            where = next((file for pattern, file in RUN_BY.items() if re.match(pattern, command)), None)
            if where is not None:
                assert (ROOT / where).exists()
                continue
            what = next((what for pattern, what in NOT_RUN.items() if re.match(pattern, command)), None)
            assert what is not None, f"{page.name}: nothing runs `{command}`"
            (row,) = re.findall(rf"^\| {what}.*$", told, flags=re.MULTILINE)
            assert re.search(r"\b(not|never)\b", row), f"{page.name}: {row}"


def test_every_target_of_make_runs_what_there_is(tmp_path: Path) -> None:
    """Their recipes, with programs that only write down what they were told to run."""
    log = tmp_path / "log"
    for name in ("python", "ruff", "mypy", "lint-imports"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {log}\n', encoding="utf-8")
        program.chmod(0o755)
    make = ["make", "--assume-old", ".venv/.installed", f"BIN={tmp_path}"]
    listed = subprocess.run([*make, "help"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    targets = set(re.findall(r"^  make (\S+)", listed, flags=re.MULTILINE))
    told = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)", page.read_text(encoding="utf-8"))}
    assert told - {"help"} <= targets
    for target in targets - {"help", "clean"}:
        log.write_text("", encoding="utf-8")
        subprocess.run([*make, target], cwd=ROOT, check=True, capture_output=True)
        ran = log.read_text(encoding="utf-8")
        assert ran, f"make {target} runs nothing"
        for file in re.findall(r"\S+\.py\b", ran):
            assert (ROOT / file).is_file(), f"make {target}: {file}"
        for module in re.findall(r"-m (brn_core\S+)", ran):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), f"make {target}: {module}"


def test_make_clean_leaves_stored_runs_and_sources_alone(tmp_path: Path) -> None:
    kept = ["Makefile", ".brn/store/rows", "service/app.py"]
    made = [".venv/bin/python", ".demo/store/rows", "dist/a.whl", "service/__pycache__/app.pyc", ".mypy_cache/x"]
    for name in kept + made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / "Makefile", tmp_path)
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()} == set(kept)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
def test_a_screenshot_is_taken_as_the_page_on_the_dashboard_has_it(client: httpx.Client, tmp_path: Path) -> None:
    (command,) = (line for line in commands(ROOT / "docs" / "dashboard.md") if "screenshots.py" in line)
    write_run(client, "pictured", layers=2, steps=3)
    try:
        _, *told = command.replace("URL", str(client.base_url)).replace("RUN...", "pictured").split()
        told = [sys.executable, *told, "--only", "layer.png", "--folder", str(tmp_path)]
        done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    finally:
        client.delete("/v1/runs/pictured")
    assert (tmp_path / "layer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_every_question_of_the_readme_is_answered(client: httpx.Client, tmp_path: Path) -> None:
    write_run(client, "readme", layers=2, steps=3)
    asked = [line for line in commands(ROOT / "README.md") if line.startswith("curl ")]
    assert len(asked) >= 9
    try:
        for line in asked:
            command = line.replace("127.0.0.1:8321", client.base_url.netloc.decode())
            command = command.replace("curl ", "curl --silent --show-error --fail-with-body ", 1)
            if line.endswith("/events"):
                # a stream has no end: its first line is enough, and curl notices late that nobody reads on
                command = f"{command.replace('curl ', 'curl --max-time 2 ', 1)} | head -n 1"
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env=os.environ | {"RUN": "readme"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            assert done.stdout or " -o " in line
    finally:
        client.delete("/v1/runs/readme")
    assert (tmp_path / "layers.parquet").read_bytes().startswith(b"PAR1")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_records_a_model_and_corrects_it(client: httpx.Client, tmp_path: Path) -> None:
    watching, converting = python_blocks(ROOT / "README.md")
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    given = {"model": model, "loader": [(torch.randn(16, 4), torch.randn(16))] * 3, "loss": torch.tensor(0.5)}
    where = f"url={str(client.base_url)!r}, spool={str(tmp_path)!r}, run_id='pasted'"
    assert watching.count("watch(model)") == 1
    watching = watching.replace("watch(model)", f"watch(model, {where})").replace("    ...", "    model(x)")
    names = dict(given)
    exec(watching, names)
    names["recorder"].close()  # as the interpreter's end does
    try:
        run = client.get("/v1/runs/pasted").raise_for_status().json()
        assert run["rows"] == 3, "one a step and layer"
    finally:
        client.delete("/v1/runs/pasted")

    names = given | {"total_steps": 3}
    exec(converting, names)
    assert type(names["model"][1]).__name__ == "BatchRenorm1d"


def test_the_python_of_the_page_on_storage_reads_a_store_at_rest(tmp_path: Path) -> None:
    (block,) = python_blocks(ROOT / "docs" / "storage.md")
    assert "/absolute/path/to/.brn/store" in block
    make = (
        "from service.settings import Settings; from service.store import Store;"
        f"Store(Settings(store='chdb://{tmp_path}/store')).close()"
    )
    for code in (make, block.replace("/absolute/path/to/.brn/store", f"{tmp_path}/store")):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "worst_gap" in done.stdout


def test_the_statements_of_the_page_on_storage_are_answered(client: httpx.Client, store: Store) -> None:
    (block,) = re.findall(
        r"^```sql\n(.*?)^```$", (ROOT / "docs" / "storage.md").read_text(encoding="utf-8"), flags=re.M | re.S
    )
    spoiled = {"nonfinite_channels": [[0, 0], [0, 0], [0, 1]]}
    create(client, run_record("my-run", layers=2))
    try:
        send(client, "my-run", {"layers": layer_rows([1, 2, 3], 2, **spoiled)}).raise_for_status()
        first, held = (store.rows(statement) for statement in block.split(";") if statement.strip())
        assert first.to_pylist() == [{"step": 3, "layer": 1, "rank": 0}]
        assert {"run_id": "my-run", "sum(layer_rows)": 6, "max(last_step)": 3} in held.to_pylist()
    finally:
        client.delete("/v1/runs/my-run")


def test_the_backup_line_of_the_operations_page_takes_the_store_and_its_journal_but_no_lock(tmp_path: Path) -> None:
    (line,) = (line for line in commands(ROOT / "docs" / "operations.md") if line.startswith("tar -C /var/lib/brn "))
    home = tmp_path / "brn"
    for name in ("store/data", "store.journal/1", "store.lock"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(name)
    subprocess.run(["bash", "-c", line.replace("/var/lib/brn", str(home))], cwd=tmp_path, check=True)
    (file,) = tmp_path.glob("store-*.tar")
    with tarfile.open(file) as archive:
        files = {member.name for member in archive.getmembers() if member.isfile()}
    assert files == {"./store/data", "./store.journal/1"}


def test_the_commands_of_the_page_on_the_paper_are_understood() -> None:
    text = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    found = re.findall(r"^    brn-train (.*?)(?: +#.*)?$", text, flags=re.MULTILINE)
    assert len(found) >= 3
    assert all(parse_settings(arguments.split()).paper for arguments in found)
