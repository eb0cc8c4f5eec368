"""Images are read as displayed, and items depend on (seed, epoch, index) alone."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rin_video.datasets.extensions import IMAGE_EXTENSIONS
from rin_video.datasets.folders import detect_kind, find_files
from rin_video.datasets.images import ImageFolder, ResizeCrop, SampleRNG, read_image
from rin_video.errors import UsageError


def colour(path):
    return read_image(path)[:, 2, 3].tolist()


def test_modes_are_converted_as_a_person_expects(tmp_path):
    size = (8, 6)
    Image.new("RGBA", size, (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("LA", size, (0, 128)).save(tmp_path / "half.png")
    Image.new("RGB", size, (10, 20, 30)).quantize(4).save(tmp_path / "palette.png")
    Image.new("CMYK", size, (0, 255, 255, 0)).save(tmp_path / "print.tif")
    Image.fromarray(np.full((6, 8), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", size, 1).save(tmp_path / "bits.png")
    assert colour(tmp_path / "clear.png") == [255, 255, 255]
    assert colour(tmp_path / "half.png") == [127, 127, 127]
    assert colour(tmp_path / "palette.png") == [10, 20, 30]
    assert colour(tmp_path / "print.tif") == [255, 0, 0]
    assert colour(tmp_path / "deep.png") == [128, 128, 128]
    assert colour(tmp_path / "bits.png") == [255, 255, 255]
    assert read_image(tmp_path / "clear.png", 4)[:, 0, 0].tolist() == [255, 0, 0, 0]
    assert read_image(tmp_path / "deep.png", 1).shape == (1, 6, 8)
    Image.fromarray(np.full((6, 8), 3.5, dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UsageError, match=r"3\.5"):
        read_image(tmp_path / "float.tif")


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (40, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 40, 20)
    assert "40x20" in ImageFolder(tmp_path, 8).describe()


def test_frames_reduce_to_a_single_pixel():
    """torch 2.14 fails an assertion in this case for uint8."""
    frames = torch.tensor([[0, 100], [50, 90]], dtype=torch.uint8).expand(2, 3, 2, 2)
    assert torch.equal(ResizeCrop(1)(frames, np.random.default_rng(0)), torch.full((2, 3, 1, 1), 60, dtype=torch.uint8))


@settings(deadline=None, max_examples=30)
@given(*[st.integers(1, 40)] * 4, st.sampled_from(["center", "random"]))
def test_resize_crop_fills_the_size_and_keeps_the_aspect(height, width, H, W, crop):
    resize_crop = ResizeCrop((H, W), crop=crop, flip=True)
    frames = torch.full((2, 3, height, width), 7, dtype=torch.uint8)
    out = resize_crop(frames, np.random.default_rng(0))
    torch.testing.assert_close(out, torch.full((2, 3, H, W), 7, dtype=torch.uint8))


def test_resize_crop_of_the_right_size_is_the_identity():
    frames = torch.randint(256, (2, 3, 9, 12), dtype=torch.uint8)
    resize_crop = ResizeCrop((9, 12), crop="random", flip=False)
    torch.testing.assert_close(resize_crop(frames, np.random.default_rng(0)), frames)


@given(*[st.integers(0, 2**31)] * 3)
def test_chance_is_a_function_of_seed_epoch_index(seed, epoch, index):
    one, other = SampleRNG(seed), pickle.loads(pickle.dumps(SampleRNG(seed)))
    np.random.seed(0)
    torch.manual_seed(0)
    assert one.draw(index, epoch).random() == other.draw(index, epoch).random()
    assert one.draw(index, epoch).random() != other.draw(index, epoch + 1).random()


def test_classes_labels_skips_and_enlargement_are_reported(tmp_path):
    for name, size in (("dog/2.png", 9), ("cat/1.PNG", 30), ("cat/10.jpg", 30), ("cat/.hidden.png", 30)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (size, size)).save(tmp_path / name, format="PNG")
    (tmp_path / "dog/broken.png").write_bytes(b"no image")
    data = ImageFolder(tmp_path, 16)
    assert data.classes == ["cat", "dog"]
    assert [item["label"] for item in (data[0], data[1], data[-1])] == [0, 0, 1]
    assert data[0]["x"].shape == data.shape == (3, 16, 16)
    assert [path.name for path, _ in data.skipped] == ["broken.png"]
    said = data.describe()
    assert "3 images, 9x9 to 30x30, 2 classes: cat, dog" in said
    assert "1 of 3 are smaller than 16x16 and are enlarged" in said
    assert "skipped" in said
    assert "broken.png" in said
    with pytest.raises(IndexError):
        data[3]
    Image.new("RGB", (20, 20)).save(tmp_path / "outside.png")
    assert [item["label"] for item in ImageFolder(tmp_path, 16)] == [0, 0, 1, -1]


def test_errors_report_what_a_folder_contains(tmp_path):
    with pytest.raises(UsageError, match="there is no file or folder"):
        find_files(tmp_path / "nowhere", IMAGE_EXTENSIONS)
    with pytest.raises(UsageError, match=r"contains no \.png"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "a.gif").touch()
    assert detect_kind(tmp_path) == "video"
    with pytest.raises(UsageError, match="it contains 1 clip: use --frames 16"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "b.JPG").touch()
    with pytest.raises(UsageError, match="1 image and 1 clip"):
        detect_kind(tmp_path)
    with pytest.raises(UsageError, match=r"b\.JPG is empty: download the file again"):
        ImageFolder(tmp_path, 8)
    (tmp_path / "a.gif").unlink()
    assert detect_kind(tmp_path) == "image"


@pytest.mark.parametrize("wrong", [{"channels": 2}, {"crop": "left"}, {"image_size": 0}, {"seed": -1}])
def test_wrong_settings_are_usage_errors(tmp_path, wrong):
    with pytest.raises(UsageError):
        ImageFolder(**{"root": tmp_path, "image_size": 8, **wrong})
