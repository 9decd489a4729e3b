"""Gathering and adding rows of batched matrices, which every plain PyTorch implementation is made of."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x[b, index[b, i]]: [B, N, D] and int64 [B, M] -> [B, M, D].

    >>> gather_rows(torch.tensor([[[1.], [2.]]]), torch.tensor([[1, 1, 0]])).flatten().tolist()
    [2.0, 2.0, 1.0]
    """
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def add_rows(matrix: Tensor, into: Tensor, rows: Tensor) -> Tensor:
    """matrix[b, into[b, i]] += rows[b, i] in place and return it; the same bits every time, whatever the device.

    >>> add_rows(torch.zeros(1, 2, 1), torch.tensor([[1, 1]]), torch.tensor([[[2.], [3.]]])).flatten().tolist()
    [0.0, 5.0]
    """
    if matrix.device.type == "cpu":
        return matrix.scatter_add_(1, into[:, :, None].expand_as(rows), rows)
    images = torch.arange(len(matrix), device=matrix.device)[:, None]
    return matrix.index_put_((images, into), rows, accumulate=True)  # sorted there: scatter_add_ adds in any order


def at_least_float32(x: Tensor) -> Tensor:
    """x in the precision that everything is computed in: float64 as it is, all else in float32.

    >>> at_least_float32(torch.ones(1, dtype=torch.float16)).dtype
    torch.float32
    """
    return x if x.dtype == torch.float64 else x.float()
