"""torch.compile block by block: one graph for all blocks of a network, compiled once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import DropPath
from torch import Tensor, nn


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile every block in place; names of weights stay.

    A stochastic depth that grows from block to block would be a number in the graph, another one in each: PyTorch
    compiles eight of them and runs the others uncompiled. So it becomes a buffer first.
    """
    if any(isinstance(module, DropPath) and module.drop_prob for block in blocks for module in block.modules()):
        for block in blocks:
            _put_rates_in_buffers(block)
    for block in blocks:
        block.compile()


class BufferedDropPath(nn.Module):
    """Stochastic depth whose rate is data, not code: leaves whole samples out while training, scales the others up.

    >>> BufferedDropPath(0.0)(torch.ones(2, 3)).sum().item()
    6.0
    """

    kept: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("kept", torch.tensor(1.0 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        drawn = torch.rand((x.shape[0], *(1,) * (x.ndim - 1)), device=x.device)
        return x * ((drawn < self.kept) / self.kept).to(x.dtype)


def _put_rates_in_buffers(block: nn.Module) -> None:
    for name, module in list(block.named_modules()):
        if isinstance(module, DropPath) or (isinstance(module, nn.Identity) and "drop_path" in name):
            parent, _, attribute = name.rpartition(".")
            device = next(block.parameters()).device
            rate = float(getattr(module, "drop_prob", 0.0) or 0.0)
            setattr(block.get_submodule(parent), attribute, BufferedDropPath(rate).to(device))
