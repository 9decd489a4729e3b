"""The loss where a group's channels count together: cosine similarity, or targets standardised over channels.

As `loss_kernels`, but a program takes an image's whole rows: CHANNELS is C rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.loss_kernels import (
    clear_rest,
    count_groups,
    finish,
    group_means,
    hand_out,
    pointwise_loss,
    tile_extent,
)

COSINE_EPS = tl.constexpr(1e-8)  # the least norm, as in torch.nn.functional.cosine_similarity
VARIANCE_EPS = tl.constexpr(1e-6)


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
def row_loss_kernel(
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
    STANDARDIZE: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    MEMBERS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One image, all schedules."""
    image = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, CHANNELS)
    total = tl.zeros((GROUPS,), tl.float32)
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
            value, slope = row_loss(output, target, inside, num_channels, beta, KIND, STANDARDIZE)
            total += tl.where(count > 0, value * count.to(tl.float32), 0.0)
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
    finish(tl.sum(total, 0), partial, loss, ticket, tl.program_id(0), tl.num_programs(0), scale, BLOCK)
