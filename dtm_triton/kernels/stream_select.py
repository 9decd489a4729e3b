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
def lowest_chosen(key, r):
    """The r-th highest key, and how many of those that equal it are among the r; 0 < r <= entries above NEVER."""
    bound = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= r, 0, -0x80000000)
    for bit in range(1, 32):  # the highest bound that r entries reach
        trial = bound | (1 << (31 - bit))
        bound = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= r, trial, bound)
    return bound, r - tl.sum((key > bound).to(tl.int32), 0)


@triton.jit
def leave_alone(index, size, members, n, num_tokens, BLOCK: tl.constexpr):
    """Every slot stays a group of its own."""
    for first in range(0, num_tokens, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        tl.store(index + slot, slot, mask=slot < num_tokens)
        tl.store(size + slot, (slot < n).to(tl.int32), mask=slot < num_tokens)
        tl.store(members + slot, slot, mask=slot < num_tokens)


@triton.jit(do_not_specialize=["iteration"])
def select_kernel(
    key,  # int32 [SHARES, M, H]
    partner,  # int32 [SHARES, M, H]
    inverse_norm,  # float32 [M or images, N]
    shuffled,  # int64 [T, N]; only for a random split
    removed,  # int32 [L, K]
    left,  # int32 [K + 1, T]: slots before every iteration, and after the last
    lists,  # int32 [T, 9 * HALF]; scratch
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
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One iteration of one task: all but what `place_pairs` does, and that too with PLACE.

    matched = M and normed: how many tasks there are partners and norms for, the first M of all the others'.
    """
    FRONT: tl.constexpr = 1 if NUM_PROTECTED > 0 else 0  # A-slots that stay in front
    task = tl.program_id(0)
    schedule = task // images
    result = schedule.to(tl.int64) * schedule_stride + (task % images).to(tl.int64) * num_tokens
    lists += task.to(tl.int64) * 9 * HALF
    slots = shuffled + task.to(tl.int64) * num_tokens
    after = left + (iteration + 1) * tl.num_programs(0) + task
    n = num_tokens if FIRST else tl.load(after - tl.num_programs(0))
    na = (n + 1) // 2
    nb = n // 2
    index += result
    size += result
    members += result
    source = lists
    destination = source + HALF
    start = destination + HALF
    staying = start + HALF
    staying_key = staying + HALF
    count = staying_key + HALF
    earlier = count + HALF
    merit = earlier + HALF
    choice = merit + HALF
    share = (num_tokens + 1) // 2
    entry = (task % matched).to(tl.int64) * share
    norms = inverse_norm + (task % normed).to(tl.int64) * num_tokens
    stride = tl.cast(matched, tl.int64) * share
    for first in range(0, HALF, BLOCK):
        i = first + tl.arange(0, BLOCK)
        a = a_slot(slots, tl.minimum(i, na - 1), RANDOM_SPLIT)
        mine, chosen = best_share(key + entry + i, partner + entry + i, norms, a, i < na, stride, SHARES, NUM_PROTECTED)
        tl.store(merit + i, mine)
        tl.store(choice + i, chosen)
        tl.store(count + i, 0 * i)
        tl.store(earlier + i, 0 * i)
    tl.debug_barrier()

    # Only here all candidates are in registers at once.
    everyone = tl.load(merit + tl.arange(0, HALF))
    r = tl.minimum(tl.load(removed + schedule * num_iterations + iteration), (n - NUM_PROTECTED) // 2)
    if THRESHOLD:
        r = tl.minimum(r, tl.sum((everyone > ordered_key(tl.cast(threshold, tl.float32))).to(tl.int32), 0))
    r = tl.maximum(r, 0)
    tl.store(after, n - r)
    if r == 0:
        leave_alone(index, size, members, n, num_tokens, BLOCK)
    else:
        bound, ties = lowest_chosen(everyone, r)
        equals = 0
        merged = 0
        for first in range(0, na, BLOCK):
            i = first + tl.arange(0, BLOCK)
            mine = tl.load(merit + i, mask=i < na, other=NEVER)
            chosen = tl.load(choice + i, mask=i < na, other=0)
            a = a_slot(slots, tl.minimum(i, na - 1), RANDOM_SPLIT)
            equal = (mine == bound).to(tl.int32)
            merging = (mine > bound) | ((equal > 0) & (equals + tl.cumsum(equal, 0) <= ties))
            gone = merging.to(tl.int32)
            before = merged + tl.cumsum(gone, 0) - gone
            equals += tl.sum(equal, 0)
            merged += tl.sum(gone, 0)
            tl.store(source + before, a, mask=merging)
            tl.store(destination + before, chosen, mask=merging)
            own = b_slot(slots, tl.minimum(chosen, nb - 1), na, RANDOM_SPLIT)
            tl.atomic_add(count + chosen, gone, mask=merging, sem="relaxed")
            tl.atomic_add(earlier + chosen, gone, mask=merging & (a < own), sem="relaxed")

            stays = (i < na) & (gone == 0)
            place = i - before
            if KEEP_ORDER:
                placed = stays
                if NUM_PROTECTED == 2:
                    place = tl.where(i == 0, 0, place + 1)
            else:
                placed = stays & (i < FRONT)
                listed = stays & (i >= FRONT)
                tl.store(staying + place - FRONT, a, mask=listed)
                tl.store(staying_key + place - FRONT, mine, mask=listed)
            tl.store(index + a, place, mask=placed)
            tl.store(size + place, 1 + 0 * i, mask=placed)
            tl.store(members + place, a, mask=placed)
        tl.debug_barrier()

        joined = 0
        for first in range(0, nb, BLOCK):
            i = first + tl.arange(0, BLOCK)
            is_b = i < nb
            sources = tl.load(count + i, mask=is_b, other=0)
            group = na - r + i
            if NUM_PROTECTED == 2:
                group = tl.where(i == 0, 1, group)
            begin = group + joined + tl.cumsum(sources, 0) - sources
            joined += tl.sum(sources, 0)
            b = b_slot(slots, tl.minimum(i, nb - 1), na, RANDOM_SPLIT)
            tl.store(start + i, begin, mask=is_b)
            tl.store(index + b, group, mask=is_b)
            tl.store(size + group, 1 + sources, mask=is_b)
            tl.store(members + begin + tl.load(earlier + i, mask=is_b, other=0), b, mask=is_b)
        for first in range(n - r, num_tokens, BLOCK):
            group = first + tl.arange(0, BLOCK)
            tl.store(size + group, 0 * group, mask=group < num_tokens)
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
