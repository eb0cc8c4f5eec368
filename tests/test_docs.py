"""README, CONTRIBUTING and docs/: commands parse, options load, links work; a tiny version of all runs (slow)."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from PIL import Image

from rin_video import save_samples, write_video
from rin_video.cli import main
from rin_video.cli.parser import make_parser, read_options
from rin_video.config import Config
from rin_video.config_checks import names_of, types_of
from rin_video.config_files import load_config, presets

CHECKOUT = Path(__file__).parents[1]
PAGES = {
    path.name: path for path in (CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *CHECKOUT.glob("docs/*.md"))
}
LANGUAGES = {"bash", "python", "yaml", "toml", "text"}
OTHER_PROGRAMS = {"make", "pip", "python", "torchrun", "accelerate", "sbatch", "docker", ".venv/bin/python",
                  ".venv/bin/pre-commit"}  # fmt: skip
OPTION = re.compile(rf"({'|'.join(types_of(Config))})(\.[a-z]\w*)+(=.*)?")
NO_OPTIONS = {"model.safetensors", "diffusion.sample", "diffusion.rollout"}
FILE = re.compile(r"(rin_video|tokenizers|datasets|configs|tests|benchmarks|examples)/[a-z_/]+\.(py|yaml|slurm)")

# Options that make a command tiny: they are appended, so that they take precedence.
TINY = {
    "train": "--steps 2 --batch-size 2 --size 16 model.dim=32 model.dim_latent=32 model.num_latents=8 model.depth=1 "
    "model.latent_self_attn_depth=1 train.save_and_sample_every=2 train.ema_snapshot_every=1 data.num_workers=0 "
    "sample.steps=2 sample.num_samples=2",
    "sample": "--num 2 --steps 2",
    "diagnose": "--num 4 sample.steps=2",
    "evaluate": "--num 4 sample.steps=2",
    "prepare": "--workers 1",
    "demo": "train.train_num_steps=2 sample.steps=2 sample.num_samples=3",
}
TINY_PYTHON = {
    r"\b(dim|dim_latent)=\d+": r"\1=32",
    r"\bdepth=\d+": "depth=1",
    r"\bnum_latents=\d+": "num_latents=8",
    r"\bsteps=\d+": "steps=2",
    r"\bnum=\d+": "num=4",
    r"\bbatch_size=\d+": "batch_size=4",
    r"\btrain_num_steps=\d[\d_]*": "train_num_steps=2, train_batch_size=2, num_workers=0",
}
# These are only parsed: they require a hub, a package that the tests do not install, or files that do not exist.
PARSED_ONLY = ("USER/NAME", "push_to_hub(", "--text-encoder", "runs/text", "{000000..000123}", "tensorboard",
               "runs/known --given", "i3d=", "--protocol")  # fmt: skip
BEFORE = "rin-video train --data clips/ --frames 16 --out runs/clips"  # on pages that use a model but do not train one
NEED_A_RUN = {"evaluate.md", "share.md", "troubleshooting.md"}


class Block(NamedTuple):
    language: str
    code: str


def read_blocks(page: str) -> list[Block]:
    tokens = MarkdownIt().parse(PAGES[page].read_text(encoding="utf-8"))
    return [Block(token.info, token.content) for token in tokens if token.type == "fence"]


def read_inline(page: str, kind: str) -> list:
    """Return the tokens of a kind within paragraphs and tables."""
    tokens = MarkdownIt().enable("table").parse(PAGES[page].read_text(encoding="utf-8"))
    return [part for token in tokens for part in token.children or () if part.type == kind]


def read_commands(page: str) -> list[list[str]]:
    """Return the command lines of all blocks, as words."""
    code = "\n".join(code for language, code in read_blocks(page) if language == "bash").replace("\\\n", " ")
    return [words for line in code.splitlines() if (words := shlex.split(line, comments=True))]


def inline_commands(page: str) -> list[list[str]]:
    """Return the command lines within text, except those that are only the name of a command."""
    words = [shlex.split(part.content) for part in read_inline(page, "code_inline") if " " in part.content]
    return [line for line in words if len(line) > 2 and line[0] in {"rin-video", "torchrun", "accelerate"}]


def arguments_of(words: list[str]) -> list[str] | None:
    """Return the arguments of rin-video, with or without a launcher."""
    return words[words.index("rin-video") + 1 :] if "rin-video" in words else None


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_and_its_options_load(page):
    for words in [*read_commands(page), *inline_commands(page)]:
        arguments = arguments_of(words)
        if arguments is None:
            assert words[0] in OTHER_PROGRAMS | {"diff"}, words
            continue
        options = read_options(arguments)
        config = getattr(options, "config", None)
        load_config(config if config in presets() else None, options.overrides)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_is_named_exists(page):
    for part in read_inline(page, "code_inline"):
        words = shlex.split(part.content) if OPTION.match(part.content) else []
        if not words or not all(map(OPTION.fullmatch, words)) or words[0] in NO_OPTIONS:
            continue
        for word in words:
            section, name, *_ = re.split(r"[.=]", word)
            assert name in types_of(types_of(Config)[section]), word
        load_config(None, [word for word in words if "=" in word])


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_and_reads(page, tmp_path):
    for number, (language, code) in enumerate(read_blocks(page)):
        assert language in LANGUAGES, code
        if language == "python":
            compile(code, page, "exec")
        if language == "yaml":
            (tmp_path / f"{number}.yaml").write_text(code, encoding="utf-8")
            load_config(tmp_path / f"{number}.yaml")


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_is_there(page):
    """Checks links (`make docs` checks those to generated pages), scripts and targets of make."""
    for link in read_inline(page, "link_open"):
        target = str(link.attrs["href"]).partition("#")[0]
        if target and not target.startswith(("http", "reference/")):
            assert (PAGES[page].parent / target).exists(), target
    targets = re.findall(r"^([a-z-]+):", (CHECKOUT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    codes = [part.content.split() for part in read_inline(page, "code_inline")]
    for words in [*read_commands(page), *codes]:
        if words[:1] == ["make"] and len(words) > 1:
            assert words[1] in targets, words
        for word in words:
            if re.fullmatch(
                r"(examples|benchmarks|tests|configs|tokenizers|datasets|rin_video)/[a-z_/]+\.(py|yaml|slurm)", word
            ):
                assert (CHECKOUT / word).is_file(), word


def test_the_readme_is_short_and_its_map_is_right():
    text = PAGES["README.md"].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    there = {
        path.name for folder in ("rin_video", "datasets", "tokenizers") for path in (CHECKOUT / folder).rglob("*.py")
    }
    (files,) = (block.code for block in read_blocks("README.md") if block.language == "text")
    named = set(re.findall(r"\w+\.py\b", files))
    assert len(named) > 30
    assert named <= there


def test_no_page_names_a_folder_of_this_machine():
    for page in PAGES.values():
        text = page.read_text(encoding="utf-8")
        assert not [folder for folder in (Path.home(), CHECKOUT, tempfile.gettempdir()) if str(folder) in text], page


def test_troubleshooting_quotes_diagnose():
    source = (CHECKOUT / "rin_video/reports/diagnose.py").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Za-z- ]+)", PAGES["troubleshooting.md"].read_text(encoding="utf-8"), re.MULTILINE)
    assert len(set(rows)) == 5
    assert all(column in source for column in ("1st pass", "self-cond.", "without EMA"))
    for words in rows:
        assert words.split(" at t")[0].split(" in ")[0].strip() in source, words


# ---- what `make docs` generates


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", CHECKOUT / "docs/generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_has_every_option_with_its_type_and_meaning(generate):
    text = generate.config_reference()
    for section, kind in types_of(Config).items():
        for name, hint in types_of(kind).items():
            (row,) = re.findall(rf"^\| `{name}`{{ #{section}.{name} }} \| (.*) \|$", text, re.MULTILINE)
            for choice in names_of(hint) or ():
                assert f"`{choice}`" in row
    assert "| `dim`{ #model.dim } | integer | `256` | width of the interface tokens (patches of the data) |" in text
    assert "| `sample.sampler` | `ddim` | `eta: 0.0` |" in text
    undescribed = re.findall(r"^\| `(\w+)`.*\|  \|$", text, re.MULTILINE)
    assert not undescribed


def test_comments_above_an_option_and_at_its_end_are_read(generate, tmp_path, monkeypatch):
    (tmp_path / "some_options.py").write_text(
        "class Options:\n"
        "    # above,\n"
        "    # in two lines\n"
        "    first: int = 1\n"
        "    second: list = [\n"
        "        2,  # at\n"
        "    ]  # the end\n"
        "    third: int = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import some_options

    found = generate.comments_of(some_options.Options)
    assert found == {"first": "above, in two lines", "second": "at the end", "third": ""}


def test_the_reference_has_every_command(generate):
    text = generate.cli_reference()
    for command in make_parser().commands.keys() - {"peek"}:  # another name of preview
        assert text.count(f"\n## {command}\n") == 1
        assert f"usage: rin-video {command} " in text


# ---- running it


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A folder with the files that the pages mention, in which everything runs."""
    monkeypatch.chdir(tmp_path)
    frames = torch.linspace(0, 1, 48)[:, None, None].expand(48, 32, 32)
    clip = torch.stack([frames, 1 - frames, torch.linspace(0, 1, 32).expand(48, 32, 32)])
    for folder in ("clips", "pictures"):
        for label in ("red", "blue"):
            Path(folder, label).mkdir(parents=True)
    for number, name in enumerate(("red/a", "red/b", "blue/a", "blue/b")):
        write_video(clip * (1 - number / 5), f"clips/{name}.mp4", fps=8)  # files of equal content are held out together
        np.save(f"clips/{name}.npy", np.ones(8, np.float32))
        Image.new("RGB", (32, 32), (90, 120, 40 * number)).save(f"pictures/{name}.png")
    shutil.copytree("clips", "other-clips")
    rng = torch.Generator().manual_seed(0)
    save_samples(torch.rand(4, 3, 16, 16, 16, generator=rng), "samples")  # of a model of --frames 16 --size 16
    save_samples(torch.rand(4, 3, 16, 16, generator=rng), "samples.npy")
    write_video(clip, "clip.mp4", fps=8)
    write_video(clip, "clip.gif", fps=8)
    Image.new("RGB", (32, 32), (90, 120, 30)).save("start.png")
    np.save("one.npy", np.ones(8, np.float32))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_everything_runs_in_tiny_form(page, sandbox, capfd):
    commands = [shlex.split(BEFORE)] if page in NEED_A_RUN else []
    for words in [*commands, *read_commands(page)]:
        line = shlex.join(words)
        if any(part in line for part in PARSED_ONLY) or words[0] in OTHER_PROGRAMS:
            continue
        if words[0] == "rin-video":
            tiny = TINY.get(words[1], "")
            tiny = tiny.replace("--steps 2 ", "--time 2s ") if "--time" in words else tiny
            assert main([*words[1:], *tiny.split()]) == 0, f"{line}\n{capfd.readouterr().err}"
        if line == BEFORE and page == "evaluate.md":
            for name in ("runs/a", "runs/b"):
                shutil.copytree("runs/clips", name)
    for language, code in read_blocks(page):
        for line in code.splitlines() if language == "bash" else ():
            if line.startswith("diff "):  # two runs that must be equal
                subprocess.run(["bash", "-c", line], check=True)
    codes = [code for language, code in read_blocks(page) if language == "python"]
    script = "\n".join(code for code in codes if not any(part in code for part in PARSED_ONLY))
    for pattern, tiny in TINY_PYTHON.items():
        script = re.sub(pattern, tiny, script)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
