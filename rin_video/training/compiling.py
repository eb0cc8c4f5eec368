"""torch.compile, and training without it if the compiler fails."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from rin_video.errors import first_line

log = logging.getLogger("rin_video")


class Compiler:
    """Compiles a model in place. If the compiler fails, the model runs as it is from then on."""

    def __init__(self, model: nn.Module, on: bool) -> None:
        self.on, self.failed = on, False
        self.worked = False  # at least once: later errors may have another cause
        if on:
            model.compile()

    def is_to_blame(self, error: Exception) -> bool:
        """Whether the same may succeed without compilation."""
        if not self.on or isinstance(error, torch.OutOfMemoryError):
            return False
        return not self.worked or is_compiler_error(error)

    def stop(self, error: Exception) -> None:
        log.warning("torch.compile failed, training goes on without it: %s", first_line(error))
        self.on, self.failed = False, True

    def stance(self) -> AbstractContextManager[object]:
        """The context of a forward pass."""
        return torch.compiler.set_stance("force_eager") if self.failed else nullcontext()


def is_compiler_error(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is of torch.compile and what it calls. They have no public base class."""
    while error is not None:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "triton")):
            return True
        error = error.__cause__ or error.__context__
    return False
