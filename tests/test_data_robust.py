"""Bad files do not end a run: probing in subprocesses, the index, workers that die or hang."""

import errno
import gc
import json
import os
import re
import signal
import sys
import threading
import time
from functools import partial
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import av
import pytest
import torch
from torch.utils.data import Dataset, get_worker_info

from rin_video.config import DataConfig
from rin_video.datasets import loading, probing
from rin_video.datasets.index import Entry, Probe, entry_of, load_index, make_index
from rin_video.datasets.index import Index as DataIndex
from rin_video.datasets.loading import TrainLoader
from rin_video.datasets.probe import probe_video
from rin_video.datasets.probing import run_in_subprocess
from rin_video.datasets.sources import shown
from rin_video.datasets.video_info import VideoInfo
from rin_video.errors import UsageError
from rin_video.training.signals import ignore_signals


def misbehave(task):
    if task == "crash":
        os.kill(os.getpid(), signal.SIGSEGV if os.name != "nt" else signal.SIGTERM)
    if task == "hang":
        time.sleep(60)
    if task == "refuse":
        raise UsageError("no")
    if task == "surprise":
        raise KeyError("odd")
    return task * 2


def test_tasks_that_crash_or_hang_cost_only_themselves():
    tasks = ["a", "crash", "b", "hang", "refuse", "surprise", *"cdefghijklmnop"]
    found = dict(run_in_subprocess(tasks, misbehave, seconds=0.5, processes=2))
    assert sorted(found) == list(range(len(tasks)))
    for i, task in enumerate(tasks):
        if len(task) == 1:
            assert found[i] == task * 2
    said = [str(found[i]) for i in (1, 3, 4, 5)]
    assert "makes its decoder crash" in said[0]
    assert "more than 0.5 s" in said[1]
    assert said[2] == "no"
    assert "KeyError" in said[3]


def test_the_start_of_a_child_is_not_counted_against_its_first_task(monkeypatch):
    monkeypatch.setattr(
        probing, "get_context", lambda: get_context("spawn")
    )  # each imports torch first, which takes seconds
    assert dict(run_in_subprocess(["a", "bb"], len, seconds=0.5)) == {0: 1, 1: 2}


def go_on(task):
    if task == "long":
        for _ in range(12):
            time.sleep(0.1)
            probing.beat()
    return task


class Prepared:
    """Work with a warm-up before the first file."""

    def warm_up(self):
        time.sleep(0.7)
        self.ready = True

    def __call__(self, task):
        return self.ready and task


def test_work_with_progress_and_imports_do_not_count_towards_the_limit(monkeypatch):
    """Hashing and scene cuts may take long for a long file; the limit is only for work without progress."""
    monkeypatch.setattr(probing, "BEAT_EVERY", 0.05)
    assert dict(run_in_subprocess(["long", "b"], go_on, seconds=0.5)) == {0: "long", 1: "b"}
    assert dict(run_in_subprocess(["a"], Prepared(), seconds=0.3)) == {0: "a"}
    found = dict(run_in_subprocess(["hang"], misbehave, seconds=0.3))
    assert "hang takes more than 0.3 s to read: raise data.read_timeout, or leave it out" in str(found[0])


class Tidying:
    def warm_up(self):
        gc.collect()

    def __call__(self, task):
        return task


def test_a_child_does_not_tidy_up_what_it_inherits(monkeypatch):
    """FFmpeg's scaler waits for its threads when it is freed, but a forked process does not have them."""
    monkeypatch.setattr(probing, "SECONDS_TO_START", 20.0)
    frame = av.VideoFrame(640, 480, "yuv420p")
    frame.reformat(format="rgb24", width=320, height=240)
    garbage = [frame]
    garbage.append(garbage)
    del frame, garbage
    assert dict(run_in_subprocess(["a"], Tidying(), seconds=5.0)) == {0: "a"}


def test_hashing_and_scene_cuts_report_progress(tmp_path, clips, monkeypatch):
    from rin_video.datasets import index, probe

    beats = []
    for module in (index, probe):
        monkeypatch.setattr(module, "beat", lambda: beats.append(1))
    index.content_hash(clips / "plain.mp4")
    assert len(beats) == 1
    probe_video(clips / "plain.mp4", cuts=True)
    assert len(beats) >= 21


def end_at_once(*_):
    os._exit(1)


def test_a_child_that_does_not_start_is_no_fault_of_a_file(monkeypatch):
    monkeypatch.setattr(probing, "_child_main", end_at_once)
    with pytest.raises(UsageError, match=r"exited at its start \(code 1\).*__main__"):
        dict(run_in_subprocess(["a"], len, seconds=5.0))


def end_after_answering(task):
    if task == "last words":
        threading.Timer(0.05, os._exit, [3]).start()
    return len(task)


