"""The data stream, judged from the input probe alone: are batches random samples of one population?

The probe is frozen and sees the raw input, so training cannot move it. Layers behind a normalization layer can not
say this: their batch means are pinned by the layers before them.

Shape suffixes: T recorded steps, K ranks, F probe features. A rank's batches are a stream of their own; ranks are
summed inside a step, and steps are the independent units.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from service.diagnosis.estimate import MAX_GAP_SHARE, Ratio, ratio_of_means, spacing
from service.diagnosis.window import Bools, Floats, Ints, ProbeRows

SILENT_ROWS = 100
"""Rows a rank may lag behind the newest before it counts as silent instead of late."""
_CONSTANT = 1e-6  # relative to the largest feature's mean: below, a fluctuation is float32 rounding
_HASH = 0x5851F42D4C957F2D  # Knuth's MMIX multiplier
_AGAIN = 0.5  # of independent batches' squared distance: batches that come again with new augmentation are nearer
_LEAST_PAIRS = 100  # of batches that should be alike, before a lag is a period: at 50 % by chance below 1e-4 each
_FEW_PAIRS = 25  # before it may be one: enough to doubt that batches are new, and clustered ones are far from 50 %
_SAME = 1e-3  # of a mean's sampling deviation: batches whose means differ by less are the same batch


P = ParamSpec("P")
T = TypeVar("T")


class Known:
    """What windows of rows said, from one diagnosis of a run to the next: of a live run nearly all are the same again.

    Kept by what the rows hold, so that the answer is the one that computing it again would give.
    """

    def __init__(self) -> None:
        self._before: dict[Hashable, Any] = {}
        self._now: dict[Hashable, Any] = {}

    def turn(self) -> None:
        """A new diagnosis begins: what the last one did not ask for is let go of."""
        self._before, self._now = self._now, {}

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        """What was computed for `key`, in this diagnosis or the one before; else it is now."""
        if key not in self._now:
            self._now[key] = self._before[key] if key in self._before else compute()
        found: T = self._now[key]
        return found


@dataclass(frozen=True, slots=True)
class Pooled:
    """A quantity of ranks, and its sum over them (nearly always all ranks are there, and the sum is at hand)."""

    each_TKF: Floats
    all_TF: Floats

    @classmethod
    def of(cls, each_TKF: Floats) -> Pooled:
        return cls(each_TKF, each_TKF.sum(1))

    def over(self, begin: int, end: int, ranks_K: Bools) -> Floats:
        """(rows, F) sum over some ranks."""
        return self.all_TF[begin:end] if ranks_K.all() else self.each_TKF[begin:end, ranks_K].sum(1)


@dataclass(frozen=True, slots=True)
class Stream:
    """The probe's rows that can be judged, and successive differences of its means.

    Attributes:
        steps_T: recorded steps up to the newest that every rank still sending has reached.
        samples: median batch size of a rank.
        good_TK: whether the row is there, finite, and of two samples or more.
        mean_TKF: mean of each feature over the batch, 0 where not good.
        samples_TK: batch size, 1 where not good.
        noise: s²_y / N, the variance of that mean for i.i.d. batches; 0 where not good or constant.
        neighbour: the same from neighbouring samples; equal on average where the order within a batch is random.
        fast: (mean_t - mean_t-1)² / 2, 0 where unseen.
        pair_noise: (noise_t + noise_t-1) / 2, what i.i.d. batches would give on average; 0 where unseen.
        seen_TK: whether both rows of the difference are there.
        before_T: the newest earlier row with the very same samples, -1 where they are new.
        new_T: whether nothing hints at an earlier row with the same samples, not even a period seen a few times only.
        silent: ranks that have stopped (or never begun) sending the probe.
        spoiled_first: rank -> first step with non-finite probe values; such rows are left out.
        spoiled_rows: how many such rows.
        code_T: of all that a row holds here; rows of the same codes are the same.
        known: what windows of these rows said.
    """

    steps_T: Ints
    samples: int
    good_TK: Bools
    mean_TKF: Floats
    samples_TK: Floats
    noise: Pooled
    neighbour: Pooled
    fast: Pooled
    pair_noise: Pooled
    seen_TK: Bools
    before_T: Ints
    new_T: Bools
    silent: tuple[int, ...]
    spoiled_first: dict[int, int]
    spoiled_rows: int
    code_T: Ints
    known: Known = field(repr=False, compare=False)

    def distinct(self, begin: int, end: int) -> int:
        """How many of rows begin..end-1 are different: batches that come again are no new evidence."""
        return int((self.before_T[begin:end] < begin).sum())

    @property
    def spoiled(self) -> tuple[int, ...]:
        return tuple(self.spoiled_first)


def of_a_window(
    compute: Callable[Concatenate[Stream, int, int, P], T],
) -> Callable[Concatenate[Stream, int, int, P], T]:
    """Makes a function of rows begin..end-1 answer from what is known: two rules, or two diagnoses, ask the same."""

    @wraps(compute)
    def known(stream: Stream, begin: int, end: int, /, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (compute, stream.code_T[begin:end].tobytes(), args, tuple(kwargs.items()))
        return stream.known.get(key, lambda: compute(stream, begin, end, *args, **kwargs))

    return known


def stream(probe: ProbeRows, world_size: int, known: Known | None = None) -> Stream:
    """Differences of the probe rows; rows that are missing, of one sample, or not finite are left out.

    Args:
        probe: the rows.
        world_size: ranks of the run.
        known: from the last diagnosis of the run; nobody else uses it now.
    """
    known = known or Known()
    known.turn()
    arrived_TK = np.isfinite(probe.samples_TK)
    with np.errstate(invalid="ignore"):  # infinities of either sign
        finite_TK = np.isfinite(probe.mean_TKF.sum(2)) & np.isfinite(probe.var_TKF.sum(2))
    single_TK = arrived_TK & (probe.samples_TK < 2)
    spoiled_TK = arrived_TK & ~single_TK & ~finite_TK
    good_TK = arrived_TK & ~single_TK & finite_TK

    n_rows, n_ranks = arrived_TK.shape
    newest_K = (
        np.where(arrived_TK.any(0), n_rows - 1 - arrived_TK[::-1].argmax(0), -1) if n_rows else np.full(n_ranks, -1)
    )
    alive_K = newest_K >= max(n_rows - 1 - SILENT_ROWS, 0)
    end = int(newest_K[alive_K].min()) + 1 if alive_K.any() else 0
    silent = tuple(int(k) for k in np.flatnonzero(~alive_K)) + tuple(range(n_ranks, world_size))

    steps_T, good_TK = probe.steps_T[:end], good_TK[:end]
    samples_TK = np.where(good_TK, probe.samples_TK[:end], 1.0)
    mean_TKF = probe.mean_TKF[:end].copy()
    noise_TKF = probe.var_TKF[:end] / samples_TK[..., None]
    neighbour_TKF = probe.adjacency_TKF[:end] / samples_TK[..., None]
    for values_TKF in (mean_TKF, noise_TKF, neighbour_TKF):
        values_TKF[~good_TK] = 0.0
    seen_TK = np.zeros_like(good_TK)
    if end > 1:
        near_T = np.diff(steps_T) <= 2 * spacing(steps_T)
        seen_TK[1:] = good_TK[1:] & good_TK[:-1] & near_T[:, None]
    fast_TKF = np.zeros_like(mean_TKF)
    np.subtract(mean_TKF[1:], mean_TKF[:-1], out=fast_TKF[1:])
    fast_TKF *= fast_TKF
    fast_TKF /= 2
    pair_TKF = np.zeros_like(noise_TKF)
    np.add(noise_TKF[1:], noise_TKF[:-1], out=pair_TKF[1:])
    pair_TKF /= 2
    # Rounding is relative to what was summed up, so the largest feature sets the scale for all.
    size_K = np.maximum(mean_TKF.max((0, 2), initial=0.0), -mean_TKF.min((0, 2), initial=0.0)) ** 2
    moves_KF = fast_TKF.max(0, initial=0.0) + pair_TKF.max(0, initial=0.0) > _CONSTANT**2 * size_K[:, None]
    fast_TKF[~seen_TK] = 0.0
    # A feature that is constant inside batches and moves between them has no noise; the floor keeps F finite there.
    np.maximum(pair_TKF, 1e-6 * fast_TKF, out=pair_TKF)
    pair_TKF[~seen_TK] = 0.0
    surely_T, maybe_T = _period_ago(steps_T, mean_TKF, noise_TKF, good_TK)
    before_T = np.maximum(_earlier(mean_TKF, noise_TKF), surely_T)
    if not moves_KF.all():
        for values_TKF in (noise_TKF, neighbour_TKF, fast_TKF, pair_TKF):
            values_TKF[:, ~moves_KF] = 0.0
    held = (mean_TKF, samples_TK, noise_TKF, neighbour_TKF, fast_TKF, pair_TKF)
    ago_T = np.where(before_T < 0, -1, np.arange(end) - before_T)
    return Stream(
        steps_T=steps_T,
        samples=int(np.median(samples_TK[good_TK])) if good_TK.any() else 0,
        good_TK=good_TK,
        mean_TKF=mean_TKF,
        samples_TK=samples_TK,
        noise=Pooled.of(noise_TKF),
        neighbour=Pooled.of(neighbour_TKF),
        fast=Pooled.of(fast_TKF),
        pair_noise=Pooled.of(pair_TKF),
        seen_TK=seen_TK,
        before_T=before_T,
        new_T=(before_T < 0) & (maybe_T < 0),
        silent=silent,
        spoiled_first={
            int(k): int(probe.steps_T[spoiled_TK[:, k].argmax()]) for k in np.flatnonzero(spoiled_TK.any(0))
        },
        spoiled_rows=int(spoiled_TK.sum()),
        code_T=_codes(*(own.view(np.int64) for own in held), good_TK.astype(int), seen_TK.astype(int), ago_T),
        known=known,
    )


def _earlier(mean_TKF: Floats, noise_TKF: Floats) -> Ints:
    """For each row the newest earlier one with the same means on all ranks, -1 where there is none."""
    rows = len(mean_TKF)
    scale_KF = _SAME * np.sqrt(noise_TKF.sum(0) / max(rows, 1))
    with np.errstate(invalid="ignore"):
        code_T = _codes(np.rint(mean_TKF / np.where(scale_KF > 0, scale_KF, 1.0)).astype(np.int64))
    order_T = np.argsort(code_T, kind="stable")
    before_T = np.full(rows, -1)
    same_T = code_T[order_T[1:]] == code_T[order_T[:-1]]
    before_T[order_T[1:][same_T]] = order_T[:-1][same_T]
    return before_T


def _codes(*arrays: Ints) -> Ints:
    """(T,) a hash of what arrays (T, ...) hold in each row; it wraps around."""
    total: Ints = np.zeros(len(arrays[0]), np.int64)
    for values in arrays:
        values_TX = values.reshape(len(values), math.prod(values.shape[1:]))
        weights_X = np.full(values_TX.shape[1], _HASH).cumprod()  # with small multiples different rows would tie
        total = total * _HASH + np.einsum("tx,x->t", values_TX, weights_X)
    return total


def _period_ago(steps_T: Ints, mean_TKF: Floats, noise_TKF: Floats, good_TK: Bools) -> tuple[Ints, Ints]:
    """For each row the one a period before, -1 without: batches of the same samples, each time augmented anew.

    D(M) = mean |m_t - m_t+M|² / 2 over the sampling noise is 1 or more for independent batches, ordered, clustered or
    skewed, and the same for all M where batches are stratified. Batches that come again after M rows differ only by
    their augmentation, at M, 2 M, ...; pairs at all multiples count together. The sums over pairs at each lag are
    correlations, so they cost a few Fourier transforms.

    Returns:
        By a period that is sure (`_LEAST_PAIRS`), and by one that may be (`_FEW_PAIRS`).
    """
    rows = len(steps_T)
    none_T = np.full(rows, -1)
    complete_T = good_TK.all(1)
    if complete_T.sum() < _FEW_PAIRS:
        return none_T, none_T
    step = spacing(steps_T)
    at_T = (steps_T - steps_T[0]) // step  # missing rows keep their place
    length = int(at_T[-1]) + 1
    if length > 2 * rows:
        return none_T, none_T
    used_T = complete_T & np.append(True, np.diff(at_T) > 0)
    share_T = complete_T / complete_T.sum()
    middle_KF, noise_KF = (np.einsum("t,tkf->kf", share_T, own_TKF) for own_TKF in (mean_TKF, noise_TKF))
    weight_KF = np.sqrt(inverse(noise_KF))
    z_TF = np.einsum("tkf,kf->tf", mean_TKF, weight_KF) - (middle_KF * weight_KF).sum(0)  # ranks repeat together
    z_UF = np.zeros((length, mean_TKF.shape[2]))
    z_UF[at_T[used_T]] = z_TF[used_T]
    mask_U = np.zeros(length)
    mask_U[at_T[used_T]] = 1.0

    size = 1 << (2 * length - 1).bit_length()
    mask_W, z_WF = np.fft.rfft(mask_U, size), np.fft.rfft(z_UF, size, axis=0)
    square_W = np.fft.rfft((z_UF**2).sum(1), size)
    pairs_M = np.rint(np.fft.irfft((mask_W * mask_W.conj()), size)[:length])
    both_W = 2 * (square_W * mask_W.conj()).real - 2 * (z_WF * z_WF.conj()).real.sum(1)
    apart_M = np.fft.irfft(both_W, size)[:length] / 2
    noise = mean_TKF.shape[1] * int((noise_KF.sum(0) > 0).sum())
    distance_M = np.divide(apart_M, pairs_M * noise, out=np.full(length, np.nan), where=pairs_M * noise > 0)
    row_U = np.full(length, -1)
    row_U[at_T[used_T]] = np.flatnonzero(used_T)

    def ago(least: int) -> Ints:
        lags = np.flatnonzero(pairs_M >= 0.4 * least)[1:]
        near = _AGAIN * min(1.0, float(np.quantile(distance_M[lags], 0.75))) if len(lags) else 0.0
        for period in lags[(lags > 1) & (distance_M[lags] < near)].tolist():
            multiples = slice(period, length, period)
            pairs = float(pairs_M[multiples].sum())
            if pairs >= least and float(apart_M[multiples].sum()) < near * pairs * noise:
                before_T = none_T.copy()
                before_T[at_T >= period] = row_U[at_T[at_T >= period] - period]
                return before_T
        return none_T

    return ago(_LEAST_PAIRS), ago(_FEW_PAIRS)


@of_a_window
def cluster_ratio(stream: Stream, begin: int, end: int, *, max_gap_share: float = MAX_GAP_SHARE) -> Ratio | None:
    """F over rows begin..end-1: fast variance between batch means over the sampling noise of independent batches.

    F = sum_f B_f / V_f over sum_f (s²_y / N)_f / V_f with B from first differences (drift does not matter) and V the
    window's mean noise of the feature. 1 for i.i.d. batches, also without replacement. Ranks with more than
    `max_gap_share` of the rows missing are left out.
    """
    seen_TK = stream.seen_TK[begin:end]
    full_K = full_ranks(seen_TK, max_gap_share=max_gap_share)
    if not full_K.any():
        return None
    seen_T = np.asarray(seen_TK[:, full_K].any(1), np.bool_)
    fast_TF = stream.fast.over(begin, end, full_K)
    noise_TF = stream.pair_noise.over(begin, end, full_K)
    weight_F = inverse(noise_TF.sum(0))
    return ratio_of_means(
        fast_TF @ weight_F, noise_TF @ weight_F, seen_T, order=1, distinct=stream.distinct(begin, end)
    )


def effective_samples(samples: int, ratio: float) -> float:
    """Independent samples that say as much about the mean as the batch: 1 + (N - 1) / F."""
    return 1 + (samples - 1) / ratio if ratio > 1 else float(samples)


def inverse(noise: Floats) -> Floats:
    """1 / noise, and 0 for a feature without noise (constant, or unseen): it carries nothing."""
    return np.divide(1.0, noise, out=np.zeros_like(noise), where=noise > 0)


def full_ranks(good_TK: Bools, *, max_gap_share: float = MAX_GAP_SHARE) -> Bools:
    """(K,) which ranks have all but `max_gap_share` of these rows."""
    return np.asarray(good_TK.sum(0) >= (1 - max_gap_share) * len(good_TK), np.bool_)
