"""What does Batch Renormalization cost against nn.BatchNorm, and against other implementations of it?

    python benchmarks/layer.py [--rounds 20] [--compile] [--device cuda] [--save]

Forward and backward of one layer: process CPU time in one thread, or the device's own time between CUDA events. All
implementations are run in turn in every round, and the figure is the median over rounds of the ratio to nn.BatchNorm in
the same round: what else the machine does then disturbs both. Peers (`pip install -e .[bench]`, in an environment of
its own) that are not installed are reported as missing. --save writes benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import runpy
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from brn_core.layers import BatchRenorm1d, BatchRenorm2d

SHAPES = [(32, 64, 56, 56), (32, 256, 14, 14), (8, 512, 7, 7), (4096, 512)]


class PlainFormula(nn.Module):
    """Algorithm 1 as one would write it down, gradient by autograd: what the kernels save."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mu", torch.zeros(channels))
        self.register_buffer("sigma", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        mu_B = x.float().mean(dims)
        sigma_B = (x.float().var(dims, correction=0) + 1e-5).sqrt()
        r = (sigma_B / self.sigma).clamp(1 / 3, 3).detach().view(shape)
        d = ((mu_B - self.mu) / self.sigma).clamp(-5, 5).detach().view(shape)
        xhat = (x - mu_B.view(shape)) / sigma_B.view(shape) * r + d
        with torch.no_grad():
            self.mu.lerp_(mu_B, 0.01)
            self.sigma.lerp_(sigma_B, 0.01)
        return xhat * self.weight.view(shape) + self.bias.view(shape)


def _torchrl(channels: int, dims: int) -> nn.Module:
    from torchrl.modules import BatchRenorm1d as Peer

    return Peer(channels, warmup_steps=1)


def _avalanche(channels: int, dims: int) -> nn.Module:
    if dims != 4:
        raise NotImplementedError("4-dimensional input only")
    # The file alone: the package imports torchvision, which has to fit torch's build to the letter.
    package = find_spec("avalanche")
    assert package is not None
    assert package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "models" / "batch_renorm.py"
    return runpy.run_path(str(file))["BatchRenorm2D"](channels)


def _sb3_contrib(channels: int, dims: int) -> nn.Module:
    from sb3_contrib.common.torch_layers import BatchRenorm1d as Peer

    if dims != 2:
        raise NotImplementedError("2-dimensional input only")
    return Peer(channels, warmup_steps=0)


def _keras(channels: int, dims: int) -> nn.Module:
    os.environ["KERAS_BACKEND"] = "torch"
    import keras

    class Training(nn.Module):
        """Keras layers infer unless told at the call."""

        def __init__(self) -> None:
            super().__init__()
            limits = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}
            self.layer = keras.layers.BatchNormalization(axis=1, renorm=True, renorm_clipping=limits)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, training=True)  # type: ignore[no-any-return]

    return Training()


PEERS: dict[str, tuple[str, Callable[[int, int], nn.Module]]] = {
    "torchrl": ("torchrl", _torchrl),
    "avalanche": ("avalanche", _avalanche),
    "sb3-contrib": ("sb3_contrib", _sb3_contrib),
    "keras": ("keras", _keras),
}


_DISTRIBUTION = {"torchrl": "torchrl", "avalanche": "avalanche-lib", "sb3-contrib": "sb3-contrib", "keras": "keras"}


def candidates(shape: tuple[int, ...]) -> dict[str, nn.Module]:
    channels, dims = shape[1], len(shape)
    ours, theirs = (BatchRenorm2d, nn.BatchNorm2d) if dims == 4 else (BatchRenorm1d, nn.BatchNorm1d)
    observing = ours(channels, r_max=3.0, d_max=5.0)
    observing.observe = True
    layers = {
        "BatchNorm": theirs(channels),
        "ours": ours(channels, r_max=3.0, d_max=5.0),
        "ours, observed": observing,
        "plain formula": PlainFormula(channels),
    }
    for name, (module, make) in PEERS.items():
        if find_spec(module) is not None:
            try:
                layers[name] = make(channels, dims).train()
            except NotImplementedError:
                continue
    return layers


