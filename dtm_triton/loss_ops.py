"""The losses as custom ops: one call each way, matching included.

The forward saves the gradient up to a constant, [B, N, C]; the backward scales it. Shapes and their letters are those
of `ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dtm_triton import portable, portable_loss
from dtm_triton.kernels.settings import slope_dtype
from dtm_triton.ops import _kernels


@custom_op("dtm_triton::morph_loss", mutates_args=())
def morph_loss(
    outputs: Tensor,
    targets: Tensor,
    index: Tensor,
    size: Tensor,
    members: Tensor | None,
    kind: str,
    beta: float,
    normalize_target: bool,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """outputs and targets [B, N, C], index and members [L, B, N], size [L, B, G] -> the loss, and slopes [B, N, C]
    if `save`. Without members the tokens are sorted by group here."""
    options: dict[str, Any] = dict(kind=kind, beta=beta, normalize_target=normalize_target, save=save)
    if kernels := _kernels(backend, outputs, targets, size):
        if members is None:
            members = torch.stack([kernels.group_members(groups, size.shape[2]) for groups in index])
        return kernels.loss_forward(outputs, targets, members, size, **options)
    return portable_loss.loss_forward(outputs, targets, index, size, **options)


@morph_loss.register_fake
def _(
    outputs: Tensor,
    targets: Tensor,
    index: Tensor,
    size: Tensor,
    members: Tensor | None,
    kind: str,
    beta: float,
    normalize_target: bool,
    save: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return _fake_loss(outputs, kind, len(index), save)


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
) -> tuple[Tensor, Tensor]:
    """Matching on the targets, then the loss: the loss, and slopes [B, N, C] if `save`."""
    options: dict[str, Any] = dict(kind=kind, beta=beta, normalize_target=normalize_target, save=save)
    matching: dict[str, Any] = dict(
        num_protected=num_protected, random_split=random_split, keep_order=num_protected > 0
    )
    if kernels := _kernels(backend, outputs, targets, removed):
        ticket = torch.empty(1, dtype=torch.int32, device=outputs.device)
        _, size, members, _ = kernels.match(targets, removed, seed, **matching, ticket=ticket)
        return kernels.loss_forward(outputs, targets, members, size, **options, ticket=ticket)
    index, size, _ = portable.match(targets, removed, int(seed), **matching)
    return portable_loss.loss_forward(outputs, targets, index, size, **options)


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
    *_: Any,
) -> tuple[Tensor, Tensor]:
    return _fake_loss(outputs, kind, len(removed), save)


@custom_op("dtm_triton::loss_backward", mutates_args=())
def loss_backward(grad: Tensor, slopes: Tensor, scale: float, dtype: torch.dtype, backend: str) -> Tensor:
    """grad * scale * slopes [B, N, C], of `dtype`."""
    if kernels := _kernels(backend, slopes):
        return kernels.loss_backward(grad, slopes, scale, dtype)
    return portable_loss.loss_backward(grad, slopes, scale, dtype)


@loss_backward.register_fake
def _(grad: Tensor, slopes: Tensor, scale: float, dtype: torch.dtype, *_: Any) -> Tensor:
    return slopes.new_empty(slopes.shape, dtype=dtype)


def _setup(ctx: Any, outputs: Tensor, slopes: Tensor, num_schedules: int, kind: str, backend: str) -> None:
    ctx.save_for_backward(slopes)
    ctx.mark_non_differentiable(slopes)
    ctx.set_materialize_grads(False)  # else PyTorch fills a gradient of zeros for the slopes
    batch, tokens, channels = outputs.shape
    count = num_schedules * batch * tokens * (1 if kind == "cosine" else channels)
    ctx.scale, ctx.dtype, ctx.backend = 1 / max(count, 1), outputs.dtype, backend


def _morph_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs[0], output[1], len(inputs[2]), inputs[5], inputs[-1])


def _dtm_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _setup(ctx, inputs[0], output[1], len(inputs[2]), inputs[6], inputs[-1])


def _backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:  # nobody asks for the loss's gradient
        return (None,) * len(ctx.needs_input_grad)
    if torch.is_grad_enabled():  # create_graph: what follows would silently lack the loss's second derivative
        raise RuntimeError("morph_loss and dtm_loss are differentiable once; backend='reference' has more derivatives")
    (slopes,) = ctx.saved_tensors
    grad_outputs = loss_backward(grad, slopes, ctx.scale, ctx.dtype, ctx.backend)
    return grad_outputs, *[None] * (len(ctx.needs_input_grad) - 1)


morph_loss.register_autograd(_backward, setup_context=_morph_loss_setup)
dtm_loss.register_autograd(_backward, setup_context=_dtm_loss_setup)


def _fake_loss(outputs: Tensor, kind: str, num_schedules: int, save: bool) -> tuple[Tensor, Tensor]:
    loss = outputs.new_empty((), dtype=torch.promote_types(outputs.dtype, torch.float32))
    dtype = slope_dtype(outputs.dtype, kind, num_schedules)
    return loss, outputs.new_empty(outputs.shape if save else (0,), dtype=dtype)
