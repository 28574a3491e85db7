"""Imports point one way, between files and between rooms. They are read from the source, not executed."""

from __future__ import annotations

import ast
import graphlib
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A room is a package without its sub-packages. In these packages each file is a room, because some files are
# below a sub-package and others above it: train.world is below train.checkpoint, train.loop above;
# layers.norm is below layers.fast_forwards, layers.accelerate above; ops.dropout is below ops.operators,
# ops.norm above.
FILES_ARE_ROOMS = ("lmim_fast", "lmim_fast.train", "lmim_fast.layers", "lmim_fast.ops", "benchmarks")

_BELOW = ("native", "config", "owner", "process", "errors", "durable", "faults", "")
_TRAIN = ("evaluation", "data", "models", "layers", "ops", *_BELOW)
# What each place in lmim_fast may import beside itself; "" is lmim_fast/__init__.py (version, public names).
# The longest place that contains a module applies to it. A new file or package at the top needs a line here.
MAY_IMPORT = {
    "errors": (),
    "faults": (),
    "durable": (),
    "process": (),
    "owner": ("process", "errors"),
    "config": (),
    "native": (),
    "kernels": (),
    "reference": ("config",),
    "reference_recognizer": ("config", "reference"),
    "ops": ("kernels", "native"),
    "layers": ("ops",),
    "": ("config", "layers"),
    "models": ("layers", "ops", "config", "errors", "durable"),
    "data": ("ops", "native", "config", "errors", "durable", "faults"),
    "data.store": ("native", "config", "owner", "errors", "durable", "faults"),
    "data.guidance": ("ops", "native", "config", "errors"),
    "data.augment": ("data.guidance", "ops", "config", "errors"),
    "data.render": ("data", "data.store", "config", "errors"),
    "data.importers": ("data", "data.store", "config", "errors", "durable", "faults"),
    "data.tools": ("data", "data.store", "config", "errors", "durable"),
    "train": _TRAIN,
    "train.optim": ("config",),
    "train.agreement": ("config", "errors", "faults"),
    "train.rendezvous": ("train.agreement", "process", "errors"),
    "train.world": ("train.rendezvous", "config", "process", "errors"),
    "evaluation": ("train.world", "data", "models", "ops", "config", "errors"),
    "train.checkpoint": ("train.world", "train.optim", "models", "config", "errors", "durable", "faults"),
    "report": ("train", *_TRAIN),
    "cli_options": ("data", "config", "errors"),
    "doctor": ("train", "native", *_TRAIN),
    "cli_commands": ("doctor", "report", "train", *_TRAIN),
    "terminal": ("data",),
    "cli": ("cli_commands", "terminal", "cli_options", "train", "data", "config", "errors", ""),
    "pretrain": ("cli", "train"),
    "finetune": ("cli", "train"),
    "evaluate": ("cli", "report"),
}
OUTSIDE = {
    "reference": {"torch"},
    "reference_recognizer": {"torch"},
    "kernels": {"torch", "triton"},
    "config": set[str](),
    "errors": {"torch"},
    "faults": {"torch"},
    "durable": set[str](),
}


@dataclass(frozen=True)
class Graph:
    """Which module imports which.

    files:   module -> its file, relative to the root.
    imports: module -> {module that it imports: first line that does}.
    outside: module -> third-party packages that it imports.
    rooms:   module -> room.
    """

    files: Mapping[str, Path]
    imports: Mapping[str, Mapping[str, int]]
    outside: Mapping[str, Set[str]]
    rooms: Mapping[str, str]

    def arrows(self) -> dict[str, set[str]]:
        """Room -> other rooms that it imports."""
        arrows: dict[str, set[str]] = {room: set() for room in self.rooms.values()}
        for importer, targets in self.imports.items():
            arrows[self.rooms[importer]] |= {self.rooms[target] for target in targets}
        return {room: targets - {room} for room, targets in arrows.items()}

    def floors(self) -> list[list[str]]:
        """Rooms by height; each imports from lower floors only.

        Raises:
            graphlib.CycleError: rooms import each other.
        """
        arrows, height = self.arrows(), dict[str, int]()
        for room in graphlib.TopologicalSorter(arrows).static_order():
            height[room] = 1 + max((height[target] for target in arrows[room]), default=-1)
        return [
            [room for room in sorted(height) if height[room] == floor] for floor in sorted({*height.values()})
        ]

    def edges(self) -> list[tuple[str, str, str]]:
        """Importer, imported module, and the import in words."""
        return [
            (importer, target, f"{self.files[importer]}:{line} imports {target}")
            for importer, targets in self.imports.items()
            for target, line in targets.items()
        ]

    def file_circles(self) -> list[str]:
        """Each circle of files: its imports."""
        return [
            self._imports_of(circle, {name: name for name in self.files}) for circle in circles(self.imports)
        ]

    def room_circles(self) -> list[str]:
        """Each circle of rooms, and the imports that make it."""
        return [
            f"{' -> '.join([*circle, circle[0]])}: {self._imports_of(circle, self.rooms)}"
            for circle in circles(self.arrows())
        ]

    def forbidden(self) -> list[str]:
        """Each import in lmim_fast that MAY_IMPORT does not list."""
        return [
            text
            for importer, target, text in self.edges()
            if importer.startswith("lmim_fast")
            and not any(_is_in(target, place) for place in (_place(importer), *MAY_IMPORT[_place(importer)]))
        ]

    def _imports_of(self, circle: list[str], nodes: Mapping[str, str]) -> str:
        steps = zip(circle, circle[1:] + circle[:1], strict=True)
        edges = [((nodes[importer], nodes[target]), text) for importer, target, text in self.edges()]
        return "; ".join(text for step in steps for edge, text in edges if edge == step)


