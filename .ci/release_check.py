"""Builds wheel and source distribution, looks into them and installs the wheel with what its extras ask for; looks
pinned versions up among known vulnerabilities, and at the date in the changelog.

`make release-check` runs it after the tests of a release. What it needs, it installs into a temporary folder. A lookup
that could not be made and a version without a date are failures, except with --offline: so every change is checked.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EXPLAINED: dict[str, str] = {}
"""Known vulnerabilities that a release may have, by id, and why each does no harm here."""


def installed(wheel: Path, folder: Path) -> str:
    """Installs the wheel as docs/deploy.md has it, with both extras, and runs its commands; a line that says so."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--constraint", ROOT / "constraints.txt", f"{wheel}[serve,train]"], check=True)
    subprocess.run([*pip, "check"], check=True)
    for command in ("brn-serve", "brn-train"):
        subprocess.run([folder / "bin" / command, "--help"], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return "installed with [serve,train], and both commands start"


def tracked(*folders: str) -> set[str]:
    """Files of the checkout, as git has them."""
    listed = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.splitlines())


def distributions(python: Path, folder: Path) -> str:
    """Builds both and compares their content with the checkout's; a line that says so."""
    subprocess.run([python, "-m", "build", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    packages, everything = tracked("brn_core", "service", "dashboard"), tracked()
    for file, content, wanted in ((wheel, in_wheel, packages), (sdist, in_sdist, everything)):
        if lost := sorted(wanted - content):
            raise SystemExit(f"{file.name} lacks {', '.join(lost)}")
    return f"{wheel.name}: built, with all {len(packages)} files; {sdist.name}: with all {len(everything)}"


def date_of_release() -> str | None:
    """When the newest version of the changelog was released; None: it was not yet.

    Raises:
        SystemExit: its heading is neither `## 0.1.0 (2026-01-31)` nor `## 0.1.0 (unreleased)`.
    """
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    newest = next(line for line in lines if line.startswith("## "))
    heading = re.fullmatch(r"## \d+\.\d+\.\d+ \((unreleased|\d{4}-\d{2}-\d{2})\)", newest)
    if heading is None:
        raise SystemExit(f"CHANGELOG.md: {newest!r} must be `## VERSION (unreleased)` or `## VERSION (YYYY-MM-DD)`")
    return None if heading[1] == "unreleased" else heading[1]


class NotReachedError(Exception):
    """The database of known vulnerabilities was not asked; nothing is known."""


def audit(python: Path, folder: Path) -> str:
    """Asks pip-audit for everything in constraints.txt; a line that says what came of it.

    Raises:
        NotReachedError: nothing came of it.
        SystemExit: a vulnerability that nobody has explained.
    """
    answer = folder / "audit.json"
    command = [python, "-m", "pip_audit", "--requirement", ROOT / "constraints.txt", "--no-deps", "--disable-pip"]
    options = ["--progress-spinner", "off", "--format", "json", "--output", answer]
    said = subprocess.run([*command, *options], capture_output=True, text=True, check=False).stderr
    if not answer.exists():
        raise NotReachedError((said.strip().splitlines() or ["it said nothing"])[-1])
    found: list[dict[str, Any]] = json.loads(answer.read_text(encoding="utf-8"))["dependencies"]
    # It leaves out, and counts as harmless, what its database does not know: without a connection, everything.
    skipped = [entry["name"] for entry in found if "skip_reason" in entry]
    known = {v["id"]: f"{e['name']} {e['version']}: {v['id']}" for e in found for v in e.get("vulns", ())}
    if bad := [text for name, text in known.items() if name not in EXPLAINED]:
        raise SystemExit("pip-audit: " + "; ".join(bad))
    if len(skipped) == len(found):
        raise NotReachedError(f"its database knows none of {len(found)} packages: is it reachable?")
    unknown = f"; not looked up: {', '.join(skipped)}" if skipped else ""
    explained = "".join(f"; {text}, {EXPLAINED[name]}" for name, text in known.items())
    return f"pip-audit: nothing known of {len(found) - len(skipped)} packages{explained}{unknown}"


def main() -> int:
    offline = sys.argv[1:] == ["--offline"]
    missing = []
    if (date := date_of_release()) is None:
        missing.append("its date in CHANGELOG.md instead of `unreleased`")
    print(f"CHANGELOG.md: {'unreleased' if date is None else f'released on {date}'}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "build", "pip-audit"], check=True)
        print(distributions(python, folder / "dist"))
        print(installed(*(folder / "dist").glob("*.whl"), folder / "user"))
        try:
            print(audit(python, folder))
        except NotReachedError as error:
            print(f"pip-audit: NOT RUN, {error}")
            missing.append("a lookup of known vulnerabilities")
    if not missing:
        print("ready to be released")
        return 0
    print(f"all is well but for what a release needs besides: {', and '.join(missing)}")
    if not offline:
        print("without these a change is checked by: make release-check OFFLINE=1")
    return int(not offline)


if __name__ == "__main__":
    sys.exit(main())
