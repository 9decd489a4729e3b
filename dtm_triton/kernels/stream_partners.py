"""Partners without a Gram matrix: a program keeps some A-slots and streams the B-slots past them.

The tile of inner products stays in registers; per row the best similarity so far and its first column are kept. The B
of an image can be dealt to several programs, SPLITS of them, so that one image fills a GPU: each writes its own best,
and whoever reads them takes the first of the highest. For that the keys leave out the row's own norm, which scales all
of a row alike: how B is dealt decides nothing.

T tasks of B images, N tokens or slots, C channels, H = ceil(N / 2) A-slots.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dtm_triton.kernels.match_steps import FAR, LOWEST, hash32, inverse_root, ordered_key, split_state


@triton.jit(do_not_specialize=["iteration", "first_image"])
def shuffle_key_kernel(
    key,  # int32 [T, N]
    seed,  # int64 [1]
    left,  # int32 [T]
    images,
    first_image,
    iteration,
    num_tokens,
    FIRST: tl.constexpr,
    NUM_PROTECTED: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """What slots are sorted by for a random split; what is no slot any more comes last."""
    task = tl.program_id(1)
    slot = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    n = num_tokens if FIRST else tl.load(left + task)
    state = split_state(seed, task // images, first_image + task % images, iteration)
    drawn = (hash32(slot.to(tl.uint32) ^ state) >> 1).to(tl.int32)
    drawn = tl.where(slot < NUM_PROTECTED, -1, drawn)
    place = task.to(tl.int64) * num_tokens + slot
    tl.store(key + place, tl.where(slot < n, drawn, 0x7FFFFFFF), mask=slot < num_tokens)


@triton.jit
def a_slot(shuffled, i, RANDOM_SPLIT: tl.constexpr):
    """The slots of A: even ones, or the first half of the shuffled ones."""
    return tl.load(shuffled + i).to(tl.int32) if RANDOM_SPLIT else 2 * i


@triton.jit
def b_slot(shuffled, j, na, RANDOM_SPLIT: tl.constexpr):
    """The slots of B: odd ones, or the second half of the shuffled ones."""
    return tl.load(shuffled + na + j).to(tl.int32) if RANDOM_SPLIT else 2 * j + 1


@triton.jit
def load_rows(rows, first_c, num_channels, stride_c, CHANNELS: tl.constexpr, UPCAST: tl.constexpr):
    """Channels first_c .. of the rows that these pointers start: [rows, CHANNELS]."""
    c = first_c + tl.arange(0, CHANNELS)
    value = tl.load(rows[:, None] + (c.to(tl.int64) * stride_c)[None, :], mask=(c < num_channels)[None, :], other=0.0)
    return value.to(tl.float32) if UPCAST else value


@triton.jit
def load_columns(rows, first_c, num_channels, stride_c, CHANNELS: tl.constexpr, UPCAST: tl.constexpr):
    """The same transposed: [CHANNELS, rows]."""
    c = first_c + tl.arange(0, CHANNELS)
    value = tl.load(rows[None, :] + (c.to(tl.int64) * stride_c)[:, None], mask=(c < num_channels)[:, None], other=0.0)
    return value.to(tl.float32) if UPCAST else value


@triton.jit
def sum_squares(value, axis: tl.constexpr):
    """Along one axis, in float32."""
    wide = value.to(tl.float32)
    return tl.sum(wide * wide, axis)


@triton.jit
def row_norms(rows, num_channels, stride_c, ROWS: tl.constexpr, CHANNELS: tl.constexpr, UPCAST: tl.constexpr):
    """1 / |x| of every row."""
    square = tl.zeros((ROWS,), tl.float32)
    for first_c in range(0, num_channels, CHANNELS):
        square += sum_squares(load_rows(rows, first_c, num_channels, stride_c, CHANNELS, UPCAST), 1)
    return inverse_root(square)


@triton.jit
def norm_kernel(
    features,  # [B, N, C]
    left,  # int32 [T]
    inverse_norm,  # float32 [B, N]
    num_tokens,
    num_channels,
    stride_b,
    stride_n,
    stride_c,
    FIRST: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """1 / |x| of every slot, once for all programs that stream it."""
    image = tl.program_id(1)
    n = num_tokens if FIRST else tl.load(left + image)
    first = tl.program_id(0) * ROWS
    if first >= n:
        return
    slot = first + tl.arange(0, ROWS)
    rows = features + image.to(tl.int64) * stride_b + tl.minimum(slot, n - 1).to(tl.int64) * stride_n
    norm = row_norms(rows, num_channels, stride_c, ROWS, CHANNELS, UPCAST)
    tl.store(inverse_norm + image.to(tl.int64) * num_tokens + slot, norm, mask=slot < n)


@triton.jit
def keep_best(product, scale, j, best, found, NUM_PROTECTED: tl.constexpr):
    """The best similarity so far of every row, and its column, after the columns j; an earlier one wins a tie.

    Columns behind the last B-slot repeat it, so that they lose the tie; should they ever win it, they stand for it.
    """
    if NUM_PROTECTED == 2:  # made not a number, which the maximum passes over
        scale = tl.where(j > 0, scale, float("nan"))
    value = product * scale[None, :]
    top = tl.max(value, 1)
    column = tl.min(tl.where(value == top[:, None], j[None, :], FAR), 1)
    better = top > best
    return tl.where(better, top, best), tl.where(better, column, found)


@triton.jit
def partner_kernel(
    features,  # [B, N, C]
    shuffled,  # int64 [T, N]: slots, those of A first, then those of B; only for a random split
    left,  # int32 [T]
    inverse_norm,  # float32 [T, N] with NORMS, else [B, N]
    key,  # int32 [SPLITS, T, H]
    partner,  # int32 [SPLITS, T, H]
    images,
    num_tokens,
    num_channels,
    stride_b,
    stride_n,
    stride_c,
    FIRST: tl.constexpr,
    NUM_PROTECTED: tl.constexpr,
    RANDOM_SPLIT: tl.constexpr,
    NORMS: tl.constexpr,
    WIDE: tl.constexpr,
    REST: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Each A-slot's best B-slot, the lowest on a tie, and the ordered key of their similarity times the A-slot's norm.

    WIDE > 0 keeps the tile of A on chip, in parts of WIDE and REST channels. NORMS takes the norms of B from the tiles
    that go by.
    """
    task = tl.program_id(2)
    n = num_tokens if FIRST else tl.load(left + task)
    na = (n + 1) // 2
    nb = n // 2
    first_a = tl.program_id(0) * ROWS
    if first_a >= na:
        return
    x = features + (task % images).to(tl.int64) * stride_b
    norms = inverse_norm + (task if NORMS else task % images).to(tl.int64) * num_tokens
    slots = shuffled + task.to(tl.int64) * num_tokens

    i = first_a + tl.arange(0, ROWS)
    a = a_slot(slots, tl.minimum(i, na - 1), RANDOM_SPLIT)
    a_rows = x + a.to(tl.int64) * stride_n
    if NORMS:
        if tl.program_id(1) == 0:
            tl.store(norms + a, row_norms(a_rows, num_channels, stride_c, ROWS, CHANNELS, UPCAST), mask=i < na)
    if WIDE > 0:
        wide = load_rows(a_rows, 0, num_channels, stride_c, WIDE, UPCAST)
    if REST > 0:
        rest = load_rows(a_rows, WIDE, num_channels, stride_c, REST, UPCAST)

    share = tl.cdiv(tl.cdiv(nb, COLUMNS), tl.num_programs(1)) * COLUMNS
    begin = tl.program_id(1) * share
    lane = tl.arange(0, COLUMNS)
    # What is not a number never beats this start, the first B-slot that is not protected.
    best = tl.full((ROWS,), LOWEST, tl.float32)
    found = tl.full((ROWS,), 1 if NUM_PROTECTED == 2 else 0, tl.int32)
    end = tl.minimum(begin + share, nb)
    if WIDE > 0:
        for first_b in range(begin, end, COLUMNS):
            j = first_b + lane
            b = b_slot(slots, tl.minimum(j, nb - 1), na, RANDOM_SPLIT)
            b_rows = x + b.to(tl.int64) * stride_n
            scale = tl.zeros((COLUMNS,), tl.float32) if NORMS else tl.load(norms + b)  # long before it is used
            product = tl.zeros((ROWS, COLUMNS), tl.float32)
            square = tl.zeros((COLUMNS,), tl.float32)
            columns = load_columns(b_rows, 0, num_channels, stride_c, WIDE, UPCAST)
            product = tl.dot(wide, columns, product, input_precision=PRECISION)
            if NORMS:
                square += sum_squares(columns, 0)
            if REST > 0:
                columns = load_columns(b_rows, WIDE, num_channels, stride_c, REST, UPCAST)
                product = tl.dot(rest, columns, product, input_precision=PRECISION)
                if NORMS:
                    square += sum_squares(columns, 0)
            if NORMS:
                scale = inverse_root(square)
            best, found = keep_best(product, scale, j, best, found, NUM_PROTECTED)
    else:
        chunks = tl.cdiv(num_channels, CHANNELS)
        product = tl.zeros((ROWS, COLUMNS), tl.float32)
        square = tl.zeros((COLUMNS,), tl.float32)
        for step in range(0, tl.cdiv(tl.maximum(end - begin, 0), COLUMNS) * chunks):
            j = begin + step // chunks * COLUMNS + lane
            first_c = step % chunks * CHANNELS
            b = b_slot(slots, tl.minimum(j, nb - 1), na, RANDOM_SPLIT)
            scale = tl.zeros((COLUMNS,), tl.float32)
            if not NORMS:
                if step % chunks == chunks - 1:
                    scale = tl.load(norms + b)  # before the product, so that nobody waits for it after
            rows = load_rows(a_rows, first_c, num_channels, stride_c, CHANNELS, UPCAST)
            columns = load_columns(x + b.to(tl.int64) * stride_n, first_c, num_channels, stride_c, CHANNELS, UPCAST)
            product = tl.dot(rows, columns, product, input_precision=PRECISION)
            if NORMS:
                square += sum_squares(columns, 0)
            if step % chunks == chunks - 1:
                if NORMS:
                    scale = inverse_root(square)
                best, found = keep_best(product, scale, j, best, found, NUM_PROTECTED)
                product = tl.zeros((ROWS, COLUMNS), tl.float32)
                square = tl.zeros((COLUMNS,), tl.float32)
    half = (num_tokens + 1) // 2
    place = (tl.program_id(1) * tl.num_programs(2) + task).to(tl.int64) * half + i
    tl.store(key + place, ordered_key(best), mask=i < na)
    tl.store(partner + place, tl.minimum(found, nb - 1), mask=i < na)
