"""The Gram matrix of an image's tokens: as a device function of the single launch, and as a launch of its own.

The three-pass float32 product is not symmetric to the last bit, so there both triangles are computed; elsewhere the
upper one mirrors the lower.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply_tile(
    x,
    i,
    j,
    num_tokens,
    num_channels,
    stride_n,
    stride_c,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """<x_i, x_j> for the tokens i and j [ROWS], float32 [ROWS, ROWS]. Equal tokens get equal entries, bit for bit."""
    x_i = x + tl.minimum(i, num_tokens - 1).to(tl.int64) * stride_n
    x_j = x + tl.minimum(j, num_tokens - 1).to(tl.int64) * stride_n
    product = tl.zeros((ROWS, ROWS), tl.float32)
    for first_c in range(0, num_channels, CHANNELS):
        c = first_c + tl.arange(0, CHANNELS)
        inside = c < num_channels
        offset = c.to(tl.int64) * stride_c
        a = tl.load(x_i[:, None] + offset[None, :], mask=inside[None, :], other=0.0)
        b = tl.load(x_j[None, :] + offset[:, None], mask=inside[:, None], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        product = tl.dot(a, b, product, input_precision=PRECISION)
    return product


@triton.jit
def form_gram(
    x,
    gram,
    num_tokens,
    num_channels,
    stride_n,
    stride_c,
    gram_stride,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """gram[i, j] = <x_i, x_j>, by one program."""
    MIRROR: tl.constexpr = PRECISION != "tf32x3"
    for first_i in range(0, num_tokens, ROWS):
        i = first_i + tl.arange(0, ROWS)
        for first_j in range(0, first_i + ROWS if MIRROR else num_tokens, ROWS):
            j = first_j + tl.arange(0, ROWS)
            product = multiply_tile(
                x, i, j, num_tokens, num_channels, stride_n, stride_c, ROWS, CHANNELS, PRECISION, UPCAST
            )
            inside = (i < num_tokens)[:, None] & (j < num_tokens)[None, :]
            tl.store(gram + (i[:, None] * gram_stride + j[None, :]), product, mask=inside)
            if MIRROR:
                if first_j < first_i:
                    tl.store(gram + (j[None, :] * gram_stride + i[:, None]), product, mask=inside)


@triton.jit
def gram_kernel(
    features,  # [B, N, C]
    gram_scratch,  # float32 [L, images, N + 1, gram_stride]
    first_image,
    images,
    edge,
    num_schedules,
    num_tokens,
    num_channels,
    stride_b,
    stride_n,
    stride_c,
    gram_stride,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of one image's matrix, written once for every schedule, since each changes its own in place."""
    MIRROR: tl.constexpr = PRECISION != "tf32x3"
    image = tl.program_id(0) // (edge * edge)  # an image's tiles are neighbours: they share its features
    tile_i = tl.program_id(0) // edge % edge
    tile_j = tl.program_id(0) % edge
    if MIRROR:
        if tile_j > tile_i:
            return
    i = tile_i * ROWS + tl.arange(0, ROWS)
    j = tile_j * ROWS + tl.arange(0, ROWS)
    x = features + (first_image + image).to(tl.int64) * stride_b
    product = multiply_tile(x, i, j, num_tokens, num_channels, stride_n, stride_c, ROWS, CHANNELS, PRECISION, UPCAST)
    inside = (i < num_tokens)[:, None] & (j < num_tokens)[None, :]
    matrix = (num_tokens + 1) * gram_stride
    first = gram_scratch + image.to(tl.int64) * matrix
    further = tl.cast(images, tl.int64) * matrix  # from one schedule to the next
    # Offsets within a matrix in 32 bits, and one triangle after the other: half the registers, and no spill.
    place = i[:, None] * gram_stride + j[None, :]
    for schedule in range(num_schedules):
        tl.store(first + schedule * further + place, product, mask=inside)
    if MIRROR:
        if tile_j < tile_i:
            place = j[None, :] * gram_stride + i[:, None]
            for schedule in range(num_schedules):
                tl.store(first + schedule * further + place, product, mask=inside)
