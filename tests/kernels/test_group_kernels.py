"""Sorting tokens by group, merging, unmerging and morphing, in guarded memory."""

from __future__ import annotations

import pytest
import torch
from backends import DEVICE
from torch import Tensor

from dtm_triton import reference
from dtm_triton.kernels import launch, settings

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}

over_tiles = pytest.mark.parametrize("backend", ["triton", "triton-small"], indirect=True)
over_dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
pytestmark = pytest.mark.usefixtures("guard")


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


def partition(batch: int, tokens: int, groups: int) -> tuple[Tensor, Tensor]:
    """A random index [B, N] that uses every group, and the sizes [B, G]."""
    generator = torch.Generator().manual_seed(tokens + groups)
    extra = torch.randint(groups, (batch, tokens - groups), generator=generator)
    index = torch.cat([torch.arange(groups).expand(batch, -1), extra // 2], 1)
    index = torch.stack([row[torch.randperm(tokens, generator=generator)] for row in index]).int().to(DEVICE)
    size = torch.stack([row.bincount(minlength=groups) for row in index]).int()
    return index, size


@over_tiles
@pytest.mark.parametrize(("tokens", "groups"), [(1, 1), (7, 7), (37, 9), (40, 1)])
def test_members_are_sorted_by_group(tokens: int, groups: int, backend: str) -> None:
    index, _ = partition(3, tokens, groups)
    wanted = index.sort(dim=1, stable=True).indices.int()
    assert torch.equal(launch.group_members(index, groups), wanted)
    assert torch.equal(launch.group_members(index.expand(3, -1).T.contiguous().T, groups), wanted)


def test_many_tokens_are_sorted_the_other_way() -> None:
    tokens = settings.MAX_COUNTED_TOKENS + 1
    index, size = partition(1, tokens, 40)
    members = launch.group_members(index, 40)
    assert torch.equal(index[0, members[0].long()], index[0].sort().values)
    x = normal(1, tokens, 3)
    assert torch.equal(launch.merge(x, members, size, "amax"), reference.merge(x, index, size, "amax"))


@over_tiles
@over_dtypes
@pytest.mark.parametrize("mode", ["mean", "sum", "amax"])
@pytest.mark.parametrize(("tokens", "groups", "channels"), [(1, 1, 1), (37, 12, 21), (33, 2, 5)])
def test_merge(tokens: int, groups: int, channels: int, mode: str, dtype: torch.dtype, backend: str) -> None:
    index, size = partition(2, tokens, groups)
    x = normal(2, channels, tokens, dtype=dtype).transpose(1, 2)
    merged = launch.merge(x, launch.group_members(index, groups), size, mode)
    assert merged.dtype == dtype
    wanted = reference.merge(x.float(), index, size, mode)
    torch.testing.assert_close(merged.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size.max().item())


@over_tiles
@over_dtypes
@pytest.mark.parametrize(("tokens", "groups", "channels"), [(1, 1, 1), (37, 12, 21), (33, 2, 5)])
def test_weighted_merge(tokens: int, groups: int, channels: int, dtype: torch.dtype, backend: str) -> None:
    index, size = partition(2, tokens, groups)
    size = torch.cat([size, torch.zeros_like(size[:, :1])], 1)  # one group more that nobody is in
    x = normal(2, channels, tokens, dtype=dtype).transpose(1, 2)
    weight = normal(4, 1, 2 * tokens).abs()[::2, :, ::2].transpose(1, 2)
    merged, total = launch.weighted_merge(x, weight, launch.group_members(index, groups + 1), size)
    assert merged.dtype == dtype and total.dtype == torch.float32
    wanted, wanted_total = reference.weighted_merge(x.float(), weight, index, size)
    torch.testing.assert_close(merged.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    torch.testing.assert_close(total, wanted_total, rtol=1e-6, atol=1e-6)
    assert (merged[:, -1] == 0).all() and (total[:, -1] == 0).all()


@over_tiles
def test_a_maximum_knows_what_is_not_a_number(backend: str) -> None:
    index, size = partition(1, 20, 6)
    x = normal(1, 20, 4)
    x[0, 3, 1], x[0, 5, 2], x[0, 7] = float("nan"), float("inf"), -float("inf")
    merged = launch.merge(x, launch.group_members(index, 6), size, "amax")
    torch.testing.assert_close(merged, reference.merge(x, index, size, "amax"), rtol=0, atol=0, equal_nan=True)


@over_tiles
@over_dtypes
@pytest.mark.parametrize(("tokens", "groups", "channels"), [(1, 1, 1), (37, 12, 21), (33, 2, 5)])
def test_morph_and_unmerge(tokens: int, groups: int, channels: int, dtype: torch.dtype, backend: str) -> None:
    index, size = partition(2, tokens, groups)
    x = normal(4, tokens, 2 * channels, dtype=dtype)[::2, :, ::2]
    morphed = launch.morph(x, launch.group_members(index, groups), size)
    wanted = reference.morph(x.float(), index, size)
    torch.testing.assert_close(morphed.float(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    merged = normal(2, channels, groups, dtype=dtype).transpose(1, 2)
    assert torch.equal(launch.unmerge(merged, index), reference.unmerge(merged, index))


def test_many_groups_before_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a tile of groups starts is found by adding sizes block by block."""
    monkeypatch.setattr(settings, "EXTENT_BLOCK", 4)
    index, size = partition(2, 48, 30)
    x = normal(2, 48, 3)
    merged = launch.merge(x, launch.group_members(index, 30), size, "sum")
    torch.testing.assert_close(merged, reference.merge(x, index, size, "sum"))


def test_wrong_groups_reach_no_foreign_memory() -> None:
    """Indices and sizes that fit nothing: any result, but no access outside and no endless walk."""
    x = normal(2, 9, 5)
    size = torch.tensor([[2**30, -5, 2**31 - 1], [7, 7, 7]], dtype=torch.int32, device=DEVICE)
    index = torch.tensor([[-1, 2**30, 3, 0, 1, 2, -(2**31), 2, 2]] * 2, dtype=torch.int32, device=DEVICE)
    members = launch.group_members(index, 3)
    assert torch.equal(members.sort(1).values.cpu(), torch.arange(9).int().expand(2, -1))
    for mode in ("mean", "sum", "amax"):
        launch.merge(x, index, size, mode)
    launch.weighted_merge(x, x[:, :, :1], index, size)
    launch.morph(x, index, size)
    assert (launch.unmerge(x[:, :3], index)[:, [0, 1, 2, 6]] == 0).all()


@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_merge(batch: int) -> None:
    x, index = normal(batch, 4, 3), torch.zeros(batch, 4, dtype=torch.int32, device=DEVICE)
    size = torch.full((batch, 1), 4, dtype=torch.int32, device=DEVICE)
    members = launch.group_members(index, 1)
    assert members.shape == (batch, 4)
    assert launch.merge(x, members, size, "mean").shape == (batch, 1, 3)
    merged, total = launch.weighted_merge(x, x[:, :, :1], members, size)
    assert merged.shape == (batch, 1, 3) and total.shape == (batch, 1, 1)
    assert launch.morph(x, members, size).shape == launch.unmerge(x[:, :1], index).shape == (batch, 4, 3)
