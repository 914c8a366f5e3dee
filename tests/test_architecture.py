"""The house keeps its plan: the rooms and what each may import, as docs/architecture.md has them.

Imports inside functions and under TYPE_CHECKING count. Every claim is seen to fail once, on a copy
of the tree with a fault planted in it.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import efficientad

ROOT = Path(__file__).resolve().parent.parent
PLAN = Path("docs") / "architecture.md"
ANYWHERE = {"__version__", "_native", "kernels"}  # what every file may take from the root package
TAKEN = {*efficientad.__all__, "csrc", "_native"}
MOST_LINES, MOST_MODULES, MOST_LINES_OF_A_FUNCTION = 400, 15, 99
ROW = re.compile(r"^\| `([\w/]+)` \|.*\| ([^|]*) \|$")


def plan(root: Path) -> dict[str, set[str]]:
    """Room -> the rooms that it may import, from the table."""
    rows = map(ROW.match, (root / PLAN).read_text(encoding="utf-8").splitlines())
    return {row[1]: set(re.findall(r"`([\w/]+)`", row[2])) for row in rows if row}


def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of the package, the kernels and the benchmarks."""
    found = {}
    for folder in ("efficientad", "bench", "kernels"):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = ("efficientad", *parts) if folder == "kernels" else parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


def room(path: Path) -> str:
    """The room of a file, by its folder: "fast", "bench/census"; "" where it is in none."""
    folder = path.parent.name
    if path.parent.parent.name == "bench":
        return f"bench/{folder}"
    loose = folder == "efficientad" and path.name not in ("__init__.py", "__main__.py")
    return "" if loose else folder


parsed = functools.lru_cache(maxsize=None)(ast.parse)  # every fault reads the tree again


def imports(name: str, path: Path, *, lazy: bool = True) -> Iterator[tuple[str, str]]:
    """(module, name taken from it or "") of every import in a file; `lazy`: below its top, too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = parsed(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*above, node.module or ""]).strip(".") if node.level else node.module
            yield from ((source, alias.name) for alias in node.names)


def graph(root: Path) -> dict[str, set[str]]:
    """Module -> the modules of the tree that it imports."""
    files = modules(root)
    edges: dict[str, set[str]] = {}
    for name, path in files.items():
        targets = set()
        for source, taken in imports(name, path):
            inner = f"{source}.{taken}"
            targets.add(inner if inner in files else source)
        edges[name] = {target for target in targets & files.keys() if target != "efficientad"}
    return edges


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The nodes of one circle, or none."""
    try:
        graphlib.TopologicalSorter(edges).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def faults(root: Path) -> list[str]:
    """What in the tree goes against its plan, one sentence each."""
    allowed, files, edges = plan(root), modules(root), graph(root)
    rooms = {name: room(path) for name, path in files.items()}
    existing = set(rooms.values())
    found = [f"{name}: not in a room of the table" for name in files if rooms[name] not in allowed]
    found += [f"room {name}: in the table, not in the tree" for name in allowed.keys() - existing]
    found += [f"room {name}: a public name bears it" for name in existing & TAKEN]
    between: dict[str, set[str]] = {name: set() for name in existing}
    pairs = [(source, target) for source, targets in edges.items() for target in targets]
    for source, target in pairs:
        here, there = rooms[source], rooms[target]
        if here != there:
            between[here].add(there)
            if there not in allowed.get(here, ()):
                found.append(f"{source} imports {target}: {here} may not import {there}")
    for what, nodes in (("modules", circle(edges)), ("rooms", circle(between))):
        found += [f"circle of {what}: {' -> '.join(nodes)}"] if nodes else []
    for name, path in files.items():
        for source, taken in imports(name, path):
            if source == "efficientad" and taken and taken not in ANYWHERE:
                found.append(f"{name} takes {taken} from the root package, not from its room")
    census = [name for name in files if rooms[name] == "bench/census"]
    found += [f"{name} reaches torch" for name in reaching_torch(files, edges, census)]
    return found + faults_of_size(files)


def reaching_torch(
    files: dict[str, Path], edges: dict[str, set[str]], todo: list[str]
) -> list[str]:
    """Modules that import torch when they are loaded, of those that some modules reach."""
    seen = set()
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += edges[name]
    loaded = {n: {s.split(".")[0] for s, _ in imports(n, files[n], lazy=False)} for n in seen}
    return [name for name, packages in loaded.items() if "torch" in packages]


