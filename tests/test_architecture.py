"""The shape of the house: what imports what, what stands where, and that the papers tell the truth."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def _loaded_by(module: str) -> set[str]:
    """Top-level packages in memory after a fresh interpreter has imported `module`."""
    code = f"import sys, {module}; print('\\n'.join({{name.partition('.')[0] for name in sys.modules}}))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(answer.stdout.split())


def test_the_service_process_runs_without_torch() -> None:
    assert not _loaded_by("dashboard.app") & {"torch", "sklearn"}


def test_the_training_process_loads_no_web_stack_and_no_store() -> None:
    loaded = _loaded_by("brn_core.worker.train")
    assert "torch" in loaded
    assert not loaded & {"fastapi", "uvicorn", "plotly", "jinja2", "clickhouse_connect", "chdb", "service", "dashboard"}


def test_the_wire_schema_needs_neither_torch_nor_a_web_stack() -> None:
    assert not _loaded_by("brn_core.wire") & {"torch", "fastapi", "httpx", "plotly"}


def test_every_pinned_version_satisfies_the_project_and_torch_comes_first() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0].startswith("torch==")
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    extras = PROJECT["project"]["optional-dependencies"]
    tested = ("train", "serve", "vision", "integrations", "dev")
    wanted = [*PROJECT["project"]["dependencies"], *(want for extra in tested for want in extras[extra])]
    names = {want.partition(">=")[0].partition("[")[0].lower() for want in wanted}
    names -= {"brn-diagnostics", "triton"}  # torch's builds for CUDA pin their own
    assert names <= pinned, f"constraints.txt lacks {sorted(names - pinned)}"


def test_the_changelog_has_an_entry_for_this_version() -> None:
    version = (ROOT / "brn_core" / "__init__.py").read_text().split('__version__ = "')[1].split('"')[0]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_every_file_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    links = {part.split(")")[0].split("#")[0] for part in text.split("](")[1:]}
    local = {link for link in links if link and "://" not in link}
    assert local, f"{document} links to no file at all: this check would pass on anything"
    missing = sorted(link for link in local if not (ROOT / link).exists())
    assert not missing, f"{document} links to missing files: {missing}"


def test_the_documents_name_every_make_target() -> None:
    targets = re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    documents = (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "README.md").read_text()
    assert {"help", "demo", "test", "lint", "format", "bench", "clean"} <= set(targets)
    assert not [target for target in targets if f"make {target}" not in documents]
