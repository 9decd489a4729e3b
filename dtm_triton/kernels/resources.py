"""Compile every kernel as its launcher ships it, without a GPU, and report what the machine code uses.

    python -m dtm_triton.kernels.resources                     # print registers, stack and shared memory per target
    python -m dtm_triton.kernels.resources --write FILE.json   # record them for the installed Triton

For NVIDIA, registers and stack come from cuobjdump, and the machine code is searched for spills inside loops; for AMD,
figures come from the assembly's metadata.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from dtm_triton.kernels.precision import INTERPRETED
from dtm_triton.kernels.recording import Launch, specialised
from dtm_triton.kernels.resource_launches import launches
from dtm_triton.kernels.sass_loops import loop_spills

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

LOOPS_OVER_TASKS = ("match",)
"""Kernels that may spill in their outermost loop, which takes one image after another; the others in no loop at all."""


def measure(launch: Launch, target: str, **changed: Any) -> dict[str, int]:
    """Registers a thread, bytes of stack a thread, bytes of shared memory, and spilling instructions inside loops.

    `changed`: launch options that replace the launch's own.
    """
    source, options = specialised(launch)
    compiled = triton.compile(source, target=TARGETS[target], options=options | changed)
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = _number(text, r"\.vgpr_count:\s+(\d+)")
        stack = _number(text, r"\.private_segment_fixed_size:\s+(\d+)")
        spills = len(re.findall(r"^\s+scratch_(?:load|store)", text, re.M))
    else:
        usage = _dump(compiled.asm["cubin"], "-res-usage")
        registers, stack = _number(usage, r"REG:(\d+)"), _number(usage, r"STACK:(\d+)")
        depth, spills = 2 if launch.name in LOOPS_OVER_TASKS else 1, 0
        if stack:  # spilling takes stack, and disassembling takes longer than many a compilation
            spills = loop_spills(_dump(compiled.asm["cubin"], "-sass"), depth=depth)
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared, "loop_spills": spills}


def _number(text: str, pattern: str) -> int:
    found = re.search(pattern, text)
    assert found, f"no {pattern} in the compiler's report"
    return int(found[1])


def _dump(cubin: bytes, option: str) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


def version() -> str:
    """The installed Triton's version without the patch number: what the table is kept by."""
    return ".".join(triton.__version__.split(".")[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, nargs="+", default=list(TARGETS))
    parser.add_argument("--only", default=["*"], nargs="+", help="the launches of these names; * stands for anything")
    parser.add_argument("--names", action="store_true", help="print the launches' names and compile nothing")
    parser.add_argument("--write", type=Path, help="a table to record the result in")
    arguments = parser.parse_args()
    if INTERPRETED:
        parser.error("set TRITON_INTERPRET=0: the interpreter compiles nothing")
    if arguments.names:
        sys.stdout.write(json.dumps({target: list(launches(target)) for target in arguments.target}) + "\n")
        return
    table: dict[str, Any] = {}
    if arguments.write and arguments.write.exists():
        table = json.loads(arguments.write.read_text())
    for target in arguments.target:
        chosen = {
            name: launch
            for name, launch in launches(target).items()
            if any(fnmatch.fnmatchcase(name, only) for only in arguments.only)
        }
        figures = {name: measure(launch, target) for name, launch in chosen.items()}
        before = table.get(version(), {}).get(target, {}) if arguments.only != ["*"] else {}
        table.setdefault(version(), {})[target] = before | figures
        if arguments.write:  # after every target: a run that is stopped has not been for nothing
            arguments.write.write_text(to_json(table))
    if arguments.write is None:
        sys.stdout.write(to_json(table))


def to_json(table: dict[str, Any]) -> str:
    """JSON with one launch a line.

    >>> print(to_json({"3.9": {"sm_80": {"merge": {"stack": 0, "shared": 16}}}}), end="")
    {
     "3.9": {
      "sm_80": {
       "merge": {"shared": 16, "stack": 0}
      }
     }
    }
    """
    text = json.dumps(table, indent=1, sort_keys=True)
    return re.sub(r"\{\s+([^{}]+?)\s+\}", lambda match: "{" + re.sub(r"\s+", " ", match[1]) + "}", text) + "\n"


if __name__ == "__main__":
    main()
