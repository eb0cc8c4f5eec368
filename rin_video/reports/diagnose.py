"""Diagnosis of a run: loss by noise level against trivial predictors, intermediate estimates of x0, and latents."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from rin_video.config import Config
from rin_video.datasets.adapters import adapt_for
from rin_video.datasets.batch import collate
from rin_video.datasets.mixed import MixedDataset
from rin_video.diffusion.fixed_levels import add_noise, fix_batch, fixed_times, two_passes
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.files import write_text
from rin_video.media import can_be_picture, contact_sheet
from rin_video.progress import progress_bar
from rin_video.training.metrics import read_validation
from rin_video.training.plots import draw_figure
from rin_video.training.previews import harmless
from rin_video.training.state import load_state, saved_states
from rin_video.training.validation import find_overfitting
from rin_video.wording import counted

log = logging.getLogger("rin_video")

LEVELS = 10
BATCH = 16
SHEET_COLUMNS = 8
COLUMNS = {
    "t": "noise level: 0 is clean data, 1 is noise",
    "log SNR": "logarithm of the signal-to-noise ratio at t",
    "zero, copy": "losses of two trivial predictors, 0 and a copy of the input; those of a model must be lower",
    "1st pass": "loss of the model without self-conditioning",
    "loss": "loss of the model with self-conditioning on a first pass, as in sampling",
    "self-cond.": "share of the improvement over the trivial predictors that comes from self-conditioning",
}
BY_FAR = 0.5  # fraction of the loss of the predictor 0 below which a noise level counts as trained


@dataclass
class Diagnosis:
    """The measurements of a diagnosis; losses are unweighted means over the data, one for each time in `t`."""

    t: list[float]
    log_snr: list[float]
    loss: list[float]  # of the EMA weights, with the self-conditioning state of a first pass
    loss_first_pass: list[float]  # the same without self-conditioning
    loss_raw: list[float] | None  # of the weights without EMA
    loss_zero: list[float]  # of the predictor 0
    loss_copy: list[float]  # of a predictor that copies its input
    clipped: list[float] = field(
        default_factory=list
    )  # fraction of the values of x0 at the bounds, at each sampling step
    clipped_data: float = 0.0  # the same fraction in the data
    latent_std: list[float] = field(default_factory=list)  # variation of each latent between inputs; 0: none
    overfitting: str | None = None  # what the validation losses of the run show; None: nothing, or there are none

    @property
    def trivial(self) -> list[float]:
        """The lower loss of the two trivial predictors."""
        return [min(pair) for pair in zip(self.loss_zero, self.loss_copy, strict=True)]

    @property
    def self_conditioning_share(self) -> list[float]:
        """The fraction of the improvement over the trivial predictors that comes from self-conditioning."""
        rows = zip(self.trivial, self.loss_first_pass, self.loss, strict=True)
        return [(first - loss) / (trivial - loss) if trivial > loss else 0.0 for trivial, first, loss in rows]

    def table(self) -> str:
        """Format the losses with a line for each noise level, and the meaning of the columns."""
        head = f"{'t':>5}{'log SNR':>9}{'zero':>9}{'copy':>9}{'1st pass':>10}{'loss':>9}{'self-cond.':>13}"
        lines = [head + (f"{'without EMA':>14}" if self.loss_raw else "")]
        for i, t in enumerate(self.t):
            line = f"{t:5.2f}{self.log_snr[i]:9.1f}{self.loss_zero[i]:9.4f}{self.loss_copy[i]:9.4f}"
            line += f"{self.loss_first_pass[i]:10.4f}{self.loss[i]:9.4f}{self.self_conditioning_share[i]:13.0%}"
            lines.append(line + (f"{self.loss_raw[i]:14.4f}" if self.loss_raw else ""))
        meanings = COLUMNS | ({"without EMA": "loss of the weights without EMA"} if self.loss_raw else {})
        return "\n".join([*lines, *(f"  {name:<13}{meaning}" for name, meaning in meanings.items())])

    def findings(self) -> list[str]:
        """Describe each problem and its remedy; the list is empty if there are no problems."""
        found = []
        # A copy of the input may be nearly exact (eps at t = 1, x0 at t = 0), so a loss far below "zero" is sufficient.
        rows = zip(self.t, self.loss, self.trivial, self.loss_zero, strict=True)
        untrained = [t for t, loss, trivial, zero in rows if not loss <= max(1.05 * trivial, BY_FAR * zero)]
        if untrained:
            found.append(
                f"untrained noise levels: at t = {_numbers(untrained)} the loss is no lower than that of a trivial "
                "predictor. Train longer. If this does not help, check loss_weight, time_sampling, the learning rate, "
                "and the data for NaN"
            )
        if self.loss_raw and sum(self.loss_raw) < 0.95 * sum(self.loss):
            found.append(
                f"the EMA weights lag behind: their loss is {sum(self.loss) / sum(self.loss_raw):.2f} times that of "
                "the weights without EMA. Train longer, or lower train.ema_decay"
            )
        worse = [t for t, share in zip(self.t, self.self_conditioning_share, strict=True) if share < -0.05]
        if worse:
            found.append(
                f"self-conditioning hurts at t = {_numbers(worse)}: the loss of the second pass is higher than "
                "that of the first. Train longer, or check train_prob_self_cond (with 0, training does not use "
                "self-conditioning)"
            )
        active = sum(share > self.clipped_data + 0.05 for share in self.clipped)
        if active > len(self.clipped) / 2:
            found.append(
                f"clipping is active in {active} of {counted(len(self.clipped), 'step')}: the estimates have more "
                f"values at the bounds than the data ({self.clipped_data:.0%}). Train longer, lower guidance, or try "
                "clip_x0=dynamic"
            )
        dead = sum(spread < 0.01 for spread in self.latent_std)
        if dead:
            found.append(
                f"dead latents: {dead} of {len(self.latent_std)} have the same values for every input. Train longer. "
                "If they stay dead, use fewer latents (num_latents)"
            )
        return found + ([self.overfitting] if self.overfitting else [])


@torch.no_grad()
def diagnose(
    diffusion: GaussianDiffusion, data: Dataset[Any], *, raw_model: nn.Module | None = None, num: int = 64
) -> Diagnosis:
    """Measure the model on `num` samples of `data`, a dataset as `Trainer` accepts it.

    `raw_model` has the weights without EMA. The noise is the same every time.
    """
    data = adapt_for(diffusion, data)
    length = len(data)  # type: ignore[arg-type]
    chosen = torch.linspace(0, length - 1, min(num, length)).long().tolist()
    numbers = _parts(list(range(len(chosen))), BATCH)
    batches = [fix_batch(collate([data[chosen[n]] for n in part]), part, diffusion) for part in numbers]
    times = fixed_times(LEVELS)
    raw = diffusion.with_model(raw_model) if raw_model is not None else None
    rows: dict[str, list[float]] = {name: [] for name in ("loss", "first", "raw", "zero", "copy", "log_snr")}
    latents: list[Tensor] = []
    with progress_bar(len(times), "noise levels", "level") as bar:
        for index, t in enumerate(times):
            sums = torch.zeros(5, dtype=torch.float64)
            for batch in batches:
                noisy = add_noise(diffusion, batch, index, t)
                first, second, hidden = two_passes(diffusion, noisy)
                guesses = [second, first, torch.zeros_like(noisy.wanted), noisy.x_t]
                guesses.append(two_passes(raw, noisy)[1] if raw else second)
                sums += torch.stack([noisy.error(guess).sum().cpu() for guess in guesses])
                hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # latents, or (latents, interface)
                if index == LEVELS // 2 and isinstance(hidden, Tensor) and hidden.ndim == 3:
                    latents.append(hidden.float().cpu())
            means = (sums / len(chosen)).tolist()
            for name, value in zip(("loss", "first", "zero", "copy", "raw"), means, strict=True):
                rows[name].append(value)
            rows["log_snr"].append((noisy.level.alpha / noisy.level.sigma).square().log().flatten()[0].item())
            bar.update()
    pixels = (batch.x.flatten() for batch in batches)
    everything = torch.cat([x.float() if x.dtype != torch.uint8 else x / 255 for x in pixels])
    return Diagnosis(
        t=times,
        log_snr=rows["log_snr"],
        loss=rows["loss"],
        loss_first_pass=rows["first"],
        loss_raw=rows["raw"] if raw else None,
        loss_zero=rows["zero"],
        loss_copy=rows["copy"],
        clipped_data=_at_bounds(everything),
        latent_std=latent_std(torch.cat(latents)) if latents and len(chosen) > 1 else [],
    )


def latent_std(latents: Tensor) -> list[float]:
    """Return the standard deviation of each latent of (B, M, D) between inputs, relative to its RMS."""
    spread = (latents - latents.mean(0)).square().mean((0, 2)).sqrt()
    return (spread / latents.square().mean((0, 2)).sqrt().clamp(min=1e-12)).tolist()


def trajectory(diffusion: GaussianDiffusion, config: Config, num: int = 4) -> tuple[Tensor, list[float]]:
    """Draw `num` samples; return estimates of x0 and, for each sampling step, the fraction of values at the bounds.

    The estimates are (num, C, columns, H, W) in [0, 1], evenly spaced over the steps. Of a clip, they contain only the
    middle frame.
    """
    options = dataclasses.replace(config.sample, num_samples=num)
    columns: list[Tensor] = []
    shares: list[float] = []

    def look(step: int, x0: Tensor) -> None:
        shares.append(_at_bounds(x0))
        columns.append((x0[:, :, x0.shape[2] // 2] if x0.ndim == 5 else x0).cpu())

    diffusion.sample(options, seed=config.train.seed, callback=look, progress=True)
    shown = torch.linspace(0, len(columns) - 1, min(SHEET_COLUMNS, len(columns))).round().long().tolist()
    return torch.stack([columns[i] for i in shown], dim=2), shares


def diagnose_run(
    folder: Path, diffusion: GaussianDiffusion, data: Dataset[Any], config: Config, out: Path, *, num: int = 64
) -> Diagnosis:
    """Diagnose the run in `folder` on `num` samples; write `loss.png`, `trajectory.png`, `diagnosis.json` to `out`."""
    raw_model = None
    if states := saved_states(folder):
        raw_model = type(diffusion.model)(config.model)
        raw_model.load_state_dict(load_state(states[-1])["model"])
        raw_model = raw_model.to(next(diffusion.parameters()).device).eval()
    data = data.clips if isinstance(data, MixedDataset) else data
    diagnosis = diagnose(diffusion, data, raw_model=raw_model, num=num)
    sheet, diagnosis.clipped = trajectory(diffusion, config)
    if found := find_overfitting(read_validation(folder / "metrics.jsonl")):
        diagnosis.overfitting = found.describe(kept=config.train.keep_best)
    out.mkdir(parents=True, exist_ok=True)
    report = dataclasses.asdict(diagnosis) | {"findings": diagnosis.findings()}
    write_text(out / "diagnosis.json", json.dumps(report, indent=1) + "\n")
    if can_be_picture(sheet.shape):
        upscale = max(1, 64 // sheet.shape[-1])
        with harmless(out / "trajectory.png"):
            contact_sheet(sheet, out / "trajectory.png", max_frames=SHEET_COLUMNS, upscale=upscale)
    with harmless(out / "loss.png"):
        plot_losses(diagnosis, out / "loss.png")
    return diagnosis


def _parts(values: list[int], size: int) -> Iterator[list[int]]:
    return (values[i : i + size] for i in range(0, len(values), size))


def _at_bounds(x: Tensor) -> float:
    return ((x <= 0) | (x >= 1)).float().mean().item()


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)


def plot_losses(diagnosis: Diagnosis, path: Path) -> None:
    """Plot the loss at each noise level, and the losses of the trivial predictors."""
    lines = {
        "always zero": (diagnosis.loss_zero, "--"),
        "copy of the input": (diagnosis.loss_copy, ":"),
        "first pass, without self-conditioning": (diagnosis.loss_first_pass, "-"),
        "second pass": (diagnosis.loss, "-o"),
        "second pass, without EMA": (diagnosis.loss_raw, "-"),
    }
    with draw_figure(path, 1) as (axes,):
        for name, (values, style) in lines.items():
            if values is not None:
                axes.plot(diagnosis.t, values, style, label=name)
        axes.set(xlabel="t (0: clean, 1: noise)", ylabel="unweighted loss", yscale="log", title="loss by noise level")
        axes.legend()
