"""Pages that are made from the code when the site is built: an mkdocs hook.

The configuration reference comes from the dataclasses of `rin_video.config` and their comments, the command line from
the argument parser, the API from docstrings, the results from `benchmarks/`. Nothing of it is written twice.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import os
import re
import shutil
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

from rin_video import config as options
from rin_video.cli.parser import make_parser

CHECKOUT = Path(__file__).parents[1]
PACKAGE = CHECKOUT / "build/docs"  # the package as it is installed: our top-level folders lie inside it
HOMES = {"rin_video": "rin_video", "datasets": "rin_video/datasets", "tokenizers": "rin_video/tokenizers"}
WINGS = {  # page: title, what it is about, its package
    "model": ("Models", "The RIN, its blocks, what it costs, and weights taken from other models.", "rin_video.model"),
    "diffusion": ("Diffusion", "Noise schedules, the loss, samplers and rollouts.", "rin_video.diffusion"),
    "training": ("Training", "The trainer and everything that it orchestrates.", "rin_video.training"),
    "datasets": ("Data sets", "From files to clips and images.", "rin_video.datasets"),
    "tokenizers": ("Tokenizers", "From data to interface tokens and back.", "rin_video.tokenizers"),
    "features": ("Features", "Networks that describe clips and images for distances.", "rin_video.features"),
    "evaluation": ("Evaluation", "Scores of samples against real data, and their protocol.", "rin_video.evaluation"),
    "reports": ("Reports", "What a run looks like: diagnosis, HTML page, model card.", "rin_video.reports"),
    "cli": ("Command line", "The commands as functions.", "rin_video.cli"),
    "ground": ("Configuration, media and files", "What all other parts stand on.", "rin_video"),
}
COPIED = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "benchmarks/NOTES.md", "benchmarks/fashion.yaml")


# ---- mkdocs


def on_startup(**_: Any) -> None:
    """Copy the package for mkdocstrings, so that every module lies where it is imported from."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    for folder, home in HOMES.items():
        shutil.copytree(CHECKOUT / folder, PACKAGE / home, ignore=shutil.ignore_patterns("__pycache__"))


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and those that lie elsewhere in the repository."""
    from mkdocs.structure.files import File

    pages = {
        "reference/config.md": config_reference(),
        "reference/cli.md": cli_reference(),
        "reference/api/index.md": api_overview(),
        **{f"reference/api/{name}.md": api_page(name) for name in WINGS},
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    for path in (*COPIED, *(p.relative_to(CHECKOUT).as_posix() for p in CHECKOUT.glob("benchmarks/results/*.png"))):
        files.append(File.generated(config, path, abs_src_path=str(CHECKOUT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between docs/ and the rest of the repository: in the site all of it lies in one folder."""
    if "/" in page.file.src_uri:
        return markdown
    return markdown.replace("](../", "](").replace("](docs/", "](")


# ---- the configuration


def config_reference() -> str:
    """Every option of every section, as tables."""
    parts = [
        "# Configuration",
        "Every option has the same name in a YAML file, as `section.key=value` on the command line, and as an argument "
        "in Python. This page is generated from `rin_video/config.py`.",
    ]
    for section, kind in get_type_hints(options.Config).items():
        parts.append(section_reference(section, kind))
    parts.append(parameters_reference())
    return "\n\n".join(parts) + "\n"


def section_reference(section: str, kind: Any) -> str:
    """The options of one dataclass, and below it those of dataclasses that its options take."""
    comments = comments_of(kind)
    lines = [f"## `{section}` {{ #{section.replace('.', '-')} }}", doc_of(kind)]
    rows, nested = ["| option | type | default | |", "|---|---|---|---|"], []
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = f"{section}.{field.name}"
        cells = (f"`{field.name}`{{ #{name} }}", describe_type(hints[field.name]), f"`{default_of(field)}`")
        rows.append(f"| {' | '.join(cells)} | {escape(comments.get(field.name, ''))} |")
        nested += [section_reference(name, part) for part in dataclasses_in(hints[field.name])]
    return "\n\n".join([*lines, "\n".join(rows), *nested])


def parameters_reference() -> str:
    """The parameters of every choice that has some, from the signatures of the functions that implement it."""
    from rin_video.diffusion.objectives import LOSS_WEIGHTS, TIME_SAMPLINGS
    from rin_video.diffusion.samplers import SAMPLERS
    from rin_video.diffusion.schedules import SCHEDULES

    tables: dict[str, Any] = {
        "diffusion.noise_schedule, sample.schedule": SCHEDULES,
        "diffusion.loss_weight": LOSS_WEIGHTS,
        "diffusion.time_sampling": TIME_SAMPLINGS,
        "sample.sampler": SAMPLERS,
    }
    rows = ["| option | name | parameters | |", "|---|---|---|---|"]
    for option, table in tables.items():
        for name, function in table.items():
            found = inspect.signature(function).parameters.values()
            numbers = ", ".join(f"`{p.name}: {p.default}`" for p in found if isinstance(p.default, float))
            if numbers:
                options_ = ", ".join(f"`{part}`" for part in option.split(", "))
                rows.append(f"| {options_} | `{name}` | {numbers} | {escape(doc_of(function))} |")
    return "\n\n".join(
        [
            "## Parameters of names { #parameters }",
            "Some options take a name, or a map of the name and its parameters: `sampler: {name: ddim, eta: 0.5}` in "
            "YAML, `sample.sampler=ddim sample.sampler.eta=0.5` on the command line. Parameters and their defaults:",
            "\n".join(rows),
        ]
    )


