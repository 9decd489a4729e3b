"""TokenGroups: which group every token belongs to, and merging, unmerging and morphing by it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dtm_triton import ops, reference
from dtm_triton.backend import choose_backend

MergeMode = Literal["mean", "sum", "amax"]
MERGE_MODES = ("mean", "sum", "amax")


class TokenGroups(NamedTuple):
    """A partition of the tokens of every image into groups.

    index: int32 [B, N], the group of every token. size: int32 [B, G], the tokens in every group; where images differ in
    groups (matching with a threshold) zeros fill up the rows, and `count` tells how many groups each image has. A size
    of 0 before another group is refused on the CPU; on a GPU, where nothing is checked, groups behind it are lost.

    >>> groups = TokenGroups(torch.tensor([[0, 1, 0], [0, 1, 2]]).int(), torch.tensor([[2, 1, 0], [1, 1, 1]]).int())
    >>> groups.num_tokens, groups.num_groups, groups.count.tolist()
    (3, 3, [2, 3])
    """

    index: Tensor  # type: ignore[assignment]  # a tuple has a method of that name
    size: Tensor

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.index.shape[1]

    @property
    def num_groups(self) -> int:
        """G, at least the groups of every image: what merging gives rows for."""
        return self.size.shape[1]

    @property
    def count(self) -> Tensor:  # type: ignore[override]  # a tuple has a method of that name
        """The groups of every image, int32 [B]; G for all unless a threshold decided."""
        return (self.size > 0).sum(1, dtype=torch.int32)

    def source(self) -> Tensor:
        """The dense 0/1 matrix, bool [B, G, N]: which token is in which group.

        >>> TokenGroups(torch.tensor([[0, 1, 0]]).int(), torch.tensor([[2, 1]]).int()).source().int().tolist()
        [[[1, 0, 1], [0, 1, 0]]]
        """
        return self.index[:, None, :] == torch.arange(self.num_groups, device=self.index.device)[:, None]


torch.serialization.add_safe_globals([TokenGroups])  # so that torch.load(weights_only=True) takes what torch.save wrote


def merge_tokens(x: Tensor, groups: TokenGroups, mode: MergeMode = "mean", *, backend: str | None = None) -> Tensor:
    """One token per group: the mean, sum or maximum of its members.

    x [B, N, D], floating point, any strides -> [B, G, D] in x's dtype, accumulated in float32 (float64 for float64).
    Rows past an image's last group are 0.
    Differentiable in reverse mode; members that tie for the maximum share its gradient.
    Raises ValueError for an unknown mode or groups of another shape or device, TypeError for a wrong type.
    Source: ToMe, section 3.2; DTM, equation 3.

    >>> groups = TokenGroups(torch.tensor([[0, 1, 0]]).int(), torch.tensor([[2, 1]]).int())
    >>> merge_tokens(torch.tensor([[[1.], [5.], [3.]]]), groups).tolist()
    [[[2.0], [5.0]]]
    """
    if mode not in MERGE_MODES:
        raise ValueError(f"mode must be one of {MERGE_MODES}, got {mode!r}")
    check_tokens("x", x)
    check_groups(groups, "x", x, groups_of_tokens=True)
    if (backend := choose_backend(backend, x.device)) == "reference":
        return reference.merge(x, *groups, mode)
    return ops.merge(x, *groups, mode, backend)


def weighted_merge_tokens(
    x: Tensor, weight: Tensor, groups: TokenGroups, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """One token per group, its members' weighted mean, and the total weight of every group, in one pass over x.

    x [B, N, D] and weight [B, N, 1], floating point, any strides -> [B, G, D] in x's dtype and [B, G, 1] in weight's,
    accumulated in float32 (float64 for float64). The mean is 0, and so is its gradient, where the weights add up to 0.
    Differentiable in reverse mode. Raises as `merge_tokens` does. Source: ToMe, section 3.3.

    >>> groups = TokenGroups(torch.tensor([[0, 1, 0]]).int(), torch.tensor([[2, 1]]).int())
    >>> x, weight = torch.tensor([[[1.], [5.], [3.]]]), torch.tensor([[[3.], [2.], [1.]]])
    >>> [part.tolist() for part in weighted_merge_tokens(x, weight, groups)]
    [[[[1.5], [5.0]]], [[[4.0], [2.0]]]]
    """
    check_tokens("x", x)
    check_tokens("weight", weight)
    if weight.shape != (*x.shape[:2], 1) or weight.device != x.device:
        wanted = f"[{x.shape[0]}, {x.shape[1]}, 1] on {x.device}"
        raise ValueError(f"weight must be {wanted} like x, got {list(weight.shape)} on {weight.device}")
    check_groups(groups, "x", x, groups_of_tokens=True)
    if (backend := choose_backend(backend, x.device)) == "reference":
        return reference.weighted_merge(x, weight, *groups)
    return ops.weighted_merge(x, weight, *groups, backend)


def unmerge_tokens(merged: Tensor, groups: TokenGroups, *, backend: str | None = None) -> Tensor:
    """Give every token what its group holds, in the original token order.

    merged [B, G, D], floating point -> [B, N, D]. Differentiable in reverse mode. Raises as `merge_tokens` does.
    Source: ToMe, section 3.4 (unmerging).

    >>> groups = TokenGroups(torch.tensor([[0, 1, 0]]).int(), torch.tensor([[2, 1]]).int())
    >>> unmerge_tokens(torch.tensor([[[2.], [5.]]]), groups).tolist()
    [[[2.0], [5.0], [2.0]]]
    """
    check_tokens("merged", merged)
    check_groups(groups, "merged", merged, groups_of_tokens=False)
    if (backend := choose_backend(backend, merged.device)) == "reference":
        return reference.unmerge(merged, groups.index)
    return ops.unmerge(merged, groups.index, backend)


def morph_tokens(x: Tensor, groups: TokenGroups, *, backend: str | None = None) -> Tensor:
    """Replace every token by the mean of its group: a symmetric projection.

    x [B, N, D], floating point -> [B, N, D]. Differentiable in reverse mode. Raises as `merge_tokens` does.
    Source: DTM, equation 3.

    >>> groups = TokenGroups(torch.tensor([[0, 1, 0]]).int(), torch.tensor([[2, 1]]).int())
    >>> morph_tokens(torch.tensor([[[1.], [5.], [3.]]]), groups).tolist()
    [[[2.0], [5.0], [2.0]]]
    """
    check_tokens("x", x)
    check_groups(groups, "x", x, groups_of_tokens=True)
    if (backend := choose_backend(backend, x.device)) == "reference":
        return reference.morph(x, *groups)
    return ops.morph(x, *groups, backend)


def check_tokens(name: str, x: object) -> None:
    """Raise unless x is a floating-point tensor of three dimensions.

    >>> check_tokens("x", torch.ones(2, 3))
    Traceback (most recent call last):
    ValueError: x must have shape [B, N, C], got [2, 3]
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}: {x!r:.80}")
    if x.ndim != 3:
        raise ValueError(f"{name} must have shape [B, N, C], got {list(x.shape)}")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {x.layout}")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def check_groups(groups: object, name: str, x: Tensor, *, groups_of_tokens: bool) -> None:
    """Raise unless `groups` fits x: [B, N, D] when groups_of_tokens, else [B, G, D].

    Values are checked on the CPU only: on a GPU that would wait for it, and the kernels ignore indices out of range.

    >>> groups = TokenGroups(torch.zeros(1, 3).int(), torch.tensor([[3]]).int())
    >>> check_groups(groups, "x", torch.ones(1, 4, 2), groups_of_tokens=True)
    Traceback (most recent call last):
    ValueError: groups of 1 x 3 tokens do not belong to x of shape [1, 4, 2]
    """
    if not (isinstance(groups, TokenGroups) and all(isinstance(part, Tensor) for part in groups)):
        raise TypeError(f"groups must be TokenGroups, got {type(groups).__name__}: {groups!r:.80}")
    index, size = groups
    for part, tensor in (("index", index), ("size", size)):
        if tensor.dtype != torch.int32:
            raise TypeError(f"groups.{part} must be int32, got {tensor.dtype}")
        if tensor.ndim != 2 or tensor.shape[0] != index.shape[0]:
            shapes = f"{list(index.shape)} and {list(size.shape)}"
            raise ValueError(f"groups.index and groups.size must be [B, N] and [B, G], got {shapes}")
        if tensor.device != x.device:
            raise ValueError(f"groups.{part} is on {tensor.device} but {name} is on {x.device}")
    kind, count = ("tokens", index.shape[1]) if groups_of_tokens else ("groups", size.shape[1])
    if x.shape[:2] != (index.shape[0], count):
        held = f"{index.shape[0]} x {count} {kind}"
        raise ValueError(f"groups of {held} do not belong to {name} of shape {list(x.shape)}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel():
        low, high = (int(bound) for bound in index.aminmax())
        if low < 0 or high >= size.shape[1]:
            raise ValueError(f"groups.index must lie in 0..{size.shape[1] - 1}, got {low}..{high}")
        if not torch.equal(ops.group_sizes(index, size.shape[1]), size):
            raise ValueError("groups.size must count the tokens of every group in groups.index")
        empty = size == 0
        if (empty[:, :-1] & ~empty[:, 1:]).any():
            raise ValueError("groups.size must be 0 behind the last group only, got one before a group with tokens")
