import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from brn_core.layers import BatchRenorm2d
from brn_core.shadow import Shadow, run_shadow, unwrapped

torch.set_num_threads(1)


class Awkward(nn.Module):
    """Everything a forward may do that a second forward must not leave behind."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(2)
        self.renorm = BatchRenorm2d(2)
        self.frozen = nn.BatchNorm2d(2).eval()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(2, 3)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))
        self.auxiliary_loss = None

    def forward(self, x):
        x.add_(1)  # in place on its input
        self.calls += 1
        self.replaced = self.replaced + 1
        x = self.drop(self.frozen(self.renorm(self.norm(x)))).mean((2, 3))
        x = x + torch.rand(1) + random.random() + np.random.rand()
        self.auxiliary_loss = x.square().mean()
        return self.head(x)


def _state(model):
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    buffers = {name: (id(b), b.clone(), b._version) for name, b in model.named_buffers()}
    return generators, buffers, [m.training for m in model.modules()], model.auxiliary_loss


def test_nothing_is_left_of_a_shadow_pass():
    model, x = Awkward(), torch.randn(4, 2, 3, 3)
    model.train()
    model.frozen.eval()
    output = model(x.clone())
    generators, buffers, flags, loss = _state(model)
    shadow = run_shadow(model, (x,), {}, output)
    after_generators, after_buffers, after_flags, after_loss = _state(model)
    assert torch.equal(after_generators[0], generators[0])
    assert after_generators[1:] == generators[1:]
    assert after_flags == flags
    assert after_loss is loss
    for name, (identity, value, _) in buffers.items():
        assert after_buffers[name][0] == identity, name
        assert torch.equal(after_buffers[name][1], value), name
    for name in ("norm.running_mean", "norm.running_var", "renorm.running_mean"):
        assert after_buffers[name][2] == buffers[name][2], f"{name} was written to"
    assert not shadow.inferred.requires_grad
    output.sum().backward()  # what autograd had saved is still valid


def test_everything_is_put_back_when_the_model_fails():
    class Fails(Awkward):
        def forward(self, x):
            super().forward(x)
            raise RuntimeError("no inference today") if not self.training else None

    model = Fails().train()
    generators, buffers, flags, _ = _state(model)
    with pytest.raises(RuntimeError, match="no inference today"):
        run_shadow(model, (torch.zeros(2, 2, 2, 2),), {}, torch.zeros(2, 3))
    after = _state(model)
    assert torch.equal(after[0][0], generators[0])
    assert after[2] == flags
    assert all(torch.equal(after[1][name][1], value) for name, (_, value, _) in buffers.items())
    assert torch.is_autocast_cache_enabled()


def test_the_shadow_is_the_models_inference_output():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 5))
    x = torch.randn(6, 1, 4, 4)
    for _ in range(3):
        model(x)
    output = model(x)
    shadow = run_shadow(model, (x,), {}, output)
    assert model.training
    assert torch.equal(shadow.trained, output)
    assert torch.equal(shadow.inferred, model.eval()(x))


def test_hooks_do_not_see_the_shadow_pass():
    model, seen = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args))
    output = model(torch.ones(2, 3))
    assert len(seen) == 2
    run_shadow(model, (torch.ones(2, 3),), {}, output)
    assert len(seen) == 2
    model(torch.ones(2, 3))
    assert len(seen) == 4


def test_the_autocast_cache_is_left_alone():
    model, enabled = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), []

    class OnlyInInference(nn.Module):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(2, 2)

        def forward(self, x):
            if self.training:
                return x
            enabled.append(torch.is_autocast_cache_enabled())
            return self.extra(x)

    model.append(OnlyInInference())
    x = torch.randn(8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run_shadow(model, (x,), {}, model(x))
        assert enabled == [False]
        assert torch.is_autocast_cache_enabled()
        loss = model[3].extra(model(x).float()).float().sum()
    loss.backward()
    # a bfloat16 copy of the weight, cached by a pass without gradients, would have cut the graph
    assert model[3].extra.weight.grad is not None


def test_losses_leave_the_generators_alone_and_come_in_single_precision():
    dtypes = []

    def noisy_loss(output):
        dtypes.append(output.dtype)
        return (output + torch.rand(())).mean()

    state = torch.get_rng_state()
    trained, inferred = Shadow(torch.ones(2, 3).bfloat16(), torch.zeros(2, 3).bfloat16()).losses(noisy_loss)
    assert torch.equal(torch.get_rng_state(), state)
    assert dtypes == [torch.float32] * 2
    assert 0 <= inferred < trained <= 2


def test_disagreement_is_the_share_of_other_predictions():
    trained, inferred = F.one_hot(torch.tensor([0, 1, 2, 2]), 3), F.one_hot(torch.tensor([0, 1, 1, 0]), 3)
    assert Shadow(trained.float(), inferred.float()).disagreement() == 0.5
    per_pixel = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    assert Shadow(*per_pixel).disagreement() == 0


@pytest.mark.parametrize("output", [torch.zeros(4), torch.zeros(4, 1), torch.zeros(0, 3), None, "text"])
def test_without_classes_there_is_no_disagreement(output):
    assert Shadow(output, output).disagreement() is None


def test_wrappers_are_looked_through():
    model = nn.Linear(2, 2)
    assert unwrapped(nn.DataParallel(model)) is model
    assert unwrapped(torch.compile(model, backend="eager")) is model
    assert unwrapped(model) is model
