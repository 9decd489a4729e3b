"""Compile every kernel as its launcher ships it, without a GPU, and report what the machine code uses.

    python -m dtm_triton.kernels.resources                     # print registers, stack and shared memory per target
    python -m dtm_triton.kernels.resources --write FILE.json   # record them for the installed Triton

The launchers run on meta tensors with the kernels replaced by recorders, so that signatures, tile sizes, specialised
arguments and options are those of a real launch. For NVIDIA, registers and stack come from cuobjdump, and the machine
code is searched for spills inside loops; for AMD, figures come from the assembly's metadata.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dtm_triton.kernels import group_kernels, groups, loss, loss_kernels, match, match_kernel, row_loss_kernel
from dtm_triton.kernels.sass_loops import loop_spills

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BATCH, TOKENS, CHANNELS, SCHEDULES, LEFT = 128, 196, 512, 2, 98
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32", torch.int64: "*i64"}

Launch = tuple[Any, dict[str, Any]]
"""A kernel and the arguments of its launch."""


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launch."""

    def __init__(self) -> None:
        self.arguments: dict[str, Any] = {}

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.arguments.update


def record(module: Any, kernel: Any, launcher: Callable[..., object], *inputs: Any, **options: Any) -> Launch:
    """What `launcher` of `module` would launch."""
    recorder = Recorder()
    with mock.patch.object(module, kernel.__name__, recorder):
        launcher(*inputs, **options)
    return kernel, recorder.arguments


def launches() -> dict[str, Launch]:
    """All launches that are measured, by name."""
    found = {"members": record(groups, group_kernels.members_kernel, groups.group_members, _empty(BATCH, TOKENS), LEFT)}
    for short, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        plain = dict(num_protected=0, random_split=False, keep_order=False)
        found[f"match-{short}"] = _match(dtype, TOKENS, SCHEDULES, **plain)
        if dtype == torch.bfloat16:
            kept = dict(num_protected=1, random_split=False, keep_order=True)
            found["match-bf16-64"] = _match(dtype, 64, SCHEDULES, **plain)
            found["match-bf16-128"] = _match(dtype, 128, SCHEDULES, **plain)
            found["match-bf16-random"] = _match(dtype, TOKENS, SCHEDULES, **(plain | {"random_split": True}))
            found["match-bf16-merge"] = _match(dtype, TOKENS, 1, **kept, merge_rows=LEFT)
        others = _group_launches(dtype) | _loss_launches(dtype)
        found |= {f"{name}-{short}": launch for name, launch in others.items()}
    return found


def _empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _match(dtype: torch.dtype, tokens: int, schedules: int, **options: Any) -> Launch:
    inputs = _empty(BATCH, tokens, CHANNELS, dtype=dtype), _empty(schedules, 14), _empty(1, dtype=torch.int64)
    return record(match, match_kernel.match_kernel, match.match, *inputs, **options)


def _group_launches(dtype: torch.dtype) -> dict[str, Launch]:
    x, merged = _empty(BATCH, TOKENS, CHANNELS, dtype=dtype), _empty(BATCH, LEFT, CHANNELS, dtype=dtype)
    index, size, few = _empty(BATCH, TOKENS), _empty(BATCH, LEFT), _empty(BATCH, 8)
    return {
        "merge": record(groups, group_kernels.merge_kernel, groups.merge, x, index, size, "mean"),
        "merge-few": record(groups, group_kernels.merge_kernel, groups.merge, x, index, few, "amax"),
        "unmerge": record(groups, group_kernels.unmerge_kernel, groups.unmerge, merged, index),
        "morph": record(groups, group_kernels.morph_kernel, groups.morph, x, index, size),
        "morph-few": record(groups, group_kernels.morph_kernel, groups.morph, x, index, few),
    }


def _loss_launches(dtype: torch.dtype) -> dict[str, Launch]:
    index, slopes = _empty(SCHEDULES, BATCH, TOKENS), _empty(SCHEDULES, BATCH, TOKENS, CHANNELS, dtype=dtype)
    rows = row_loss_kernel.row_loss_kernel

    def forward(kernel: Any, kind: str, standardize: bool, channels: int = CHANNELS) -> Launch:
        x = _empty(BATCH, TOKENS, channels, dtype=dtype)
        options = dict(kind=kind, beta=2.0, normalize_target=standardize, save=True)
        return record(loss, kernel, loss.loss_forward, x, x, index, index, **options)

    return {
        "loss": forward(loss_kernels.loss_kernel, "smooth_l1", False),
        "loss-cosine": forward(rows, "cosine", False),
        "loss-standardized": forward(rows, "smooth_l1", True),
        "loss-standardized-wide": forward(rows, "cosine", True, channels=2048),
        "loss-backward": record(
            loss,
            loss_kernels.loss_backward_kernel,
            loss.loss_backward,
            _empty(1, dtype=torch.float32),
            slopes,
            index,
            scale=1e-7,
        ),
    }


def compile_launch(name: str, target: str, **changed: Any) -> Any:
    """Triton's compiled kernel for one launch, with some launch options changed."""
    with mock.patch.object(torch.version, "hip", "any" if target.startswith("gfx") else None):
        kernel, arguments = launches()[name]
    options = {key: value for key, value in arguments.items() if key not in kernel.arg_names} | changed
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


def measure(name: str, target: str, **changed: Any) -> dict[str, int]:
    """Registers a thread, bytes of stack a thread, bytes of shared memory, and spilling instructions inside loops.

    Matching may spill in its loop over images, outside that over iterations; the other kernels in no loop at all.
    """
    compiled = compile_launch(name, target, **changed)
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = _number(text, r"\.vgpr_count:\s+(\d+)")
        stack = _number(text, r"\.private_segment_fixed_size:\s+(\d+)")
        spills = len(re.findall(r"^\s+scratch_(?:load|store)", text, re.M))
    else:
        usage, sass = (_dump(compiled.asm["cubin"], option) for option in ("-res-usage", "-sass"))
        registers, stack = _number(usage, r"REG:(\d+)"), _number(usage, r"STACK:(\d+)")
        spills = loop_spills(sass, depth=2 if name.startswith("match") else 1)
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
    parser.add_argument("--only", default="", help="the launches whose name contains this")
    parser.add_argument("--write", type=Path, help="a table to record the result in")
    arguments = parser.parse_args()
    if match.INTERPRETED:
        parser.error("set TRITON_INTERPRET=0: the interpreter compiles nothing")
    names = [name for name in launches() if arguments.only in name]
    found = {target: {name: measure(name, target) for name in names} for target in arguments.target}
    if arguments.write is None:
        sys.stdout.write(to_json({version(): found}))
        return
    table = json.loads(arguments.write.read_text()) if arguments.write.exists() else {}
    for target, figures in found.items():
        table.setdefault(version(), {}).setdefault(target, {}).update(figures)
    arguments.write.write_text(to_json(table))


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
