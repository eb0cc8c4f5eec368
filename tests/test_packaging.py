"""The wheel contains one top-level package with everything it needs and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]
FOLDERS = {"rin_video": "rin_video", "tokenizers": "rin_video/tokenizers", "datasets": "rin_video/datasets",
           "configs": "rin_video/configs"}  # fmt: skip
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a copy of the checkout, built offline with the installed setuptools."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "golden")
    for folder in (*FOLDERS, "tests"):
        shutil.copytree(CHECKOUT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, env=environment, capture_output=True, check=True
    )
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def names(wheel) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return set(file.namelist())


def test_the_only_top_level_package_is_ours(names):
    """`tokenizers` and `datasets` are the names of two packages that many users have installed."""
    tops = {name.split("/")[0] for name in names}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert tops - info == {"rin_video"}
    assert len(info) == 1


def test_every_source_file_is_in_it_once_and_no_test(names):
    expected = {
        f"{home}/{path.relative_to(CHECKOUT / folder).as_posix()}"
        for folder, home in FOLDERS.items()
        for path in (CHECKOUT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".safetensors") or path.name == "py.typed"
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert "rin_video/py.typed" in names
    assert {f"rin_video/configs/{path.name}" for path in (CHECKOUT / "configs").glob("*.yaml")} <= names
    assert not [name for name in names if "test" in name]


def test_it_brings_the_command_and_the_licence(wheel, names):
    (entry_points,) = (name for name in names if name.endswith("/entry_points.txt"))
    assert [name for name in names if name.endswith("LICENSE")]
    with zipfile.ZipFile(wheel) as file:
        assert "rin-video = rin_video.cli:main" in file.read(entry_points).decode()


def test_every_extra_that_is_spoken_of_exists(wheel):
    pages = [CHECKOUT / "README.md", *CHECKOUT.glob("docs/*.md")]
    places = [*pages, *CHECKOUT.glob("rin_video/**/*.py"), *CHECKOUT.glob("datasets/*.py")]
    named = {extra for path in places for extra in re.findall(r"rin-video\[([a-z]+)\]", path.read_text("utf-8"))}
    with zipfile.ZipFile(wheel) as file:
        (metadata,) = (name for name in file.namelist() if name.endswith("/METADATA"))
        provided = set(re.findall(r"^Provides-Extra: (\S+)", file.read(metadata).decode(), re.MULTILINE))
    assert {"hub", "text"} <= named <= provided


def test_it_runs_from_the_wheel_alone(wheel, tmp_path):
    """Presets are found in the wheel, and nothing is imported from the checkout."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)];"
        "from rin_video import config_files as c, cli; assert c.__file__.startswith(sys.argv[1]), c.__file__;"
        "print(*c.presets()); [c.load_config(name) for name in c.presets()]"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(wheel)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == sorted(path.stem for path in (CHECKOUT / "configs").glob("*.yaml"))
