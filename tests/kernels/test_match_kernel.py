"""Matching: equal to the definition, in guarded memory, with tiles as shipped and with tiny ones, which also take odd
numbers of tokens in two launches and even ones in one."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from backends import DEVICE
from torch import Tensor

from dtm_triton import reference
from dtm_triton.kernels import launch, match, settings

TILES = ("triton", "triton-small")
OPTIONS = [
    dict(num_protected=protected, random_split=random, keep_order=keep)
    for protected, random, keep in product((0, 1, 2), (False, True), (False, True))
    if not (random and protected == 2)
]
PLAIN: dict[str, Any] = dict(num_protected=0, random_split=False, keep_order=False)

over_tiles = pytest.mark.parametrize("backend", TILES, indirect=True)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def counts(*schedules: list[int]) -> Tensor:
    return torch.tensor(schedules, dtype=torch.int32).reshape(len(schedules), -1)


def assert_as_defined(features: Tensor, removed: Tensor, seed: int = 1, **options: Any) -> None:
    found = launch.match(features, removed, torch.tensor([seed]), **options)[:3]
    wanted = reference.match(features.cpu(), removed, seed, **options)
    for name, left, right in zip(("index", "size", "members"), found, wanted, strict=True):
        assert left.dtype == torch.int32
        assert torch.equal(left.cpu(), right), f"{name} {options}"


@pytest.mark.usefixtures("guard")
@over_tiles
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(int(v)) for v in o.values()))
def test_groups_are_the_references(options: dict[str, Any], backend: str) -> None:
    """Schedules that skip, ask for nothing, for less than nothing, and for more than there is."""
    assert_as_defined(normal(2, 23, 10), counts([3, 0, 5, 2], [40, 3, -1, 9]), -(2**62) + 12345, **options)


@pytest.mark.usefixtures("guard", "backend")
@over_tiles
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1), (1, 3, 5), (3, 17, 33), (1, 48, 64)], ids=str)
def test_awkward_shapes(shape: tuple[int, ...]) -> None:
    assert_as_defined(normal(*shape), counts([4, 2, 1]), **PLAIN)


@pytest.mark.usefixtures("guard")
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=str)
def test_nothing_to_match(shape: tuple[int, ...]) -> None:
    index, size, members, _ = launch.match(normal(*shape), counts([2]), torch.tensor([1]), **PLAIN)
    assert index.shape == size.shape == members.shape == (1, *shape[:2])
    if index.numel():  # no channels: every similarity is 0, so the first tokens merge into the first partner
        assert index.tolist() == [[[0 if slot == 4 else 1 if slot != 3 else 2 for slot in range(5)]] * 2]


@pytest.mark.usefixtures("guard")
def test_no_iterations() -> None:
    index, size, members, _ = launch.match(normal(2, 5, 4), torch.zeros(1, 0).int(), torch.tensor([1]), **PLAIN)
    assert index.tolist() == members.tolist() == [[[0, 1, 2, 3, 4]] * 2] and (size == 1).all()


@pytest.mark.usefixtures("guard")
@over_tiles
@pytest.mark.parametrize("options", OPTIONS[:4], ids=lambda o: "-".join(str(int(v)) for v in o.values()))
def test_ties_go_to_the_lower_slot(options: dict[str, Any], backend: str) -> None:
    """Tokens along few axes: cosines of exactly 0 and 1, and almost everything ties."""
    axis = torch.randint(5, (2, 40), generator=torch.Generator().manual_seed(3))
    features = torch.nn.functional.one_hot(axis, 8).to(DEVICE, torch.float32) * 2
    features[:, ::7] = 0
    assert_as_defined(features, counts([9], [0], [17]), **options)


@pytest.mark.usefixtures("guard", "backend")
@over_tiles
def test_one_partner_for_all() -> None:
    """Nearly all sources share one destination: the longest list there can be."""
    features = torch.zeros(2, 30, 4, device=DEVICE)
    features[:, 0::2, 0] = 1
    features[:, 1::2, 1] = 1
    features[:, 13, 0] = 1
    features[:, :, 2] = 0.3 * normal(2, 30)
    assert launch.match(features, counts([14]), torch.tensor([1]), **PLAIN)[1].max() == 15
    assert_as_defined(features, counts([14, 6, 4]), **PLAIN)


@pytest.mark.usefixtures("guard")
@over_tiles
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, backend: str) -> None:
    assert_as_defined(normal(2, 31, 20, dtype=dtype), counts([6, 5, 4]), **PLAIN)


@pytest.mark.usefixtures("guard", "backend")
@over_tiles
def test_any_strides() -> None:
    wide = normal(3, 24, 22)
    for features in (
        wide[:, ::2, 1::2],
        wide.transpose(1, 2),
        wide.permute(2, 0, 1)[:3],
        wide[:1].expand(3, -1, -1),
        wide[:, :1].expand(-1, 9, -1),
    ):
        assert_as_defined(features, counts([3, 2]), **PLAIN)


@pytest.mark.usefixtures("guard", "backend")
@over_tiles
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_what_is_not_a_number_leaves_a_partition(value: float, protected: int) -> None:
    features = normal(2, 21, 6)
    features[0, ::3, 1] = value
    features[1, :] = value
    index, size, members, _ = launch.match(
        features, counts([5, 4, 3]), torch.tensor([1]), num_protected=protected, random_split=False, keep_order=True
    )
    left = int((size[0, 0] > 0).sum())
    for image in range(2):
        assert torch.equal(index[0, image].bincount(minlength=21).int(), size[0, image])
        assert (size[0, image] > 0).sum() == left == 9
        assert torch.equal(members[0, image].sort().values.cpu(), torch.arange(21).int())
        assert index[0, image, :protected].tolist() == list(range(protected))
        assert (size[0, image, :protected] == 1).all()


@pytest.mark.usefixtures("guard", "backend")
@over_tiles
def test_not_a_number_ranks_last_and_goes_nowhere_by_itself() -> None:
    """A NaN token merges after every other, one with negative similarities too, and attracts nothing."""
    features = normal(1, 16, 8).abs()
    features[0, 0] *= -1
    features[0, 4] = features[0, 7] = float("nan")
    assert_as_defined(features, counts([7]), **PLAIN)
    index, size, _, _ = launch.match(features, counts([7]), torch.tensor([1]), **PLAIN)
    for token in (4, 7):
        assert size[0, 0, index[0, 0, token]] == 1


def test_the_same_bits_every_run(guard: Any) -> None:
    features, removed = normal(3, 40, 16), counts([9, 5, 3], [1, 12, 2])
    first = launch.match(features, removed, torch.tensor([5]), **(PLAIN | {"random_split": True}))[:3]
    guard.poison = 11
    again = launch.match(features, removed, torch.tensor([5]), **(PLAIN | {"random_split": True}))[:3]
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


@pytest.mark.usefixtures("guard", "backend")
@over_tiles
def test_images_and_schedules_do_not_meet() -> None:
    """More images than programs under tiny tiles: scratch memory is used again."""
    features, removed = normal(3, 11, 7), counts([4, 2], [2, 2])
    together = launch.match(features, removed, torch.tensor([1]), **PLAIN)[:3]
    for image, schedule in product(range(3), range(2)):
        alone = launch.match(features[image : image + 1], removed[schedule : schedule + 1], torch.tensor([1]), **PLAIN)[
            :3
        ]
        assert all(torch.equal(a[schedule, image], b[0, 0]) for a, b in zip(together, alone, strict=True))


@pytest.mark.usefixtures("guard")
@over_tiles
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_means_of_groups(dtype: torch.dtype, backend: str) -> None:
    features = normal(2, 27, 21, dtype=dtype)[:, :, ::2]
    index, size, _, merged = launch.match(features, counts([8, 4]), torch.tensor([1]), **PLAIN, merge_rows=15)
    assert merged is not None and merged.dtype == dtype
    wanted = reference.merge(features.float(), index[0], size[0, :, :15], "mean")
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(merged.float(), wanted, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[True, False], ids=["fused", "split"])
def form(request: pytest.FixtureRequest, backend: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether matching takes one launch or two, with the tiles of the backend."""
    tiles = settings.match_settings
    monkeypatch.setattr(settings, "match_settings", lambda *shape: replace(tiles(*shape), fused=request.param))
    return request.param


