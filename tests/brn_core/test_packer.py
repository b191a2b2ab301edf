import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from brn_core import wire
from brn_core.capture import BatchNormMoments, Transfer, pack
from brn_core.functional import Observation
from brn_core.packer import (
    LIMITS,
    VECTORS,
    Block,
    LayerGroup,
    LayerRows,
    ProbeRow,
    Row,
    StepRows,
    block,
    layer_columns,
    snapshot,
    tables,
)

torch.set_num_threads(1)

EPS = 1e-3


def _percentile(values, q):
    ordered = sorted(values)
    at = q / 100 * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def _of_batch(x, eps):
    """Sufficient statistics of one layer's batch, by loops over plain numbers: x[n][c] is a list of positions."""
    samples, channels = len(x), len(x[0])
    out = {name: [] for name in ("mu_b", "sigma_b", "between_var", "scale_var", "adjacency")}
    for c in range(channels):
        everything = [v for n in range(samples) for v in x[n][c]]
        mu_b = sum(everything) / len(everything)
        out["mu_b"].append(mu_b)
        out["sigma_b"].append(math.sqrt(sum((v - mu_b) ** 2 for v in everything) / len(everything) + eps))
        y = [sum(x[n][c]) / len(x[n][c]) for n in range(samples)]
        q = [sum((v - mu_b) ** 2 for v in x[n][c]) / len(x[n][c]) for n in range(samples)]
        for name, values in (("between_var", y), ("scale_var", q)):
            m = sum(values) / samples
            out[name].append(sum((v - m) ** 2 for v in values) / (samples - 1))
        steps = sum((y[n + 1] - y[n]) ** 2 for n in range(samples - 1))
        out["adjacency"].append(steps / (2 * (samples - 1)))
    return out


def _row(history, mu, sigma, samples, eps, r_min, r_max, d_max):
    """One row of the layers table by loops: history[0] is the step, history[1] and [2] the two before it."""
    now = history[0]
    channels = range(len(mu))
    mean = lambda values: sum(values) / len(mu)  # noqa: E731
    r = [now["sigma_b"][c] / sigma[c] for c in channels]
    d = [(now["mu_b"][c] - mu[c]) / sigma[c] for c in channels]
    row = {
        "samples": samples,
        "mu_b": mean(now["mu_b"]),
        "sigma_b": mean(now["sigma_b"]),
        "mu": mean(mu),
        "sigma": mean(sigma),
        "r_min": r_min,
        "r_max": r_max,
        "d_max": d_max,
        "clip_r": mean([float(not r_min <= r[c] <= r_max) for c in channels]),
        "clip_d": mean([float(not abs(d[c]) <= d_max) for c in channels]),
        "gap": mean([(r[c] - 1) ** 2 + d[c] ** 2 for c in channels]),
        "d_squared": mean([d[c] ** 2 for c in channels]),
        "log_r": mean([math.log(r[c]) for c in channels]),
        "mean_noise": mean([now["between_var"][c] / (samples * sigma[c] ** 2) for c in channels]),
        "scale_noise": mean([now["scale_var"][c] / sigma[c] ** 4 / (4 * samples) for c in channels]),
        "adjacency_noise": mean([now["adjacency"][c] / (samples * sigma[c] ** 2) for c in channels]),
        "dead_channels": sum(now["sigma_b"][c] ** 2 - eps < 100 * eps for c in channels),
        "nonfinite_channels": 0,
    }
    row["residual"] = mean(
        [(r[c] - min(max(r[c], r_min), r_max)) ** 2 + (d[c] - min(max(d[c], -d_max), d_max)) ** 2 for c in channels]
    )
    for q in wire.QUANTILES:
        row[f"r_q{q:02d}"] = _percentile(r, q)
        row[f"d_q{q:02d}"] = _percentile(d, q)
    m0, m1, m2 = (h["mu_b"] for h in history)
    s0, s1, s2 = (h["sigma_b"] for h in history)
    row["mean_diff1"] = mean([(m0[c] - m1[c]) ** 2 / (2 * sigma[c] ** 2) for c in channels])
    row["mean_diff2"] = mean([(m0[c] - 2 * m1[c] + m2[c]) ** 2 / (6 * sigma[c] ** 2) for c in channels])
    row["scale_diff2"] = mean([(math.log(s0[c]) - 2 * math.log(s1[c]) + math.log(s2[c])) ** 2 / 6 for c in channels])
    return row


