"""Masks from numbers: the same rows in any batch, exact counts, few fills, no wait for a device."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtm_triton.masking import block_cover, block_rounds
from dtm_triton.train.config.model import MaskConfig
from dtm_triton.train.data.draws import draw_images
from dtm_triton.train.data.masks import Masks

CASES = [
    (MaskConfig(kind="block", masked=75), (14, 14)),
    (MaskConfig(kind="block", masked=40, min_patches=4), (7, 16)),
    (MaskConfig(kind="block", masked=36, min_patches=4), (6, 6)),
    (MaskConfig(kind="random", masked=147), (14, 14)),
    (MaskConfig(kind="random", masked=0), (3, 5)),
]


@pytest.mark.parametrize(("config", "grid"), CASES)
def test_any_part_of_a_batch_has_the_same_masks(config: MaskConfig, grid: tuple[int, int]) -> None:
    masks = pickle.loads(pickle.dumps(Masks(config, grid)))  # workers are sent one
    draws = draw_images(masks.draw, 3, "mask", 7, 0, 192)
    whole = masks(draws)
    assert whole.shape == (192, grid[0] * grid[1]) and whole.dtype == torch.bool
    assert whole.sum(1).tolist() == [config.masked] * 192
    for first, last in ((0, 1), (5, 64), (63, 65), (64, 192), (191, 192), (7, 7)):
        assert torch.equal(masks(draws[first:last]), whole[first:last])
        part = draw_images(masks.draw, 3, "mask", 7, first, last - first) if last > first else draws[:0]
        assert torch.equal(part, draws[first:last])
    strided = torch.stack([draws, draws], 2)[:, :, 0]  # not contiguous
    assert torch.equal(masks(strided), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_only_read(dtype: torch.dtype) -> None:
    draws = torch.rand(3, 5 * 13 + 196, dtype=dtype, generator=torch.Generator().manual_seed(5))
    before = draws.clone()
    masks = block_cover(draws, (14, 14), 75)
    assert torch.equal(draws, before) and torch.equal(block_cover(draws, (14, 14), 75), masks)
    assert torch.equal(block_cover(draws.T.contiguous().T, (14, 14), 75), masks)


def test_all_rounds_give_what_the_early_exit_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes: every round, whether or not anything is missing."""
    config, grid = CASES[0]
    draws = Masks(config, grid).draw(300, generator=torch.Generator().manual_seed(1))
    early = block_cover(draws, grid, 75)
    monkeypatch.setattr(torch.Tensor, "any", lambda *_: torch.tensor(True))
    assert torch.equal(block_cover(draws, grid, 75), early)


@pytest.mark.parametrize(("grid", "masked", "least"), [((14, 14), 75, 16), ((14, 14), 118, 4)])
def test_few_images_need_the_fill(grid: tuple[int, int], masked: int, least: int) -> None:
    patches = grid[0] * grid[1]
    rounds = block_rounds(patches, masked, least)
    draws = torch.rand(5_000, 5 * rounds + patches, generator=torch.Generator().manual_seed(2))
    other = draws.clone()
    other[:, 5 * rounds :] = 1 - draws[:, 5 * rounds :]  # only a fill looks at these
    filled = block_cover(draws, grid, masked, min_patches=least) != block_cover(other, grid, masked, min_patches=least)
    assert int(filled.any(1).sum()) <= 2


@pytest.mark.parametrize(("config", "grid"), CASES)
def test_no_step_waits_for_the_device(config: MaskConfig, grid: tuple[int, int]) -> None:
    """Tensors without values cannot be waited for: any such question raises."""

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert "local_scalar_dense" not in str(op) and "nonzero" not in str(op)
            return op(*args, **(kwargs or {}))

    masks = Masks(config, grid)
    with Refuse():
        assert masks(torch.rand(4, masks.numbers, device="meta")).shape == (4, grid[0] * grid[1])


def test_more_masks_than_patches() -> None:
    with pytest.raises(ValueError, match="mask.masked must be at most 36, the patches, got 37"):
        Masks(MaskConfig(kind="random", masked=37), (6, 6))
