"""The callbacks inside the real libraries; skipped without them, except in `make test-integrations`, which has them."""

import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fake_service import FakeService
from torch import nn

from brn_core import wire
from brn_core.integrations import sampler_of

# the libraries warn of one another and of this machine
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("_quiet")]

STEPS = 6


@pytest.fixture
def _quiet(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    yield
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("brn-")]


def _library(name):
    if os.environ.get("BRN_TEST_INTEGRATIONS"):
        return importlib.import_module(name)
    return pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture
def service():
    with FakeService() as running:
        yield running


def _net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


def _scalars(service, name):
    return {row["step"]: row["value"] for row in service.rows("scalars") if row["name"] == name}


def test_nothing_imports_the_libraries_unasked():
    code = (
        "import sys, brn_core.recorder, brn_core.integrations; print({'lightning', 'transformers'} & set(sys.modules))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "set()\n"


def test_what_chooses_the_samples_is_told_by_its_class():
    data = torch.utils.data.TensorDataset(torch.zeros(8, 1))

    class Pairs(torch.utils.data.Sampler):
        def __iter__(self):
            return iter([[0, 1], [2, 3]])

    loaders = [
        torch.utils.data.DataLoader(data, batch_size=2),
        torch.utils.data.DataLoader(data, batch_size=2, shuffle=True),
        torch.utils.data.DataLoader(data, batch_sampler=Pairs()),
    ]
    assert [sampler_of(loader) for loader in loaders] == [
        {"sampler": name} for name in ("SequentialSampler", "RandomSampler", "Pairs")
    ]
    assert sampler_of([1, 2]) == sampler_of(None) == {}


# --- Lightning ------------------------------------------------------------------------------------------------------


def _fit(service, *, epochs=1, fails_at=None, network="net", record=None, **trainer_settings):
    """Fits a small module; gives losses by step and the callback (None where `record` is False)."""
    lightning = _library("lightning")
    from brn_core.integrations.lightning import NormalizationCallback

    losses = []

    class Classifier(lightning.LightningModule):
        def __init__(self, width):
            super().__init__()
            self.save_hyperparameters()
            self.net = _net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, index):
            if index == fails_at:
                raise RuntimeError("broken on purpose")
            x, y = batch
            loss = F.cross_entropy(self.net(x) if network else self(x), y)
            self.log("doubled", 2 * loss)
            losses.append(loss.item())
            return loss

        def validation_step(self, batch, index):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(8 * STEPS, 4, generator=generator), torch.randint(3, (8 * STEPS,), generator=generator)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    callback = None
    if record is not False:
        callback = NormalizationCallback(
            network, url=service.url, run_id="fit", flush_seconds=0.02, strict=True, **(record or {})
        )
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback] if callback else [], **trainer_settings,
    )  # fmt: skip
    model = Classifier(width=8)
    try:
        trainer.fit(model, data, data)
    except RuntimeError as error:
        assert "broken on purpose" in str(error)  # noqa: PT017
    return losses, callback, model


def test_a_fit_is_recorded_step_by_step_and_stays_bit_equal(service):
    unwatched, _, plain = _fit(service, record=False, epochs=2)
    losses, callback, model = _fit(service, epochs=2, record={"shadow_every": 2})
    assert losses == unwatched
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), plain.state_dict().values(), strict=True))
    assert callback.recorder is None
    assert list(_scalars(service, "loss").values()) == pytest.approx(losses)
    assert list(_scalars(service, "doubled").values()) == pytest.approx([2 * loss for loss in losses])
    assert [row["step"] for row in service.rows("layers")] == list(range(2 * STEPS))
    assert [row["step"] for row in service.rows("probe")] == list(range(2 * STEPS))
    assert {row["samples"] for row in service.rows("probe")} == {8}
    assert list(_scalars(service, "val_loss")) == [STEPS], "a validation's number belongs to the next step, once"
    run = wire.RunCreate.model_validate(service.runs["fit"])
    assert (run.batch_size, run.planned_steps) == (8, 2 * STEPS)
    assert run.config == {"sampler": "SequentialSampler", "width": 8}
    assert [layer.name for layer in run.layers] == ["1"]
    assert service.statuses == {"fit": "finished"}


def test_a_module_called_as_itself_is_recorded_with_its_own_names(service):
    _fit(service, network="")
    assert [layer["name"] for layer in service.runs["fit"]["layers"]] == ["net.1"]
    assert len(service.rows("probe")) == STEPS


