"""The scores of a run with their protocol, for the report page and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rin_video.errors import UsageError
from rin_video.evaluation.comparison import describe_measurement, read_result

FOLDER = "evaluation"  # in the folder of a run


def results_of(run: Path) -> list[dict[str, Any]]:
    """Return the results of `rin-video evaluate` in the folder of a run; damaged files are left out."""
    found = []
    for path in sorted((run / FOLDER).glob("*.json")):
        with suppress(UsageError):
            found.append(read_result(path))
    return found


def score_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of text for each score: name, value, interval, the value of real samples, and what is better."""
    rows = []
    for name, score in result["scores"].items():
        floor = "" if score.get("floor") is None else f"{score['floor']:.4g}"
        if floor and isinstance(score.get("floor_n"), int):
            floor += f" (n = {score['floor_n']})"
        interval = f"{score['low']:.4g} to {score['high']:.4g}"
        rows.append([name, f"{score['value']:.4g}", interval, floor, str(score.get("better", ""))])
    return rows


HEADINGS = ["score", "value", "95 % interval", "floor (of real samples)", "better"]


def warnings_of(result: Mapping[str, Any]) -> list[str]:
    """Return the warnings of a result."""
    warnings = result.get("warnings")
    return [str(text) for text in warnings] if isinstance(warnings, list) else []


__all__ = ["HEADINGS", "describe_measurement", "results_of", "score_rows", "warnings_of"]
