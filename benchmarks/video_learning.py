"""Measures what video models learn in minutes of processor time: rin-video, and networks of other packages.

    python benchmarks/video_learning.py --make-data runs/atari                  # clips of four games, needs ale-py
    python benchmarks/video_learning.py --data runs/atari --minutes 5 15 60 --seeds 0 1
    python benchmarks/video_learning.py --data runs/atari --minutes 15 --threads 2 --seeds 0 1
    python benchmarks/video_learning.py --data runs/atari --sets atari32 --arms latte --minutes 5 \\
        --lr 3e-4 1e-3 3e-3 --work runs/sweep --out runs/sweep.json             # a sweep of the learning rate
    python benchmarks/video_learning.py --limits                                # what a perfect model could reach
    python benchmarks/video_learning.py --table                                 # of all results so far, and the sheets

Sets: `atari64` and `atari32` are clips of 16 frames of 64x64 or 32x32, of which three quarters are trained with
their first five frames given; `demo` is the demo set, 8 frames of 32x32 with classes. `FOLDER/train/GAME/*.mp4` and
`FOLDER/test/GAME/*.mp4` hold the games.

All arms have about as many parameters as our preset, and the same `GaussianDiffusion` (loss, noise schedule, sampler),
averages of the weights, warm-up and cosine of the learning rate (by time). Optimizer, learning rate and batch size are
the arm's. Networks of other packages receive given frames as further input channels (`peers.Peer`).

Each (arm, set, budget, seed) is a training of its own, in its own process. With one thread, the budget is processor
time; with several, or on a GPU, it is wall-clock time, for which nothing else may run. Reading the clips, sampling and
scoring do not count. A job whose result is in the JSON file is not run again, and an interrupted one resumes after its
training.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np
import peers
import torch
from atari import GAMES, play_twice, write_atari
from filelock import FileLock
from objects import bright, count_objects, moving, persistence
from torch import Tensor, nn

from rin_video import RIN, GaussianDiffusion, evaluate
from rin_video.config import Config, DataConfig, ModelConfig
from rin_video.config_files import load_config, to_dict
from rin_video.datasets.demo import write_demo_set
from rin_video.datasets.open import open_dataset
from rin_video.diffusion.precision import running_in
from rin_video.evaluation.prediction import PredictionScores
from rin_video.evaluation.result import Evaluation
from rin_video.evaluation.sets import choose, first_shape, reading_options
from rin_video.files import atomic_write, write_text
from rin_video.media import contact_sheet
from rin_video.training.ema import make_ema
from rin_video.training.optimizers import make_optimizer

HERE = Path(__file__).parent
SAMPLER = "dpmpp_2m_sde"
WARMUP = 0.05  # part of the budget over which the learning rate rises
GIVEN = 5  # frames given, of 16
Row = dict[str, Any]

# ---- sets of clips


@dataclass(frozen=True)
class VideoSet:
    """Clips to learn, and our preset for them."""

    preset: str
    options: tuple[str, ...]  # overrides of the preset
    given: int  # frames given in the second half of the judgement; 0: none
    smallest: int  # pixels of the smallest thing that counts as an object
    foreground: Callable[[Tensor], Tensor]  # where objects are


def atari_set(preset: str, size: int, smallest: int) -> VideoSet:
    """Return the set of the games at a size."""
    options = (
        f"model.image_size={size}",
        "model.frames=16",
        "model.num_classes=0",
        "model.known_mask=true",
        "diffusion.known={none: 1, first: 3}",
        f"diffusion.known_frames=[{GIVEN}, {GIVEN}]",
    )
    return VideoSet(preset, options, GIVEN, smallest, moving)


SETS = {
    "atari64": atari_set("clips64", 64, 2),
    "atari32": atari_set("clips32", 32, 1),
    "demo": VideoSet("demo", (), 0, 2, bright),
}


def read_clips(folder: Path, size: int) -> tuple[Tensor, Tensor]:
    """Return all frames of the files in a folder: uint8 (n, 3, F, size, size), and their classes (n,)."""
    frames = first_shape(folder)[1]
    data = open_dataset(folder, (3, frames, size, size), DataConfig(strict=True))
    clips = torch.stack([data.draw(index, 0)["x"] for index in range(len(data))])
    return clips, torch.tensor(data.labels)


def real_clips(folder: Path, shape: tuple[int, ...], num: int) -> Tensor:
    """Return the clips that `evaluate` compares with: uint8 (num, *shape), evenly chosen."""
    chosen = choose(open_dataset(folder, shape, reading_options(DataConfig())), num, "real clips")
    return torch.stack([chosen.read(index) for index in range(len(chosen))])


# ---- arms


@dataclass(frozen=True)
class Arm:
    """A network, and how it is trained; values that are None are those of our preset."""

    title: str
    build: Callable[[Config, int], nn.Module]  # from our config and its number of parameters
    package: str | None = None
    optimizer: str | None = None
    lr: float | None = None
    batch: dict[str, int] | None = None  # clips per step, by set


def count(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def nearest(build: Callable[..., nn.Module], sizes: Iterable[tuple[Any, ...]], params: int) -> nn.Module:
    """Build the model, of some sizes in ascending order, whose number of parameters has the ratio nearest to 1."""
    best, distance = None, math.inf
    for size in sizes:
        with torch.random.fork_rng(devices=[]):  # the sizes that are tried do not change the one that is built
            ratio = count(build(*size)) / params
        if abs(math.log(ratio)) < distance:
            best, distance = size, abs(math.log(ratio))
        if ratio > 2:
            break
    assert best is not None
    return build(*best)


def published_config(data: ModelConfig, dim: int, latent: int, layers: int, num_latents: int) -> ModelConfig:
    """Return the block of `video64` at another size, for the data of a config: no mixing, patches of 2x4x4."""
    published = load_config("video64").model
    same = ("image_size", "frames", "channels", "num_classes", "known_mask")
    return dataclasses.replace(
        published,
        **{name: getattr(data, name) for name in same},
        dim=dim,
        dim_latent=latent,
        depth=layers,
        latent_self_attn_depth=layers,
        num_latents=num_latents,
        num_heads=max(dim // 32, 1),
        latent_num_heads=max(latent // 32, 1),
    )


# Sizes of each network in ascending order: `nearest` takes the one with about as many parameters as our preset.
PUBLISHED = [
    (64, 64, 2, 32), (96, 96, 2, 64), (128, 128, 2, 64), (128, 160, 2, 64), (128, 128, 3, 64), (128, 192, 3, 64),
    (192, 256, 3, 64), (256, 384, 3, 128), (256, 512, 4, 128),
]  # fmt: skip
LATTE = [(2, 3), (3, 4), (3, 6), (4, 4), (4, 6), (6, 4), (6, 6), (6, 8), (8, 8), (8, 12), (12, 12)]
UNET3D = [(width,) for width in range(8, 129, 8)]
VIDEO_UNET = [
    (8, (1, 2, 4), 4), (8, (1, 2, 4, 8), 4), (16, (1, 2, 4), 4), (24, (1, 2, 4), 4), (24, (1, 2, 4), 8),
    (16, (1, 2, 4, 8), 4), (16, (1, 2, 4, 8), 8), (24, (1, 2, 4, 8), 8), (32, (1, 2, 4, 8), 8), (40, (1, 2, 4, 8), 8),
    (48, (1, 2, 4, 8), 8), (64, (1, 2, 4, 8), 8),
]  # fmt: skip


def build_published(config: Config, params: int) -> nn.Module:
    """Build a RIN with the published block."""
    return nearest(lambda *size: RIN(published_config(config.model, *size)), PUBLISHED, params)


def build_latte(config: Config, params: int) -> nn.Module:
    """Build diffusers' Latte transformer."""
    return nearest(lambda *size: peers.peer_latte(config.model, *size), LATTE, params)


