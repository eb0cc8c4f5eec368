"""Code written for the PyTorch port: each of its options, and the accepted tensors and labels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, Trainer, UsageError
from rin_video.config import Config
from rin_video.config_files import load_config
from rin_video.weights import save_model

TINY = {"dim": 32, "image_size": 8, "patch_size": 4, "depth": 1, "num_latents": 6, "dim_latent": 32,
        "latent_self_attn_depth": 1, "num_heads": 2, "latent_num_heads": 2}  # fmt: skip

# The signatures of rin-pytorch 0.8: an option, a value, and the field that it becomes here, or the error message.
MODEL = [
    ("dim", 48, ("dim", 48)),
    ("image_size", 16, ("image_size", 16)),
    ("patch_size", 2, ("patch_size", 2)),
    ("channels", 1, ("channels", 1)),
    ("depth", 2, ("depth", 2)),
    ("latent_self_attn_depth", 3, ("latent_self_attn_depth", 3)),
    ("dim_latent", 64, ("dim_latent", 64)),
    ("num_latents", 7, ("num_latents", 7)),
    ("learned_sinusoidal_dim", 16, "learned_sinusoidal_dim has no counterpart.*time_scaling"),
    ("latent_token_time_cond", True, ("time_conditioning", "latent")),
    ("latent_token_time_cond", False, ("time_conditioning", "adaln")),
    ("dual_patchnorm", True, ("dual_patchnorm", True)),
    ("patches_self_attn", True, ("interface_mixing", "linear_attention")),
    ("patches_self_attn", False, ("interface_mixing", "none")),
    ("inverted_cross_attn", True, "inverted_cross_attn=True has no counterpart: leave it out"),
    ("inverted_cross_attn", False, ("dim", 32)),
    ("heads", 4, ("num_heads", 4)),
    ("heads", 4, ("latent_num_heads", 4)),
    ("dim_head", 32, "dim_head has no counterpart.*num_heads"),
    ("qk_norm", True, ("qk_norm", True)),
    ("flash", True, ("dim", 32)),
]
DIFFUSION = [
    ("timesteps", 7, ("timesteps", 7)),
    ("use_ddim", True, None),
    ("use_ddim", False, None),
    ("noise_schedule", "cosine", ("noise_schedule", "cosine")),
    ("objective", "x0", ("objective", "x0")),
    ("schedule_kwargs", {"tau": 0.5}, ("noise_schedule", {"name": "sigmoid", "tau": 0.5})),
    ("time_difference", 0.0, ("objective", "v")),
    ("time_difference", 0.02, r"in units of t in the port, .*sample\(steps=50, time_difference=1\)"),
    ("min_snr_loss_weight", True, ("loss_weight", "min_snr")),
    ("min_snr_loss_weight", False, ("loss_weight", "none")),
    ("min_snr_gamma", 3, r"loss_weight=\{'name': 'min_snr', 'gamma': 3\}"),
    ("train_prob_self_cond", 0.5, ("train_prob_self_cond", 0.5)),
    ("scale", 0.5, ("scale", 0.5)),
]
TRAINER = [
    ("train_batch_size", 8, ("train.train_batch_size", 8)),
    ("gradient_accumulate_every", 2, ("train.gradient_accumulate_every", 2)),
    ("augment_horizontal_flip", True, ("data.augment_horizontal_flip", True)),
    ("train_lr", 3e-4, ("train.train_lr", 3e-4)),
    ("train_num_steps", 5, ("train.train_num_steps", 5)),
    ("max_grad_norm", 0.5, ("train.max_grad_norm", 0.5)),
    ("ema_update_every", 10, ("train.ema_update_every", 10)),
    ("ema_decay", 0.995, ("train.ema_decay", 0.995)),
    ("betas", (0.9, 0.99), ("train.betas", (0.9, 0.99))),
    ("save_and_sample_every", 3, ("train.save_and_sample_every", 3)),
    ("num_samples", 25, ("sample.num_samples", 25)),
    ("results_folder", "elsewhere", None),
    ("amp", False, ("train.mixed_precision", "no")),
    ("amp", True, "mixed_precision=fp16 needs a CUDA GPU" if not torch.cuda.is_available() else None),
    ("mixed_precision_type", "bf16", ("train.mixed_precision", "no")),
    ("split_batches", True, ("train.train_batch_size", 16)),
    ("split_batches", False, ("train.train_batch_size", 16)),
    ("convert_image_to", "RGB", ("train.train_batch_size", 16)),
    ("convert_image_to", "L", r"build RIN\(channels=1\)"),
    ("convert_image_to", None, ("train.train_batch_size", 16)),
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize(("option", "value", "becomes"), MODEL)
def test_options_of_the_model(option, value, becomes):
    options = {k: v for k, v in TINY.items() if not (option == "heads" and "num_heads" in k)} | {option: value}
    if isinstance(becomes, str):
        with pytest.raises(UsageError, match=becomes):
            RIN(**options)
    else:
        assert getattr(RIN(**options).config, becomes[0]) == becomes[1]


@pytest.mark.parametrize(("option", "value", "becomes"), DIFFUSION)
def test_options_of_the_diffusion(option, value, becomes):
    if isinstance(becomes, str):
        with pytest.raises(UsageError, match=becomes):
            GaussianDiffusion(RIN(**TINY), **{option: value})
        return
    diffusion = GaussianDiffusion(RIN(**TINY), **{option: value})
    if becomes:
        assert getattr(diffusion.config, becomes[0]) == becomes[1]


@pytest.mark.parametrize(("option", "value", "becomes"), TRAINER)
def test_options_of_the_trainer(tmp_path, folder, option, value, becomes):
    options = {"results_folder": tmp_path / "results", option: value}
    diffusion = GaussianDiffusion(RIN(**TINY))
    if isinstance(becomes, str):
        with pytest.raises(UsageError, match=becomes):
            Trainer(diffusion, folder=str(folder), **options)
    elif becomes:
        section, _, name = becomes[0].partition(".")
        run = Trainer(diffusion, folder=str(folder), **options)
        assert getattr(getattr(run.config, section), name) == becomes[1]
        if section == "data":
            assert run.dataset.resize_crop.flip


def test_the_sampler_is_that_of_use_ddim():
    torch.manual_seed(0)
    model = RIN(**TINY)
    torch.nn.init.normal_(model.tokenizer.to_patches.weight)
    for use_ddim, name in ((True, "ddim"), (False, "ddpm")):
        diffusion = GaussianDiffusion(model, timesteps=4, use_ddim=use_ddim)
        plain = GaussianDiffusion(model, timesteps=4)
        assert torch.equal(diffusion.sample(batch_size=2, seed=3), plain.sample(batch_size=2, seed=3, sampler=name))
        assert torch.equal(
            diffusion.with_model(model).sample(batch_size=2, seed=3), diffusion.sample(batch_size=2, seed=3)
        )
    weighted = GaussianDiffusion(model, min_snr_loss_weight=True, min_snr_gamma=3)
    assert weighted.config.loss_weight == {"name": "min_snr", "gamma": 3}


def test_a_program_of_the_port_runs(tmp_path, folder):
    diffusion = GaussianDiffusion(RIN(**TINY), timesteps=2, train_prob_self_cond=0.9, scale=1.0)
    options = {"num_samples": 1, "train_batch_size": 2, "train_num_steps": 2, "save_and_sample_every": 1,
               "results_folder": tmp_path / "results"}  # fmt: skip
    dataset = torch.rand(3, 3, 8, 8)
    trainer = Trainer(diffusion_model=diffusion, dataset=dataset, **options)
    trainer.config.data.num_workers = 0
    trainer.save(0)
    start = {name: value.clone() for name, value in diffusion.model.state_dict().items()}
    trainer.train()
    trained = {name: value.clone() for name, value in diffusion.model.state_dict().items()}
    assert not torch.equal(start["core.latents.table"], trained["core.latents.table"])
    other = Trainer(GaussianDiffusion(RIN(**TINY), timesteps=2), dataset=dataset, **options)
    other.config.data.num_workers = 0
    other.load(0)
    assert other.step == 0
    assert_close(other.diffusion.model.state_dict(), start, rtol=0, atol=0)
    other.train()
    assert_close(other.diffusion.model.state_dict(), trained, rtol=0, atol=0)
    with pytest.raises(UsageError, match=r"no milestone 7: it has 0 \(checkpoints of other packages"):
        other.load(7)


def test_missing_and_contradictory_options(tmp_path, folder):
    diffusion = GaussianDiffusion(RIN(**TINY))
    for wrong, said in [
        (lambda: Trainer(diffusion), "requires data: pass a folder or a Dataset"),
        (lambda: Trainer(folder=folder), "requires a GaussianDiffusion"),
        (lambda: Trainer(diffusion, folder, mixed_precision="bf16", amp=False), "leave out amp"),
        (lambda: Trainer(diffusion, [1], augment_horizontal_flip=True), "requires a folder"),
        (lambda: Trainer(diffusion, folder, train_lrate=1), "unknown key train_lrate: did you mean train_lr"),
        (lambda: GaussianDiffusion(RIN(**TINY), timestep=3), "unknown key timestep: did you mean timesteps"),
        (lambda: RIN(**TINY, heads=4), "heads sets num_heads=4, but num_heads=2 was passed too"),
    ]:
        with pytest.raises(UsageError, match=said):
            wrong()


def test_the_error_for_a_batch_size_per_process_names_the_global_one(folder, monkeypatch):
    from rin_video.port import trainer_options

    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="is the global batch size: pass 4 times as much"):
        trainer_options({"split_batches": False}, channels=3, is_folder=True)


# ---- arrays for tensors, labels of any kind


def conditional():
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(**TINY, num_classes=3, known_mask=True), timesteps=2)
    torch.nn.init.normal_(diffusion.model.tokenizer.to_patches.weight)
    torch.nn.init.normal_(diffusion.model.conditioner.label.projection.weight)
    diffusion.classes = ["cat", "dog", "owl"]
    return diffusion


@pytest.mark.parametrize(
    "label",
    [[2, 0], (2, 0), np.array([2, 0]), np.array([2, 0], np.uint16), torch.tensor([2, 0], dtype=torch.int32), ["owl", 0],
     np.array(["owl", "cat"]),
     np.array([2.0, 0.0]), torch.eye(3)[[2, 0]], np.eye(3)[[2, 0]]],
)  # fmt: skip
def test_labels_in_any_form_are_the_same(label):
    diffusion, x = conditional(), torch.rand(2, 3, 8, 8)
    wanted = torch.tensor([2, 0])
    assert torch.equal(
        diffusion.sample(batch_size=2, label=label, seed=1), diffusion.sample(batch_size=2, label=wanted, seed=1)
    )
    losses = []
    for form in (label, wanted):
        torch.manual_seed(5)
        losses.append(diffusion(x, form))
    assert_close(*losses)


@pytest.mark.parametrize("label", ["dog", 1, np.int64(1), np.array(1), torch.tensor(1)])
def test_one_label_for_all(label):
    diffusion = conditional()
    assert torch.equal(
        diffusion.sample(batch_size=2, label=label, seed=1), diffusion.sample(batch_size=2, label=[1, 1], seed=1)
    )


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (
            [1, 3],
            r"the labels range from 1 to 3, but the model has 3 classes: .*or -1 for no label\. Labels count from 0",
        ),
        ([0, -2], "the labels range from -2 to 0, but the model has 3 classes"),
        (-5, "the labels range from -5 to -5"),
        ([0, 1, 2], r"labels of shape \(3,\) do not fit 2 samples"),
        ([0.5, 1], "not integers"),
        ("fox", "has no class fox"),
        (["cat", "fox"], "has no class fox"),
    ],
)
def test_labels_that_cannot_be_are_refused(label, said):
    diffusion = conditional()
    with pytest.raises(UsageError, match=said):
        diffusion(torch.rand(2, 3, 8, 8), label)
    with pytest.raises(UsageError, match=said):
        diffusion.sample(batch_size=2, label=label)


def test_arrays_are_accepted_like_tensors():
    diffusion, x = conditional(), np.random.default_rng(0).random((2, 3, 8, 8))
    losses = []
    for form in (x, torch.from_numpy(x), torch.from_numpy(x).float()):
        torch.manual_seed(5)
        losses.append(diffusion(form))
    assert losses[0] == losses[1] == losses[2]
    with pytest.raises(UsageError, match=r"the data is torch.int64: pass uint8 \(0 to 255\), or floats"):
        diffusion((x * 255).astype(int))
    known = np.zeros((8, 8), bool)
    known[:4] = True
    sampled = diffusion.sample(batch_size=2, context=x.astype(np.float32), known=known, label=0, seed=0)
    assert_close(sampled[:, :, :4], torch.from_numpy(x).float()[:, :, :4], rtol=0, atol=0)


def test_names_of_classes_travel_with_the_model(tmp_path):
    diffusion = conditional()
    diffusion.save_pretrained(tmp_path)
    assert load_config(tmp_path / "config.yaml").data.classes == ["cat", "dog", "owl"]
    again = GaussianDiffusion.from_pretrained(tmp_path)
    assert torch.equal(again.sample(batch_size=1, label="owl", seed=0), diffusion.sample(batch_size=1, label=2, seed=0))
    save_model(tmp_path / "model", diffusion.model, Config(model=diffusion.model.config))
    assert GaussianDiffusion.from_pretrained(tmp_path / "model").classes == []
