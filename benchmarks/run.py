"""Measures speed and memory relative to models of other packages and to the hardware, as ratios within one run.

    make bench                                            # all cases, about ten minutes on two CPU cores
    python benchmarks/run.py --cases image video --threads 2
    python benchmarks/run.py --device cuda                # bf16, each model with and without torch.compile

`pip install '.[bench]'` installs the other models. The models of a comparison alternate for several rounds in this
process; the figures are medians. On a CPU everything is float32. Each growth figure is measured in a new process,
because of its memory peak. Writes `results/run.json` with versions, hardware and all figures, and prints them as
Markdown.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("TQDM_DISABLE", "1")  # otherwise the samplers of the other models show progress bars

import peers
import psutil
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rin_video.config_files import load_config
from rin_video.diffusion.process import GaussianDiffusion
from rin_video.model.rin import RIN
from rin_video.training.optimizers import make_optimizer
from rin_video.training.provenance import device_name
from rin_video.weights import write_text

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("rin-video", "torch", "rin-pytorch", "denoising-diffusion-pytorch", "diffusers")
SIZE = {"dim": 256, "depth": 2, "num_latents": 128, "dim_latent": 512, "latent_self_attn_depth": 3}
Row = dict[str, Any]


# ---- the clock


class Machine:
    """A device, its precision and its timer: the wall clock or, if `shared`, the processor time of this process."""

    def __init__(self, device: str, shared: bool = False) -> None:
        self.shared, self.clock = shared, time.process_time if shared else time.perf_counter
        self.device = torch.device(device)
        self.cuda = self.device.type == "cuda"
        self.modes = ("eager", "compile") if self.cuda else ("eager",)

    def autocast(self) -> torch.autocast:
        """Return the autocast context: bf16 on a GPU, disabled on a CPU."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.cuda)

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds that `work` takes."""
        if self.cuda:
            torch.cuda.synchronize()
        start = self.clock()
        work()
        if self.cuda:
            torch.cuda.synchronize()
        return self.clock() - start

    def in_turn(self, works: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
        """Run the works one after the other for `rounds` rounds after a warm-up round; return their median seconds."""
        times = [[self.seconds(work) for work in works] for _ in range(rounds + 1)][1:]
        return [median(column) for column in zip(*times, strict=True)]


def train_step(contender: peers.Contender, x: Tensor, machine: Machine) -> Callable[[], None]:
    """Return a training step: loss, gradient, clipping and AdamW, as in all trainers."""
    parameters = [p for p in contender.module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6)

    def step() -> None:
        with machine.autocast():
            loss = contender.loss(x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def flops(work: Callable[[], Any]) -> float:
    """Return the FLOPs of `work`: two per multiply-add of linear layers, convolutions and attention, as in `info`."""
    with sdpa_kernel(SDPBackend.MATH), CountFlops() as counter:
        work()
    return float(counter.total)


class CountFlops(TorchDispatchMode):
    """Counts with torch's formulas, but without its bookkeeping by module, which fails for inputs changed in place."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function._overloadpacket)
        self.total += formula(*args, **(kwargs or {}), out_val=out) if formula else 0
        return out


def matmul_rate(machine: Machine, size: int = 2048, dtype: torch.dtype | None = None) -> float:
    """Return the FLOP/s of a large matrix product, by default in the precision of the run."""
    size = 8192 if machine.cuda else size
    dtype = dtype or (torch.bfloat16 if machine.cuda else torch.float32)
    a, b = torch.rand(2, size, size, device=machine.device, dtype=dtype)
    return 2 * size**3 / min(machine.seconds(lambda: a @ b) for _ in range(5))


# ---- cases


