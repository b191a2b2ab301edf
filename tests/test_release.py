"""What a release is made of: one version everywhere, links that lead somewhere, and the wheel as a user gets it.

The wheel is built, installed into an environment of its own, and its two commands run.
"""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import httpx
import pytest

from brn_core import __version__

ROOT = Path(__file__).parent.parent
STEPS = 5
LAYERS = 3  # of the worker's small network

pytestmark = pytest.mark.timeout(600)  # builds, installs and starts processes


def run(*command: str | Path, cwd: Path) -> str:
    """A command that must succeed; what it printed."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BRN_", "PYTHON"))}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "COLUMNS": "110"}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}"
    return done.stdout


def test_the_version_is_the_same_wherever_it_stands() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\d+\.\d+\.\d+)", changelog, flags=re.MULTILINE)
    assert newest is not None
    assert newest[1] == __version__
    for file in (ROOT / "docker").glob("*.Dockerfile"):
        assert f'image.version="{__version__}"' in file.read_text(encoding="utf-8"), file
    deploy = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    named = re.findall(r"brn_diagnostics-([\d.]+)-py3|registry\.example\.com/brn-\w+:([\d.]+)", deploy)
    assert {"".join(pair) for pair in named} == {__version__}


@pytest.mark.parametrize(
    ("heading", "date"),
    [("## 0.1.0 (2026-01-31)", "2026-01-31"), ("## 0.1.0 (unreleased)", None), ("## 0.1.0", SystemExit)],
)
def test_a_version_is_ready_once_the_changelog_has_its_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heading: str, date: Any
) -> None:
    spec = importlib.util.spec_from_file_location("release_check", ROOT / ".ci" / "release_check.py")
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n\n## 0.0.9 (2025-01-31)\n", encoding="utf-8")
    if date is SystemExit:
        with pytest.raises(SystemExit, match="YYYY-MM-DD"):
            check.date_of_release()
    else:
        assert check.date_of_release() == date


def anchors(page: Path) -> set[str]:
    """What a link to a heading of a page may say after its #."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page", sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]), ids=lambda page: page.name
)
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):  # another host: not for a test
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(file), f"{target}: no such heading"


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands of a fresh environment lie that has the wheel; its dependencies are those of this one."""
    folder = tmp_path_factory.mktemp("release")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    assert wheel.name == f"brn_diagnostics-{__version__}-py3-none-any.whl"
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    # The wheel's own packages stand before it on the path. Nothing but this line is read from a .pth: what makes the
    # checkout importable here is a .pth too, and does not count there.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    # As in the service's image, which leaves it out though chDB's package asks for it: docker/service.Dockerfile.
    (packages / "pandas.py").write_text("raise ImportError('not here')\n", encoding="utf-8")
    found = run(python, "-c", "import service, brn_core, dashboard as d; print(d.__file__)", cwd=folder).strip()
    assert found.startswith(str(packages)), f"not the wheel but {found}"
    assert (packages / "brn_core" / "fused_host.c").is_file(), "what a layer compiles is in the wheel"
    return python.parent


@pytest.mark.parametrize(("command", "says"), [("brn-serve", "--store"), ("brn-train", "--batch-size")])
def test_an_installed_command_explains_itself(bin_folder: Path, tmp_path: Path, command: str, says: str) -> None:
    assert says in run(bin_folder / command, "--help", cwd=tmp_path)


def test_the_installed_wheel_serves_trains_and_answers(bin_folder: Path, tmp_path: Path) -> None:
    serve = [bin_folder / "brn-serve", "--port", "0", "--store", f"chdb://{tmp_path}/store"]
    with subprocess.Popen(serve, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line.startswith("serving on "), line
            url = line.split()[2]
            settings = ["--url", url, "--run-id", "wheel", "--steps", str(STEPS), "--device", "cpu"]
            run(bin_folder / "brn-train", *settings, cwd=tmp_path)
            with httpx.Client(base_url=url, timeout=60) as client:
                answer: Any = client.get("/v1/runs/wheel").raise_for_status().json()
                assert answer["rows"] == STEPS * LAYERS
                page = client.get("/runs/wheel").raise_for_status().text
                files = set(re.findall(r'(?:src|href)="(/static/[^"]+)"', page))
                assert files, "templates and static files are in the wheel"
                for file in files:
                    client.get(file).raise_for_status()
                for file_format in ("parquet", "csv", "arrow"):
                    client.get("/v1/runs/wheel/export", params={"format": file_format}).raise_for_status()
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