def _sample(x, mu, running_var):
    """What a BatchNorm layer gives for the batch x of shape (N, C, S) or (N, C)."""
    if x.dim() == 2:
        return BatchNormMoments(x, None, mu, running_var)
    return BatchNormMoments(x.mean(2), x.var(2, correction=0), mu, running_var)


def _block_of(steps, eps):
    transfer = Transfer.start(pack(steps), {})
    assert transfer.ready()
    return block(transfer.arrays(), eps)


@pytest.mark.parametrize("parts", ["one by one", "at once", "in two"])
def test_every_column_is_what_its_meaning_says_however_steps_are_gathered(parts):
    generator = torch.Generator().manual_seed(3)
    shapes, eps = [(6, 4, 5), (6, 7, 3), (6, 1, 2)], [EPS, 1e-5, 0.0]
    limits = [(0.8, 1.25, 0.3), (1.0, 1.0, 0.0), (0.5, 2.0, 1.0)]
    steps, references = {}, []
    for step in range(3):
        taken, per_layer = {}, []
        for layer, shape in enumerate(shapes):
            x = torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1
            x[:, 0] *= 0.01 if layer == 0 else 1  # a dead channel
            mu = torch.randn(shape[1], generator=generator)
            var = torch.rand(shape[1], generator=generator) + 1
            stats = _of_batch(x.tolist(), eps[layer])
            sigma = (var.double() + eps[layer]).sqrt()
            per_layer.append((stats, mu.tolist(), sigma.tolist()))
            if layer == 1:
                taken[layer] = _sample(x.float(), mu, var)
            else:
                moments = _sample(x.float(), mu, var)
                taken[layer] = Observation(
                    moments.mean_NC,
                    moments.var_NC,
                    torch.tensor(stats["mu_b"]),
                    torch.tensor(stats["sigma_b"]),
                    mu,
                    sigma.float(),
                    *(torch.tensor(v) for v in limits[layer]),
                )
        steps[step] = taken
        references.append(per_layer)
    parts = {
        "one by one": [{step: taken} for step, taken in steps.items()],
        "at once": [steps],
        "in two": [{0: steps[0]}, {1: steps[1], 2: steps[2]}],
    }[parts]
    *past, now = (_block_of(part, eps) for part in parts)
    columns, nulls = layer_columns(now, 1, past)
    assert set(columns) == {metric.name for metric in wire.METRICS}
    assert set(nulls) == {metric.name for metric in wire.METRICS if metric.nullable}
    last = now.span(2)
    assert now.layers[last].tolist() == [0, 1, 2]
    assert not any(mask[last].any() for mask in nulls.values())
    columns = {name: values[last] for name, values in columns.items()}
    for layer, shape in enumerate(shapes):
        history = [references[step][layer][0] for step in (2, 1, 0)]
        _, mu, sigma = references[2][layer]
        expected = _row(history, mu, sigma, shape[0], eps[layer], *limits[layer])
        assert set(expected) == set(columns)
        for name, value in expected.items():
            assert columns[name][layer] == pytest.approx(value, rel=2e-4, abs=1e-6), (layer, name)
    assert columns["dead_channels"][0] == 1


def test_inputs_without_positions_need_no_variance():
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    now = _block_of({0: {0: _sample(x, torch.zeros(3), torch.ones(3))}}, [EPS])
    expected = _of_batch([[[v] for v in row] for row in x.tolist()], EPS)
    for name, values in expected.items():
        np.testing.assert_allclose(now.vectors[name], values, rtol=1e-5, atol=1e-7)