def build_unet3d(config: Config, params: int) -> nn.Module:
    """Build diffusers' UNet3DConditionModel."""
    return nearest(lambda *size: peers.peer_unet3d(config.model, *size), UNET3D, params)


def build_video_unet(config: Config, params: int) -> nn.Module:
    """Build the Unet3D of video-diffusion-pytorch."""
    return nearest(lambda *size: peers.peer_video_unet(config.model, *size), VIDEO_UNET, params)


FEW = {"atari64": 2, "atari32": 4, "demo": 8}  # a clip takes a U-Net seconds
ARMS = {
    "rin-video": Arm("rin-video", lambda config, params: RIN(config.model)),
    "published": Arm(
        "rin-video, published block", build_published, None, "adamw", 1e-3, {"atari64": 8, "atari32": 8, "demo": 16}
    ),
    "latte": Arm("diffusers Latte", build_latte, "diffusers", "adamw", 1e-3, {"atari64": 4, "atari32": 8, "demo": 16}),
    "unet3d": Arm("diffusers UNet3D", build_unet3d, "diffusers", "adamw", 1e-3, FEW),
    "video-unet": Arm(
        "video-diffusion-pytorch Unet3D", build_video_unet, "video-diffusion-pytorch", "adamw", 1e-3, FEW
    ),
}


