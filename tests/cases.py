"""Strategies: features of every awkward kind, and schedules for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from backends import DEVICE
from hypothesis import strategies as st
from torch import Tensor

KINDS = ("normal", "clusters", "duplicates", "zeros", "constant", "ties")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Case:
    """One call of match_tokens."""

    features: Tensor
    removed: list[int]
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def groups(self, backend: str, features: Tensor | None = None, removed: list[int] | None = None) -> Any:
        from dtm_triton import morph

        return morph.match_tokens(
            self.features if features is None else features,
            self.removed if removed is None else removed,
            **self.options,
            generator=torch.Generator().manual_seed(self.seed),
            backend=backend,
        )


def make_features(kind: str, batch: int, tokens: int, channels: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Features [B, N, C] of one kind; equal arguments give equal features."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, tokens, channels, generator=generator)
    if kind == "clusters":
        centres = torch.randn(batch, 4, channels, generator=generator)
        x = centres[:, torch.randint(4, (tokens,), generator=generator)] + 0.2 * x
    elif kind == "duplicates":
        x = x[:, torch.randint(max(1, tokens // 3), (tokens,), generator=generator)]
    elif kind == "zeros":
        x = x * (torch.rand(batch, tokens, 1, generator=generator) > 0.4)
    elif kind == "constant":
        x = torch.ones_like(x)
    elif kind == "ties":  # entries of -1 and 1: many equal similarities, all exact where C is a power of four
        x = x.sign() + (x == 0)
    return x.to(DEVICE, dtype)


@st.composite
def matching_cases(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, max_tokens: int = 40) -> Case:
    batch, tokens, channels = draw(st.integers(1, 3)), draw(st.integers(1, max_tokens)), draw(st.integers(1, 40))
    features = make_features(
        draw(st.sampled_from(kinds)),
        batch,
        tokens,
        channels,
        draw(st.integers(0, 2**16)),
        draw(st.sampled_from(DTYPES)),
    )
    most = max(2, tokens // 2)
    merging = st.lists(st.integers(1, most), min_size=1, max_size=4)
    removed = draw(st.one_of(merging, merging, merging, st.lists(st.integers(0, most), max_size=4)))
    options = dict(
        threshold=draw(st.sampled_from([None, None, None, -9.0, -0.1, 0.05, 0.3, 0.99, 2.0])),
        num_protected=draw(st.integers(0, 1)),
        split=draw(st.sampled_from(["alternating", "random"])),
        keep_order=draw(st.sampled_from([None, True, False])),
    )
    return Case(features, removed, options, seed=draw(st.integers(0, 2**31)))
