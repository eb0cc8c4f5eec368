"""torch.compile with a fallback to eager execution if the compiler fails."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from rin_video.errors import first_line

log = logging.getLogger("rin_video")


class Compiler:
    """Compiles a model in place; after a failure of the compiler, the model runs in eager mode."""

    def __init__(self, model: nn.Module, on: bool) -> None:
        self.on, self.failed = on, False
        self.worked = False  # once true, errors may have a cause other than compilation
        if on:
            model.compile()

    def is_to_blame(self, error: Exception) -> bool:
        """Return whether the same call may succeed without compilation."""
        if not self.on or isinstance(error, torch.OutOfMemoryError):
            return False
        return not self.worked or is_compiler_error(error)

    def stop(self, error: Exception) -> None:
        """Switch to eager mode and log a warning."""
        log.warning("torch.compile failed, training continues without it: %s", first_line(error))
        self.on, self.failed = False, True

    def stance(self) -> AbstractContextManager[object]:
        """Return the context manager for a forward pass."""
        return torch.compiler.set_stance("force_eager") if self.failed else nullcontext()


def is_compiler_error(error: BaseException | None) -> bool:
    """Return whether torch.compile or a library it calls raised an error or its cause; they share no public class."""
    while error is not None:
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor", "torch._functorch", "triton")):
            return True
        error = error.__cause__ or error.__context__
    return False