# ---- jobs


@dataclass(frozen=True)
class Job:
    """A training with its judgement. The first seven fields identify it among the results."""

    data: str
    arm: str
    minutes: float
    device: str
    threads: int
    seed: int
    lr: float
    optimizer: str
    batch: int
    precision: str
    preset: str
    options: tuple[str, ...]  # of our preset
    config: str  # a digest of the options that the arm depends on
    num: int  # samples per game or class
    steps: int
    features: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What identifies the job among the results."""
        return dataclasses.astuple(self)[:7]

    @property
    def name(self) -> str:
        """The name of the folder of the training."""
        training = dataclasses.replace(self, num=0, steps=0, features="")
        text = f"{self.data}-{self.arm}-{self.minutes:g}min-{self.device}{self.threads}-seed{self.seed}"
        return f"{text}-{digest(dataclasses.astuple(training))}"

    def load(self) -> Config:
        """Return the configuration of our preset for the set, with the optimizer and batch size of the arm."""
        config = load_config(self.preset, [*SETS[self.data].options, *self.options])
        config.train = dataclasses.replace(
            config.train,
            optimizer=self.optimizer,
            train_lr=self.lr,
            train_batch_size=self.batch,
            mixed_precision=self.precision,
        )
        if self.arm == "published":  # it is conditioned on its previous latents
            own = load_config("video64").diffusion.train_prob_self_cond
            config.diffusion = dataclasses.replace(config.diffusion, train_prob_self_cond=own)
        return config


def digest(value: Any) -> str:
    """Return a short digest of JSON values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=4).hexdigest()


def make_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the jobs of a call, those of the shortest budget first."""
    jobs = []
    for minutes, seed, data, name in product(sorted(options.minutes), options.seeds, options.sets, options.arms):
        arm, preset = ARMS[name], options.preset or SETS[data].preset
        ours = load_config(preset, [*SETS[data].options, *options.set])
        parts = [to_dict(ours.diffusion)] + ([to_dict(ours.model), to_dict(ours.train)] if name == "rin-video" else [])
        jobs += [
            Job(
                data=data,
                arm=name,
                minutes=minutes,
                device=options.device,
                threads=options.threads,
                seed=seed,
                lr=lr,
                optimizer=options.optimizer or arm.optimizer or ours.train.optimizer,
                batch=options.batch or (arm.batch[data] if arm.batch else ours.train.train_batch_size),
                precision=options.precision,
                preset=preset,
                options=tuple(options.set),
                config=digest(parts),
                num=options.num,
                steps=options.steps,
                features=options.features,
            )
            for lr in options.lr or [arm.lr or ours.train.train_lr]
        ]
    return jobs


def read_results(path: Path) -> list[Row]:
    """Return the results so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def job_of(result: Row) -> Job:
    """Return the job of a result."""
    return Job(**result["job"] | {"options": tuple(result["job"]["options"])})


def open_jobs(jobs: Iterable[Job], results: Iterable[Row], *, replace: bool = False) -> list[Job]:
    """Return the jobs without a result. Raises `ValueError` for a result with other options, unless `replace`."""
    known = {job_of(result).key: job_of(result) for result in results}
    left = []
    for job in jobs:
        other = known.get(job.key)
        if other is not None and other != job and not replace:
            names = [field.name for field in dataclasses.fields(Job)]
            name = next(name for name in names if getattr(job, name) != getattr(other, name))
            raise ValueError(
                f"{job.data}, {job.arm}, {job.minutes:g} minutes, seed {job.seed} has a result with "
                f"{name}={getattr(other, name)}, now it is {getattr(job, name)}: add --replace, or another --out"
            )
        if other != job:
            left.append(job)
    return left


