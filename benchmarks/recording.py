"""What does recording a training cost, and where does it cost it?

    python benchmarks/recording.py [--rounds 12] [--skip-peers] [--save]

1. A ResNet-50 (53 normalization layers, 16x3x64x64, float32, CPU), one thread: step time with nn.BatchNorm and with
   Batch Renormalization, each unwatched and recorded. All models take a step in turn in every round, and the figure is
   the median over rounds of the ratio within the round: what else the machine does then disturbs all of them.
   "Training thread" is CPU time of the thread that trains; "with the background" adds the CPU time that the recorder's
   own threads took, spread over its steps. Two costs fall on few steps, so that a median hides them, and are measured
   apart and spread over the steps between them, by the defaults: the shadow pass (every 50 steps), as what the steps
   that have one take beyond those that have none; the snapshots of every channel (every 100), as the recorder's CPU
   time for a step that has one beyond a step that has none.
2. The time `recorder.step()` takes in the training thread for 54 layers, against the loggers people use writing 12
   statistics of each. They come with the `trackers` extra; those that are not installed are reported as missing.

Nothing is sent: the service's address is dead, so every batch goes to a spool in a temporary directory.
--save writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from brn_core.layers import BatchRenorm2d
from brn_core.recorder import Recorder

DEAD_URL = "http://127.0.0.1:9"
STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
LAYERS, STATISTICS = 54, 12

Norm = Callable[[int], nn.Module]


def batch_renorm(channels: int) -> nn.Module:
    return BatchRenorm2d(channels, r_max=3.0, d_max=5.0)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with a shortcut, four times as wide at its end (He et al. 2015)."""

    def __init__(self, channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        wide = 4 * width
        self.branch = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), norm(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), norm(width), nn.ReLU(inplace=True),
            nn.Conv2d(width, wide, 1, bias=False), norm(wide),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or channels != wide:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, wide, 1, stride, bias=False), norm(wide))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.shortcut(x), inplace=True)


