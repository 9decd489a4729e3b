"""What a checkpoint holds: weights, AdamW's moments by the names of their parameters, and a few numbers."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor, nn

from dtm_triton.train.objectives.objective import Objective


def training_tensors(objective: Objective, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor that training changes, by name, as it lies in memory: filling one restores it.

    "objective.NAME" for weights and buffers, the frozen teacher's excepted; "optimizer.PARAMETER.MOMENT" for moments,
    which are made where there are none yet.
    """
    tensors = {
        f"objective.{name}": value
        for name, value in objective.state_dict().items()
        if not name.startswith("teacher.") and not name.endswith("_extra_state")  # draws begin anew at every step
    }
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            moments = optimizer.state[parameter]
            if not moments:
                moments["step"] = torch.zeros((), device=parameter.device)
                moments["exp_avg"], moments["exp_avg_sq"] = (torch.zeros_like(parameter.data) for _ in range(2))
            tensors.update({f"optimizer.{name}.{kind}": value for kind, value in moments.items()})
    return tensors


def fingerprint(module: nn.Module | None) -> str:
    """Changes when any name, shape or bit of a module's weights does; empty for none.

    >>> layer = nn.Linear(2, 2)
    >>> before = fingerprint(layer)
    >>> with torch.no_grad():
    ...     _ = layer.bias.add_(1)
    >>> before != fingerprint(layer)
    True
    """
    value = 0
    tensors = {} if module is None else module.state_dict()
    for name, tensor in tensors.items():
        value = zlib.crc32(f"{name} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), value)
    return f"{len(tensors)} tensors, {value:08x}" if tensors else ""
