"""Kernels over the members of groups: sort tokens by group, merge, unmerge, morph.

B images, N tokens, G groups, D channels. Sums and means are accumulated in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.group_steps import group_extent, list_members, member_tokens, reduce_members, weigh_members


@triton.jit
def members_kernel(
    index,  # int32 [B, N]
    members,  # int32 [B, N]
    num_tokens,
    stride_b,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * ROWS
    list_members(
        index + image * stride_b, members + image * num_tokens, members, first, num_tokens, 0, False, ROWS, COLUMNS
    )


@triton.jit
def merge_kernel(
    x,  # [B, N, D]
    members,  # int32 [B, N]
    size,  # int32 [B, G]
    merged,  # [B, G, D]
    num_tokens,
    num_groups,
    num_channels,
    stride_b,
    stride_n,
    stride_c,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUPS
    group = first + tl.arange(0, GROUPS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    start, count = group_extent(size + image * num_groups, first, num_groups, num_tokens, GROUPS, BLOCK)
    value = reduce_members(
        x + image * stride_b,
        members + image * num_tokens,
        start,
        count,
        channel,
        num_tokens,
        num_channels,
        stride_n,
        stride_c,
        MODE,
        GROUPS,
        MEMBERS,
        CHANNELS,
    )
    inside = (group < num_groups)[:, None] & (channel < num_channels)[None, :]
    place = (image * num_groups + group)[:, None] * num_channels + channel[None, :]
    tl.store(merged + place, value.to(merged.dtype.element_ty), mask=inside)


@triton.jit
def weighted_merge_kernel(
    x,  # [B, N, D]
    weight,  # [B, N, 1]
    members,  # int32 [B, N]
    size,  # int32 [B, G]
    merged,  # [B, G, D]
    total,  # [B, G, 1]
    num_tokens,
    num_groups,
    num_channels,
    stride_b,
    stride_n,
    stride_c,
    weight_stride_b,
    weight_stride_n,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUPS
    group = first + tl.arange(0, GROUPS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    start, count = group_extent(size + image * num_groups, first, num_groups, num_tokens, GROUPS, BLOCK)
    value, weights = weigh_members(
        x + image * stride_b,
        weight + image * weight_stride_b,
        members + image * num_tokens,
        start,
        count,
        channel,
        num_tokens,
        num_channels,
        stride_n,
        stride_c,
        weight_stride_n,
        GROUPS,
        MEMBERS,
        CHANNELS,
    )
    inside = (group < num_groups)[:, None] & (channel < num_channels)[None, :]
    place = (image * num_groups + group)[:, None] * num_channels + channel[None, :]
    tl.store(merged + place, value.to(merged.dtype.element_ty), mask=inside)
    if tl.program_id(2) == 0:  # one program writes what all have added
        tl.store(total + image * num_groups + group, weights.to(total.dtype.element_ty), mask=group < num_groups)


@triton.jit
def unmerge_kernel(
    merged,  # [B, G, D]
    index,  # int32 [B, N]
    out,  # [B, N, D]
    num_tokens,
    num_groups,
    num_channels,
    stride_b,
    stride_g,
    stride_c,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    group = tl.load(index + image * num_tokens + token, mask=token < num_tokens, other=-1)
    known = (group >= 0) & (group < num_groups)
    source = merged + image * stride_b + group.to(tl.int64)[:, None] * stride_g
    inside = (channel < num_channels)[None, :]
    value = tl.load(source + (channel.to(tl.int64) * stride_c)[None, :], mask=known[:, None] & inside, other=0.0)
    place = (image * num_tokens + token)[:, None] * num_channels + channel[None, :]
    tl.store(out + place, value, mask=(token < num_tokens)[:, None] & inside)


@triton.jit
def morph_kernel(
    x,  # [B, N, D]
    members,  # int32 [B, N]
    size,  # int32 [B, G]
    out,  # [B, N, D]
    num_tokens,
    num_groups,
    num_channels,
    stride_b,
    stride_n,
    stride_c,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * GROUPS
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    start, count = group_extent(size + image * num_groups, first, num_groups, num_tokens, GROUPS, BLOCK)
    mean = reduce_members(
        x + image * stride_b,
        members + image * num_tokens,
        start,
        count,
        channel,
        num_tokens,
        num_channels,
        stride_n,
        stride_c,
        "mean",
        GROUPS,
        MEMBERS,
        CHANNELS,
    )
    mean = mean.to(out.dtype.element_ty)
    for listed in range(0, tl.max(count, 0), MEMBERS):
        token, valid = member_tokens(members + image * num_tokens, start, count, listed, num_tokens, MEMBERS)
        place = (image * num_tokens + token)[:, :, None] * num_channels + channel[None, None, :]
        value = tl.broadcast_to(mean[:, None, :], (GROUPS, MEMBERS, CHANNELS))
        tl.store(out + place, value, mask=valid[:, :, None] & (channel < num_channels)[None, None, :])
