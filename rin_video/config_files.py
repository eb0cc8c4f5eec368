"""Configurations from presets, YAML files and the command line, and their conversion to YAML."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

from rin_video.config import Config, ModelConfig, check_names
from rin_video.config_checks import complete_choice, takes_parameters, types_of
from rin_video.errors import UsageError

Layer: TypeAlias = dict[str, dict[str, Any]]  # section -> option -> value
NESTED = {  # former options for the parameters of others, which are now nested
    "diffusion": {
        "schedule_kwargs": "noise_schedule",
        "loss_weight_kwargs": "loss_weight",
        "time_sampling_kwargs": "time_sampling",
    },
    "sample": {"sampler_kwargs": "sampler", "schedule_kwargs": "schedule"},
}


def presets() -> list[str]:
    """Return the names of the presets in the package."""
    folder = resources.files("rin_video.configs")
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_config(name_or_file: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> Config:
    """Return the defaults, overridden by a preset or a YAML file, and then by `section.key=value`.

    Text is taken literally, in files and in overrides: `${...}` is not replaced. A file cannot set `data.allow_pipe`.
    Raises `UsageError` for an unknown preset, key or value. For an unknown key, the message names the most similar one.
    """
    values = dataclasses.asdict(Config())
    file = [] if name_or_file is None else [_read_file(name_or_file)]
    for layer in [*file, *_read_overrides(overrides)]:
        values = _merge(values, layer)
    return Config(**{name: section(**values[name]) for name, section in types_of(Config).items()})


def is_set(key: str, name_or_file: str | os.PathLike[str] | None = None, overrides: Sequence[str] = ()) -> bool:
    """Whether the file or the overrides set `section.key`, if only to its default."""
    section, name = key.split(".")
    layers = [*([] if name_or_file is None else [_read_file(name_or_file)]), *map(_read_override, overrides)]
    return any(name in layer.get(section, {}) for layer in layers)


def nest_parameters(section: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Convert former options `sampler: ddim, sampler_kwargs: {eta: 1}` to `sampler: {name: ddim, eta: 1}`."""
    nested = dict(options)
    for old, name in NESTED.get(section, {}).items():
        if parameters := nested.pop(old, None):
            nested[name] = complete_choice(nested.get(name), parameters)
    return nested


def _merge(values: Layer, layer: Layer) -> Layer:
    """Replace options of `values` by those of `layer`. A mapping is added to the previous one, unless it is empty."""
    from omegaconf import OmegaConf

    for section, options in layer.items():
        for name, value in options.items():
            if takes_parameters(types_of(types_of(Config)[section])[name]):
                options[name] = complete_choice(values[section][name], value)
                values[section][name] = None
            elif value == {}:
                values[section][name] = {}
    merged = OmegaConf.create(_map_text(_Text, values), flags={"allow_objects": True})
    merged.merge_with(_map_text(_Text, layer))
    return _map_text(None, OmegaConf.to_container(merged))


class _Text:
    """Text that is hidden from OmegaConf, which would replace `${...}` and treat `???` as a missing value."""

    def __init__(self, text: str) -> None:
        self.text = text


def _map_text(wrap: type[_Text] | None, value: Any) -> Any:
    """Wrap every text in nested values, or unwrap it if `wrap` is None."""
    if isinstance(value, dict):
        return {key: _map_text(wrap, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_text(wrap, item) for item in value]
    if wrap is not None and isinstance(value, str):
        return wrap(value)
    return value.text if isinstance(value, _Text) else value


def _read_file(name_or_file: str | os.PathLike[str]) -> Layer:
    """Read a preset or a file. `data.allow_pipe` is removed: a file from elsewhere must not allow commands."""
    from rin_video import plain_yaml

    text, origin = _read_text(name_or_file)
    node = plain_yaml.parse(text, origin)
    if not plain_yaml.is_mapping(node):
        raise UsageError(
            f"{origin} is not a mapping of sections: its keys must be model:, diffusion:, data:, train: and sample:"
        )
    layer = _read_layer(plain_yaml.read_items(node, origin), origin)
    layer.get("data", {}).pop("allow_pipe", None)
    return layer


def _read_overrides(overrides: Sequence[str]) -> list[Layer]:
    """Read overrides in order, but parameters after the names that they belong to."""

    def is_parameters(layer: Layer) -> bool:
        ((section, options),) = layer.items()
        ((name, value),) = options.items()
        kind = types_of(types_of(Config)[section])[name]
        return takes_parameters(kind) and isinstance(value, dict) and "name" not in value

    return sorted(map(_read_override, overrides), key=is_parameters)


def _read_override(override: str) -> Layer:
    """Read `section.key=value`. Text needs no quotes, whatever it contains; text in quotes is read as YAML."""
    from rin_video import plain_yaml

    key, equals, text = override.partition("=")
    if not equals:
        raise UsageError(f"cannot read {override!r}: write overrides as section.key=value")
    section, *path = key.split(".")
    kind = types_of(types_of(Config)[section]).get(path[0]) if section in types_of(Config) and path else None
    yaml = r"'.*'|\".*\"" + (r"|\{.*\}" if takes_parameters(kind) else "")
    verbatim = plain_yaml.is_text(kind) and not re.fullmatch(yaml, text, flags=re.DOTALL)
    node = plain_yaml.text_node(text) if verbatim else plain_yaml.parse(text, override)
    for part in reversed(path):
        node = plain_yaml.mapping_node(part, node)
    return _read_layer({section: node}, override)


def _read_layer(sections: dict[str, Any], origin: str) -> Layer:
    """Convert YAML nodes to values of the types of their options."""
    from rin_video import plain_yaml

    check_names(sections, Config, origin, prefix="")
    layer: Layer = {}
    for section, node in sections.items():
        if not plain_yaml.is_mapping(node):
            raise UsageError(f"{origin}: {section} is a section: write {section}.key=value, or keys below {section}:")
        kind, nested = types_of(Config)[section], NESTED.get(section, {})
        options = plain_yaml.read_items(node, origin)
        check_names([nested.get(name, name) for name in options], kind, origin, prefix=f"{section}.")
        values = {
            name: plain_yaml.read_value(value, types_of(kind)[nested.get(name, name)], f"{section}.{name}", origin)
            for name, value in options.items()
        }
        layer[section] = nest_parameters(section, values)
    return layer


def to_yaml(config: Config | ModelConfig) -> str:
    """Return a configuration as YAML for `load_config`, without `data.allow_pipe`, which a file cannot set."""
    from rin_video import plain_yaml

    values = dataclasses.asdict(config)
    values.get("data", {}).pop("allow_pipe", None)
    return plain_yaml.dump(values)


def _read_text(name_or_file: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the text of a preset or a file, and its name for error messages."""
    name = os.fspath(name_or_file)
    if name in presets():
        return (resources.files("rin_video.configs") / f"{name}.yaml").read_text(encoding="utf-8"), f"preset {name}"
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"there is no preset and no file {name}: the presets are {', '.join(presets())}")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file: {error.reason}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts with JSON values: tuples become lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def read_overrides(overrides: Sequence[str]) -> Layer:
    """Return what `section.key=value` overrides set, without the defaults."""
    values: Layer = {}
    for layer in _read_overrides(overrides):
        for section, options in layer.items():
            values.setdefault(section, {}).update(options)
    return values
