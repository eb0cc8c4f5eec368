"""The frames of a clip, the number of clips per file, and the transforms of the pixels."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rin_video.config import DataConfig, data_config
from rin_video.datasets import ClipFolder, ImageFolder
from rin_video.datasets.buckets import Buckets, BucketSampler
from rin_video.datasets.clip_sampler import ClipSampler
from rin_video.datasets.probe import probe_video
from rin_video.datasets.resize_crop import ResizeCrop
from rin_video.datasets.video_info import VideoInfo, pack_table
from rin_video.errors import UsageError


def info(frames: int, fps: float = 8, cuts: tuple[int, ...] = ()) -> VideoInfo:
    return VideoInfo(
        "mov", "h264", frames, fps, (32, 64), 0, frames / fps, 1 / fps, pack_table(range(frames)), pack_table([0]),
        trusted=True, plain=True, cuts=cuts,
    )  # fmt: skip


def draws(windows: ClipSampler, video: VideoInfo, num: int = 200, part: int = 0, parts: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [windows.draw(video, part, parts, rng) for _ in range(num)]


def test_span_whole_samples_frames_over_the_complete_file():
    assert draws(ClipSampler(5, DataConfig(span="whole")), info(41), 1) == [[0, 10, 20, 30, 40]]
    with pytest.raises(UsageError, match="has 4 frames, but 5 are needed"):
        ClipSampler(5, DataConfig(span="whole")).check(Path("a.mp4"), info(4))
    with pytest.raises(UsageError, match="leave out stride"):
        DataConfig(span="whole", stride=2)


def test_over_time_long_files_come_more_often_and_the_parts_cover_the_file():
    windows = ClipSampler(5, DataConfig(sampling="time"))
    assert [windows.count(info(n)) for n in (5, 9, 10, 53)] == [1, 1, 2, 10]
    assert ClipSampler(5, DataConfig(sampling="time", stride=2)).count(info(53)) == 5
    starts = [{clip[0] for clip in draws(windows, info(53), 300, part, 10)} for part in range(10)]
    assert sorted(set.union(*starts)) == list(range(49))
    assert sum(map(len, starts)) == 49  # no start frame belongs to two parts
    assert ClipSampler(5, DataConfig(windows=3)).count(info(53)) == 3


@pytest.mark.parametrize("options", [{}, {"fps": 8.0}, {"stride": 2}])
def test_no_clip_goes_over_a_cut(options):
    windows, video = ClipSampler(5, DataConfig(avoid_cuts=True, **options)), info(40, cuts=(12, 15, 30))
    for clip in draws(windows, video):
        assert len({int(np.searchsorted((12, 15, 30), frame, side="right")) for frame in clip}) == 1
    with pytest.raises(UsageError, match=r"no scene of 5 frames \(cuts at \[3\]"):
        ClipSampler(5, DataConfig(avoid_cuts=True)).check(Path("a.mp4"), info(6, cuts=(3,)))


def test_cuts_are_found(tmp_path, numbered):
    import av

    path = tmp_path / "cuts.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 48, 48, "yuv420p"
        generator = np.random.default_rng(0)
        scenes = [generator.integers(0, 256, (48, 48, 3), dtype=np.uint8) for _ in range(3)]
        for i in range(24):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(scenes[(i >= 7) + (i >= 15)], format="rgb24")))
        container.mux(stream.encode())
    assert probe_video(path, cuts=True).cuts == (7, 15)
    assert probe_video(path).cuts is None
    data = ClipFolder(path, 16, 8, avoid_cuts=True)
    assert {data.frames_of(0, epoch)[0] for epoch in range(30)} == {7, 15, 16}


def test_speed_and_reverse_keep_within_the_file():
    clips = draws(ClipSampler(6, DataConfig(augment_speed=[0.5, 2.0], augment_reverse=True)), info(12))
    lengths = {abs(clip[-1] - clip[0]) for clip in clips}
    assert min(lengths) == 2
    assert max(lengths) > 8
    assert all(0 <= frame < 12 for clip in clips for frame in clip)
    backwards = sum(clip[0] > clip[-1] for clip in clips)
    assert 60 < backwards < 140
    for clip in draws(ClipSampler(6, DataConfig(fps=4.0, augment_speed=[1.5, 1.5])), info(40)):
        assert clip[-1] - clip[0] in (14, 15, 16)
    tight = draws(
        ClipSampler(6, DataConfig(augment_speed=[2.0, 2.0])), info(6), 3
    )  # too short for this speed: the original speed is used
    assert tight == [[0, 1, 2, 3, 4, 5]] * 3


def test_augmentations_are_the_same_for_all_frames():
    still = torch.randint(256, (1, 3, 40, 60), dtype=torch.uint8).expand(5, -1, -1, -1)
    resize_crop = ResizeCrop(16, crop="random", flip=True, crop_scale=(0.4, 1.0), color=1.0)
    seen = []
    for seed in range(12):
        frames = resize_crop(still, np.random.default_rng(seed))
        assert frames.shape == (5, 3, 16, 16)
        assert (frames == frames[:1]).all()
        seen.append(frames[0].float().mean().item())
    assert np.std(seen) > 5
    again = resize_crop(still, np.random.default_rng(3))
    torch.testing.assert_close(again, resize_crop(still, np.random.default_rng(3)))


def test_what_is_enlarged_is_cut_first(monkeypatch):
    """A picture of 20000x1 would otherwise become one of 1,280,000x64, which takes gigabytes."""
    from rin_video.datasets import resize_crop

    monkeypatch.setattr(resize_crop, "resize", lambda *_: pytest.fail("the whole picture is enlarged"))
    wide = torch.arange(20000, dtype=torch.int64).remainder(256).to(torch.uint8).expand(2, 3, 1, 20000)
    cut = ResizeCrop(64)(wide, np.random.default_rng(0))
    assert cut.shape == (2, 3, 64, 64)
    assert int(cut[0, 0, 0, 0]) in (9999 % 256, 10000 % 256)
    monkeypatch.undo()
    noise = torch.randint(256, (2, 3, 30, 41), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for size, corner in (((64, 87), (0, 11)), ((90, 123), (26, 0)), ((71, 97), (7, 33))):
        whole = resize_crop.resize(noise, size)[..., corner[0] : corner[0] + 64, corner[1] : corner[1] + 64]
        torch.testing.assert_close(resize_crop.resize_part(noise, size, corner, (64, 64)), whole, atol=1, rtol=0)


def test_crop_scale_is_the_part_of_the_picture_that_is_seen():
    ramp = torch.arange(200, dtype=torch.uint8).expand(1, 3, 200, 200).contiguous()
    frames = ResizeCrop(50, crop="random", crop_scale=(0.5, 0.5))(ramp, np.random.default_rng(0))
    span = int(frames.max()) - int(frames.min())
    assert 95 <= span <= 100


def test_files_go_to_the_bucket_of_their_aspect_and_length():
    buckets = Buckets(["8x64x64", "16x64x64", "8x48x80", "8x32x32"], rank=3)
    sizes = [(20, 480, 480), (10, 480, 480), (20, 360, 640), (8, 36, 36)]
    assert buckets.assign(sizes) == [1, 0, 2, 3]
    for wrong in ("64", "8x64", "8x0x64", "axbxc"):
        with pytest.raises(UsageError, match="write 16x48x80"):
            Buckets([wrong], rank=3)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_bucket_batches_are_of_one_shape_cover_the_data_and_resume(num_ranks):
    bucket_of = [i % 3 if i < 20 else 0 for i in range(41)]

    def run(rank, first=0, num=40):
        sampler = BucketSampler(bucket_of, 4, seed=5, first_batch=first, rank=rank, num_ranks=num_ranks)
        stream = iter(sampler)
        return sampler, [next(stream) for _ in range(num)]

    ranks = [run(rank) for rank in range(num_ranks)]
    per_epoch = ranks[0][0].batches_per_epoch
    for batches in zip(*(batches for _, batches in ranks), strict=True):
        assert len({bucket_of[index] for batch in batches for _, index in batch}) == 1
        assert {len(batch) for batch in batches} == {4}
    seen = {index for _, batches in ranks for batch in batches[:per_epoch] for _, index in batch}
    assert seen == set(range(41))
    assert {epoch for _, batches in ranks for batch in batches[:per_epoch] for epoch, _ in batch} == {0}
    assert run(0, first=17, num=23)[1] == ranks[0][1][17:]


def test_buckets_train_several_shapes(tmp_path, numbered):
    from rin_video import RIN, GaussianDiffusion, Trainer
    from rin_video.config import Config, ModelConfig

    (tmp_path / "data").mkdir()
    numbered(tmp_path / "data/wide.mp4", size=(32, 64), frames=9)
    numbered(tmp_path / "data/square.mp4", size=(64, 64), frames=9)
    model = ModelConfig(
        dim=16, dim_latent=16, num_latents=4, depth=1, num_heads=2, latent_num_heads=2, image_size=16, frames=4,
        patch_size=[2, 8, 8], position="sincos",
    )  # fmt: skip
    config = Config(model=model, data=DataConfig(buckets=["4x16x16", "4x16x32"], num_workers=0))
    config.train.train_num_steps, config.train.train_batch_size = 4, 2
    config.sample.num_samples, config.sample.steps = 1, 1
    trainer = Trainer(
        GaussianDiffusion(RIN(model)), tmp_path / "data", results_folder=tmp_path / "run", config=config, progress=False
    )
    batches = trainer.batches()
    shapes = {tuple(next(batches).x.shape) for _ in range(4)}
    assert shapes == {(2, 3, 4, 16, 16), (2, 3, 4, 16, 32)}
    trainer.train()


def test_buckets_of_images(tmp_path):
    for name, size in {"square": (20, 22), "wide": (40, 20)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    data = ImageFolder(tmp_path, 8, buckets=["8x8", "8x16"])
    assert [data[i]["x"].shape for i in range(2)] == [(3, 8, 8), (3, 8, 16)]


@pytest.mark.parametrize(
    ("option", "value"),
    [("crop_scale", [0.8, 0.5]), ("augment_speed", [0, 1]), ("span", "half"), ("sampling", "x"), ("augment_color", 2)],
)
def test_wrong_options_are_named(option, value):
    with pytest.raises(UsageError, match=option):
        data_config(**{option: value})
    with pytest.raises(UsageError, match="did you mean stride"):
        data_config(strid=1)
