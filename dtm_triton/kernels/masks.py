"""The launcher of the kernel that makes block-wise masks: one launch where PyTorch's operations take hundreds."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dtm_triton.kernels.mask_kernel import cover_kernel


def block_cover(numbers: Tensor, scores: Tensor, grid: tuple[int, int], num_masked: int, min_patches: int) -> Tensor:
    """Masks bool [B, N] from numbers float64 [B, R, 5] and scores float32 [B, N]; see `masking.block_cover`."""
    batch, rounds, _ = numbers.shape
    masks = torch.empty(scores.shape, dtype=torch.uint8, device=scores.device)
    if masks.numel() == 0:
        return masks.bool()
    with torch.cuda.device_of(scores):
        cover_kernel[(batch,)](
            numbers=numbers.contiguous(),
            scores=scores.contiguous(),
            masks=masks,
            HEIGHT=grid[0],
            WIDTH=grid[1],
            MASKED=num_masked,
            LEAST=min_patches,
            ROUNDS=rounds,
            BLOCK=triton.next_power_of_2(scores.shape[1]),
            num_warps=4,
            enable_fp_fusion=False,  # PyTorch's operations round after every one of them
        )
    return masks.view(torch.bool)
