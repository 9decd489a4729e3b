"""The loss between morphed outputs and targets, and its gradient, in plain PyTorch: for CPUs, and GPUs without Triton.

L schedules, B images, N tokens, G groups, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dtm_triton.kernels.settings import slope_dtype
from dtm_triton.portable import merge
from dtm_triton.rows import at_least_float32, gather_rows


def loss_forward(
    outputs: Tensor,
    targets: Tensor,
    index: Tensor,
    size: Tensor,
    *,
    kind: str,
    beta: float,
    normalize_target: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient up to a constant, [B, N, C], when `save` (else an empty tensor).

    Morphing is a symmetric projector, so the derivative by a group's mean output, given to every token of the group,
    is the gradient up to the constant that `loss_backward` applies: 1 / (B N C) times it would underflow in float16.
    Shapes are those of `reference.loss`; columns of `size` may be padded with zeros. Source: DTM, equations 4 and 5.
    """
    batch, tokens, channels = outputs.shape
    x, y = at_least_float32(outputs), at_least_float32(targets)
    separate = kind == "cosine" or normalize_target
    total = x.new_zeros(())
    slopes = x.new_zeros(outputs.shape if save else (0,))
    for groups, sizes in zip(index, size, strict=True):
        members = sizes.clamp(min=1)
        if separate:
            output = merge(x, groups, members, "mean")
            target = merge(y, groups, members, "mean")
            target = _standardise(target) if normalize_target else target
            value, slope = _cosine(output, target) if kind == "cosine" else _pointwise(output - target, kind, beta)
        else:
            value, slope = _pointwise(merge(x - y, groups, members, "mean"), kind, beta)
        total = total + (value * sizes[:, :, None]).sum()
        if save:
            slopes += gather_rows(slope, groups.long())
    count = len(index) * batch * tokens * (1 if kind == "cosine" else channels)
    return (total / max(count, 1)).to(x.dtype), slopes.to(slope_dtype(outputs.dtype, kind, len(index)))


def loss_backward(grad: Tensor, slopes: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The gradient of the loss, [B, N, C] of `dtype`: the slopes times `grad` and `scale`, in float32."""
    return (at_least_float32(slopes) * (grad * scale)).to(dtype)


def _pointwise(difference: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """f and f' of a difference of means."""
    if kind == "l2":
        return difference.square(), 2 * difference
    distance, sign = difference.abs(), difference.sign()
    if kind == "l1" or beta == 0:
        return distance, sign
    assert kind == "smooth_l1", kind
    far = distance >= beta
    value = torch.where(far, distance - 0.5 * beta, 0.5 * difference.square() / beta)
    return value, torch.where(far, sign, difference / beta)  # what is not a number is not far, and stays


def _cosine(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """1 - cosine similarity of each row [B, G, 1], norms held at 1e-8 or above, and its derivative by `output`."""
    square = output.square().sum(-1, keepdim=True)
    length = square.sqrt().clamp(min=1e-8)
    target = target / target.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    cosine = (output * target).sum(-1, keepdim=True) / length
    pull = torch.where(square > 1e-16, cosine / length.square(), 0.0)  # a clamped norm is a constant
    return 1 - cosine, pull * output - target / length


def _standardise(target: Tensor) -> Tensor:
    """Zero mean and unit unbiased variance over the channels."""
    centred = target - target.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(target.shape[-1] - 1, 1)
    return centred / (variance + 1e-6).sqrt()
