"""The one screen at the end of a run: how well it trained, and what the service found."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from brn_core.worker.findings import FindingsUnavailableError, fetch_diagnosis, print_diagnosis, run_url
from brn_core.worker.progress import rate_text, time_text
from brn_core.worker.settings import Settings
from brn_core.worker.train import TRAIN_ACCURACY_STEPS, Outcome


def print_summary(console: Console, settings: Settings, outcome: Outcome) -> None:
    """Accuracy, rate and findings; without a service, where the rows are and how to send them."""
    last = min(TRAIN_ACCURACY_STEPS, outcome.steps)
    steps = outcome.steps - outcome.first_step
    done = f"{steps} steps" if not outcome.first_step else f"{steps} of {outcome.steps} steps"
    rate = rate_text(steps / max(outcome.seconds, 1e-9))
    averaged = [] if settings.weight_ema is None else [f"weights averaged with decay {settings.weight_ema:g}"]
    uses_batch = settings.norm in ("bn", "brn", "syncbn")
    in_training = ", batch statistics" * uses_batch
    in_test = ", ".join(["moving statistics"] * uses_batch + averaged)
    rows = [
        ("run", f"{settings.name}: {done} in {time_text(outcome.seconds)} ({rate})"),
        ("training", f"accuracy {outcome.train_accuracy:.1%} (last {last} batches{in_training})"),
        (
            "test",
            f"accuracy {outcome.evaluation.accuracy:.1%}{f' ({in_test})' if in_test else ''}, "
            f"loss {outcome.evaluation.loss:.3f}",
        ),
    ]
    if outcome.dropped_steps:
        rows.append(("lost", f"{outcome.dropped_steps} recorded steps could not be kept"))
    console.print()
    for name, text in rows:
        console.print(Text.assemble((f"{name:<10}", "bold"), text))
    if outcome.run_id is None:
        return
    try:
        diagnosis = fetch_diagnosis(
            settings.url, outcome.run_id, token=settings.token, through_step=outcome.last_recorded_step or 0
        )
    except FindingsUnavailableError as error:
        console.print(
            f"{error}; the rows are kept: python -m brn_core.spool {settings.spool} --url {settings.url}",
            soft_wrap=True,
            highlight=False,
        )
        return
    console.print(Text.assemble((f"{'findings':<10}", "bold"), run_url(settings.url, outcome.run_id)), soft_wrap=True)
    print_diagnosis(console, diagnosis)