def contenders(case: str) -> list[tuple[Callable[[], peers.Contender], int]]:
    """Return the models of a case, each with its number of rounds (fewer for slow ones)."""
    if case == "image":
        port = SIZE | {"image_size": 64, "patch_size": 4}
        return [
            (partial(peers.rin, **port), 5),
            (partial(peers.rin, "rin-video, no self-conditioning", self_cond=0, **port), 5),
            (partial(peers.rin, "rin-video with the port's extras", **port, **peers.EXTRAS), 5),
            (partial(peers.rin_pytorch, **port), 5),
            (partial(peers.rin_pytorch, "rin-pytorch, attention as wide as ours", **port, heads=8, dim_head=64), 5),
            (partial(peers.unet, 64, 56), 5),
            (partial(peers.dit, (3, 64, 64), 6, 9, (4, 4)), 5),
        ]
    ours = SIZE | {"image_size": 64, "frames": 16, "patch_size": (2, 4, 4)}
    return [
        (partial(peers.rin, **ours), 3),
        (partial(peers.rin, "rin-video, no self-conditioning", self_cond=0, **ours), 3),
        (partial(peers.latte, 16, 64, 6, 7), 3),
        (partial(peers.dit, (3, 16, 64, 64), 6, 9, (2, 4, 4)), 3),
        (partial(peers.unet3d, 16, 64, 48), 3),
    ]


def throughput(case: str, machine: Machine) -> list[Row]:
    """Measure training and sampling steps of all models, which alternate."""
    batch = (2 if case == "image" else 1) * (16 if machine.cuda else 1)
    shape = (3, 64, 64) if case == "image" else (3, 16, 64, 64)
    x = torch.rand(batch, *shape, device=machine.device)
    rows: list[Row] = []
    for mode in machine.modes:
        taking_part = []
        for make, rounds in contenders(case):
            torch.manual_seed(0)
            contender = make()
            contender.module.to(machine.device)
            cost = flops(lambda c=contender: c.loss(x).backward())
            contender.module.zero_grad()
            if mode == "compile":
                contender.network.compile()
            step = train_step(contender, x, machine)

            def draw(contender: peers.Contender = contender) -> None:
                with machine.autocast():
                    contender.sample(batch, 3)

            taking_part.append((contender, cost, rounds, step, draw, ([], [])))
        for turn in range(6):
            for contender, _, rounds, step, draw, (training, sampling) in taking_part:
                if turn > rounds or (rounds == 1 and turn == 0):
                    continue
                contender.module.train()
                seconds = machine.seconds(step), machine.seconds(draw) / 3
                if turn or rounds == 1:
                    training.append(seconds[0])
                    sampling.append(seconds[1])
        ours = next(entry for entry in taking_part if entry[0].name == "rin-video")
        for contender, cost, rounds, _, _, (training, sampling) in taking_part:
            row = {"case": case, "model": contender.name, "mode": mode, "batch": batch, "rounds": rounds}
            row |= {"params": contender.params, "train_gflops": round(cost / 1e9, 1)}
            row |= {"train_seconds": round(median(training), 4), "sample_seconds": round(median(sampling), 4)}
            row["train_ratio"] = round(median(training) / median(ours[-1][0]), 2)
            row["sample_ratio"] = round(median(sampling) / median(ours[-1][1]), 2)
            rows.append(row)
            print(
                f"| {contender.name} | {mode} | {contender.params / 1e6:.1f} | {cost / 1e9:.0f} | "
                f"{row['train_seconds']:.3f} | {row['train_ratio']:.2f} | {row['sample_seconds']:.3f} | "
                f"{row['sample_ratio']:.2f} |",
                flush=True,
            )
        taking_part.clear()
        gc.collect()
    return rows


