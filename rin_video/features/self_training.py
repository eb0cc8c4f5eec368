"""The training of the extractor "self"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rin_video.features.base import exact_math
from rin_video.features.self_alterations import ALTERATIONS, WEAKEST, altered
from rin_video.features.self_data import Source
from rin_video.features.self_network import SelfNetwork
from rin_video.features.self_tasks import changed, reordered
from rin_video.progress import progress_bar

STEPS, BATCH, WINDOWS = 300, 8, 4  # steps, samples per step, windows of each
RATE, TEMPERATURE, SEED = 4e-3, 0.1, 0


class Answers(NamedTuple):
    """What the heads should answer for each window."""

    task: Tensor  # (B,) int64
    alteration: Tensor  # (B,) int64
    strength: Tensor  # (B,), 0 for no alteration
    label: Tensor  # (B,) int64


def train(source: Source, settings: dict[str, Any], device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the network; return its weights and how well it solves the tasks. No global generator is used."""
    samples, labels = source.read((settings["size"][0], settings["size"][1]))
    classes = labels.unique()
    numbers = torch.searchsorted(classes, labels)
    num_classes = len(classes) if len(classes) > 1 and int(classes.min()) >= 0 else 0
    tasks, num_steps, rng = settings["tasks"], settings["steps"], np.random.default_rng(SEED)
    with torch.inference_mode(False), torch.enable_grad(), exact_math(device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            network = SelfNetwork(len(tasks), len(ALTERATIONS), num_classes).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=0.01)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=num_steps, cycle_momentum=False)
        scores: list[list[float]] = []
        with progress_bar(num_steps, "training the extractor", "step", delay=2) as bar:
            for _ in range(num_steps):
                x, answers = make_batch(samples, numbers, tasks, rng)
                loss, right = step_loss(network, x.to(device), Answers(*(answer.to(device) for answer in answers)))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rate.step()
                scores.append([float(loss.detach()), *right])
                bar.set_postfix_str(f"loss {scores[-1][0]:.3g}")
                bar.update()
        with torch.no_grad():
            parts = [network(part.to(device) / 127.5 - 1).cpu() for part in samples.split(16)]
        network.set_directions(torch.cat(parts))
    loss_value, *shares = np.mean(scores[-50:], axis=0).round(4).tolist()
    names = ("task_accuracy", "alteration_accuracy")
    results = {"classes": num_classes, "loss": loss_value, **dict(zip(names, shares, strict=True))}
    return {name: value.detach().cpu() for name, value in network.state_dict().items()}, results


def make_batch(
    samples: Tensor, labels: Tensor, tasks: Sequence[str], rng: np.random.Generator
) -> tuple[Tensor, Answers]:
    """Return windows of random samples, each of which is shown with different tasks, and what to answer."""
    num = min(BATCH, len(samples))
    chosen = np.tile(rng.choice(len(samples), num, replace=False), WINDOWS)
    asked = rng.permuted(np.tile(np.arange(len(tasks)), (num, 1)), axis=1)[:, :WINDOWS].T.reshape(-1)
    kinds = rng.integers(len(ALTERATIONS), size=len(chosen))
    strengths = rng.uniform(WEAKEST, 1, len(chosen)) * (kinds > 0)
    windows = [
        pose(samples[i], tasks[task], ALTERATIONS[kind], strength, rng)
        for i, task, kind, strength in zip(chosen, asked, kinds, strengths, strict=True)
    ]
    task, kind, strength = (torch.from_numpy(answer) for answer in (asked, kinds, strengths.astype(np.float32)))
    return torch.stack(windows), Answers(task, kind, strength, labels[chosen])


def pose(sample: Tensor, task: str, kind: str, strength: float, rng: np.random.Generator) -> Tensor:
    """Return a uint8 sample (3, F, H, W) as the task and the alteration show it: (3, f, H, W) from 0 to 255."""
    if sample.shape[1] == 1:
        x = changed(task, sample[:, 0])[:, None]
    else:
        x = sample[:, reordered(task, sample.shape[1], rng)]
    return altered(kind, strength, x.float(), rng)


def step_loss(network: SelfNetwork, x: Tensor, answers: Answers) -> tuple[Tensor, list[float]]:
    """Return the loss of windows (B, 3, f, H, W) from 0 to 255, whose second half shows the samples of the first again.

    It is the sum of the cross entropies of the task, of the alteration, of which window shows the same sample (InfoNCE,
    van den Oord et al. 2018) and of the class, and of the squared error of the alteration's strength. Also returns the
    shares of the tasks and of the alterations that are recognised.
    """
    y = network(x / 127.5 - 1)
    task, alteration = network.task(y), network.alteration(y)
    loss = F.cross_entropy(task, answers.task) + F.cross_entropy(alteration, answers.alteration)
    loss = loss + F.mse_loss(network.strength(y)[:, 0], answers.strength)
    num = len(x) // WINDOWS
    same = torch.arange(num, device=x.device)
    first, second = F.normalize(network.match(y), dim=1).chunk(2)
    for one, two in zip(first.split(num), second.split(num), strict=True):
        loss = loss + F.cross_entropy(one @ two.T / TEMPERATURE, same) / (WINDOWS // 2)
    if network.label is not None:
        loss = loss + F.cross_entropy(network.label(y), answers.label)
    right = (task.argmax(1) == answers.task, alteration.argmax(1) == answers.alteration)
    return loss, [float(value.float().mean()) for value in right]
