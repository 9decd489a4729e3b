"""The operations as PyTorch sees them: custom ops over the portable and the Triton implementation, with fake tensors
and autograd. (The reference needs none of this: it is plain PyTorch.)

No shape depends on how many groups a schedule leaves, so a compiled loss is not compiled again when its schedule
changes: schedules enter as a tensor `removed` [L, K], sizes leave padded with zeros to N columns. `removed` and `seed`
may lie on the CPU or beside the features, where the kernels read them without waiting for the host.
L schedules, K iterations, B images, N tokens, G groups, C and D channels.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dtm_triton import portable
from dtm_triton.rows import at_least_float32


def _kernels(backend: str, *tensors: Tensor) -> ModuleType | None:
    """The Triton launchers when they are asked for and can compute these tensors exactly enough."""
    if backend != "triton" or any(t.dtype == torch.float64 or t.numel() == 0 for t in tensors):
        return None
    from dtm_triton.kernels import launch

    return launch


@custom_op("dtm_triton::match", mutates_args=())
def match(
    features: Tensor,
    removed: Tensor,
    seed: Tensor,
    num_protected: int,
    random_split: bool,
    keep_order: bool,
    threshold: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """features [B, N, C] -> index, size (padded with zeros) and members, int32 [L, B, N]."""
    options: dict[str, Any] = dict(
        num_protected=num_protected, random_split=random_split, keep_order=keep_order, threshold=threshold
    )
    if kernels := _kernels(backend, features, removed):
        return kernels.match(features, removed, seed, **options)[:3]
    return portable.match(features, removed, int(seed), **options)


@match.register_fake
def _(features: Tensor, removed: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (removed.shape[0], features.shape[0], features.shape[1])
    empty = features.new_empty(shape, dtype=torch.int32)
    return empty, torch.empty_like(empty), torch.empty_like(empty)


@custom_op("dtm_triton::match_merge", mutates_args=())
def match_merge(
    features: Tensor,
    removed: Tensor,
    seed: Tensor,
    num_groups: int,
    num_protected: int,
    random_split: bool,
    keep_order: bool,
    threshold: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One schedule and the mean feature of every group: merged [B, G, C], index [1, B, N], size [1, B, N]."""
    if kernels := _kernels(backend, features, removed):
        index, size, _, merged = kernels.match(
            features,
            removed,
            seed,
            num_protected=num_protected,
            random_split=random_split,
            keep_order=keep_order,
            threshold=threshold,
            merge_rows=num_groups,
        )
        return merged, index, size
    index, size, _ = match(features, removed, seed, num_protected, random_split, keep_order, threshold, backend)
    return merge(features, index[0], size[0, :, :num_groups].contiguous(), "mean", backend), index, size


@match_merge.register_fake
def _(features: Tensor, removed: Tensor, seed: Tensor, num_groups: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, channels = features.shape
    index = features.new_empty((removed.shape[0], batch, tokens), dtype=torch.int32)
    return features.new_empty((batch, num_groups, channels)), index, torch.empty_like(index)


def _match_merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    merged, index, size = output
    ctx.save_for_backward(index, size)
    ctx.num_groups, ctx.backend = merged.shape[1], inputs[-1]
    ctx.set_materialize_grads(False)  # else zeros are made for the outputs that have none
    ctx.mark_non_differentiable(index, size)


def _match_merge_backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    index, size = ctx.saved_tensors
    share = grad / size[0, :, : ctx.num_groups, None].clamp(min=1)
    return unmerge(share, index[0], ctx.backend), *[None] * 8


match_merge.register_autograd(_match_merge_backward, setup_context=_match_merge_setup)


@custom_op("dtm_triton::merge", mutates_args=())
def merge(x: Tensor, index: Tensor, size: Tensor, mode: str, backend: str) -> Tensor:
    """[B, N, D] -> [B, G, D]: the mean, sum or maximum of every group."""
    if kernels := _kernels(backend, x, size):
        return kernels.merge(x, kernels.group_members(index, size.shape[1]), size, mode)
    return portable.merge(x, index, size, mode)


@merge.register_fake
def _(x: Tensor, index: Tensor, size: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], size.shape[1], x.shape[2]))


def _merge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, size, ctx.mode, ctx.backend = inputs
    ctx.save_for_backward(index, size, *((x, output) if ctx.mode == "amax" else ()))


