"""The steps of one matching iteration on the Gram matrix, as device functions of `match_kernel`.

gram [N, stride] float32 holds the inner products of group sums. It changes in place and is never permuted: a group
lives in the row and column of one of its tokens, and `order` lists those tokens slot by slot. The n slots split into
A = even and B = odd ones, na and nb of them. Lists of every step are in scratch memory, with a barrier between a step
that writes and one that reads. Every token merges at most once, into `parent`.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3e38)  # what a similarity that is not a number counts as; above the -inf of protected slots
NEVER = tl.constexpr(-0x7FFFFFFF)  # below the key of every number
FAR = tl.constexpr(1 << 30)  # behind every slot


@triton.jit
def hash32(x):
    """An invertible mixing of 32 bits (uint32)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def ordered_key(value):
    """float32 -> int32 of the same order, with 0 and -0 equal. The value must be a number."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def keyed_value(key):
    """The float32 whose ordered key this is."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def inverse_root(square):
    """1 / sqrt(square), and 0 where square is 0 or not a number."""
    positive = square > 0
    return tl.where(positive, tl.rsqrt(tl.where(positive, square, 1.0)), 0.0)


@triton.jit
def split_state(seed, schedule, image, iteration):
    """The state of the counter-based generator for one split (uint32)."""
    word = tl.load(seed)
    state = hash32(word.to(tl.uint32))
    state = hash32(state ^ (word >> 32).to(tl.uint32))
    state = hash32(state ^ schedule.to(tl.uint32))
    state = hash32(state ^ image.to(tl.uint32))
    return hash32(state ^ tl.cast(iteration, tl.uint32))


