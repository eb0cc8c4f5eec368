"""Registries of objects by name: ours register on import, third-party objects through an entry-point group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from rin_video.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of objects by name that other distributions can extend.

    `kind` is the word for error messages ("tokenizer"). `group` is the entry-point group in which other distributions
    register their objects; an entry point is loaded only when its name is looked up.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._objects: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers an object as `name`; it raises `ValueError` if the name is taken."""

        def add(value: T) -> T:
            if name in self._objects:
                raise ValueError(f"a {self.kind} named {name!r} is already registered: choose another name")
            self._objects[name] = value
            return value

        return add

    def get(self, name: str) -> T:
        """Return the object named `name`; raise a `UsageError` that lists the known names if there is none."""
        if name not in self._objects:
            for entry in entry_points(group=self.group):
                if entry.name == name:
                    value = entry.load()
                    self._objects.setdefault(name, value)  # importing it may have registered it
                    break
            else:
                raise UsageError(
                    f"unknown {self.kind} {name!r}: use one of {', '.join(self)}. A {self.kind} registered in a script "
                    f"is known to that script only: to use it everywhere, install it as an entry point of the group "
                    f"{self.group} (pyproject.toml)"
                )
        return self._objects[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._objects, *(entry.name for entry in entry_points(group=self.group))}))

    def __contains__(self, name: object) -> bool:
        return name in set(self)