def test_a_child_that_dies_between_tasks_is_replaced():
    found = {}
    for i, result in run_in_subprocess(["last words", "b", "c"], end_after_answering, seconds=5.0, processes=1):
        found[i] = result
        time.sleep(0.3 if i == 0 else 0)
    assert found == {0: 10, 1: 1, 2: 1}


def test_the_index_is_kept_updated_and_complete(tmp_path, numbered):
    data, path = tmp_path / "data", tmp_path / "run" / "index.jsonl"
    for name in ("b/one.mp4", "a/two.mp4"):
        (data / name).parent.mkdir(parents=True)
        numbered(data / name, frames=6)
    (data / "a/two.txt").write_text(" a red square\n")
    (data / "b/broken.mp4").write_bytes(b"x" * 100)
    index = make_index(data, "video", path=path)
    assert [entry.source.name for entry in index.entries] == ["two.mp4", "broken.mp4", "one.mp4"]
    two, broken, one = index.entries
    assert (two.class_name, two.caption, one.caption) == ("a", "a red square", None)
    assert (two.info.num_frames, two.info.fps, two.info.size, two.info.duration) == (6, 8.0, (32, 64), 0.75)
    assert two.hash == one.hash != ""
    assert "broken.mp4 cannot be read" in broken.error
    said = index.describe()
    assert "2 of 3 files can be used" in said
    assert "1 duplicate" in said
    with pytest.raises(UsageError, match=r"1 of 3 files cannot be used, and data.strict is true: .*broken"):
        index.require_some(strict=True)
    index.require_some(strict=False)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4

    # First nothing is probed again, then only the changed file.
    rows[1][5] = "kept"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make_index(data, "video", path=path).entries[0].hash == "kept"
    numbered(data / "b/broken.mp4", frames=3)
    (data / "b/one.mp4").unlink()
    again = make_index(data, "video", path=path)
    assert [entry.hash == "kept" for entry in again.entries] == [True, False]
    assert again.unusable == []
    assert len(path.read_text().splitlines()) == 3
    path.write_text(path.read_text()[:-20])  # the damaged index is created again
    assert make_index(data, "video", path=path).entries[0].hash == two.hash
    assert not [file for file in path.parent.iterdir() if file != path]


def calls_of(work):
    """Return the number of Python and C functions that `work` calls, a cost that is independent of the clock."""
    num = 0

    def count(frame, event, arg):
        nonlocal num
        num += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return num


