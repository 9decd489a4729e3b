"""How a configuration refuses a value."""

from __future__ import annotations


def check(name: str, value: object, fine: bool, wanted: str) -> None:
    """Raise ValueError with the field's name and value unless it is fine.

    >>> check("run.epochs", 0, False, "positive")
    Traceback (most recent call last):
    ValueError: run.epochs must be positive, got 0
    """
    if not fine:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
