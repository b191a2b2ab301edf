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
from synthetic import write_run
from torch import nn

from brn_core.worker.settings import parse_settings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

RUN_BY = {
    r"make (demo|test)$": ".ci/run",
    r"docker compose (-f docker-compose.yml -f docker/cpu.yml )?up --build$": "tests/test_containers.py",
    r"docker compose (stop|start) service$": "tests/test_containers.py",
    r"docker compose run --rm --no-deps -T service tar ": "tests/test_containers.py",
    r"(/opt/brn/bin/)?pip install .*\[serve(,train)?\]'$": ".ci/release_check.py",
    r"pip wheel |python3 -m venv |(/opt/brn/bin/)?brn-serve( --store \S+)?$": "tests/test_release.py",
    r"brn-serve --diagnose ": "tests/service/test_checkup.py",
    r"brn-serve --report ": "tests/dashboard/test_views.py",
    r"curl .*127.0.0.1:8321": "tests/test_docs_commands.py",
    r"curl .*\$S\b": "tests/service/test_api.py",
    r"tar -C /var/lib/brn -cf ": "tests/test_docs_commands.py",
    r"brn-train|torchrun ": "tests/brn_core/test_worker_docs.py",
    r"cp .env.example .env$|echo \"[A-Z_]+=": "tests/test_deploy_docs.py",
}
"""Where commands are run; what trains for hours, or on many GPUs, is read by the program's parser there."""
NOT_RUN = {
    r"systemctl (stop|start) brn-serve$": "the systemd unit",
    r"kubectl ": "Kubernetes manifests",
    r"docker compose -f docker-compose.cluster.yml up --build$": "docker-compose.cluster.yml",
}
"""What nothing here can run, by the row of docs/deploy.md that says so."""


def commands(page: Path) -> list[str]:
    """Lines of the shell blocks of a page, without comments; what goes on in the next line is one."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [bare for line in lines if (bare := re.sub(r"(^|\s{2,})#.*", "", line).strip())]


def test_every_command_of_the_pages_is_run_by_something_or_said_not_to_be() -> None:
    told = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").partition("## What has run")[2]
    for page in PAGES:
        if page.name == "api.md":  # tests/service/test_api.py runs every block of it, and the parts of a JSON body too
            continue
        for command in commands(page):
            where = next((file for pattern, file in RUN_BY.items() if re.match(pattern, command)), None)
            if where is not None:
                assert (ROOT / where).is_file()
                continue
            what = next((what for pattern, what in NOT_RUN.items() if re.match(pattern, command)), None)
            assert what is not None, f"{page.name}: nothing runs `{command}`"
            (row,) = re.findall(rf"^\| {what}.*$", told, flags=re.MULTILINE)
            assert re.search(r"\b(not|never)\b", row), f"{page.name}: {row}"


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
