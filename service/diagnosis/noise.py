"""Whether a batch is large enough for its own statistics: sampling noise (NH-SMALL), heavy tails (NH-TAIL), and what
follows for the moving statistics (NH-POOLBIAS) and for deep layers (NH-COUPLED).

Shape suffixes: T recorded steps, K ranks, L layers, J looks.
"""

from __future__ import annotations

import math

import numpy as np

from service.diagnosis.estimate import LOOK_ROWS
from service.diagnosis.finding import Evidence, Finding, Remedy
from service.diagnosis.looks import ever, interval, lasting, looks, of_layers, together, too_young, warm, worst_first
from service.diagnosis.outcome import Outcome, query
from service.diagnosis.window import Floats, LayerRows, Window

SMALL_WARNING = 0.05
SMALL_CRITICAL = 0.15
LARGE_BATCH = 16
"""Samples from which on noise up to the critical is an info: there it did no harm in controlled runs."""
TAIL_RATIO = 0.25
RECTIFIED_KAPPA = 4.41
"""kappa of rectified normal samples of a fully connected layer: what light tails reach at most."""
TAIL_KAPPA = 8.0
"""Least kappa of heavy tails: normal samples of a fully connected layer have 2, rectified ones 4.4, at any N."""
TAIL_BATCH = 8
"""Samples below which the fourth moment of a batch says too little."""
TAIL_CAP = 0.5
"""Most that one row may count in the mean of kappa / 4N: one broken batch is no tail."""
POOL_SHARE = 0.1
COUPLED_SHARE = 0.5


def small(window: Window) -> Outcome:
    """NH-SMALL: is the batch too small for its statistics, however well it is drawn?"""
    if (young := too_young(window, "NH-SMALL")) is not None:
        return Outcome(abstained=(young,))
    rows = window.rows
    together_L = together(window)
    mean_TKL = rows.columns["mean_noise"] / together_L
    samples_TKL = rows.columns["samples"] * together_L
    scale_TKL = rows.columns["scale_noise"] / together_L
    capped_TKL = np.minimum(scale_TKL, np.minimum(TAIL_RATIO, RECTIFIED_KAPPA / samples_TKL) / 4)
    noise_TKL = mean_TKL + np.where(samples_TKL >= TAIL_BATCH, capped_TKL, scale_TKL)  # beyond is NH-TAIL's to say
    seen = looks(rows, {"noise": noise_TKL, "samples": rows.columns["samples"]}, warm(window))
    held = lasting(seen.steps_J, seen.mean["noise"] > SMALL_WARNING)
    if held is None:
        return Outcome()
    noise_L = seen.mean["noise"][-1]
    worst = worst_first(noise_L, held.layers_L)
    i = worst[0]
    noise, samples = float(noise_L[i]), round(float(seen.mean["samples"][-1][i] * together_L[i]))
    bounds = interval(noise_TKL[-LOOK_ROWS:, :, i])
    layer = window.layers[i]
    mild = samples >= LARGE_BATCH and noise <= SMALL_CRITICAL
    said, told = ("rather small", "calm") if mild else ("too small", "harmless")
    finding = Finding(
        code="NH-SMALL",
        severity="critical" if noise > SMALL_CRITICAL else "info" if mild else "warning",
        summary=(
            f"A batch of {samples} is {said} for layer {layer.name}: sampling noise alone moves its statistics by "
            f"{noise:.2g} sigma² a step, where {SMALL_WARNING:g} is {told}; that takes about "
            f"{math.ceil(samples * noise / SMALL_WARNING)} samples{of_layers(len(worst))}."
        ),
        evidence=Evidence(
            statistic="G_iid = (rho + kappa / 4) / N, the gap (r - 1)² + d² of independent batches",
            value=noise,
            low=bounds[0] if bounds else None,
            high=bounds[1] if bounds else None,
            threshold=SMALL_WARNING,
            steps_used=LOOK_ROWS,
            query=query(window.run, "series", stat=("gap", "mean_noise", "scale_noise"), layer=layer.index),
        ),
        remedy=_larger(window, bool(together_L[i] > 1)),
        layers=tuple(window.layers[at].name for at in worst),
        steps=held.steps,
    )
    return Outcome((finding,))