def test_layers_with_other_sample_counts_and_kinds_come_back_in_the_networks_order():
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(n, c, 4, generator=generator) for n, c in ((3, 2), (8, 5), (3, 4))]
    taken = {i: _sample(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1])) for i, x in enumerate(xs)}
    assert len(pack({9: taken})) == 2
    now = _block_of({9: taken}, [EPS] * 3)
    assert now.layers.tolist() == [0, 1, 2]
    assert now.samples.tolist() == [3, 8, 3]
    for i, x in enumerate(xs):
        alone = _block_of({9: {i: taken[i]}}, [EPS] * 3)
        for name in VECTORS:
            np.testing.assert_allclose(_of_row(now, i, name), alone.vectors[name], rtol=1e-6)
        np.testing.assert_allclose(_of_row(now, i, "mu_b"), x.mean((0, 2)), atol=1e-6)
    assert {name: values.tolist() for name, values in now.limits.items()} == {
        "r_min": [1.0] * 3,
        "r_max": [1.0] * 3,
        "d_max": [0.0] * 3,
    }


def _of_row(rows, row, name):
    return rows.vectors[name][rows.starts[row] : rows.starts[row + 1]]


def _plain_block(step, layers, values, samples=4):
    """A block of two-channel layers whose vectors are `values` (a number a layer)."""
    vector = np.repeat(np.asarray(values, float), 2)
    return Block(
        np.full(len(layers), step),
        np.asarray(layers),
        np.arange(len(layers) + 1) * 2,
        np.full(len(layers), samples),
        np.full(len(layers), EPS),
        dict(zip(LIMITS, np.array([[1.0], [1.0], [0.0]]) * np.ones(len(layers)), strict=True)),
        {name: np.ones_like(vector) if name == "sigma" else vector for name in VECTORS},
    )


def test_differences_need_the_steps_before_and_are_null_without_them():
    now, before, before_that = (_plain_block(s, [0, 1], v) for s, v in ((2, [3, 5]), (1, [2, 5]), (0, [4, 1])))
    _, nulls = layer_columns(now, 1, [])
    assert all(nulls[name].all() for name in ("mean_diff1", "mean_diff2", "scale_diff2"))
    columns, nulls = layer_columns(now, 1, [before])
    assert not nulls["mean_diff1"].any()
    assert nulls["mean_diff2"].all()
    np.testing.assert_allclose(columns["mean_diff1"], [0.5, 0.0])
    columns, nulls = layer_columns(now, 1, [before_that, before])
    assert not nulls["mean_diff2"].any()
    np.testing.assert_allclose(columns["mean_diff2"], [(3 - 4 + 4) ** 2 / 6, (5 - 10 + 1) ** 2 / 6])


def test_a_layer_that_skipped_a_step_has_null_differences_and_its_neighbours_do_not():
    now, before = _plain_block(2, [0, 1, 2], [3, 5, 7]), _plain_block(1, [0, 2], [2, 4])
    columns, nulls = layer_columns(now, 1, [before])
    assert nulls["mean_diff1"].tolist() == [False, True, False]
    np.testing.assert_allclose(columns["mean_diff1"][[0, 2]], [0.5, 4.5])


def test_one_sample_has_no_spread_so_its_noise_is_null_not_zero():
    _, nulls = layer_columns(_plain_block(0, [0], [1.0], samples=1), 1, [])
    assert all(nulls[name].all() for name in ("mean_noise", "scale_noise", "adjacency_noise"))
    x = torch.ones(1, 2, 3)
    with np.errstate(all="raise"):
        now = _block_of({0: {0: _sample(x, torch.zeros(2), torch.ones(2))}}, [EPS])
    assert now.samples.tolist() == [1]


def test_an_empty_batch_gives_no_row():
    x = torch.zeros(0, 2)
    assert pack({0: {0: BatchNormMoments(x, None, torch.zeros(2), torch.ones(2))}}) == []
    assert block([], [EPS]) is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_channel_is_counted_and_spoils_only_its_own_layer(bad):
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    spoiled = x.clone()
    spoiled[1, 2, 0] = bad
    taken = {i: _sample(v, torch.zeros(3), torch.ones(3)) for i, v in enumerate((spoiled, x))}
    columns, _ = layer_columns(_block_of({0: taken}, [EPS] * 2), 1, [])
    assert columns["nonfinite_channels"].tolist() == [1, 0]
    assert not math.isfinite(columns["gap"][0])
    assert math.isfinite(columns["gap"][1])
    assert columns["clip_r"][0] == 1.0


