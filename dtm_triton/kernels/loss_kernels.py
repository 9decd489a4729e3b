"""The loss between morphed outputs and targets where channels count one by one, and the backward of every loss.

Morphing is a symmetric projector, so the loss depends on group means only, a group counts by its size, and its
derivative by a group's mean output (its slope), handed to each member and summed over schedules, is the gradient up to
a constant. That constant is applied in the backward: 1 / (B N C) times the derivative would underflow in float16.

A program takes one image and some channels, all schedules and groups, so that it alone adds up its tokens' slopes: one
[B, N, C] is saved whatever L, and inputs come from memory once and from a cache for further schedules.
L schedules, B images, N tokens, G groups, C channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.group_steps import load_tokens, member_tokens


@triton.jit
def count_groups(size, num_groups, BLOCK: tl.constexpr):
    """How many groups there are before the padding of size [G]."""
    there = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_groups, BLOCK):
        group = first + tl.arange(0, BLOCK)
        there += (tl.load(size + group, mask=group < num_groups, other=0) > 0).to(tl.int32)
    return tl.sum(there, 0)


@triton.jit
def tile_extent(size, first, num_groups, num_tokens, start, GROUPS: tl.constexpr):
    """Where the groups first .. first + GROUPS start in the members, the first of them at `start`, and their sizes."""
    group = first + tl.arange(0, GROUPS)
    count = tl.minimum(tl.load(size + group, mask=group < num_groups, other=0), num_tokens)
    return start + tl.cumsum(count, 0) - count, count


@triton.jit
def group_means(
    x,
    y,
    members,
    start,
    count,
    channel,
    num_tokens,
    num_channels,
    x_stride_n,
    x_stride_c,
    y_stride_n,
    y_stride_c,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The means of x and of y over every group's members, float32 [GROUPS, CHANNELS]; 0 for an empty group."""
    x_sum = tl.zeros((GROUPS, CHANNELS), tl.float32)
    y_sum = tl.zeros((GROUPS, CHANNELS), tl.float32)
    for first in range(0, tl.max(count, 0), MEMBERS):
        token, valid = member_tokens(members, start, count, first, num_tokens, MEMBERS)
        x_sum += tl.sum(load_tokens(x, token, valid, channel, num_channels, x_stride_n, x_stride_c), 1)
        y_sum += tl.sum(load_tokens(y, token, valid, channel, num_channels, y_stride_n, y_stride_c), 1)
    weight = 1.0 / tl.maximum(count, 1).to(tl.float32)[:, None]
    return x_sum * weight, y_sum * weight


@triton.jit
def pointwise_loss(difference, beta, KIND: tl.constexpr):
    """The loss of every entry and its derivative. What is not a number stays so."""
    size = tl.abs(difference)
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
    if KIND == "smooth_l1":
        value = tl.where(size >= beta, size - 0.5 * beta, 0.5 * difference * difference / beta)
        slope = tl.where(size >= beta, sign, difference / beta)
    elif KIND == "l1":
        value = size
        slope = sign
    else:
        tl.static_assert(KIND == "l2")
        value = difference * difference
        slope = 2.0 * difference
    return value, slope


