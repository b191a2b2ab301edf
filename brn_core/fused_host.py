"""The kernels of `brn_core.fused` for the CPU: a page of C that the machine's own compiler makes, once a machine.

As operators the work on C numbers is some 14 calls, and in a training step, where the code of one is no longer in the
cache by the next layer, each takes as long as thousands of numbers. A wheel for every machine cannot bring machine
code, so it is compiled when a layer first trains (a tenth of a second) and kept in the user's cache, as torch.compile
and Triton do. Without a compiler, a home or the right to run what was written there, the operators do the work.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from brn_core.atomic import replacing
from brn_core.moments import as_dtype

log = logging.getLogger(__name__)

_SOURCE: Final = Path(__file__).with_name("fused_host.c")
# Vector instructions, but every root, quotient, product and sum as the operators round it.
_FLAGS: Final = (
    *("-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
    *("-fPIC", "-shared", "-nostdlib"),
)
_COMPILE_SECONDS: Final = 30

_Argument: TypeAlias = type[ctypes.c_long] | type[ctypes.c_double] | type[ctypes.c_void_p]
_POINTER: Final = ctypes.c_void_p
_CORRECT: Final[list[_Argument]] = [
    ctypes.c_long,
    *[_POINTER] * 10,
    ctypes.c_double,
    ctypes.c_double,
    *[_POINTER] * 8,
]
_PLAIN: Final = (Tensor, torch.nn.Parameter)
_NOT_OBSERVED: Final = (None, None, None)
_WEIGHT_GRADIENT: Final[list[_Argument]] = [ctypes.c_long, *[_POINTER] * 4]


def fits(x: Tensor) -> bool:
    """Whether `x` is nothing but numbers, and nobody watches what is done with them by operators."""
    return type(x) is Tensor and not torch._C._len_torch_dispatch_stack() and library() is not None


def correct(
    mean: Tensor,
    var: Tensor,
    mu: Tensor,
    sigma: Tensor,
    limits: tuple[Tensor, Tensor, Tensor],
    count: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    alpha: float,
    eps: float,
    observed: bool,
) -> tuple[Sequence[Tensor], Sequence[Tensor] | None] | None:
    """The fields of what `fused.correct_` answers; None where a tensor is not what the kernel reads."""
    kernels, C = library(), mean.numel()
    gamma = None if weight is None else as_dtype(weight, torch.float32)
    beta = None if bias is None else as_dtype(bias, torch.float32)
    # Inline, as every layer pays for it: whatever could make a pointer that is none is left to the operators. What was
    # measured is float32 in a row, as the kernels of torch answer it.
    for v in (mu, sigma, gamma, beta):
        if v is not None and not (
            type(v) in _PLAIN
            and v.is_cpu
            and v.dtype is torch.float32
            and v.numel() == C
            and v.is_contiguous()
            and not v.is_inference()
        ):
            return None
    for v in limits:
        if not (type(v) is Tensor and v.is_cpu and v.dtype is torch.float32 and v.numel() == 1):
            return None
    if not (type(count) is Tensor and count.is_cpu and count.dtype is torch.int64 and count.numel() == 1):
        return None
    if kernels is None:
        return None
    made = [torch.empty_like(mean) for _ in range(8 if observed else 5)]  # rows of one tensor are dearer: views are
    kernels.correct(
        C,
        mean.data_ptr(),
        var.data_ptr(),
        mu.data_ptr(),
        sigma.data_ptr(),
        *[limit.data_ptr() for limit in limits],
        count.data_ptr(),
        None if gamma is None else gamma.data_ptr(),
        None if beta is None else beta.data_ptr(),
        alpha,
        eps,
        *[v.data_ptr() for v in made],
        *(() if observed else _NOT_OBSERVED),
    )
    torch.autograd.graph.increment_version((mu, sigma, count))
    return made[:5], made[5:] or None


def weight_gradient(dz: Tensor, db: Tensor, r: Tensor, d: Tensor) -> Tensor | None:
    """`fused.weight_gradient`, in place of `dz`."""
    kernels = library()
    if kernels is None or not (dz.dtype is torch.float32 is r.dtype and r.is_contiguous() and d.is_contiguous()):
        return None
    kernels.weight_gradient(dz.numel(), dz.data_ptr(), db.data_ptr(), r.data_ptr(), d.data_ptr())
    return dz


@functools.cache
def library() -> ctypes.PyDLL | None:
    """The compiled kernels, None where they cannot be had."""
    try:
        kernels = ctypes.PyDLL(str(_compiled()))  # keeps the interpreter's lock: giving it away takes longer than they
        kernels.correct.argtypes, kernels.correct.restype = _CORRECT, None
        kernels.weight_gradient.argtypes, kernels.weight_gradient.restype = _WEIGHT_GRADIENT, None
    except Exception as error:  # whatever is missing here, training goes on without it
        log.debug("Batch Renorm runs in single operators, as its kernels cannot be compiled here: %s", error)
        return None
    return kernels


def _compiled() -> Path:
    """The shared library in the user's cache, made if it is not there.

    Raises:
        OSError, RuntimeError, subprocess.SubprocessError: there is no compiler or no place for what it makes.
    """
    source = _SOURCE.read_bytes()
    command = [*shlex.split(os.environ.get("CC") or "cc"), *_FLAGS]
    made_of = (source, *command, sys.platform, platform.machine())
    name = hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "brn"
    path = cache / f"fused_host-{name}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / path.name
            subprocess.run([*command, "-o", made, _SOURCE], check=True, capture_output=True, timeout=_COMPILE_SECONDS)
            with replacing(path) as file:  # ranks that compile at once do not read each other's half
                file.write(made.read_bytes())
    return path
