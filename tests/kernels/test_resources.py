"""Every kernel compiles for every target without a GPU, and uses no more than the recorded table says.

The table is written by `python -m dtm_triton.kernels.resources --write tests/kernels/resources.json` (with
TRITON_INTERPRET=0), once for each minor version of Triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton

TABLE = json.loads((Path(__file__).parent / "resources.json").read_text())
VERSION = ".".join(triton.__version__.split(".")[:2])
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

SAME, OTHER = {"registers": 8, "stack": 0, "shared": 1024}, {"registers": 64, "stack": 64, "shared": 32768}
MORE = SAME if VERSION in TABLE else OTHER
"""What is accepted above the table: little for a recorded Triton, whose patch releases move a few registers. For
another one the nearest recorded version stands in, and only a gross change is a failure."""


def measured(cache: Path, *arguments: str) -> Any:
    """What `python -m dtm_triton.kernels.resources` prints, compiled afresh."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dtm_triton.kernels.resources", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)[VERSION]


def nearest() -> Any:
    """The recorded figures of this Triton, or of the version closest to it."""
    return TABLE[min(TABLE, key=lambda known: abs(int(known.split(".")[1]) - int(VERSION.split(".")[1])))]


@pytest.mark.parametrize("target", TARGETS)
def test_resources(target: str, tmp_path: Path) -> None:
    recorded, found = nearest()[target], measured(tmp_path, "--target", target)[target]
    assert found.keys() == recorded.keys(), "record the table again"
    for name, figures in found.items():
        assert figures["loop_spills"] == 0, f"{name} spills inside a loop: {figures}"
        for what, extra in MORE.items():
            assert figures[what] <= recorded[name][what] + extra, f"{name}: {what} of {figures}, was {recorded[name]}"


def test_the_table_has_no_stack() -> None:
    """What is shipped spills nowhere, under no Triton it was recorded for."""
    for version, targets in TABLE.items():
        assert targets.keys() == set(TARGETS)
        for target, launches in targets.items():
            for name, figures in launches.items():
                assert figures["stack"] == 0, f"{name} on {target} with Triton {version}"


def test_a_spill_in_a_loop_is_found(tmp_path: Path) -> None:
    """Too few registers make matching spill inside its iterations: the check above can fail."""
    code = "from dtm_triton.kernels import resources; print(resources.measure('match-bf16', 'sm_90', maxnreg=64))"
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.replace("'", '"'))["loop_spills"] > 0
