"""How many tokens each iteration of matching removes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Generator

MOST_ITERATIONS = 2**20
"""A schedule enters the ops as a tensor that has a column for each."""


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
        removed = self.removed.tolist() if hasattr(self.removed, "tolist") else self.removed  # a tensor or an array
        if isinstance(removed, (str, bytes)) or not isinstance(removed, Sequence):
            raise TypeError(f"removed must be a sequence of integers, got {removed!r:.80}")
        object.__setattr__(self, "removed", tuple(as_count("every count in removed", count) for count in removed))

    @classmethod
    def uniform(cls, total: int, iterations: int) -> MorphSchedule:
        """Remove `total` tokens in `iterations` steps as equal as possible, the larger ones first.

        Raises ValueError when `total` is negative or `iterations` is below 1.

        >>> MorphSchedule.uniform(100, 3)
        MorphSchedule(removed=(34, 33, 33))
        """
        total, iterations = as_count("total", total), as_count("iterations", iterations, least=1)
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
        num_tokens = as_count("num_tokens", num_tokens, least=1)
        max_removed = as_count("max_removed", max_removed)
        max_iterations = as_count("max_iterations", max_iterations, least=1, most=MOST_ITERATIONS)
        limit = min(max_removed, num_tokens)
        total = int(torch.randint(limit + 1, (), generator=generator, device="cpu"))
        iterations = int(torch.randint(1, max_iterations + 1, (), generator=generator, device="cpu"))
        removed = -(-total // iterations)
        if removed * iterations > limit:
            removed = total // iterations
        return cls((removed,) * iterations)

    def capped(self, num_tokens: int, num_protected: int = 0) -> tuple[int, ...]:
        """Tokens that each iteration really removes when matching starts from `num_tokens`.

        >>> MorphSchedule((98, 98, 98)).capped(196, num_protected=1)
        (97, 49, 24)
        """
        left, capped = as_count("num_tokens", num_tokens), []
        num_protected = as_count("num_protected", num_protected)
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


def as_count(name: str, value: object, least: int = 0, most: int | None = None) -> int:
    """The integer that `value` is (NumPy's too), within bounds.

    >>> as_count("r", 2.5)
    Traceback (most recent call last):
    TypeError: r must be an integer, got 2.5
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {count}")
    if most is not None and count > most:
        raise ValueError(f"{name} must be at most {most}, got {count}")
    return count
