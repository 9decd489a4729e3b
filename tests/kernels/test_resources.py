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

import triton

TABLE = json.loads((Path(__file__).parent / "resources.json").read_text())
VERSION = ".".join(triton.__version__.split(".")[:2])
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

COMPILED = {
    "sm_80": ["match-bf16-196-all match", "match-fp32-196 gram", "loss-bf16"],
    "sm_90": [
        *("match-bf16-64", "match-bf16-196 *", "match-bf16-1024-all match", "match-other-fp32-196"),
        *("stream-4096-bf16 *", "stream-4096-fp32 partner", "merge-bf16", "weighted-merge-bf16", "unmerge-bf16"),
        *(
            "morph-few-bf16",
            "loss-bf16",
            "loss-standardized-wide-fp32",
            "loss-backward-bf16",
            "members",
            "sample-crops",
        ),
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


CHILD = """
import json, sys
from dtm_triton.kernels import resources
few = resources.measure(resources.launches("sm_90")["match-bf16-196 match"], "sm_90", maxnreg=64)
print(json.dumps(few), end="---")
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    resources.main()
    print(end="---")
"""
"""Compiles with too few registers, then does what `python -m dtm_triton.kernels.resources` does, several times."""


def compile_afresh(cache: Path, commands: list[list[str]]) -> tuple[Any, list[Any]]:
    """The figures of matching with too few registers, and what the commands print: one process imports PyTorch once."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(commands)], capture_output=True, text=True, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    few, *printed = run.stdout.split("---")[:-1]
    return json.loads(few), [json.loads(part) for part in printed]


def nearest() -> Any:
    """The recorded figures of this Triton, or of the version closest to it."""
    return TABLE[min(TABLE, key=lambda known: abs(int(known.split(".")[1]) - int(VERSION.split(".")[1])))]


def test_resources(tmp_path: Path) -> None:
    """Three things that one process compiles: what is compiled again uses no more than the table says; the table holds
    every launch of today; and too few registers make matching spill inside its iterations: the check can fail."""
    chosen = [["--target", target, "--only", *COMPILED[target]] for target in TARGETS]
    few, (names, *tables) = compile_afresh(tmp_path, [["--names"], *chosen])
    assert few["loop_spills"] > 0 and few["stack"] > 0
    for version, targets in TABLE.items():
        assert targets.keys() == set(TARGETS)
        for target, launches in targets.items():
            assert launches.keys() == set(names[target]), f"record the table again: {target}, Triton {version}"
    for target, table in zip(TARGETS, tables, strict=True):
        recorded, found = nearest()[target], table[VERSION][target]
        assert len(found) >= len(COMPILED[target]), f"{target}: a name stands for nothing"
        for name, figures in found.items():
            where = f"{name} on {target}: {figures}, was {recorded[name]}"
            assert figures["loop_spills"] == 0, f"spills inside a loop: {where}"
            for what, extra in MORE.items():
                assert figures[what] <= recorded[name][what] + extra, f"more {what}: {where}"


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
