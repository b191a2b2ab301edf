"""How often the verdicts are right: detection, false alarms, right cause and delay over seeded streams.

    python benchmarks/verdicts.py                  # 20 seeds a kind: streams in minutes, trainings in an hour
    python benchmarks/verdicts.py --trainings 0    # streams alone
    python benchmarks/verdicts.py --keep DIR       # keeps what the trainings recorded; those found there are not redone
    python benchmarks/verdicts.py --save           # also writes benchmarks/results/verdicts-<date>.md

Counts, not times: they do not depend on the machine. Clean controls are made to look guilty. Targets are the project's
own: at most 1 % of clean runs with a warning; strong faults found in 99 % within 150 steps of their onset, moderate
ones in 95 % within 300, weak ones in 90 % within 600; the right cause in 95 %. Streams and layers are simulated sample
by sample; real trainings of a small network on handwritten digits, with batch norm and with Batch Renorm, go through
recorder, spool and store. The seeds are none that a rule was tuned on, and none of the tests'.

A delay is what someone would have waited who watched the run live: it is cut off after every 10 steps and judged by
what there was until then, until the code is found. Clean runs are judged every 50 steps of their course, and any
warning counts.

Shapes: T steps, K ranks, N samples, D inputs.
"""

from __future__ import annotations

import argparse
import datetime
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.trainings import TRAININGS, recorded  # noqa: E402
from service.diagnosis.rules import diagnose  # noqa: E402
from service.diagnosis.stream import cluster_ratio, stream  # noqa: E402
from service.diagnosis.window import LayerRows, Opening, ProbeRows, ScalarRows, Window  # noqa: E402
from service.settings import Settings  # noqa: E402
from service.store import Store  # noqa: E402
from tests.streams import INPUTS, LABELS, Streams, World, layer_rows, make_window  # noqa: E402

STEPS = 600
ONSET = 217
SEEDS_FROM = 700_000
STREAMS = Streams()
LIVE_EVERY = 10
CLEAN_EVERY = 50
SOON = 60
TARGETS = {"strong": (0.99, 150), "moderate": (0.95, 300), "weak": (0.90, 600), "layer": (0.95, 300)}


@dataclass(frozen=True)
class Kind:
    """A kind of run: what makes it from a seed, which code should name it (none: clean), how strong the fault is."""

    name: str
    make: Callable[[int], Window]
    code: str | None = None
    strength: str = "strong"
    onset: int = 0


def probed(make: Callable[[int], ProbeRows]) -> Callable[[int], Window]:
    return lambda seed: make_window(probe=make(seed))


def layered(make: Callable[[int], dict[str, np.ndarray]], **window: object) -> Callable[[int], Window]:
    return lambda seed: make_window(columns=make(seed), **({"kinds": ("BatchNorm",)} | window))


def samples(seed: int, n: int = 32, ranks: int = 1) -> tuple[np.random.Generator, World, np.ndarray]:
    """A population and i.i.d. inputs of it, (T, K, N, D)."""
    rng = np.random.default_rng(seed)
    world = World.make(rng)
    labels = rng.integers(LABELS, size=(STEPS, ranks, n))
    return rng, world, (world.centres_LD[labels] + rng.normal(size=(*labels.shape, INPUTS))) @ world.mixing_DD


def sample_augmentation(seed: int) -> ProbeRows:
    rng, world, x = samples(seed)
    gain = np.exp(0.4 * rng.normal(size=(*x.shape[:3], 1)))
    return world.project(gain * x + 0.5 * rng.normal(size=(*x.shape[:3], 1)))


def batch_augmentation(seed: int) -> ProbeRows:
    rng, world, x = samples(seed)
    gain = np.exp(0.4 * rng.normal(size=(STEPS, 1, 1, 1)))
    return world.project(gain * x + 0.5 * rng.normal(size=(STEPS, 1, 1, 1)))


def rank_gain(seed: int) -> ProbeRows:
    _, world, x = samples(seed, n=8, ranks=4)
    return world.project(x * np.array([1.0, 1.0, 1.0, 1.6])[:, None, None])


