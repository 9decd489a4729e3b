"""The launchers of the loss kernels."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dtm_triton.kernels import settings
from dtm_triton.kernels.loss_kernels import loss_kernel, row_loss_kernel, scale_kernel
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
    ticket: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loss between morphed outputs and morphed targets, and its unscaled gradient, in one launch.

    outputs and targets [B, N, C], any strides, each of its own dtype; members int32 [L, B, N]; size int32 [L, B, G],
    where zeros may pad G; ticket int32 [1], which an earlier kernel set to 0. Returns the mean over schedules, tokens
    and (cosine apart) channels, float32 [], and every token's slopes summed over schedules, [B, N, C] in
    `slope_dtype`, or an empty tensor when not `save`. Source: DTM, equations 4 and 5.
    """
    batch, num_tokens, num_channels = outputs.shape
    num_schedules, _, num_groups = size.shape
    device = outputs.device
    shape = outputs.shape if save else (0,)
    slopes = torch.empty(shape, dtype=settings.slope_dtype(outputs.dtype, kind, num_schedules), device=device)
    if outputs.numel() == 0 or size.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=device), slopes
    if kind == "smooth_l1" and beta == 0:
        kind = "l1"
    grid: tuple[int, ...]
    if kind == "cosine" or normalize_target:
        tiles = settings.row_loss_settings(num_channels, family(device))
        kernel, grid, extra = row_loss_kernel, (batch,), {"STANDARDIZE": normalize_target}
    else:
        tiles = settings.loss_settings(num_channels, batch, family(device))
        kernel, grid, extra = loss_kernel, (batch, triton.cdiv(num_channels, tiles.channels)), {}
    partial = torch.empty(grid, dtype=torch.float32, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    with torch.cuda.device_of(outputs):
        kernel[grid](
            outputs=outputs,
            targets=targets,
            members=members.contiguous(),
            size=size.contiguous(),
            slopes=slopes if save else outputs,
            partial=partial,
            loss=loss,
            ticket=torch.zeros(1, dtype=torch.int32, device=device) if ticket is None else ticket,
            num_schedules=num_schedules,
            num_tokens=num_tokens,
            num_groups=num_groups,
            num_channels=num_channels,
            beta=float(beta),
            scale=1 / (num_schedules * batch * num_tokens * (1 if kind == "cosine" else num_channels)),
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
            **settings.register_bound(tiles.max_registers),
            **extra,
        )
    return loss, slopes


def loss_backward(grad: Tensor, slopes: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The gradient of the loss: the slopes times `grad` and `scale`.

    grad: one number, on the device; slopes [B, N, C] -> [B, N, C] of `dtype`. The product is formed in float32, so that
    a small scale does not underflow before a loss scale in `grad` raises it.
    """
    grad_outputs = torch.empty(slopes.shape, dtype=dtype, device=slopes.device)
    if grad_outputs.numel() == 0:
        return grad_outputs
    with torch.cuda.device_of(slopes):
        scale_kernel[(triton.cdiv(slopes.numel(), settings.SCALE_BLOCK),)](
            grad=grad,
            slopes=slopes.contiguous(),
            grad_outputs=grad_outputs,
            scale=scale,
            entries=slopes.numel(),
            BLOCK=settings.SCALE_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return grad_outputs
