"""The contents of a checkpoint, the options that a resumed run must keep, and the removal of old checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from rin_video.config import Config
from rin_video.config_files import nest_parameters, to_dict
from rin_video.errors import UsageError
from rin_video.training.distributed import load_full_state_dict, load_optimizer_state, optimizer_state
from rin_video.training.state import remove_state

# Options that must not change when a run is resumed (empty: all of the section). Other options may change.
KEPT: dict[str, tuple[str, ...]] = {"model": (), "diffusion": (), "train": ("optimizer", "ema_sigma_rel", "seed")}


class TrainingState(NamedTuple):
    """Everything that training steps change, except the number of steps."""

    model: nn.Module
    ema: nn.Module
    power_emas: Sequence[nn.Module]
    optimizer: Any
    scaler: Any  # the gradient scaler of fp16, or None
    balance: nn.Module | None  # the running means of `diffusion.loss_weight=balanced`

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all parts; sharded tensors stay sharded."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "tracks": [average.state_dict() for average in self.power_emas],
            "optimizer": optimizer_state(self.optimizer, self.model),
            "scaler": self.scaler.state_dict() if self.scaler is not None else None,
            "balance": self.balance.state_dict() if self.balance is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a gathered (full) state; tensors are sharded as the parts are."""
        load_full_state_dict(self.model, state["model"])
        load_full_state_dict(self.ema, state["ema"])
        for average, values in zip(self.power_emas, state["tracks"], strict=True):
            load_full_state_dict(average, values)
        load_optimizer_state(self.optimizer, self.model, state["optimizer"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
        if self.balance is not None:
            self.balance.load_state_dict(state["balance"])


def check_same_options(run: Path, then: dict[str, Any], config: Config) -> None:
    """Raise `UsageError` if an option in `KEPT`, or the source of the initial weights, differs from the checkpoint."""
    for section, keys in KEPT.items():
        before, now = nest_parameters(section, then[section]), to_dict(getattr(config, section))
        for key in keys or now:
            if key in before and before[key] != now[key]:
                raise UsageError(
                    f"{run} was trained with {section}.{key}={in_yaml(before[key])}, now it is {in_yaml(now[key])}: "
                    "use the same value, or another folder (--out)"
                )
    now_from, then_from = config.train.init_from, then["train"].get("init_from")
    if now_from not in (None, then_from):
        raise UsageError(
            f"{run} was started {f'with train.init_from={then_from}' if then_from else 'without train.init_from'}, now "
            f"it is {now_from}: leave it out, or use another folder (--out)"
        )


def in_yaml(value: Any) -> str:
    """Write a value as an override does: `{name: ddim, eta: 0.5}`."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {item}' for key, item in value.items())}}}"
    return "null" if value is None else str(value)


def remove_old_states(states: Sequence[Path], step: int, *, keep: int, keep_every: int) -> None:
    """Delete old states: keep the newest `keep` and those at multiples of `keep_every` (0: none).

    States after `step` are deleted too; they are left when a run returns to an earlier milestone.
    """
    steps = {state: int(state.name.removeprefix("step-")) for state in states}
    ahead = [state for state in states if steps[state] > step]
    old = [state for state in states if state not in ahead][:-keep]
    for state in ahead + [state for state in old if not keep_every or steps[state] % keep_every]:
        remove_state(state)
