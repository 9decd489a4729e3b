"""LARS (arXiv 1708.03888): momentum whose learning rate is scaled by every weight's own norm, for large batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

TRUST = 0.001  # the paper's coefficient


class Lars(torch.optim.Optimizer):
    """Momentum over gradients with weight decay; those of weights of two dimensions or more are scaled by
    0.001 |weight| / |gradient with decay|, where both are positive (as MoCo v3 and MAE; the paper adds two norms).

    Momenta are made at once, for checkpoints. `found_inf` is a float scalar on the device as fused AdamW takes it:
    where it is 1 a step changes nothing. Weights may be sharded (DTensor): norms are of the whole ones.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0]]))
    >>> optimizer = Lars([weight], lr=1.0, momentum=0.9)
    >>> weight.grad = torch.tensor([[0.0, 2.0]])
    >>> optimizer.step()
    >>> [round(value, 4) for value in weight.flatten().tolist()]
    [3.0, 3.995]
    """

    found_inf: Tensor | None = None

    def __init__(self, params: Any, lr: float, momentum: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter.data)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; no closure is taken."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        update = parameter.grad.add(parameter, alpha=group["weight_decay"])
        momentum = _local(self.state[parameter]["momentum"])
        added = _local(update)
        if parameter.ndim > 1:
            size, length = _norm(parameter), _norm(update)
            added = added * torch.where((size > 0) & (length > 0), TRUST * size / length, 1.0)
        moved = group["momentum"] * momentum + added
        weight = _local(parameter)
        new = weight - group["lr"] * moved
        if self.found_inf is not None:  # decided on the device: nothing waits
            fine = self.found_inf == 0
            moved, new = torch.where(fine, moved, momentum), torch.where(fine, new, weight)
        momentum.copy_(moved)
        weight.copy_(new)


def _local(x: Tensor) -> Tensor:
    """What this process holds."""
    return x.to_local() if isinstance(x, DTensor) else x


def _norm(x: Tensor) -> Tensor:
    """Of the whole tensor, a plain scalar."""
    norm = torch.linalg.vector_norm(x)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
