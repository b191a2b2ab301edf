"""One file of a run or a comparison that opens anywhere: text, figures, plotly.js; nothing comes from outside."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import plotly.graph_objects as go
from markupsafe import Markup
from pydantic import ValidationError

from dashboard import drawings
from dashboard.drawings import Look
from dashboard.login import plotly_source
from dashboard.templating import STATIC, templates
from dashboard.views import DEFAULT_STATISTIC, compare_context, findings_context, run_view
from service import answers, history, windows
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
        {"name": name, "title": title, "question": question, "json": _inline(draw(store, run_id, Look()))}
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
    past = history.of_run(store, run_id).findings
    return _page("report_run.html", context | findings_context(diagnosis, past, run))


def comparison_report(store: Store, run_ids: Sequence[str]) -> str:
    """Several runs as one HTML file.

    Raises:
        NotFound, Invalid: as `answers.compare`.
    """
    found, records = drawings.comparison_of(store, run_ids, DEFAULT_STATISTIC, "fraction")
    context = compare_context(found, records)
    figure = drawings.compared(store, found, records, Look(), by="fraction", scalar=context["scalar"])
    shown = {
        "name": "compare",
        "title": "Runs over each other",
        "question": "Which of these runs goes better, and does its normalization differ?",
        "json": _inline(figure),
    }
    return _page(
        "report_compare.html", context | {"report": True, "title": f"{len(records)} runs compared", "figures": [shown]}
    )


def _page(template: str, context: dict[str, Any]) -> str:
    own = {
        "style": Markup((STATIC / "page.css").read_text()),
        "plotly": Markup(plotly_source().decode().replace("</script", "<\\/script")),
        "script": Markup((STATIC / "report.js").read_text()),
        "made_at": datetime.now(UTC),
    }
    return templates.get_template(template).render(context | own)


def _inline(figure: go.Figure) -> Markup:
    """JSON that cannot end the script element it stands in."""
    text: str = figure.to_json()
    return Markup(text.translate({ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&"}))


USAGE = "brn-serve --report RUN [RUN ...] -o FILE writes stored runs as one HTML file, without serving."


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
    runs: list[str] = given.report
    try:
        try:
            settings = Settings(**{name: value for name in own if (value := getattr(given, name)) is not None})
        except ValidationError as error:
            raise CannotStart(error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")) from error
        html = _report(settings, runs)
        path: Path = given.output or Path(f"{runs[0]}.html" if len(runs) == 1 else "comparison.html")
        path.write_text(html, encoding="utf-8")
    except (CannotStart, ServiceError, OSError) as error:
        detail = error.detail if isinstance(error, ServiceError) else error
        print(f"{prog}: {detail}", file=sys.stderr)
        return 1
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def _report(settings: Settings, runs: Sequence[str]) -> str:
    try:
        store = Store(settings)
    except StoreInUse as error:
        named = [quote(run, safe="") for run in runs]
        path = f"/runs/{named[0]}/report" if len(runs) == 1 else f"/compare/report?runs={','.join(named)}"
        return answer_of_service(settings, path, error).text
    try:
        return run_report(store, runs[0]) if len(runs) == 1 else comparison_report(store, runs)
    finally:
        store.close()
