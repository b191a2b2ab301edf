"""Seeded runs for the rules: data streams seen through a probe, layers simulated sample by sample, windows around them.

Shapes: T steps, K ranks, N samples a rank, D inputs, F probe features, C channels, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brn_core.wire import PROBE_FEATURES, Layer, LayerKind, Schedule
from service.diagnosis.window import LAYER_COLUMNS, LayerRows, NonFinite, ProbeRows, ScalarRows, Window

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

INPUTS = 16
LABELS = 10


@dataclass(frozen=True)
class World:
    """A population: labelled gaussian clusters mixed into correlated inputs, and a fixed probe of it."""

    centres_LD: Floats
    mixing_DD: Floats
    probe_DF: Floats

    @classmethod
    def make(cls, rng: np.random.Generator, signal: float = 1.3) -> World:
        spectrum_D = 0.75 ** np.arange(INPUTS)
        mixing_DD = rng.normal(size=(INPUTS, INPUTS)) * np.sqrt(spectrum_D)[:, None]
        probe_DF = rng.normal(size=(INPUTS, PROBE_FEATURES)) / np.sqrt(INPUTS)
        return cls(signal * rng.normal(size=(LABELS, INPUTS)), mixing_DD, probe_DF)

    def observe(self, labels_TKN: Ints, rng: np.random.Generator, tails: str = "normal") -> ProbeRows:
        shape = (*labels_TKN.shape, INPUTS)
        noise = rng.normal(size=shape) if tails == "normal" else rng.standard_t(3, size=shape)
        return self.project((self.centres_LD[labels_TKN] + noise) @ self.mixing_DD)

    def project(self, x_TKND: Floats) -> ProbeRows:
        y_TKNF = x_TKND @ self.probe_DF
        y_TKNF[..., 8:] = np.maximum(y_TKNF[..., 8:], 0)
        n_steps, n_ranks, n, _ = y_TKNF.shape
        with np.errstate(all="ignore"):
            return ProbeRows(
                steps_T=np.arange(n_steps),
                samples_TK=np.full((n_steps, n_ranks), float(n)),
                mean_TKF=y_TKNF.mean(2).astype(np.float32).astype(np.float64),
                var_TKF=y_TKNF.var(2, ddof=1) if n > 1 else np.full_like(y_TKNF[:, :, 0], np.nan),
                adjacency_TKF=(np.diff(y_TKNF, axis=2) ** 2).sum(2) / (2 * max(n - 1, 1)),
            )


@dataclass(frozen=True)
class Streams:
    """Data streams by name; every call makes a new population from the seed."""

    def iid(
        self, seed: int, *, steps: int = 600, ranks: int = 1, n: int = 32, tails: str = "normal", prior: str = "even"
    ) -> ProbeRows:
        rng = np.random.default_rng(seed)
        p = np.ones(LABELS) if prior == "even" else 1 / np.arange(1, LABELS + 1) ** 2
        labels = rng.choice(LABELS, size=(steps, ranks, n), p=p / p.sum())
        return World.make(rng).observe(labels, rng, tails)

    def without_replacement(self, seed: int, *, steps: int = 600, n: int = 32, size: int = 1347) -> ProbeRows:
        """Epochs over a small data set, reshuffled each time, the rest dropped."""
        rng = np.random.default_rng(seed)
        world = World.make(rng)
        centres = world.centres_LD[rng.integers(LABELS, size=size)]
        data_SD = (centres + rng.normal(size=(size, INPUTS))) @ world.mixing_DD
        per_epoch = size // n
        order = np.concatenate([rng.permutation(size)[: per_epoch * n] for _ in range(steps // per_epoch + 1)])
        return world.project(data_SD[order[: steps * n]].reshape(steps, 1, n, INPUTS))

    def again_augmented(
        self, seed: int, *, batches: int, strength: float = 0.3, steps: int = 600, n: int = 32
    ) -> ProbeRows:
        """The same batches of random samples over and over in one order, each time with new noise on each sample."""
        rng = np.random.default_rng(seed)
        world = World.make(rng)
        labels = rng.integers(LABELS, size=(batches, 1, n))
        x = (world.centres_LD[labels] + rng.normal(size=(*labels.shape, INPUTS))) @ world.mixing_DD
        x = x[np.arange(steps) % batches]
        return world.project(x + strength * rng.normal(size=x.shape))

    def unlabelled_clusters(self, seed: int, *, steps: int = 600, n: int = 32) -> ProbeRows:
        """Two labels a batch, but labels do not show in the input: nothing to see, and nothing wrong."""
        rng = np.random.default_rng(seed)
        return World.make(rng, signal=0.0).observe(_few(rng, steps, 1, n, 2), rng)

    def few_labels(
        self, seed: int, *, labels: int, steps: int = 600, ranks: int = 1, n: int = 32, onset: int = 0, end: int = 10**9
    ) -> ProbeRows:
        """`labels` labels a batch from step `onset` until `end`, i.i.d. batches otherwise."""
        rng = np.random.default_rng(seed)
        faulty, clean = _few(rng, steps, ranks, n, labels), rng.integers(LABELS, size=(steps, ranks, n))
        at = np.arange(steps)
        now = (at >= onset) & (at < end)
        return World.make(rng).observe(np.where(now[:, None, None], faulty, clean), rng)

    def mixture(self, seed: int, *, share: float = 0.5, steps: int = 600, n: int = 32) -> ProbeRows:
        """`share` of each batch has one label, the rest is random."""
        rng = np.random.default_rng(seed)
        one, clean = _few(rng, steps, 1, n, 1), rng.integers(LABELS, size=(steps, 1, n))
        return World.make(rng).observe(np.where(rng.random((steps, 1, n)) < share, one, clean), rng)

    def stratified(self, seed: int, *, steps: int = 600, n: int = 30) -> ProbeRows:
        """Each batch holds every label equally often."""
        rng = np.random.default_rng(seed)
        labels = np.broadcast_to(np.arange(n) % LABELS, (steps, 1, n))
        return World.make(rng).observe(rng.permuted(labels, axis=2), rng)

    def paired(self, seed: int, *, steps: int = 600, n: int = 32) -> ProbeRows:
        """n/2 labels drawn at random, two samples of each side by side."""
        rng = np.random.default_rng(seed)
        labels = np.repeat(rng.integers(LABELS, size=(steps, 1, n // 2)), 2, axis=2)
        return World.make(rng).observe(labels, rng)

    def copies(self, seed: int, *, steps: int = 600, n: int = 32, times: int = 4) -> ProbeRows:
        """Each sample `times` times in a row."""
        rng = np.random.default_rng(seed)
        world = World.make(rng)
        labels = rng.integers(LABELS, size=(steps, 1, n // times))
        x = (world.centres_LD[labels] + rng.normal(size=(*labels.shape, INPUTS))) @ world.mixing_DD
        return world.project(np.repeat(x, times, axis=2))

    def sorted_labels(self, seed: int, *, steps: int = 600, n: int = 32) -> ProbeRows:
        """One label after the other, once through the data set."""
        rng = np.random.default_rng(seed)
        labels = (np.arange(steps * n) * LABELS // (steps * n)).reshape(steps, 1, n)
        return World.make(rng).observe(labels, rng)

    def shuffle_buffer(self, seed: int, *, steps: int = 600, n: int = 32, buffer: int = 1024) -> ProbeRows:
        """Data sorted by label, read through a buffer from which samples are drawn at random."""
        rng = np.random.default_rng(seed)
        total = steps * n
        source = np.arange(total + buffer) * LABELS // (total + buffer)
        held, out = source[:buffer].copy(), np.empty(total, np.int64)
        for i, at in enumerate(rng.integers(buffer, size=total)):
            out[i], held[at] = held[at], source[buffer + i]
        return World.make(rng).observe(out.reshape(steps, 1, n), rng)

    def skewed_ranks(self, seed: int, *, own: float = 0.8, steps: int = 600, ranks: int = 4, n: int = 8) -> ProbeRows:
        """`own` of each rank's samples have one of its own labels, the rest any."""
        rng = np.random.default_rng(seed)
        mine = rng.permutation(LABELS)[: 2 * ranks].reshape(ranks, 2)
        pick = rng.integers(2, size=(steps, ranks, n))
        owned = mine[np.arange(ranks)[None, :, None], pick]
        any_label = rng.integers(LABELS, size=(steps, ranks, n))
        return World.make(rng).observe(np.where(rng.random(owned.shape) < own, owned, any_label), rng)

    def equal_ranks(self, seed: int, *, steps: int = 600, ranks: int = 3, n: int = 16) -> ProbeRows:
        """Ranks 0 and 1 see the same batches, the others their own."""
        rows = self.iid(seed, steps=steps, ranks=ranks, n=n)
        for values in (rows.mean_TKF, rows.var_TKF, rows.adjacency_TKF):
            values[:, 1] = values[:, 0]
        return rows

    def drifting(self, seed: int, *, per_step: float = 0.02, steps: int = 600, n: int = 32) -> ProbeRows:
        """i.i.d. batches of a population whose mean moves by `per_step` of a feature's deviation each step."""
        rows = self.iid(seed, steps=steps, n=n)
        sd_F = np.sqrt(rows.var_TKF.mean((0, 1)))
        drift_TKF = (np.arange(steps) * per_step)[:, None, None] * sd_F
        return replace(rows, mean_TKF=rows.mean_TKF + drift_TKF)


