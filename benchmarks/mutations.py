"""Damages checkpoints, weights and configs in a thousand ways: each must raise a clear error or load unchanged.

    python benchmarks/mutations.py --mutants 1000

Only `config.yaml` is meant to be edited: a mutant that is valid and has other options of training, data or sampling
loads with these options. Its options of model and diffusion must match those of the weights.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import TensorDataset

from rin_video import RIN, GaussianDiffusion, Trainer, UsageError
from rin_video.config_files import to_dict
from rin_video.model.rin import load_model
from rin_video.training.state import load_state

TINY = {"dim": 32, "num_latents": 6, "dim_latent": 32, "depth": 1, "num_heads": 2, "latent_num_heads": 2,
        "image_size": 8, "patch_size": 4}  # fmt: skip
SECONDS = 20.0
DANGEROUS = ("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect")


def make_run(folder: Path, **model: Any) -> Path:
    """Train a tiny model for two steps."""
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(**TINY | model), timesteps=3)
    options = {"train_num_steps": 2, "train_batch_size": 4, "save_and_sample_every": 2, "num_samples": 1}
    Trainer(diffusion, TensorDataset(torch.rand(8, 3, 8, 8)), results_folder=folder, progress=False, **options).train()
    return folder


def damage(content: bytes, how: str, rng: random.Random) -> bytes:
    """Return a mutant of a file's bytes."""
    place = rng.randrange(len(content))
    if how == "flips":
        mutant = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 2, 8, 64])):
            mutant[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(mutant)
    if how == "header":  # formats store lengths and names there
        mutant = bytearray(content)
        mutant[rng.randrange(min(len(content), 600))] = rng.randrange(256)
        return bytes(mutant)
    if how == "truncated":
        return content[:place]
    if how == "longer":
        return content + rng.randbytes(rng.randrange(1, 100))
    if how == "zeros":
        return content[:place] + bytes(min(512, len(content) - place)) + content[place + 512 :]
    if how == "spliced":
        other = rng.randrange(len(content))
        return content[:place] + content[other : other + 64] + content[place + 64 :]
    return rng.randbytes(len(content))


BYTES = ("flips", "flips", "flips", "header", "truncated", "longer", "zeros", "spliced", "random")


def wrong_tensors(path: Path, how: str, rng: random.Random) -> None:
    """Change a tensor of a safetensors file, which remains valid."""
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    if how == "shape":
        tensors[name] = tensors[name].flatten()[:-1].clone() if tensors[name].numel() > 1 else torch.zeros(3)
    elif how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors["extra"] = torch.zeros(2)
    elif how == "type":
        tensors[name] = tensors[name].to(torch.int64)
    save_file(tensors, path)


def same(a: Any, b: Any) -> bool:
    """Return whether two nested structures are equal, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def load(folder: Path, target: str) -> Any:
    """Load a checkpoint ("state"), or a model with its config."""
    if target == "state":
        return load_state(folder)
    model, config = load_model(folder)
    return {
        "weights": model.state_dict(),
        "model": to_dict(config.model),
        "diffusion": to_dict(config.diffusion),
    }, config


def outcome(folder: Path, target: str, original: Any) -> str:
    """Load a mutant and describe the outcome; everything not in GOOD is a failure."""
    result: list[str] = []

    def attempt() -> None:
        try:
            loaded = load(folder, target)
        except UsageError as error:
            result.append("refused" if str(folder) in str(error) else f"refused without a name: {error}")
        except BaseException as error:
            result.append(f"{type(error).__name__}: {error}")
        else:
            if target == "state":
                result.append("equal" if same(loaded, original) else "DIFFERENT")
            elif not same(loaded[0], original[0]):
                result.append("DIFFERENT")
            else:
                result.append("equal" if loaded[1] == original[1] else "equal, other options")

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return result[0] if result else "HANG"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--mutants", type=int, default=1000, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mutations.json")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    events: Counter[str] = Counter()
    sys.addaudithook(lambda event, arguments: events.update([event]) if event in DANGEROUS else None)
    with tempfile.TemporaryDirectory() as temporary:
        run, other = make_run(Path(temporary) / "run"), make_run(Path(temporary) / "other", dim=48)
        state = sorted((run / "checkpoints").iterdir())[-1]
        sources = {
            "state": {path.name: path for path in state.iterdir()},
            "model": {name: run / name for name in ("model.safetensors", "config.yaml")},
        }
        strange = {"state": sorted((other / "checkpoints").iterdir())[-1], "model": other}
        original = {"state": load(state, "state"), "model": load(run, "model")}
        events.clear()
        counts: dict[str, Counter[str]] = {}
        failures, folder, start = [], Path(temporary) / "mutant", time.perf_counter()
        folder.mkdir()
        for number in range(options.mutants):
            target = rng.choice(["state", "model", "model"])
            for path in folder.iterdir():
                path.unlink()
            for name, source in sources[target].items():
                (folder / name).write_bytes(source.read_bytes())
            name = rng.choice(sorted(sources[target]))
            kinds = [*BYTES, "another run's"]
            if name.endswith(".safetensors"):
                kinds += ["shape", "missing", "extra", "type"]
            how = rng.choice(kinds)
            if how == "another run's":
                (folder / name).write_bytes((strange[target] / name).read_bytes())
            elif how in BYTES:
                (folder / name).write_bytes(damage((folder / name).read_bytes(), how, rng))
            else:
                wrong_tensors(folder / name, how, rng)
            came_to = outcome(folder, target, original[target])
            label = f"{'checkpoint' if target == 'state' else 'model'} {name}"
            counts.setdefault(label, Counter())[came_to if came_to in GOOD else "FAILED"] += 1
            if came_to not in GOOD:
                failures.append(f"{number} {label} {how}: {came_to[:300]}")
                print(failures[-1], flush=True)
        result = {"mutants": options.mutants, "seconds": round(time.perf_counter() - start, 1),
                  "outcomes": {name: dict(count) for name, count in sorted(counts.items())},
                  "dangerous events": dict(events), "failures": failures}  # fmt: skip
    print(json.dumps(result, indent=1))
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(failures or events))


GOOD = ("refused", "equal", "equal, other options")

if __name__ == "__main__":
    main()
