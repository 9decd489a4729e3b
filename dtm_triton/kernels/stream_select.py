"""From every A-slot's best partner to groups, in memory that grows with N: who merges, and the new order.

The r-th highest key is found bit by bit, 32 rounds of counting; where several slots have it, the lower ones merge. A
group that a B-slot leads consists of that slot and the sources that chose it, any other of one slot, so that where
every slot goes among the tokens sorted by group follows from counts. Only two things are left that take a comparison
of pairs: the rank of a source among those of its destination, and that of a slot that stays among those that stay.

Counting uses integer atomics, whose sums do not hang on their order: the same bits every run.
T tasks, N slots, HALF = N / 2 rounded up to a power of two, H = ceil(N / 2) A-slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.match_steps import LOWEST, NEVER, keyed_value, ordered_key
from dtm_triton.kernels.stream_partners import a_slot, b_slot
from dtm_triton.kernels.stream_place import place_pairs


@triton.jit
def best_share(key, partner, inverse_norm, slot, is_a, stride, SHARES: tl.constexpr, NUM_PROTECTED: tl.constexpr):
    """The best of what the programs that shared B found, and its ordered key as a cosine."""
    top = tl.load(key, mask=is_a, other=NEVER)
    chosen = tl.load(partner, mask=is_a, other=0)
    for _ in range(1, SHARES):
        key += stride
        partner += stride
        other = tl.load(key, mask=is_a, other=NEVER)
        better = other > top
        chosen = tl.where(better, tl.load(partner, mask=is_a, other=0), chosen)
        top = tl.where(better, other, top)
    value = keyed_value(tl.where(is_a, top, 0))
    value = tl.where(value > LOWEST, value * tl.load(inverse_norm + slot, mask=is_a, other=0.0), LOWEST)
    value = tl.where(value > LOWEST, value, LOWEST)
    if NUM_PROTECTED > 0:
        value = tl.where(slot > 0, value, float("-inf"))
    return tl.where(is_a, ordered_key(value), NEVER), chosen


@triton.jit
def highest(key, r):
    """Which r entries are the highest, the first ones where they are equal; 0 < r <= entries above NEVER."""
    bound = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= r, 0, -0x80000000)
    for bit in range(1, 32):  # the highest bound that r entries reach
        trial = bound | (1 << (31 - bit))
        bound = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= r, trial, bound)
    above = key > bound
    equal = (key == bound).to(tl.int32)
    return above | ((equal > 0) & (tl.cumsum(equal, 0) <= r - tl.sum(above.to(tl.int32), 0)))


@triton.jit(do_not_specialize=["iteration"])
def select_kernel(
    key,  # int32 [SHARES, M, H]
    partner,  # int32 [SHARES, M, H]
    inverse_norm,  # float32 [M or images, N]
    shuffled,  # int64 [T, N]; only for a random split
    removed,  # int32 [L, K]
    left,  # int32 [K + 1, T]: slots before every iteration, and after the last
    lists,  # int32 [T, 7 * HALF]; scratch
    index,  # int32 [L, images, N], the schedules schedule_stride apart
    size,  # int32, likewise
    members,  # int32, likewise
    matched,
    normed,
    images,
    num_tokens,
    num_iterations,
    iteration,
    threshold,
    schedule_stride,
    FIRST: tl.constexpr,
    NUM_PROTECTED: tl.constexpr,
    RANDOM_SPLIT: tl.constexpr,
    KEEP_ORDER: tl.constexpr,
    THRESHOLD: tl.constexpr,
    SHARES: tl.constexpr,
    PLACE: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One iteration of one task: all but what `place_pairs` does, and that too with PLACE.

    matched = M and normed: how many tasks there are partners and norms for, the first M of all the others'.
    """
    task = tl.program_id(0)
    schedule = task // images
    result = schedule.to(tl.int64) * schedule_stride + (task % images).to(tl.int64) * num_tokens
    lists += task.to(tl.int64) * 7 * HALF
    slots = shuffled + task.to(tl.int64) * num_tokens
    after = left + (iteration + 1) * tl.num_programs(0) + task
    n = num_tokens if FIRST else tl.load(after - tl.num_programs(0))
    na = (n + 1) // 2
    nb = n // 2
    i = tl.arange(0, HALF)
    is_a = i < na
    a = a_slot(slots, tl.minimum(i, na - 1), RANDOM_SPLIT)
    share = (num_tokens + 1) // 2
    entry = (task % matched).to(tl.int64) * share + i
    norms = inverse_norm + (task % normed).to(tl.int64) * num_tokens
    stride = tl.cast(matched, tl.int64) * share
    mine, chosen = best_share(key + entry, partner + entry, norms, a, is_a, stride, SHARES, NUM_PROTECTED)
    r = tl.minimum(tl.load(removed + schedule * num_iterations + iteration), (n - NUM_PROTECTED) // 2)
    if THRESHOLD:
        r = tl.minimum(r, tl.sum((mine > ordered_key(tl.cast(threshold, tl.float32))).to(tl.int32), 0))
    r = tl.maximum(r, 0)
    tl.store(after, n - r)

    index += result
    size += result
    members += result
    if r == 0:
        for first in tl.static_range(0, 2 * HALF, HALF):
            slot = first + i
            tl.store(index + slot, slot, mask=slot < num_tokens)
            tl.store(size + slot, (slot < n).to(tl.int32), mask=slot < num_tokens)
            tl.store(members + slot, slot, mask=slot < num_tokens)
    else:
        merging = highest(mine, r)
        gone = merging.to(tl.int32)
        before = tl.cumsum(gone, 0) - gone
        source = lists
        destination = source + HALF
        start = destination + HALF
        staying = start + HALF
        staying_key = staying + HALF
        count = staying_key + HALF
        earlier = count + HALF
        tl.store(count + i, 0 * i)
        tl.store(earlier + i, 0 * i)
        tl.store(source + before, a, mask=merging)
        tl.store(destination + before, chosen, mask=merging)
        tl.debug_barrier()
        tl.atomic_add(count + chosen, gone, mask=merging, sem="relaxed")
        own = b_slot(slots, tl.minimum(chosen, nb - 1), na, RANDOM_SPLIT)
        tl.atomic_add(earlier + chosen, gone, mask=merging & (a < own), sem="relaxed")

        place = i - before
        if KEEP_ORDER:
            if NUM_PROTECTED == 2:
                place = tl.where(i == 0, 0, place + 1)
            open_end = is_a & (gone == 0)
        else:
            open_end = is_a & (gone == 0) & (i < (1 if NUM_PROTECTED > 0 else 0))
            listed = is_a & (gone == 0) & (i >= (1 if NUM_PROTECTED > 0 else 0))
            rank = place - (1 if NUM_PROTECTED > 0 else 0)
            tl.store(staying + rank, a, mask=listed)
            tl.store(staying_key + rank, mine, mask=listed)
        tl.store(index + a, place, mask=open_end)
        tl.store(size + place, 1 + 0 * i, mask=open_end)
        tl.store(members + place, a, mask=open_end)
        for first in tl.static_range(0, 2 * HALF, HALF):
            slot = first + i
            tl.store(size + slot, 0 * i, mask=(slot >= n - r) & (slot < num_tokens))
        tl.debug_barrier()

        is_b = i < nb
        sources = tl.load(count + i, mask=is_b, other=0)
        group = na - r + i
        if NUM_PROTECTED == 2:
            group = tl.where(i == 0, 1, group)
        first_member = group + tl.cumsum(sources, 0) - sources
        b = b_slot(slots, tl.minimum(i, nb - 1), na, RANDOM_SPLIT)
        tl.store(start + i, first_member, mask=is_b)
        tl.store(index + b, group, mask=is_b)
        tl.store(size + group, 1 + sources, mask=is_b)
        tl.store(members + first_member + tl.load(earlier + i, mask=is_b, other=0), b, mask=is_b)
        if PLACE:
            tl.debug_barrier()
            for first in range(0, tl.maximum(r, na - r), ROWS):
                place_pairs(
                    lists,
                    slots,
                    index,
                    size,
                    members,
                    first,
                    na,
                    r,
                    NUM_PROTECTED,
                    RANDOM_SPLIT,
                    KEEP_ORDER,
                    HALF,
                    ROWS,
                    COLUMNS,
                )
