"""A YAML subset with text, numbers, lists and mappings, but without tags, interpolation or code execution.

The type of an option determines how its value is parsed, so text stays as written: a folder called `1e3`, `no` or
`${x}` keeps its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from rin_video.errors import UsageError

STR, NULL, SEQ, MAP = (f"tag:yaml.org,2002:{name}" for name in ("str", "null", "seq", "map"))
IS_NULL = re.compile(r"(~|null|Null|NULL|)\Z")
IS_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)\Z")
IS_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?\Z")  # YAML 1.2, so 1e3 is a float
BOOLS = dict.fromkeys(("true", "yes", "on", "y", "1"), True) | dict.fromkeys(("false", "no", "off", "n", "0"), False)
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


class Loader(yaml.SafeLoader):
    """A loader that only distinguishes null from text; the type of the option determines how the text is parsed."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 (as in the base class)


Loader.add_implicit_resolver(NULL, IS_NULL, ["~", "n", "N", ""])


class Dumper(yaml.SafeDumper):
    """A dumper that writes no aliases and quotes text that YAML 1.1 or 1.2 would parse as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return True: no value is written as an alias."""
        return True


Dumper.add_implicit_resolver("tag:yaml.org,2002:float", IS_FLOAT, list("-+.0123456789"))


def _represent_text(dumper: yaml.SafeDumper, text: str) -> ScalarNode:
    return dumper.represent_scalar(STR, text, style=None if text.isprintable() else '"')


Dumper.add_representer(str, _represent_text)


def dump(value: Any) -> str:
    """Return dicts, lists, text and numbers as YAML; every text takes one line."""
    return yaml.dump(value, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=math.inf)


def parse(text: str, origin: str) -> Node:
    """Parse a document into nodes. Raises a `UsageError` that names `origin` if it is not valid YAML."""
    try:
        node = yaml.compose(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{origin}: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UsageError(f"{origin}: its lists and mappings are nested too deeply") from None
    return node or text_node("")


def text_node(text: str) -> Node:
    """Return the node of an unquoted text, which may be null."""
    return ScalarNode(NULL if IS_NULL.match(text) else STR, text)


def is_text(kind: Any) -> bool:
    """Return whether a type accepts text."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
    return any(member is str or get_origin(member) is Literal for member in members)


def mapping_node(key: str, value: Node) -> Node:
    """Return the node of a mapping with one key."""
    return MappingNode(MAP, [(text_node(key), value)])


def is_mapping(node: Node) -> bool:
    """Return whether a node is a mapping without a tag of its own."""
    return isinstance(node, MappingNode) and node.tag == MAP


def read_items(node: Node, origin: str) -> dict[str, Node]:
    """Return the keys and values of a mapping. Raises `UsageError` if a key is not text or occurs twice."""
    items: dict[str, Node] = {}
    for key, value in node.value:
        if not isinstance(key, ScalarNode):
            raise UsageError(f"{origin}: a list or mapping cannot be a key: write key: value")
        if key.value in items:
            raise UsageError(f"{origin}: the key {key.value} occurs twice (duplicate key): remove one")
        items[key.value] = value
    return items


def read_value(node: Node, kind: Any, name: str, origin: str) -> Any:
    """Convert a node to the type `kind`: bool, int, float, str, Literal, list, dict[str, ...] or a union of these.

    Raises `UsageError` if the value has another type. The names that a Literal allows are not checked here.
    """
    try:
        return _read(node, kind, origin)
    except TypeError:
        found = "a list" if isinstance(node, SequenceNode) else "a mapping"
        if isinstance(node, ScalarNode):
            found = str(node.value)[:80]
        if node.tag not in (STR, NULL, SEQ, MAP):
            raise UsageError(f"{origin}: {name} has the tag {node.tag}: tags are not supported, remove it") from None
        raise UsageError(f"{origin}: {name} is {found}: it must be {_words(kind)}") from None


def _read(node: Node, kind: Any, origin: str) -> Any:
    """Convert a node to the type `kind`; raise `TypeError` if it has another type."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, UnionType):
        if node.tag == NULL and NoneType in inner:
            return None
        quoted = isinstance(node, ScalarNode) and node.style is not None
        for member in sorted(inner, key=lambda member: quoted and member is not str):  # prefer text if it is quoted
            with suppress(TypeError):
                return _read(node, member, origin)
    elif outer in (list, Sequence) and node.tag == SEQ and isinstance(node, SequenceNode):
        return [_read(item, inner[0], origin) for item in node.value]
    elif outer is dict and is_mapping(node):
        return {key: _read(value, inner[1], origin) for key, value in read_items(node, origin).items()}
    elif isinstance(node, ScalarNode) and node.tag in (STR, NULL):
        return _read_scalar(node.value, str if outer is Literal else kind)
    raise TypeError


def _read_scalar(text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool and text.lower() in BOOLS:
        return BOOLS[text.lower()]
    with suppress(ValueError):
        if kind is int and IS_INT.match(text):
            return int(text)
        if kind is float:
            return float(re.sub(r"^([-+]?)\.(?=inf|nan)", r"\1", text.lower()))  # .inf and .nan
    raise TypeError


def _words(kind: Any) -> str:
    """Describe the values of a type for an error message."""
    outer, inner = get_origin(kind), get_args(kind)
    if outer in (Union, UnionType):
        return " or ".join(map(_words, inner))
    if outer in (list, Sequence):
        return f"a list, each item {_words(inner[0])}"
    if outer is dict:
        return f"a mapping, each value {_words(inner[1])}"
    return WORDS[str if outer is Literal else kind]