def _merge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, size, *values = ctx.saved_tensors
    if ctx.mode == "mean":
        grad = grad / size[:, :, None].clamp(min=1)
    if ctx.mode != "amax":
        return unmerge(grad, index, ctx.backend), None, None, None, None
    x, largest = values[0], unmerge(values[1], index, ctx.backend)
    chosen = (x == largest) | (x.isnan() & largest.isnan())  # tokens that tie share the gradient
    ties = merge(chosen.to(x.dtype), index, size, "sum", ctx.backend).clamp(min=1)
    return unmerge(grad / ties, index, ctx.backend) * chosen, None, None, None, None


merge.register_autograd(_merge_backward, setup_context=_merge_setup)


@custom_op("dtm_triton::weighted_merge", mutates_args=())
def weighted_merge(x: Tensor, weight: Tensor, index: Tensor, size: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """x [B, N, D], weight [B, N, 1] -> the weighted mean [B, G, D] and the total weight [B, G, 1] of every group."""
    if kernels := _kernels(backend, x, weight, size):
        return kernels.weighted_merge(x, weight, kernels.group_members(index, size.shape[1]), size)
    return portable.weighted_merge(x, weight, index, size)


@weighted_merge.register_fake
def _(x: Tensor, weight: Tensor, index: Tensor, size: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty((*size.shape, x.shape[2])), weight.new_empty((*size.shape, 1))


def _weighted_merge_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, index, size, ctx.backend = inputs
    ctx.save_for_backward(x, weight, index, size, output[0])
    ctx.set_materialize_grads(False)
    if not ctx.needs_input_grad[1]:
        ctx.mark_non_differentiable(output[1])


def _weighted_merge_backward(ctx: Any, grad: Tensor | None, grad_total: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, index, size, merged = ctx.saved_tensors
    of_x = of_weight = None
    if grad is not None:  # in float32 to the end: half precision would lose small gradients, and large totals
        wide = at_least_float32(weight)
        total = merge(wide, index, size, "sum", ctx.backend)
        share = torch.where(total == 0, 0.0, at_least_float32(grad) / total.where(total != 0, 1.0))
        share = unmerge(share, index, ctx.backend)
        of_x = (share * wide).to(x.dtype)
        if ctx.needs_input_grad[1]:
            distance = at_least_float32(x) - at_least_float32(unmerge(merged, index, ctx.backend))
            of_weight = (share * distance).sum(2, keepdim=True).to(weight.dtype)
    if grad_total is not None:
        of_total = unmerge(grad_total, index, ctx.backend)
        of_weight = of_total if of_weight is None else of_weight + of_total
    return of_x, of_weight, None, None, None


weighted_merge.register_autograd(_weighted_merge_backward, setup_context=_weighted_merge_setup)


@custom_op("dtm_triton::unmerge", mutates_args=())
def unmerge(merged: Tensor, index: Tensor, backend: str) -> Tensor:
    """[B, G, D] -> [B, N, D]: every token takes what its group holds."""
    if kernels := _kernels(backend, merged, index):
        return kernels.unmerge(merged, index)
    return portable.unmerge(merged, index)


@unmerge.register_fake
def _(merged: Tensor, index: Tensor, *_: Any) -> Tensor:
    return merged.new_empty((merged.shape[0], index.shape[1], merged.shape[2]))


def _unmerge_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    merged, index, ctx.backend = inputs
    ctx.save_for_backward(index)
    ctx.num_groups = merged.shape[1]


def _unmerge_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    return merge(grad, index, group_sizes(index, ctx.num_groups), "sum", ctx.backend), None, None


unmerge.register_autograd(_unmerge_backward, setup_context=_unmerge_setup)


@custom_op("dtm_triton::morph", mutates_args=())
def morph(x: Tensor, index: Tensor, size: Tensor, backend: str) -> Tensor:
    """[B, N, D] -> [B, N, D]: every token becomes its group's mean."""
    if kernels := _kernels(backend, x, size):
        return kernels.morph(x, kernels.group_members(index, size.shape[1]), size)
    return portable.morph(x, index, size)


@morph.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _morph_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, size, ctx.backend = inputs
    ctx.save_for_backward(index, size)


def _morph_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    index, size = ctx.saved_tensors
    return morph(grad, index, size, ctx.backend), None, None, None  # morphing is self-adjoint


morph.register_autograd(_morph_backward, setup_context=_morph_setup)


def group_sizes(index: Tensor, num_groups: int) -> Tensor:
    """Tokens of every group, int32 [B, G], counted from index [B, N].

    >>> group_sizes(torch.tensor([[0, 0, 1]]), 2).tolist()
    [[2, 1]]
    """
    size = index.new_zeros((index.shape[0], num_groups), dtype=torch.int32)
    return size.scatter_add(1, index.long(), torch.ones_like(index, dtype=torch.int32))