@triton.jit
def hand_out(
    slopes,
    slope,
    members,
    start,
    count,
    channel,
    num_tokens,
    num_channels,
    schedule,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Add a group's slope to every member's, [N, C]; the first schedule writes, since there is nothing yet."""
    for first in range(0, tl.max(count, 0), MEMBERS):
        token, valid = member_tokens(members, start, count, first, num_tokens, MEMBERS)
        place = token.to(tl.int64)[:, :, None] * num_channels + channel[None, None, :]
        inside = valid[:, :, None] & (channel < num_channels)[None, None, :]
        before = tl.load(slopes + place, mask=inside & (schedule > 0), other=0.0).to(tl.float32)
        tl.store(slopes + place, (before + slope[:, None, :]).to(slopes.dtype.element_ty), mask=inside)


@triton.jit
def clear_rest(
    slopes, members, listed, channel, num_tokens, num_channels, TOKENS: tl.constexpr, CHANNELS: tl.constexpr
):
    """Zero the slopes of tokens that no group lists, which only groups that are not a partition leave."""
    for first in range(listed, num_tokens, TOKENS):
        place = first + tl.arange(0, TOKENS)
        token = tl.load(members + place, mask=place < num_tokens, other=0)
        real = (place < num_tokens) & (token >= 0) & (token < num_tokens)
        at = slopes + token.to(tl.int64)[:, None] * num_channels + channel[None, :]
        nothing = tl.zeros((TOKENS, CHANNELS), slopes.dtype.element_ty)
        tl.store(at, nothing, mask=real[:, None] & (channel < num_channels)[None, :])


@triton.jit
def finish(total, partial, loss, ticket, program, programs, scale, BLOCK: tl.constexpr):
    """Note this program's share, and let the program that comes last add up all shares, in their order."""
    tl.store(partial + program, total)
    arrived = tl.atomic_add(ticket, 1, sem="acq_rel", scope="gpu")
    if arrived == programs - 1:
        tl.debug_barrier()
        sums = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, programs, BLOCK):
            share = first + tl.arange(0, BLOCK)
            sums += tl.load(partial + share, mask=share < programs, other=0.0, cache_modifier=".cg")
        tl.store(loss, tl.sum(sums, 0) * scale)


@triton.jit
def loss_kernel(
    outputs,  # [B, N, C]
    targets,  # [B, N, C]
    members,  # int32 [L, B, N]
    size,  # int32 [L, B, G]
    slopes,  # [B, N, C]
    partial,  # float32 [programs]
    loss,  # float32 []
    ticket,  # int32 [1], 0
    num_schedules,
    num_tokens,
    num_groups,
    num_channels,
    beta,
    scale,
    output_stride_b,
    output_stride_n,
    output_stride_c,
    target_stride_b,
    target_stride_n,
    target_stride_c,
    KIND: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Some channels of one image, all schedules."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((GROUPS, CHANNELS), tl.float32)
    for schedule in range(num_schedules):
        task = schedule * tl.num_programs(0) + image
        there = count_groups(size + task * num_groups, num_groups, BLOCK)
        start_of_tile = 0
        for first in range(0, there, GROUPS):
            start, count = tile_extent(size + task * num_groups, first, num_groups, num_tokens, start_of_tile, GROUPS)
            start_of_tile += tl.sum(count, 0)
            output, target = group_means(
                outputs + image * output_stride_b,
                targets + image * target_stride_b,
                members + task * num_tokens,
                start,
                count,
                channel,
                num_tokens,
                num_channels,
                output_stride_n,
                output_stride_c,
                target_stride_n,
                target_stride_c,
                GROUPS,
                MEMBERS,
                CHANNELS,
            )
            value, slope = pointwise_loss(output - target, beta, KIND)
            inside = (count > 0)[:, None] & (channel < num_channels)[None, :]
            total += tl.where(inside, value, 0.0) * count.to(tl.float32)[:, None]
            if SAVE:
                hand_out(
                    slopes + image * num_tokens * num_channels,
                    slope,
                    members + task * num_tokens,
                    start,
                    count,
                    channel,
                    num_tokens,
                    num_channels,
                    schedule,
                    GROUPS,
                    MEMBERS,
                    CHANNELS,
                )
        if SAVE:
            if schedule == 0:
                clear_rest(
                    slopes + image * num_tokens * num_channels,
                    members + task * num_tokens,
                    start_of_tile,
                    channel,
                    num_tokens,
                    num_channels,
                    GROUPS,
                    CHANNELS,
                )
        tl.debug_barrier()  # the next schedule reads what other threads wrote
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0) * tl.num_programs(1)
    finish(tl.sum(tl.sum(total, 1), 0), partial, loss, ticket, program, programs, scale, BLOCK)


@triton.jit
def scale_kernel(
    grad,  # one number
    slopes,  # [entries]
    grad_outputs,  # [entries]
    scale,
    entries,
    BLOCK: tl.constexpr,
):
    """grad_outputs = slopes * grad * scale, in float32: a small scale must not underflow before grad raises it."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(slopes + i, mask=i < entries, other=0.0).to(tl.float32)
    value *= tl.load(grad).to(tl.float32) * scale
    tl.store(grad_outputs + i, value.to(grad_outputs.dtype.element_ty), mask=i < entries)