def _larger(window: Window, shared: bool) -> Remedy:
    renorm = all(layer.kind == "BatchRenorm" for layer in window.layers)
    if window.world_size > 1 and not shared and not renorm:
        return Remedy(
            text="Normalize over all ranks: their samples count together.",
            code="model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)",
        )
    if renorm:
        return Remedy(
            text="Batch Renorm, in use, makes training agree with inference; what is left is noise in the gradient: "
            "a larger batch, statistics shared over ranks, or group normalization.",
            code="torch.nn.GroupNorm(num_groups=8, num_channels=C)  # in place of the layers named",
        )
    return Remedy(
        text="Use more samples a batch, or Batch Renorm, which makes training agree with inference at any batch size.",
        code="model = convert_batchnorm(model)",
    )


def tail_ratio(rows: LayerRows) -> Floats:
    """(T, K, L) kappa / N, as much of it as one row may count."""
    return np.asarray(4 * np.minimum(rows.columns["scale_noise"], TAIL_CAP))


def tail_threshold(samples: Floats) -> Floats:
    """Mean kappa / N above which tails are heavy, for batches of so many samples."""
    return np.asarray(np.fmax(TAIL_RATIO, TAIL_KAPPA / samples))


def tail(window: Window) -> Outcome:
    """NH-TAIL: do a few samples make the variance of a batch?"""
    if (young := too_young(window, "NH-TAIL")) is not None:
        return Outcome(abstained=(young,))
    rows = window.rows
    ratio_TKL = tail_ratio(rows)
    large_TKL = rows.columns["samples"] >= TAIL_BATCH
    columns = {"ratio": ratio_TKL, "samples": rows.columns["samples"]}
    seen = looks(rows, columns, warm(window) & large_TKL)
    threshold_JL = tail_threshold(seen.mean["samples"])
    held = ever(seen.steps_J, seen.mean["ratio"] - threshold_JL)
    if held is None:
        return Outcome()
    ratio_L = np.fmax.reduce(seen.mean["ratio"], axis=0)
    worst = worst_first(ratio_L, held.layers_L)
    i = worst[0]
    look = int(np.nanargmax(seen.mean["ratio"][:, i]))
    ratio, threshold = float(ratio_L[i]), float(threshold_JL[look, i])
    samples = round(float(seen.mean["samples"][look, i]))
    end = int(np.searchsorted(rows.steps_T, seen.steps_J[look])) + 1
    bounds = interval(ratio_TKL[end - LOOK_ROWS : end, :, i])
    layer = window.layers[i]
    first = i == 0
    finding = Finding(
        code="NH-TAIL",
        severity="warning",
        summary=(
            f"A few samples make the variance of a batch at layer {layer.name}: the fourth moment, kappa / N, "
            f"reaches {ratio:.2g}, beyond {threshold:.2g}, so sigma_B jumps with every outlier in its {samples} "
            f"samples{of_layers(len(worst))}."
        ),
        evidence=Evidence(
            statistic="kappa / N, variance over samples of their power, over sigma⁴ and N",
            value=ratio,
            low=bounds[0] if bounds else None,
            high=bounds[1] if bounds else None,
            threshold=threshold,
            steps_used=LOOK_ROWS,
            query=query(window.run, "series", stat=("scale_noise", "r_q100", "d_q100"), layer=layer.index),
        ),
        remedy=Remedy(
            text=(
                "Look for broken or extreme samples in the input and clip them."
                if first
                else "Look for samples that drive this layer far out, and for activations without a bound before it."
            ),
            code="x = x.clamp(-4, 4)  # standardized inputs"
            if first
            else "torch.nn.Hardtanh(-6, 6)  # before the layer",
        ),
        layers=tuple(window.layers[at].name for at in worst),
        steps=held.steps,
    )
    return Outcome((finding,))


