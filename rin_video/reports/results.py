"""The scores of a run with their protocol, for the report page and the model card."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rin_video.errors import UsageError
from rin_video.evaluation.comparison import read_result

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


HEADINGS = ["score", "value", "95 % interval", "real samples", "better"]


def describe_measurement(result: Mapping[str, Any]) -> str:
    """Return one sentence with the protocol: samples, real samples, features, sampler and seed."""
    protocol = result["protocol"]

    def get(section: str, key: str) -> Any:
        values = protocol.get(section)
        return values.get(key, "unknown") if isinstance(values, dict) else "unknown"

    size = get("clips", "size")
    size = "x".join(map(str, size)) if isinstance(size, list) else size
    frames, given = get("clips", "frames"), get("clips", "given")
    shape = f"{frames}x{size}" if frames else size
    text = (
        f"{get('samples', 'num')} samples of {shape} ({get('samples', 'codec')}) against {get('data', 'num')} real "
        f"ones of {get('data', 'files')} files ({get('data', 'split')}); features {get('features', 'name')}, "
        f"{str(get('features', 'digest'))[:19]}"
    )
    if isinstance(given, int):
        text += f"; predicted from {given} given frames"
    if isinstance(protocol.get("model"), dict):
        sampler = get("model", "sample.sampler")
        text += (
            f"; {sampler}, {get('model', 'sample.steps')} steps, guidance {get('model', 'sample.guidance')}, "
            f"seed {get('model', 'seed')}"
        )
    if isinstance(protocol.get("published"), str):
        text += f"; protocol {protocol['published']}"
    return text + "."


def warnings_of(result: Mapping[str, Any]) -> list[str]:
    """Return the warnings of a result."""
    warnings = result.get("warnings")
    return [str(text) for text in warnings] if isinstance(warnings, list) else []