@triton.jit
def shuffle(order, shuffled, state, n, na, NUM_PROTECTED: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sort the slots by a hash of (state, slot), protected ones first; the first half becomes A, the rest B."""
    i = tl.arange(0, SLOTS)
    key = _shuffle_key(state, i, NUM_PROTECTED)
    before = tl.zeros((SLOTS, BLOCK), tl.int32)
    for first in range(0, n, BLOCK):
        j = first + tl.arange(0, BLOCK)
        other = tl.where(j < n, _shuffle_key(state, j, NUM_PROTECTED), 0x7FFFFFFF)
        before += (other[None, :] - (j[None, :] < i[:, None]).to(tl.int32) < key[:, None]).to(tl.int32)
    place = tl.sum(before, 1)
    slot = tl.where(place < na, 2 * place, 2 * (place - na) + 1)
    token = tl.load(order + i, mask=i < n, other=0)
    tl.store(shuffled + slot, token, mask=i < n)


@triton.jit
def _shuffle_key(state, slot, NUM_PROTECTED: tl.constexpr):
    key = (hash32(slot.to(tl.uint32) ^ state) >> 1).to(tl.int32)
    return tl.where(slot < NUM_PROTECTED, -1, key)


@triton.jit
def last_merging(removed, num_iterations):
    """The last iteration that is to remove anything, or -1."""
    last = -1
    for iteration in range(num_iterations):
        if tl.load(removed + iteration) > 0:
            last = iteration
    return last


@triton.jit
def count_above(key, threshold, na, HALF: tl.constexpr):
    """How many A-slots are more similar to their partner than `threshold` (float32)."""
    i = tl.arange(0, HALF)
    mine = tl.load(key + i, mask=i < na, other=NEVER)
    return tl.sum((mine > ordered_key(tl.cast(threshold, tl.float32))).to(tl.int32), 0)


@triton.jit
def find_partners(
    gram,
    inverse_norm,
    order,
    key,
    partner,
    na,
    nb,
    stride,
    NUM_PROTECTED: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Each A-slot's best B-slot by cosine similarity, the lowest on a tie, and the ordered key of that similarity."""
    lane = tl.arange(0, BLOCK_B)
    open_lane = (lane < nb) & (lane >= NUM_PROTECTED - 1)
    for first in range(0, na, BLOCK_A):
        i = first + tl.arange(0, BLOCK_A)
        a = tl.load(order + 2 * i, mask=i < na, other=0)
        row = a * stride
        # Columns that are not a number never beat this start, so they count as LOWEST.
        best = tl.zeros((BLOCK_A, BLOCK_B), tl.float32) + tl.where(open_lane, LOWEST, float("-inf"))[None, :]
        start = tl.zeros((BLOCK_A, BLOCK_B), tl.int32)
        for first_b in range(0, nb, BLOCK_B):
            j = first_b + lane
            # Not literally true: a hint for Triton 3.6, which lays the lanes of this gather along rows without it.
            b = tl.max_contiguous(tl.load(order + 2 * j + 1, mask=j < nb, other=0), 2)
            scale = tl.load(inverse_norm + b, mask=j < nb, other=0.0)
            shut = tl.where((j < nb) & (j >= NUM_PROTECTED - 1), 0.0, float("-inf"))
            value = tl.load(gram + (row[:, None] + b[None, :])) * scale[None, :] + shut[None, :]
            better = value > best
            best = tl.where(better, value, best)
            start = tl.where(better, first_b, start)
        # Reducing integers takes one instruction where reducing floats takes five shuffles.
        keys = ordered_key(best)
        top = tl.max(keys, 1)
        j = tl.min(tl.where(keys == top[:, None], start + lane[None, :], FAR), 1)
        # a's own norm scales its whole row alike, so it comes last.
        value = keyed_value(top)
        value = tl.where(value > LOWEST, value * tl.load(inverse_norm + a), LOWEST)
        value = tl.where(value > LOWEST, value, LOWEST)
        if NUM_PROTECTED > 0:
            value = tl.where(i > 0, value, float("-inf"))
        tl.store(key + i, ordered_key(value), mask=i < na)
        tl.store(partner + i, j, mask=i < na)


@triton.jit
def select(
    order,
    new_order,
    key,
    partner,
    source,
    destination,
    parent,
    touched,
    stamp,
    na,
    nb,
    r,
    NUM_PROTECTED: tl.constexpr,
    KEEP_ORDER: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The r best A-slots merge (the lower slot on a tie): list them by rank, and write the order that follows."""
    i = tl.arange(0, HALF)
    is_a = i < na
    mine = tl.load(key + i, mask=is_a, other=0)
    better = tl.zeros((HALF, BLOCK), tl.int32)
    for first in range(0, na, BLOCK):
        j = first + tl.arange(0, BLOCK)
        other = tl.load(key + j, mask=j < na, other=NEVER)
        better += (other[None, :] > mine[:, None] - (j[None, :] < i[:, None]).to(tl.int32)).to(tl.int32)
    rank = tl.sum(better, 1)
    merging = is_a & (rank < r)
    staying = is_a & (rank >= r)

    a = tl.load(order + 2 * i, mask=is_a, other=0)
    chosen = tl.load(order + 2 * tl.load(partner + i, mask=is_a, other=0) + 1, mask=is_a, other=0)
    tl.store(source + rank, a, mask=merging)
    tl.store(destination + rank, chosen, mask=merging)
    tl.store(parent + a, chosen, mask=merging)
    tl.store(touched + a, i * 0 + stamp, mask=merging)
    tl.store(touched + chosen, i * 0 + stamp, mask=merging)

    if KEEP_ORDER:
        gone = merging.to(tl.int32)
        place = i - (tl.cumsum(gone, 0) - gone)
    elif NUM_PROTECTED > 0:  # a_0 ranks last, but stays in front
        place = tl.where(i == 0, 0, rank - r + 1)
    else:
        place = rank - r
    b = tl.load(order + 2 * i + 1, mask=i < nb, other=0)
    place_b = na - r + i
    if NUM_PROTECTED == 2:  # a_0, b_0, the other a's, the other b's
        place = tl.where(i == 0, 0, place + 1)
        place_b = tl.where(i == 0, 1, place_b)
    tl.store(new_order + place, a, mask=staying)
    tl.store(new_order + place_b, b, mask=i < nb)
