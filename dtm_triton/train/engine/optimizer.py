"""Optimisers with parameter groups, their schedule, and a step that a non-finite gradient cannot harm."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtm_triton.train.config import OptimizerConfig
from dtm_triton.train.engine.lars import Lars


def parameter_groups(network: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups of parameters: weight decay on parameters of two dimensions or more, tokens and position tables excepted.

    Networks that know `no_weight_decay()` name further parameters that do not decay; with `layer_decay` below 1 they
    must know `layer_of(name)` and `num_blocks`, and a parameter's learning rate is scaled by
    layer_decay^(num_blocks + 1 - layer).

    Returns groups {"params", "weight_decay", "lr_scale", "names"}; frozen parameters are in none.

    >>> groups = parameter_groups(nn.Linear(2, 2), OptimizerConfig(lr=1.0, weight_decay=0.1))
    >>> [(group["names"], group["weight_decay"]) for group in groups]
    [(['weight'], 0.1), (['bias'], 0.0)]
    """
    layered: Any = network
    kept: set[str] = layered.no_weight_decay() if hasattr(network, "no_weight_decay") else set()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = config.weight_decay if parameter.ndim > 1 and name not in kept else 0.0
        scale = 1.0
        if config.layer_decay < 1:
            scale = config.layer_decay ** (layered.num_blocks + 1 - layered.layer_of(name))
        fresh: dict[str, Any] = {"params": [], "weight_decay": decay, "lr_scale": scale, "names": []}
        group = groups.setdefault((decay, scale), fresh)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(network: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Fused AdamW, or LARS, over `parameter_groups`. Raises ValueError when nothing can be trained."""
    groups = parameter_groups(network, config)
    if not groups:
        raise ValueError(f"network must have trainable parameters, got {type(network).__name__} without")
    if config.kind == "lars":
        return Lars(groups, lr=config.lr, momentum=config.betas[0])
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def learning_rate(step: int, total: int, warmup: int, config: OptimizerConfig) -> float:
    """Learning rate of a step in 0..total - 1: linear up to `lr` over `warmup` steps, then a cosine to `final_lr`.

    >>> config = OptimizerConfig(lr=1.0, final_lr=0.0)
    >>> [round(learning_rate(step, 7, 2, config), 3) for step in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total - 1 - warmup, 1)
    return config.final_lr + (config.lr - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def clip_gradient(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> Tensor:
    """Norm of the gradient before clipping, a scalar on its device; nothing waits for it."""
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # sharded parameters give a sharded norm


def guarded_step(optimizer: torch.optim.Optimizer, lr: float, broken: Tensor) -> None:
    """Set the learning rate and step; where `broken` (float scalar on the device) is 1, weights and moments stay.

    The decision falls on the device, so no step waits for it: fused optimisers, and ours, take it as `found_inf`, as
    they do from a gradient scaler.

    >>> weight = nn.Parameter(torch.zeros(1))
    >>> optimizer = torch.optim.AdamW([{"params": [weight], "lr_scale": 1.0}], fused=True)
    >>> weight.grad = torch.full((1,), math.nan)
    >>> guarded_step(optimizer, 0.1, torch.ones(()))
    >>> weight.item()
    0.0
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    optimizer.grad_scale, optimizer.found_inf = None, broken  # type: ignore[attr-defined]
    optimizer.step()
