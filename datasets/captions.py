"""Captions to vectors, through a text encoder of the `transformers` library (extra `text`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rin_video.errors import UsageError, first_line
from rin_video.progress import progress_bar


class TextEncoder:
    """A frozen encoder by hub id or folder; weights are read from safetensors only, and no code of theirs is run.

    Of models of text and images the text part is taken, of those with a decoder the encoder. A hub id reaches the
    network. Raises `UsageError` where the package is missing or the source is no text encoder.
    """

    def __init__(self, source: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> None:
        transformers = import_transformers()
        here = Path(source).is_dir()
        try:
            options = {"local_files_only": here, "trust_remote_code": False}
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(os.fspath(source), **options)
            model = transformers.AutoModel.from_pretrained(os.fspath(source), use_safetensors=True, **options)
        except Exception as error:
            raise UsageError(
                f"{source} cannot be read as a text encoder ({first_line(error)}): give a folder that transformers "
                "saved (with .safetensors weights), or a hub id"
            ) from None
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self.model: Any = getattr(model, "text_model", model).eval().requires_grad_(False).to(device)
        self.source, self.device = source, torch.device(device)

    @property
    def dim(self) -> int:
        """Width of the vectors."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def encode(
        self, captions: Sequence[str], num_tokens: int, *, batch_size: int = 64, progress: bool = False
    ) -> tuple[Tensor, int]:
        """Captions as (N, num_tokens, dim) float32, zeros behind the end; and how many were longer, and are cut.

        With one token it is the mean over all of them.
        """
        most = min(getattr(self.tokenizer, "model_max_length", 512), 512)
        rows, cut = [torch.zeros(0, num_tokens, self.dim)], 0
        with progress_bar(len(captions), "captions", "caption", delay=2, disable=not progress) as bar:
            for start in range(0, len(captions), batch_size):
                part = [*captions[start : start + batch_size]]
                room = most if num_tokens == 1 else min(most, num_tokens)
                cut += sum(
                    len(ids) > room for ids in self.tokenizer(part, truncation=False, verbose=False)["input_ids"]
                )
                words = self.tokenizer(part, truncation=True, max_length=room, padding=True, return_tensors="pt")
                words = words.to(self.device)
                states = self.model(**words).last_hidden_state.float()
                there = words["attention_mask"].unsqueeze(-1).to(states)
                states = states * there
                if num_tokens == 1:
                    states = states.sum(1, keepdim=True) / there.sum(1, keepdim=True)
                row = torch.zeros(len(part), num_tokens, self.dim)
                row[:, : states.shape[1]] = states.cpu()
                rows.append(row)
                bar.update(len(part))
        return torch.cat(rows), cut


def fingerprint(source: str | os.PathLike[str], num_tokens: int, captions: Sequence[str]) -> str:
    """What the vectors of these captions depend on, as a digest: other weights in the same folder count as others."""
    folder = Path(source)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = json.dumps([os.fspath(source), num_tokens, states, list(captions)])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def import_transformers() -> Any:
    """The package, or a `UsageError` that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"captions need a text encoder: pip install 'rin-video[text]' ({first_line(error)})"
        ) from error
    try:
        transformers.AutoModel  # noqa: B018  # it is imported only now, and its packages with it
    except Exception as error:
        raise UsageError(
            f"transformers cannot be imported ({first_line(error)}): run rin-video from a folder that holds no "
            "`tokenizers` or `datasets`"
        ) from error
    return transformers