def pool_bias(window: Window) -> Outcome:
    """NH-POOLBIAS: do the moving statistics leave out the variance between batches?"""
    rows = window.rows
    fast_TKL = rows.columns["mean_diff2"]
    seen = looks(rows, {"fast": fast_TKL}, warm(window))
    share_JL = seen.mean["fast"] / (1 + seen.mean["fast"])
    held = lasting(seen.steps_J, share_JL > POOL_SHARE)
    if held is None:
        return Outcome()
    worst = worst_first(share_JL[-1], held.layers_L)
    i = worst[0]
    bounds = interval(fast_TKL[-LOOK_ROWS:, :, i])
    renorm = all(layer.kind == "BatchRenorm" for layer in window.layers)
    layer = window.layers[i]
    finding = Finding(
        code="NH-POOLBIAS",
        severity="info",
        summary=(
            f"The moving deviation of layer {layer.name} leaves out {share_JL[-1][i]:.0%} of the variance: that "
            f"between batches, which an average of the variances within them never sees{of_layers(len(worst))}."
        ),
        evidence=Evidence(
            statistic="F rho / N, share of the variance that lies between batches",
            value=float(share_JL[-1][i]),
            low=max(bounds[0], 0.0) / (1 + max(bounds[0], 0.0)) if bounds else None,
            high=bounds[1] / (1 + bounds[1]) if bounds else None,
            threshold=POOL_SHARE,
            steps_used=LOOK_ROWS,
            query=query(window.run, "series", stat="mean_diff2", layer=layer.index),
        ),
        remedy=Remedy(
            text="Before evaluating, re-estimate the statistics with the variance of the means added to the mean of "
            "the variances, as `brn_core.statistics.update_statistics` does.",
            code="update_statistics(model, loader)"
            if renorm
            else "update_statistics(convert_batchnorm(model), loader)",
        ),
        layers=tuple(window.layers[at].name for at in worst),
        steps=held.steps,
    )
    return Outcome((finding,))


def coupled(window: Window) -> Outcome:
    """NH-COUPLED: do deep layers' batch means vary less than their samples allow, because others pin them?"""
    rows = window.rows
    if len(window.layers) < 2:
        return Outcome()
    columns = {"fast": rows.columns["mean_diff2"], "noise": rows.columns["mean_noise"] / together(window)}
    seen = looks(rows, columns, warm(window))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_JL = seen.mean["fast"] / seen.mean["noise"]
        share_JL = 1 - ratio_JL / ratio_JL[:, :1]
    held = lasting(seen.steps_J, share_JL > COUPLED_SHARE)
    if held is None:
        return Outcome()
    worst = worst_first(share_JL[-1], held.layers_L)
    i = worst[0]
    layer = window.layers[i]
    finding = Finding(
        code="NH-COUPLED",
        severity="info",
        summary=(
            f"The layers before {layer.name} pin its batch means: they vary {ratio_JL[-1][i]:.2g} times as much as "
            f"sampling alone would make them, {ratio_JL[-1][0]:.2g} times at {window.layers[0].name}, so its r and d "
            f"understate the gap{of_layers(len(worst))}."
        ),
        evidence=Evidence(
            statistic="1 - F_deep / F_first, how far batch means are pinned",
            value=float(share_JL[-1][i]),
            threshold=COUPLED_SHARE,
            steps_used=LOOK_ROWS,
            query=query(window.run, "series", stat=("mean_diff2", "mean_noise"), layer=layer.index),
        ),
        remedy=Remedy(
            text="Nothing to mend: judge batches by the input probe and the first layer, and harm by the shadow pass. "
            "Batch Renorm with open limits lets the means vary again."
        ),
        layers=tuple(window.layers[at].name for at in worst),
        steps=held.steps,
    )
    return Outcome((finding,))
