"""Streaming: equal to the definition, in guarded memory, with tiles so small that a few tokens cross their edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import DEVICE
from torch import Tensor

from dtm_triton import reference
from dtm_triton.kernels import stream_settings
from dtm_triton.kernels.stream_match import stream_match
from dtm_triton.kernels.stream_settings import StreamSettings

TINY: dict[str, Any] = dict(
    rows=16,
    columns=16,
    channels=16,
    norm_rows=8,
    select_block=8,
    place_rows=8,
    place_columns=4,
    num_warps=4,
    num_stages=2,
    select_warps=4,
)
APART = StreamSettings(**TINY, programs=12)
INSIDE = StreamSettings(**TINY, programs=1, norms=True, place=True, resident=True)
FORMS = {"apart": APART, "inside": INSIDE}
"""All launches and B shared out; and as few launches as there are, with the tile of A kept."""

PLAIN: dict[str, Any] = dict(num_protected=0, random_split=False, keep_order=False, threshold=None)

pytestmark = [
    pytest.mark.usefixtures("guard"),
    pytest.mark.filterwarnings("ignore:All-NaN"),  # how the interpreter says that a row has no maximum
]
over_forms = pytest.mark.parametrize("form", FORMS, indirect=True)


@pytest.fixture
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(stream_settings, "stream_settings", lambda *_: FORMS[request.param])
    return request.param


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def run(features: Tensor, *schedules: list[int], seed: int = 1, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    removed = torch.tensor(schedules, dtype=torch.int32).reshape(len(schedules), -1).to(DEVICE)
    return stream_match(features, removed, torch.tensor([seed], device=DEVICE), **options)


def assert_as_defined(features: Tensor, *schedules: list[int], seed: int = 1, **options: Any) -> None:
    found = run(features, *schedules, seed=seed, **options)
    removed = torch.tensor(schedules, dtype=torch.int32)
    wanted = reference.match(features.cpu(), removed, seed, **options)
    for name, left, right in zip(("index", "size", "members"), found, wanted, strict=True):
        assert left.dtype == torch.int32
        assert torch.equal(left.cpu(), right), f"{name} {options}"


@pytest.mark.parametrize(
    ("form", "protected", "random", "keep", "threshold"),
    [
        ("apart", 0, False, False, None),
        ("inside", 0, False, True, 0.45),
        ("inside", 0, True, False, 0.45),
        ("apart", 0, True, True, None),
        ("inside", 1, False, False, None),
        ("apart", 1, False, True, None),
        ("apart", 1, True, False, 0.45),
        ("inside", 1, True, True, None),
        ("apart", 2, False, False, 0.45),
        ("inside", 2, False, False, None),
        ("apart", 2, False, True, None),
    ],
    indirect=["form"],
)
def test_groups_are_the_references(
    form: str, protected: int, random: bool, keep: bool, threshold: float | None
) -> None:
    """One schedule asks for a part of what there is, one for more than that, one for less than nothing."""
    options = dict(num_protected=protected, random_split=random, keep_order=keep, threshold=threshold)
    assert_as_defined(normal(2, 37, 10), [11], [40], [-1], seed=-(2**62) + 12345, **options)


@over_forms
@pytest.mark.parametrize(
    ("protected", "random", "keep", "threshold"),
    [(0, False, False, None), (2, False, True, 0.3), (1, True, False, 0.5)],
)
def test_several_iterations(form: str, protected: int, random: bool, keep: bool, threshold: float | None) -> None:
    """Some of them idle; groups differ in number from image to image and from schedule to schedule."""
    options = dict(num_protected=protected, random_split=random, keep_order=keep, threshold=threshold)
    assert_as_defined(normal(2, 19, 10), [3, 0, 5], [40, 3, -1], **options)


@over_forms
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 1), (1, 3, 5), (1, 33, 16), (1, 64, 21)], ids=str)
def test_awkward_shapes(shape: tuple[int, ...], form: str) -> None:
    assert_as_defined(normal(*shape), [shape[1] // 3], **PLAIN)


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (2, 5, 0)], ids=str)
def test_nothing_to_match(shape: tuple[int, ...]) -> None:
    index, size, members = run(normal(*shape), [2], **PLAIN)
    assert index.shape == size.shape == members.shape == (1, *shape[:2])
    if index.numel():  # no channels: every similarity is 0, so the first tokens merge into the first partner
        assert index.tolist() == [[[1, 1, 1, 2, 0]] * 2]


def test_no_iterations() -> None:
    index, size, members = run(normal(2, 5, 4), [], **PLAIN)
    assert index.tolist() == members.tolist() == [[[0, 1, 2, 3, 4]] * 2] and (size == 1).all()


@over_forms
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_ties_go_to_the_lower_slot(protected: int, form: str) -> None:
    """Tokens along few axes: cosines of exactly 0 and 1, and almost everything ties."""
    axis = torch.randint(5, (1, 40), generator=torch.Generator().manual_seed(3))
    features = torch.nn.functional.one_hot(axis, 8).to(DEVICE, torch.float32) * 2
    features[:, ::7] = 0
    assert_as_defined(features, [9], [17], **PLAIN | {"num_protected": protected, "keep_order": protected == 1})


@over_forms
def test_equal_tokens_tie(form: str) -> None:
    """Equal tokens are equally similar to the last bit, wherever they lie: the lowest merge into the lowest."""
    kind = torch.arange(40) % 3
    index = run(normal(1, 3, 21, seed=5)[:, kind.to(DEVICE)], [9], **PLAIN)[0][0, 0].cpu()
    first_b = torch.tensor([3, 1, 5])
    merged = index == index[first_b[kind]]
    merged[1::2] = False
    assert merged.sum() == 9
    for one in range(3):
        candidates = merged[::2][kind[::2] == one]
        assert candidates.tolist() == sorted(candidates.tolist(), reverse=True)


@over_forms
def test_one_partner_for_all(form: str) -> None:
    """All sources share one destination, which has some of them before it and some behind."""
    features = torch.zeros(1, 30, 4, device=DEVICE)
    features[:, 0::2, 0] = 1
    features[:, 1::2, 1] = 1
    features[:, 13, 0] = 1
    features[:, :, 2] = 0.3 * normal(1, 30)
    assert run(features, [14], **PLAIN)[1].max() == 15
    assert_as_defined(features, [14, 6], **PLAIN)


@over_forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, form: str) -> None:
    assert_as_defined(normal(1, 35, 20, dtype=dtype), [9, 5], **PLAIN)


@over_forms
def test_any_strides(form: str) -> None:
    wide = normal(3, 24, 22)
    for features in (wide[:, ::2, 1::2], wide.permute(2, 0, 1)[:2], wide[:, :1].expand(-1, 9, -1)):
        assert_as_defined(features, [3], **PLAIN)


@over_forms
@pytest.mark.parametrize("protected", [0, 1, 2])
def test_what_is_not_a_number_is_least_similar(protected: int, form: str) -> None:
    features = normal(2, 37, 6)
    features[0, ::3, 1] = float("nan")
    features[1] = float("nan")
    assert_as_defined(features, [17], **PLAIN | {"num_protected": protected, "keep_order": True})


@over_forms
@pytest.mark.parametrize("value", [float("inf"), 3e38])
def test_what_overflows_leaves_a_partition(value: float, form: str) -> None:
    features = normal(1, 21, 6)
    features[:, ::3, 1] = value
    index, size, members = run(features, [5, 4], **PLAIN | {"num_protected": 2})
    assert index[0, 0].bincount(minlength=21).tolist() == size[0, 0].tolist()
    assert torch.equal(index[0].sort(dim=-1, stable=True).indices.int(), members[0])
    assert size[0, 0, :2].tolist() == [1, 1] and (size[0, 0] > 0).sum() == 12


def test_neither_poison_nor_tiles_decide(guard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits whatever memory held before, and however B is dealt to programs."""
    features, options = normal(1, 70, 16), PLAIN | {"random_split": True}
    monkeypatch.setattr(stream_settings, "stream_settings", lambda *_: APART)
    first = run(features, [21], **options)
    guard.poison = 11
    monkeypatch.setattr(stream_settings, "stream_settings", lambda *_: INSIDE)
    again = run(features, [21], **options)
    assert all(torch.equal(left, right) for left, right in zip(first, again, strict=True))


