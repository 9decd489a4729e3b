"""What the portable implementation allocates: a small multiple of the Gram matrices, never a copy per iteration."""

from __future__ import annotations

import pytest
import torch

from dtm_triton import morph, portable
from dtm_triton.measure import timing

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts CPU allocations")


def peak_bytes(features: torch.Tensor, removed: list[int]) -> int:
    """Peak of the memory PyTorch holds above what it held before the call."""
    return timing.peak_bytes(lambda: morph.match_tokens(features, removed, backend="portable"), features.device)


def test_matching_stays_far_below_100_mb() -> None:
    features = torch.randn(16, 196, 512)
    gram = 4 * 16 * 196**2
    assert gram <= peak_bytes(features, [14] * 14) < 3 * gram


def test_chunks_do_not_change_random_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(7, 20, 5)
    generator = torch.Generator().manual_seed(1)
    whole = morph.match_tokens(features, [5, 4], split="random", generator=generator, backend="portable")
    monkeypatch.setattr(portable, "GRAM_BYTES", 3 * 4 * 20**2)
    generator = torch.Generator().manual_seed(1)
    parts = morph.match_tokens(features, [5, 4], split="random", generator=generator, backend="portable")
    assert parts.index.equal(whole.index)


def test_a_large_batch_is_taken_in_chunks() -> None:
    """Twice the images need twice the groups, but no more Gram matrices than one chunk."""
    small, large = (peak_bytes(torch.randn(batch, 196, 8), [14]) for batch in (600, 1200))
    assert large - small < 0.1 * small