@pytest.mark.usefixtures("guard", "form")
@pytest.mark.parametrize("backend", ["triton-small"], indirect=True)
@pytest.mark.parametrize("random", [False, True])
def test_one_launch_and_two_give_the_same(random: bool) -> None:
    options = dict(num_protected=1, random_split=random, keep_order=False)
    assert_as_defined(normal(3, 26, 10), counts([6, 0, 4, 3], [2, 2, 2, 2]), 77, **options)
    assert_as_defined(normal(3, 25, 10), counts([6, 0, 4, 3], [2, 2, 2, 2]), 77, **options)


@pytest.mark.usefixtures("guard", "form")
@pytest.mark.parametrize("backend", ["triton-small"], indirect=True)
def test_chunks_of_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound on scratch memory that five images exceed: chunks of two, two and one, random numbers and means kept."""
    monkeypatch.setattr(settings, "SCRATCH_BYTES", 2 * 2 * 4 * 21 * 32)
    options = dict(num_protected=0, random_split=True, keep_order=True)
    assert_as_defined(normal(5, 20, 6), counts([5, 4], [3, 3]), 5, **options)
    features = normal(5, 20, 6)
    index, size, _, merged = launch.match(features, counts([5, 4]), torch.tensor([1]), **PLAIN, merge_rows=11)
    torch.testing.assert_close(merged, reference.merge(features, index[0], size[0, :, :11], "mean"))


@pytest.mark.usefixtures("guard")
@pytest.mark.parametrize("tokens", [257])
def test_more_tokens_than_one_launch_holds(tokens: int) -> None:
    """Several iterations on 512 slots: two launches. One iteration: streaming, the same groups."""
    features = normal(1, tokens, 8)
    assert_as_defined(features, counts([100, 40]), **PLAIN)
    assert_as_defined(features, counts([100]), **PLAIN)


@pytest.mark.usefixtures("guard")
@pytest.mark.parametrize("backend", ["triton-small"], indirect=True)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(int(v)) for v in o.values()))
def test_threshold(options: dict[str, Any], backend: str) -> None:
    """Images of their own number of groups: one merges nothing, one as without a threshold, one in between."""
    features = normal(4, 23, 5)
    features[1] = features[1].abs() + 2  # all alike
    features[2] = torch.eye(23, 5, device=DEVICE)  # right angles
    features[3, ::3] = float("nan")
    found = launch.match(features, counts([6, 4, 3], [2, 0, 9]), torch.tensor([3]), **options, threshold=0.5)[:3]
    wanted = reference.match(features.cpu(), counts([6, 4, 3], [2, 0, 9]), 3, **options, threshold=0.5)
    assert all(torch.equal(left.cpu(), right) for left, right in zip(found, wanted, strict=True))
    assert len(set((found[1][0] > 0).sum(-1).tolist())) > 2


@pytest.mark.usefixtures("guard")
@pytest.mark.parametrize("threshold", [-1e38, -2.0, 1.5])
def test_thresholds_out_of_reach(threshold: float) -> None:
    """Below every cosine all that is a number merges, above every cosine nothing does."""
    features = normal(2, 12, 4)
    features[0, 0] = float("nan")
    _, size, _, _ = launch.match(features, counts([6]), torch.tensor([1]), **PLAIN, threshold=threshold)
    assert (size > 0).sum(-1).tolist() == ([[12, 12]] if threshold > 1 else [[7, 6]])


@pytest.mark.usefixtures("guard", "form")
@pytest.mark.parametrize("backend", ["triton-small"], indirect=True)
def test_the_ticket_is_set_to_nothing() -> None:
    ticket = torch.full((1,), 5, dtype=torch.int32, device=DEVICE)
    launch.match(normal(3, 10, 4), counts([2]), torch.tensor([1]), **PLAIN, ticket=ticket)
    assert ticket.item() == 0


def test_a_capture_refuses_schedules_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph would read CPU memory in every replay."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="schedules must be on cuda:0 to be captured in a CUDA graph, got .* on cpu"):
        match.on_device("schedules", counts([1]), torch.device("cuda:0"))
