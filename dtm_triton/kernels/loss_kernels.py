"""The loss kernels: channels that count one by one, channels that count together, and the backward of both.

A program takes one image, all schedules and groups, so that it alone adds up its tokens' slopes: one [B, N, C] is saved
whatever L, and inputs come from memory once and from a cache for further schedules. Where channels count together
(cosine similarity, or targets standardised over channels) it takes whole rows: CHANNELS is C rounded up to a power of
two. L schedules, B images, N tokens, G groups, C channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.loss_steps import finish, image_loss


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
    """Some channels of one image."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = image_loss(
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
        KIND,
        False,
        False,
        SAVE,
        BLOCK,
        GROUPS,
        MEMBERS,
        CHANNELS,
    )
    program = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    programs = tl.num_programs(0) * tl.num_programs(1)
    finish(tl.sum(tl.sum(total, 1), 0), partial, loss, ticket, program, programs, scale, BLOCK)


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
    """All channels of one image."""
    channel = tl.arange(0, CHANNELS)
    total = image_loss(
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
        KIND,
        STANDARDIZE,
        True,
        SAVE,
        BLOCK,
        GROUPS,
        MEMBERS,
        CHANNELS,
    )
    finish(tl.sum(total, 0), partial, loss, ticket, tl.program_id(0), tl.num_programs(0), scale, BLOCK)


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