def test_accumulated_gradients_are_one_step(service):
    _fit(service, accumulate_grad_batches=3)
    assert [row["step"] for row in service.rows("layers")] == list(range(STEPS // 3))


def test_a_fit_that_fails_is_recorded_as_failed(service):
    _fit(service, fails_at=4)
    assert [row["step"] for row in service.rows("layers")] == list(range(4))
    assert service.statuses == {"fit": "failed"}


_FIT_DDP = """
import lightning, sys, torch
from torch import nn
from brn_core.integrations.lightning import NormalizationCallback

class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

torch.set_num_threads(1)
data = torch.utils.data.TensorDataset(torch.randn(48, 4), torch.randint(3, (48,)))
trainer = lightning.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
    callbacks=[NormalizationCallback("net", url=sys.argv[1], run_name="ddp")],
)
trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=8))
"""


def test_both_ranks_of_a_distributed_fit_are_recorded_in_one_run(service, tmp_path):
    _library("lightning")
    script = tmp_path / "fit.py"
    script.write_text(_FIT_DDP)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [sys.executable, str(script), service.url], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (run,) = service.runs.values()
    assert (run["name"], run["world_size"]) == ("ddp", 2)
    for rank in range(2):
        assert [row["step"] for row in service.rows("layers", rank)] == list(range(3))
    assert set(service.statuses.values()) == {"finished"}


# --- Hugging Face ---------------------------------------------------------------------------------------------------


class _Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8 * STEPS

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(4, generator=generator), "labels": index % 3}


class _Model(nn.Module):
    def __init__(self, fails_at=None):
        super().__init__()
        self.net, self.calls, self.fails_at = _net(), 0, fails_at

    def forward(self, x, labels=None):
        if self.training and torch.is_grad_enabled():
            self.calls += 1
            if self.calls - 1 == self.fails_at:
                raise RuntimeError("broken on purpose")
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def _trainer(tmp_path, callbacks, *, fails_at=None, **arguments):
    transformers = _library("transformers")
    settings = {"logging_steps": 1, "max_steps": STEPS, "per_device_train_batch_size": 8} | arguments
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, **settings
    )
    return transformers.Trainer(
        _Model(fails_at), args, train_dataset=_Data(), eval_dataset=_Data(), callbacks=callbacks
    )


def _callback(service, **settings):
    _library("transformers")
    from brn_core.integrations.transformers import NormalizationCallback

    return NormalizationCallback(
        url=service.url, **{"run_id": "train", "flush_seconds": 0.02, "strict": True, "shadow_every": 2} | settings
    )


def test_a_training_is_recorded_step_by_step_and_stays_bit_equal(service, tmp_path):
    plain = _trainer(tmp_path, [])
    plain.train()
    trainer = _trainer(tmp_path, [_callback(service)], eval_strategy="steps", eval_steps=3, run_name="mine")
    trainer.train()
    assert all(
        torch.equal(a, b)
        for a, b in zip(trainer.model.state_dict().values(), plain.model.state_dict().values(), strict=True)
    )
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    assert list(_scalars(service, "loss").values()) == logged
    assert list(_scalars(service, "learning_rate")) == list(range(STEPS))
    assert list(_scalars(service, "eval_loss")) == [2, 5], "at the steps they were asked for"
    assert list(_scalars(service, wire.SCALAR_SHADOW_EVAL_LOSS)) == [2, 4]
    assert [row["step"] for row in service.rows("layers")] == list(range(STEPS))
    assert {row["samples"] for row in service.rows("probe")} == {8}
    run = wire.RunCreate.model_validate(service.runs["train"])
    assert (run.name, run.batch_size, run.planned_steps) == ("mine", 8, STEPS)
    assert (run.config["logging_steps"], run.config["sampler"]) == (1, "SeedableRandomSampler")
    assert [layer.name for layer in run.layers] == ["net.1"]
    assert service.statuses == {"train": "finished"}


def test_accumulated_gradients_are_one_step_of_the_trainer(service, tmp_path):
    _trainer(tmp_path, [_callback(service)], gradient_accumulation_steps=2, max_steps=3).train()
    assert [row["step"] for row in service.rows("layers")] == list(range(3))


def test_a_training_that_failed_is_said_to_have_when_the_next_begins(service, tmp_path):
    callback = _callback(service)
    trainer = _trainer(tmp_path, [callback], fails_at=3)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        trainer.train()
    failed = callback.recorder
    trainer.train()
    assert failed is not None
    assert failed is not callback.recorder
    assert service.statuses == {"train": "finished"}
    assert [row["step"] for row in service.rows("layers")] == [*range(3), *range(STEPS)]
