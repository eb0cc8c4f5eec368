"""Muon with one orthogonalisation for all matrices of the same size, instead of one for each matrix."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from timm.optim import muon as timm_muon
from torch import Tensor


class Muon(timm_muon.Muon):
    """timm's Muon, with equal results in less time where matrices are small.

    The orthogonalisation of a matrix takes 15 products. Those of small matrices take less time than it takes to start
    them, so that products of many matrices at once are faster. Source: Jordan et al. 2024, "Muon".
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters; return what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = []
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None and self._is_matrix(p)]
            if matrices:
                self._step_matrices(matrices, group)
            held += [(p, p.grad) for p in matrices]
        for p, _ in held:
            p.grad = None
        super().step()  # the other parameters, and in the first step all
        for p, grad in held:
            p.grad = grad
        return loss

    def _is_matrix(self, p: Tensor) -> bool:
        """Return whether a parameter had a step of Muon before, and is not sharded."""
        return "momentum_buffer" in self.state[p] and type(p.grad) is Tensor

    def _step_matrices(self, params: list[Tensor], group: dict[str, Any]) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        momenta = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        updates = torch._foreach_lerp(grads, momenta, group["momentum"]) if group["nesterov"] else momenta
        batches: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, update in enumerate(updates):
            rows, columns = update.flatten(1).shape
            batches[min(rows, columns), max(rows, columns), update.device, update.dtype].append(index)
        for batch in batches.values():
            flat = [updates[index].flatten(1) for index in batch]
            wide = torch.stack([matrix.mT if len(matrix) > matrix.shape[1] else matrix for matrix in flat])
            orthogonal = timm_muon.zeropower_via_newtonschulz(
                wide,
                group["ns_steps"],
                timm_muon.resolve_ns_coefficients(group["ns_coefficients"], timm_muon._COEFFICIENTS),
                eps=group["eps"],
                safety_factor=group["safety_factor"],
            )
            for index, matrix, result in zip(batch, flat, orthogonal, strict=True):
                scale = timm_muon.get_lr_scale(matrix.shape, group["adjust_lr_fn"])
                result = result.mT if len(matrix) > matrix.shape[1] else result
                params[index].add_(result.reshape(params[index].shape), alpha=-group["lr"] * scale)
