"""One program covers one image's patches with rectangles; it ends when enough are covered.

N patches in a grid of HEIGHT x WIDTH, R rounds. The same arithmetic in the same order as `masking.block_cover`: sides
in float64, which decides what is rounded to whole patches.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def cover_kernel(
    numbers,  # float64 [B, R, 5]: area, aspect ratio, place from the top, from the left, which end is cut
    scores,  # float32 [B, N]: who fills what the rectangles leave
    masks,  # uint8 [B, N]
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
    LEAST: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    numbers += image * ROUNDS * 5
    patch = tl.arange(0, BLOCK)
    valid = patch < HEIGHT * WIDTH
    row, column = patch // WIDTH, patch % WIDTH
    covered = tl.zeros([BLOCK], tl.int32)
    missing = tl.program_id(0) * 0 + MASKED
    number = tl.program_id(0) * 0
    while (number < ROUNDS) & (missing > 0):
        area = LEAST + tl.load(numbers + 5 * number) * tl.maximum(missing - LEAST, 0)
        ratio = tl.load(numbers + 5 * number + 1)
        tall = tl.minimum(tl.maximum(tl.floor(tl.sqrt(area * ratio) + 0.5), 1), HEIGHT)
        wide = tl.minimum(tl.maximum(tl.floor(tl.sqrt(area / ratio) + 0.5), 1), WIDTH)
        longer = tl.minimum(tl.maximum(tall, tl.ceil(LEAST / wide)), HEIGHT)
        tall = tl.where(tall >= wide, longer, tall)
        wide = tl.minimum(tl.maximum(wide, tl.ceil(LEAST / tall)), WIDTH)
        tall = tl.minimum(tl.maximum(tall, tl.ceil(LEAST / wide)), HEIGHT)
        top = (tl.load(numbers + 5 * number + 2) * (HEIGHT - tall + 1)).to(tl.int32)
        left = (tl.load(numbers + 5 * number + 3) * (WIDTH - wide + 1)).to(tl.int32)
        inside = (row >= top) & (row < top + tall.to(tl.int32)) & (column >= left) & (column < left + wide.to(tl.int32))
        new = (inside & valid & (covered == 0)).to(tl.int32)
        rank = tl.cumsum(new, 0)
        count = tl.sum(new, 0)
        from_bottom = tl.load(numbers + 5 * number + 4) < 0.5
        rank = tl.where(from_bottom, count - rank + 1, rank)
        covered += tl.where(rank <= missing, new, 0)
        missing -= tl.minimum(count, missing)
        number += 1
    score = tl.load(scores + image * HEIGHT * WIDTH + patch, mask=valid, other=-1.0)
    while missing > 0:
        best = tl.argmax(tl.where((covered == 0) & valid, score, -1.0), 0)
        covered += (patch == best).to(tl.int32)
        missing -= 1
    tl.store(masks + image * HEIGHT * WIDTH + patch, covered.to(tl.uint8), mask=valid)
