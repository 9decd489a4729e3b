"""How many tokens each iteration of matching removes."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Generator


@dataclass(frozen=True)
class MorphSchedule:
    """Tokens to remove in each iteration of matching.

    removed: one count per iteration, each at least 0. A count above what an iteration can remove is capped
    there: with n groups left, p of them protected, at most (n - p) // 2 merge.

    Raises TypeError when a count is not an integer, ValueError when one is negative.
    Source: DTM, section 3.3 and Algorithm 1.

    >>> MorphSchedule((14, 14, 14)).num_groups(196)
    154
    """

    removed: tuple[int, ...]

    def __post_init__(self) -> None:
        if isinstance(self.removed, (str, bytes)) or not isinstance(self.removed, Iterable):
            raise TypeError(f"removed must be a sequence of integers, got {self.removed!r}")
        object.__setattr__(self, "removed", tuple(_count("removed", r) for r in self.removed))

    @classmethod
    def uniform(cls, total: int, iterations: int) -> MorphSchedule:
        """Remove `total` tokens in `iterations` steps as equal as possible, the larger ones first.

        Raises ValueError when `total` is negative or `iterations` is below 1.

        >>> MorphSchedule.uniform(100, 3)
        MorphSchedule(removed=(34, 33, 33))
        """
        total, iterations = _count("total", total), _count("iterations", iterations, least=1)
        share, rest = divmod(total, iterations)
        return cls((share + 1,) * rest + (share,) * (iterations - rest))

    @classmethod
    def sample(
        cls,
        num_tokens: int,
        max_removed: int,
        max_iterations: int,
        generator: Generator | None = None,
    ) -> MorphSchedule:
        """Draw a schedule as DTM does: m tokens to remove in k iterations, the same number r in each.

        m ~ U{0..limit} and k ~ U{1..max_iterations}, where limit = min(max_removed, num_tokens); r = ceil(m / k), or
        floor(m / k) where the former would remove more than the limit. `generator` is a CPU generator (PyTorch's
        default one when None); equal states draw equal schedules.

        Raises ValueError when num_tokens or max_iterations is below 1 or max_removed is negative.
        Source: DTM, section 3.3 (dynamic scheduling).

        >>> MorphSchedule.sample(196, 196, 14, torch.Generator().manual_seed(0)).num_groups(196) <= 196
        True
        """
        num_tokens = _count("num_tokens", num_tokens, least=1)
        max_removed = _count("max_removed", max_removed)
        max_iterations = _count("max_iterations", max_iterations, least=1)
        limit = min(max_removed, num_tokens)
        total = int(torch.randint(limit + 1, (), generator=generator))
        iterations = int(torch.randint(1, max_iterations + 1, (), generator=generator))
        removed = -(-total // iterations)
        if removed * iterations > limit:
            removed = total // iterations
        return cls((removed,) * iterations)

    def capped(self, num_tokens: int, num_protected: int = 0) -> tuple[int, ...]:
        """Tokens that each iteration really removes when matching starts from `num_tokens`.

        >>> MorphSchedule((98, 98, 98)).capped(196, num_protected=1)
        (97, 49, 24)
        """
        left, capped = num_tokens, []
        for count in self.removed:
            capped.append(max(0, min(count, (left - num_protected) // 2)))
            left -= capped[-1]
        return tuple(capped)

    def num_groups(self, num_tokens: int, num_protected: int = 0) -> int:
        """Groups that remain of `num_tokens` tokens: the same for every image, known without matching.

        >>> MorphSchedule((98, 98, 98)).num_groups(196, num_protected=1)
        26
        """
        return num_tokens - sum(self.capped(num_tokens, num_protected))


def _count(name: str, value: object, least: int = 0) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must hold integers, got {value!r}")
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must hold integers, got {value!r}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    return count