def arithmetic(machine: Machine) -> list[Row]:
    """Measure the fraction of the matrix-product rate that a training step of a preset reaches, with optimizer."""
    name, batch = ("kinetics600_predict", 32) if machine.cuda else ("imagenet64", 8)
    config = load_config(name)
    rows: list[Row] = []
    for mode in machine.modes:
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(RIN(config.model), config.diffusion).to(machine.device)
        x = torch.rand(batch, *diffusion.shape, device=machine.device)
        label = torch.zeros(batch, dtype=torch.long, device=machine.device) if config.model.num_classes else None
        cost = batch * flops(lambda d=diffusion, x=x, y=label: d(x[:1], None if y is None else y[:1]).backward())
        if mode == "compile":
            diffusion.model.compile()
        optimizer = make_optimizer(diffusion, config)

        def gradient(diffusion: GaussianDiffusion = diffusion, x: Tensor = x, label: Tensor | None = label) -> None:
            diffusion.zero_grad()
            with machine.autocast():
                loss = diffusion(x, label)
            loss.backward()

        gradient()
        optimizer.step()
        pairs = [(matmul_rate(machine), machine.seconds(gradient), machine.seconds(optimizer.step)) for _ in range(3)]
        rate, forward_backward, update = (median(column) for column in zip(*pairs, strict=True))
        row = {"preset": name, "mode": mode, "batch": batch, "gflops": cost / 1e9, "matmul_gflops_s": rate / 1e9}
        row |= {"gradient_seconds": forward_backward, "optimizer_seconds": update}
        row["share"] = cost / (forward_backward + update) / rate
        row["share_without_optimizer"] = cost / forward_backward / rate
        rows.append(rounded(row))
        print(
            f"{name}, batch {batch}, {mode}: {cost / 1e9:.0f} GFLOPs in {forward_backward:.2f} s + {update:.2f} s "
            f"({config.train.optimizer}); a matrix product reaches {rate / 1e9:.0f} GFLOP/s: {row['share']:.1%} of it, "
            f"{row['share_without_optimizer']:.1%} without the optimizer",
            flush=True,
        )
    return rows


