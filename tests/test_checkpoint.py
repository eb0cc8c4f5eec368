"""Checkpoints are atomic and verified, and safe against disk errors and malicious changes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import TINY, make_trainer
from torch.testing import assert_close

from rin_video import RIN, GaussianDiffusion, UsageError
from rin_video.config_files import load_config
from rin_video.model.rin import load_model
from rin_video.tensor_files import contributing, tensors_digest, write_tensors
from rin_video.training.state import load_state, newest_state, save_state, saved_states
from rin_video.weights import read_metadata

STATES = [{"step": step, "numbers": torch.full((50,), float(step))} for step in (1, 2, 3)]


@pytest.fixture
def run(tmp_path) -> Path:
    for state in STATES:
        save_state(tmp_path / "checkpoints" / f"step-{state['step']:08d}", state)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    make_trainer(folder, train_num_steps=2).train()
    return folder


def damage_tail(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def damage_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", [damage_tail, damage_bit, Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_damaged_checkpoint_is_skipped_and_named(run, name, harm, caplog):
    harm(run / "checkpoints/step-00000003" / name)
    folder, state = newest_state(run)
    assert state["step"] == 2
    assert folder.name == "step-00000002"
    assert "step-00000003 is damaged" in caplog.text


def test_an_unfinished_checkpoint_is_skipped_and_named(run, caplog):
    os.rename(run / "checkpoints/step-00000003", run / "checkpoints/step-00000003.tmp")
    assert newest_state(run)[1]["step"] == 2
    assert "step-00000003.tmp: the run was stopped while it was being written" in caplog.text
    save_state(run / "checkpoints/step-00000003", STATES[2])
    assert newest_state(run)[1]["step"] == 3
    assert not list(run.glob("checkpoints/*.tmp"))


def test_if_all_checkpoints_are_damaged_nothing_is_overwritten(run):
    for folder in saved_states(run):
        damage_bit(folder / "state.safetensors")
    with pytest.raises(UsageError, match="none of the 3 checkpoints"):
        newest_state(run)
    assert len(saved_states(run)) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="file-size limits are POSIX")
def test_a_full_disk_is_reported_and_the_previous_checkpoint_is_complete(tmp_path):
    """The file-size limit lies between the sizes of the second and the third checkpoint, which is larger."""
    code = f"""
