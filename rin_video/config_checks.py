"""Checks of option values. Each raises a `UsageError` that names the option and the value."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rin_video.errors import UsageError


@cache
def types_of(kind: type) -> dict[str, Any]:
    """Return the types of the fields of a dataclass."""
    return get_type_hints(kind)


def names_of(kind: Any) -> tuple[str, ...]:
    """Return the names that an option of a type takes, in order; empty if the type lists none."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    members = [member for member in get_args(kind) if member is not type(None) and get_origin(member) is not dict]
    return names_of(members[0]) if len(members) == 1 and get_origin(kind) in (Union, UnionType) else ()


def takes_parameters(kind: Any) -> bool:
    """Whether options of a type are names that may have parameters: `ddim`, or `{name: ddim, eta: 0.5}`."""
    return bool(names_of(kind)) and any(get_origin(member) is dict for member in get_args(kind))


def split_parameters(choice: Any) -> tuple[Any, dict[str, float]]:
    """Return the name (or None) and the parameters of a choice such as `ddim` or `{name: ddim, eta: 0.5}`."""
    if not isinstance(choice, Mapping):
        return choice, {}
    parameters = dict(choice)
    return parameters.pop("name", None), parameters


def complete_choice(before: Any, choice: Any) -> Any:
    """Add parameters without a name to the previous choice; a name without parameters has the default ones."""
    if not isinstance(choice, Mapping) or "name" in choice:
        name, parameters = split_parameters(choice)
    else:
        name, parameters = split_parameters(before)
        parameters = {**parameters, **choice} if choice else {}
    return name if not parameters else parameters if name is None else {"name": name, **parameters}


def complete_choices(config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options for `dataclasses.replace(config, ...)`, in which parameters may come without a name."""
    types = types_of(config.__class__)
    return {
        name: complete_choice(getattr(config, name), value) if takes_parameters(types[name]) else value
        for name, value in options.items()
    }


def check_choices(section: str, config: Any) -> None:
    """Raise `UsageError` if a field has a name that its type does not list, or a parameter that is not a number."""
    for field, kind in types_of(config.__class__).items():
        if not (names := names_of(kind)):
            continue
        if takes_parameters(kind):
            setattr(config, field, complete_choice(None, getattr(config, field)))  # {name: ddim} is ddim
        name, parameters = split_parameters(getattr(config, field))
        if name is not None or type(None) not in get_args(kind):
            check_choice(f"{section}.{field}", name, names)
        for parameter, value in parameters.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise UsageError(f"{section}.{field}.{parameter} is {value!r}: it must be a number")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise `UsageError` if `value` is not one of `choices`."""
    if value not in choices:
        raise UsageError(f"{name}={value} is unknown: choose {', '.join(choices)}")


def check_at_least(name: str, value: Any, least: int, kind: type) -> None:
    """Raise `UsageError` if `value` is not a number of at least `least`, or not a whole number if `kind` is int."""
    if kind is int and not is_whole(value, -(10**18)):
        raise UsageError(f"{name} is {value!r}: it must be a whole number")
    if not is_number(value) or value < least:
        raise UsageError(f"{name} is {value!r}: it must be at least {least}")


def check_above(section: str, name: str, value: Any, bound: float) -> None:
    """Raise `UsageError` if `value` is not a number above `bound`."""
    if not (is_number(value) and value > bound):
        raise UsageError(f"{section}.{name} is {value!r}: it must be above {bound}")


def check_within(name: str, value: Any, low: float, high: float) -> None:
    """Raise `UsageError` if `value` is not a number in [low, high]."""
    if not (is_number(value) and low <= value <= high):
        raise UsageError(f"{name} is {value!r}: it must be in [{low}, {high}]")


def check_range(name: str, value: Any, low: float, high: float) -> None:
    """Raise `UsageError` if `value` is not two ascending numbers in [low, high]."""
    if len(value) != 2 or not all(is_number(n) for n in value) or not low <= value[0] <= value[1] <= high:
        raise UsageError(f"{name} is {list(value)}: it must be two numbers in [{low}, {high}], the smaller first")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float; a bool is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any, least: int) -> bool:
    """Whether `value` is an int of at least `least`; a bool is not an int."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def read_numbers(name: str, value: Any, count: int, names: str) -> tuple[int, ...]:
    """Return `count` positive integers from a list, or from one number for all. Raises `UsageError` otherwise."""
    numbers = tuple(value) if isinstance(value, list | tuple) else (value,) * count
    if len(numbers) != count or any(not is_whole(n, 1) for n in numbers):
        raise UsageError(f"{name} is {value}: it must be one number or {count} ({names}), each at least 1")
    return numbers


DURATION = re.compile("".join(rf"(?:([0-9]+(?:\.[0-9]+)?){unit})?" for unit in "dhms"))
UNITS = (86400, 3600, 60, 1)  # seconds


def read_duration(name: str, text: Any) -> float:
    """Return the seconds of a duration such as `90s`, `30m`, `2h`, `1d` or `1h30m`.

    Raises `UsageError` for anything else, also for a number without a unit and for a duration of 0.
    """
    found = DURATION.fullmatch(text) if isinstance(text, str) else None
    parts = found.groups() if found else ()
    seconds = sum(float(part) * unit for part, unit in zip(parts, UNITS, strict=False) if part)
    if not 0 < seconds < math.inf:
        raise UsageError(f"{name} is {text!r}: it must be a time above 0 with units, such as 90s, 30m, 2h, 1d or 1h30m")
    return seconds