class PeakResident(threading.Thread):
    """A thread that records the peak of this process's resident memory in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.stopping = psutil.Process(), threading.Event()
        self.peak = 0

    def run(self) -> None:
        """Sample the memory every 2 ms until `stopping` is set."""
        while not self.stopping.wait(0.002):
            self.peak = max(self.peak, self.process.memory_info().rss)


GROWTH: dict[
    str, tuple[Callable[[int], peers.Contender], int]
] = {  # with the largest number of frames that takes an acceptable time
    "rin-video": (
        lambda frames: peers.rin(
            image_size=32,
            frames=frames,
            patch_size=(2, 4, 4),
            dim=128,
            dim_latent=256,
            num_latents=64,
            depth=2,
            latent_self_attn_depth=2,
        ),
        256,
    ),
    "diffusers DiT": (lambda frames: peers.dit((3, frames, 32, 32), 2, 6, (2, 4, 4)), 256),
    "diffusers Latte": (lambda frames: peers.latte(frames, 32, 2, 6), 256),
    "diffusers UNet3D": (lambda frames: peers.unet3d(frames, 32, 16), 128),
}


def grown(name: str, frames: int, device: str, threads: int, shared: bool) -> tuple[float, float, int]:
    """Return seconds and peak bytes of a training step on a clip, and the parameters; runs in a new process."""
    torch.set_num_threads(threads)
    machine = Machine(device, shared)
    contender = GROWTH[name][0](frames)
    contender.module.to(machine.device)
    x = torch.rand(1, 3, frames, 32, 32, device=machine.device)
    step = train_step(contender, x, machine)
    watch = PeakResident()
    base = watch.process.memory_info().rss
    if machine.cuda:
        torch.cuda.reset_peak_memory_stats()
    watch.start()
    first = machine.seconds(step)
    again = [machine.seconds(step) for _ in range(3 if first < 3 else 1 if first < 10 else 0)]
    watch.stopping.set()
    watch.join()
    memory = torch.cuda.max_memory_allocated() if machine.cuda else watch.peak - base
    return median(again or [first]), memory, contender.params


def exponent(frames: Sequence[int], values: Sequence[float]) -> float:
    """Return the exponent b of the least-squares fit values = a * frames^b."""
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (frames, values))
    x = x - x.mean()
    return ((x * y).sum() / (x * x).sum()).item()


def growth(machine: Machine) -> list[Row]:
    """Measure time and memory of a training step against the number of frames, with a fixed number of latents."""
    rows: list[Row] = []
    for name, (_, most) in GROWTH.items():
        lengths = [n for n in (16, 32, 64, 128, 256) if n <= most]
        found = []
        for frames in lengths:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                work = pool.submit(grown, name, frames, str(machine.device), torch.get_num_threads(), machine.shared)
                found.append(work.result())
        seconds, memory, params = zip(*found, strict=True)
        row: Row = {"model": name, "frames": lengths, "params": params[0]}
        row |= {"seconds": seconds, "megabytes": [m / 1e6 for m in memory]}
        row |= {"exponent_seconds": exponent(lengths, seconds), "exponent_memory": exponent(lengths, memory)}
        last = slice(-3, None)
        row["exponent_seconds_last_three"] = exponent(lengths[last], seconds[last])
        row["exponent_memory_last_three"] = exponent(lengths[last], memory[last])
        rows.append(rounded(row))
        figures = " | ".join(f"{s:.2f} s, {m / 1e6:.0f} MB" for s, m in zip(seconds, memory, strict=True))
        figures += " | -" * (5 - len(lengths))
        print(
            f"| {name} | {params[0] / 1e6:.1f} | {figures} | {row['exponent_seconds']:.2f}, "
            f"{row['exponent_memory']:.2f} | {row['exponent_seconds_last_three']:.2f}, "
            f"{row['exponent_memory_last_three']:.2f} |",
            flush=True,
        )
    return rows


def overhead(machine: Machine) -> list[Row]:
    """Measure the fraction of a sampling loop at batch size 1 that is spent outside the model."""
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(image_size=64, patch_size=4, **SIZE)).to(machine.device).eval()
    rows = []
    for sampler in ("ddim", "ddpm", "dpmpp_2m_sde"):
        measure = overhead_on_gpu if machine.cuda else overhead_on_cpu
        share = measure(diffusion, partial(diffusion.sample, 1, steps=20, sampler=sampler, seed=0), machine)
        rows.append(rounded({"sampler": sampler, "batch": 1, "steps": 20, "outside": share}))
        print(f"sampling, {sampler}, batch 1: {share:.1%} of the time outside the model", flush=True)
    return rows


def overhead_on_cpu(diffusion: GaussianDiffusion, loop: Callable[[], Any], machine: Machine) -> float:
    """Return the fraction by timing every call of the model."""
    inside, begun = 0.0, 0.0

    def before(*_: Any) -> None:
        nonlocal begun
        begun = machine.clock()

    def after(*_: Any) -> None:
        nonlocal inside
        inside += machine.clock() - begun

    model, shares = diffusion.model, []
    hooks = [model.register_forward_pre_hook(before), model.register_forward_hook(after)]
    for _ in range(6):
        inside = 0.0
        total = machine.seconds(loop)
        shares.append(1 - inside / total)
    for hook in hooks:
        hook.remove()
    return median(shares[1:])


def overhead_on_gpu(diffusion: GaussianDiffusion, loop: Callable[[], Any], machine: Machine) -> float:
    """Return the fraction by comparison with 20 calls of the model alone, because GPU calls are asynchronous."""
    model: Any = diffusion.model
    x, gamma = torch.randn(1, *model.shape, device=machine.device), torch.ones(1, device=machine.device)

    @torch.inference_mode()
    def alone() -> None:
        latents = None
        with machine.autocast():
            for _ in range(20):
                _, latents = model(x, gamma, latents=latents)

    def with_loop() -> None:
        with machine.autocast():
            loop()

    total, model_only = machine.in_turn([with_loop, alone], 5)
    return 1 - model_only / total


def start(machine: Machine) -> list[Row]:
    """Measure the run time of commands, which alternate."""
    script = Path(sys.executable).with_name("rin-video")
    commands = {
        "rin-video --help": [str(script), "--help"],
        "import torch": [sys.executable, "-c", "import torch"],
        "import rin_video": [sys.executable, "-c", "import rin_video"],
        "from rin_video import RIN, GaussianDiffusion": [
            sys.executable,
            "-c",
            "from rin_video import RIN, GaussianDiffusion",
        ],
        "from rin_video import Trainer": [sys.executable, "-c", "from rin_video import Trainer"],
    }
    machine = Machine("cpu")  # by the wall clock, because the commands are processes of their own
    works = [partial(subprocess.run, command, check=True, capture_output=True) for command in commands.values()]
    seconds = dict(zip(commands, machine.in_turn(works, 5), strict=True))
    rows = []
    for name, value in seconds.items():
        rows.append(rounded({"command": name, "seconds": value, "ratio": value / seconds["import torch"]}))
        print(f"{name}: {value:.2f} s, {value / seconds['import torch']:.2f} of import torch", flush=True)
    return rows


def waiting(machine: Machine) -> list[Row]:
    """Measure the fraction of time that the trainer of the preset `demo` waits for data, from metrics.jsonl."""
    from rin_video.datasets.demo import write_demo_set
    from rin_video.training.trainer import Trainer

    config = load_config("demo", ["train.train_num_steps=120", "train.log_every=20"])
    with tempfile.TemporaryDirectory() as folder:
        write_demo_set(Path(folder) / "data")
        torch.manual_seed(0)
        diffusion = GaussianDiffusion(RIN(config.model), config.diffusion)
        trainer = Trainer(
            diffusion, str(Path(folder) / "data"), results_folder=Path(folder) / "run", config=config, progress=False
        )
        trainer.sample = lambda: None  # type: ignore[method-assign]  # do not measure the samples at the end
        trainer.train()
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait"] for line in lines]
    row = {"first_20_steps": shares[0], "later": median(shares[1:]), "worst_later": max(shares[1:])}
    row["steps_per_second"] = median(line["samples_per_second"] for line in lines[1:]) / config.train.train_batch_size
    print(
        f"waiting: {row['later']:.1%} (first 20 steps {shares[0]:.1%}, worst later {row['worst_later']:.1%}), "
        f"{row['steps_per_second']:.2f} steps/s",
        flush=True,
    )
    return [rounded(row)]


CASES: dict[str, tuple[Callable[[Machine], list[Row]], str]] = {
    "image": (
        partial(throughput, "image"),
        "| image 3x64x64 | mode | M params | GFLOPs per training step | s | ratio | sampling step, s | ratio |"
        "\n|---|---|---|---|---|---|---|---|",
    ),
    "video": (
        partial(throughput, "video"),
        "| clip 3x16x64x64 | mode | M params | GFLOPs per training step | s | ratio | sampling step, s | ratio |"
        "\n|---|---|---|---|---|---|---|---|",
    ),
    "arithmetic": (arithmetic, ""),
    "growth": (
        growth,
        "| clips 32x32 | M params | 16 frames | 32 | 64 | 128 | 256 | exponents of time, memory | last three |\n"
        "|---|---|---|---|---|---|---|---|---|",
    ),
    "overhead": (overhead, ""),
    "start": (start, ""),
    "waiting": (waiting, ""),
}


def rounded(row: Row) -> Row:
    """Round floats to four significant digits, also inside lists."""

    def cut(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [cut(item) for item in value]
        return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value

    return {name: cut(value) for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument(
        "--shared",
        action="store_true",
        help="measure processor time with one thread instead of wall-clock time, for a CPU that is shared with others",
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "run.json")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    options.threads = 1 if options.shared else options.threads
    torch.set_num_threads(options.threads)
    machine = Machine(options.device, options.shared)
    report = json.loads(options.out.read_text()) if options.out.exists() else {}
    key = "gpu" if machine.cuda else "cpu"
    cases = report.get(key, {}).get("cases", {})  # keep the results of earlier runs for other cases
    begun = time.perf_counter()
    for name in options.cases:
        measure, head = CASES[name]
        print(f"\n## {name}\n{head}", flush=True)
        cases[name] = measure(machine)
        report[key] = {
            "device": device_name(machine.device),
            "system": platform.platform(),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in PACKAGES},
            "precision": "bf16 autocast" if machine.cuda else "float32",
            "threads": options.threads,
            "seconds": "of processor time" if options.shared else "by the clock",
            "date": time.strftime("%Y-%m-%d"),
            "cases": cases,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.out, json.dumps(report, indent=1) + "\n")
    print(f"\n{(time.perf_counter() - begun) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
