import math
import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from brn_core.probe import LINEAR_FEATURES, InputProbe, first_tensor, model_inputs
from brn_core.wire import PROBE_FEATURES

torch.set_num_threads(1)

SHAPES = {
    "vectors": (6, 5),
    "long vectors": (6, 9_001),
    "scalars": (6,),
    "sequences": (6, 3, 40),
    "images": (6, 3, 8, 8),
    "large images": (6, 3, 100, 75),
    "flat images": (6, 1, 1, 9),
    "volumes": (6, 2, 9, 8, 7),
    "six dimensions": (4, 2, 3, 2, 2, 2),
}


def _parts(segment):
    return segment.flat.reshape(3, PROBE_FEATURES)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_statistics_are_those_of_the_features(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    probe = InputProbe()
    segment = probe.measure(x)
    y = probe.features(x).double().tolist()
    N = shape[0]
    assert segment.key.samples == N
    for f in range(PROBE_FEATURES):
        column = [row[f] for row in y]
        mean = sum(column) / N
        expected = (
            mean,
            sum((v - mean) ** 2 for v in column) / (N - 1),
            sum((b - a) ** 2 for a, b in pairwise(column)) / (2 * (N - 1)),
        )
        assert _parts(segment)[:, f].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_first_features_are_linear_and_the_others_are_not_negative(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    probe = InputProbe()
    y, doubled, negated = probe.features(x), probe.features(2 * x), probe.features(-x)
    torch.testing.assert_close(doubled, 2 * y)
    torch.testing.assert_close(negated[:, :LINEAR_FEATURES], -y[:, :LINEAR_FEATURES])
    assert (y[:, LINEAR_FEATURES:] >= 0).all()
    assert (negated[:, LINEAR_FEATURES:] >= 0).all()
    assert (y.std(0) > 0).float().mean() > 0.8


def test_two_probes_agree_whatever_the_global_generators_say():
    x = torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    one = InputProbe().measure(x)
    torch.manual_seed(2)
    other = InputProbe().measure(x)
    torch.testing.assert_close(one.flat, other.flat, rtol=0, atol=0)


def test_no_global_generator_is_touched():
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    InputProbe().measure(torch.ones(4, 3, 8, 8))
    InputProbe().measure(torch.ones(4, 7, dtype=torch.long))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert random.getstate() == python_state


def test_images_of_another_size_give_comparable_features():
    probe = InputProbe()
    probe.measure(torch.ones(2, 3, 32, 32))
    y, other = probe.features(torch.ones(2, 3, 32, 32)), probe.features(torch.ones(2, 3, 48, 40))
    torch.testing.assert_close(other[:, :LINEAR_FEATURES], y[:, :LINEAR_FEATURES], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "other", [torch.ones(2, 4, 8, 8), torch.ones(2, 3, 8), torch.ones(2, 7), torch.ones(2, 3).long()]
)
def test_an_input_unlike_the_first_gives_nothing_and_the_next_one_does_again(other):
    probe = InputProbe()
    first = torch.ones(2, 3, 8, 8)
    assert probe.measure(first) is not None
    assert probe.measure(other) is None
    assert probe.measure(first) is not None


@pytest.mark.parametrize("nothing", [None, "text", (), {}, [1, 2], torch.ones(()), torch.ones(0, 3), torch.ones(2, 0)])
def test_what_is_no_batch_gives_nothing(nothing):
    assert InputProbe().measure(nothing) is None


def test_the_first_tensor_is_found_in_nested_inputs():
    x, y = torch.ones(2, 3), torch.zeros(2)
    assert first_tensor(((), {"a": [None, x], "b": y})) is x
    assert first_tensor((y, {"a": x})) is y


def _sequences(kind, lengths, generator):
    """One tensor a sequence: tokens (T,) or channels (3, T) of a level of its own; 0 pads."""
    for length in lengths:
        if kind == "tokens":
            yield torch.randint(1, 1000, (length,), generator=generator)
        else:
            yield torch.randn(3, length, generator=generator) + torch.randn(3, 1, generator=generator)


def _padded(sequences, to=0):
    longest = max(to, *(s.shape[-1] for s in sequences))
    return torch.stack([torch.nn.functional.pad(s, (0, longest - s.shape[-1])) for s in sequences])


@pytest.mark.parametrize("kind", ["tokens", "channels"])
def test_a_sequence_has_the_same_features_whatever_the_others_of_its_batch_are_as_long_as(kind):
    sequences = list(_sequences(kind, (1, 20, 70, 100, 300), torch.Generator().manual_seed(1)))
    probe, of_another_rank = InputProbe(), InputProbe()
    y = probe.features(_padded(sequences, to=310))
    longer = of_another_rank.features(_padded(sequences, to=2000))
    torch.testing.assert_close(longer, y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(probe.features(_padded(sequences[:3], to=80)), y[:3], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y[1], y[2])


def test_the_end_of_a_long_sequence_is_looked_at_too():
    x = torch.randn(2, 1, 20_000, generator=torch.Generator().manual_seed(1))
    x[1] = x[0]
    x[1, :, -5000:] *= 3
    y = InputProbe().features(x)
    assert not torch.allclose(y[0], y[1], rtol=0.1)


def test_tokens_are_told_apart_by_what_they_are_not_by_their_number():
    probe = InputProbe()
    tokens = torch.tensor([[0, 1, 2], [50_000, 50_001, 50_002], [-1, 7, 2**40]])
    y = probe.features(tokens)
    assert y.isfinite().all()
    assert y.abs().max() < 20
    assert not torch.allclose(y[0], y[1])
    assert torch.equal(probe.features(tokens), y)


def test_byte_images_are_numbers_not_tokens():
    x = torch.randint(0, 255, (3, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(InputProbe().features(x), InputProbe().features(x.float()))


def test_one_sample_has_a_mean_and_no_spread():
    mean, var, adjacency = _parts(InputProbe().measure(torch.ones(1, 5)))
    assert mean.isfinite().all()
    assert var.isnan().all()
    assert adjacency.isnan().all()


def test_non_finite_inputs_give_non_finite_features():
    x = torch.ones(3, 2, 8, 8)
    x[0, 0, 0, 0] = math.nan
    assert _parts(InputProbe().measure(x))[0, :LINEAR_FEATURES].isnan().all()


def test_autocast_and_gradients_leave_the_features_alone():
    x = torch.randn(3, 2, 8, 8, requires_grad=True)
    plain = InputProbe().measure(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = InputProbe().measure(x)
    assert not plain.flat.requires_grad
    torch.testing.assert_close(cast.flat, plain.flat)


def _ratio(batches):
    """F over batches, roughly (mean over features)."""
    probe = InputProbe()
    means, variances = [], []
    for x in batches:
        mean, var, _ = _parts(probe.measure(x))
        means.append(mean)
        variances.append(var / len(x))
    numerator = torch.stack(means).diff(dim=0).square().mean(0) / 2
    denominator = torch.stack(variances).mean(0)
    return ((numerator / denominator).mean()).item()


def test_clustered_batches_stand_out_and_independent_ones_do_not():
    """The between-batch variance over the sampling variance, F, is 1 for independent draws (exact null)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 1, 8, 8, generator=generator)

    def images(labels):
        return centres[labels] + 0.3 * torch.randn(len(labels), 1, 8, 8, generator=generator)

    independent = _ratio(images(torch.randint(10, (32,), generator=generator)) for _ in range(120))
    clustered = _ratio(images(torch.randint(10, (2,), generator=generator).repeat_interleave(16)) for _ in range(120))
    assert 0.8 < independent < 1.25
    assert clustered > 5


def test_keywords_are_taken_as_the_model_names_them_and_labels_never():
    class Model(torch.nn.Module):
        def forward(self, pixel_values, labels=None, mask=None):
            return pixel_values

    given = {"labels": 1, "mask": 2, "pixel_values": 3}
    assert list(model_inputs(Model(), given).items()) == [("pixel_values", 3), ("mask", 2)]


@pytest.mark.parametrize("kind", ["tokens", "channels"])
def test_sequences_padded_to_the_longest_of_their_batch_are_as_independent_as_they_were_drawn(kind):
    generator = torch.Generator().manual_seed(0)

    def batch(lengths):
        return _padded(list(_sequences(kind, lengths.tolist(), generator)))

    def lengths(*shape):
        return (40 * (0.5 * torch.randn(*shape, generator=generator)).exp()).int().clamp(5, 250)

    independent = _ratio(batch(lengths(32)) for _ in range(120))
    bucketed = _ratio(batch(lengths(32 * 20).sort()[0].reshape(20, 32)[i % 20]) for i in torch.randperm(120).tolist())
    assert 0.8 < independent < 1.25
    assert bucketed > 2, "sequences of like length in a batch are no independent draws, and change its statistics"