@pytest.mark.parametrize("num", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_an_index_loads_completely_and_cheaply(tmp_path, clips, num):
    info = probe_video(clips / "plain.mp4")
    entries = [
        Entry(Path(f"/data/{i % 7}/clip-{i:06d}.mp4"), 12345 + i, 1_700_000_000_000_000_000 + i, info, hash="0" * 32)
        for i in range(num)
    ]
    probe = Probe("video")

    def load(some):
        rows = load_index(tmp_path / f"{len(some)}.jsonl", "/data", probe)
        return [entry_of(entry.source, rows[str(entry.source)], VideoInfo) for entry in some]

    for some in (entries, entries[: num // 2]):
        DataIndex("/data", some).save(tmp_path / f"{len(some)}.jsonl", probe)
    assert load(entries) == entries  # this also fills the caches of pathlib
    # There are twenty calls per entry, most of them in json; __init__ would add fourteen.
    assert calls_of(lambda: load(entries)) - calls_of(lambda: load(entries[: num // 2])) <= 30 * num // 2


class Rogue(Dataset):
    """Sample 3 kills the process that reads it, sample 5 hangs, sample 7 cannot be read."""

    length = 12

    def __init__(self, **bad):
        self.bad = bad

    def __len__(self):
        return self.length

    def draw(self, index, epoch):
        if index == self.bad.get("kills"):
            os.kill(os.getpid(), signal.SIGKILL if os.name != "nt" else signal.SIGTERM)
        if index == self.bad.get("hangs"):
            time.sleep(60)
        if index == self.bad.get("fails"):
            raise UsageError(f"sample {index} is damaged")
        return {"x": torch.tensor([index])}


def drawn(batches, num):
    return [int(i) for _ in range(num) for i in next(batches).x.flatten()]


@pytest.mark.parametrize(
    ("bad", "said"), [("kills", "3 kills the process"), ("hangs", "3 hangs"), ("fails", "sample 3 is damaged")]
)
def test_a_sample_that_breaks_its_reader_is_replaced_and_the_run_continues(bad, said, caplog):
    with TrainLoader(Rogue(**{bad: 3}), DataConfig(num_workers=1, read_timeout=0.6), 4, seed=1) as batches:
        found = drawn(batches, 6)
    clean = TrainLoader(Rogue(), DataConfig(num_workers=0), 4, seed=1)
    expected = [4 if i == 3 else i for i in drawn(clean, 6)]
    assert found == expected  # the neighbour replaces it, and everything else is unchanged
    assert batches.num_bad == 1
    if bad != "fails":  # otherwise the worker itself logs it
        assert said in caplog.text


class Slow(Rogue):
    """Every sample takes a while."""

    def draw(self, index, epoch):
        time.sleep(0.12)
        return super().draw(index, epoch)


def test_a_batch_of_slow_samples_takes_as_long_as_it_needs(caplog, monkeypatch):
    """The limit applies to one sample; during a long wait, the samples being read are reported."""
    monkeypatch.setattr(loading, "SECONDS_BETWEEN_REPORTS", 0.1)
    with TrainLoader(Slow(), DataConfig(num_workers=1, read_timeout=0.4), 4, seed=1) as batches:
        found = drawn(batches, 1)
    assert found == drawn(TrainLoader(Rogue(), DataConfig(num_workers=0), 4, seed=1), 1)
    assert (batches.crashes, batches.num_bad) == (0, 0)
    assert re.search(
        rf"no batch for \d s; workers are reading: sample ({'|'.join(map(str, found))}) for 0 s", caplog.text
    )


class TwoArgumentsError(Exception):
    """An error that cannot be unpickled, because its class requires two arguments."""

    def __init__(self, one, two):
        super().__init__(one + two)


class Mistaken(Rogue):
    """Sample 3 raises an error other than UsageError, or exits its process."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def draw(self, index, epoch):
        if index == 3:
            raise TwoArgumentsError("a", "b") if self.error is TwoArgumentsError else self.error
        return super().draw(index, epoch)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.\nMore."),
            "RuntimeError: DataLoader worker",
        ),
        (KeyError("label"), "KeyError: 'label'"),
        (ConnectionResetError(), "ConnectionResetError ("),
        (TwoArgumentsError, "TwoArgumentsError: ab"),
    ],
)
def test_an_error_of_the_dataset_ends_the_run_with_one_line_that_names_the_sample(num_workers, error, said, caplog):
    with TrainLoader(Mistaken(error), DataConfig(num_workers=num_workers), 4, seed=1) as batches:
        with pytest.raises(UsageError) as raised:
            drawn(batches, 3)
        cause = raised.value.__cause__
        assert f"sample 3 cannot be read: {said}" in str(raised.value)
        assert "\n" not in str(raised.value)
        if error is not TwoArgumentsError:
            assert (type(cause), cause.args) == (type(error), error.args)
        if num_workers:
            assert "in draw" in str(cause.__cause__)  # the worker's traceback
        assert (batches.crashes, batches.num_bad) == (0, 0)
    assert caplog.text == ""


def test_a_dataset_that_exits_loses_the_sample(caplog):
    with TrainLoader(Mistaken(SystemExit(3)), DataConfig(num_workers=1), 4, seed=1) as batches:
        assert 3 not in drawn(batches, 3)
    assert "sample 3 kills the process that reads it (exit code 3)" in caplog.text


class Uneven(Rogue):
    def draw(self, index, epoch):
        return {"x": torch.zeros(2 if index == 3 else 1)}


def test_samples_that_do_not_fit_into_one_batch_are_named():
    with pytest.raises(UsageError, match=r"sample 3 cannot be collated with sample \d+: RuntimeError: stack"):
        drawn(TrainLoader(Uneven(), DataConfig(num_workers=0), 4, seed=1), 3)


class Counted(Rogue):
    def __init__(self):
        super().__init__()
        self.num_drawn = torch.zeros(2).share_memory_()

    def draw(self, index, epoch):
        self.num_drawn[get_worker_info().id] += 1
        return super().draw(index, epoch)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_worker_killed_while_the_training_computes_is_replaced(caplog):
    options = DataConfig(num_workers=2, prefetch=1)
    expected = drawn(TrainLoader(Rogue(), DataConfig(num_workers=0), 4, seed=1), 6)
    before = signal.getsignal(signal.SIGCHLD)
    random = torch.random.get_rng_state()
    data = Counted()
    with TrainLoader(data, options, 4, seed=1) as batches:
        found = drawn(batches, 2)
        while data.num_drawn.tolist() != [8, 8] or (batches.draws.at >= 0).any():  # until the workers have read ahead
            time.sleep(0.001)
        for worker in active_children():
            os.kill(worker.pid, signal.SIGKILL)
        for worker in active_children():
            worker.join()
        sum(range(100_000))  # Python code, during which signal handlers are called
        found += drawn(batches, 4)
        assert found == expected
        assert (batches.crashes, batches.num_bad) == (1, 0)
        assert "an idle worker died (signal 9) and is replaced" in caplog.text
    assert active_children() == []
    assert torch.equal(torch.random.get_rng_state(), random)
    after = signal.getsignal(signal.SIGCHLD)
    assert (
        after is before or after.__name__ == "handler"
    )  # torch's handler, installed by the first loader in this process


class Collated(dict):
    """A sample that calls a function when it is collated."""

    def __init__(self, what):
        super().__init__(x=torch.zeros(1))
        self.what = what

    def __iter__(self):
        if self.what == "full":
            raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device")
        if self.what == "bus error":
            os.kill(os.getpid(), signal.SIGBUS)
        return super().__iter__()


class TooLarge(Rogue):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def draw(self, index, epoch):
        return Collated(self.what)


@pytest.mark.skipif(not hasattr(signal, "SIGBUS"), reason="no SIGBUS")
@pytest.mark.parametrize("what", ["full", "bus error"])
def test_too_little_shared_memory_is_no_fault_of_a_file(what, caplog):
    with TrainLoader(TooLarge(what), DataConfig(num_workers=1), 4, seed=1) as batches:
        with pytest.raises(UsageError, match=r"^shared memory.* is too small .*--shm-size=.*data\.num_workers=0"):
            next(batches)
        assert (batches.crashes, batches.num_bad, caplog.text) == (0, 0, "")


def begin(ready, worker):
    ignore_signals()
    ready.set()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised by torch's incomplete iterator
def test_too_little_for_the_second_worker_leaves_none(monkeypatch):
    start, ready = BaseProcess.start, get_context().Event()

    def start_one(process):
        if active_children():
            assert ready.wait(60)
            raise OSError(errno.ENOSPC, "No space left on device")
        start(process)

    monkeypatch.setattr(BaseProcess, "start", start_one)
    with pytest.raises(UsageError, match=r"shared memory.* is too small"):
        TrainLoader(Rogue(), DataConfig(num_workers=2), 4, seed=1, worker_init_fn=partial(begin, ready))
    assert active_children() == []


class Unsendable(Rogue):
    def draw(self, index, epoch):
        class Local(dict):
            pass

        return {"x": Local(values=torch.zeros(1))}


def test_a_batch_that_never_arrives_ends_the_run(monkeypatch):
    monkeypatch.setattr(loading, "SECONDS_TO_START", 0.3)
    with (
        TrainLoader(Unsendable(), DataConfig(num_workers=1), 4, seed=1) as batches,
        pytest.raises(UsageError, match=r"no batch has arrived .* data\.num_workers=0"),
    ):
        next(batches)


def test_a_worker_that_does_not_start_is_no_fault_of_a_file():
    options = DataConfig(num_workers=1)
    with (
        TrainLoader(Rogue(), options, 4, seed=1, worker_init_fn=end_at_once) as batches,
        pytest.raises(UsageError, match=r"exited at its start \(code 1\).*__main__"),
    ):
        next(batches)


def test_too_many_failures_end_the_run():
    class Broken(Rogue):
        def draw(self, index, epoch):
            if index % 2:
                raise UsageError(f"sample {index} is damaged")
            return {"x": torch.tensor([index])}

    batches = TrainLoader(Broken(), DataConfig(num_workers=0, max_failures=3), 4, seed=0)
    with pytest.raises(UsageError, match=r"data\.max_failures is 3"):
        drawn(batches, 9)


def test_batches_resume_where_they_stopped():
    options = DataConfig(num_workers=1)
    whole = drawn(TrainLoader(Rogue(), options, 4, seed=3), 8)
    assert drawn(TrainLoader(Rogue(), options, 4, seed=3, first_batch=5), 3) == whole[20:]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_of_any_bytes_are_indexed_and_shown_on_one_line(tmp_path, clips):
    content = (clips / "short_gop.mp4").read_bytes()
    for name in (b"new\nline.mp4", b"\xff\xfe.mp4", "größe.mp4".encode()):
        Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "nowhere.mp4").symlink_to(tmp_path / "missing")
    path = tmp_path / "out" / "index.jsonl"
    for _ in range(2):
        index = make_index(tmp_path, "video", path=path)
        assert len(index.usable) == 3
        assert len(index.unusable) == 2
    for entry in index.entries:
        assert "\n" not in shown(entry.source)
        shown(entry.source).encode()


class HangsOnce:
    """Work that hangs at the start of the first child, like a fork that copied a lock held by another thread."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def warm_up(self) -> None:
        if not self.marker.exists():
            self.marker.touch()
            time.sleep(60)

    def __call__(self, task):
        return 2 * task


@pytest.mark.skipif(get_context().get_start_method() != "fork", reason="children are not forked here")
def test_a_forked_child_that_hangs_at_its_start_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(probing, "SECONDS_TO_START", 8.0)
    assert dict(run_in_subprocess([1, 2], HangsOnce(tmp_path / "hung"), seconds=30, processes=1)) == {0: 2, 1: 4}
