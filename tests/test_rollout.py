"""Rollout to clips longer than the model's, other sizes, several tokenizers for one core, embeddings."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, Trainer, UsageError, cli
from rin_video.config import Config, DataConfig, DiffusionConfig
from rin_video.datasets.decoding import open_video
from rin_video.media import VideoWriter, write_video
from rin_video.tokenizers.positions import LearnedPosition
from rin_video.training.callbacks import Callback
from rin_video.training.memory import PeakMemory
from rin_video.weights import save_model

TINY = {"dim": 32, "num_latents": 8, "dim_latent": 32, "depth": 1, "num_heads": 2, "latent_num_heads": 2}
CLIP = {"frames": 8, "image_size": 8, "patch_size": (2, 4, 4), "position": "sincos", "known_mask": True}


class Ramp(nn.Module):
    """A model whose frames are slightly brighter than the previous ones; it starts at 0 without observed frames."""

    STEP = 0.002
    known_mask = True

    def forward(self, x: Tensor, gamma: Tensor, *, known: Tensor | None = None, latents=None) -> tuple[Tensor, Tensor]:
        frames = torch.arange(x.shape[2], dtype=x.dtype)
        first = torch.full((len(x),), -1.0)
        if known is not None:
            place = known[:, 0, :, 0, 0].float().argmax(1)
            first = x[torch.arange(len(x)), 0, place, 0, 0] - 2 * self.STEP * place
        first = first.view(-1, 1, 1, 1, 1)
        handed_on = torch.zeros(len(x), 1) if latents is None else latents
        return (first + 2 * self.STEP * frames.view(1, 1, -1, 1, 1)).expand_as(x), handed_on + 1


def ramp() -> GaussianDiffusion:
    return GaussianDiffusion(Ramp(), objective="x0", clip_x0="none", shape=(1, 16, 2, 2))


@pytest.mark.parametrize("options", [{}, {"overlap": 1}, {"overlap": 15}, {"carry_latents": True}])
def test_two_hundred_frames_have_no_seams(options):
    parts = list(ramp().rollout(200, batch_size=2, steps=2, seed=0, **options))
    clip = torch.cat(parts, dim=2)
    assert clip.shape == (2, 1, 200, 2, 2)
    assert len(parts) > 10
    assert_close(clip[0, 0, :, 0, 0], Ramp.STEP * torch.arange(200.0), rtol=0, atol=2e-4)


def test_the_context_comes_first_bit_for_bit_and_may_be_longer_than_a_window():
    for length in (3, 16, 40):
        context = (0.1 + Ramp.STEP * torch.arange(float(length))).view(1, -1, 1, 1).expand(1, -1, 2, 2)
        clip = torch.cat(list(ramp().rollout(60, batch_size=2, steps=1, seed=0, context=context)), dim=2)
        assert clip.shape[2] == 60
        assert (clip[:, :, :length] == context).all()
        assert_close(clip[1, 0, :, 1, 1], 0.1 + Ramp.STEP * torch.arange(60.0), rtol=0, atol=1e-4)


def test_key_frames_first_then_those_between():
    """The ramp treats every chunk as consecutive frames, so the key frames reveal their distance."""
    seen = []

    class Spy(Ramp):
        def forward(self, x, gamma, *, known=None, latents=None):
            seen.append(None if known is None else known[0, 0, :, 0, 0].nonzero().flatten().tolist())
            return super().forward(x, gamma, known=known, latents=latents)

    diffusion = GaussianDiffusion(Spy(), objective="x0", clip_x0="none", shape=(1, 16, 2, 2))
    clip = torch.cat(list(diffusion.rollout(100, batch_size=1, steps=1, seed=0, overlap=4, key_frames=True)), dim=2)
    assert clip.shape[2] == 100
    apart = 16 - 4
    keys = clip[0, 0, ::apart, 0, 0]
    assert_close(keys, Ramp.STEP * torch.arange(float(len(keys))), rtol=0, atol=1e-4)
    assert [0, 12] in seen  # the first segment: the first key frame and the next
    assert [0, 1, 2, 3, 15] in seen  # the others: the end of the one before, and the next key frame


def test_memory_does_not_grow_with_the_length():
    """Measures the storage of all tensors that are alive at the same time."""

    def most(frames: int) -> int:
        diffusion = GaussianDiffusion(Ramp(), objective="x0", clip_x0="none", shape=(3, 16, 32, 32))
        with PeakMemory() as memory:
            for _ in diffusion.rollout(frames, batch_size=1, steps=1, seed=0):
                pass
        return memory.peak

    assert most(512) <= 1.1 * most(64)


def test_mistakes_of_extension_are_named():
    model = RIN(**TINY, **(CLIP | {"known_mask": False}))
    for diffusion, options, message in (
        (ramp(), {"overlap": 16}, "overlap is 16: it must be 1 to 15"),
        (ramp(), {"context": torch.rand(1, 100, 2, 2)}, "context has 100 frames, but the clips have 100"),
        (GaussianDiffusion(model), {}, "more than the window of 8, and the model takes no conditioning frames"),
        (GaussianDiffusion(RIN(**TINY, image_size=8)), {}, "requires clips"),
    ):
        with pytest.raises(UsageError, match=message):
            list(diffusion.rollout(100, batch_size=1, steps=1, **options))


def test_a_video_written_in_parts_is_that_written_at_once(tmp_path, gradient):
    clip = gradient[:, :, :17, :32]
    with VideoWriter(tmp_path / "parts.mp4", 8) as writer:
        for part in clip.split(3, dim=1):
            writer.write(part)
    with pytest.warns(UserWarning, match="padded"):
        write_video(clip, tmp_path / "whole.mp4", 8)
    parts, whole = read(tmp_path / "parts.mp4"), read(tmp_path / "whole.mp4")
    assert parts.shape == whole.shape == (3, 8, 18, 32)
    assert_close(parts, whole, rtol=0, atol=8 / 255)  # the encoder itself is not bit-deterministic
    writer = VideoWriter(tmp_path / "failed.mp4")
    with pytest.raises(RuntimeError, match="on the way"), writer:
        raise RuntimeError("on the way")
    assert not (tmp_path / "failed.mp4").exists()


# ---- other sizes


@pytest.mark.parametrize("position", ["sincos", "coordinate"])
def test_sizes_never_seen(position):
    diffusion = GaussianDiffusion(RIN(**TINY, **(CLIP | {"position": position})))
    assert diffusion.sample(batch_size=1, shape=(3, 12, 16, 12), steps=2).shape == (1, 3, 12, 16, 12)


def test_learned_positions_are_refused_or_interpolated():
    model = RIN(**TINY, **(CLIP | {"position": "learned"}))
    diffusion = GaussianDiffusion(model)
    with pytest.raises(UsageError, match=r"4x2x2 tokens and do not fit 6x2x2.*--interpolate-positions"):
        diffusion.sample(batch_size=1, shape=(3, 12, 8, 8), steps=1)
    model.interpolate_positions()
    assert diffusion.sample(batch_size=1, shape=(3, 12, 16, 8), steps=1).shape == (1, 3, 12, 16, 8)


def test_interpolation_reads_a_ramp_in_between():
    position = LearnedPosition((4, 3), 2)
    with torch.no_grad():
        position.table.copy_(torch.cartesian_prod(torch.arange(4.0), torch.arange(3.0)))
    position.interpolate = True
    table = position((8, 3)).view(8, 3, 2)
    assert_close(table[1:-1, :, 0], (torch.arange(1.0, 7) / 2 - 0.25)[:, None].expand(6, 3))
    assert_close(table[:, :, 1], torch.arange(3.0).expand(8, 3))


# ---- images and clips on one core


def test_one_core_works_for_images_and_clips():
    model = RIN(**TINY, **CLIP, tokenizer="tube+image", interface_mixing="conv")
    assert model.shapes == [(3, 8, 8, 8), (3, 8, 8)]
    diffusion = GaussianDiffusion(model, known={"none": 1, "first": 1, "boxes": 1})
    for shape in model.shapes:
        model.zero_grad()
        diffusion(torch.rand(4, *shape)).backward()
        assert all(p.grad is not None for p in model.core.parameters())
        assert diffusion.sample(batch_size=2, shape=shape, steps=2).shape == (2, *shape)
    touched = {name for name, p in model.named_parameters() if p.grad is None and "tokenizer" in name}
    assert all(name.startswith("tokenizer.") for name in touched)  # the last batch contained images
    alone = RIN(**TINY, **CLIP, interface_mixing="conv")
    shared = {k for k in model.state_dict() if not k.startswith("other_tokenizers.")}
    assert shared == set(alone.state_dict())
    with pytest.raises(UsageError, match="two tokenizers for one kind of data"):
        RIN(**TINY, image_size=8, tokenizer="image+image")


# ---- embeddings


@pytest.mark.parametrize("place", ["latent", "interface"])
def test_embeddings_condition_the_model_and_zeros_are_none(place):
    torch.manual_seed(0)
    model = RIN(**TINY, image_size=8, embedding_dim=5, embedding_tokens=3, embedding_conditioning=place)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, gamma = torch.randn(2, 3, 8, 8), torch.full((2,), 0.5)
    embedding = torch.randn(2, 2, 5)
    with_, _ = model(x, gamma, embedding=embedding)
    without, _ = model(x, gamma)
    zeros, _ = model(x, gamma, embedding=torch.zeros(2, 3, 5))
    assert (with_ != without).all()
    assert_close(zeros, without)
    padded, _ = model(x, gamma, embedding=torch.cat([embedding, torch.zeros(2, 1, 5)], dim=1))
    assert_close(padded, with_)
    diffusion = GaussianDiffusion(model)
    diffusion(torch.rand(2, 3, 8, 8), embedding=embedding).backward()
    assert model.conditioner.embedding.projection.weight.grad.abs().sum() > 0
    assert diffusion.sample(embedding=embedding, guidance=1.0, steps=2).shape == (2, 3, 8, 8)
    for wrong in (torch.zeros(2, 4, 5), torch.zeros(2, 2, 6), torch.zeros(2, 5)):
        with pytest.raises(UsageError, match="embedding has shape"):
            model(x, gamma, embedding=wrong)
    with pytest.raises(UsageError, match="without embeddings"):
        RIN(**TINY, image_size=8)(x, gamma, embedding=embedding)


def test_dropped_labels_and_embeddings_go_together():
    from rin_video.diffusion.conditions import Conditions
    from rin_video.diffusion.noise import RNG

    torch.manual_seed(0)
    conditions = Conditions(torch.ones(2000, dtype=torch.long), torch.ones(2000, 2, 3)).drop(
        0.3, RNG(2000, torch.device("cpu"))
    )
    gone = conditions.label == -1
    assert gone.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (conditions.embedding[gone] == 0).all()
    assert (conditions.embedding[~gone] == 1).all()
    soft = Conditions(torch.rand(2000, 4)).drop(0.3, RNG(2000, torch.device("cpu"))).label
    assert (soft == 0).all(1).float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert (Conditions(torch.rand(2, 4)).without("label").label == 0).all()


def test_training_with_embeddings_and_with_frames_that_are_always_given(tmp_path):
    """If training always has conditioning frames, previews have them too; unconditional samples would be noise."""
    torch.manual_seed(0)
    clips = torch.rand(4, 3, 8, 8, 8)
    data = [{"x": x, "embedding": torch.randn(2, 5)} for x in clips]
    model = RIN(**TINY, **CLIP, embedding_dim=5, embedding_tokens=2)
    before = model.conditioner.embedding.projection.weight.detach().clone()
    diffusion = GaussianDiffusion(model, known={"first": 1}, known_frames=[5, 5])
    seen = []
    options = {"train_num_steps": 2, "train_batch_size": 2, "save_and_sample_every": 2, "progress": False}
    callback = type("Look", (Callback,), {"on_sample": lambda self, trainer, samples, files: seen.append(samples)})()
    Trainer(diffusion, data, results_folder=tmp_path, num_samples=4, callbacks=[callback], **options).train()
    assert (model.conditioner.embedding.projection.weight != before).any()
    assert (seen[0][:, :, :5] == clips[:, :, :5]).all()


# ---- the command line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run of a model of 4 frames that can be conditioned on frames, with two classes."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = RIN(**TINY, **(CLIP | {"frames": 4, "image_size": 16}), tokenizer="tube+image", num_classes=2)
    config = Config(model.config, DiffusionConfig(known={"none": 1, "first": 1}), DataConfig(classes=["cat", "dog"]))
    save_model(folder / "model", model, config)
    write_video(torch.rand(3, 8, 16, 16), folder / "clip.mp4")
    return folder


def read(path) -> Tensor:
    with open_video(path) as video:
        return video.read(range(video.num_frames)).transpose(0, 1) / 255


def test_contexts_on_the_command_line(run, tmp_path):
    source = read(run / "clip.mp4")
    sample = ["sample", str(run / "model"), "--num", "2", "--steps", "1"]
    context = ["--context", str(run / "clip.mp4")]
    out = tmp_path / "x.npy"
    import numpy as np

    def drawn(*argv: str) -> Tensor:
        assert cli.main([*sample, *argv, "--out", str(out)]) == 0
        return torch.from_numpy(np.load(out))

    predicted = drawn(*context, "--context-frames", "3")
    assert predicted.shape == (2, 3, 4, 16, 16)
    assert (predicted[:, :, :3] == source[:, :3]).all()
    filled = drawn(*context, "--fill", "1:3")
    assert (filled[:, :, [0, 3]] == source[:, [0, 3]]).all()
    assert (filled[:, :, 1] != source[:, 1]).any()
    longer = drawn(*context, "--frames", "13", "--overlap", "1")  # as uint8, because long clips may not fit as floats
    assert longer.shape == (2, 3, 13, 16, 16)
    assert (longer[:, :, :8] == (source * 255).round()).all()
    cli.main([*sample, "--frames", "0", "--size", "8x24", "--out", str(tmp_path / "picture.png"), "--num", "1"])
    image = drawn("--image", str(tmp_path / "picture.png"), "--frames", "6", "--window", "6")
    assert image.shape == (2, 3, 6, 16, 16)
    assert (image[0, :, 0] == image[1, :, 0]).all()
    assert drawn("--frames", "0").shape == (2, 3, 16, 16)
    assert cli.main([*sample, "--frames", "11", "--key-frames", "--out", str(tmp_path / "many")]) == 0
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == ["0000-cat.mp4", "0001-dog.mp4"]
    assert read(tmp_path / "many" / "0001-dog.mp4").shape[1] == 11


def test_mistakes_with_contexts(run, capfd):
    clip = ("--context", str(run / "clip.mp4"))
    for argv, words in (
        ((*clip, "--context-frames", "4"), "--context-frames is 4, but the clips have 4"),
        ((*clip, "--context-frames", "9", "--frames", "20"), "has 8 frames at this stride or rate, not 9"),
        ((*clip, "--fill", "2:9"), "--fill 2:9 is not within a clip of 4 frames"),
        ((*clip, "--fill", "two"), "--fill two is not a range of frames"),
        ((*clip, "--fill", "0:4"), "--fill 0:4 is the complete clip"),
        ((*clip, "--fill", "1:2", "--frames", "8"), "--fill requires a window as long as the clip: use --window 8"),
        (("--fill", "1:2"), "add --context clip.mp4"),
        (("--context-frames", "1"), "add --context clip.mp4"),
        ((*clip, "--image", "x.png"), "--image and --context exclude each other"),
        (("--image", "nowhere.png"), "there is no file nowhere.png"),
        ((*clip, "--frames", "0"), "--context is for clips, but the samples are images"),
        (("--overlap", "2"), "--overlap is for clips longer than a window"),
        (("--frames", "-1"), "--frames is -1"),
        (("--frames", "9", "--window", "9"), "9 is not a multiple of its patch size 2"),
        (("--size", "9"), "9 is not a multiple of its patch size 4"),
        (("--guidance", "2", "--class", "dog"), "was trained without label dropout"),
    ):
        capfd.readouterr()
        assert cli.main(["sample", str(run / "model"), "--num", "1", "--steps", "1", *argv]) == 2, argv
        assert words in capfd.readouterr().err, argv