def _few(rng: np.random.Generator, steps: int, ranks: int, n: int, labels: int) -> Ints:
    chosen = rng.permuted(np.tile(np.arange(LABELS), (steps, ranks, 1)), axis=2)[..., :labels]
    return np.take_along_axis(chosen, rng.integers(labels, size=(steps, ranks, n)), axis=2)


def _no_probe(ranks: int) -> ProbeRows:
    none = np.empty((0, ranks, PROBE_FEATURES))
    return ProbeRows(np.empty(0, np.int64), np.empty((0, ranks)), none, none, none)


def make_window(
    *,
    probe: ProbeRows | None = None,
    columns: dict[str, Floats] | None = None,
    steps: Ints | None = None,
    scalars: dict[str, tuple[Any, Any]] | None = None,
    kinds: tuple[LayerKind, ...] = ("BatchNorm", "BatchNorm"),
    momentum: float | None = 0.1,
    schedule: Schedule | None = None,
    nonfinite: NonFinite | None = None,
    **changes: Any,
) -> Window:
    """A window of two layers; `columns` are (T, K, L) and fill what is not given with NaN."""
    ranks = probe.samples_TK.shape[1] if probe is not None else 1
    given = columns or {}
    shape = next((c.shape for c in given.values()), (0, ranks, len(kinds)))
    at = steps if steps is not None else np.arange(shape[0])
    rows = LayerRows(at, {name: given.get(name, np.full(shape, np.nan)) for name in LAYER_COLUMNS})
    series = {name: ScalarRows(np.asarray(s), np.asarray(v, float)) for name, (s, v) in (scalars or {}).items()}
    probe = probe if probe is not None else _no_probe(ranks)
    ends = [int(s[-1]) for s in (probe.steps_T, at, *(r.steps_T for r in series.values())) if len(s)]
    made = Window(
        run="run-1",
        status="running",
        world_size=ranks,
        batch_size=32,
        planned_steps=None,
        schedule=schedule,
        config={},
        layers=tuple(
            Layer(index=i, name=f"bn{i + 1}", kind=kind, channels=16, eps=1e-5, momentum=momentum)
            for i, kind in enumerate(kinds)
        ),
        last_step=max(ends, default=None),
        probe=probe,
        rows=rows,
        scalars=series,
        nonfinite=nonfinite,
        first_sigma_L=np.full(len(kinds), np.nan),
        opening=None,
    )
    return replace(made, **changes)