def domains(seed: int) -> ProbeRows:
    """Every batch of one of four domains, each with an offset and a contrast of its own."""
    rng, world, x = samples(seed)
    offset, contrast = 0.6 * rng.normal(size=(4, INPUTS)), np.exp(0.3 * rng.normal(size=4))
    which = rng.integers(4, size=STEPS)
    return world.project(x * contrast[which][:, None, None, None] + offset[which][:, None, None])


def dirichlet(seed: int, concentration: float = 1.0) -> ProbeRows:
    """Labels of each batch by a mix drawn for it."""
    rng = np.random.default_rng(seed)
    mix = rng.dirichlet(np.full(LABELS, concentration), size=STEPS)
    labels = (rng.random((STEPS, 1, 32, 1)) > mix.cumsum(1)[:, None, None, :-1]).sum(-1)
    return World.make(rng).observe(labels, rng)


def cycles(seed: int) -> ProbeRows:
    """The share of half of the labels swings slowly."""
    rng = np.random.default_rng(seed)
    low = rng.random((STEPS, 1, 32)) < 0.5 + 0.45 * np.sin(np.arange(STEPS) / 15)[:, None, None]
    half = LABELS // 2
    labels = np.where(low, rng.integers(half, size=low.shape), rng.integers(half, LABELS, size=low.shape))
    return World.make(rng).observe(labels, rng)


def fixed_order(seed: int, batches: int) -> ProbeRows:
    rows = STREAMS.iid(seed)
    at = np.arange(STEPS) % batches
    return replace(rows, mean_TKF=rows.mean_TKF[at], var_TKF=rows.var_TKF[at], adjacency_TKF=rows.adjacency_TKF[at])


def silent_rank(seed: int) -> ProbeRows:
    rows = STREAMS.iid(seed, ranks=3, n=8)
    gone = (np.arange(STEPS) >= ONSET)[:, None] & (np.arange(3) == 1)
    return replace(rows, samples_TK=np.where(gone, np.nan, rows.samples_TK))


def tiny_rest(seed: int) -> ProbeRows:
    rows = STREAMS.iid(seed)
    return replace(rows, samples_TK=np.where(np.arange(STEPS)[:, None] % 42 == 41, 3.0, rows.samples_TK))


def opening(seed: int, drift: float) -> Window:
    from brn_core.wire import Schedule

    rows = layer_rows(seed, drift=drift)
    rng = np.random.default_rng(seed)
    steps = np.arange(300)
    loss = np.where(steps < 200, 1.0, 1.6) * rng.gamma(20, 1 / 20, size=300)
    around = LayerRows(steps[150:], {name: values[150:300] for name, values in rows.items()})
    return make_window(
        columns=layer_rows(seed),
        kinds=("BatchRenorm",),
        schedule=Schedule(bn_steps=200, r_steps=300, d_steps=300, r_max=3.0, d_max=5.0),
        opening=Opening(200, around, ScalarRows(steps, loss)),
    )


def whole(seed: int, probe: ProbeRows, **layer: object) -> Window:
    """Everything a run with Batch Renorm at the paper's limits records: inputs, a layer, shadow passes without loss."""
    rng = np.random.default_rng(seed)
    at = np.arange(0, STEPS, 25)
    loss = np.exp(-at / 300) * rng.gamma(40, 1 / 40, len(at))
    return make_window(
        probe=probe,
        columns=layer_rows(seed, **({"steps": STEPS, "rho": 0.3, "r_max": 3.0, "d_max": 5.0} | layer)),
        kinds=("BatchRenorm",),
        scalars={
            "brn/shadow_train_loss": (at, loss),
            "brn/shadow_eval_loss": (at, loss + rng.normal(-0.01, 0.05, len(at))),
            "brn/shadow_disagreement": (at, rng.uniform(0, 0.12, len(at))),
        },
    )


