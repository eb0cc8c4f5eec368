"""Sharing of models: pushing to a fake hub, downloading from it, and the errors."""

import logging
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from fake_hub import running_hub
from huggingface_hub import constants
from tiny_run import TINY, make_trainer
from torch.testing import assert_close
from torch.utils.data import Dataset

from rin_video import RIN, GaussianDiffusion, UsageError, cli
from rin_video.hub import fetch
from rin_video.model.rin import load_model
from rin_video.reports.card import model_card, push_to_hub
from rin_video.weights import find_model, shipped_models


class Clips(Dataset):
    classes = ("left", "right")

    def __len__(self):
        return 5

    def __getitem__(self, index):
        return {"x": torch.rand(3, 4, 8, 8, generator=torch.Generator().manual_seed(index)), "label": index % 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "mine"
    model = {"frames": 4, "patch_size": [2, 4, 4], "num_classes": 2}
    trainer = make_trainer(folder, model=model, data=Clips(), train_num_steps=4, save_and_sample_every=2)
    trainer.config.data.path = "/home/somebody/secret/clips"
    trainer.train()
    return folder


def point_at(url, monkeypatch):
    """Set the endpoint, as HF_ENDPOINT does when huggingface_hub is imported."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The fake hub with alice's token and an empty cache, in an empty working directory."""
    with running_hub() as hub:
        point_at(hub.url, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_writer")
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        yield hub


def shared(run) -> dict[str, bytes]:
    """A run that was pushed to the hub."""
    return {name: (run / name).read_bytes() for name in ("config.yaml", "model.safetensors")}


def front_matter(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---")[1])


def test_a_run_is_pushed_and_sampled_from(run, hub, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="rin_video"):
        assert cli.main(["push", str(run), "alice/balls", "--license", "mit", "--private"]) == 0
    assert f"{hub.url}/alice/balls: rin-video sample alice/balls" in caplog.text
    assert hub.created["alice/balls"]["visibility"] == "private"
    files = list(hub.repos["alice/balls"].values())[-1]
    assert set(files) == {
        ".gitattributes", "README.md", "config.yaml", "model.safetensors", "samples.mp4", "samples.png"
    }  # fmt: skip
    assert not any(b"somebody" in content for content in files.values())
    assert files["samples.mp4"] == (run / "samples/step-00000004.mp4").read_bytes()

    assert cli.main(["sample", "alice/balls", "--num", "2", "--steps", "2"]) == 0
    assert (tmp_path / "here/samples.mp4").is_file()
    there, here = (GaussianDiffusion.from_pretrained(source) for source in ("alice/balls", run))
    assert_close(there.model.state_dict(), here.model.state_dict(), rtol=0, atol=0)
    assert there.config == here.config
    assert load_model("alice/balls")[1].data.classes == ["left", "right"]


def test_the_card_describes_how_the_model_was_made(run):
    text = model_card(run, "alice/balls")
    assert front_matter(text.encode())["library_name"] == "rin-video"
    assert "license" not in front_matter(text.encode())
    for words in ("generates clips of 4x8x8", "| data | clips |", "| classes | left, right |", "| steps | 4 |",
                  "| batch | 8 |", "(samples.png)", "rin-video sample alice/balls", "train_lr: 0.001", "torch 2.",
                  "Not chosen yet"):  # fmt: skip
        assert words in text, words


def test_what_people_wrote_into_the_card_stays(run, hub):
    hub.commit("alice/balls", {"README.md": b"mine"})
    push_to_hub(run, "alice/balls")
    assert list(hub.repos["alice/balls"].values())[-1]["README.md"] == b"mine"
    push_to_hub(run, "alice/balls", license="mit", new_card=True)
    assert front_matter(list(hub.repos["alice/balls"].values())[-1]["README.md"])["license"] == "mit"


def test_models_without_a_run(hub, tmp_path):
    diffusion = GaussianDiffusion(RIN(**TINY), timesteps=7, objective="x0")
    diffusion.save_pretrained(tmp_path / "saved")
    assert GaussianDiffusion.from_pretrained(tmp_path / "saved").config == diffusion.config
    assert push_to_hub(diffusion, "alice/one").endswith("alice/one")
    assert GaussianDiffusion.from_pretrained("alice/one").config == diffusion.config
    push_to_hub(diffusion.model, "alice/two")
    assert_close(RIN.from_pretrained("alice/two").state_dict(), diffusion.model.state_dict(), rtol=0, atol=0)
    with pytest.raises(UsageError, match="save_pretrained requires a RIN"):
        GaussianDiffusion(torch.nn.Identity(), shape=(1,)).save_pretrained(tmp_path / "other")


def test_models_of_the_package_need_neither_folder_nor_network(run, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped_models() == ["demo"]
    weights = find_model("demo") / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    assert cli.main(["sample", "demo", "--num", "1", "--steps", "1"]) == 0
    assert [path.name for path in tmp_path.glob("samples*")] == ["samples.mp4"]  # nothing is written to the package
    assert not hub.asked
    shutil.copytree(run, "demo")
    assert find_model("demo").resolve() == tmp_path / "demo"


def test_a_folder_of_that_name_comes_first(run, hub):
    shutil.copytree(run, "alice/balls")
    assert cli.main(["sample", "alice/balls", "--num", "1", "--steps", "1"]) == 0
    assert not hub.asked
    with pytest.raises(UsageError, match=r"alice has no folder bals: for the hub, write hf:alice/bals"):
        fetch("alice/bals")
    assert not hub.asked  # a misspelt folder name is not sent to the hub
    hub.commit("alice/balls", shared(run))
    assert fetch("hf:alice/balls").is_dir()


def test_revisions(run, hub):
    old = hub.commit("alice/balls", shared(run))
    hub.commit("alice/balls", {"config.yaml": b"model: {dim: 8}\n"})
    assert fetch(f"alice/balls@{old}").name == old
    assert load_model(f"alice/balls@{old}")
    with pytest.raises(UsageError, match="it has no revision v9"):
        fetch("alice/balls@v9")


def test_only_our_two_files_are_ever_fetched(run, hub):
    hub.commit("alice/balls", {"pytorch_model.bin": b"a pickle", "code.py": b"raise SystemExit"} | shared(run))
    folder = fetch("alice/balls")
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "model.safetensors"]
    assert {path.split("/")[-1] for _, path in hub.asked} == {"config.yaml", "model.safetensors"}

    hub.commit("bob/pickled", {"pytorch_model.bin": b"a pickle", "config.yaml": b"model: {dim: 8}\n"})
    with pytest.raises(UsageError, match=r"it lacks config\.yaml or model\.safetensors"):
        fetch("bob/pickled")


def test_a_downloaded_model_works_offline(run, hub, monkeypatch):
    hub.commit("alice/balls", shared(run))
    folder = fetch("alice/balls")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch("alice/balls") == folder
    with pytest.raises(UsageError, match="cannot be reached"):
        fetch("alice/other")


@pytest.mark.parametrize(
    ("repo", "message"),
    [
        ("bob/missing", "could not be fetched: it does not exist or is private"),
        ("gated/model", "its owner approves access requests"),
        ("bob/bert", r"is not a model of rin-video: .*unknown key hidden_size"),
        ("bob/empty", r"it lacks config\.yaml or model\.safetensors: it is not a model of rin-video"),
        ("a/b/c", "there is no folder a/b/c: pass the folder of a run, or a hub id user/name"),
        ("../up", "there is no folder"),
        ("bob/--x", "could not be fetched: "),
    ],
)
def test_errors_of_downloads(hub, capfd, repo, message):
    hub.commit("gated/model", {"config.yaml": b""})
    hub.commit("bob/bert", {"config.yaml": b"hidden_size: 8\n"})
    hub.commit("bob/empty", {"notes.txt": b""})
    assert cli.main(["sample", repo]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert re.search(message, lines[0])


def test_errors_of_pushes(run, hub, tmp_path, monkeypatch):
    for folder, repo, message in [
        (run, "balls", "balls is not a valid name on the hub: use user/name"),
        (run, "alice/balls@v1", "is not a valid name on the hub"),
        (run, "bob/balls", "could not be pushed to the hub: your token has no permission"),
        (tmp_path / "none", "alice/balls", "does not exist"),
        (tmp_path, "alice/balls", r"has no config\.yaml"),
    ]:
        with pytest.raises(UsageError, match=message):
            push_to_hub(folder, repo)
    for token in ("hf_reader", "hf_unknown"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(UsageError, match="your token has no permission"):
            push_to_hub(run, "alice/balls")
    assert not hub.repos


def test_a_model_cannot_run_commands(run, hub, tmp_path, capfd):
    """Its config may contain the path of the data, but comes from another person."""
    config = (run / "config.yaml").read_text()
    config = config.replace("path: /home/somebody/secret/clips", f"path: 'pipe:touch {tmp_path / 'executed'}'")
    config = config.replace("data:\n", "data:\n  allow_pipe: true\n")
    assert "pipe:touch" in config
    assert "allow_pipe: true" in config
    hub.commit("mallory/model", shared(run) | {"config.yaml": config.encode()})
    assert cli.main(["diagnose", "mallory/model"]) == 2
    assert "allow_pipe" in capfd.readouterr().err
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow  # huggingface_hub retries for a while
def test_no_network(run, hub, monkeypatch):
    point_at("http://127.0.0.1:9", monkeypatch)
    with pytest.raises(UsageError, match="the hub cannot be reached"):
        push_to_hub(run, "alice/balls")
    with pytest.raises(UsageError, match="the hub cannot be reached"):
        fetch("alice/balls")


@pytest.mark.slow
def test_the_command_with_the_hub_of_the_environment(run, hub, tmp_path):
    """Only HF_ENDPOINT, HF_TOKEN and HF_HOME are set, as a user would."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    code = "import sys; from rin_video.cli import main; sys.exit(main())"
    for words in (["push", str(run), "alice/balls"], ["sample", "alice/balls", "--num", "1", "--steps", "1"]):
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(command, cwd=tmp_path / "here", env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "here/samples.mp4").is_file()