def layer_rows(
    seed: int,
    *,
    steps: int = 400,
    ranks: int = 1,
    n: int = 32,
    channels: int = 12,
    momentum: float = 0.1,
    rho: float = 1.0,
    tails: str = "normal",
    outliers: float = 0.0,
    drift: float = 0.0,
    growth: float = 0.0,
    clustered: float = 0.0,
    buffers: str = "all",
    r_max: float = 1.0,
    d_max: float = 0.0,
) -> dict[str, Floats]:
    """The stored statistics of one layer (T, K, 1), computed from samples as the recorder does.

    Args:
        rho: share of the variance that lies between samples (1: fully connected).
        tails: of the samples, `normal`, `relu`, `sparse` (rectified, active in one of ten) or `t3`.
        outliers: share of samples ten times as large.
        drift: sigma a step by which every mean moves.
        growth: growth of the scale a step, relative.
        clustered: variance between batches over that within.
        buffers: whose batches the moving statistics take: those of `all` ranks, of `rank 0`, or each rank's `own`.
        r_max, d_max: limits of Batch Renorm; 1 and 0 are batch norm.
    """
    rng = np.random.default_rng(seed)
    shape = (steps, ranks, n, channels)
    x = rng.normal(size=shape) if tails != "t3" else rng.standard_t(3, size=shape) / np.sqrt(3)
    if tails == "relu":
        x = (np.maximum(x, 0) - 0.399) / 0.584
    if tails == "sparse":
        x = (np.maximum(x - 1.3, 0) - 0.0456) / 0.175
    x = np.where(rng.random((steps, ranks, n, 1)) < outliers, 10 * x, x)
    y = np.sqrt(rho) * x + np.sqrt(clustered) * rng.normal(size=(steps, ranks, 1, channels))
    at_T = np.arange(steps)[:, None, None]
    scale_T = np.exp(growth * np.arange(steps))[:, None, None]
    noise_within = (1 - rho) * rng.chisquare(15, size=shape) / 15
    mean_TKC = y.mean(2)
    power = (y - mean_TKC[:, :, None]) ** 2 + noise_within
    mu_b = (mean_TKC + drift * at_T) * scale_T
    sigma_b = np.sqrt(power.mean(2) * scale_T**2 + 1e-5)
    between = y.var(2, ddof=1) * scale_T**2
    scale_var = power.var(2, ddof=1) * scale_T**4
    pairs = (np.diff(y, axis=2) ** 2).sum(2) / (2 * (n - 1)) * scale_T**2

    mu, sigma = np.zeros_like(mu_b), np.ones_like(mu_b)
    for t in range(1, steps):
        taken_mu, taken_sigma = mu_b[t - 1], sigma_b[t - 1]
        if buffers != "own":
            pick = slice(0, 1) if buffers == "rank 0" else slice(None)
            taken_mu = taken_mu[pick].mean(0, keepdims=True)
            taken_sigma = taken_sigma[pick].mean(0, keepdims=True)
        mu[t] = mu[t - 1] + momentum * (taken_mu - mu[t - 1])
        sigma[t] = sigma[t - 1] + momentum * (taken_sigma - sigma[t - 1])
    r, d = sigma_b / sigma, (mu_b - mu) / sigma
    left_r, left_d = r - np.clip(r, 1 / r_max, r_max), d - np.clip(d, -d_max, d_max)
    second, second_log = np.full_like(mu_b, np.nan), np.full_like(mu_b, np.nan)
    second[2:] = (mu_b[2:] - 2 * mu_b[1:-1] + mu_b[:-2]) ** 2 / (6 * sigma[2:] ** 2)
    log = np.log(sigma_b)
    second_log[2:] = (log[2:] - 2 * log[1:-1] + log[:-2]) ** 2 / 6
    first = np.full_like(mu_b, np.nan)
    first[1:] = (mu_b[1:] - mu_b[:-1]) ** 2 / (2 * sigma[1:] ** 2)
    columns = {
        "samples": np.full_like(mu_b, float(n)),
        "gap": (r - 1) ** 2 + d**2,
        "residual": left_r**2 + left_d**2,
        "d_squared": d**2,
        "log_r": np.log(r),
        "clip_r": left_r != 0,
        "clip_d": left_d != 0,
        "r_max": np.full_like(r, r_max),
        "d_max": np.full_like(r, d_max),
        "mean_noise": between / (n * sigma**2),
        "scale_noise": scale_var / (4 * n * sigma**4),
        "mean_diff1": first,
        "mean_diff2": second,
        "scale_diff2": second_log,
        "adjacency_noise": pairs / (n * sigma**2),
        "dead_channels": channels * (sigma_b**2 < 101e-5),
        "mu": mu,
        "mu_b": mu_b,
        "sigma": sigma,
    }
    found = {name: values.mean(2, keepdims=True) for name, values in columns.items()}
    return found | {"r_q50": np.median(r, axis=2, keepdims=True)}


def network_rows(*layers: dict[str, Floats]) -> dict[str, Floats]:
    """Layers side by side, (T, K, L)."""
    return {name: np.concatenate([layer[name] for layer in layers], axis=2) for name in layers[0]}
