"""Masks from numbers: the same rows in any batch, exact counts, few fills, no wait for a device."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtm_triton.attention_masking import ORDER, attention_partition
from dtm_triton.masking import block_cover, block_rounds
from dtm_triton.train.config.attention import AttentionConfig
from dtm_triton.train.config.model import MaskConfig
from dtm_triton.train.data.draws import draw_images
from dtm_triton.train.data.masks import Masks

CASES = [
    (MaskConfig(kind="block", masked=75), (14, 14)),
    (MaskConfig(kind="block", masked=40, min_patches=4), (7, 16)),
    (MaskConfig(kind="block", masked=36, min_patches=4), (6, 6)),
    (MaskConfig(kind="random", masked=147), (14, 14)),
    (MaskConfig(kind="random", masked=0), (3, 5)),
    (MaskConfig(kind="random", masked=88, thrown=78), (14, 14)),
    (MaskConfig(kind="random", masked=16, thrown=8, unit=2), (4, 10)),
    (MaskConfig(kind="block", masked=75, thrown=50), (14, 14)),
    (MaskConfig(kind="attention", masked=147), (14, 14)),
]


def same(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize(("config", "grid"), CASES)
def test_any_part_of_a_batch_has_the_same_masks(config: MaskConfig, grid: tuple[int, int]) -> None:
    masks = pickle.loads(pickle.dumps(Masks(config, grid)))  # workers are sent one
    draws = draw_images(masks.draw, 3, "mask", 7, 0, 192)
    whole = masks({"mask": draws})
    assert [part.shape[1] for part in whole] == [config.masked, config.thrown, whole.visible.shape[1]]
    assert torch.equal(torch.cat(whole, 1).sort(1).values, torch.arange(grid[0] * grid[1]).expand(192, -1))
    for first, last in ((0, 1), (5, 64), (63, 65), (64, 192), (191, 192), (7, 7)):
        assert same(masks({"mask": draws[first:last]}), [part[first:last] for part in whole])
        part = draw_images(masks.draw, 3, "mask", 7, first, last - first) if last > first else draws[:0]
        assert torch.equal(part, draws[first:last])
    strided = torch.stack([draws, draws], -1)[..., 0]  # not contiguous
    assert same(masks({"mask": strided}), whole)


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
        draws = torch.zeros(4, dtype=torch.int64) if config.kind == "attention" else torch.rand(4, masks.numbers)
        assert masks.to("meta")({"mask": draws.to("meta")}).mask.shape == (4, grid[0] * grid[1])


def test_more_masks_than_patches() -> None:
    with pytest.raises(
        ValueError, match="mask.masked and mask.thrown must be at most 36 together, the patches, got 37"
    ):
        Masks(MaskConfig(kind="random", masked=30, thrown=7), (6, 6))


def test_every_setting_reaches_the_draw() -> None:
    """What the configuration says of masks that follow attention is what the library is asked for."""
    settings = {"temperature": 0.5, "uniform": 0.2, "order": ("thrown", "visible", "masked"), "unit": 2}
    config = MaskConfig(kind="attention", masked=16, thrown=8, **settings)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(64, 4, generator=generator, dtype=torch.float64).sort(1).values
    batch = {
        "mask": torch.arange(64),
        "map": torch.rand(64, 5, 3, generator=generator) ** 4,
        "place": corners[:, [0, 1, 2, 3]],
        "flip": torch.arange(64) % 2 == 0,
    }
    for crop in ("exact", "released"):
        maps = AttentionConfig(crop=crop)  # type: ignore[arg-type]
        found = Masks(config, (6, 8), maps)(batch)
        given = batch["map"], batch["place"], batch["mask"], (6, 8), 16, 8
        wanted = {"flip": batch["flip"], "crop": crop, **settings}
        assert same(found, attention_partition(*given, **wanted))
        for name, other in (("flip", None), ("temperature", 1.0), ("uniform", 0.0), ("order", ORDER)):
            assert not same(found, attention_partition(*given, **{**wanted, name: other})), name