def read_graph(root: Path) -> Graph:
    """The graph of `lmim_fast/` (with `kernels/`, through the link) and `benchmarks/` under `root`.

    Raises:
        ValueError: an import names a module that does not exist.
    """
    files = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path
        for package in ("lmim_fast", "benchmarks")
        for folder, _, names in os.walk(root / package, followlinks=True)
        for path in sorted((Path(folder) / name).relative_to(root) for name in names if name.endswith(".py"))
    }
    packages = {module for module, path in files.items() if path.name == "__init__.py"}
    imports: dict[str, dict[str, int]] = {module: {} for module in files}
    outside: dict[str, set[str]] = {module: set() for module in files}
    for module, path in files.items():
        package = module if module in packages else module.rpartition(".")[0]
        for line, name in sorted(_names(root / path, package)):
            top = name.partition(".")[0]
            if top not in ("lmim_fast", "benchmarks"):
                outside[module] |= {top} - sys.stdlib_module_names
            elif name != "lmim_fast._C":  # compiled
                target = name if name in files else name.rpartition(".")[0]
                if target not in files:
                    raise ValueError(f"{path}:{line} imports {name}, which does not exist")
                imports[module].setdefault(target, line)
    return Graph(files, imports, outside, {module: _room(module, packages) for module in files})


def _room(module: str, packages: Set[str]) -> str:
    package = module if module in packages else module.rpartition(".")[0]
    return module if package in FILES_ARE_ROOMS else package


