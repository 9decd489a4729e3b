"""The single pass: features to groups, and to group means on request, in one launch.

Group similarities depend only on the Gram matrix of the tokens, because the inner product of two group sums is a sum of
its entries. So a program forms that matrix once, and all iterations of its schedule run on it: find every A-slot's
partner, select the r best pairs, merge their rows and columns. A program takes one (schedule, image) after another and
gives every one of them the same scratch memory. No atomics, no sort: the same bits every run.

L schedules, K iterations, B images, N tokens, C channels; lists have SLOTS entries, N rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.group_steps import group_extent, list_members, reduce_members
from dtm_triton.kernels.match_gram import form_gram
from dtm_triton.kernels.match_merge import add_columns, add_rows, link_sources
from dtm_triton.kernels.match_steps import find_partners, inverse_root, select, shuffle, split_state


@triton.jit
def match_kernel(
    features,  # [B, N, C]
    removed,  # int32 [L, K]
    seed,  # int64 [1]
    index,  # int32 [L, B, N]
    size,  # int32 [L, B, N]
    members,  # int32 [L, B, N]
    merged,  # [B, merge_rows, C]
    gram_scratch,  # float32 [programs, N + 1, gram_stride]
    list_scratch,  # int32 [programs, 8 * SLOTS]
    num_tasks,
    batch,
    num_tokens,
    num_channels,
    num_iterations,
    merge_rows,
    stride_b,
    stride_n,
    stride_c,
    gram_stride,
    NUM_PROTECTED: tl.constexpr,
    RANDOM_SPLIT: tl.constexpr,
    KEEP_ORDER: tl.constexpr,
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
    HALF: tl.constexpr = SLOTS // 2
    program = tl.program_id(0)
    gram = gram_scratch + program.to(tl.int64) * (num_tokens + 1) * gram_stride
    inverse_norm = gram + num_tokens * gram_stride  # in a row of its own behind the matrix
    orders = list_scratch + program.to(tl.int64) * (8 * SLOTS)  # two of them, in turn
    source = orders + 2 * SLOTS
    destination = source + HALF
    successor = destination + HALF
    length = successor + HALF
    key = length + HALF
    partner = key + HALF
    parent = partner + HALF
    touched = parent + SLOTS
    position = touched + SLOTS
    slot = tl.arange(0, SLOTS)

    for task in range(program, num_tasks, tl.num_programs(0)):
        schedule = task // batch
        image = task % batch
        x = features + image.to(tl.int64) * stride_b
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
        tl.store(orders + slot, slot)
        tl.store(parent + slot, slot)
        tl.store(touched + slot, 0 * slot)
        tl.debug_barrier()
        square = tl.load(gram + slot * (gram_stride + 1), mask=slot < num_tokens, other=0.0)
        tl.store(inverse_norm + slot, inverse_root(square), mask=slot < num_tokens)
        tl.debug_barrier()

        n = num_tokens
        current = 0  # where the order starts in `orders`
        for iteration in range(num_iterations):
            wanted = tl.load(removed + schedule * num_iterations + iteration)
            r = tl.minimum(wanted, (n - NUM_PROTECTED) // 2)
            if r > 0:
                na = (n + 1) // 2
                nb = n // 2
                if RANDOM_SPLIT:
                    state = split_state(seed, schedule, image, iteration)
                    shuffle(
                        orders + current, orders + SLOTS - current, state, n, na, NUM_PROTECTED, SLOTS, RANK_COLUMNS
                    )
                    current = SLOTS - current
                    tl.debug_barrier()
                find_partners(
                    gram,
                    inverse_norm,
                    orders + current,
                    key,
                    partner,
                    na,
                    nb,
                    gram_stride,
                    NUM_PROTECTED,
                    MATCH_ROWS,
                    MATCH_COLUMNS,
                )
                tl.debug_barrier()
                select(
                    orders + current,
                    orders + SLOTS - current,
                    key,
                    partner,
                    source,
                    destination,
                    parent,
                    touched,
                    iteration + 1,
                    na,
                    nb,
                    r,
                    NUM_PROTECTED,
                    KEEP_ORDER,
                    HALF,
                    RANK_COLUMNS,
                )
                current = SLOTS - current
                n -= r
                tl.debug_barrier()
                link_sources(destination, successor, length, r, LINK_ROWS, RANK_COLUMNS)
                tl.debug_barrier()
                add_rows(
                    gram,
                    source,
                    destination,
                    successor,
                    length,
                    touched,
                    iteration + 1,
                    r,
                    num_tokens,
                    gram_stride,
                    MERGE_ROWS,
                    MERGE_COLUMNS,
                )
                tl.debug_barrier()
                add_columns(
                    gram,
                    inverse_norm,
                    source,
                    destination,
                    successor,
                    length,
                    r,
                    gram_stride,
                    MERGE_ROWS,
                    BLOCK_COLUMNS,
                )
                tl.debug_barrier()

        # The token that a token's group lives in is reached through at most one parent per iteration.
        token = tl.load(orders + current + slot, mask=slot < n, other=0)
        tl.store(position + token, slot, mask=slot < n)
        root = slot
        for _ in range(num_iterations):
            root = tl.load(parent + root)
        tl.debug_barrier()
        result = tl.cast(task, tl.int64) * num_tokens
        tl.store(index + result + slot, tl.load(position + root), mask=slot < num_tokens)
        tl.debug_barrier()
        for first in range(0, num_tokens, MATCH_ROWS):
            list_members(
                index + result,
                members + result,
                size + result,
                first,
                num_tokens,
                num_tokens,
                True,
                MATCH_ROWS,
                RANK_COLUMNS,
            )
        tl.debug_barrier()
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
