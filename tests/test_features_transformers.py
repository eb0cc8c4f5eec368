"""Extractors from models of transformers, which are made tiny and saved to a folder here."""

import os
import sys
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file

from rin_video.errors import UsageError
from rin_video.features import files, make_extractor

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SQUARE = {"height": 32, "width": 32}


@pytest.fixture(scope="module", autouse=True)
def transformers():
    """The library, imported from a path without the folder `tokenizers` of the checkout."""
    here = os.path.realpath(os.getcwd())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [entry for entry in sys.path if os.path.realpath(entry or ".") != here])
        yield import_module("transformers")


def save(folder, model, processor):
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def load(folder):
    library = import_module("transformers")
    return library.AutoModel.from_pretrained(folder), library.AutoImageProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, transformers):
    """Folders of models by name, with random weights."""
    torch.manual_seed(0)
    root, t = tmp_path_factory.mktemp("models"), transformers
    patches = {"image_size": 32, "patch_size": 8, **SMALL}
    clip = t.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    video = t.VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)
    words = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, **SMALL}
    both = t.CLIPConfig(text_config=words, vision_config=patches, projection_dim=16)
    models = {
        "vit": (t.ViTModel(t.ViTConfig(**patches)), t.ViTImageProcessor(size=SQUARE)),
        "dinov2": (t.Dinov2Model(t.Dinov2Config(**patches | {"image_size": 64})), clip),
        "clip": (t.CLIPModel(both), clip),
        "vision": (t.CLIPVisionModel(t.CLIPVisionConfig(**patches)), clip),
        "resnet": (
            t.ResNetModel(t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
            t.ConvNextImageProcessor(size={"shortest_edge": 32}),
        ),
        "videomae": (t.VideoMAEModel(t.VideoMAEConfig(num_frames=8, tubelet_size=2, **patches)), video),
        "timesformer": (t.TimesformerModel(t.TimesformerConfig(num_frames=8, **patches)), video),
        "mae": (t.ViTMAEModel(t.ViTMAEConfig(**patches)), t.ViTImageProcessor(size=SQUARE)),
    }
    return {name: save(root / name, *parts) for name, parts in models.items()}


def clips(num: int, frames: int = 8, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 3, frames, size, size), dtype=torch.uint8, generator=generator)


def reference(folder, x: torch.Tensor) -> torch.Tensor:
    """What transformers computes by itself for images (B, 3, H, W) or one clip (3, F, H, W)."""
    model, processor = load(folder)
    frames = list(x if len(x.shape) == 4 and x.shape[1] == 3 else x.transpose(0, 1))
    values = processor(frames, return_tensors="pt", do_resize=False)["pixel_values"]
    if folder.name in ("videomae", "timesformer"):
        values = values.reshape(1, len(frames), *values.shape[-3:])
    model.eval()
    with torch.inference_mode():
        if folder.name == "clip":
            found = model.get_image_features(pixel_values=values)
            return getattr(found, "pooler_output", found)
        y = model(pixel_values=values).last_hidden_state
    if folder.name == "resnet":
        return y.mean((2, 3))
    return y.mean(1) if folder.name == "videomae" else y[:, 0]


@pytest.mark.parametrize("name", ["vit", "dinov2", "clip", "vision", "resnet"])
def test_images(name, folders):
    extractor, x = make_extractor(f"transformers={folders[name]}"), clips(3)
    torch.testing.assert_close(
        extractor(x[:, :, 0])["image"], reference(folders[name], x[:, :, 0]), atol=1e-5, rtol=1e-4
    )
    found, alone = extractor(x), extractor(x[1:2])
    assert found.keys() == {"clip", "frame", "motion"}
    assert all(torch.equal(alone[view][0], found[view][1]) for view in found)
    assert torch.equal(found["frame"][:, 0], extractor(x[:, :, 0])["image"])
    assert extractor.digest == files.file_digest(folders[name] / "model.safetensors")
    assert extractor.protocol["size"] == [32, 32]


@pytest.mark.parametrize("name", ["videomae", "timesformer"])
def test_clips(name, folders):
    extractor, x = make_extractor(f"transformers={folders[name]}"), clips(5)
    found = extractor(x)
    assert found.keys() == {"clip"}
    torch.testing.assert_close(found["clip"][1:2], reference(folders[name], x[1]), atol=1e-5, rtol=1e-4)
    assert torch.equal(extractor(x[1:2])["clip"], found["clip"][1:2])
    longer = torch.zeros(1, 3, 15, 32, 32, dtype=torch.uint8)
    longer[:, :, ::2] = x[1]
    assert torch.equal(extractor(longer)["clip"], found["clip"][1:2])  # 8 of 15 frames, evenly spaced
    with pytest.raises(UsageError, match="takes 8 frames, and the clips have 7: use longer clips"):
        extractor(x[:, :, :7])
    with pytest.raises(UsageError, match="takes clips, and the samples are images"):
        extractor(x[:, :, 0])


def test_videomae_by_name(folders):
    assert make_extractor(f"videomae={folders['videomae']}").digest.startswith("sha256:")
    with pytest.raises(UsageError, match="is a vit, not a videomae: pass --features transformers="):
        make_extractor(f"videomae={folders['vit']}")


def test_models_that_draw_random_numbers_are_refused(folders):
    state = torch.get_rng_state()
    with pytest.raises(UsageError, match="draws random numbers"):
        make_extractor(f"transformers={folders['mae']}")
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_in_parts_have_one_digest(folders, tmp_path):
    model, processor = load(folders["vit"])
    model.save_pretrained(tmp_path, max_shard_size="20kB")
    processor.save_pretrained(tmp_path)
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    extractor = make_extractor(f"transformers={tmp_path}")
    assert extractor.digest == files.file_digest(*parts)
    x = clips(1)[:, :, 0]
    assert torch.equal(extractor(x)["image"], make_extractor(f"transformers={folders['vit']}")(x)["image"])
    parts[0].unlink()
    with pytest.raises(UsageError, match=r"has no complete model.safetensors"):
        make_extractor(f"transformers={tmp_path}")


def test_models_that_are_missing_or_not_complete_are_refused_in_one_line(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    problems = {
        "transformers": "name a folder or a model of the hub: --features transformers=NAME",
        "transformers=nobody/nothing": "there is no folder nobody/nothing, and the hub's cache does not have it: pass",
        f"transformers={tmp_path / 'no' / 'such' / 'folder'}": "there is no folder",
        f"transformers={tmp_path}": "has no complete model.safetensors: save the model with save_pretrained",
    }
    pickled = save(tmp_path / "pickled", *load(folders["vit"]))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    problems[f"transformers={pickled}"] = "has no complete model.safetensors"
    damaged = save(tmp_path / "damaged", *load(folders["vit"]))
    (damaged / "model.safetensors").write_bytes(b"nothing")
    problems[f"transformers={damaged}"] = "cannot be loaded by transformers"
    gaps = save(tmp_path / "gaps", *load(folders["vit"]))
    state = load_file(gaps / "model.safetensors")
    save_file(dict(list(state.items())[4:]), gaps / "model.safetensors", {"format": "pt"})
    problems[f"transformers={gaps}"] = "lacks 4 tensors of its network, such as"
    bare = save(tmp_path / "bare", *load(folders["vit"]))
    (bare / "preprocessor_config.json").unlink()
    problems[f"transformers={bare}"] = "cannot be loaded by transformers"
    for name, problem in problems.items():
        with pytest.raises(UsageError) as caught:
            make_extractor(name)
        assert problem in str(caught.value)
        assert "\n" not in str(caught.value)
