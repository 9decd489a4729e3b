"""The launchers of the loss kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dtm_triton.kernels import settings
from dtm_triton.kernels.loss_kernels import loss_backward_kernel, loss_kernel
from dtm_triton.kernels.row_loss_kernel import row_loss_kernel
from dtm_triton.kernels.tables import family


def loss_forward(
    outputs: Tensor,
    targets: Tensor,
    members: Tensor,
    size: Tensor,
    *,
    kind: str,
    beta: float,
    normalize_target: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The loss between morphed outputs and morphed targets, and its derivative by each group's mean output.

    outputs and targets [B, N, C], any strides, each of its own dtype; members int32 [L, B, N]; size int32 [L, B, G],
    where zeros may pad G. Returns the mean over schedules, tokens and (cosine apart) channels, float32 [], and the
    unscaled slopes [L, B, G, C] in `slope_dtype`, unspecified for empty groups, or an empty tensor when not `save`.
    Source: DTM, equations 4 and 5.
    """
    batch, num_tokens, num_channels = outputs.shape
    num_schedules, _, num_groups = size.shape
    shape = (*size.shape, num_channels) if save else (0,)
    slopes = torch.empty(shape, dtype=settings.slope_dtype(outputs.dtype, kind), device=outputs.device)
    if outputs.numel() == 0 or size.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=outputs.device), slopes
    if kind == "smooth_l1" and beta == 0:
        kind = "l1"
    rows = kind == "cosine" or normalize_target
    tiles = (
        settings.row_loss_settings(num_channels, family(outputs.device))
        if rows
        else settings.loss_settings(num_channels, batch, family(outputs.device))
    )
    grid = (num_schedules * batch, triton.cdiv(num_groups, tiles.groups), triton.cdiv(num_channels, tiles.channels))
    partial = torch.empty(grid, dtype=torch.float32, device=outputs.device)
    extra = {"STANDARDIZE": normalize_target} if rows else {}
    with torch.cuda.device_of(outputs):
        (row_loss_kernel if rows else loss_kernel)[grid](
            outputs=outputs,
            targets=targets,
            members=members.contiguous(),
            size=size.contiguous(),
            slopes=slopes if save else outputs,
            partial=partial,
            batch=batch,
            num_tokens=num_tokens,
            num_groups=num_groups,
            num_channels=num_channels,
            beta=float(beta),
            output_stride_b=outputs.stride(0),
            output_stride_n=outputs.stride(1),
            output_stride_c=outputs.stride(2),
            target_stride_b=targets.stride(0),
            target_stride_n=targets.stride(1),
            target_stride_c=targets.stride(2),
            KIND=kind,
            SAVE=save,
            BLOCK=settings.EXTENT_BLOCK,
            GROUPS=tiles.groups,
            MEMBERS=tiles.members,
            CHANNELS=tiles.channels,
            num_warps=tiles.num_warps,
            enable_fp_fusion=True,
            **extra,
        )
    count = num_schedules * batch * num_tokens * (1 if kind == "cosine" else num_channels)
    return partial.sum() / count, slopes  # the sum is taken in a fixed order


def loss_backward(grad: Tensor, slopes: Tensor, index: Tensor, scale: float) -> Tensor:
    """The gradient of the loss: each token's slopes, summed over schedules, times `grad` and `scale`.

    grad: one number, on the device; slopes [L, B, G, C]; index int32 [L, B, N] -> [B, N, C] in the slopes' dtype. The
    product is formed in float32, so that a small scale does not underflow before a loss scale in `grad` raises it.
    """
    num_schedules, batch, num_groups, num_channels = slopes.shape
    num_tokens = index.shape[2]
    grad_outputs = torch.empty((batch, num_tokens, num_channels), dtype=slopes.dtype, device=slopes.device)
    if grad_outputs.numel() == 0:
        return grad_outputs
    tiles = settings.gather_settings(num_channels, family(slopes.device))
    grid = (batch, triton.cdiv(num_tokens, tiles.tokens), triton.cdiv(num_channels, tiles.channels))
    with torch.cuda.device_of(slopes):
        loss_backward_kernel[grid](
            grad=grad,
            slopes=slopes.contiguous(),
            index=index.contiguous(),
            grad_outputs=grad_outputs,
            scale=scale,
            num_schedules=num_schedules,
            batch=batch,
            num_tokens=num_tokens,
            num_groups=num_groups,
            num_channels=num_channels,
            TOKENS=tiles.tokens,
            CHANNELS=tiles.channels,
            num_warps=tiles.num_warps,
            enable_fp_fusion=True,
        )
    return grad_outputs
