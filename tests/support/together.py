"""Records what several processes decide and draw together: `torchrun tiny_run.py together FOLDER`."""

import json
from pathlib import Path
from types import SimpleNamespace

import means  # noqa: F401 (registers an extractor)
import torch
from accelerate.utils import gather_object

from rin_video import RIN, GaussianDiffusion, UsageError, evaluate
from rin_video.cli import train
from rin_video.cli.rollout import SamplingPlan, rollout_parts
from rin_video.config import Config, SampleConfig
from rin_video.training import memory
from rin_video.training.distributed import first_then_others, in_all, join_process_group
from rin_video.training.parallel_sampling import sample_distributed

CLIP = {"dim": 32, "num_latents": 6, "dim_latent": 32, "depth": 1, "num_heads": 2, "latent_num_heads": 2,
        "image_size": 8, "frames": 4, "patch_size": (2, 4, 4), "known_mask": True, "num_classes": 2}  # fmt: skip
COUNTS = (5, 1)  # samples: neither number can be divided evenly between two processes


def draw() -> dict[str, torch.Tensor]:
    """Draw samples of a model that depends on its seed alone: without context, with contexts, and longer clips."""
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(**CLIP)).eval()
    with torch.no_grad():
        for parameter in diffusion.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found = {}
    for count in COUNTS:
        config = SampleConfig(num_samples=count, steps=2, sampler="ddpm")
        context = torch.rand(count, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        known = torch.zeros(count, 4, 8, 8, dtype=torch.bool)
        known[:, :2] = True
        found[f"plain {count}"] = sample_distributed(diffusion, config, seed=3)
        found[f"known {count}"] = sample_distributed(diffusion, config, seed=3, context=context, known=known)
        options = SimpleNamespace(overlap=None, carry_latents=False, key_frames=False)
        plan = SamplingPlan((3, 4, 8, 8), 7)
        parts = rollout_parts(diffusion, config, options, plan, {"seed": 3, "context": context[:, :, :2]})
        found[f"longer {count}"] = torch.cat(list(parts), dim=2)
    return found


def scores() -> dict[str, list[float]]:
    """Evaluate a model that depends on its seed alone: values, intervals and floors by name."""
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(**CLIP)).eval()
    real = torch.rand(9, 3, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    options = {"num": 7, "max_batch": 2, "features": "means", "overrides": ["sample.steps=2"]}
    found = [evaluate(diffusion, real, **options), evaluate(diffusion, real, given=2, **options)]
    return {f"{i} {name}": [s.value, s.low, s.high] for i, one in enumerate(found) for name, s in one.scores.items()}


def main(folder: str) -> None:
    state = join_process_group()
    rank = state.process_index
    # Memory for 284 samples in the first process, for 250 in the second.
    memory.largest_batch = lambda *args, **options: (284, 250)[rank]
    batch = train.choose_batch(Config(), Path(folder), 10_000)
    order = Path(folder, "order.txt")
    was_there = first_then_others(lambda: order.exists() or order.write_text("indexed") < 0)

    def fail_in_one() -> None:
        if rank == 1:
            raise PermissionError("the disk of the second machine is write-protected")

    try:
        in_all(fail_in_one)
        error = "none"
    except (UsageError, OSError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    report = {"batch": batch, "was_there": was_there, "error": error}
    samples = draw()
    report["scores"] = scores()
    reports = gather_object([report])
    if rank == 0:
        Path(folder, "together.json").write_text(json.dumps(reports))
        torch.save(samples, Path(folder, "samples.pt"))
