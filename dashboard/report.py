"""One file of a run or a comparison that opens anywhere: text, figures, plotly.js; nothing comes from outside."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

import plotly.graph_objects as go
from markupsafe import Markup
from pydantic import ValidationError

from dashboard import drawings
from dashboard.differences import compare_context
from dashboard.drawings import Look
from dashboard.figures.palette import PALETTES
from dashboard.login import plotly_source
from dashboard.templating import STATIC, templates
from dashboard.views import DEFAULT_STATISTIC, findings_context, run_view
from service import answers, history, windows
from service.answers.comparison import Axis
from service.checkup import answer_of_service
from service.errors import CannotStart, ServiceError, StoreInUse
from service.settings import Settings
from service.store import Store

RUN_FIGURES = (
    ("schedule", "Schedule", "Do r and d stay inside their limits, and how much is clipped?", drawings.schedule),
    ("heatmap", "Layer map", "Which layers, and since when?", drawings.heatmap),
    ("causes", "The gap and its causes", "Does inference lose what training has, and why?", drawings.causes),
    ("scalars", "Loss, accuracy and other scalars", "Does the training itself go well?", drawings.scalars),
    ("ranks", "Ranks", "Do ranks see the same data?", drawings.rank_spread),
)


def run_report(store: Store, run_id: str) -> str:
    """A run as one HTML file: its findings and figures as they are now.

    Raises:
        NotFound: no such run.
    """
    run = answers.run(store, run_id)
    diagnosis = windows.diagnosis(store, run_id)
    figures = [
        {
            "name": name,
            "title": title,
            "question": question,
            "json": _for_every_reader(partial(draw, store, run_id), Look()),
        }
        for name, title, question, draw in RUN_FIGURES
        if name != "ranks" or run.world_size > 1
    ]
    context = {
        "title": run.name,
        "view": run_view(run, run.layers),
        "run": run,
        "report": True,
        "figures": figures,
    }
    return _page("report_run.html", context | findings_context(diagnosis, run, history.of_run(store, run_id).findings))


@dataclass(frozen=True, slots=True)
class Shown:
    """What the figure of a comparison shows, as the address of its page says it.

    Attributes:
        by: over steps, or over the share of the planned ones.
        stat: the statistic below the scalar.
        scalar: "" for the first.
        group: what runs are averaged by, see `drawings.group_of`; "" for a line a run.
    """

    by: Axis = "step"
    stat: str = DEFAULT_STATISTIC
    scalar: str = ""
    group: str = ""


def comparison_report(store: Store, run_ids: Sequence[str], shown: Shown) -> str:
    """Several runs as one HTML file.

    Raises:
        NotFound, Invalid: as `answers.compare`.
    """
    found, records = drawings.comparison_of(store, run_ids, [shown.stat], shown.by)
    diagnoses = [windows.diagnosis(store, own.id) for own in records]
    context = compare_context(found, records, diagnoses)
    scalar = shown.scalar if shown.scalar in context["scalars"] else context["scalar"]
    figure = {
        "name": "compare",
        "title": "Over each other",
        "question": "Which of these runs goes better, and does its normalization differ?",
        "json": _for_every_reader(
            lambda look: drawings.compared(store, found, records, look, by=shown.by, scalar=scalar, group=shown.group),
            Look(stat=shown.stat),
        ),
    }
    return _page(
        "report_compare.html", context | {"report": True, "title": f"{len(records)} runs compared", "figures": [figure]}
    )


def _page(template: str, context: dict[str, Any]) -> str:
    own = {
        "style": Markup((STATIC / "page.css").read_text()),
        "plotly": Markup(plotly_source().decode().replace("</script", "<\\/script")),
        "script": Markup((STATIC / "report.js").read_text()),
        "made_at": datetime.now(UTC),
    }
    return templates.get_template(template).render(context | own)


def _for_every_reader(draw: Callable[[Look], go.Figure], look: Look) -> Markup:
    """A figure in light and dark, for a wide and a narrow screen, as JSON that cannot end the script it stands in."""
    looks: dict[str, Look] = {theme: replace(look, theme=theme) for theme in PALETTES}
    looks |= {f"{theme} narrow": replace(own, compact=True, columns=1) for theme, own in looks.items()}
    figures = (f'"{name}":{draw(own).to_json()}' for name, own in looks.items())
    return Markup(f"{{{','.join(figures)}}}".translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}))


USAGE = (
    "brn-serve --report RUN [RUN ...] -o FILE writes stored runs as one HTML file, without serving; "
    "RUN may be the address of a comparison, whose file then shows what the page shows."
)


def main(argv: Sequence[str], *, prog: str) -> int:
    """`brn-serve --report RUN [RUN ...] -o FILE`: writes the file from the store, without serving.

    A service that has the store open is asked for it.

    Returns:
        Exit code: 0, or 1 with one line on stderr.
    """
    parser = argparse.ArgumentParser(prog=prog, description=USAGE)
    parser.add_argument("--report", nargs="+", metavar="RUN", required=True, help="id of a run; several are compared")
    parser.add_argument("-o", "--output", type=Path, help="the file (default: RUN.html, or comparison.html)")
    own = ("store", "host", "port")
    for name in own:
        parser.add_argument(f"--{name}", help=Settings.model_fields[name].description)
    given = parser.parse_args(argv)
    try:
        runs, shown = _asked(given.report)
        try:
            settings = Settings(**{name: value for name in own if (value := getattr(given, name)) is not None})
        except ValidationError as error:
            raise CannotStart(error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")) from error
        html = _report(settings, runs, shown)
        path: Path = given.output or Path(f"{runs[0]}.html" if len(runs) == 1 else "comparison.html")
        path.write_text(html, encoding="utf-8")
    except (CannotStart, ServiceError, OSError) as error:
        detail = error.detail if isinstance(error, ServiceError) else error
        print(f"{prog}: {detail}", file=sys.stderr)
        return 1
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _asked(given: Sequence[str]) -> tuple[list[str], Shown]:
    """The runs that are named, or those of the page whose address it is, and what that page shows."""
    if len(given) > 1 or "/" not in given[0]:
        return list(given), Shown()
    address = urlsplit(given[0])
    asked = {name: values[0] for name, values in parse_qs(address.query).items()}
    by: Axis | None = next((axis for axis in get_args(Axis) if axis == asked.get("by", "step")), None)
    if address.path.endswith("/compare") and "runs" in asked and by is not None:
        shown = Shown(by, asked.get("stat", DEFAULT_STATISTIC), asked.get("scalar", ""), asked.get("group", ""))
        return [run for run in asked["runs"].split(",") if run], shown
    named = re.fullmatch(r".*/runs/([^/]+)(/.*)?", address.path)
    if named is None:
        raise CannotStart(f"--report wants ids of runs or the address of a run or a comparison, got {given[0]!r}")
    return [unquote(named[1])], Shown()


def _report(settings: Settings, runs: Sequence[str], shown: Shown) -> str:
    try:
        store = Store(settings)
    except StoreInUse as error:
        path = f"/runs/{quote(runs[0], safe='')}/report"
        if len(runs) > 1:
            path = f"/compare/report?{urlencode({'runs': ','.join(runs)} | asdict(shown))}"
        return answer_of_service(settings, path, error).text
    try:
        return run_report(store, runs[0]) if len(runs) == 1 else comparison_report(store, runs, shown)
    finally:
        store.close()