CLEAN = (
    Kind("i.i.d., N = 32", probed(STREAMS.iid)),
    Kind("i.i.d., N = 4", probed(lambda s: STREAMS.iid(s, n=4))),
    Kind("i.i.d., N = 2", probed(lambda s: STREAMS.iid(s, n=2))),
    Kind("i.i.d., N = 32, 2000 steps", probed(lambda s: STREAMS.iid(s, steps=2000))),
    Kind("long-tailed labels", probed(lambda s: STREAMS.iid(s, prior="long"))),
    Kind("heavy-tailed inputs (t3), N = 16", probed(lambda s: STREAMS.iid(s, n=16, tails="t3"))),
    Kind("augmentation per sample", probed(sample_augmentation)),
    Kind("1347 samples, reshuffled epochs", probed(STREAMS.without_replacement)),
    Kind("300 samples, reshuffled epochs", probed(lambda s: STREAMS.without_replacement(s, n=16, size=300))),
    Kind("42 batches in a fixed random order", probed(lambda s: fixed_order(s, 42))),
    Kind("one batch, over and over", probed(lambda s: fixed_order(s, 1))),
    Kind("10 batches in a fixed order, augmented anew", probed(lambda s: STREAMS.again_augmented(s, batches=10))),
    Kind("42 batches in a fixed order, augmented anew", probed(lambda s: STREAMS.again_augmented(s, batches=42))),
    Kind("labels without signal, 2 a batch", probed(STREAMS.unlabelled_clusters)),
    Kind("2 ranks x 8, i.i.d.", probed(lambda s: STREAMS.iid(s, ranks=2, n=8))),
    Kind("4 ranks x 4, i.i.d.", probed(lambda s: STREAMS.iid(s, ranks=4, n=4))),
    Kind("layer, N = 32", layered(lambda s: layer_rows(s, rho=0.3))),
    Kind("layer, N = 32, network moves .01 sigma a step", layered(lambda s: layer_rows(s, rho=0.3, drift=0.01))),
    Kind("layer, rectified, N = 32", layered(lambda s: layer_rows(s, rho=0.3, tails="relu"))),
    Kind("layer, fully connected, rectified, N = 32", layered(lambda s: layer_rows(s, tails="relu"))),
    Kind("layer grows tenfold", layered(lambda s: layer_rows(s, rho=0.3, growth=0.0055), first_sigma_L=np.ones(1))),
    Kind("limits open on settled statistics, loss rises", lambda s: opening(s, 0.0)),
    Kind("whole run, Batch Renorm, N = 32", lambda s: whole(s, STREAMS.iid(s))),
    Kind("whole run, Batch Renorm, rectified, N = 32", lambda s: whole(s, STREAMS.iid(s), tails="relu")),
    Kind("whole run, Batch Renorm, N = 16", lambda s: whole(s, STREAMS.iid(s, n=16), n=16)),
    Kind("whole run, Batch Renorm, long-tailed labels", lambda s: whole(s, STREAMS.iid(s, prior="long"))),
    Kind("whole run, Batch Renorm, augmentation per sample", lambda s: whole(s, sample_augmentation(s))),
    Kind("whole run, Batch Renorm, 4 ranks x 8", lambda s: whole(s, STREAMS.iid(s, ranks=4, n=8), ranks=4, n=8)),
)
FAULTS = (
    *(
        Kind(f"{k} label{'s' * (k > 1)} a batch", probed(lambda s, k=k: STREAMS.few_labels(s, labels=k)), "NH-CLUSTER")
        for k in (1, 2, 4)
    ),
    Kind(
        f"2 labels a batch from step {ONSET} on",
        probed(lambda s: STREAMS.few_labels(s, labels=2, onset=ONSET)),
        "NH-CLUSTER",
        onset=ONSET,
    ),
    Kind("augmentation per batch", probed(batch_augmentation), "NH-CLUSTER"),
    Kind("half of the batch of one label", probed(STREAMS.mixture), "NH-CLUSTER", "moderate"),
    Kind("domains, one a batch", probed(domains), "NH-CLUSTER", "moderate"),
    Kind("label mix drawn a batch (Dirichlet 1)", probed(dirichlet), "NH-CLUSTER", "moderate"),
    Kind("label mix drawn a batch (Dirichlet 6)", probed(lambda s: dirichlet(s, 6.0)), "NH-CLUSTER", "weak"),
    Kind("13 % of the batch of one label", probed(lambda s: STREAMS.mixture(s, share=0.13)), "NH-CLUSTER", "weak"),
    Kind("pairs of one label", probed(STREAMS.paired), "NH-PAIRED"),
    Kind("4 copies of each sample", probed(STREAMS.copies), "NH-PAIRED"),
    Kind("sorted by label", probed(STREAMS.sorted_labels), "NH-ORDER"),
    Kind("shuffle buffer of 1024", probed(STREAMS.shuffle_buffer), "NH-ORDER", "moderate"),
    Kind("label mix in slow cycles", probed(cycles), "NH-ORDER", "moderate"),
    Kind("ranks with labels of their own", probed(lambda s: STREAMS.skewed_ranks(s, own=1.0)), "NH-RANKSKEW"),
    Kind("ranks, half of their own labels", probed(lambda s: STREAMS.skewed_ranks(s, own=0.5)), "NH-RANKSKEW"),
    Kind("one rank with 1.6 times the contrast", probed(rank_gain), "NH-RANKSKEW", "moderate"),
    Kind("two of three ranks equal", probed(STREAMS.equal_ranks), "NH-RANKDUP"),
    Kind("batches of one mix of labels", probed(STREAMS.stratified), "NH-STRATIFIED", "moderate"),
    Kind("a rank falls silent", probed(silent_rank), "NH-MISSING", "layer", ONSET),
    Kind("3 samples at the end of each epoch", probed(tiny_rest), "NH-UNEVEN", "layer"),
    Kind("layer, N = 2", layered(lambda s: layer_rows(s, n=2, rho=0.3)), "NH-SMALL", "layer"),
    Kind("layer, N = 4", layered(lambda s: layer_rows(s, n=4, rho=0.3)), "NH-SMALL", "layer"),
    Kind(
        "1 % of samples ten times as large",
        layered(lambda s: layer_rows(s, rho=0.3, outliers=0.01)),
        "NH-TAIL",
        "layer",
    ),
    Kind(
        "statistics trail by .7 sigma",
        layered(lambda s: layer_rows(s, rho=0.3, momentum=0.02, drift=0.014), momentum=0.02),
        "NH-LAG",
        "layer",
        250,
    ),
    Kind(
        "scale doubles every 50 steps",
        layered(lambda s: layer_rows(s, rho=0.3, growth=0.014), first_sigma_L=np.ones(1)),
        "NH-RUNAWAY",
        "layer",
        200,
    ),
    Kind("limits open on trailing statistics, loss rises", lambda s: opening(s, 0.03), "NH-SCHED-FAST", "layer", 200),
    Kind(
        "statistics of rank 0 only",
        layered(lambda s: layer_rows(s, n=32, rho=0.3, ranks=3, buffers="rank 0"), world_size=3),
        "NH-BUFFERS",
        "layer",
    ),
)


