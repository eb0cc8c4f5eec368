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


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two protocols do not compare, with both values."""
    one, two = (flatten({k: v for k, v in p.items() if k not in FREE}) for p in (first, second))
    return {key: (one.get(key), two.get(key)) for key in sorted({*one, *two}) if one.get(key) != two.get(key)}


def read_result(path: Path) -> dict[str, Any]:
    """Read a result that `rin-video evaluate` wrote. Raises `UsageError` if the file is none."""
    try:
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
        texts = [f"{key} is {a} and {b}" for key, (a, b) in differing.items()]
        more = f" and {len(texts) - 6} more" if len(texts) > 6 else ""
        raise UsageError(f"{first} and {second} do not compare: {'; '.join(texts[:6])}{more}")
    return [*_differing_models(one, two), *_table(one["scores"], two["scores"])]


def _differing_models(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    a, b = (flatten({k: p["protocol"].get(k, {}) for k in FREE if k in p["protocol"]}) for p in (one, two))
    for key in sorted({*a, *b}):
        if a.get(key) != b.get(key):
            yield f"{key}: {a.get(key)} and {b.get(key)}"


def _table(one: Mapping[str, Any], two: Mapping[str, Any]) -> Iterator[str]:
    names = [*one, *(name for name in two if name not in one)]
    width = max(map(len, names))
    yield f"{'score':<{width}}  {'A':>9}  {'95 % interval':>20}  {'B':>9}  {'95 % interval':>20}  {'real':>9}  better"
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
        return "no clear difference" if a and b else ""
    lower = a["value"] < b["value"]
    return "A" if lower == (a.get("better") == "lower") else "B"
