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


DOORS = {PACKAGE / "kernels" / "bench.py", PACKAGE / "kernels" / "tune.py"}
"""Scripts that lie beside the kernels for a user to find; they only open what is above, and nothing imports them."""
SCRIPTS = {f"dtm_triton.kernels.{door.stem}" for door in DOORS}

BELOW = {"kernels": ["kernels"], "library": ["kernels", "library"]}
BELOW |= {"measure": [*BELOW["library"], "measure"], "train": [*BELOW["library"], "measure", "train"]}
"""What each floor may import: itself and what is below. Training is above measuring, which knows nothing of it."""


def floor(module: Path) -> str:
    """kernels, library, measure or train."""
    first = module.relative_to(PACKAGE).parts[0]
    return first if first in BELOW else "library"


def floor_of_name(name: str) -> str:
    """The floor of an imported module, such as dtm_triton.kernels.match."""
    first = [*name.split("."), "library"][1]
    return first if first in BELOW else "library"


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


@pytest.mark.parametrize("path", sorted(set(MODULES) - DOORS), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_look_down(path: Path) -> None:
    for name in imported(path):
        top = name.split(".")[0]
        if name != "dtm_triton" and top == "dtm_triton":
            assert floor_of_name(name) in BELOW[floor(path)], f"{name} is above or beside"
            assert not any(door.stem == name.removeprefix("dtm_triton.kernels.") for door in DOORS), (
                f"{name} is a script"
            )
        elif floor(path) == "kernels" and name != "dtm_triton":
            assert top in {"torch", "triton"} or top in sys.stdlib_module_names, f"the kernels import {name}"


def test_floors_are_told_apart() -> None:
    assert floor(PACKAGE / "kernels" / "match.py") == floor_of_name("dtm_triton.kernels.match") == "kernels"
    assert floor(PACKAGE / "ops.py") == floor_of_name("dtm_triton.ops") == "library"
    assert floor(PACKAGE / "measure" / "gate.py") == floor_of_name("dtm_triton.measure.gate") == "measure"
    assert floor(PACKAGE / "train" / "engine" / "loop.py") == floor_of_name("dtm_triton.train.engine.loop") == "train"
    for upper, below in (("library", "kernels"), ("measure", "library"), ("train", "measure")):
        assert below in BELOW[upper] and upper not in BELOW[below], f"{upper} lies on {below}"


@pytest.mark.parametrize("door", sorted(DOORS), ids=lambda path: path.name)
def test_the_doors_among_the_kernels_only_open(door: Path) -> None:
    """They are the exception to the rule above, so they hold nothing but an import of one main, and its call."""
    above = [name for name in imported(door) if name.startswith("dtm_triton.")]
    assert above == [f"dtm_triton.measure.{door.stem}", f"dtm_triton.measure.{door.stem}.main"]
    assert len(door.read_text().splitlines()) <= 20


@pytest.mark.parametrize("door", sorted(DOORS), ids=lambda path: path.name)
def test_the_doors_open_from_a_checkout(door: Path, tmp_path: Path) -> None:
    script = ROOT / "kernels" / door.name
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert f"usage: dtm-{door.stem}" in done.stdout


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