def resnet50(norm: Norm, classes: int = 100) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False), norm(64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    channels = 64
    for width, depth, stride in STAGES:
        for block in range(depth):
            layers.append(Bottleneck(channels, width, stride if block == 0 else 1, norm))
            channels = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Training:
    """One model with its optimizer, watched or not; `step` answers the training thread's CPU seconds."""

    def __init__(self, norm: Norm, settings: dict[str, object] | None, spool: Path) -> None:
        self.model = resnet50(norm)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        before = set(threading.enumerate())
        self.recorder = None
        if settings is not None:
            self.recorder = Recorder(self.model, url=DEAD_URL, spool=spool, strict=True, **settings)  # type: ignore[arg-type]
        self.threads = [t for t in threading.enumerate() if t not in before]
        self.steps, self.in_recorder = 0, 0.0

    def step(self, x: Tensor, y: Tensor) -> float:
        start = time.thread_time()
        loss = F.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.recorder is not None:
            self.recorder.step(loss)
        self.steps += 1
        return time.thread_time() - start

    def background_seconds(self) -> float:
        """CPU time of the recorder's threads so far."""
        clocks = [time.pthread_getcpuclockid(t.ident) for t in self.threads if t.ident is not None and t.is_alive()]
        return sum(time.clock_gettime(clock) for clock in clocks)


NEVER: dict[str, object] = {"shadow_every": 0, "channels_every": 0}
VARIANTS: dict[str, tuple[Norm, dict[str, object] | None]] = {
    "BatchNorm": (nn.BatchNorm2d, None),
    "Batch Renorm": (batch_renorm, None),
    "Batch Renorm, recorded": (batch_renorm, NEVER),
    "BatchNorm, recorded": (nn.BatchNorm2d, NEVER),
    "BatchNorm, shadow": (nn.BatchNorm2d, NEVER | {"shadow_every": 1}),
    "BatchNorm, snapshots": (nn.BatchNorm2d, NEVER | {"channels_every": 1}),
}
RATIOS = [
    ("Batch Renorm / BatchNorm, both unwatched", "Batch Renorm", "BatchNorm", 1.03),
    ("Batch Renorm, layers and input every step / unwatched", "Batch Renorm, recorded", "Batch Renorm", 1.03),
    ("BatchNorm, layers and input every step / unwatched", "BatchNorm, recorded", "BatchNorm", None),
]
SPREAD = [
    ("+ a shadow pass every 50 steps", "BatchNorm, shadow", 50),
    ("+ every channel every 100 steps", "BatchNorm, snapshots", 100),
]


def training_table(rounds: int, spool: Path) -> Iterator[str]:
    trainings = {name: Training(norm, settings, spool) for name, (norm, settings) in VARIANTS.items()}
    taken: dict[str, list[float]] = {name: [] for name in trainings}
    background: dict[str, float] = {}
    for i in range(rounds + 2):
        x, y = torch.randn(16, 3, 64, 64), torch.randint(100, (16,))
        if i == 2:
            background = {name: -t.background_seconds() for name, t in trainings.items()}
        order = list(trainings)
        for name in order[i % len(order) :] + order[: i % len(order)]:  # who comes first finds the caches of another
            seconds = trainings[name].step(x, y)
            if i >= 2:  # warm
                taken[name].append(seconds)
    time.sleep(1.5)  # what the last steps left to do
    background = {name: background[name] + t.background_seconds() for name, t in trainings.items()}
    for training in trainings.values():
        if training.recorder is not None:
            training.recorder.close(timeout_seconds=1)
    yield f"BatchNorm step: {statistics.median(taken['BatchNorm']) * 1e3:.0f} ms of CPU time, {rounds} rounds."
    yield ""
    yield "| step time | training thread | quartiles | with the background | budget |"
    yield "|---|---|---|---|---|"
    whole: dict[str, tuple[float, float]] = {}
    for label, above, below, budget in RATIOS:
        ratios = [a / b for a, b in zip(taken[above], taken[below], strict=True)]
        more = (background[above] - background[below]) / rounds / statistics.median(taken[below])
        middle = statistics.median(ratios)
        low, _, high = statistics.quantiles(ratios, n=4)
        limit = "-" if budget is None else f"{budget:.2f}"
        whole[above] = middle, middle + more
        yield f"| {label} | {middle:.3f} | {low:.3f} - {high:.3f} | {middle + more:.3f} | {limit} |"
    step = statistics.median(taken["BatchNorm"])
    thread, both = whole["BatchNorm, recorded"]
    for label, name, every in SPREAD:
        dearer = [a - b for a, b in zip(taken[name], taken["BatchNorm, recorded"], strict=True)]
        own = statistics.median(dearer) / step / every
        more = (background[name] - background["BatchNorm, recorded"]) / rounds / step / every
        thread, both = thread + own, both + own + more
        yield f"| {label} | {own:+.4f} | - | {own + more:+.4f} | - |"
    yield f"| BatchNorm recorded with the defaults, all of it | {thread:.3f} | - | {both:.3f} | 1.05 |"


# --- recorder.step() against loggers ------------------------------------------------------------------------------

Log = Callable[[int, dict[str, float]], None]


@contextmanager
def _tensorboard(folder: Path) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:  # type: ignore[no-untyped-call]

        def log(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

        yield log


@contextmanager
def _mlflow(folder: Path) -> Iterator[Log]:
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    with mlflow.start_run():
        yield lambda step, numbers: mlflow.log_metrics(numbers, step=step)


@contextmanager
def _wandb(folder: Path) -> Iterator[Log]:
    import wandb

    run = wandb.init(project="bench", mode="offline", dir=str(folder))
    yield lambda step, numbers: run.log(numbers, step=step)
    run.finish()


@contextmanager
def _trackio(folder: Path) -> Iterator[Log]:
    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio

    trackio.init(project="bench", embed=False)
    yield lambda step, numbers: trackio.log(numbers, step=step)
    trackio.finish()


PEERS = {
    "TensorBoard add_scalar": ("tensorboard", _tensorboard),
    "mlflow.log_metrics": ("mlflow", _mlflow),
    "wandb offline": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}


def norm_stack() -> nn.Module:
    """54 layers with the widths of a ResNet-50, on inputs small enough to be quick."""
    widths = [width * 4 ** (i % 3 == 2) for width, depth, _ in STAGES for i in range(3 * depth)]
    widths = (widths + [64] * LAYERS)[:LAYERS]

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(w) for w in widths)

        def forward(self, x: Tensor) -> Tensor:
            return sum(norm(x[:, : norm.num_features]).mean() for norm in self.norms)  # type: ignore[misc, index]

    return Stack()


def milliseconds_of_step(calls: int, spool: Path) -> list[float]:
    model, x = norm_stack(), torch.randn(16, 2048, 2, 2)
    recorder = Recorder(model, url=DEAD_URL, spool=spool, shadow_every=0, every=1, strict=True)
    taken = []
    for _ in range(calls):
        loss = model(x)
        start = time.perf_counter()
        recorder.step(loss)
        taken.append((time.perf_counter() - start) * 1e3)
    recorder.close(timeout_seconds=1)
    return taken[3:]


def milliseconds_of_peer(log: Log, calls: int) -> list[float]:
    model, x = norm_stack(), torch.randn(16, 2048, 2, 2)
    taken = []
    for step in range(calls):
        model(x)  # the same pace
        numbers = {f"layer{i}/stat{j}": step + i / (j + 1) for i in range(LAYERS) for j in range(STATISTICS)}
        start = time.perf_counter()
        log(step, numbers)
        taken.append((time.perf_counter() - start) * 1e3)
    return taken[3:]


def peer_table(calls: int, folder: Path) -> Iterator[str]:
    yield f"| one step of {LAYERS} layers | training thread, ms, median | p95 | ours / this |"
    yield "|---|---|---|---|"
    ours = milliseconds_of_step(calls, folder / "spool")
    middle = statistics.median(ours)
    p95 = statistics.quantiles(ours, n=20)[-1]
    yield f"| recorder.step(), all {STATISTICS} and more | {middle:.3f} | {p95:.3f} | 1 |"
    for name, (module, make) in PEERS.items():
        if find_spec(module) is None:
            yield f"| {name} | not installed | - | - |"
            continue
        place = folder / module
        place.mkdir()
        with make(place) as log:
            theirs = milliseconds_of_peer(log, calls if module != "mlflow" else calls // 4)
        median = statistics.median(theirs)
        yield f"| {name} | {median:.3f} | {statistics.quantiles(theirs, n=20)[-1]:.3f} | {middle / median:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="steps of each ResNet-50")
    parser.add_argument("--calls", type=int, default=60, help="calls of each logger")
    parser.add_argument("--skip-peers", action="store_true", help="only the ResNet-50")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/recording-<date>.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)  # that nobody answers is meant
    command = f"python benchmarks/recording.py --rounds {args.rounds}" + (" --skip-peers" if args.skip_peers else "")
    lines = [
        "# What recording costs",
        "",
        f"`{command}`, {datetime.date.today()}, torch {torch.__version__}, Python {platform.python_version()}, "
        f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f} at the start.",
        "",
        "ResNet-50, 16x3x64x64, float32, CPU, one thread; medians of paired ratios. GPU: not measured.",
        "",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in training_table(args.rounds, Path(folder) / "spool"):
            lines.append(line)
            print(line, flush=True)
        if not args.skip_peers:
            lines.append("")
            print(flush=True)
            for line in peer_table(args.calls, Path(folder)):
                lines.append(line)
                print(line, flush=True)
    if args.save:
        path = Path(__file__).parent / "results" / f"recording-{datetime.date.today()}.md"
        path.write_text("\n".join(lines) + "\n")
        print(f"\nwritten to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
