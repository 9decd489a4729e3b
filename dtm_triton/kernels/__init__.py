"""Triton kernels and their launchers. This floor imports torch and triton only."""

from __future__ import annotations

from dtm_triton.kernels.availability import unavailable_reason

__all__ = ["unavailable_reason"]
