"""Mixed precision: which operations run in 16 bits, and the loss scale that fp16 needs."""

from __future__ import annotations

from typing import Final

import torch

from brn_core.worker.settings import AmpKind, UsageError

_DTYPES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """The precision of a training; weights, moving statistics and the loss stay float32.

    Args:
        amp: none: float32. bf16: autocast to bfloat16. fp16: autocast to float16, with a loss scale.
        device: where the training runs.

    Raises:
        UsageError: the device cannot do it.
    """

    def __init__(self, amp: AmpKind, device: torch.device) -> None:
        if amp == "fp16" and device.type != "cuda":
            raise UsageError(f"--amp fp16 needs a CUDA device, this is {device.type}: --amp bf16 runs here")
        if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UsageError(f"--amp bf16: {torch.cuda.get_device_name(device)} has no bfloat16; --amp fp16 runs there")
        self._device_type, self._dtype = device.type, _DTYPES.get(amp)
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")

    def autocast(self) -> torch.autocast:
        """The context of a forward and its loss."""
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._dtype is not None)
