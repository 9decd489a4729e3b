"""The launchers of the kernels over groups: sort tokens by group, merge (weighted or not), unmerge, morph."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dtm_triton.kernels import settings
from dtm_triton.kernels.group_kernels import (
    members_kernel,
    merge_kernel,
    morph_kernel,
    unmerge_kernel,
    weighted_merge_kernel,
)
from dtm_triton.kernels.tables import family


def group_members(index: Tensor, num_groups: int) -> Tensor:
    """The tokens sorted by group, ascending within a group: index int32 [B, N] -> members int32 [B, N]."""
    batch, num_tokens = index.shape
    if num_tokens > settings.MAX_COUNTED_TOKENS:
        return index.sort(dim=1, stable=True).indices.int()
    members = torch.empty((batch, num_tokens), dtype=torch.int32, device=index.device)
    if members.numel() == 0:
        return members
    if index.stride(1) != 1:
        index = index.contiguous()
    tiles = settings.count_settings(family(index.device))
    with torch.cuda.device_of(index):
        members_kernel[(batch, triton.cdiv(num_tokens, tiles.rows))](
            index=index,
            members=members,
            num_tokens=num_tokens,
            stride_b=index.stride(0),
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            num_warps=tiles.num_warps,
            enable_fp_fusion=True,
        )
    return members


def merge(x: Tensor, members: Tensor, size: Tensor, mode: str, out: Tensor | None = None) -> Tensor:
    """The mean, sum or maximum of every group: x [B, N, D], members int32 [B, N], size int32 [B, G] -> [B, G, D].

    Computed in float32, returned in x's dtype, or written to `out`, contiguous and of any dtype; 0 for an empty group.
    """
    batch, num_tokens, num_channels = x.shape
    num_groups = size.shape[1]
    merged = torch.empty((batch, num_groups, num_channels), dtype=x.dtype, device=x.device) if out is None else out
    if merged.numel() == 0:
        return merged
    tiles = settings.group_settings(num_tokens, num_groups, num_channels, family(x.device))
    grid = (batch, triton.cdiv(num_groups, tiles.groups), triton.cdiv(num_channels, tiles.channels))
    with torch.cuda.device_of(x):
        merge_kernel[grid](
            x=x,
            members=members.contiguous(),
            size=size.contiguous(),
            merged=merged,
            num_tokens=num_tokens,
            num_groups=num_groups,
            num_channels=num_channels,
            stride_b=x.stride(0),
            stride_n=x.stride(1),
            stride_c=x.stride(2),
            MODE=mode,
            BLOCK=settings.EXTENT_BLOCK,
            GROUPS=tiles.groups,
            MEMBERS=tiles.members,
            CHANNELS=tiles.channels,
            num_warps=tiles.num_warps,
            enable_fp_fusion=True,
        )
    return merged


def weighted_merge(x: Tensor, weight: Tensor, members: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of every group and its total weight, in one pass: x [B, N, D], weight [B, N, 1], members int32
    [B, N], size int32 [B, G] -> [B, G, D] in x's dtype, [B, G, 1] in weight's dtype.

    Computed in float32; 0 where the weights add up to 0.
    """
    batch, num_tokens, num_channels = x.shape
    num_groups = size.shape[1]
    merged = torch.empty((batch, num_groups, num_channels), dtype=x.dtype, device=x.device)
    total = torch.empty((batch, num_groups, 1), dtype=weight.dtype, device=x.device)
    if merged.numel() == 0:
        assert total.numel() == 0, "a total without channels"
        return merged, total
    tiles = settings.group_settings(num_tokens, num_groups, num_channels, family(x.device))
    grid = (batch, triton.cdiv(num_groups, tiles.groups), triton.cdiv(num_channels, tiles.channels))
    with torch.cuda.device_of(x):
        weighted_merge_kernel[grid](
            x=x,
            weight=weight,
            members=members.contiguous(),
            size=size.contiguous(),
            merged=merged,
            total=total,
            num_tokens=num_tokens,
            num_groups=num_groups,
            num_channels=num_channels,
            stride_b=x.stride(0),
            stride_n=x.stride(1),
            stride_c=x.stride(2),
            weight_stride_b=weight.stride(0),
            weight_stride_n=weight.stride(1),
            BLOCK=settings.EXTENT_BLOCK,
            GROUPS=tiles.groups,
            MEMBERS=tiles.members,
            CHANNELS=tiles.channels,
            num_warps=tiles.num_warps,
            enable_fp_fusion=True,
        )
    return merged, total


def unmerge(merged: Tensor, index: Tensor) -> Tensor:
    """Give every token what its group holds: merged [B, G, D], index int32 [B, N] -> [B, N, D]."""
    batch, num_groups, num_channels = merged.shape
    num_tokens = index.shape[1]
    out = torch.empty((batch, num_tokens, num_channels), dtype=merged.dtype, device=merged.device)
    if out.numel() == 0:
        return out
    index = index.contiguous()
    tiles = settings.gather_settings(num_channels, family(merged.device))
    grid = (batch, triton.cdiv(num_tokens, tiles.tokens), triton.cdiv(num_channels, tiles.channels))
    with torch.cuda.device_of(merged):
        unmerge_kernel[grid](
            merged=merged,
            index=index,
            out=out,
            num_tokens=num_tokens,
            num_groups=num_groups,
            num_channels=num_channels,
            stride_b=merged.stride(0),
            stride_g=merged.stride(1),
            stride_c=merged.stride(2),
            TOKENS=tiles.tokens,
            CHANNELS=tiles.channels,
            num_warps=tiles.num_warps,
            enable_fp_fusion=True,
        )
    return out


def morph(x: Tensor, members: Tensor, size: Tensor) -> Tensor:
    """Give every token its group's mean: x [B, N, D], members int32 [B, N], size int32 [B, G] -> [B, N, D]."""
    batch, num_tokens, num_channels = x.shape
    num_groups = size.shape[1]
    out = torch.empty((batch, num_tokens, num_channels), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tiles = settings.group_settings(num_tokens, num_groups, num_channels, family(x.device))
    grid = (batch, triton.cdiv(num_groups, tiles.groups), triton.cdiv(num_channels, tiles.channels))
    with torch.cuda.device_of(x):
        morph_kernel[grid](
            x=x,
            members=members.contiguous(),
            size=size.contiguous(),
            out=out,
            num_tokens=num_tokens,
            num_groups=num_groups,
            num_channels=num_channels,
            stride_b=x.stride(0),
            stride_n=x.stride(1),
            stride_c=x.stride(2),
            BLOCK=settings.EXTENT_BLOCK,
            GROUPS=tiles.groups,
            MEMBERS=tiles.members,
            CHANNELS=tiles.channels,
            num_warps=tiles.num_warps,
            enable_fp_fusion=True,
        )
    return out
