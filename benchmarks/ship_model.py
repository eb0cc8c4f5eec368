"""Copies the model of a run into the package, in float16: `rin-video sample demo` then works right after installation.

rin-video demo --out runs/demo
python benchmarks/ship_model.py runs/demo/run demo
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rin_video.config_files import load_config, to_yaml
from rin_video.files import CONFIG, WEIGHTS, write_text
from rin_video.tensor_files import write_tensors
from rin_video.weights import SHIPPED, read_metadata, read_model

MOST = 8_000_000  # bytes of a model in the package
MODELS = Path(__file__).parents[1] / "configs" / SHIPPED


def ship(run: Path, name: str, models: Path = MODELS) -> Path:
    """Write the weights of a run in float16, and its configuration without paths; return the folder."""
    tensors, config, _ = read_model(run)
    config.data.path = config.data.validation = config.train.init_from = None
    target = models / name
    target.mkdir(parents=True, exist_ok=True)
    origin = {key: value for key, value in read_metadata(run / WEIGHTS).items() if key != "sha256"}
    write_tensors(target / WEIGHTS, tensors, origin, dtype=torch.float16, digest=True)
    write_text(target / CONFIG, to_yaml(config))
    load_config(target / CONFIG)
    if (size := (target / WEIGHTS).stat().st_size) > MOST:
        raise SystemExit(f"{target / WEIGHTS} has {size:,} bytes, more than {MOST:,}: train a smaller model")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("name")
    options = parser.parse_args()
    print(ship(options.run, options.name))


if __name__ == "__main__":
    main()
