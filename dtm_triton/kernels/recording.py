"""What would be launched: run launchers without a GPU, with recorders in the kernels' places.

Signatures, tile sizes, specialised arguments and options are those of a real launch on the GPU family asked for.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource

from dtm_triton.kernels import launch, masks, sample, stream_match, tables

POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
}


LOADED = (launch, masks, sample, stream_match)
"""Every launcher is imported before a kernel is replaced: whoever imports a recorder keeps it."""


class Launch(NamedTuple):
    """A kernel, the arguments of its launch, and its grid."""

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        """The kernel's name, without what they all end in."""
        return self.kernel.__name__.removesuffix("_kernel")


class Recorder:
    """Stands in for a kernel and keeps its launches."""

    def __init__(self, kernel: Any, found: list[Launch]) -> None:
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.found.append(Launch(self.kernel, arguments, grid))


@contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Gathers what is launched within the block as if the tensors lay on a GPU of the family `target`.

    Nothing is computed: what the launchers allocate stays zero.
    """
    found: list[Launch] = []
    stand_ins: dict[int, Any] = {id(tables.family): lambda device: target}
    with ExitStack() as stack:
        for name, module in sorted(sys.modules.items()):
            if not name.startswith("dtm_triton.kernels"):
                continue
            for attribute, value in list(vars(module).items()):
                if isinstance(value, triton.runtime.KernelInterface):
                    stack.enter_context(mock.patch.object(module, attribute, Recorder(value, found)))
                elif id(value) in stand_ins:
                    stack.enter_context(mock.patch.object(module, attribute, stand_ins[id(value)]))
        stack.enter_context(mock.patch.object(torch, "empty", functools.partial(_zeros, torch.empty)))
        stack.enter_context(mock.patch.object(torch.version, "hip", "any" if target.startswith("gfx") else None))
        yield found


def _zeros(empty: Callable[..., Tensor], *shape: Any, **options: Any) -> Tensor:
    return empty(*shape, **options).zero_()  # not torch.zeros, which on the meta device calls torch.empty


def specialised(launch: Launch) -> tuple[ASTSource, dict[str, Any]]:
    """What Triton compiles for a launch, and with which options, as its just-in-time compiler would have it."""
    kernel, arguments = launch.kernel, launch.arguments
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        elif isinstance(value, bool):
            signature[parameter.name] = "u1"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        aligned = value.data_ptr() % 16 == 0 if isinstance(value, Tensor) else type(value) is int and value % 16 == 0
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    options = {key: value for key, value in arguments.items() if key not in kernel.arg_names}
    return ASTSource(kernel, signature, constants, attributes), options


def identity(launch: Launch) -> str:
    """Equal for launches that compile to the same machine code."""
    source, options = specialised(launch)
    parts = launch.kernel.__name__, source.signature, source.constants, source.attrs, options
    return repr([sorted(part.items()) if isinstance(part, dict) else part for part in parts])
