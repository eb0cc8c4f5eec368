"""The network against the authors' release, value by value (arrays and formulas: tests/golden)."""

import json

import numpy as np
import pytest
import torch
from golden_files import GOLDEN, NETWORKS, build, channels_first, load_weights


def difference(ours: torch.Tensor, theirs: np.ndarray) -> float:
    assert ours.shape == theirs.shape
    return float((ours - torch.from_numpy(theirs)).abs().max())


def test_there_are_golden_files():
    assert list(GOLDEN.glob("*.npz")), f"no golden files in {GOLDEN}"


@pytest.mark.parametrize("file", NETWORKS, ids=lambda f: f.stem)
@pytest.mark.parametrize("case", ["zeros", "random"])
def test_network_reproduces_the_release(file, case, record_property):
    arrays = np.load(file)
    config = json.loads(str(arrays["config_json"]))
    model = build(config)
    assert sum(p.numel() for p in model.parameters()) == config["n_params"]
    load_weights(model, arrays)
    latents = None
    if case == "random":
        latents = torch.from_numpy(arrays["latent_prev"])
        if "tape_prev" in arrays.files:
            latents = (latents, torch.from_numpy(arrays["tape_prev"]))
    label = torch.from_numpy(arrays["labels"]) if config.get("num_classes") else None
    tokens = []
    model.core.register_forward_hook(lambda module, args, out: tokens.append(out[0]))
    with torch.no_grad():
        out, latents = model(
            channels_first(arrays["x"]), torch.from_numpy(arrays["gamma"]), latents=latents, label=label
        )
    worst = {
        "x_out": difference(out.movedim(1, -1), arrays[f"{case}.x_out"]),
        "latent": difference(latents[0] if isinstance(latents, tuple) else latents, arrays[f"{case}.latent"]),
        "tape": difference(tokens[0], arrays[f"{case}.tape"]),
    }
    print(f"{file.stem} {case}: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))  # noqa: T201
    assert worst["x_out"] < 1e-4
    assert worst["latent"] < 5e-4
    assert worst["tape"] < 5e-4


@pytest.mark.parametrize("file", NETWORKS, ids=lambda f: f.stem)
def test_sincos_tables_of_the_release(file):
    arrays = np.load(file)
    model = build(json.loads(str(arrays["config_json"])))
    for name, ours in {"latent": model.core.latents, "tape": model.tokenizer.position}.items():
        if f"code.{name}_pos_emb" in arrays.files:
            # a position near 1000 has a rounding error of 6.1e-5, which is the error of the angle
            assert difference(ours.code, arrays[f"code.{name}_pos_emb"]) < 6.2e-5
