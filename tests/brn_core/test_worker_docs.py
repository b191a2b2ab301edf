"""docs/worker.md against the program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from brn_core.worker.settings import SamplerKind, Settings, flag, parse_settings

TEXT = (Path(__file__).parents[2] / "docs" / "worker.md").read_text()


def test_the_table_of_settings_says_what_the_parser_says() -> None:
    expected = []
    for name, field in Settings.model_fields.items():
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        shown = "" if default in (None, "") else f"`{default}`"
        expected.append(f"| `{flag(name)}` | {shown} | {(field.description or '').replace('|', chr(92) + '|')} |")
    rows = [line for line in TEXT.splitlines() if line.startswith("| `--") and not line.startswith("| `--sampler` | a")]
    missing = [row for row in expected if row not in rows]
    assert not missing, "these lines belong into docs/worker.md:\n" + "\n".join(missing)
    assert rows == expected


def test_every_sampler_is_in_the_table_of_batches() -> None:
    table = TEXT.partition("## Batches")[2].partition("\n## ")[0]
    assert tuple(re.findall(r"^\| `([a-z][a-z-]+)` \|", table, re.MULTILINE)) == get_args(SamplerKind)


def test_every_flag_that_the_text_names_exists() -> None:
    named = set(re.findall(r"--[a-z][a-z-]*[a-z]", TEXT)) - {"--nproc-per-node"}
    assert named <= {flag(name) for name in Settings.model_fields}


def test_the_commands_are_understood() -> None:
    commands = re.findall(r"^(?:brn-train|torchrun .* -m brn_core.worker)(.*?)(?:#.*)?$", TEXT, re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        parse_settings(command.split())
