"""The Gram matrix of an image's tokens, as a device function of `match_kernel`."""

from __future__ import annotations

import triton
import triton.language as tl


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
    """gram[i, j] = <x_i, x_j>. Equal tokens get equal entries, bit for bit, so that ties stay ties."""
    # The three-pass product is not symmetric to the last bit, so there both triangles are computed, not mirrored.
    MIRROR: tl.constexpr = PRECISION != "tf32x3"
    for first_i in range(0, num_tokens, ROWS):
        i = first_i + tl.arange(0, ROWS)
        x_i = x + tl.minimum(i, num_tokens - 1).to(tl.int64) * stride_n
        for first_j in range(0, first_i + ROWS if MIRROR else num_tokens, ROWS):
            j = first_j + tl.arange(0, ROWS)
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
            inside = (i < num_tokens)[:, None] & (j < num_tokens)[None, :]
            tl.store(gram + i[:, None] * gram_stride + j[None, :], product, mask=inside)
            if MIRROR:
                if first_j < first_i:
                    tl.store(gram + j[None, :] * gram_stride + i[:, None], product, mask=inside)
