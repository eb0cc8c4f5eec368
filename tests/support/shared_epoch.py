"""Records what each process reads: `torchrun shared_epoch.py SHARDS FOLDER`; the grey level of an image is its name.

Writes `read.json`: for each sampler and process, the batches of two epochs and those of a run that starts at RESUMED.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from rin_video.config import DataConfig
from rin_video.datasets import ImageFolder
from rin_video.datasets.loading import TrainLoader

BATCHES, RESUMED = 12, 4  # of 2 images in each process
SAMPLERS = {"one shape": [], "buckets": ["8x8", "8x16"]}


def read(data: ImageFolder, first: int) -> list[dict]:
    """Return the shape of every batch and the images in it."""
    where = {"first_batch": first, "rank": dist.get_rank(), "num_ranks": dist.get_world_size()}
    batches = TrainLoader(data, data.config, 2, seed=5, **where)
    found = [next(batches).x for _ in range(first, BATCHES)]
    batches.close()
    return [{"shape": x.shape, "names": x[:, 0, 0, 0].tolist()} for x in found]


def main(shards: str, folder: str) -> None:
    dist.init_process_group("gloo")
    report = {}
    for sampler, buckets in SAMPLERS.items():
        options = DataConfig(num_workers=1, buckets=buckets)
        data = ImageFolder(shards, 8, config=options, index=Path(folder, "index.jsonl"))
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, {"whole": read(data, 0), "resumed": read(data, RESUMED)})
        report[sampler] = gathered
    if dist.get_rank() == 0:
        Path(folder, "read.json").write_text(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