def result_file(job: Job, work: Path) -> Path:
    """Return the file in which the process of a job leaves its result."""
    return work / job.name / f"result-{digest([job.num, job.steps, job.features])}.json"


def run_job(job: Job, options: argparse.Namespace) -> bool:
    """Run a job in a process of its own and add its result to the file; return whether it succeeded."""
    path = result_file(job, options.work)
    if not path.exists():
        text = json.dumps(dataclasses.asdict(job))
        command = [sys.executable, __file__, "--job", text, "--work", str(options.work)]
        command += ["--data", str(options.data)] if options.data else []
        environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads)}
        if subprocess.run(command, env=environment).returncode:
            print(f"{job.name} failed", flush=True)
            return False
    result = json.loads(path.read_text(encoding="utf-8"))
    with FileLock(options.work / "results.lock"):
        others = [one for one in read_results(options.out) if job_of(one).key != job.key]
        rows = sorted([*others, result], key=lambda one: [str(part) for part in job_of(one).key])
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(rows, indent=1) + "\n")
    print(describe(result), flush=True)
    return True


def describe(result: Row) -> str:
    """Return one line about a result."""
    job = result["job"]
    text = f"{job['data']}, {job['arm']}, {job['minutes']:g} min, seed {job['seed']}, lr {job['lr']:g}: "
    if result["diverged"]:
        return text + f"diverged after {result['steps']} steps"
    scores = {title: look_up(result, place) for title, place in COLUMNS.items()}
    found = ", ".join(f"{title} {shown(value)}" for title, value in scores.items() if value is not None)
    return text + f"{result['steps']} steps, loss {result['loss']:.4f}, {found}"


# ---- one job, in its own process


def clock(job: Job) -> float:
    """Return the seconds that count: processor time with one thread, wall-clock time with several and on a GPU."""
    return time.process_time() if job.device == "cpu" and job.threads == 1 else time.perf_counter()


def learning_rate(done: float) -> float:
    """Return the factor of the learning rate after a part `done` of the budget: a warm-up, then a cosine to 0."""
    return min(done / WARMUP, 1) * (0.5 + 0.5 * math.cos(math.pi * min(done, 1)))


def draw_batch(clips: Tensor, labels: Tensor, batch: int, frames: int) -> tuple[Tensor, Tensor]:
    """Draw windows of random files: uint8 (batch, 3, frames, H, W), and their classes (batch,)."""
    index = torch.randint(len(clips), (batch,))
    starts = torch.randint(clips.shape[2] - frames + 1, (batch,))
    return torch.stack([clips[i, :, s : s + frames] for i, s in zip(index, starts, strict=True)]), labels[index]