def until(window: Window, end: int) -> Window:
    """The run as it was when step `end` had not begun yet."""

    def rows(of: LayerRows) -> LayerRows:
        return LayerRows(of.steps_T[of.steps_T < end], {name: c[of.steps_T < end] for name, c in of.columns.items()})

    def scalar(of: ScalarRows) -> ScalarRows:
        return ScalarRows(of.steps_T[of.steps_T < end], of.values_T[of.steps_T < end])

    seen_T = window.probe.steps_T < end
    opening = window.opening
    if opening is not None:
        opening = Opening(opening.step, rows(opening.rows), scalar(opening.loss)) if opening.step < end else None
    return replace(
        window,
        status="running",
        last_step=min(window.last_step or 0, end - 1),
        probe=ProbeRows(
            *(
                values[seen_T]
                for values in (
                    window.probe.steps_T,
                    window.probe.samples_TK,
                    window.probe.mean_TKF,
                    window.probe.var_TKF,
                    window.probe.adjacency_TKF,
                )
            )
        ),
        rows=rows(window.rows),
        scalars={name: scalar(values) for name, values in window.scalars.items()},
        nonfinite=window.nonfinite if window.nonfinite is not None and window.nonfinite.step < end else None,
        opening=opening,
    )


def loud(window: Window) -> dict[str, str]:
    """Code and severity of what warns."""
    return {f.code: f.severity for f in diagnose(window).findings if f.severity in ("warning", "critical")}


