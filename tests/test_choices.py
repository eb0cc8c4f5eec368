"""For every list of names, the config accepts exactly what is implemented, and the help lists it."""

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import get_args
from unittest import mock

import numpy as np
import pytest
import torch
from tiny_run import TINY
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, UsageError, config
from rin_video.cli.parser import make_parser
from rin_video.config import Config, DataConfig, TrainConfig
from rin_video.config_checks import names_of, types_of
from rin_video.config_files import load_config
from rin_video.datasets.backends import DECODERS
from rin_video.datasets.clip_sampler import ClipSampler
from rin_video.datasets.extensions import KINDS
from rin_video.datasets.index import INFOS
from rin_video.datasets.resize_crop import ResizeCrop
from rin_video.diffusion.conditions import Conditions
from rin_video.diffusion.guidance import Guidance
from rin_video.diffusion.masks import ANY_GRID, KNOWN_MASKS
from rin_video.diffusion.objectives import CLIPS, LOSS_WEIGHTS, OBJECTIVES, TIME_SAMPLINGS, target, to_x0_eps
from rin_video.diffusion.precision import running_in
from rin_video.diffusion.samplers import KARRAS, SAMPLERS, SPACINGS, make_levels
from rin_video.diffusion.schedules import SCHEDULES, NoiseLevel, make_schedule
from rin_video.tokenizers.positions import POSITIONS
from rin_video.training.distributed import make_accelerator
from rin_video.training.optimizers import OPTIMIZERS, make_lr_schedule

OPTIONS = {
    f"{section}.{name}": names_of(kind)
    for section, options in types_of(Config).items()
    for name, kind in types_of(options).items()
    if names_of(kind)
}
TABLES = {
    "model.position": [*POSITIONS],
    "model.latent_position": [name for name in POSITIONS if name != "coordinate"],  # latents have no grid
    "diffusion.noise_schedule": [*SCHEDULES],
    "diffusion.objective": [*OBJECTIVES],
    "diffusion.loss_weight": ["none", *LOSS_WEIGHTS, "balanced"],
    "diffusion.time_sampling": [*TIME_SAMPLINGS],
    "diffusion.clip_x0": [*CLIPS],
    "data.decoder": ["auto", *DECODERS],
    "train.optimizer": [*OPTIMIZERS],
    "sample.sampler": [*SAMPLERS],
    "sample.spacing": [*SPACINGS],
    "sample.schedule": [*SCHEDULES],
    "sample.clip_x0": [*CLIPS],
}


def shapes(**options):
    """The parameters of a model, and what its layers say of themselves."""
    model = RIN(**TINY, num_classes=2, embedding_dim=4, **options)
    return [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()], repr(model)


def predict(name):
    """The network output from which data and noise are recovered."""
    level = NoiseLevel.from_gamma(torch.tensor(0.7))
    x0, eps = torch.tensor([0.3]), torch.tensor([-0.8])
    said = target(name, x0, eps, level)
    assert_close(to_x0_eps(name, said, level.alpha * x0 + level.sigma * eps, level), (x0, eps))
    return said.item()


def network_input(name):
    """What the network sees of noisy data."""
    diffusion = GaussianDiffusion(torch.nn.Identity(), input_scaling=name, noise_schedule="cosine")
    diffusion.model.forward = lambda x, gamma: (x, None)
    level = diffusion.level(torch.full((1,), 0.9), torch.zeros(1, 1, 4))
    return diffusion.predict(torch.ones(1, 1, 4), level, Conditions(), None)[0].tolist()


def window(**options):
    clips, info = ClipSampler(2, DataConfig(**options)), SimpleNamespace(num_frames=8, lost=())
    return clips.count(info), clips.indices(info, 0)


def crop(name):
    frame = ResizeCrop(4, crop=name).draw_params((4, 400), np.random.default_rng(0))
    return frame.top, frame.left


def learning_rate(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-4)
    make_lr_schedule(optimizer, Config(train=TrainConfig(lr_schedule=name, train_num_steps=10))).step_update(5)
    return optimizer.param_groups[0]["lr"]


def precision(name):
    with mock.patch("torch.cuda.is_available", return_value=True), running_in(name, torch.device("cpu")):
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        return autocast, torch.get_float32_matmul_precision()


