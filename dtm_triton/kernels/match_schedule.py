"""One schedule of one image on its Gram matrix, as device functions of the matching kernels.

Group similarities depend only on the Gram matrix of the tokens, because the inner product of two group sums is a sum of
its entries. Every iteration finds each A-slot's partner, selects the r best pairs, and merges their rows and columns.
No atomics, no sort: the same bits every run. Lists have SLOTS entries, N rounded up to a power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.group_steps import list_members
from dtm_triton.kernels.match_merge import add_columns, add_rows, link_sources
from dtm_triton.kernels.match_steps import (
    count_above,
    find_partners,
    inverse_root,
    last_merging,
    select,
    shuffle,
    split_state,
)


@triton.jit
def run_schedule(
    gram,  # float32 [N + 1, gram_stride]; changed
    lists,  # int32 [8 * SLOTS]; scratch
    removed,  # int32 [K]
    seed,
    schedule,
    image,
    threshold,
    index,  # int32 [N]
    size,  # int32 [N]
    members,  # int32 [N]
    num_tokens,
    num_iterations,
    gram_stride,
    NUM_PROTECTED: tl.constexpr,
    RANDOM_SPLIT: tl.constexpr,
    KEEP_ORDER: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SLOTS: tl.constexpr,
    MATCH_ROWS: tl.constexpr,
    MATCH_COLUMNS: tl.constexpr,
    RANK_COLUMNS: tl.constexpr,
    LINK_ROWS: tl.constexpr,
    MERGE_ROWS: tl.constexpr,
    MERGE_COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """From inner products to groups. Whoever wrote the matrix is behind a barrier."""
    HALF: tl.constexpr = SLOTS // 2
    inverse_norm = gram + num_tokens * gram_stride  # in a row of its own behind the matrix
    orders = lists  # two of them, in turn
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

    tl.store(orders + slot, slot)
    tl.store(parent + slot, slot)
    tl.store(touched + slot, 0 * slot)
    square = tl.load(gram + slot * (gram_stride + 1), mask=slot < num_tokens, other=0.0)
    tl.store(inverse_norm + slot, inverse_root(square), mask=slot < num_tokens)
    tl.debug_barrier()

    last = last_merging(removed, num_iterations)
    n = num_tokens
    current = 0  # where the order starts in `orders`
    for iteration in range(last + 1):
        wanted = tl.load(removed + iteration)
        r = tl.minimum(wanted, (n - NUM_PROTECTED) // 2)
        if r > 0:
            na = (n + 1) // 2
            nb = n // 2
            split = current
            if RANDOM_SPLIT:
                split = SLOTS - current
                state = split_state(seed, schedule, image, iteration)
                shuffle(orders + current, orders + split, state, n, na, NUM_PROTECTED, SLOTS, RANK_COLUMNS)
                tl.debug_barrier()
            find_partners(
                gram,
                inverse_norm,
                orders + split,
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
            if THRESHOLD:
                r = tl.minimum(r, count_above(key, threshold, na, HALF))
                tl.debug_barrier()  # nobody writes the keys of a next iteration while another still counts
            if r > 0:
                select(
                    orders + split,
                    orders + SLOTS - split,
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
                current = SLOTS - split
                n -= r
                tl.debug_barrier()
                if iteration < last:  # nothing reads the matrix after the last merge
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
    for _ in range(last + 1):
        root = tl.load(parent + root)
    tl.debug_barrier()
    tl.store(index + slot, tl.load(position + root), mask=slot < num_tokens)
    tl.debug_barrier()
    for first in range(0, num_tokens, MATCH_ROWS):
        list_members(index, members, size, first, num_tokens, num_tokens, True, MATCH_ROWS, RANK_COLUMNS)
    tl.debug_barrier()