def waited(window: Window, code: str, onset: int) -> int | None:
    """Steps from the onset after which someone who looks every 10 steps is told of a fault; None: never."""
    last = window.last_step or 0
    for end in range(onset + LIVE_EVERY, last + LIVE_EVERY + 1, LIVE_EVERY):
        if any(f.code == code for f in diagnose(until(window, end)).findings):
            return end - onset
    return None


@dataclass
class Tally:
    """Counts over runs. Of clean ones (no code) `found` are those that warned at any time, `critical` the worst."""

    runs: int = 0
    found: int = 0
    critical: int = 0
    in_time: int = 0
    named: int = 0
    delays: list[int] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)

    @property
    def delay(self) -> str:
        return f"{np.median(self.delays):.0f} ({max(self.delays)})" if self.delays else "-"

    @property
    def soon(self) -> int:
        return sum(delay <= SOON for delay in self.delays)

    def add(self, window: Window, code: str | None, onset: int, within: int, verdict: str | None) -> None:
        """Counts one run in which `code` is wrong from step `onset` on (None: nothing is)."""
        self.runs += 1
        if code is None:
            ends = range(CLEAN_EVERY, (window.last_step or 0) + CLEAN_EVERY + 1, CLEAN_EVERY)
            severities = [loud(until(window, end)) for end in ends] + [loud(window)]
            codes = {code for found in severities for code in found}
            self.found += bool(codes)
            self.critical += any("critical" in found.values() for found in severities)
            self.others.update(codes)
            return
        diagnosis = diagnose(window)
        self.others.update({f.code for f in diagnosis.findings if f.severity in ("warning", "critical")} - {code})
        finding = next((f for f in diagnosis.findings if f.code == code), None)
        if finding is None:
            return
        self.found += 1
        # the verdict names the cause; codes that are never more than an info are named by being there
        self.named += diagnosis.verdict.code == (verdict or code) or finding.severity == "info"
        delay = waited(window, code, onset)
        if delay is not None:
            self.delays.append(delay)
            self.in_time += delay <= within


def tally(kind: Kind, seeds: int) -> Tally:
    total = Tally()
    for seed in range(SEEDS_FROM, SEEDS_FROM + seeds):
        total.add(kind.make(seed), kind.code, kind.onset, TARGETS[kind.strength][1], None)
    return total


def coverage(seeds: int, rows: int) -> tuple[int, int]:
    """Of the 95 % intervals of F over disjoint windows of independent batches, how many hold 1; how many there are."""
    held = total = 0
    for seed in range(SEEDS_FROM, SEEDS_FROM + seeds):
        probe = STREAMS.iid(seed, steps=2000)
        for begin in range(0, 2000, rows):
            ratio = cluster_ratio(stream(probe, 1), begin, begin + rows)
            assert ratio is not None
            held, total = held + (ratio.low <= 1 <= ratio.high), total + 1
    return held, total


def upper_bound(found: int, runs: int) -> float:
    """95 % upper end (Wilson) of a share."""
    z, p = 1.645, found / runs
    centre = p + z * z / (2 * runs)
    return (centre + z * math.sqrt(p * (1 - p) / runs + z * z / (4 * runs * runs))) / (1 + z * z / runs)