def trained_precision(name):
    """The precision of an accelerator, and whether it was measured."""
    options = TrainConfig(mixed_precision=name)
    with (
        mock.patch("rin_video.training.distributed.fastest_precision", return_value="bf16") as measured,
        mock.patch("rin_video.training.distributed.Accelerator", side_effect=KeyError),
        mock.patch("torch.cuda.is_available", return_value=True),
        pytest.raises(KeyError),
    ):
        make_accelerator(options, Path())
    return options.mixed_precision, measured.call_count


# Names that select a branch of the code: each must behave differently from the others.
BRANCHES = {
    "model.time_conditioning": lambda name: shapes(time_conditioning=name),
    "model.class_conditioning": lambda name: shapes(class_conditioning=name),
    "model.embedding_conditioning": lambda name: shapes(embedding_conditioning=name),
    "diffusion.objective": predict,
    "diffusion.input_scaling": network_input,
    "data.span": lambda name: window(span=name),
    "data.sampling": lambda name: window(sampling=name),
    "data.crop": crop,
    "train.lr_schedule": learning_rate,
    "train.mixed_precision": trained_precision,
    "sample.precision": precision,
    "train.sharding": str,  # requires several processes: tests/test_processes.py
    "sample.spacing": lambda name: make_levels(make_schedule("cosine"), 3, spacing=name),
}


def test_every_option_of_names_is_looked_at():
    assert OPTIONS.keys() == TABLES.keys() | BRANCHES.keys()


@pytest.mark.parametrize("option", OPTIONS)
def test_what_is_implemented_is_what_the_configuration_accepts(option):
    section, name = option.split(".")
    assert list(OPTIONS[option]) == TABLES.get(option, list(OPTIONS[option]))
    for choice in OPTIONS[option]:
        assert getattr(getattr(load_config(None, [f"{option}={choice}"]), section), name) == choice
    with pytest.raises(UsageError) as error:
        load_config(None, [f"{option}=other"])
    assert str(error.value) == f"{option}=other is unknown: choose {', '.join(OPTIONS[option])}"
    done = [BRANCHES[option](choice) for choice in OPTIONS[option]] if option in BRANCHES else []
    assert all(one != two for one, two in combinations(done, 2))


def test_lists_that_are_no_option_of_their_own():
    assert tuple(KNOWN_MASKS) == get_args(config.KnownKind)
    assert tuple(KINDS) == tuple(INFOS) == get_args(config.DataKind)
    assert set(ANY_GRID) <= set(KNOWN_MASKS)
    assert set(KARRAS) <= set(SAMPLERS)
    for kind in KNOWN_MASKS:
        assert load_config(None, [f"diffusion.known.{kind}=1"]).diffusion.known == {kind: 1}
    with pytest.raises(UsageError, match=f"choose {', '.join(KNOWN_MASKS)}$"):
        load_config(None, ["diffusion.known.other=1"])
    with pytest.raises(UsageError, match=f"choose {', '.join(get_args(config.GuidanceDropName))}$"):
        Guidance(1.0, drop="other").check(Conditions())


@pytest.mark.parametrize(
    ("option", "names"),
    [("self_conditioning", config.SelfConditioningName), ("interface_mixing", config.MixingName)],
)
def test_names_that_are_joined(option, names):
    every = ["none", *get_args(names), "+".join(get_args(names))]
    assert all(one != two for one, two in combinations([shapes(**{option: choice}) for choice in every], 2))
    with pytest.raises(UsageError, match=f"model.{option}=other is unknown: choose {', '.join(get_args(names))}$"):
        load_config(None, [f"model.{option}={get_args(names)[0]}+other"])


def test_the_help_lists_the_same_names():
    said = {
        (command, action.dest.rpartition(".")[2]): action.help
        for command, parser in make_parser().commands.items()
        for action in parser._actions
        if command != "peek"  # an alias of preview
    }
    wanted = {("sample", name): OPTIONS[f"sample.{name}"] for name in ("sampler", "spacing", "schedule")}
    wanted |= {(command, name): OPTIONS["data.decoder"] for command, name in said if name == "decoder"}
    wanted[("index", "kind")] = get_args(config.DataKind)
    wanted[("prepare", "kind")] = get_args(config.FrameKind)
    wanted[("sample", "guidance_drop")] = get_args(config.GuidanceDropName)
    assert len(wanted) == 10
    for place, names in wanted.items():
        assert ", ".join(names) in said[place], place
