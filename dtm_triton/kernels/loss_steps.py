"""The steps of the loss between morphed outputs and targets, as device functions of `loss_kernels`.

Morphing is a symmetric projector, so the loss depends on group means only, a group counts by its size, and its
derivative by a group's mean output (its slope), handed to each member and summed over schedules, is the gradient up to
a constant. That constant is applied in the backward: 1 / (B N C) times the derivative would underflow in float16.
L schedules, B images, N tokens, G groups, C channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.group_steps import load_tokens, member_tokens

COSINE_EPS = tl.constexpr(1e-8)  # the least norm, as in torch.nn.functional.cosine_similarity
VARIANCE_EPS = tl.constexpr(1e-6)


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
def row_loss(output, target, inside, num_channels, beta, KIND: tl.constexpr, STANDARDIZE: tl.constexpr):
    """The loss of every row [GROUPS] and its derivative [GROUPS, CHANNELS]."""
    if STANDARDIZE:
        target = tl.where(inside, target - (tl.sum(target, 1) / num_channels)[:, None], 0.0)
        variance = tl.sum(target * target, 1) / tl.maximum(num_channels - 1, 1)
        target = target / tl.sqrt(variance + VARIANCE_EPS)[:, None]
    if KIND == "cosine":
        output_norm = tl.sqrt(tl.sum(output * output, 1))
        target_norm = tl.sqrt(tl.sum(target * target, 1))
        # Not tl.maximum, which would drop what is not a number.
        output_length = tl.where(output_norm < COSINE_EPS, COSINE_EPS, output_norm)
        target_length = tl.where(target_norm < COSINE_EPS, COSINE_EPS, target_norm)
        inverse = 1.0 / (output_length * target_length)
        cosine = tl.sum(output * target, 1) * inverse
        # The norm of an output below the least norm counts as a constant.
        shrink = tl.where(output_norm > COSINE_EPS, cosine / tl.maximum(output_norm * output_norm, 1e-16), 0.0)
        slope = shrink[:, None] * output - inverse[:, None] * target
        value = 1.0 - cosine
    else:
        values, slope = pointwise_loss(output - target, beta, KIND)
        value = tl.sum(tl.where(inside, values, 0.0), 1)
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
def image_loss(
    outputs,
    targets,
    members,
    size,
    slopes,
    channel,
    num_schedules,
    num_tokens,
    num_groups,
    num_channels,
    beta,
    output_stride_b,
    output_stride_n,
    output_stride_c,
    target_stride_b,
    target_stride_n,
    target_stride_c,
    KIND: tl.constexpr,
    STANDARDIZE: tl.constexpr,
    ROWS: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Loss times tokens of this program's image and channels, all schedules; fills their slopes.

    Still to be summed: [GROUPS] with ROWS, where channels count together, else [GROUPS, CHANNELS].
    """
    image = tl.program_id(0).to(tl.int64)
    total = tl.zeros((GROUPS,) if ROWS else (GROUPS, CHANNELS), tl.float32)
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
            inside = (count > 0)[:, None] & (channel < num_channels)[None, :]
            if ROWS:
                value, slope = row_loss(output, target, inside, num_channels, beta, KIND, STANDARDIZE)
                total += tl.where(count > 0, value * count.to(tl.float32), 0.0)
            else:
                value, slope = pointwise_loss(output - target, beta, KIND)
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
    return total


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