def comments_of(kind: Any) -> dict[str, str]:
    """The comment of each field of a dataclass: on its own lines, or else on the lines just above."""
    source = inspect.getsource(kind)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    alone = {number for number, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
    found = {}
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = [n for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments]
            above = node.lineno - 1
            while not lines and above in alone:
                above -= 1
            lines = lines or list(range(above + 1, node.lineno))
            found[node.target.id] = spell_out(" ".join(comments[n] for n in lines if n in comments))
    return found


def spell_out(comment: str) -> str:
    """A comment with the names that a type stands for instead of the type: `SelfConditioningName, joined by +`."""
    kinds = {word: getattr(options, word, None) for word in re.findall(r"\b[A-Z]\w+\b", comment)}
    for word, kind in kinds.items():
        if get_origin(kind) is Literal:
            comment = comment.replace(word, ", ".join(f"`{name}`" for name in get_args(kind)))
    return comment


def describe_type(hint: Any) -> str:
    """A type as a reader of YAML knows it, with the names that it takes."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{name}`" for name in parts)
    if origin in (Union, UnionType) and options.Parameters in parts:
        names = ", ".join(describe_type(part) for part in parts if part != options.Parameters)
        return f"{names}; with [parameters](#parameters)"
    if origin in (Union, UnionType):
        return ", ".join(dict.fromkeys(describe_type(part) for part in parts))
    if origin is not None and issubclass(origin, dict):
        return f"map of {describe_type(parts[0])} to {describe_type(parts[1])}"
    if origin is not None:
        return f"list of {describe_type(parts[0])}" + "s" * (parts[0] in (int, float))
    if hint is type(None):
        return "`null`"
    if dataclasses.is_dataclass(hint):
        return doc_of(hint).rstrip(".")
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`", Any: "anything"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


def default_of(field: dataclasses.Field[Any]) -> str:
    """The default as it is written in YAML."""
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {part.name: getattr(value, part.name) for part in dataclasses.fields(value)}
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "" if value is dataclasses.MISSING else str(value) or "''"


def dataclasses_in(hint: Any) -> Iterator[Any]:
    """The dataclasses that a type is made of."""
    if dataclasses.is_dataclass(hint):
        yield hint
    for part in get_args(hint):
        yield from dataclasses_in(part)


def doc_of(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def escape(text: str) -> str:
    """Text in a cell of a table; code in it stays as it is."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", "\\|"))
    return "".join(part if part.startswith("`") else re.sub(r"([<*_\[\]])", r"\\\1", part) for part in parts)


# ---- the command line


def cli_reference() -> str:
    """The help of every command."""
    with mock.patch.dict(os.environ, {"COLUMNS": "90", "NO_COLOR": "1"}):
        parser = make_parser()
        parts = [
            "# Command line",
            "This page is generated from the argument parser: it is what `rin-video COMMAND --help` prints.",
            f"```text\n{parser.format_help()}```",
        ]
        names = {id(command): name for name, command in reversed(parser.commands.items())}  # without other names of one
        commands = [(name, parser.commands[name]) for name in reversed(names.values())]
        parts += [f"## {name}\n\n```text\n{command.format_help()}```" for name, command in commands]
    return "\n\n".join(parts) + "\n"


# ---- the API


def api_overview() -> str:
    """What `from rin_video import ...` gives, and where the rest is."""
    import rin_video

    names = "\n".join(
        f"| [`{name}`][{thing.__module__}.{thing.__qualname__}] | {escape(doc_of(thing))} |"
        for name in rin_video.__all__
        for thing in [getattr(rin_video, name)]
    )
    wings = "\n".join(f"| [{title}]({name}.md) | {about} |" for name, (title, about, _) in WINGS.items())
    return (
        "# Python API\n\nThese names are imported from `rin_video` itself:\n\n"
        f"| name | |\n|---|---|\n{names}\n\nThe other modules by part of the package:\n\n"
        f"| part | |\n|---|---|\n{wings}\n"
    )


def api_page(name: str) -> str:
    """The public modules of one wing; of its package, what is defined in the package itself."""
    title, about, package = WINGS[name]
    folder = PACKAGE.joinpath(*package.split("."))
    modules = [f"::: {package}.{path.stem}" for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]
    if name != "ground":
        nodes = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        own = [node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)]
        modules.insert(0, f"::: {package}\n    options:\n      members: [{', '.join(own)}]")
    return "\n\n".join([f"# {title}", about, *modules]) + "\n"
