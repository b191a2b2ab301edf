"""A Lightning callback that records what normalization does.

import lightning
from brn_core.integrations.lightning import NormalizationCallback

class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    ...

trainer = lightning.Trainer(callbacks=[NormalizationCallback("net", url="http://127.0.0.1:8321")])
trainer.fit(Classifier(), data)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
import torch

from brn_core.integrations import sampler_of
from brn_core.recorder import Recorder, watch


class NormalizationCallback(lightning.Callback):  # type: ignore[misc]  # the library is not there when types are checked
    """Records a fit from its first batch to its end: one recorded step an optimizer step, on every rank.

    Recorded are the loss that `training_step` returns and what the module logs by `self.log`, each when it is new.
    A fit that ends by an exception is recorded as failed.

    Args:
        network: which submodule `training_step` calls, by its name in the LightningModule; "": the module itself, which
            is then to be called as `self(x)`. Its input is what the input probe sees.
        settings: of `brn_core.recorder.Recorder`. The number of planned steps, the batch size, the first step's number
            and `hparams` (with the loader's sampler) as config are taken from the trainer where they are not given.
    """

    def __init__(self, network: str = "", **settings: Any) -> None:
        self._network = network
        self._settings = settings
        self._recorder: Recorder | None = None
        self._done = 0
        self._logged: dict[str, Any] = {}

    @property
    def recorder(self) -> Recorder | None:
        """The recorder of the fit that runs."""
        return self._recorder

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._close("failed")  # of a fit that ended without saying so
        planned = trainer.estimated_stepping_batches
        found = {
            "planned_steps": int(planned) if 0 < planned < float("inf") else None,
            "batch_size": getattr(trainer.train_dataloader, "batch_size", None),
            "config": {**sampler_of(trainer.train_dataloader), **pl_module.hparams},
            "start_step": trainer.global_step,
        }
        self._done = trainer.global_step
        self._logged = dict(trainer.callback_metrics)
        self._recorder = watch(pl_module.get_submodule(self._network), **{**found, **self._settings})

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._recorder is None or trainer.global_step == self._done:  # gradients are still being accumulated
            return
        self._done = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        scalars: dict[str, Any] = {} if loss is None else {"loss": loss}
        logged = dict(trainer.callback_metrics)
        for name, value in logged.items():
            # the trainer keeps the last validation's numbers: they belong to one step only
            if value is not self._logged.get(name) and isinstance(value, torch.Tensor) and value.numel() == 1:
                scalars[name] = value
        self._logged = logged
        self._recorder.step(**scalars)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._close("finished")

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        self._close("failed")

    def _close(self, status: Any) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close(status)
