"""Where slots go that cannot be told from counts alone, and where tokens go when slots move.

Two things take a comparison of pairs: the rank of a source among those of its destination, and that of a slot that
stays among those that stay. Together never more than H^2 pairs, spread over programs, nothing of them stored.

T tasks, N slots, HALF = N / 2 rounded up to a power of two, H = ceil(N / 2) A-slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.match_steps import NEVER
from dtm_triton.kernels.stream_partners import b_slot


@triton.jit
def place_sources(
    source,
    destination,
    start,
    slots,
    index,
    members,
    first,
    r,
    na,
    RANDOM_SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sources first .. first + ROWS join their destinations, in the order of the slots."""
    k = first + tl.arange(0, ROWS)
    valid = k < r
    slot = tl.load(source + k, mask=valid, other=0)
    chosen = tl.load(destination + k, mask=valid, other=-1)
    before = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first_m in range(0, r, COLUMNS):
        m = first_m + tl.arange(0, COLUMNS)
        other = tl.load(source + m, mask=m < r, other=0)
        leading = tl.load(destination + m, mask=m < r, other=-2)
        before += ((leading[None, :] == chosen[:, None]) & (other[None, :] < slot[:, None])).to(tl.int32)
    chosen = tl.maximum(chosen, 0)
    own = b_slot(slots, chosen, na, RANDOM_SPLIT)
    place = tl.load(start + chosen, mask=valid, other=0) + tl.sum(before, 1) + (own < slot).to(tl.int32)
    tl.store(members + place, slot, mask=valid)
    tl.store(index + slot, na - r + chosen, mask=valid)


@triton.jit
def place_staying(
    staying, staying_key, index, size, members, first, count, shift, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """A-slots that stay, first .. first + ROWS of the list, by falling similarity behind the protected ones."""
    k = first + tl.arange(0, ROWS)
    valid = k < count
    slot = tl.load(staying + k, mask=valid, other=0)
    mine = tl.load(staying_key + k, mask=valid, other=0)
    before = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first_m in range(0, count, COLUMNS):
        m = first_m + tl.arange(0, COLUMNS)
        other = tl.load(staying_key + m, mask=m < count, other=NEVER)
        before += (other[None, :] > mine[:, None] - (m[None, :] < k[:, None]).to(tl.int32)).to(tl.int32)
    place = shift + tl.sum(before, 1)
    tl.store(index + slot, place, mask=valid)
    tl.store(size + place, 1 + 0 * place, mask=valid)
    tl.store(members + place, slot, mask=valid)


@triton.jit
def place_pairs(
    lists,
    slots,
    index,
    size,
    members,
    first,
    na,
    r,
    NUM_PROTECTED: tl.constexpr,
    RANDOM_SPLIT: tl.constexpr,
    KEEP_ORDER: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """What takes comparing pairs, for ROWS sources and as many slots that stay."""
    if first < r:
        start = lists + 2 * HALF
        place_sources(lists, lists + HALF, start, slots, index, members, first, r, na, RANDOM_SPLIT, ROWS, COLUMNS)
    if not KEEP_ORDER:
        count = na - r - (1 if NUM_PROTECTED > 0 else 0)
        if first < count:
            staying = lists + 3 * HALF
            place_staying(staying, staying + HALF, index, size, members, first, count, NUM_PROTECTED, ROWS, COLUMNS)


@triton.jit(do_not_specialize=["iteration"])
def place_kernel(
    shuffled,  # int64 [T, N]; only for a random split
    left,  # int32 [K + 1, T]
    lists,  # int32 [T, 9 * HALF]
    index,  # int32 [L, images, N], the schedules schedule_stride apart
    size,  # int32, likewise
    members,  # int32, likewise
    images,
    num_tokens,
    iteration,
    schedule_stride,
    FIRST: tl.constexpr,
    NUM_PROTECTED: tl.constexpr,
    RANDOM_SPLIT: tl.constexpr,
    KEEP_ORDER: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """`place_pairs` by many programs a task."""
    task = tl.program_id(1)
    after = left + (iteration + 1) * tl.num_programs(1) + task
    n = num_tokens if FIRST else tl.load(after - tl.num_programs(1))
    r = n - tl.load(after)
    first = tl.program_id(0) * ROWS
    if r > 0:
        result = (task // images).to(tl.int64) * schedule_stride + (task % images).to(tl.int64) * num_tokens
        place_pairs(
            lists + task.to(tl.int64) * 9 * HALF,
            shuffled + task.to(tl.int64) * num_tokens,
            index + result,
            size + result,
            members + result,
            first,
            (n + 1) // 2,
            r,
            NUM_PROTECTED,
            RANDOM_SPLIT,
            KEEP_ORDER,
            HALF,
            ROWS,
            COLUMNS,
        )


@triton.jit
def follow_kernel(
    index,  # int32 [L, images, N], the schedules schedule_stride apart; changed
    size,  # int32, likewise; zero, where it is to be counted
    moved,  # int32 [T, N]: where every slot went
    images,
    num_tokens,
    schedule_stride,
    COUNT: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Every token follows its slot; with COUNT, groups count their tokens."""
    task = tl.program_id(1)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    result = (task // images).to(tl.int64) * schedule_stride + (task % images).to(tl.int64) * num_tokens
    inside = token < num_tokens
    slot = tl.load(index + result + token, mask=inside, other=0)
    group = tl.load(moved + task.to(tl.int64) * num_tokens + slot, mask=inside, other=0)
    tl.store(index + result + token, group, mask=inside)
    if COUNT:
        tl.atomic_add(size + result + group, 1 + 0 * group, mask=inside, sem="relaxed")
