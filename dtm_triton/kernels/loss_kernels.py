"""The loss between morphed outputs and targets where channels count one by one, and the backward of every loss.

Morphing is a symmetric projector, so the loss depends on group means only, a group counts by its size, and its
derivative by a group's mean output, handed to each member, is the gradient up to a constant. That constant is applied
in the backward: 1 / (B N C) times the derivative would underflow in float16.
L schedules, B images, N tokens, G groups, C channels. A program takes a tile of groups of one (schedule, image).
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.group_steps import group_extent, load_tokens, member_tokens


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
def loss_kernel(
    outputs,  # [B, N, C]
    targets,  # [B, N, C]
    members,  # int32 [L, B, N]
    size,  # int32 [L, B, G]
    slopes,  # [L, B, G, C]
    partial,  # float32 [programs]
    batch,
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
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    task = tl.program_id(0).to(tl.int64)  # schedule * B + image
    image = task % batch
    first = tl.program_id(1) * GROUPS
    group = first + tl.arange(0, GROUPS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    start, count = group_extent(size + task * num_groups, first, num_groups, num_tokens, GROUPS, BLOCK)
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
    if SAVE:
        place = (task * num_groups + group)[:, None] * num_channels + channel[None, :]
        tl.store(slopes + place, slope.to(slopes.dtype.element_ty), mask=inside)
    total = tl.sum(tl.sum(tl.where(inside, value, 0.0), 1) * count.to(tl.float32), 0)
    program = (task * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(2) + tl.program_id(2)
    tl.store(partial + program, total)


@triton.jit
def loss_backward_kernel(
    grad,  # one number
    slopes,  # [L, B, G, C]
    index,  # int32 [L, B, N]
    grad_outputs,  # [B, N, C]
    scale,
    num_schedules,
    batch,
    num_tokens,
    num_groups,
    num_channels,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    real = token < num_tokens
    total = tl.zeros((TOKENS, CHANNELS), tl.float32)
    for schedule in range(num_schedules):
        task = schedule * batch + image
        group = tl.load(index + task * num_tokens + token, mask=real, other=-1)
        known = (group >= 0) & (group < num_groups)
        place = (task * num_groups + group)[:, None] * num_channels + channel[None, :]
        inside = known[:, None] & (channel < num_channels)[None, :]
        total += tl.load(slopes + place, mask=inside, other=0.0).to(tl.float32)
    total *= tl.load(grad).to(tl.float32) * scale
    place = (image * num_tokens + token)[:, None] * num_channels + channel[None, :]
    inside = real[:, None] & (channel < num_channels)[None, :]
    tl.store(grad_outputs + place, total.to(grad_outputs.dtype.element_ty), mask=inside)
