"""Upload of models to the Hugging Face hub, with a model card that describes the training; no file is a pickle."""

from __future__ import annotations

import dataclasses
import html
import os
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

from rin_video.config import Config
from rin_video.config_files import load_config, to_yaml
from rin_video.errors import UsageError, one_line
from rin_video.files import CONFIG, HUB, PIPE, WEIGHTS
from rin_video.hub import HUB_ID, plain_errors
from rin_video.model.info import describe, model_info
from rin_video.model.rin import load_model
from rin_video.reports.results import HEADINGS, describe_measurement, results_of, score_rows, warnings_of
from rin_video.training.metrics import read_lines
from rin_video.training.provenance import read_json

PICTURE, CLIP = "samples.png", "samples.mp4"


class Saveable(Protocol):
    """A model that can be written to a folder: a `RIN`, or a `GaussianDiffusion` around one."""

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the model to a folder."""


def push_to_hub(
    model: str | os.PathLike[str] | Saveable,
    repo: str,
    *,
    private: bool = False,
    license: str | None = None,
    new_card: bool = False,
) -> str:
    """Upload a model to the hub as `repo` (user/name); return its URL.

    `model` is the folder of a run, a `RIN`, or a `GaussianDiffusion`, which includes the options of the diffusion. One
    commit contains the weights, the configuration without local paths, the last samples, and a model card of the run.
    An existing card is replaced only with `new_card`. `license` (mit, cc-by-4.0, ...) is written to the card. The token
    is that of `hf auth login` or `HF_TOKEN`. Raises `UsageError` if the folder has no complete model, or if the hub
    refuses the upload.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not isinstance(model, str | os.PathLike):
        with TemporaryDirectory() as saved:
            model.save_pretrained(saved)
            return push_to_hub(saved, repo, private=private, license=license, new_card=new_card)
    folder = Path(model)
    match = HUB_ID.match(repo.removeprefix(HUB))
    if match is None or match["revision"]:
        raise UsageError(f"{repo} is not a valid name on the hub: use user/name")
    repo = match["repo"]
    if not folder.is_dir():
        raise UsageError(f"the folder {folder} does not exist: pass the folder of a run")
    _, config = load_model(folder)  # raises an error if the model is incomplete or damaged
    files: dict[str, Any] = {WEIGHTS: folder / WEIGHTS, CONFIG: to_yaml(without_paths(config)).encode()}
    files |= last_samples(folder)
    api = HfApi(library_name="rin-video")
    with plain_errors(repo, None, "pushed to"):
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        if new_card or not api.file_exists(repo, "README.md"):
            files["README.md"] = model_card(folder, repo, license).encode()
        operations = [CommitOperationAdd(name, os.fspath(f) if isinstance(f, Path) else f) for name, f in files.items()]
        api.create_commit(repo, operations, commit_message="Model of rin-video")
    return str(url)


