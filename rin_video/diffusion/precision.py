"""Numerical precision of networks: float32, float32 with TF32 matrix products, or mixed precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from rin_video.config import PrecisionName

HALF: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def tf32_products(precision: PrecisionName) -> Iterator[None]:
    """If `precision` is tf32, let float32 matrix products on a CUDA GPU use TF32 (10 mantissa bits) in the block."""
    before = torch.get_float32_matmul_precision()
    if precision == "tf32" and torch.cuda.is_available():  # on a CPU "high" may mean bfloat16
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def running_in(precision: PrecisionName, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which networks on `device` run in `precision`; "no" keeps torch's settings."""
    if precision in HALF:
        return torch.autocast(device.type, HALF[precision])
    return tf32_products(precision)
