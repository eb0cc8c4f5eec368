"""The layout of the package: imports only point down, without circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
HOMES = {"rin_video": "rin_video", "datasets": "rin_video.datasets", "tokenizers": "rin_video.tokenizers"}
FLOORS = [  # from the ground up: a module imports from lower layers, or from its own without a circle
    {"errors", "registry", "files", "tensors", "layers", "ranks", "plain_yaml", "tensor_files", "labels"}
    | {"progress", "wording"},
    {"config", "config_checks", "config_files", "port"},
    {"media", "hub", "weights"},
    {"datasets", "tokenizers"},
    {"features"},
    {"model"},
    {"diffusion"},
    {"training"},
    {"evaluation"},
    {"reports"},
    {"cli"},
    {""},  # rin_video itself: the public names
]


def find_modules() -> dict[str, Path]:
    modules = {}
    for folder, home in HOMES.items():
        for path in (CHECKOUT / folder).rglob("*.py"):
            parts = path.relative_to(CHECKOUT / folder).with_suffix("").parts
            modules[".".join([home, *parts]).removesuffix(".__init__")] = path
    return modules


def find_imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """Return all modules of ours that a file imports, including imports in functions and for types only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [node.module + "." + alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {
            name if name in modules else name.rpartition(".")[0] for name in names if name.startswith("rin_video")
        }
    return found


def test_imports_point_down_and_in_no_circle():
    modules = find_modules()
    floors = {name: number for number, names in enumerate(FLOORS) for name in names}
    floor = {name: floors[[*name.split("."), ""][1]] for name in modules}
    graph = {name: find_imports(path, modules) for name, path in modules.items()}
    assert sum(map(len, graph.values())) > 200  # imports were found
    assert not {(one, two) for one, below in graph.items() for two in below if floor[two] > floor[one]}
    TopologicalSorter(graph).prepare()  # raises CycleError
