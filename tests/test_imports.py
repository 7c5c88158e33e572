"""What the rooms of the house import: downwards only, and no more than they promise."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imports_of(file: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file names in an import, wherever that stands; and whether it is in a `try`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    tried = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}: a relative import"
            names = [node.module or ""]
            if (ROOT / names[0].replace(".", "/")).is_dir():  # from networks import deft_math
                names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) in tried) for name in names)


@pytest.mark.parametrize("folder", ["networks", "library"])
def test_no_imports_go_in_a_circle(folder):
    files = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in ROOT.glob(f"{folder}/**/*.py")}
    assert len(files) > 5
    graph = {name: {found for found, _ in imports_of(file)} & files.keys() for name, file in files.items()}
    assert any(graph.values())
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("file", sorted((ROOT / "networks").glob("*.py")), ids=lambda file: file.name)
def test_networks_needs_torch_and_safetensors_alone(file):
    for name, tried in imports_of(file):
        package = name.split(".")[0]
        allowed = package in {"networks", "torch", "safetensors"} or package in sys.stdlib_module_names
        assert allowed or (package in {"tqdm", "PIL", "gguf", "matplotlib"} and tried), f"{file.name} imports {name}"
