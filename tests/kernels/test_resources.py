"""Every kernel compiles for every target without a GPU, and uses no more than the recorded table says.

The table is written by `python -m dtm_triton.kernels.resources --write tests/kernels/resources.json` (with
TRITON_INTERPRET=0), once for each minor version of Triton. Compiling all of it takes minutes, so the tests compile the
main launches and the heaviest of each kind again, and hold the rest to the table.
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

COMPILED = {
    "sm_80": ["match-bf16-196-all match", "match-fp32-196 gram", "loss-bf16"],
    "sm_90": [
        *("match-bf16-64", "match-bf16-196 *", "match-bf16-1024-all match", "match-other-fp32-196"),
        *("stream-4096-bf16 *", "stream-4096-fp32 partner", "merge-bf16", "weighted-merge-bf16", "unmerge-bf16"),
        *("morph-few-bf16", "loss-bf16", "loss-standardized-wide-fp32", "loss-backward-bf16", "members"),
    ],
    "sm_100": ["match-bf16-196 *", "stream-4096-bf16 partner", "loss-standardized-bf16"],
    "gfx942": ["match-bf16-196 *", "stream-4096-bf16 partner", "loss-bf16", "merge-few-fp32"],
}
"""The launches that are compiled again, by target: the targets share what tells them apart little."""

OUTSIDE_LOOPS = 64
"""Bytes of stack that are accepted where no loop over iterations or members touches them: `STACK` says where."""

STACK = {
    "match-bf16-196-threshold match": "two programs share a multiprocessor at 128 registers, for 8 bytes",
    "match-bf16-512-all match": "the same with every option at once, for 24 bytes on sm_80",
}
"""Launches that use stack outside their loops under one of the recorded versions, and what that is the price of."""

SAME, OTHER = {"registers": 8, "stack": 0, "shared": 1024}, {"registers": 64, "stack": 64, "shared": 32768}
MORE = SAME if VERSION in TABLE else OTHER
"""What is accepted above the table: little for a recorded Triton, whose patch releases move a few registers. For
another one the nearest recorded version stands in, and only a gross change is a failure."""


def resources(cache: Path, *arguments: str) -> Any:
    """What `python -m dtm_triton.kernels.resources` prints, compiled afresh."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "dtm_triton.kernels.resources", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def nearest() -> Any:
    """The recorded figures of this Triton, or of the version closest to it."""
    return TABLE[min(TABLE, key=lambda known: abs(int(known.split(".")[1]) - int(VERSION.split(".")[1])))]


@pytest.mark.parametrize("target", TARGETS)
def test_resources(target: str, tmp_path: Path) -> None:
    only = COMPILED[target]
    recorded, found = nearest()[target], resources(tmp_path, "--target", target, "--only", *only)[VERSION][target]
    assert len(found) >= len(only), "a name stands for nothing"
    for name, figures in found.items():
        assert figures["loop_spills"] == 0, f"{name} spills inside a loop: {figures}"
        for what, extra in MORE.items():
            assert figures[what] <= recorded[name][what] + extra, f"{name}: {what} of {figures}, was {recorded[name]}"


def test_the_table_holds_every_launch(tmp_path: Path) -> None:
    """What the launchers launch today, at the settings shipped, has been recorded: for each target its own."""
    names = resources(tmp_path, "--names")
    for version, targets in TABLE.items():
        assert targets.keys() == set(TARGETS)
        for target, launches in targets.items():
            assert launches.keys() == set(names[target]), f"record the table again: {target}, Triton {version}"


def test_the_table_has_no_stack() -> None:
    """For no Triton it was recorded for does a launch spill in a loop, or elsewhere but where STACK says why."""
    used = set()
    for version, targets in TABLE.items():
        for target, launches in targets.items():
            for name, figures in launches.items():
                where = f"{name} on {target} with Triton {version}: {figures}"
                assert figures["loop_spills"] == 0, where
                if figures["stack"]:
                    used.add(name)
                    assert name in STACK and figures["stack"] <= OUTSIDE_LOOPS, where
    assert used == STACK.keys(), "what uses no stack needs no excuse"


def test_a_spill_in_a_loop_is_found(tmp_path: Path) -> None:
    """Too few registers make matching spill inside its iterations: the check above can fail."""
    code = """
import json
from dtm_triton.kernels import resources
launch = resources.launches("sm_90")["match-bf16-196 match"]
print(json.dumps(resources.measure(launch, "sm_90", maxnreg=64)))
"""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    figures = json.loads(run.stdout)
    assert figures["loop_spills"] > 0 and figures["stack"] > 0
