"""Images that could not be read: counted, named, and too many of them stop the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from dtm_triton.train.engine.checkpoint import FolderError

LEAST = 10
"""So many are always let pass, however small the dataset."""
NAMED = 5
"""So many are named in one line."""


class SkippedImages:
    """The numbers of the images that were found unreadable so far.

    Args:
        name: names an image by its number.
        total: images of the dataset.
        share: of them that may be unreadable.

    >>> import torch
    >>> skipped = SkippedImages(lambda number: f"{number}.jpg", total=1000, share=0.01)
    >>> skipped.note(torch.tensor([-1, 7, -1]))
    >>> skipped.tell({7, 9}), skipped.tell({7})
    ('2 images cannot be read and were replaced: 7.jpg, 9.jpg', None)
    """

    def __init__(self, name: Callable[[int], str], total: int, share: float) -> None:
        self.name, self.total = name, total
        self.limit = max(int(share * total), LEAST)
        self.known: set[int] = set()
        self.fresh: set[int] = set()

    def note(self, skipped: Tensor) -> None:
        """Take in a batch's "skipped" int64 [b], on the CPU: -1 where an image was read."""
        self.fresh.update(number for number in skipped.tolist() if number >= 0)
        self.fresh -= self.known

    def tell(self, found: Iterable[int]) -> str | None:
        """Take in what all processes found; a line for people where something is new.

        Raises FolderError when there are too many.
        """
        new = sorted(set(found) - self.known)
        self.known.update(new)
        self.fresh = set()
        if not new:
            return None
        names = ", ".join(self.name(number) for number in new[:NAMED]) + (", ..." if len(new) > NAMED else "")
        if len(self.known) > self.limit:
            raise FolderError(
                f"{len(self.known)} of {self.total} images cannot be read, more than the {self.limit} that "
                f"data.max_corrupt allows; the last found: {names}"
            )
        plural = "s" if len(new) > 1 else ""
        return f"{len(new)} image{plural} cannot be read and {'were' if plural else 'was'} replaced: {names}"