def train(
    job: Job, config: Config, diffusion: GaussianDiffusion, clips: Tensor, labels: Tensor
) -> tuple[nn.Module, Row]:
    """Train for the budget; return the averaged weights as a model, and what happened.

    The training ends with the step whose end is nearest to the budget, so that slow steps have no more time.
    """
    frames, budget, device = config.model.frames or 1, 60 * job.minutes, torch.device(job.device)
    optimizer = make_optimizer(diffusion, config)
    average = make_ema(diffusion.model, config.train, device)
    parameters = [p for p in diffusion.parameters() if p.requires_grad]
    peaks = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    start, wall, spent = clock(job), time.perf_counter(), 0.0
    while not losses or (math.isfinite(losses[-1]) and spent * (1 + 0.5 / len(losses)) < budget):
        x, label = (part.to(device) for part in draw_batch(clips, labels, job.batch, frames))
        with running_in(config.train.mixed_precision, device):
            loss = diffusion(x, label if config.model.num_classes else None)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        factor = learning_rate((clock(job) - start) / budget)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * factor
        optimizer.step()
        optimizer.zero_grad()
        average.update()
        losses.append(loss.item())  # waits for a GPU
        spent = clock(job) - start
    last = losses[-max(len(losses) // 10, 1) :]
    return average.ema_model, {
        "steps": len(losses),
        "clips": len(losses) * job.batch,
        "loss": sum(last) / len(last),  # of the last tenth of the steps
        "diverged": not math.isfinite(losses[-1]),
        "seconds": round(spent, 2),
        "wall_seconds": round(time.perf_counter() - wall, 2),
    }


def source_of(data: str, folder: Path | None, work: Path) -> Path:
    """Return the folder with `train` and `test` of a set; the clips of the demo set are made first."""
    if data != "demo":
        assert folder is not None
        return folder
    clips = work / "demo"
    for seed, split in enumerate(("train", "test")):
        write_demo_set(clips / split, seed=seed)
    return clips


def run_here(job: Job, data: Path | None, work: Path) -> None:
    """Train, sample and judge; write the result into the folder of the job."""
    torch.set_num_threads(job.threads)
    config, folder, source = job.load(), work / job.name, source_of(job.data, data, work)
    ours = count(RIN(config.model))
    torch.manual_seed(job.seed)
    diffusion = GaussianDiffusion(ARMS[job.arm].build(config, ours), config.diffusion).to(job.device)
    diffusion.precision = config.train.mixed_precision
    weights, log = folder / "weights.pt", folder / "training.json"
    if not log.exists():
        folder.mkdir(parents=True, exist_ok=True)
        clips, labels = read_clips(source / "train", config.model.height_width[0])
        torch.manual_seed(job.seed)
        average, found = train(job, config, diffusion, clips, labels)
        with atomic_write(weights) as temporary:
            torch.save(average.state_dict(), temporary)
        write_text(log, json.dumps(found | {"params": count(diffusion.model), "params_of_preset": ours}))
    result: Row = {"job": dataclasses.asdict(job)} | json.loads(log.read_text(encoding="utf-8"))
    result |= {"free": {}, "given": {}}
    if not result["diverged"]:
        diffusion.model.load_state_dict(torch.load(weights, weights_only=True, map_location=job.device))
        result |= judge(job, diffusion, source, folder)
    result["versions"] = {name: version(name) for name in {"rin-video", "torch", ARMS[job.arm].package or "torch"}}
    device = platform.machine() if job.device == "cpu" else torch.cuda.get_device_name()
    result["machine"] = f"{device}, {job.threads} threads"
    write_text(result_file(job, work), json.dumps(result, indent=1))


# ---- judgement


def judge(job: Job, diffusion: GaussianDiffusion, source: Path, folder: Path) -> Row:
    """Return the scores of unconditional (or class) samples, and of predictions of every game and their mean."""
    data, shape = SETS[job.data], diffusion.shape
    assert shape is not None
    classes = sorted(path.name for path in (source / "test").iterdir() if path.is_dir())
    diffusion.classes = classes if diffusion.model.num_classes else []
    num = job.num * len(classes)
    found: Row = {"free": score(job, diffusion, source if data.given == 0 else source / "test", num, folder / "free")}
    truth = real_clips(source / "test", shape, num)
    found["free"]["objects"] = {
        "samples": objects_of(data, found["free"].pop("drawn")),
        "real": objects_of(data, truth),
    }
    found["given"] = {}
    for game in classes if data.given else ():
        place = source / "test" / game
        scores = score(job, diffusion, place, job.num, folder / game, given=data.given)
        drawn, truth = scores.pop("drawn"), real_clips(place, shape, job.num)
        scores["objects"] = {"samples": objects_of(data, drawn), "real": objects_of(data, truth)}
        found["given"][game] = scores
    if data.given:
        found["given"]["mean"] = mean_of(list(found["given"].values()))
    return found


def score(job: Job, diffusion: GaussianDiffusion, data: Path, num: int, keep: Path, given: int | None = None) -> Row:
    """Draw samples and compare them with `data`; return the scores by name, the seconds, and the samples (`drawn`)."""
    keep = keep.with_name(f"{keep.name}-{num}x{job.steps}")
    result = evaluate(
        diffusion,
        data,
        num=num,
        features=job.features,
        given=given,
        split="auto" if diffusion.classes else "all",
        codec="none",
        keep=keep,
        device=job.device,
        max_batch=8,
        overrides=[f"sample.sampler={SAMPLER}", f"sample.steps={job.steps}", f"sample.precision={job.precision}"],
    )
    drawn = torch.from_numpy(np.stack([np.load(file) for file in sorted(keep.glob("*.npy"))]))
    return scores_of(result) | {"n": num, "seconds": round(sum(result.seconds.values()), 1), "drawn": drawn}


def scores_of(result: Evaluation) -> Row:
    """Return the scores that the tables need: value, interval and the floor of real clips."""
    wanted = ("clip/frechet_distance", "clip/kernel_distance", "class_accuracy", "prediction/")
    names = ("value", "low", "high", "floor")
    return {
        name: {key: float(f"{number:.5g}") for key, number in score.to_dict().items() if key in names}
        for name, score in result.scores.items()
        if name.startswith(wanted) and not any(other in name for other in ("linear", "psnr", "ssim"))
    }


def objects_of(data: VideoSet, clips: Tensor) -> Row:
    """Return how steady the number of objects is in clips (B, 3, F, H, W)."""
    return {
        name: None if value is None else round(value, 4)
        for name, value in persistence(count_objects(data.foreground(clips), data.smallest)).items()
    }


def mean_of(rows: Sequence[Any]) -> Any:
    """Return the mean of each number in nested dicts; a number that is missing in one is missing in the mean.

    The bounds of intervals are left out: their mean is no bound.
    """
    if all(isinstance(row, dict) for row in rows):
        keys = [key for key in rows[0] if key not in ("low", "high") and all(key in row for row in rows)]
        return {key: mean_of([row[key] for row in rows]) for key in keys}
    return None if any(row is None for row in rows) else float(f"{sum(rows) / len(rows):.5g}")


def limits(sets: Iterable[str], num: int, seed: int = 2) -> Row:
    """Return the scores of perfect predictions for sets of games, in the form of a result.

    A perfect prediction is the same game, played on from the last given frame with other random actions, `num` times
    for each game: what a model that knows the game, but not the actions, could reach.
    """
    found: Row = {}
    for data in sets:
        config, games = load_config(SETS[data].preset, SETS[data].options).model, {}
        for game in GAMES:
            scores = PredictionScores(SETS[data].given)
            size = (SETS[data].given, config.frames or 1, config.height_width[0])
            for truth, other in play_twice(game, num, seed, *size):
                scores.update(truth[None], other[None, None])
            games[game] = {
                f"prediction/{name}": {"value": float(f"{score.value:.5g}"), "low": score.low, "high": score.high}
                for name, score in scores.compute().items()
                if not any(other in name for other in ("linear", "psnr", "ssim"))
            }
        found[data] = {"given": games | {"mean": mean_of(list(games.values()))}}
    return found


# ---- report

FREE, MEAN = ("free",), ("given", "mean")
COLUMNS: dict[str, tuple[str, ...]] = {  # titles, and places in a result; a list ends in its value
    "Fréchet": (*FREE, "clip/frechet_distance", "value"),
    "kernel": (*FREE, "clip/kernel_distance", "value"),
    "class accuracy": (*FREE, "class_accuracy", "value"),
    "objects": (*FREE, "objects", "samples", "objects"),
    "their change": (*FREE, "objects", "samples", "change"),
    "steady": (*FREE, "objects", "samples", "steady"),
    "Fréchet, given": (*MEAN, "clip/frechet_distance", "value"),
    "recall": (*MEAN, "prediction/moving_recall", "value"),
    "precision": (*MEAN, "prediction/moving_precision", "value"),
    "error / copy": (*MEAN, "prediction/squared_error_over_copy", "value"),
}
REAL = {  # the same of real clips
    "Fréchet": (*FREE, "clip/frechet_distance", "floor"),
    "kernel": (*FREE, "clip/kernel_distance", "floor"),
    "class accuracy": (*FREE, "class_accuracy", "floor"),
    "objects": (*FREE, "objects", "real", "objects"),
    "their change": (*FREE, "objects", "real", "change"),
    "steady": (*FREE, "objects", "real", "steady"),
    "Fréchet, given": (*MEAN, "clip/frechet_distance", "floor"),
}
COPY = {  # the same of the last given frame, repeated
    "recall": (*MEAN, "prediction/copy_moving_recall", "value"),
    "precision": (*MEAN, "prediction/copy_moving_precision", "value"),
}


def look_up(result: Row, place: Sequence[str]) -> Any:
    """Return a number in nested dicts, None if there is none."""
    found: Any = result
    for name in place:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def cell(values: Sequence[float | None]) -> str:
    """Return the mean of the seeds, and each of them in brackets."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    each = ", ".join(map(shown, known))
    return each if len(known) == 1 else f"{shown(sum(known) / len(known))} ({each})"


def shown(value: float) -> str:
    """Format a number with three digits at least."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(results: Sequence[Row], limit: Row | None = None) -> str:
    """Return a Markdown table for each set, machine and budget, with a row per arm and learning rate.

    `limit` is what `limits` returns, for a last row.
    """
    groups: dict[tuple[str, str, int, float], list[Row]] = defaultdict(list)
    for result in results:
        job = job_of(result)
        groups[job.data, job.device, job.threads, job.minutes].append(result)
    return "\n\n".join(one_table(*group, rows, (limit or {}).get(group[0])) for group, rows in sorted(groups.items()))


def one_table(data: str, device: str, threads: int, minutes: float, results: Sequence[Row], limit: Row | None) -> str:
    """Return the table of one set and budget. Columns without a number are left out."""
    columns = {
        title: place
        for title, place in COLUMNS.items()
        if any(look_up(row, place) is not None for row in results) and (title != "steady" or data == "demo")
    }
    arms: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in sorted(results, key=lambda row: (list(ARMS).index(row["job"]["arm"]), row["job"]["lr"])):
        arms[row["job"]["arm"], row["job"]["lr"]].append(row)
    machine = "a GPU" if device != "cpu" else "one thread" if threads == 1 else f"{threads} threads"
    lines = [
        f"**{data}, {minutes:g} minutes of {machine}**",
        "",
        "| arm | M params | learning rate | clips seen | " + " | ".join(columns) + " |",
        "|---" * (4 + len(columns)) + "|",
    ]
    for (arm, lr), rows in arms.items():
        lost = sum(row["diverged"] for row in rows)
        title = ARMS[arm].title + (f" ({lost} of {len(rows)} diverged)" if lost else "")
        cells = [title, f"{rows[0]['params'] / 1e6:.2f}", f"{lr:g}", f"{rows[0]['clips']:,}"]
        cells += [cell([look_up(row, place) for row in rows]) for place in columns.values()]
        lines.append(f"| {' | '.join(cells)} |")
    first = next((row for row in results if not row["diverged"]), None)
    played = {title: place for title, place in COLUMNS.items() if place[:2] == MEAN}
    for title, row, places in (
        ("real clips", first, REAL),
        ("last given frame, copied", first, COPY),
        ("the game, played on with other actions", limit, played),
    ):
        cells = ["-" if row is None else cell([look_up(row, places.get(name, ("",)))]) for name in columns]
        if any(text != "-" for text in cells):
            lines.append(f"| {title} | | | | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_sheets(results: Sequence[Row], options: argparse.Namespace) -> list[Path]:
    """Write a picture for each set: per game, a row for the truth and for each arm after `sheet_minutes`.

    The samples are those in the folders of the jobs. Of several learning rates or seeds, the first is shown.
    """
    written, work, out = [], options.work, options.out
    wanted = (options.sheet_minutes, options.device, options.threads)
    for name in dict.fromkeys(result["job"]["data"] for result in results):
        chosen: dict[str, Job] = {}
        for job in map(job_of, results):
            if job.data == name and (job.minutes, job.device, job.threads) == wanted and (work / job.name).exists():
                chosen.setdefault(job.arm, job)
        if not chosen or (name != "demo" and options.data is None):
            continue
        source, (any_job, *_) = source_of(name, options.data, work), chosen.values()
        rows, titles = sheet_rows(source / "test", any_job, chosen, work)
        path = out.with_name(f"{out.stem}_{name}.png")
        contact_sheet(rows, path, max_frames=rows[0].shape[1], upscale=64 // rows[0].shape[-1], titles=titles)
        written.append(path)
    return written


def sheet_rows(test: Path, job: Job, chosen: dict[str, Job], work: Path) -> tuple[list[Tensor], list[str]]:
    """Return clips (3, F, H, W) and titles: the truth and each arm, of one clip per game or class."""
    model, given, num = job.load().model, SETS[job.data].given, job.num
    rows, titles = [], []
    classes = sorted(path.name for path in test.iterdir() if path.is_dir())
    for number, game in enumerate(classes):
        rows.append(real_clips(test / game, (3, model.frames or 1, *model.height_width), num)[num // 2])
        titles.append(f"{game}: {f'true, the first {given} frames are given' if given else 'a real clip'}")
        for arm in (arm for arm in ARMS if arm in chosen):
            place = work / chosen[arm].name
            samples = f"{game}-{num}x{job.steps}" if given else f"free-{num * len(classes)}x{job.steps}"
            files = sorted((place / samples).glob("*.npy"))  # samples of classes come in turn
            if files:
                rows.append(torch.from_numpy(np.load(files[num // 2 if given else number])))
                titles.append(f"{game}: {ARMS[arm].title}")
    return rows, titles


# ---- command line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-data", type=Path, metavar="FOLDER", help="write the clips of the games, and stop")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder of train/GAME/*.mp4 and test/GAME/*.mp4")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--minutes", type=float, nargs="+", default=[5.0, 15.0, 60.0], help="budgets of training")
    parser.add_argument("--threads", type=int, default=1, help="threads of a job")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="on a GPU, the clock is the wall's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates, one training for each")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), help="optimizer of all arms")
    parser.add_argument("--batch", type=int, help="clips per step of all arms")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="of training and sampling")
    parser.add_argument("--preset", help="our preset, for all sets")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="options of our preset")
    parser.add_argument("--num", type=int, default=12, help="samples per game or class")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--features", default="lite", help="extractor of the features for distances")
    parser.add_argument("--at-a-time", type=int, default=1, help="jobs that run in parallel")
    parser.add_argument("--replace", action="store_true", help="run jobs again whose result has other options")
    parser.add_argument("--work", type=Path, default=Path("runs/video_learning"), help="folder for weights and samples")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "video_learning.json")
    parser.add_argument("--limits", action="store_true", help="score perfect predictions (needs ale-py), and stop")
    parser.add_argument("--table", action="store_true", help="print the tables, write the sheets, and stop")
    parser.add_argument("--sheet-minutes", type=float, default=15, help="budget of the samples on the sheets")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # for child processes
    options = parser.parse_args()
    if options.make_data:
        write_atari(options.make_data)
        return
    if options.job:
        run_here(job_of({"job": json.loads(options.job)}), options.data, options.work)
        return
    limit_file, failed = options.out.with_name(f"{options.out.stem}_limits.json"), 0
    if options.limits:
        found = limits((name for name in options.sets if SETS[name].given), num=100)
        write_text(limit_file, json.dumps(found, indent=1) + "\n")
        return
    if not options.table:
        check(parser, options)
        try:
            jobs = open_jobs(make_jobs(options), read_results(options.out), replace=options.replace)
        except ValueError as error:
            parser.error(str(error))
        print(f"{len(jobs)} jobs, {sum(job.minutes for job in jobs) / 60:.1f} hours of training", flush=True)
        options.work.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(options.at_a_time) as pool:
            failed = sum(not done for done in pool.map(lambda job: run_job(job, options), jobs))
    results = read_results(options.out)
    for path in write_sheets(results, options):
        print(path)
    print(table(results, json.loads(limit_file.read_text(encoding="utf-8")) if limit_file.exists() else None))
    if failed:
        raise SystemExit(f"{failed} jobs failed: the same command runs them again")


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a message if the jobs of a call cannot run."""
    if any(name != "demo" for name in options.sets):
        if options.data is None:
            parser.error("the games need --data FOLDER, which --make-data FOLDER writes: or choose --sets demo")
        for split in ("train", "test"):
            if not any((options.data / split).glob("*/*.mp4")):
                parser.error(f"{options.data / split} has no clips: GAME/*.mp4 are needed, see --make-data")
    for name in options.arms:
        package = ARMS[name].package
        if package and importlib.util.find_spec(package.replace("-", "_")) is None:
            parser.error(f"the arm {name} needs {package}: pip install {package}, or choose other --arms")
    if options.num < 6:
        parser.error(f"--num is {options.num}: scores need 6 samples at least")


if __name__ == "__main__":
    main()