def report(seeds: int) -> str:
    lines = [
        f"{seeds} seeds a kind, from {SEEDS_FROM} on, {STEPS} steps unless said otherwise.",
        "",
        "| clean control | runs | with a warning |",
    ]
    lines += ["|---|---|---|"]
    alarms = runs = critical = 0
    for kind in CLEAN:
        done = tally(kind, seeds)
        alarms, critical, runs = alarms + done.found, critical + done.critical, runs + done.runs
        codes = f" ({', '.join(f'{c} {n}' for c, n in done.others.items())})" if done.others else ""
        lines.append(f"| {kind.name} | {done.runs} | {done.found}{codes} |")
        print(lines[-1], flush=True)
    lines.append(f"| **all** | {runs} | **{alarms}**, at most {upper_bound(alarms, runs):.1%}; target 1 % |")
    lines.append(f"| critical | {runs} | {critical}, at most {upper_bound(critical, runs):.1%}; target .1 % |")
    lines.append("")
    for rows in (100, 400):
        held, total = coverage(seeds, rows)
        lines.append(
            f"The 95 % interval of F over {rows} independent batches holds 1 in {held} of {total}: "
            f"{held / total:.0%}, target 90 to 97 %.  "
        )
    lines += ["", "| fault | code | found | in time | target | in 60 | right cause | median (latest) delay | others |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for kind in FAULTS:
        done = tally(kind, seeds)
        share, within = TARGETS[kind.strength]
        others = ", ".join(f"{c} {n}" for c, n in done.others.items()) or "-"
        lines.append(
            f"| {kind.name} | {kind.code} | {done.found} / {done.runs} | {done.in_time} / {done.runs} | "
            f"{kind.strength}: {share:.0%} in {within} | {done.soon} | {done.named} / {done.found} | {done.delay} | "
            f"{others} |"
        )
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def report_of_trainings(seeds: int, keep: Path | None) -> str:
    lines = [
        f"Trainings on digits: {seeds} seeds a kind and normalization, from {SEEDS_FROM} on. A delay "
        "counts from the step from which the rule may speak (the fault's onset; where it needs moving statistics, when "
        "they are warm). How often a loss of more than 10 points of accuracy comes with NH-GAP is not measured here.",
        "",
        "| training | normalization | code | found | in time | target | right cause | median (latest) delay | others |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(prefix="brn-verdicts-") as name:
        folder = keep or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        store = Store(Settings(store=f"chdb://{name}/store", min_free_bytes=0))
        for training in TRAININGS:
            done = Tally()
            for window in recorded(training, seeds, SEEDS_FROM, store, folder):
                done.add(window, training.code, training.onset, training.within, training.verdict)
            target = "at most 1 % warn" if training.code is None else f"95% in {training.within}"
            cause = "-" if training.code is None else f"{done.named} / {done.found}"
            others = ", ".join(f"{code} {n}" for code, n in done.others.items()) or "-"
            lines.append(
                f"| {training.name} | {', '.join(training.norms)} | {training.code or '-'} | "
                f"{done.found} / {done.runs} | "
                f"{done.in_time if training.code else '-'} | {target} | {cause} | {done.delay} | {others} |"
            )
            print(lines[-1], flush=True)
        store.close()
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20, help="runs a kind")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/verdicts-<date>.md")
    parser.add_argument("--trainings", type=int, default=20, help="trainings a kind and normalization")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="what trainings recorded stays there, to judge again")
    given = parser.parse_args()
    text = report(given.seeds) if given.seeds else ""
    text += f"\n{report_of_trainings(given.trainings, given.keep)}" if given.trainings else ""
    print()
    print(text)
    if given.save:
        today = datetime.date.today().isoformat()
        path = ROOT / "benchmarks" / "results" / f"verdicts-{today}.md"
        command = f"python benchmarks/verdicts.py --seeds {given.seeds} --trainings {given.trainings} --save"
        path.write_text(f"# Verdicts, {today}\n\n`{command}`. {text}", encoding="utf-8")


if __name__ == "__main__":
    main()
