"""Triton kernels of `brn_core.fused`, which alone imports this module: it needs Triton."""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _clipped(value, low, high):
    # NaN is below no limit and above none.
    return tl.where(value < low, low, tl.where(value > high, high, value))


@triton.jit
def _finite(value):
    return tl.where(tl.abs(value) < float("inf"), value, 0.0)


@triton.jit
def correct(
    mean_ptr, var_ptr, mu_ptr, sigma_ptr, r_min_ptr, r_max_ptr, d_max_ptr, count_ptr, weight_ptr, bias_ptr,
    inverse_ptr, r_ptr, d_ptr, scale_ptr, shift_ptr, sigma_B_ptr, old_mu_ptr, old_sigma_ptr,
    alpha, eps, C,
    BLOCK: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, OBSERVED: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < C
    mean = tl.load(mean_ptr + at, mask=there, other=0.0)
    var = tl.load(var_ptr + at, mask=there, other=1.0)
    mu = tl.load(mu_ptr + at, mask=there, other=0.0)
    sigma = tl.load(sigma_ptr + at, mask=there, other=1.0)
    sigma_B = tl.sqrt_rn(var + eps)
    off = mean - mu
    d_max = tl.load(d_max_ptr)
    r = _clipped(tl.div_rn(sigma_B, sigma), tl.load(r_min_ptr), tl.load(r_max_ptr))
    d = _clipped(tl.div_rn(off, sigma), -d_max, d_max)
    if OBSERVED:
        tl.store(sigma_B_ptr + at, sigma_B, mask=there)
        tl.store(old_mu_ptr + at, mu, mask=there)
        tl.store(old_sigma_ptr + at, sigma, mask=there)
    tl.store(mu_ptr + at, mu + alpha * _finite(off), mask=there)
    tl.store(sigma_ptr + at, sigma + alpha * _finite(sigma_B - sigma), mask=there)
    scale, shift = r, d
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + at, mask=there, other=0.0).to(tl.float32)
        scale, shift = weight * r, weight * d
    if HAS_BIAS:
        shift += tl.load(bias_ptr + at, mask=there, other=0.0).to(tl.float32)
    tl.store(inverse_ptr + at, tl.div_rn(1.0, sigma_B), mask=there)
    tl.store(r_ptr + at, r, mask=there)
    tl.store(d_ptr + at, d, mask=there)
    tl.store(scale_ptr + at, scale, mask=there)
    tl.store(shift_ptr + at, shift, mask=there)
    if tl.program_id(0) == 0:
        tl.store(count_ptr, tl.load(count_ptr) + 1)


@triton.jit
def weight_gradient(dz_ptr, db_ptr, r_ptr, d_ptr, made_ptr, C, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = at < C
    dz, db = tl.load(dz_ptr + at, mask=there, other=0.0), tl.load(db_ptr + at, mask=there, other=0.0)
    r, d = tl.load(r_ptr + at, mask=there, other=0.0), tl.load(d_ptr + at, mask=there, other=0.0)
    tl.store(made_ptr + at, r * dz + d * db, mask=there)
