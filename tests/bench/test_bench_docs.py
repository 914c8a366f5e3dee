"""What the documents tell a reader to run exists, and bench/README.md knows every command."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from bench.record import ROOT

DOCUMENTS = (
    "README.md", "bench/README.md", "bench/GPU_TODO.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
)  # fmt: skip
COMMAND = re.compile(r"python3? -m ([\w.]+)")
TEST_PATH = re.compile(r"(?<![\w./])tests/[\w./-]*\w")


def runs(module: str) -> bool:
    """Whether `python -m MODULE` finds a program; modules of this checkout must be one."""
    spec = importlib.util.find_spec(module)
    if spec is None:
        return False
    if spec.submodule_search_locations is not None:
        return importlib.util.find_spec(f"{module}.__main__") is not None
    ours = module.startswith(("bench.", "efficientad."))
    return not ours or '__name__ == "__main__"' in Path(spec.origin).read_text(encoding="utf-8")


def test_no_module_is_no_command():
    assert runs("bench.gpu")
    assert runs("bench.kernels.roofline")
    assert not runs("bench.kernels.rooflines")
    assert not runs("bench.kernels")  # a package without a __main__
    assert not runs("bench.kernels.device_times")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_commands_and_tests_in_the_documents_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [m for m in sorted(set(COMMAND.findall(text))) if not runs(m)] == []
    assert [p for p in sorted(set(TEST_PATH.findall(text))) if not (ROOT / p).exists()] == []


def test_benchs_readme_lists_every_command():
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(bench[\w.]*)` ", text, re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert all(map(runs, listed))
    commands = set()
    for path in (ROOT / "bench").rglob("*.py"):
        if path.name == "__main__.py":
            commands.add(".".join(path.relative_to(ROOT).parent.parts))
        elif '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            commands.add(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert set(listed) == commands