def test_the_first_of_shares_that_tie(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of B is equally similar: whoever merges joins the first."""
    monkeypatch.setattr(stream_settings, "stream_settings", lambda *_: APART)
    index, size, _ = run(torch.ones(1, 70, 4, device=DEVICE), [10], **PLAIN)
    assert size[0, 0, 25] == 11 and index[0, 0, 1] == 25


@pytest.mark.parametrize("schedules", [([5], [3]), ([4, 2],)])
def test_chunks_decide_nothing(schedules: tuple[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_settings, "stream_settings", lambda *_: INSIDE)
    features, options = normal(2, 13, 8), PLAIN | {"random_split": True}
    whole = run(features, *schedules, **options)
    monkeypatch.setattr(stream_settings, "STREAM_SCRATCH_BYTES", 1)
    parts = run(features, *schedules, **options)
    assert all(torch.equal(left, right) for left, right in zip(whole, parts, strict=True))


@over_forms
def test_no_pair_above_the_threshold(form: str) -> None:
    """Nothing merges and nothing moves; what equals it is not above, what is not a number below the lowest there is."""
    features = normal(2, 20, 6)
    features[1] = float("nan")
    assert_as_defined(features, [5], **PLAIN | {"threshold": 1.5})
    assert_as_defined(torch.eye(4, device=DEVICE)[None, [0, 0, 1, 1]], [1], **PLAIN | {"threshold": 1.0})
    index, size, _ = run(features, [5], **PLAIN | {"threshold": -3.3e38})
    assert (size > 0).sum(-1).tolist() == [[15, 20]] and index[0, 1].tolist() == list(range(20))


def test_settings_as_shipped() -> None:
    """With norms and places of their own launches, and without."""
    for tokens in (300, 1100):
        assert_as_defined(normal(1, tokens, 8), [tokens // 3], **PLAIN)
