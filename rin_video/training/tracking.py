"""Experiment trackers of accelerate (TensorBoard, Weights & Biases, ...): metrics, images and clips."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from rin_video.config_files import to_dict
from rin_video.errors import UsageError
from rin_video.media import DEFAULT_FPS
from rin_video.training.callbacks import Callback, Run
from rin_video.training.previews import harmless


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UsageError` if accelerate does not know a tracker, or if its package is not installed."""
    from accelerate.utils import LoggerType

    known = [str(kind) for kind in LoggerType if kind != "all"]
    for name in names:
        if name not in known:
            raise UsageError(f"train.trackers={name} is unknown: choose {', '.join(known)}")
        module = {"tensorboard": "tensorboard", "comet_ml": "comet_ml"}.get(name, name)
        if find_spec(module) is None:
            extra = f"rin-video[{name}]" if name in ("tensorboard", "wandb") else name
            raise UsageError(f"train.trackers={name} needs a package that is not installed: pip install '{extra}'")


class Tracking(Callback):
    """Logs metrics and samples to the trackers in `train.trackers`."""

    def on_start(self, trainer: Run) -> None:
        """Start the trackers with the configuration of the run."""
        config = {f"{section}.{key}": value if isinstance(value, int | float | str | bool) else str(value)
                  for section, values in to_dict(trainer.config).items() for key, value in values.items()}  # fmt: skip
        where = {"wandb": {"dir": str(trainer.folder), "name": trainer.folder.resolve().name}}
        trainer.accelerator.init_trackers("rin-video", config=config, init_kwargs=where)

    def on_log(self, trainer: Run, line: dict[str, Any]) -> None:
        """Log a line of metrics."""
        numbers = {name: value for name, value in line.items() if isinstance(value, float)}
        by_t = {f"loss_by_t/{i}": value for i, value in enumerate(line["loss_by_t"]) if value is not None}
        trainer.accelerator.log(numbers | by_t, step=line["step"])

    def on_validation(self, trainer: Run, line: dict[str, Any]) -> None:
        """Log a line about the validation loss."""
        numbers = {name: value for name, value in line.items() if isinstance(value, float)}
        by_t = {f"validation_loss_by_t/{i}": value for i, value in enumerate(line["validation_loss_by_t"])}
        trainer.accelerator.log(numbers | by_t, step=line["step"])

    def on_sample(self, trainer: Run, samples: Tensor, paths: list[Path]) -> None:
        """Log samples as images and clips, where the tracker supports them."""
        clip = next((path for path in paths if path.suffix == ".mp4"), None)
        sheet = next((path for path in paths if path.suffix == ".png"), None)
        for tracker in trainer.accelerator.trackers:
            with harmless(f"images for {tracker.name}"):
                self._log_pictures(tracker, trainer, samples, clip, sheet)

    def _log_pictures(self, tracker: Any, trainer: Run, samples: Tensor, clip: Path | None, sheet: Path | None) -> None:
        if sheet is not None and hasattr(tracker, "log_images"):
            with Image.open(sheet) as image:
                pixels = np.asarray(image.convert("RGB"))[None]
            form = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels}, step=trainer.step, **form)
        if clip is not None and tracker.name == "wandb":
            import wandb

            tracker.log({"clips": wandb.Video(str(clip), format="mp4")}, step=trainer.step)
        if clip is not None and tracker.name == "tensorboard":
            fps = trainer.config.sample.fps or DEFAULT_FPS
            _add_animation(tracker.tracker, "clips", samples, fps, trainer.step)

    def on_end(self, trainer: Run) -> None:
        """Finish the trackers."""
        trainer.accelerator.end_training()


def _add_animation(writer: Any, tag: str, clips: Tensor, fps: float, step: int) -> None:
    """Log clips (B, C, F, H, W) side by side as a GIF, which TensorBoard plays among its images."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    frames = (clips.permute(2, 3, 0, 4, 1).flatten(2, 3) * 255).round().byte().cpu().numpy()  # F, H, B * W, C
    pictures = [Image.fromarray(frame.repeat(3, -1) if frame.shape[-1] == 1 else frame[..., :3]) for frame in frames]
    file = io.BytesIO()
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
    height, width = frames.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.getvalue())
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
