"""Which patches of an image a student sees, must predict, and never meets.

A strategy of masking divides the N patches of every image into masked, thrown and visible ones, so many of each.
Shapes: B images, N patches in raster order, M masked, T thrown, V visible, M + T + V = N; kept are K = M + V.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor


class Partition(NamedTuple):
    """Indices of every image's patches, each list in raster order.

    >>> masked, thrown = torch.tensor([[True, False, False, True], [False, True, False, False]])[:, None]
    >>> parts = Partition.of(masked, thrown, num_masked=2, num_thrown=1)
    >>> [part.tolist() for part in parts], parts.kept.tolist(), parts.mask.tolist()
    ([[[0, 3]], [[1]], [[2]]], [[0, 2, 3]], [[True, False, False, True]])
    """

    masked: Tensor
    """int64 [B, M]: the student predicts them."""
    thrown: Tensor
    """int64 [B, T]: nobody sees or predicts them."""
    visible: Tensor
    """int64 [B, V]: the student sees them."""

    @classmethod
    def of(cls, masked: Tensor, thrown: Tensor | None, num_masked: int, num_thrown: int = 0) -> Partition:
        """From bool [B, N] with `num_masked` and `num_thrown` True in every row, none twice; None: nothing is thrown.

        The counts are given so that no GPU is waited for.
        """
        state = masked.to(torch.int8)
        if thrown is not None:
            state = state + 2 * thrown.to(torch.int8)
        # stable: raster order within visible (0), masked (1), thrown (2)
        order = state.argsort(dim=1, stable=True)
        visible = masked.shape[1] - num_masked - num_thrown
        parts = order.split([visible, num_masked, num_thrown], dim=1)
        return cls(masked=parts[1], thrown=parts[2], visible=parts[0])

    @property
    def patches(self) -> int:
        """N."""
        return sum(part.shape[1] for part in self)

    @property
    def kept(self) -> Tensor:
        """Masked and visible patches, int64 [B, K]."""
        return torch.cat([self.masked, self.visible], dim=1).sort(dim=1).values

    @property
    def mask(self) -> Tensor:
        """bool [B, N], True = masked."""
        return self._marked(self.masked)

    @property
    def thrown_mask(self) -> Tensor:
        """bool [B, N], True = thrown."""
        return self._marked(self.thrown)

    @property
    def masked_among_kept(self) -> Tensor:
        """Where the masked patches lie in `kept`, int64 [B, M]."""
        return self._before(self.masked)

    @property
    def visible_among_kept(self) -> Tensor:
        """Where the visible patches lie in `kept`, int64 [B, V]."""
        return self._before(self.visible)

    def _marked(self, places: Tensor) -> Tensor:
        blank = torch.zeros(len(places), self.patches, dtype=torch.bool, device=places.device)
        return blank.scatter(1, places, True)

    def _before(self, places: Tensor) -> Tensor:
        """`places` [B, P] less the thrown patches in front of each."""
        if not self.thrown.shape[1]:
            return places
        return places - torch.searchsorted(self.thrown.contiguous(), places.contiguous())


def count_patches(patches: int, share: float) -> int:
    """floor(patches * share), of the decimal number that a person wrote: 0.29 of 100 are 29.

    Raises ValueError for a share outside 0..1.

    >>> count_patches(196, 0.45), count_patches(196, 0.40), count_patches(100, 0.29)
    (88, 78, 29)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in 0..1, got {share!r}")
    return int(patches * Fraction(str(share)))


def grid_of_units(grid: tuple[int, int], unit: int, num_masked: int = 0, num_thrown: int = 0) -> tuple[int, int]:
    """Rows and columns of units of `unit` x `unit` patches in a `grid` (height, width) of patches.

    Raises ValueError when they do not fill the grid, or when a count of patches is out of range or not of whole units.

    >>> grid_of_units((14, 14), 2, num_masked=88, num_thrown=52)
    (7, 7)
    """
    if len(grid) != 2 or not all(isinstance(side, int) and side > 0 for side in grid):
        raise ValueError(f"grid must be (height, width), two positive integers, got {grid!r}")
    if unit < 1 or grid[0] % unit or grid[1] % unit:
        raise ValueError(f"unit must divide the sides of the grid {grid!r}, got {unit!r}")
    patches = grid[0] * grid[1]
    for name, count in (("num_masked", num_masked), ("num_thrown", num_thrown)):
        if not isinstance(count, int):
            raise TypeError(f"{name} must be an integer, got {count!r}")
        if not 0 <= count <= patches:
            raise ValueError(f"{name} must be between 0 and {patches}, the patches of the grid, got {count!r}")
        if count % unit**2:
            raise ValueError(f"{name} must be a multiple of {unit**2}, the patches of a unit, got {count!r}")
    if num_masked + num_thrown > patches:
        raise ValueError(f"num_thrown must be at most {patches - num_masked}, what is not masked, got {num_thrown!r}")
    return grid[0] // unit, grid[1] // unit


def patches_of_units(chosen: Tensor, grid: tuple[int, int], unit: int) -> Tensor:
    """What is so of units [B, U], of their patches [B, N] in a `grid` of patches.

    >>> patches_of_units(torch.tensor([[5, 7]]), (2, 4), 2).tolist()
    [[5, 5, 7, 7, 5, 5, 7, 7]]
    """
    if unit == 1:
        return chosen
    units = chosen.view(-1, grid[0] // unit, 1, grid[1] // unit, 1)
    return units.expand(-1, -1, unit, -1, unit).reshape(-1, grid[0] * grid[1])
