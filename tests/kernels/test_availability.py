"""Why kernels cannot run somewhere is said in words, and asking needs no Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from backends import DEVICE

from dtm_triton.kernels import unavailable_reason


def ask(device: str, setup: str = "", interpret: str = "0") -> str:
    code = f"{setup}\nimport torch\nfrom dtm_triton.kernels import unavailable_reason\n"
    code += f"print(unavailable_reason(torch.device({device!r})))"
    environment = os.environ | {"TRITON_INTERPRET": interpret}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_they_run_where_these_tests_run() -> None:
    assert unavailable_reason(DEVICE) is None


def test_other_devices() -> None:
    assert "'meta'" in str(unavailable_reason(torch.device("meta")))


def test_the_cpu_needs_the_interpreter() -> None:
    assert "TRITON_INTERPRET=1" in ask("cpu")
    assert ask("cpu", interpret="1").strip() == "None"


def test_without_triton() -> None:
    hide = """if 1:
        import importlib.util
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
    """
    assert "not installed" in ask("cpu", hide)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    assert "no GPU" in ask("cuda")
