"""The losses as custom ops: one call each way, matching included.

The forward saves, per group and channel, the derivative of the loss by the group's mean; since morphing is a symmetric
projector the backward only hands it to the group's tokens. Shapes and their letters are those of `ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dtm_triton import portable_loss
from dtm_triton.kernels.settings import slope_dtype
from dtm_triton.ops import _kernels, match


@custom_op("dtm_triton::morph_loss", mutates_args=())
def morph_loss(
    outputs: Tensor,
    targets: Tensor,
    index: Tensor,
    size: Tensor,
    kind: str,
    beta: float,
    normalize_target: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """outputs and targets [B, N, C], index [L, B, N], size [L, B, G] -> the loss, and slopes [L, B, G, C] if `save`."""
    members = index
    if kernels := _kernels(backend, outputs, targets, size):
        members = torch.stack([kernels.group_members(groups, size.shape[2]) for groups in index])
    return _loss(outputs, targets, index, size, members, kind, beta, normalize_target, save, backend)


@morph_loss.register_fake
def _(
    outputs: Tensor,
    targets: Tensor,
    index: Tensor,
    size: Tensor,
    kind: str,
    beta: float,
    normalize_target: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _fake_loss(outputs), _fake_slopes(outputs, (*size.shape, outputs.shape[2]), kind, save)


@custom_op("dtm_triton::dtm_loss", mutates_args=())
def dtm_loss(
    outputs: Tensor,
    targets: Tensor,
    removed: Tensor,
    seed: Tensor,
    num_protected: int,
    random_split: bool,
    kind: str,
    beta: float,
    normalize_target: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matching on the targets, then the loss: the loss, slopes [L, B, N, C] if `save`, index [L, B, N]."""
    index, size, members = match(targets, removed, seed, num_protected, random_split, num_protected > 0, None, backend)
    return *_loss(outputs, targets, index, size, members, kind, beta, normalize_target, save, backend), index


@dtm_loss.register_fake
def _(
    outputs: Tensor,
    targets: Tensor,
    removed: Tensor,
    seed: Tensor,
    num_protected: int,
    random_split: bool,
    kind: str,
    beta: float,
    normalize_target: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (removed.shape[0], *outputs.shape)
    index = outputs.new_empty(shape[:3], dtype=torch.int32)
    return _fake_loss(outputs), _fake_slopes(outputs, shape, kind, save), index


@custom_op("dtm_triton::loss_backward", mutates_args=())
def loss_backward(grad: Tensor, slopes: Tensor, index: Tensor, scale: float, backend: str) -> Tensor:
    """grad * scale * (the sum over schedules of each token's slopes): [B, N, C] in the slopes' dtype."""
    if kernels := _kernels(backend, slopes, index):
        return kernels.loss_backward(grad, slopes, index, scale=scale)
    return portable_loss.loss_backward(grad, slopes, index, scale)


@loss_backward.register_fake
def _(grad: Tensor, slopes: Tensor, index: Tensor, *_: Any) -> Tensor:
    return slopes.new_empty((*index.shape[1:], slopes.shape[3]))


def _setup(ctx: Any, outputs: Tensor, slopes: Tensor, index: Tensor, kind: str, backend: str) -> None:
    ctx.save_for_backward(slopes, index)
    ctx.mark_non_differentiable(slopes)
    ctx.scale, ctx.dtype, ctx.backend = 1 / max(len(index) * _count(outputs, kind), 1), outputs.dtype, backend


def _morph_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs[0], output[1], inputs[2], inputs[4], inputs[-1])


def _dtm_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs[0], output[1], output[2], inputs[6], inputs[-1])


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # create_graph: what follows would silently lack the loss's second derivative
        raise RuntimeError("morph_loss and dtm_loss are differentiable once; backend='reference' has more derivatives")
    slopes, index = ctx.saved_tensors
    return loss_backward(grad, slopes, index, ctx.scale, ctx.backend).to(ctx.dtype)


def _morph_loss_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad), *[None] * 8


def _dtm_loss_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    return _backward(ctx, grad), *[None] * 10


morph_loss.register_autograd(_morph_loss_backward, setup_context=_morph_loss_setup)
dtm_loss.register_autograd(_dtm_loss_backward, setup_context=_dtm_loss_setup)


def _loss(
    outputs: Tensor,
    targets: Tensor,
    index: Tensor,
    size: Tensor,
    members: Tensor,
    kind: str,
    beta: float,
    normalize_target: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = dict(kind=kind, beta=beta, normalize_target=normalize_target)
    if kernels := _kernels(backend, outputs, targets, size):
        return kernels.loss_forward(outputs, targets, members, size, **options, save=save)
    return portable_loss.loss_forward(outputs, targets, index, size, **options, save=save)


def _fake_loss(outputs: Tensor) -> Tensor:
    return outputs.new_empty((), dtype=torch.promote_types(outputs.dtype, torch.float32))


def _fake_slopes(outputs: Tensor, shape: tuple[int, ...], kind: str, save: bool) -> Tensor:
    return outputs.new_empty(shape if save else (0,), dtype=slope_dtype(outputs.dtype, kind))


def _count(outputs: Tensor, kind: str) -> int:
    batch, tokens, channels = outputs.shape
    return batch * tokens * (1 if kind == "cosine" else channels)
