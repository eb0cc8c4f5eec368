"""Fuzzes the data loading with corrupted, hostile and oddly named files.

    python benchmarks/fuzz_data.py --n 2000

Makes small clips, images and tar shards, corrupts each in one of many ways, and reads it as training would: it is
listed, probed and decoded in a child process with a time limit. The outcome is one of

    right          it is read with the requested shape; every frame of a clip is also output by the FFmpeg program
                   (if `imageio-ffmpeg` is installed; images are not compared)
    wrong length   it can be read, but has another number of frames
    refused        a UsageError with the reason in one line
    wrong picture  a frame that the FFmpeg program does not output, or not in that order
    crash, hang    the child died, or exceeded the time limit
    memory         the child's memory grew by over 1 GB (peaks, and the children of the probe, are not measured)
    bug            any other exception
    outside        a new file appeared in the test's folder, including those of the data and of the originals

Only the first three are acceptable. Writes `results/fuzz_data.json`, prints the table, and the memory of 5,000 reads.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from rin_video.config import DataConfig
from rin_video.datasets.clips import ClipFolder
from rin_video.datasets.decoding import open_video
from rin_video.datasets.demo import render_clip
from rin_video.datasets.images import ImageFolder
from rin_video.datasets.probing import run_in_subprocess
from rin_video.datasets.sources import Source, open_source, shown
from rin_video.errors import UsageError
from rin_video.files import write_text
from rin_video.media import write_video

RESULTS = Path(__file__).parent / "results"
SECONDS, MEMORY = 30.0, 1e9
FRAMES, SIZE = 12, 48
SAME = 4.0  # mean difference in grey levels: releases differ in scaling and colour conversion
OUTCOMES = ("right", "wrong length", "refused", "wrong picture", "crash", "hang", "memory", "bug", "outside")
CLIPS = ("a.mp4", "a.webm", "a.avi", "a.mkv", "a.gif", "moving.webp")
IMAGES = ("a.png", "a.jpg", "still.webp", "a.tiff", "a.bmp")
KINDS = {"clip": CLIPS, "image": IMAGES, "shard": ("clips.tar", "images.tar")}
DAMAGE = ("bit flips", "truncated", "zeroed stretch", "renamed", "wrong header", "empty", "random bytes", "bomb")
PLACES = ("newline in name", "name not UTF-8", "link outside", "link to a device", "a pipe", "path traversal")


def make_originals(folder: Path) -> None:
    """Write one small file of each format."""
    import av

    frames = render_clip("square", SIZE, FRAMES, np.random.default_rng(0))
    write_video(frames, folder / "a.mp4", fps=8)
    write_video(frames, folder / "a.gif", fps=8)
    pictures = [Image.fromarray(frame) for frame in frames.transpose(1, 2, 3, 0)]
    pictures[0].save(folder / "moving.webp", save_all=True, append_images=pictures[1:], duration=125)
    for name, codec in (("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mkv", "libx264")):
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream(codec, rate=8)
            stream.height = stream.width = SIZE
            stream.pix_fmt = "yuv420p"
            for picture in pictures:
                container.mux(stream.encode(av.VideoFrame.from_image(picture)))
            container.mux(stream.encode())
    for name in IMAGES:
        pictures[0].save(folder / name)
    for name, files in (("clips.tar", CLIPS[:3]), ("images.tar", IMAGES[:3])):
        with tarfile.open(folder / name, "w") as tar:
            for file in files:
                tar.add(folder / file, f"x/{file}")


def damage(content: bytes, how: str, name: str, originals: Path, rng: random.Random) -> bytes:
    """Return the content of a file after one kind of damage."""
    spoilt = bytearray(content)
    if how == "bit flips":
        for _ in range(rng.choice((1, 4, 32, 256))):
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
    elif how == "truncated":
        del spoilt[rng.randrange(len(spoilt)) :]
    elif how == "zeroed stretch":
        start = rng.randrange(len(spoilt))
        spoilt[start : start + 500] = bytes(len(spoilt[start : start + 500]))
    elif how == "renamed":
        other = rng.choice([file for file in CLIPS + IMAGES if file[-4:] != name[-4:]])
        return (originals / other).read_bytes()
    elif how == "wrong header":
        for _ in range(8):  # the first bytes contain sizes and counts
            spoilt[rng.randrange(min(200, len(spoilt)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
    elif how == "empty":
        return b""
    elif how == "random bytes":
        return rng.randbytes(rng.choice((10, 1000, 100_000)))
    elif how == "bomb":
        return bomb(name, rng)
    return bytes(spoilt)


def bomb(name: str, rng: random.Random) -> bytes:
    """Return a small file that claims to be, or unpacks to, a huge one."""
    side = rng.choice((20_000, 60_000, 2**31 - 1))
    if name.endswith(".tar"):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo("x/a.png")
            info.size = 2**33 - 1  # without any content
            inner = bomb("a.png", rng)
            real = tarfile.TarInfo("x/b.png")
            real.size = len(inner)
            tar.addfile(real, io.BytesIO(inner))
        content = buffer.getvalue().rstrip(b"\0")
        return content + bytes(-len(content) % 512) + info.tobuf()
    if name.endswith(".gif"):
        return (
            b"GIF89a"
            + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0)
            + bytes(6)
            + b","
            + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
            + b"\x02\x02D\x01\x00;"
        )

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    body = zlib.compress(bytes(50_000_000), 9) if side == 20_000 else b"x"
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def place(folder: Path, how: str, name: str, original: Path, outside: Path, rng: random.Random) -> bool:
    """Place an intact file in an awkward way; return False if that does not apply to the file."""
    if how == "newline in name":
        shutil.copy(original, folder / f"new\nline {rng.randrange(9)}{original.suffix}")
    elif how == "name not UTF-8":
        target = os.path.join(os.fsencode(folder), b"\xff\xfe" + os.fsencode(original.suffix))
        shutil.copy(original, target)
    elif how == "link outside":
        target = outside / name
        shutil.copy(original, target)
        (folder / name).symlink_to(rng.choice((target, outside, Path("/etc/passwd"), folder / "nowhere", folder)))
    elif how == "link to a device":
        (folder / name).symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/stdin")))
    elif how == "a pipe":
        os.mkfifo(folder / name)
    elif how == "path traversal":
        if original.suffix != ".tar":
            return False
        with tarfile.open(folder / name, "w") as tar:
            for bad in ("../../escaped.png", "/escaped.png", "x/../../../escaped.mp4", "C:\\escaped.png"):
                content = original.with_name(f"a{bad[-4:]}").read_bytes()
                info = tarfile.TarInfo(bad)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../x"), (tarfile.FIFOTYPE, "")):
                info = tarfile.TarInfo(f"link{kind.decode()}.png")
                info.type, info.linkname = kind, target
                tar.addfile(info)
    return True


def wrong_picture(data: ClipFolder) -> str:
    """Compare all frames with the output of the FFmpeg program.

    Returns a description of the first frame that it does not output after the previous frame, or an empty string.
    """
    if not find_spec("imageio_ffmpeg"):
        return ""
    for source, info in zip(data.files, data.infos, strict=True):
        if info.container == "webp":  # only recent releases of FFmpeg decode it
            continue
        pictures = as_ffmpeg_shows(source, info.size, info.stream)
        sound = [i for i in range(info.num_frames) if not any(a <= i < b for a, b in info.lost_ranges)]
        with open_video(source, "auto", info) as video:
            frames = video.read(sound).permute(0, 2, 3, 1).numpy()
        place = 0
        for index, frame in zip(sound, frames, strict=True):
            errors = np.abs(pictures[place:] - frame.astype(np.int16)).mean((1, 2, 3))
            same = np.flatnonzero(errors <= SAME)
            if not same.size:
                return f"frame {index} of {shown(source)} (off by {errors.min(initial=np.inf):.1f} of 255)"
            place += int(same[0]) + 1
    return ""


def as_ffmpeg_shows(source: Source, size: tuple[int, int], stream: int) -> np.ndarray:
    """Return the frames that the FFmpeg program outputs, int16 (F, H, W, 3), composited over white."""
    import imageio_ffmpeg

    (H, W), show = size, ["-fps_mode", "passthrough", "-vf", f"scale={size[1]}:{size[0]}", "-f", "rawvideo"]
    with tempfile.NamedTemporaryFile(suffix=source.suffix) as copy:
        with open_source(source) as file:
            shutil.copyfileobj(file, copy)
        copy.flush()
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "quiet", "-threads", "1", "-i", copy.name]
        command += ["-map", f"0:{stream}", *show, "-pix_fmt", "rgba", "-"]
        raw = subprocess.run(command, stdout=subprocess.PIPE, timeout=SECONDS / 2, check=False).stdout
    frames = np.frombuffer(raw[: len(raw) // (H * W * 4) * (H * W * 4)], np.uint8).reshape(-1, H, W, 4).astype(np.int16)
    alpha = frames[..., 3:]
    return (frames[..., :3] * alpha.astype(np.int32) // 255 + 255 - alpha).astype(np.int16)


def read(task: tuple[str, str]) -> tuple[str, float]:
    """Read a folder as training would, in a child process; return the outcome and the growth of memory in bytes."""
    kind, folder = task
    process = psutil.Process()
    before = process.memory_info().rss
    try:
        if kind == "clip":
            data: ClipFolder | ImageFolder = ClipFolder(folder, 16, 4, decoder="auto", read_timeout=SECONDS / 2)
            wrong = data.infos[0].num_frames != FRAMES
        else:
            data = ImageFolder(folder, 16, read_timeout=SECONDS / 2)
            wrong = False
        for epoch in range(2):
            for index in range(len(data)):
                assert data.draw(index, epoch)["x"].shape == data.shape
        if any("makes its decoder crash" in reason for _, reason in data.skipped):
            return "crash", 0
        outcome = "wrong length" if wrong else "right"
        if kind == "clip" and (difference := wrong_picture(data)):
            outcome = f"wrong picture: {difference}"
    except UsageError as error:
        outcome = "refused"
        if "makes its decoder crash" in str(error):
            outcome = "crash (contained)"
        if "s to read" in str(error):
            outcome = "hang (contained)"
        if "\n" in str(error):
            outcome = "bug: message of several lines"
    except Exception as error:
        outcome = f"bug: {error!r}"[:300]
    return outcome, max(0, process.memory_info().rss - before)


def make_case(i: int, seed: int, work: Path, originals: Path, outside: Path) -> tuple[str, str, str, Path] | None:
    """Make a folder with one corrupted or awkward file; return (kind, file, way, folder)."""
    rng = random.Random(seed * 1_000_003 + i)
    kind = rng.choice(("clip", "clip", "image", "shard"))
    name = rng.choice(KINDS[kind])
    how = rng.choice(DAMAGE * 3 + PLACES)
    folder = work / f"{i:06d}"
    folder.mkdir()
    if how in DAMAGE:
        content = damage((originals / name).read_bytes(), how, name, originals, rng)
        (folder / name).write_bytes(content)
    elif not place(folder, how, name, originals / name, outside, rng):
        return None
    return kind, name, how, folder


def fuzz(num: int, seed: int) -> tuple[list[tuple[str, str, str, str]], int]:
    """Return (kind, file, way, outcome) of every case, and the largest growth of a child in bytes."""
    rows, largest = [], 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top:
        work, originals, outside = (Path(top, name) for name in ("data", "originals", "outside"))
        for folder in (work, originals, outside):
            folder.mkdir()
        make_originals(originals)
        cases = []
        i = 0
        while len(cases) < num:
            case = make_case(i, seed, work, originals, outside)
            if case:
                cases.append(case)
            i += 1
        before = snapshot(Path(top))
        tasks = [(kind_of(kind, name), str(shard_or(folder, name))) for kind, name, _, folder in cases]
        for index, result in run_in_subprocess(tasks, read, seconds=SECONDS, processes=2, daemon=False):
            kind, name, how, _ = cases[index]
            if isinstance(result, UsageError):
                outcome, grown = ("hang" if "more than" in str(result) else "crash"), 0.0
            else:
                outcome, grown = result
            largest = max(largest, int(grown))
            rows.append((kind, name, how, "memory" if grown > MEMORY else outcome))
        if new := snapshot(Path(top)) - before:
            rows.append(("-", ", ".join(sorted(new))[:300], "-", "outside"))
    return rows, largest


def kind_of(kind: str, name: str) -> str:
    """Return "clip" or "image" for a file or the members of a shard."""
    return ("clip" if name.startswith("clips") else "image") if kind == "shard" else kind


def shard_or(folder: Path, name: str) -> Path:
    """Return the shard if it kept its name, otherwise the folder."""
    return folder / name if name.endswith(".tar") and (folder / name).exists() else folder


def snapshot(top: Path) -> set[str]:
    """Return the paths of all files below a folder, as hex."""
    return {os.fsencode(os.path.join(root, name)).hex() for root, _, names in os.walk(top) for name in names}


def memory_of_reads(num: int = 5000) -> list[tuple[int, float]]:
    """Return (reads, MB) of this process while it reads clips."""
    found = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as top:
        make_originals(Path(top))
        data = ClipFolder(top, 32, 4)
        process = psutil.Process()
        for i in range(num + 1):
            if i in (0, 100, 500) or (i and i % 1000 == 0):
                found.append((i, process.memory_info().rss / 1e6))
            data.draw(i % len(data), i)
    return found


def table(rows: list[tuple[str, str, str, str]]) -> str:
    """Return a Markdown table of the outcomes of every way."""
    counts: dict[str, Counter[str]] = {}
    for _, _, how, outcome in rows:
        counts.setdefault(how, Counter())[outcome.split(":")[0]] += 1
    columns = list(OUTCOMES) + sorted({o for c in counts.values() for o in c} - set(OUTCOMES))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += ["| " + " | ".join([how, *(str(counts[how][o]) for o in columns)]) + " |" for how in sorted(counts)]
    total = sum(counts.values(), Counter())
    return "\n".join([*lines, "| **all** | " + " | ".join(str(total[o]) for o in columns) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000, help="files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reads", type=int, default=5000, help="clip reads during which memory is measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "fuzz_data.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    memory = memory_of_reads(options.reads)
    print("memory of clip reads: " + ", ".join(f"{count} {mb:.0f} MB" for count, mb in memory), flush=True)
    rows, largest = fuzz(options.n, options.seed)
    print(table(rows))
    print(f"largest growth of a child: {largest / 1e6:.0f} MB")
    bad = [row for row in rows if row[3] not in OUTCOMES[:3]]
    for row in bad[:20]:
        print(*row, sep=" | ")
    report = {"n": options.n, "seed": options.seed, "decoder": DataConfig().decoder, "largest_growth": largest}
    report |= {"memory": memory, "bad": bad, "counts": Counter(f"{how}: {o.split(':')[0]}" for _, _, how, o in rows)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(options.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
