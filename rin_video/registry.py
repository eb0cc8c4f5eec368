"""Things that are found by name: ours register on import, third-party ones through an entry-point group."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from rin_video.errors import UsageError

T = TypeVar("T")


class Registry(Generic[T]):
    """A name-to-thing table that other distributions can extend.

    `kind` is the word for error messages ("tokenizer"). `group` is the entry-point group in which other distributions
    announce theirs; an entry point is loaded only when its name is asked for.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds a thing under `name`. Raises `ValueError` when the name is taken."""

        def add(thing: T) -> T:
            if name in self._things:
                raise ValueError(f"a {self.kind} named {name!r} is registered already: choose another name")
            self._things[name] = thing
            return thing

        return add

    def get(self, name: str) -> T:
        """The thing called `name`. Raises `UsageError`, which lists the known names, when there is none."""
        if name not in self._things:
            for entry in entry_points(group=self.group):
                if entry.name == name:
                    thing = entry.load()
                    self._things.setdefault(name, thing)  # importing it may have registered it
                    break
            else:
                raise UsageError(
                    f"unknown {self.kind} {name!r}: known are {', '.join(self)}. One that a script registers is known "
                    f"to that script only: for all programs, name it in pyproject.toml as an entry point of the group "
                    f"{self.group}, and install it"
                )
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._things, *(entry.name for entry in entry_points(group=self.group))}))

    def __contains__(self, name: object) -> bool:
        return name in set(self)
