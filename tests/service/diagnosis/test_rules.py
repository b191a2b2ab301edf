"""The whole diagnosis: every code documented, answers that are never empty, and one verdict."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from service.diagnosis import rules
from service.diagnosis.estimate import Watch
from service.diagnosis.finding import Diagnosis
from service.diagnosis.rules import CODES, diagnose
from service.diagnosis.stream import Known
from service.diagnosis.window import NonFinite, Window

MakeWindow = Callable[..., Window]
Streams = Any  # conftest.Streams
T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[3]
SECTIONS = ("Question", "Formula", "Threshold and why", "Evidence", "Remedy", "What would refute it")


def documented() -> dict[str, str]:
    text = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def codes_in_source() -> set[str]:
    """Every `code="..."` and `code=` constant that the package passes to Finding."""
    found = set()
    for path in Path(rules.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Finding":
                value = next(k.value for k in node.keywords if k.arg == "code")
                assert isinstance(value, ast.Constant), f"{path.name}:{node.lineno}: a code that is not a literal"
                found.add(value.value)
    return found


def test_every_code_is_documented_and_every_documented_code_exists() -> None:
    assert set(documented()) == set(CODES) == codes_in_source()


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_all_sections_in_order(code: str) -> None:
    assert tuple(re.findall(r"^\*\*(.+?)\.\*\*", documented()[code], flags=re.MULTILINE)) == SECTIONS


@pytest.mark.parametrize("code", CODES)
def test_every_section_says_something(code: str) -> None:
    parts = re.split(r"^\*\*.+?\.\*\*", documented()[code], flags=re.MULTILINE)[1:]

    assert all(part.strip() for part in parts)


def thresholds() -> list[tuple[str, str, str]]:
    """(code, constant, value) of the table of constants, as it is written."""
    text = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (NH-[A-Z-]+|every rule) \| (`[a-z]+\.\w+` = .+) \|$", text, flags=re.MULTILINE)
    return [(code, *pair) for code, cells in rows for pair in re.findall(r"`([a-z]+\.\w+)` = `(.+?)`", cells)]


def numbers(value: object) -> list[float]:
    return [float(value)] if isinstance(value, (int, float)) else [n for each in value for n in numbers(each)]


def plain(value: Any) -> Any:
    """A constant as the table has it: of a `Watch` the rows, the threshold and the z."""
    if isinstance(value, Watch):
        return (value.rows, value.threshold, value.z)
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def spelt(number: float) -> str:
    """A pattern for a number as prose has it: .05, 5 %, a half."""
    words = {0.5: ["half"], 0.1: ["a tenth"], 10_000: ["10⁴"], 1e-4: ["10⁻⁴"]}.get(number, [])
    plain = f"{number:,.15g}" if number >= 10_000 else f"{number:.15g}"
    share = [f"{100 * number:.15g} %"] if number < 1 else []
    digits = [f"0?{re.escape(plain[1:])}" if plain.startswith("0.") else re.escape(plain), *map(re.escape, share)]
    return rf"(?<![\w.])(?:{'|'.join(digits + words)})(?![\d]|\.\d)"


@pytest.mark.parametrize(("code", "name", "value"), thresholds())
def test_a_threshold_in_the_documentation_is_the_one_in_the_code(code: str, name: str, value: str) -> None:
    module, constant = name.split(".")
    package = "service" if module == "windows" else "service.diagnosis"
    stated = ast.literal_eval(value)
    text = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
    section = text.partition("**The constants**")[0] if code == "every rule" else documented()[code]

    assert plain(getattr(importlib.import_module(f"{package}.{module}"), constant)) == stated
    for number in numbers(stated):
        assert re.search(spelt(number), section), f"{code} does not speak of {number:g}"


def test_every_code_that_compares_with_a_number_has_it_in_the_table() -> None:
    without = {"NH-NONFINITE", "NO_DATA", "WARMUP", "HEALTHY"}

    assert {code for code, _, _ in thresholds()} - {"every rule"} == set(CODES) - without


def some_diagnoses(streams: Streams, make_window: MakeWindow) -> list[Diagnosis]:
    return [
        diagnose(window)
        for window in (
            make_window(),
            make_window(probe=streams.iid(0, steps=5)),
            make_window(probe=streams.iid(0)),
            make_window(probe=streams.iid(0), status="finished"),
            make_window(probe=streams.few_labels(0, labels=1), kinds=()),
            make_window(scalars={"loss": (np.arange(3), np.ones(3))}, status="failed"),
            make_window(nonfinite=NonFinite(0, 0, 0, 1), last_step=0),
        )
    ]


def test_an_answer_is_never_empty_and_its_verdict_is_one_of_its_findings(
    streams: Streams, make_window: MakeWindow
) -> None:
    for diagnosis in some_diagnoses(streams, make_window):
        assert diagnosis.findings
        assert diagnosis.verdict.code in {f.code for f in diagnosis.findings}
        assert diagnosis.verdict.code in CODES


def test_answers_survive_json(streams: Streams, make_window: MakeWindow) -> None:
    for diagnosis in some_diagnoses(streams, make_window):
        assert Diagnosis.model_validate_json(diagnosis.model_dump_json()) == diagnosis


def test_every_warning_has_evidence_with_a_query_and_a_remedy(streams: Streams, make_window: MakeWindow) -> None:
    for diagnosis in some_diagnoses(streams, make_window):
        for finding in diagnosis.findings:
            if finding.severity in ("warning", "critical"):
                assert finding.evidence is not None
                assert finding.evidence.query.startswith("/v1/runs/run-1/")
                assert finding.remedy is not None
                assert finding.steps[0] <= finding.steps[1]


def test_sentences_are_sentences(streams: Streams, make_window: MakeWindow) -> None:
    for diagnosis in some_diagnoses(streams, make_window):
        for summary in (diagnosis.verdict.summary, *(f.summary for f in diagnosis.findings)):
            assert re.fullmatch(r"[A-Z].*[^.]\.", summary), summary


def test_findings_stand_from_worst_to_least(streams: Streams, make_window: MakeWindow) -> None:
    window = make_window(probe=streams.few_labels(0, labels=5), nonfinite=NonFinite(9, 0, 0, 1))

    assert [f.code for f in diagnose(window).findings] == ["NH-NONFINITE", "NH-CLUSTER", "NH-WITHHELD", "NH-WITHHELD"]


def test_the_same_rows_give_the_same_answer_and_are_not_changed(streams: Streams, make_window: MakeWindow) -> None:
    window = make_window(probe=streams.few_labels(0, labels=3))
    before = window.probe.mean_TKF.copy()

    assert diagnose(window) == diagnose(window)
    assert np.array_equal(window.probe.mean_TKF, before)


class Counted(Known):
    """Counts the windows that are computed."""

    computed = 0

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        def counted() -> T:
            self.computed += 1
            return compute()

        return super().get(key, counted)


def rows_of(window: Window, begin: int, end: int) -> Window:
    """The window as it was when rows begin..end-1 of the probe were the newest."""
    fields = ("steps_T", "samples_TK", "mean_TKF", "var_TKF", "adjacency_TKF")
    probe = replace(window.probe, **{name: getattr(window.probe, name)[begin:end] for name in fields})
    return replace(window, probe=probe, last_step=int(probe.steps_T[-1]))


@pytest.mark.parametrize(("kind", "more"), [("few_labels", {"labels": 3}), ("iid", {}), ("skewed_ranks", {})])
def test_a_refresh_computes_what_is_new_and_says_what_a_first_look_says(
    streams: Streams, make_window: MakeWindow, kind: str, more: dict[str, int]
) -> None:
    window = make_window(probe=getattr(streams, kind)(1, steps=1200, ranks=3, n=8, **more))
    known = Counted()
    diagnose(rows_of(window, 0, 1000), known)
    first = known.computed

    for end in range(1020, 1200, 20):
        assert diagnose(rows_of(window, end - 1000, end), known) == diagnose(rows_of(window, end - 1000, end))
    assert first > 100
    assert known.computed - first < first / 2, "in nine refreshes"


@pytest.mark.parametrize("name", ["samples_TK", "mean_TKF", "var_TKF", "adjacency_TKF"])
def test_a_refresh_sees_rows_that_came_anew(streams: Streams, make_window: MakeWindow, name: str) -> None:
    window = make_window(probe=streams.few_labels(1, labels=3, ranks=2, n=8))
    known = Counted()
    diagnose(window, known)
    once = known.computed
    diagnose(window, known)
    assert known.computed == once, "nothing came"

    values = getattr(window.probe, name).copy()
    values[300, 1] *= 1.5
    changed = replace(window, probe=replace(window.probe, **{name: values}))

    assert diagnose(changed, known) == diagnose(changed)
    assert known.computed > once


def test_the_order_of_ranks_changes_no_number(streams: Streams, make_window: MakeWindow) -> None:
    probe = streams.few_labels(0, labels=3, ranks=3, n=8)
    swapped = replace(
        probe,
        mean_TKF=probe.mean_TKF[:, ::-1],
        var_TKF=probe.var_TKF[:, ::-1],
        adjacency_TKF=probe.adjacency_TKF[:, ::-1],
    )
    one, other = (diagnose(make_window(probe=p)).findings[0].evidence for p in (probe, swapped))

    assert one is not None
    assert other is not None
    assert one.value == pytest.approx(other.value)


def test_a_finished_run_that_was_too_short_says_what_it_lacked(streams: Streams, make_window: MakeWindow) -> None:
    diagnosis = diagnose(make_window(probe=streams.iid(0, steps=60), status="finished"))

    assert diagnosis.verdict.code == "NH-WITHHELD"
    assert "would have needed about 90 more steps" in diagnosis.verdict.summary


def test_ranks_of_a_model_without_normalization_layers_are_judged_by_their_data(
    make_window: MakeWindow, streams: Streams
) -> None:
    window = make_window(probe=streams.few_labels(1, labels=2, ranks=2, n=16), kinds=())

    assert diagnose(window).verdict.code == "NH-CLUSTER"