def _names(path: Path, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every import anywhere in a file of `package`."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: 1 - node.level or None] if node.level else []
            start = ".".join([*parents, node.module] if node.module else parents)
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            constants = [name.value for name in node.args if isinstance(name, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in constants)  # computed names cannot be read


def circles(arrows: Mapping[str, Mapping[str, int] | Set[str]]) -> list[list[str]]:
    """The shortest circle through each node that is on one; each circle once."""
    shortest: dict[frozenset[str], list[str]] = {}
    for start in sorted(arrows):
        paths, seen = deque([[start]]), {start}
        while paths:
            path = paths.popleft()
            if start in arrows[path[-1]]:
                shortest.setdefault(frozenset(path), path)
                break
            paths += [[*path, target] for target in sorted(set(arrows[path[-1]]) - seen)]
            seen |= set(arrows[path[-1]])
    return list(shortest.values())


def _place(module: str) -> str:
    """The longest place of MAY_IMPORT that contains a module of lmim_fast."""
    place = module.removeprefix("lmim_fast").removeprefix(".")
    while place not in MAY_IMPORT:
        place = place.rpartition(".")[0]
    if not place and module != "lmim_fast":
        raise ValueError(f"MAY_IMPORT has no place for {module}")
    return place


def _is_in(module: str, place: str) -> bool:
    name = f"lmim_fast.{place}" if place else "lmim_fast"
    return module == name or (bool(place) and module.startswith(f"{name}."))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return read_graph(ROOT)


def test_every_file_is_read_and_rooms_have_floors(graph: Graph) -> None:
    floors = graph.floors()
    arrows = sum(map(len, graph.arrows().values()))
    print(f"{len(graph.files)} files, {len(graph.arrows())} rooms, {arrows} arrows, {len(floors)} floors")
    for number, rooms in enumerate(floors):
        print(f"{number}: {' '.join(rooms)}")
    read = {(ROOT / path).resolve() for path in graph.files.values()}
    folders = [ROOT / name for name in ("lmim_fast", "kernels", "benchmarks")]
    assert read == {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    order = ("kernels", "ops.operators", "layers.norm", "models", "train.checkpoint", "report", "cli")
    heights = [floor for name in order for floor, rooms in enumerate(floors) if f"lmim_fast.{name}" in rooms]
    assert len(heights) == len(order)
    assert heights == sorted(set(heights))


def test_no_files_import_each_other(graph: Graph) -> None:
    assert graph.file_circles() == []


def test_no_rooms_import_each_other(graph: Graph) -> None:
    assert graph.room_circles() == []


def test_imports_point_one_way(graph: Graph) -> None:
    assert graph.forbidden() == []


@pytest.mark.parametrize("place", OUTSIDE)
def test_the_oracle_kernels_config_and_errors_need_few_packages(graph: Graph, place: str) -> None:
    assert {
        name for module in graph.files if _is_in(module, place) for name in graph.outside[module]
    } <= OUTSIDE[place]


def tree(root: Path, **files: str) -> Graph:
    """The graph of a small package; `__` in a name of `files` is a folder."""
    for name, text in files.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in {path.parent for path in root.rglob("*.py")} | {root / "lmim_fast"}:
        (folder / "__init__.py").touch()
    return read_graph(root)


@pytest.mark.parametrize(
    "text",
    [
        "from lmim_fast import cli",
        "import lmim_fast.cli as entry",
        "from .cli import main",
        "def late():\n    from lmim_fast.cli import main",
        "if TYPE_CHECKING:\n    from lmim_fast.cli import Table",
        "entry = importlib.import_module('lmim_fast.cli')",
    ],
)
def test_a_circle_of_files_is_named_with_its_imports(text: str, tmp_path: Path) -> None:
    graph = tree(tmp_path, lmim_fast__cli="\nimport lmim_fast.pretrain", lmim_fast__pretrain=text)
    line = text.count("\n") + 1
    (circle,) = graph.file_circles()
    assert circle == (
        f"lmim_fast/cli.py:2 imports lmim_fast.pretrain; lmim_fast/pretrain.py:{line} imports lmim_fast.cli"
    )
    with pytest.raises(graphlib.CycleError):
        graph.floors()


def test_a_circle_of_rooms_is_named_though_no_files_import_each_other(tmp_path: Path) -> None:
    graph = tree(
        tmp_path,
        lmim_fast__data__order="",
        lmim_fast__data__pipeline="from lmim_fast.data.store import records",
        lmim_fast__data__store__records="from ..order import SampleOrder",
    )
    assert graph.file_circles() == []
    assert graph.room_circles() == [
        "lmim_fast.data -> lmim_fast.data.store -> lmim_fast.data: "
        "lmim_fast/data/pipeline.py:1 imports lmim_fast.data.store.records; "
        "lmim_fast/data/store/records.py:1 imports lmim_fast.data.order"
    ]
    assert graph.forbidden() == ["lmim_fast/data/store/records.py:1 imports lmim_fast.data.order"]


def test_a_circle_of_three_files_is_named_once(tmp_path: Path) -> None:
    files = {f"lmim_fast__{name}": f"import lmim_fast.{other}" for name, other in ("ab", "bc", "ca", "da")}
    (circle,) = tree(tmp_path, **files).file_circles()
    assert [part.partition(".py")[0] for part in circle.split("; ")] == [
        f"lmim_fast/{name}" for name in "abc"
    ]


@pytest.mark.parametrize(
    ("importer", "text", "wrong"),
    [
        ("ops__norm", "from lmim_fast.kernels import norm", False),
        ("kernels__norm", "from lmim_fast.ops import norm", True),
        ("models__mae", "from lmim_fast.train import loop", True),
        ("data__order", "from lmim_fast.models.mae import MAE", True),
        ("config__run", "from lmim_fast.config import model", False),
        ("config__run", "from lmim_fast.errors import UsageError", True),
        ("reference", "from lmim_fast.ops import norm", True),
        ("models__mae", "from lmim_fast.reference import ReferenceMAE", True),
        ("train__loop", "from lmim_fast.train.checkpoint import files", False),
        ("train__checkpoint__files", "from lmim_fast.train import world", False),
        ("train__checkpoint__files", "from lmim_fast.train import loop", True),
        ("train__loop", "from lmim_fast.report import page", True),
        ("report__page", "from lmim_fast.train import loop", False),
    ],
)
def test_an_import_against_the_order_is_named(importer: str, text: str, wrong: bool, tmp_path: Path) -> None:
    places = [
        "kernels__norm", "ops__norm", "errors", "config__model", "models__mae", "reference", "train__loop",
        "train__world", "train__checkpoint__files", "report__page",
    ]  # fmt: skip
    files = {f"lmim_fast__{name}": "" for name in places} | {f"lmim_fast__{importer}": text}
    graph = tree(tmp_path, **files)
    expected = [f"lmim_fast/{importer.replace('__', '/')}.py:1"] if wrong else []
    assert [line.partition(" imports ")[0] for line in graph.forbidden()] == expected


def test_a_module_without_a_place_and_an_import_of_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no place for lmim_fast\.nowhere"):
        tree(tmp_path, lmim_fast__errors="", lmim_fast__nowhere="import lmim_fast.errors").forbidden()
    with pytest.raises(ValueError, match=r"cli.py:1 imports lmim_fast.gone.main, which does not exist"):
        tree(tmp_path, lmim_fast__cli="from lmim_fast.gone import main")