def faults_of_size(files: dict[str, Path]) -> list[str]:
    found, count = [], dict.fromkeys(map(room, files.values()), 0)
    for name, path in files.items():
        text = path.read_text(encoding="utf-8")
        tree = parsed(text)
        if path.name == "__init__.py" and name not in ("efficientad", "efficientad.kernels"):
            if not (len(tree.body) == 1 and ast.get_docstring(tree)):
                found.append(f"{name}: a room's __init__ holds a docstring and nothing else")
        elif path.name != "__main__.py":
            count[room(path)] += 1
        lines = len(text.splitlines())
        if lines > MOST_LINES:
            found.append(f"{name}: {lines} lines, at most {MOST_LINES}")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    found.append(f"{name}.{node.name}: {lines} lines, fewer than 100")
    found += [f"room {r}: {n} modules, at most 15" for r, n in count.items() if n > MOST_MODULES]
    return found


def test_the_house_keeps_its_plan():
    assert faults(ROOT) == []


def test_the_table_is_read():
    allowed = plan(ROOT)
    assert allowed["utils"] == set()
    assert allowed["ops"] == {"utils", "kernels"}
    assert {"fast", "cli", "bench", "bench/census", "efficientad", "kernels"} <= allowed.keys()


def add(path: str, code: str):
    """A fault: code at the end of a file, which is made if need be."""

    def plant(root: Path) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        with open(root / path, "a", encoding="utf-8") as file:
            file.write(f"\n{code}\n")

    return plant


def both(*plants):
    return lambda root: [plant(root) for plant in plants]


def in_plan(old: str, new: str):
    """A fault in the table's text."""

    def plant(root: Path) -> None:
        text = (root / PLAN).read_text(encoding="utf-8")
        assert old in text
        (root / PLAN).write_text(text.replace(old, new, 1), encoding="utf-8")

    return plant


UTILS, LAZY = "efficientad/utils/files.py", "def f():\n    import efficientad.model.networks"
FAULTS = {
    "a flat file": (add("efficientad/loose.py", ""), "efficientad.loose: not in a room"),
    "an unknown room": (add("efficientad/attic/old.py", ""), "attic.old: not in a room"),
    "an empty room": (in_plan("| `utils` |", "| `cellar` | - | - |\n| `utils` |"), "room cellar"),
    "a room without a row": (in_plan("| `utils` |", "| utils |"), "utils.files: not in a room"),
    "a public name": (add("efficientad/predict/x.py", ""), "room predict: a public name"),
    "an import": (add(UTILS, "import efficientad.fast.predictor"), "utils may not import fast"),
    "a lazy import": (add(UTILS, LAZY), "utils may not import model"),
    "a typed import": (
        add(UTILS, "if TYPE_CHECKING:\n    from efficientad.model import networks"),
        "utils may not import model",
    ),
    "kernels that know the package": (
        add("kernels/common.py", "from efficientad.ops import fused"),
        "kernels may not import ops",
    ),
    "an import from the root": (
        add("efficientad/cli/common.py", "from efficientad import FastPredictor"),
        "takes FastPredictor from the root",
    ),
    "a circle of modules": (
        both(
            add("efficientad/utils/a.py", "from efficientad.utils import b"),
            add("efficientad/utils/b.py", "from efficientad.utils.a import x"),
        ),
        "circle of modules",
    ),
    "a circle of rooms": (
        add("bench/shapes.py", "from bench.census import case"),
        "circle of rooms",
    ),
    "torch in the census": (add("bench/shapes.py", "import torch"), "bench.shapes reaches torch"),
    "code in a room's __init__": (
        add("efficientad/utils/__init__.py", "x = 1"),
        "efficientad.utils: a room's __init__",
    ),
    "a long file": (add(UTILS, "\n" * MOST_LINES), "lines, at most 400"),
    "a long function": (add(UTILS, "def f():\n" + "    x = 1\n" * 99), "utils.files.f: 100 lines"),
    "a crowded room": (
        both(*(add(f"efficientad/utils/x{i}.py", "") for i in range(MOST_MODULES))),
        "room utils",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(fault, tmp_path):
    for folder in ("efficientad", "bench", "kernels"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors", "results")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    (tmp_path / PLAN).parent.mkdir()
    shutil.copy(ROOT / PLAN, tmp_path / PLAN)
    plant, sentence = FAULTS[fault]
    plant(tmp_path)
    assert any(sentence in found for found in faults(tmp_path)), faults(tmp_path)