def model_card(folder: Path, repo: str, license: str | None = None) -> str:
    """Return a model card in Markdown with metadata, from the files of a run, or from the model alone."""
    from huggingface_hub import ModelCardData

    config = load_config(folder / CONFIG)
    made, lines = read_json(folder / "run.json"), read_lines(folder / "metrics.jsonl")
    info, samples = model_info(config.model), last_samples(folder)
    clips = len(info.shape) == 4
    kind = "clips" if clips else "images" if len(info.shape) == 3 else "sequences"
    tags = ["rin-video", "recurrent-interface-network", "diffusion", *(["video-generation"] if clips else [])]
    task = "unconditional-image-generation" if kind == "images" else None
    metadata = ModelCardData(library_name="rin-video", tags=tags, license=license or None, pipeline_tag=task)
    versions = made["versions"] if isinstance(made.get("versions"), dict) else {}
    facts = {
        "data": data_name(config),
        "classes": ", ".join(config.data.classes),
        "steps": f"{lines[-1]['step']:,}" if lines else None,
        "batch": config.train.train_batch_size * config.train.gradient_accumulate_every if lines else None,
        "learning rate": f"{config.train.train_lr:g}, {config.train.optimizer}" if lines else None,
        "last loss": f"{lines[-1]['loss']:.4f} ({config.diffusion.objective})" if lines else None,
        "trained on": made.get("device"),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }
    suffix = "mp4" if clips else "png" if kind == "images" else "npy"
    paragraphs = [
        f"---\n{metadata}\n---",
        f"# {plain_text(repo.split('/')[1])}",
        f"A Recurrent Interface Network ([RIN](https://arxiv.org/abs/2212.11972)) that generates {kind} of "
        f"{'x'.join(map(str, info.shape[1:]))}, with {info.params / 1e6:.1f} million parameters.",
        f"![Samples]({PICTURE})" if PICTURE in samples else "",
        f"The samples as a video: [{CLIP}]({CLIP})." if CLIP in samples else "",
        "## Use",
        code_block(f"pip install rin-video\nrin-video sample {repo} --num 4 --out samples.{suffix}"),
        code_block(
            "from rin_video import GaussianDiffusion\n\n"
            f'diffusion = GaussianDiffusion.from_pretrained("{repo}")\nsamples = diffusion.sample(batch_size=4)',
            "python",
        ),
        "The files are safetensors and YAML. They contain no code.",
        "## Training\n\n| | |\n|---|---|\n"
        + "\n".join(f"| {name} | {plain_text(value)} |" for name, value in facts.items() if value)
        if any(facts.values())
        else "",
        score_section(results_of(folder)),
        "## Model",
        code_block(describe(config.model)),
        "## Configuration",
        code_block(to_yaml(without_paths(config)).strip(), "yaml"),
        "" if license else "## License\n\nNot chosen yet. Add `license:` to the metadata at the top of this card.",
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def score_section(results: list[dict[str, Any]]) -> str:
    """Return the scores of a run with their protocols as Markdown; empty if there are none."""
    parts = []
    for result in results:
        rows = [HEADINGS, ["---"] * len(HEADINGS), *(list(map(plain_text, row)) for row in score_rows(result))]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"{plain_text(describe_measurement(result))}\n\n{table}")
        parts += [f"- {plain_text(text)}" for text in warnings_of(result)]
    return "\n\n".join(["## Scores", *parts]) if parts else ""


def plain_text(text: object) -> str:
    """Escape text for one line of Markdown, so that it contains no markup, link, HTML, formula or table cell."""
    entities = {"\\": "&#92;", "|": "&#124;"}  # valid in the tables of every dialect, and never a formula
    escaped = "".join(entities.get(char, char) for char in html.escape(one_line(text), quote=False))
    return re.sub(r"[`*_~\[\]$:@]|(?<=www)\.|(?<!&)#", r"\\\g<0>", escaped, flags=re.IGNORECASE)


def code_block(text: str, language: str = "") -> str:
    """Return a fenced code block; the fence is longer than any fence within the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def without_paths(config: Config) -> Config:
    """Return the configuration without what is specific to this machine: local paths, and commands that read data."""

    def shared(path: str | None) -> str | None:
        return path if path and path.startswith(HUB) else None

    def public(name: str | None) -> str | None:
        return name if name and HUB_ID.match(name.removeprefix(HUB)) and not Path(name).exists() else None

    data = dataclasses.replace(
        config.data,
        path=shared(config.data.path),
        images=shared(config.data.images),
        text_encoder=public(config.data.text_encoder),
        allow_pipe=False,
    )
    return dataclasses.replace(
        config, data=data, train=dataclasses.replace(config.train, init_from=public(config.train.init_from))
    )


def data_name(config: Config) -> str | None:
    """Return the name of the data without its location, or None if it has no name."""
    path = config.data.path
    if not path or path.startswith(PIPE):
        return None
    return path if path.startswith(HUB) else Path(path).name


def last_samples(folder: Path) -> dict[str, Path]:
    """Return the last samples of a run, by their names on the hub."""
    found = {}
    for name in (PICTURE, CLIP):
        if paths := sorted((folder / "samples").glob(f"step-*{Path(name).suffix}")):
            found[name] = paths[-1]
    return found
