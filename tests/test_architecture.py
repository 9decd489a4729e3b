"""The house rules: imports look down, importing needs no GPU and nothing heavy, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dtm_triton"
FILES = sorted(path for path in ROOT.rglob("*.py") if ".venv" not in path.parts and "build" not in path.parts)
MODULES = sorted(PACKAGE.rglob("*.py"))


def floor(path: Path) -> int:
    """0 kernels, 1 library, 2 training."""
    return {"kernels": 0, "train": 2}.get(path.relative_to(PACKAGE).parts[0], 1)


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_look_down(path: Path) -> None:
    allowed = {0: ("dtm_triton.kernels",), 1: ("dtm_triton",), 2: ("dtm_triton",)}[floor(path)]
    for name in imported(path):
        if name.startswith("dtm_triton"):
            assert name == "dtm_triton" or name.startswith(allowed), f"{name} is above"
            assert floor(path) == 2 or not name.startswith("dtm_triton.train"), f"{name} is above"
        elif floor(path) == 0:
            top = name.split(".")[0]
            assert top in {"torch", "triton"} or top in sys.stdlib_module_names, f"the kernels import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 300
    assert path.stem not in {"utils", "util", "misc", "common", "helpers"}


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout


def test_importing_the_package_loads_nothing_heavy() -> None:
    loaded = run("import sys, dtm_triton; print(sorted({'torch', 'triton', 'timm', 'numpy'} & set(sys.modules)))")
    assert loaded.strip() == "[]"


def test_the_library_works_without_triton_timm_and_matplotlib() -> None:
    """And asking for the kernels says that Triton is missing."""
    code = """
import sys
for name in ("triton", "timm", "matplotlib", "einops", "sklearn"):
    sys.modules[name] = None
import torch
from dtm_triton import morph, masking, visualize, tome
x = torch.randn(1, 8, 4)
print(morph.match_tokens(x, [3]).num_groups)
try:
    morph.match_tokens(x, [3], backend="triton")
except ValueError as error:
    print(error)
"""
    first, second = run(code).strip().splitlines()
    assert first == "5"
    assert "backend='triton' cannot run on cpu" in second and "riton is not installed" in second


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), "no module docstring"
