"""The result of an evaluation: scores, protocol and warnings, as text and JSON."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rin_video.evaluation.comparison import describe_measurement
from rin_video.evaluation.scores import Score, describe
from rin_video.files import write_text


@dataclass(repr=False)
class Evaluation:
    """The scores of an evaluation, and the protocol that they were measured with."""

    protocol: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "protocol": self.protocol,
            "scores": {name: score.to_dict() for name, score in self.scores.items()},
            "warnings": self.warnings,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the result as JSON, which `rin-video compare` reads."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_text(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    def table(self) -> str:
        """Return what was measured, the scores and the warnings as text."""
        about = describe_measurement({"protocol": self.protocol})
        return "\n".join([about, *describe(self.scores), *(f"- {warning}" for warning in self.warnings)])

    def __repr__(self) -> str:
        return self.table()

    def warn(self, text: str) -> None:
        """Add a warning, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the duration of the block to `seconds`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