def seconds(layer: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> float:
    """Time of a forward and a backward, the gradients made anew; on the device where `x` is there."""
    x.grad = None
    if x.is_cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        y = layer(x)
        y.backward(grad.to(y.dtype))
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.process_time()
    y = layer(x)
    y.backward(grad.to(y.dtype))
    return time.process_time() - start


def measure(
    shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool, rounds: int, compiled: bool, device: str
) -> dict[str, float]:
    """Median milliseconds of BatchNorm, and the median paired ratio of each other layer to it."""
    x = torch.randn(shape, device=device).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    grad = torch.randn_like(x)
    layers: dict[str, Callable[[Tensor], Tensor]] = {n: m.to(device) for n, m in candidates(shape).items()}
    if compiled:
        torch._dynamo.reset()  # or the shapes before count against this one's limit of recompilations
        layers = {name: torch.compile(layers[name], fullgraph=True) for name in ("BatchNorm", "ours", "plain formula")}
    rounds *= 1 if x.numel() > 5e6 else 3 if x.numel() > 1e6 else 10
    times: dict[str, list[float]] = {name: [] for name in layers}
    for i in range(rounds + 2):
        for name in random.sample(list(layers), len(layers)):  # who follows whom tells in the caches
            taken = seconds(layers[name], x, grad)
            if i >= 2:  # warm
                times[name].append(taken)
    base = times["BatchNorm"]
    return {"BatchNorm ms": statistics.median(base) * 1e3} | {
        name: statistics.median(t / b for t, b in zip(ts, base, strict=True))
        for name, ts in times.items()
        if name != "BatchNorm"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="rounds at the largest size; smaller ones get more")
    parser.add_argument("--compile", action="store_true", help="compare under torch.compile")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/layer-<date>.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")

    missing = [name for name, (module, _) in PEERS.items() if args.compile or find_spec(module) is None]
    columns = ["BatchNorm ms", "ours", *(["ours, observed"] if not args.compile else []), "plain formula"]
    measured = [name for name in PEERS if name not in missing]
    columns += measured
    cuda = args.device == "cuda"
    options = f" --rounds {args.rounds}" + " --compile" * args.compile + " --device cuda" * cuda
    machine = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} CPUs"
    timing = "Time between CUDA events" if cuda else "One thread, process CPU time"
    load = os.getloadavg()[0]
    lines = [
        f"# Layer cost{', compiled' if args.compile else ''}: forward and backward, ratio to nn.BatchNorm",
        "",
        f"`python benchmarks/layer.py{options}`, {datetime.date.today()}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {machine}, load {load:.1f} at the start.",
        "",
        f"{timing}, layers interleaved in random order, median of paired per-round ratios. CL = channels_last.",
        f"Peers: {', '.join(f'{name} {version(_DISTRIBUTION[name])}' for name in measured) or 'none'}.",
        f"Peers not {'compiled' if args.compile else 'installed'}, so not measured: {', '.join(missing) or 'none'}."
        + " GPU: not measured." * (not cuda),
        "",
        "| input | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    print("\n".join(lines), flush=True)
    for shape in SHAPES:
        for channels_last in (False, True) if len(shape) == 4 else (False,):
            for dtype in (torch.float32, torch.bfloat16):
                row = measure(shape, dtype, channels_last, args.rounds, args.compile, args.device)
                label = f"{shape} {'CL ' if channels_last else ''}{str(dtype).removeprefix('torch.')}"
                lines.append(f"| {label} | " + " | ".join(f"{row[c]:.2f}" if c in row else "-" for c in columns) + " |")
                print(lines[-1], flush=True)
    if args.save:
        kind = "-compiled" * args.compile + "-cuda" * cuda
        path = Path(__file__).parent / "results" / f"layer{kind}-{datetime.date.today()}.md"
        path.write_text("\n".join(lines) + "\n")
        print(f"\nwritten to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
