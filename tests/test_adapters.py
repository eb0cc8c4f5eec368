"""Users' datasets: common formats work, others raise one-line errors; epochs and classes reach inner datasets."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

from rin_video import RIN, GaussianDiffusion, Trainer, UsageError
from rin_video.config import DataConfig
from rin_video.datasets import ClipFolder, ImageFolder
from rin_video.datasets.adapters import BatchCheck, adapt
from rin_video.datasets.loading import TrainLoader
from rin_video.datasets.mixed import MixedDataset

TINY = {"dim": 32, "num_latents": 6, "dim_latent": 32, "depth": 1, "num_heads": 2, "latent_num_heads": 2,
        "image_size": 8, "patch_size": 4}  # fmt: skip
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
FIRST = torch.from_numpy(PIXELS).permute(2, 0, 1)  # (C, H, W)
CLIP = torch.stack([FIRST, FIRST.flip(1), FIRST.flip(2), FIRST], dim=1)  # (C, F, H, W)


class Stream(IterableDataset):
    def __iter__(self):
        yield FIRST


class Streamed:
    """A stream without length and indexing, like `datasets.load_dataset(..., streaming=True)`."""

    def __iter__(self):
        yield {"image": FIRST}


def train(tmp_path, data, classes=0, **options):
    torch.manual_seed(0)
    diffusion = GaussianDiffusion(RIN(**TINY, num_classes=classes), timesteps=2)
    defaults = {"train_num_steps": 1, "train_batch_size": 4, "num_samples": 1}
    run = Trainer(diffusion, data, results_folder=tmp_path / "run", progress=False, **defaults | options)
    run.config.data.num_workers = 0
    run.train()
    return run


@pytest.mark.parametrize(
    "item",
    [
        FIRST,
        FIRST.double() / 255,
        FIRST.half() / 255,
        FIRST.long(),
        PIXELS,
        PIXELS.astype(np.float64) / 255,
        PIXELS.astype(">i4"),
        np.asfortranarray(PIXELS)[::-1][::-1],
        Image.fromarray(PIXELS),
        Image.fromarray(np.concatenate([PIXELS, np.full((8, 8, 1), 255, np.uint8)], 2), "RGBA"),
        {"image": Image.fromarray(PIXELS), "label": None},
        {"pixel_values": FIRST, "text": "a cat"},
        {"__key__": "0001", "png": PIXELS, "json": {}},
        (FIRST, "a caption"),
        (FIRST, "a caption", torch.zeros(2, 30)),
        [Image.fromarray(PIXELS), np.int64(3)],
    ],
)
def test_items_of_any_usual_form_are_the_same_picture(item):
    x = adapt([item], [(3, 8, 8)])[0]["x"]
    values = x if x.dtype == torch.uint8 else x * 255
    torch.testing.assert_close(values.float(), FIRST.float(), rtol=0, atol=0.1)
    assert x.dtype in (torch.uint8, torch.float32)
    assert x.is_contiguous()


@pytest.mark.parametrize(
    "item",
    [CLIP, CLIP.transpose(0, 1), CLIP.permute(1, 2, 3, 0), CLIP.permute(1, 2, 3, 0).numpy(), {"video": CLIP, "cls": 1},
     [Image.fromarray(frame) for frame in CLIP.permute(1, 2, 3, 0).numpy()]],
)  # fmt: skip
def test_clips_with_their_channels_anywhere(item):
    assert torch.equal(adapt([item], [(3, 4, 8, 8)])[0]["x"], CLIP)


def test_pictures_of_other_modes_and_grey_ones():
    grey = Image.fromarray(PIXELS[..., 0], "L")
    assert torch.equal(adapt([grey], [(3, 8, 8)])[0]["x"], FIRST[:1].expand(3, -1, -1))
    assert torch.equal(adapt([grey, PIXELS[..., 0]], [(1, 8, 8)])[1]["x"], FIRST[:1])
    assert torch.equal(adapt([torch.tensor([[True, False]])], [(1, 1, 2)])[0]["x"], torch.tensor([[[1.0, 0.0]]]))


@pytest.mark.parametrize(
    ("label", "expected"),
    [(2, 2), (np.int64(2), 2), (torch.tensor(2), 2), (np.array([2]), 2), (2.0, 2), ("c", 2), (None, -1), (-1, -1)],
)
def test_labels_of_any_usual_form(label, expected):
    class Named(list):
        classes = ("a", "b", "c")

    data = adapt(Named([(FIRST, label), {"img": FIRST, "target": label}]))
    assert [data[0]["label"], data[1]["label"]] == [expected, expected]
    assert data.classes == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([{"a": 1, "b": 2}], "sample 0 is a dict of a, b: name its data x or image"),
        (["cats/1.png"], r"sample 0 is of type str \('cats/1.png'\): pass the folder to the Trainer"),
        ([{"png": b"\x89PNG"}], "sample 0 is of type bytes .*: decode it in the dataset"),
        ([None], "sample 0 is of type NoneType"),
        ([torch.tensor([[[300]]])], "integers from 300 to 300: return 0 to 255"),
        ([torch.rand(1, 28, 28)], "sample 0 is 1x28x28, the model takes 3x8x8: resize and crop it"),
        ([(FIRST, 1.5)], r"sample 0 has the label 1\.5"),
        (Stream(), "a Stream only iterates in one order"),
        (Streamed(), "a Streamed only iterates in one order"),
        ((FIRST for _ in range(3)), "a generator only iterates in one order"),
        (DataLoader(Stream()), "a Stream only iterates in one order"),
        ({"train": [FIRST], "test": [FIRST]}, r"a dict of train, test: pass one of them, data\[\.\.\.\]"),
        ([], "the list is empty: pass at least one sample"),
        (torch.zeros(0, 3, 8, 8), "the Tensor is empty"),
        (Subset([FIRST], []), "the Subset is empty"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line(tmp_path, data, said):
    with pytest.raises(UsageError, match=said) as caught:
        train(tmp_path, data)
    assert "\n" not in str(caught.value)


def test_streams_of_webdataset_are_refused():
    webdataset = pytest.importorskip("webdataset")
    for stream in (webdataset.WebDataset("x.tar", shardshuffle=False), webdataset.WebLoader(Stream())):
        with pytest.raises(UsageError, match=r"shards 'x/\{000\.\.123\}\.tar'"):
            adapt(stream)


def test_items_of_several_sizes_are_named(tmp_path):
    sizes = [torch.rand(3, 8, 8)] * 3 + [torch.rand(3, 8, 12)]
    with pytest.raises(UsageError, match=r"sample 3 is 3x8x12, the model takes 3x8x8: resize and crop it"):
        train(tmp_path, sizes)
    data = adapt(sizes, [(3, 8, 8)])
    with pytest.raises(UsageError, match=r"sample 3 is 3x8x12, another sample 3x8x8: .* equal sizes"):
        [data[i] for i in range(4)]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_dataset_ends_the_run_in_one_line_with_any_number_of_workers(workers):
    data = adapt([FIRST, {"a": 1}, FIRST, FIRST])
    with pytest.raises(UsageError, match=r"^sample 1 is a dict of a: name its data x or image$"):
        for _ in zip(range(8), TrainLoader(data, DataConfig(num_workers=workers), 2, seed=0), strict=False):
            pass


def test_the_dataset_of_a_loader_is_used_and_this_is_logged(tmp_path, caplog):
    data = TensorDataset(torch.rand(5, 3, 8, 8), torch.arange(5))
    run = Trainer(GaussianDiffusion(RIN(**TINY)), DataLoader(data, batch_size=2), results_folder=tmp_path)
    assert run.dataset.draw(4, 0)["label"] == 4
    assert "only the DataLoader's dataset is used, not its batch size, order and collate_fn" in caplog.text


@pytest.mark.parametrize(
    ("low", "high", "dtype", "said"),
    [
        (-1, 1, torch.float32, r"from -1 to 1, but training requires \[0, 1\]: leave out Normalize"),
        (0, 255, torch.float32, r"from 0 to 255, but training requires \[0, 1\]: divide by 255"),
        (-2.1, 2.6, torch.float64, r"from -2\.1 to 2\.6, but training requires \[0, 1\]: leave out Normalize"),
    ],
)
def test_values_outside_the_range_are_refused(tmp_path, low, high, dtype, said):
    x = torch.rand(8, 3, 8, 8, dtype=dtype) * (high - low) + low
    x[:, 0, 0, 0], x[:, 0, 0, 1] = low, high
    with pytest.raises(UsageError, match=said):
        train(tmp_path, x)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.tensor([-0.02, 1.04]), "from -0.02 to 1.04, slightly outside"),
        (torch.tensor([0.0, 1 / 255]), "almost black"),
        (torch.tensor([0, 1], dtype=torch.uint8), "almost black"),
        (torch.tensor([0.0, 1.0]), "no sample of the first batches has a label"),
    ],
)
def test_unusual_values_are_logged_once(x, said, caplog):
    check = BatchCheck(3)
    for _ in range(20):
        check(x[:, None], torch.tensor([-1, -1]))
    assert Counter(said in record.message for record in caplog.records)[True] == 1


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([1, 2, 3, 1], r"the labels range from 1 to 3, but the model has 3 classes.*Labels count from 0: subtract 1"),
        ([0, 1, 2, 7], r"the labels range from 0 to 7, but the model has 3 classes: .*from 0 to 2, or -1 for no label"),
        ([0, 1, 2, -5], r"the labels range from -5 to 2"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_labels_that_the_model_does_not_have_stop_the_run(tmp_path, labels, said, workers):
    data = TensorDataset(torch.rand(4, 3, 8, 8), torch.tensor(labels))
    diffusion = GaussianDiffusion(RIN(**TINY, num_classes=3), timesteps=2)
    run = Trainer(diffusion, data, results_folder=tmp_path, progress=False, train_batch_size=4, train_num_steps=2)
    run.config.data.num_workers = workers
    with pytest.raises(UsageError, match=said):
        run.train()


# ---- Subset, random_split, ConcatDataset


def pictures(folder, *classes, count=3):
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return ImageFolder(folder, 8, crop="random", seed=1)


def test_epochs_and_classes_reach_the_set_within(tmp_path):
    data = pictures(tmp_path, "a", "b")
    half, other = random_split(data, [2, 4], torch.Generator().manual_seed(0))
    for part in (half, Subset(Subset(data, [5, 0, 3]), [2, 0]), ConcatDataset([other, half])):
        ours = adapt(part)
        assert ours.classes == ["a", "b"]
        assert not torch.equal(ours.draw(0, 0)["x"], ours.draw(0, 3)["x"])
    ours, joined = adapt(half), adapt(ConcatDataset([other, half]))
    for index in range(2):
        for epoch in (0, 7):
            wanted = data.draw(half.indices[index], epoch)
            for item in (ours.draw(index, epoch), joined.draw(4 + index, epoch)):
                assert torch.equal(item["x"], wanted["x"])
                assert item["label"] == wanted["label"]
        assert ours.name_of(index) == joined.name_of(4 + index) == data.name_of(half.indices[index])


def test_windows_of_clips_move_on_within_a_split(tmp_path, numbered, numbers):
    numbered(tmp_path / "a.mp4", frames=20)
    data = adapt(Subset(ClipFolder(tmp_path, (32, 64), 3), [0]))
    starts = {numbers(data.draw(0, epoch)["x"].transpose(0, 1))[0] for epoch in range(8)}
    assert len(starts) > 3


def test_classes_of_joined_sets_are_joined_by_name(tmp_path):
    one, two = pictures(tmp_path / "1", "b", "c"), pictures(tmp_path / "2", "a", "b")
    joined = adapt(ConcatDataset([one, two, TensorDataset(torch.rand(2, 3, 8, 8))]))
    assert joined.classes == ["a", "b", "c"]
    assert [joined.draw(i, 0)["label"] for i in range(len(joined))] == [1] * 3 + [2] * 3 + [0] * 3 + [1] * 3 + [-1] * 2
    numbered_labels = [TensorDataset(torch.rand(2, 3, 8, 8), torch.tensor([i, 3])) for i in range(2)]
    assert [item["label"] for item in adapt(ConcatDataset(numbered_labels))] == [0, 3, 1, 3]


def test_buckets_stay_within_a_split(tmp_path):
    pictures(tmp_path, "a", "b")
    data = ImageFolder(tmp_path, 8, buckets=["8x8", "8x12"])
    part = adapt(Subset(data, [4, 1]))
    assert part.bucket_of == [data.bucket_of[4], data.bucket_of[1]]
    batch = next(TrainLoader(part, DataConfig(num_workers=0), 2, seed=0))
    assert batch.x.shape == (2, 3, 8, 12)
    with pytest.raises(UsageError, match="different buckets"):
        adapt(ConcatDataset([data, ImageFolder(tmp_path, 8)]))


def test_a_dataset_with_set_epoch_gets_the_epoch():
    class Turning(Dataset):
        epoch = 0

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return FIRST.roll(self.epoch, -1)

    data = adapt(Subset(Turning(), [1]))
    assert [torch.equal(data.draw(0, epoch)["x"], FIRST.roll(epoch, -1)) for epoch in (2, 0, 5)] == [True] * 3


def test_a_mixture_takes_parts_of_any_form():
    clips = TensorDataset(torch.rand(2, 3, 4, 8, 8), torch.tensor([0, 1]))
    data = MixedDataset(clips, [(Image.fromarray(PIXELS), "text")])
    assert torch.equal(data.draw(2, 0)["x"], FIRST)
    assert data.draw(1, 0)["label"] == -1
