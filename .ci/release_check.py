"""Builds wheel and source distribution and looks into them; looks pinned versions up among known vulnerabilities.

`make release-check` runs it after the tests of a release. What it needs, it installs into a temporary folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def not_python() -> set[str]:
    """Files of the packages that are no modules, as git has them: what a distribution easily loses."""
    packages = ["brn_core", "service", "dashboard"]
    listed = subprocess.run(["git", "ls-files", *packages], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name for name in listed.stdout.splitlines() if not name.endswith(".py")}


def distributions(python: Path, folder: Path) -> str:
    """Builds both and compares their content with the checkout's; a line that says so."""
    subprocess.run([python, "-m", "build", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    wanted = not_python()
    for file, content in ((wheel, in_wheel), (sdist, in_sdist)):
        if lost := sorted(wanted - content):
            raise SystemExit(f"{file.name} lacks {', '.join(lost)}")
    return f"{wheel.name}, {sdist.name}: built, with all {len(wanted)} files that are no modules"


def audit(python: Path, folder: Path) -> str:
    """Asks pip-audit for everything in constraints.txt; a line that says what came of it, also that nothing did."""
    answer = folder / "audit.json"
    command = [python, "-m", "pip_audit", "--requirement", ROOT / "constraints.txt", "--no-deps", "--disable-pip"]
    options = ["--progress-spinner", "off", "--format", "json", "--output", answer]
    said = subprocess.run([*command, *options], capture_output=True, text=True, check=False).stderr
    if not answer.exists():
        return f"pip-audit: NOT RUN, {(said.strip().splitlines() or ['it said nothing'])[-1]}"
    found: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))["dependencies"]
    # It leaves out, and counts as harmless, what its database does not know: without a connection, everything.
    skipped = [entry["name"] for entry in found if "skip_reason" in entry]
    bad = [f"{e['name']} {e['version']}: {v['id']}" for e in found for v in e.get("vulns", ())]
    if bad:
        raise SystemExit("pip-audit: " + "; ".join(bad))
    if len(skipped) == len(found):
        return f"pip-audit: NOT RUN, its database knows none of {len(found)} packages: is it reachable?"
    unknown = f"; not looked up: {', '.join(skipped)}" if skipped else ""
    return f"pip-audit: nothing known of {len(found) - len(skipped)} packages{unknown}"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "build", "pip-audit"], check=True)
        print(distributions(python, folder / "dist"))
        print(audit(python, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
