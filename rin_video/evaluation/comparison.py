"""Results of evaluations: reads them, and compares two whose protocols are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rin_video.config_checks import is_number
from rin_video.errors import UsageError

# Sections of a protocol that may differ between results that compare: these are what is compared, or explain it.
FREE = ("model", "versions", "source")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their joined keys: {"clips.frames": 16}."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


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


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two protocols do not compare, with both values."""
    one, two = (flatten({k: v for k, v in p.items() if k not in FREE}) for p in (first, second))
    return {key: (one.get(key), two.get(key)) for key in sorted({*one, *two}) if one.get(key) != two.get(key)}


def read_result(path: Path) -> dict[str, Any]:
    """Read a result that `rin-video evaluate` wrote. Raises `UsageError` if the file is none."""
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder: pass a result, such as {path / 'evaluation' / 'scores.json'}")
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        result = None
    if not is_result(result):
        raise UsageError(f"{path} is not a result of `rin-video evaluate`: pass the file that --json wrote")
    return result


def is_result(result: Any) -> bool:
    """Return whether a JSON value has the protocol and the scores of an evaluation, with valid numbers."""
    if not isinstance(result, dict) or not isinstance(result.get("protocol"), dict):
        return False
    scores = result.get("scores")
    return (
        isinstance(scores, dict)
        and bool(scores)
        and all(
            isinstance(score, dict)
            and all(is_number(score.get(key)) for key in ("value", "low", "high", "n"))
            and (score.get("floor") is None or is_number(score["floor"]))
            for score in scores.values()
        )
    )


def compare(first: Path, second: Path) -> list[str]:
    """Return two results side by side, as lines of a table. Raises `UsageError` if they do not compare."""
    one, two = read_result(first), read_result(second)
    if differing := differences(one["protocol"], two["protocol"]):
        first_keys = sorted(differing, key=lambda key: (key != "features.name", key))
        texts = [f"{key} is {differing[key][0]!r} and {differing[key][1]!r}" for key in first_keys]
        more = f" and {len(texts) - 6} more" if len(texts) > 6 else ""
        raise UsageError(f"{first} and {second} do not compare: {'; '.join(texts[:6])}{more}")
    return [f"A: {first}", f"B: {second}", *_differing_models(one, two), *_table(one["scores"], two["scores"])]


def _differing_models(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    a, b = (flatten({k: p["protocol"].get(k, {}) for k in FREE if k in p["protocol"]}) for p in (one, two))
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key):
            yield f"{key}: {_short(a.get(key))} and {_short(b.get(key))}"


def _short(value: Any) -> str:
    """Return a value as text; of a digest, the beginning."""
    return f"{value[:19]}..." if isinstance(value, str) and value.startswith("sha256:") else str(value)


def _table(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    names = [*one, *(name for name in two if name not in one)]
    width = max(map(len, names))
    interval = f"{'95 % interval':>20}"
    yield f"{'score':<{width}}  {'A':>9}  {interval}  {'B':>9}  {interval}  {'floor':>9}  clearly better"
    for name in names:
        a, b = one.get(name), two.get(name)
        cells = []
        for score in (a, b):
            if score is None:
                cells.append(f"{'':>9}  {'':>20}")
            else:
                interval = f"{score['low']:.4g} to {score['high']:.4g}"
                cells.append(f"{score['value']:>9.4g}  {interval:>20}")
        floor = (a or b or {}).get("floor")
        yield (
            f"{name:<{width}}  {cells[0]}  {cells[1]}  {'' if floor is None else format(floor, '.4g'):>9}  "
            f"{_verdict(a, b)}"
        )


def _verdict(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> str:
    """Say which of two scores is better, if their intervals do not overlap."""
    if a is None or b is None or (a["high"] >= b["low"] and b["high"] >= a["low"]):
        return "-" if a and b else ""
    if a.get("better") == "near 1":
        return "A" if abs(a["value"] - 1) < abs(b["value"] - 1) else "B"
    lower = a["value"] < b["value"]
    return "A" if lower == (a.get("better") == "lower") else "B"
