"""Matching, and group means on request: in one launch, or as the launch that follows that of the Gram matrices.

A program of the single launch forms an image's Gram matrix, runs one schedule on it, and goes on to its next
(schedule, image) pair in the same scratch memory. With the Gram matrices in a launch of their own, a program takes one
pair: it needs fewer registers, so that several programs share a multiprocessor and hide each other's waiting.

L schedules, K iterations, B images, N tokens, C channels; lists have SLOTS entries, N rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.group_steps import group_extent, reduce_members
from dtm_triton.kernels.match_gram import form_gram
from dtm_triton.kernels.match_schedule import run_schedule


@triton.jit
def match_kernel(
    features,  # [B, N, C]
    removed,  # int32 [L, K]
    seed,  # int64 [1]
    index,  # int32 [L, B, N]
    size,  # int32 [L, B, N]
    members,  # int32 [L, B, N]
    merged,  # [B, merge_rows, C]
    ticket,  # int32 [1]
    gram_scratch,  # float32 [programs, N + 1, gram_stride]
    list_scratch,  # int32 [programs, 8 * SLOTS]
    first_image,
    images,
    batch,
    num_schedules,
    num_tokens,
    num_channels,
    num_iterations,
    merge_rows,
    threshold,
    stride_b,
    stride_n,
    stride_c,
    gram_stride,
    FUSED: tl.constexpr,
    NUM_PROTECTED: tl.constexpr,
    RANDOM_SPLIT: tl.constexpr,
    KEEP_ORDER: tl.constexpr,
    THRESHOLD: tl.constexpr,
    MERGE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    SLOTS: tl.constexpr,
    GRAM_ROWS: tl.constexpr,
    GRAM_CHANNELS: tl.constexpr,
    MATCH_ROWS: tl.constexpr,
    MATCH_COLUMNS: tl.constexpr,
    RANK_COLUMNS: tl.constexpr,
    LINK_ROWS: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    MEAN_GROUPS: tl.constexpr,
    MEAN_CHANNELS: tl.constexpr,
):
    """The images first_image .. first_image + images - 1. Not FUSED: every program finds its matrix formed."""
    program = tl.program_id(0)
    gram = gram_scratch + program.to(tl.int64) * (num_tokens + 1) * gram_stride
    lists = list_scratch + program.to(tl.int64) * (8 * SLOTS)
    if program == 0:
        tl.store(ticket, 0)
    for task in range(program, num_schedules * images, tl.num_programs(0)):
        schedule = task // images
        image = first_image + task % images
        x = features + image.to(tl.int64) * stride_b
        result = (schedule.to(tl.int64) * batch + image) * num_tokens
        if FUSED:
            form_gram(
                x,
                gram,
                num_tokens,
                num_channels,
                stride_n,
                stride_c,
                gram_stride,
                GRAM_ROWS,
                GRAM_CHANNELS,
                PRECISION,
                UPCAST,
            )
            tl.debug_barrier()
        run_schedule(
            gram,
            lists,
            removed + schedule * num_iterations,
            seed,
            schedule,
            image,
            threshold,
            index + result,
            size + result,
            members + result,
            num_tokens,
            num_iterations,
            gram_stride,
            NUM_PROTECTED,
            RANDOM_SPLIT,
            KEEP_ORDER,
            THRESHOLD,
            SLOTS,
            MATCH_ROWS,
            MATCH_COLUMNS,
            RANK_COLUMNS,
            LINK_ROWS,
            MERGE_ROWS,
            MERGE_COLUMNS,
            BLOCK_COLUMNS,
        )
        if MERGE:
            write_means(
                x,
                members + result,
                size + result,
                merged + image.to(tl.int64) * merge_rows * num_channels,
                num_tokens,
                num_channels,
                merge_rows,
                stride_n,
                stride_c,
                SLOTS,
                MEAN_GROUPS,
                MEAN_CHANNELS,
            )


@triton.jit
def write_means(
    x,
    members,
    size,
    merged,
    num_tokens,
    num_channels,
    num_groups,
    stride_n,
    stride_c,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The mean feature of every group, [num_groups, C]."""
    for first in range(0, num_groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        start, count = group_extent(size, first, num_groups, num_tokens, GROUPS, BLOCK)
        for first_c in range(0, num_channels, CHANNELS):
            channel = first_c + tl.arange(0, CHANNELS)
            mean = reduce_members(
                x,
                members,
                start,
                count,
                channel,
                num_tokens,
                num_channels,
                stride_n,
                stride_c,
                "mean",
                GROUPS,
                1,
                CHANNELS,
            )
            inside = (group < num_groups)[:, None] & (channel < num_channels)[None, :]
            place = group.to(tl.int64)[:, None] * num_channels + channel[None, :]
            tl.store(merged + place, mean.to(merged.dtype.element_ty), mask=inside)
