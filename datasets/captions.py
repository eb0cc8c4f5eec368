"""Encoding of captions with a text encoder of the `transformers` library (extra `text`)."""

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
    """A frozen text encoder from a hub id or a folder; it loads safetensors weights only and runs no remote code.

    For text-image models the text tower is used, for encoder-decoder models the encoder. A hub id requires network
    access. Raises `UsageError` if the package is missing or the source is not a text encoder.
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
                f"{source} cannot be read as a text encoder ({first_line(error)}): pass a folder that transformers "
                "saved (with .safetensors weights), or a hub id"
            ) from None
        if model.config.is_encoder_decoder:
            model = model.get_encoder()
        self.model: Any = getattr(model, "text_model", model).eval().requires_grad_(False).to(device)
        self.source, self.device = source, torch.device(device)

    @property
    def dim(self) -> int:
        """The width of the vectors."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def encode(
        self, captions: Sequence[str], num_tokens: int, *, batch_size: int = 64, progress: bool = False
    ) -> tuple[Tensor, int]:
        """Encode captions to (N, num_tokens, dim) float32, zero-padded; also return how many were truncated.

        If `num_tokens` is 1, the vector is the mean over all tokens.
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
                mask = words["attention_mask"].unsqueeze(-1).to(states)
                states = states * mask
                if num_tokens == 1:
                    states = states.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
                row = torch.zeros(len(part), num_tokens, self.dim)
                row[:, : states.shape[1]] = states.cpu()
                rows.append(row)
                bar.update(len(part))
        return torch.cat(rows), cut


def fingerprint(source: str | os.PathLike[str], num_tokens: int, captions: Sequence[str]) -> str:
    """Return a digest of everything that the vectors of these captions depend on, the files in the folder included."""
    folder = Path(source)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    content = json.dumps([os.fspath(source), num_tokens, states, list(captions)])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def import_transformers() -> Any:
    """Import and return `transformers`; raise a `UsageError` with the remedy if that fails."""
    try:
        import transformers
    except ImportError as error:
        raise UsageError(
            f"captions need a text encoder: pip install 'rin-video[text]' ({first_line(error)})"
        ) from error
    try:
        transformers.AutoModel  # noqa: B018  # triggers the lazy import of its dependencies
    except Exception as error:
        raise UsageError(
            f"transformers cannot be imported ({first_line(error)}): run rin-video from a folder without "
            "`tokenizers` or `datasets`"
        ) from error
    return transformers
