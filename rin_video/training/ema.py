"""Exponential moving averages (EMA) of the weights: one with a decay, and post-hoc EMAs of any length.

`WarmedEMA` follows `ema_decay` and `ema_warmup`; samples are drawn with its weights. In addition, training updates
power-function EMAs (Karras et al. 2024, arXiv 2312.02696) of a few lengths and regularly saves snapshots of them. A
post-hoc EMA of any other length is a weighted sum of these snapshots.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from ema_pytorch import EMA
from ema_pytorch.post_hoc_ema import KarrasEMA, p_dot_p, sigma_rel_to_gamma, solve_weights
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rin_video.config import ModelConfig, TrainConfig, check_sigma_rel
from rin_video.config_files import load_config
from rin_video.errors import UsageError
from rin_video.files import CONFIG, atomic_write
from rin_video.tensor_files import contributing, full_tensor, write_tensors
from rin_video.training.distributed import is_sharded
from rin_video.training.state import newest_state
from rin_video.weights import read_metadata, read_tensors, save_weights

log = logging.getLogger("rin_video")

SNAPSHOTS = "averages"


class PowerEMA(KarrasEMA):
    """A power-function EMA that updates all tensors in one call."""

    @torch.no_grad()
    def update_moving_average(self, ma_model: nn.Module, current_model: nn.Module) -> None:
        """Move the parameters and buffers of `ma_model` towards those of `current_model`."""
        ema_values, values = (
            [tensor for _, tensor in (*self.get_params_iter(model), *self.get_buffers_iter(model))]
            for model in (ma_model, current_model)
        )
        get_ema_multi_avg_fn(self.beta)(ema_values, values, None)


class WarmedEMA(EMA):
    """An EMA whose decay is per step: an update after `update_every` steps applies the decay that many times.

    ema-pytorch and timm's ModelEmaV3 apply one decay per update, regardless of the steps between updates. With a
    warm-up, no choice of their constants is equivalent, because (1 - 1 / (1 + n / g)) ** k does not have the form
    1 - (1 + n / g) ** -p.
    """

    def get_current_decay(self) -> float:
        """Return the decay of an update; the decay per step is min(beta, 1 - 1 / (1 + n / inv_gamma)) after n steps."""
        return super().get_current_decay() ** self.update_every


def make_ema(model: nn.Module, options: TrainConfig, device: torch.device) -> WarmedEMA:
    """Create the EMA whose weights draw the samples; its counters stay on the CPU, so that reading them is cheap.

    A decay d averages over about 1 / (1 - d) steps. During the warm-up, this span is limited to the fraction
    `ema_warmup` of the steps so far, so that the EMA forgets early weights. Without a warm-up, d is constant, as in
    the authors' code.
    """
    if options.ema_warmup is None:
        warmup = {"min_value": options.ema_decay}
    else:
        warmup = {"power": 1.0, "inv_gamma": 1 / options.ema_warmup}
    ema = WarmedEMA(
        model,
        beta=options.ema_decay,
        **warmup,
        update_after_step=0,
        update_every=options.ema_update_every,
        include_online_model=False,
        use_foreach=True,
    )
    ema.ema_model.to(device)
    return ema


def make_power_emas(model: nn.Module, options: TrainConfig, device: torch.device) -> list[KarrasEMA]:
    """Create a power-function EMA for each length in `ema_sigma_rel`."""
    power_emas = [PowerEMA(model, sigma_rel=sigma_rel, update_every=1) for sigma_rel in options.ema_sigma_rel]
    for ema in power_emas:
        ema.ema_model.to(device)
    return power_emas


def full_model(ema_model: nn.Module, config: ModelConfig, device: torch.device) -> nn.Module:
    """Return the EMA model, or a copy with full weights if they are sharded. Must be called by all processes."""
    if not is_sharded(ema_model):
        return ema_model
    model = type(ema_model)(config).to(device)
    own = model.state_dict()
    for name, value in ema_model.state_dict().items():  # gathers one at a time, which needs less memory
        own[name].copy_(full_tensor(value))
    return model


def save_snapshot(
    run: Path, step: int, sigma_rels: Sequence[float], power_emas: Sequence[KarrasEMA], *, write: bool = True
) -> None:
    """Save all power-function EMAs in half precision; must be called by all processes, of which one has `write`."""
    tensors = {
        f"{index}.{name}": value
        for index, ema in enumerate(power_emas)
        for name, value in ema.ema_model.state_dict().items()
        if value.is_floating_point()
    }
    if not write:
        write_tensors(None, tensors)
        return
    path = run / SNAPSHOTS / f"step-{step:08d}.safetensors"
    with contributing(tensors):
        path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"step": str(step), "sigma_rel": json.dumps(list(sigma_rels))}
    with atomic_write(path) as temporary:
        write_tensors(temporary, tensors, metadata, dtype=torch.float16)


def post_hoc_emas(run: Path, sigma_rels: Sequence[float]) -> list[tuple[dict[str, Tensor], float]]:
    """Compute post-hoc EMAs at the newest checkpoint; return the weights and the profile error of each length.

    `profile_error` describes the error. Raises `UsageError` if a length is not in [0.01, 0.28], if the run has no
    checkpoint or was trained without power-function EMAs, or if a snapshot is damaged.

    Source: algorithm 3 of Karras et al. 2024, arXiv 2312.02696.
    """
    for sigma_rel in sigma_rels:
        check_sigma_rel("--sigma-rel", sigma_rel)
    newest = newest_state(run)
    if newest is None:
        raise UsageError(f"{run} has no checkpoint: a post-hoc EMA requires one")
    step, state = newest[1]["step"], newest[1]
    lengths = state["config"]["train"].get("ema_sigma_rel") or []
    if not lengths:
        raise UsageError(f"{run} was trained with train.ema_sigma_rel=[]: there are no EMAs to combine")
    # The newest checkpoint contains the EMAs at its step in full precision.
    sources: list[tuple[float, int, Any]] = [(s, step, ema) for s, ema in zip(lengths, state["tracks"], strict=True)]
    for path in sorted((run / SNAPSHOTS).glob("step-*.safetensors")):
        try:
            metadata = read_metadata(path)
            at, saved = int(metadata["step"]), json.loads(metadata["sigma_rel"])
        except (KeyError, ValueError) as error:
            raise UsageError(f"{path} is not a valid EMA snapshot ({error}): delete it") from None
        if at < step:
            sources += [(sigma_rel, at, (path, index)) for index, sigma_rel in enumerate(saved)]
    gammas = torch.tensor([sigma_rel_to_gamma(s) for s, _, _ in sources], dtype=torch.float64)
    times = torch.tensor([at for _, at, _ in sources], dtype=torch.float64)
    weights, errors = [], []
    for sigma_rel in sigma_rels:
        wanted = torch.tensor([sigma_rel_to_gamma(sigma_rel)], dtype=torch.float64), torch.tensor([float(step)])
        weights.append(solve_weights(times, gammas, wanted[1], wanted[0]).flatten())
        errors.append(profile_error(weights[-1], times, gammas, wanted[1], wanted[0]))
    sums: list[dict[str, Tensor]] = [{} for _ in sigma_rels]
    for index, (_, _, source) in enumerate(sources):
        for name, value in _numbers_of(source).items():
            for total, weight in zip(sums, weights, strict=True):
                total[name] = total.get(name, 0) + weight[index] * value.double()
    fixed = state["model"]  # has the values without an EMA, and the dtypes
    return [
        ({name: total[name].to(value.dtype) if name in total else value for name, value in fixed.items()}, error)
        for total, error in zip(sums, errors, strict=True)
    ]


def profile_error(weights: Tensor, times: Tensor, gammas: Tensor, time: Tensor, gamma: Tensor) -> float:
    """Return the relative squared error of a post-hoc EMA: |sum of weighted profiles - target|^2 / |target|^2.

    `times` (N,) and `gammas` (N,) describe the snapshots, `time` (1,) and `gamma` (1,) the target. The result is 0 if
    the snapshots reproduce the target exactly.
    """
    rows, columns = (times[:, None], gammas[:, None]), (times[None], gammas[None])
    among, with_wanted = p_dot_p(*rows, *columns), p_dot_p(times, gammas, time, gamma)
    wanted = p_dot_p(time, gamma, time, gamma)
    return max(((weights @ among @ weights - 2 * weights @ with_wanted + wanted) / wanted).item(), 0.0)


def write_post_hoc_emas(run: Path, sigma_rels: Sequence[float], out: Path | None = None) -> list[tuple[Path, float]]:
    """Write a model folder for each length to `out` (default: `run`); return the folders and their profile errors.

    Raises `UsageError` as `post_hoc_emas` does.
    """
    config = load_config(run / CONFIG)
    written = []
    for sigma_rel, (weights, error) in zip(sigma_rels, post_hoc_emas(run, sigma_rels), strict=True):
        folder = (out or run) / f"ema-{sigma_rel:g}"
        save_weights(folder, weights, config)
        written.append((folder, error))
    return written


def _numbers_of(source: Any) -> dict[str, Tensor]:
    if isinstance(source, dict):  # the state of an EMA in a checkpoint
        prefix = "ema_model."
        values = {name.removeprefix(prefix): value for name, value in source.items() if name.startswith(prefix)}
    else:
        path, index = source
        prefix = f"{index}."
        values = {name.removeprefix(prefix): v for name, v in read_tensors(path).items() if name.startswith(prefix)}
    return {name: value for name, value in values.items() if value.is_floating_point()}