import resource, sys, torch
from pathlib import Path
from rin_video import UsageError
from rin_video.training.state import load_state, save_state
run = Path({str(tmp_path)!r})
save_state(run / "step-1", {{"x": torch.ones(1000)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_state(run / "step-2", {{"x": torch.ones(100_000)}})
except UsageError as error:
    print(error)
print(sorted(path.name for path in run.iterdir()), len(load_state(run / "step-1")["x"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    error, left = done.stdout.splitlines()
    assert "step-2 could not be written" in error
    assert "B are free" in error
    assert "free some space" in error
    assert left == "['step-1'] 1000"


def test_tied_weights_and_views_are_written_once_each(tmp_path):
    x = torch.arange(6.0)
    save_state(tmp_path / "state", {"a": x, "b": x, "c": x[2:4]})
    again = load_state(tmp_path / "state")
    assert again["a"].equal(x)
    assert again["b"].equal(x)
    assert again["c"].equal(x[2:4])


# ---- weights for use


def test_a_flipped_bit_in_the_weights_is_refused(trained, tmp_path):
    damaged = bytearray((trained / "model.safetensors").read_bytes())
    damaged[-100] ^= 1
    (tmp_path / "model.safetensors").write_bytes(damaged)
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    with pytest.raises(UsageError, match=r"model\.safetensors is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"), [("num_heads: 2", "num_heads: 4"), ("objective: v", "objective: eps"), ("scale: 1.0", "scale: 0.5")]
)
def test_weights_with_other_options_are_refused(trained, tmp_path, old, new):
    """num_heads changes no shape, and the objective does not affect the weights at all."""
    (tmp_path / "model.safetensors").write_bytes((trained / "model.safetensors").read_bytes())
    text = (trained / "config.yaml").read_text()
    assert old in text
    (tmp_path / "config.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError, match=r"config\.yaml has .*but model\.safetensors was trained with"):
        load_model(tmp_path)
    (tmp_path / "config.yaml").write_text(text.replace("guidance_rescale: 0.0", "guidance_rescale: 0.5"))
    assert (
        load_model(tmp_path)[1].sample.guidance_rescale == 0.5
    )  # options that are not part of the model may be edited


def test_foreign_weights_load_where_they_fit_and_are_refused_where_not(trained, tmp_path):
    tensors = load_file(trained / "model.safetensors")
    (tmp_path / "config.yaml").write_text((trained / "config.yaml").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    assert isinstance(load_model(tmp_path)[0], RIN)
    save_file({name: value[:1] for name, value in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match="does not fit"):
        load_model(tmp_path)


def test_old_states_go_and_every_mth_stays(tmp_path):
    make_trainer(tmp_path, train_num_steps=12, save_and_sample_every=2, keep_checkpoints=2, keep_every=4).train()
    assert [int(folder.name[5:]) for folder in saved_states(tmp_path)] == [4, 8, 10, 12]
    assert load_config(tmp_path / "config.yaml").train.keep_every == 4
    assert json.loads((tmp_path / "run.json").read_text())["processes"] == 1


class Part:
    """A sharded tensor that counts how often it was gathered."""

    def __init__(self) -> None:
        self.value, self.gathered = torch.arange(4.0), 0
        self.dtype, self.shape, self.numel = self.value.dtype, self.value.shape, self.value.numel

    def detach(self) -> "Part":
        return self

    def full_tensor(self) -> torch.Tensor:
        self.gathered += 1
        return self.value


def test_a_process_that_cannot_write_still_contributes_its_parts(tmp_path, monkeypatch):
    """Otherwise the other processes would wait for them: every shard is gathered once, whether written or not."""
    written = {"a": Part(), "b": Part()}
    write_tensors(tmp_path / "x.safetensors", written, {"k": "v"}, digest=True)
    assert_close(load_file(tmp_path / "x.safetensors"), {"a": torch.arange(4.0), "b": torch.arange(4.0)})
    assert read_metadata(tmp_path / "x.safetensors")["sha256"] == tensors_digest(load_file(tmp_path / "x.safetensors"))
    lost = {"a": Part(), "b": Part()}
    with pytest.raises(FileNotFoundError):
        write_tensors(tmp_path / "nowhere/x.safetensors", lost)
    contributed = {"a": Part(), "b": Part()}
    write_tensors(None, contributed)
    before = {"a": Part()}
    with pytest.raises(PermissionError), contributing(before):
        raise PermissionError
    assert [part.gathered for parts in (written, lost, contributed, before) for part in parts.values()] == [1] * 7


def test_a_run_that_goes_back_forgets_what_it_went_back_from(tmp_path):
    """The next resume uses the newest state, which must belong to this run."""
    run = make_trainer(tmp_path, train_num_steps=4, save_and_sample_every=100)
    run.train()
    run.save("a")
    make_trainer(tmp_path, train_num_steps=12, save_and_sample_every=100).train()
    back = make_trainer(tmp_path, train_num_steps=8, save_and_sample_every=100, keep_checkpoints=1)
    back.load("a")
    back.train()
    assert [path.name for path in back.checkpoints] == ["step-00000008"]


def test_a_name_without_parameters_is_saved_as_it_is_read(tmp_path):
    diffusion = GaussianDiffusion(RIN(**TINY), loss_weight={"name": "min_snr"}, noise_schedule={"name": "sigmoid"})
    diffusion.save_pretrained(tmp_path)
    assert GaussianDiffusion.from_pretrained(tmp_path).config == diffusion.config
