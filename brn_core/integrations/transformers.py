"""A callback of Hugging Face's Trainer that records what normalization does.

from transformers import Trainer
from brn_core.integrations.transformers import NormalizationCallback

trainer = Trainer(model, args, train_dataset=data, callbacks=[NormalizationCallback(url="http://127.0.0.1:8321")])
trainer.train()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from brn_core.integrations import sampler_of
from brn_core.recorder import Recorder, watch


def loss_of(output: Any) -> Tensor:
    """The loss that a model which was given labels puts into its output."""
    loss: Tensor = output["loss"]
    return loss


class NormalizationCallback(TrainerCallback):  # type: ignore[misc]  # the library is not there when types are checked
    """Records a training from its first batch to its end: one recorded step an optimizer step, on every rank.

    Recorded is what the trainer logs (loss, learning_rate, grad_norm, eval_loss, ...), at the step that it logs it for.
    The trainer tells its callbacks of no exception: a training that ends by one is recorded as failed when the program
    ends, or when the next training begins.

    Args:
        shadow_loss: maps the model's output to the batch's loss, for the shadow pass; None where that cannot be, as
            with label smoothing, for which the trainer keeps the labels from the model.
        settings: of `brn_core.recorder.Recorder`. The run's name, the number of planned steps, the batch size, the
            first step's number and the arguments (with the loader's sampler) as config are taken from the trainer
            where they are not given.
    """

    def __init__(self, *, shadow_loss: Callable[[Any], Tensor] | None = loss_of, **settings: Any) -> None:
        self._shadow_loss = shadow_loss
        self._settings = settings
        self._recorder: Recorder | None = None
        self._logged: dict[str, float] | None = None  # of the step that is done but not yet recorded

    @property
    def recorder(self) -> Recorder | None:
        """The recorder of the training that runs."""
        return self._recorder

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        train_dataloader: object = None,
        **_: Any,
    ) -> None:
        self._close("failed")  # of a training that ended by an exception
        found = {
            "planned_steps": state.max_steps if state.max_steps > 0 else None,
            "batch_size": args.train_batch_size,
            "config": {**args.to_sanitized_dict(), **sampler_of(train_dataloader)},
            "start_step": state.global_step,
        }
        if args.run_name:
            found["run_name"] = args.run_name
        self._recorder = watch(model, **{**found, **self._settings})

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._record()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._logged = {}  # what is logged for this step comes later

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._logged is not None and logs is not None:
            self._logged |= {name: float(value) for name, value in logs.items() if isinstance(value, (int, float))}

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._record()
        self._close("finished")

    def _record(self) -> None:
        logged, self._logged = self._logged, None
        if self._recorder is not None and logged is not None:
            self._recorder.step(shadow_loss=self._shadow_loss, **logged)

    def _close(self, status: Literal["finished", "failed"]) -> None:
        recorder, self._recorder = self._recorder, None
        self._logged = None
        if recorder is not None:
            recorder.close(status)
