"""Many names in little memory: no Python object for each, so that millions cost their bytes and workers share them."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import numpy as np


class Names:
    """Byte strings, one after the other in one array; a name may hold any bytes.

    >>> names = Names([b"a.jpg", b"", "é".encode()])
    >>> len(names), names[0], names[1], names.text(2)
    (3, b'a.jpg', b'', 'é')
    """

    def __init__(self, names: Iterable[bytes]) -> None:
        joined, ends = bytearray(), array("q")
        for name in names:
            joined += name
            ends.append(len(joined))
        self.joined = np.frombuffer(bytes(joined), dtype=np.uint8)
        self.ends = np.array(ends, dtype=np.int64)

    @classmethod
    def of(cls, joined: np.ndarray, ends: np.ndarray) -> Names:
        """Names whose two arrays are known already."""
        names = cls.__new__(cls)
        names.joined, names.ends = joined, ends
        return names

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> bytes:
        start = int(self.ends[number - 1]) if number else 0
        return self.joined[start : int(self.ends[number])].tobytes()

    def text(self, number: int) -> str:
        """A name to be shown; what is not UTF-8 becomes escapes."""
        return self[number].decode("utf-8", "backslashreplace")
