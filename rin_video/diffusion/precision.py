"""Numerical precision of networks: float32, float32 with TF32 matrix products, or mixed precision."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache

import torch
import torch.nn.functional as F

from rin_video.config import PrecisionName, PrecisionOption

HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def tf32_products(precision: PrecisionOption) -> Iterator[None]:
    """If `precision` is tf32, let float32 matrix products on a CUDA GPU use TF32 (10 mantissa bits) in the block."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32" and torch.cuda.is_available():  # on a CPU "high" may mean bfloat16
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def running_in(precision: PrecisionOption, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which networks on `device` run in `precision`; "no" and "auto" keep torch's settings."""
    if precision in HALF:
        return torch.autocast(device.type, HALF[precision])
    return tf32_products(precision)


GAIN = 1.5  # bf16 must be faster than float32 by this factor, because not everything in a network is a matrix product
SECONDS = 0.15  # duration of the measurement, for each of the two precisions


@cache
def fastest_precision(device: torch.device) -> PrecisionName:
    """Return bf16 if matrix products on `device` are at least 1.5 times as fast with it, and "no" otherwise.

    The products are those of a training step: a linear layer, forward and backward. The result is measured once per
    process, within half a second. Many CPUs have bf16 instructions (AVX-512 BF16, AMX), and on the others bf16 is slow.
    """
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "no"
    try:
        rates = [_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16)]
    except (RuntimeError, TypeError):  # not implemented on this device
        return "no"
    return "bf16" if rates[1] >= GAIN * rates[0] else "no"


def _rate(dtype: torch.dtype, device: torch.device) -> float:
    """Return how many times per second a linear layer can be evaluated and differentiated: the best of several."""
    x = torch.ones(1024, 512, dtype=dtype, device=device, requires_grad=True)
    weight = torch.ones(1024, 512, dtype=dtype, device=device, requires_grad=True)
    best, end = float("inf"), time.perf_counter() + SECONDS
    runs = 0
    while runs < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        y = F.linear(x, weight)
        gradients = torch.autograd.grad(y, (x, weight), y.detach())
        gradients[0][0, 0].item()  # waits for the device
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return 1 / best