def test_quantiles_between_equal_infinities_are_infinite():
    now = _plain_block(0, [0], [math.inf])
    columns, _ = layer_columns(now, 1, [])
    assert columns["r_q50"][0] == math.inf


def test_tables_follow_the_wire_schema_and_keep_null_apart_from_nan():
    now = _plain_block(5, [0, 3], [1.0, math.nan])
    layers = LayerRows.of(*layer_columns(now, 1, []))
    vector = np.arange(24, dtype=np.float32)
    rows = [
        StepRows(4, scalars={"loss": math.inf}),
        StepRows(
            5,
            now.layers,
            *layers,
            ProbeRow(4, vector, vector + 1, vector + 2),
            {"loss": 0.1},
            snapshot(now, slice(0, 2)),
        ),
    ]
    decoded = wire.decode_batch(wire.encode_batch(tables(rows)))
    layers = decoded["layers"].to_pylist()
    assert [(row["step"], row["layer"]) for row in layers] == [(5, 0), (5, 3)]
    assert layers[0]["mean_diff1"] is None
    assert math.isnan(layers[1]["gap"])
    assert decoded["scalars"].to_pylist() == [
        {"step": 4, "name": "loss", "value": math.inf},
        {"step": 5, "name": "loss", "value": 0.1},
    ]
    (probe,) = decoded["probe"].to_pylist()
    assert (probe["step"], probe["samples"], probe["var"][:2]) == (5, 4, [1.0, 2.0])
    channels = decoded["channels"].to_pylist()
    assert [(row["step"], row["layer"], len(row["d"])) for row in channels] == [(5, 0, 2), (5, 3, 2)]
    assert channels[0]["r"] == [1.0, 1.0]
    assert math.isnan(channels[1]["mu_b"][0])


def test_rows_cut_from_several_steps_are_each_steps_own():
    steps = [
        _plain_block(s, layers, values) for s, layers, values in ((3, [0, 2], [1, 2]), (4, [2], [3]), (5, [0], [4]))
    ]
    arrays = []
    for one in steps:
        rows = tuple(Row(int(s), int(layer)) for s, layer in zip(one.steps, one.layers, strict=True))
        flat = np.concatenate([*one.vectors.values(), *one.limits.values()]).astype(np.float32)
        arrays.append((LayerGroup(rows, (2,) * len(rows), 4, batch_norm=False), flat))
    now = block([arrays[2], arrays[0], arrays[1]], [EPS] * 3)
    assert (now.steps.tolist(), now.layers.tolist()) == ([3, 3, 4, 5], [0, 2, 2, 0])
    assert [now.span(step) for step in (3, 4, 5, 6)] == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 4)]
    assert [_of_row(now, row, "mu_b").tolist() for row in range(4)] == [[1, 1], [2, 2], [3, 3], [4, 4]]
    columns, nulls = layer_columns(now, 1, [])
    assert nulls["mean_diff1"].tolist() == [True, True, False, True]
    assert columns["mean_diff1"][2] == (3 - 2) ** 2 / 2
    later = now.since(4)
    assert (later.steps.tolist(), later.starts.tolist()) == ([4, 5], [0, 2, 4])
    assert _of_row(later, 1, "mu_b").tolist() == [4, 4]
    taken = snapshot(now, now.span(4))
    assert (taken.layers.tolist(), taken.starts.tolist(), taken.vectors[0].tolist()) == ([2], [0, 2], [3, 3])


def test_a_snapshot_of_a_single_sample_has_no_variance_between_samples():
    taken = snapshot(_plain_block(0, [0], [1.0], samples=1), slice(0, 1))
    between = wire.TABLES["channels"].names.index("between_var") - 2
    assert np.isnan(taken.vectors[between]).all()
    assert np.isfinite(np.delete(taken.vectors, between, 0)).all()


def test_no_rows_make_an_empty_batch():
    assert wire.encode_batch(tables([])) == b""
    assert all(isinstance(table, (pa.Table, pa.RecordBatch)) for table in tables([]).values())
