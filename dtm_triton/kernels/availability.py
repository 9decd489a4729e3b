"""Whether the kernels can run on a device, and if not, why. Importing this needs no Triton."""

from __future__ import annotations

import importlib
import importlib.util

import torch


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on `device`, as half a sentence, or None when they can.

    >>> unavailable_reason(torch.device("meta"))
    "Triton kernels need CUDA or ROCm tensors, not 'meta' ones"
    """
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels need CUDA or ROCm tensors, not {device.type!r} ones"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if importlib.import_module("dtm_triton.kernels.precision").INTERPRETED:
        return None
    if device.type == "cpu":
        return "CPU tensors need Triton's interpreter: set TRITON_INTERPRET=1 before the kernels are imported"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None
