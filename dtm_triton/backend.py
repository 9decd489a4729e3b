"""Which of the three implementations runs: reference, portable or triton."""

from __future__ import annotations

import functools

import torch

BACKENDS = ("reference", "portable", "triton")


def choose_backend(backend: str | None, device: torch.device) -> str:
    """The implementation for tensors on `device`: triton on CUDA and ROCm where it can run, else portable.

    Raises ValueError when `backend` is unknown, or when triton is asked for by name where it cannot run.

    >>> choose_backend(None, torch.device("cpu"))
    'portable'
    """
    if backend is None:
        return "triton" if device.type == "cuda" and triton_unavailable(device) is None else "portable"
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS} or None, got {backend!r}")
    if backend == "triton" and (reason := triton_unavailable(device)):
        raise ValueError(f"backend='triton' cannot run on {device}: {reason}")
    return backend


@torch.compiler.assume_constant_result
def triton_unavailable(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on `device`, or None when they can.

    >>> triton_unavailable(torch.device("meta")) is None
    False
    """
    return _reason(device)


@functools.cache
def _reason(device: torch.device) -> str | None:
    from dtm_triton.kernels import unavailable_reason

    return unavailable_reason(device)
