"""Properties of match_tokens, over every implementation."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_same_groups, decision_margins
from backends import DEVICE, over_backends, property_test
from cases import Case, make_features, matching_cases
from hypothesis import strategies as st

from dtm_triton import morph


def assert_partition(groups: morph.TokenGroups, case: Case) -> None:
    batch, tokens, _ = case.features.shape
    count = morph.MorphSchedule(tuple(case.removed)).num_groups(tokens, case.options["num_protected"])
    assert groups.index.dtype == groups.size.dtype == groups.count.dtype == torch.int32
    assert groups.index.shape == (batch, tokens) and groups.source().sum(-1).equal(groups.size)
    assert groups.size.sum(-1).eq(tokens).all()
    if case.options.get("threshold") is None:
        assert groups.size.shape == (batch, count) and (groups.size > 0).all() and groups.count.eq(count).all()
    else:
        assert groups.size.shape == (batch, tokens) and groups.count.ge(count).all()
        assert (groups.size > 0).equal(torch.arange(tokens, device=DEVICE) < groups.count[:, None])


@property_test(case=matching_cases())
def test_groups_form_a_partition(backend: str, case: Case) -> None:
    assert_partition(case.groups(backend), case)


@property_test(case=matching_cases())
def test_a_protected_token_stays_alone(backend: str, case: Case) -> None:
    case.options["num_protected"] = 1
    groups = case.groups(backend)
    assert (groups.size.gather(1, groups.index[:, :1].long()) == 1).all()
    assert (groups.index[:, 0] == 0).all()


@property_test(case=matching_cases())
def test_removing_nothing_is_the_identity(backend: str, case: Case) -> None:
    index, size = case.groups(backend, removed=[0] * len(case.removed))
    assert index.equal(torch.arange(size.shape[1], device=DEVICE).expand_as(index).int()) and size.eq(1).all()


@property_test(case=matching_cases())
def test_groups_refine_those_of_the_next_iteration(backend: str, case: Case) -> None:
    fine, coarse = case.groups(backend, removed=case.removed[:-1]), case.groups(backend)
    for image in range(len(case.features)):
        pairs = torch.stack([fine.index[image], coarse.index[image]], 1).unique(dim=0)
        assert len(pairs) == fine.count[image]  # every fine group lies in one coarse group


@property_test(case=matching_cases(), exponent=st.integers(-5, 5))
def test_scaling_by_a_power_of_two_changes_nothing(backend: str, case: Case, exponent: int) -> None:
    case.features = case.features.clamp(-8, 8).mul(64).round().div(64)  # no underflow when scaled down
    scaled = case.groups(backend, case.features * 2.0**exponent)
    assert scaled.index.equal(case.groups(backend).index)


@property_test(case=matching_cases())
def test_images_do_not_influence_each_other(backend: str, case: Case) -> None:
    case.options["split"] = "alternating"  # the random split of an image depends on its place in the batch
    together = case.groups(backend)
    for image in range(len(case.features)):
        alone = case.groups(backend, case.features[image : image + 1])
        assert alone.index[0].equal(together.index[image]) and alone.size[0].equal(together.size[image])


@property_test(case=matching_cases())
def test_two_runs_give_the_same_bits(backend: str, case: Case) -> None:
    first, second = case.groups(backend), case.groups(backend)
    assert first.index.equal(second.index) and first.size.equal(second.size)


@property_test(case=matching_cases())
def test_strides_do_not_matter(backend: str, case: Case) -> None:
    wide = torch.full((*case.features.shape[:2], 2 * case.features.shape[2] + 3), torch.nan, device=DEVICE)
    strided = wide.to(case.features.dtype)[:, :, 1 : 2 * case.features.shape[2] : 2]
    strided.copy_(case.features)
    assert case.groups(backend, strided).index.equal(case.groups(backend).index)
    across = case.features.transpose(1, 2).contiguous().transpose(1, 2)
    assert case.groups(backend, across).index.equal(case.groups(backend).index)


@property_test(case=matching_cases(kinds=("normal", "clusters", "duplicates", "zeros")))
def test_agrees_with_the_reference_in_float64(backend: str, case: Case) -> None:
    truth = case.groups("reference", case.features.double())
    assert_same_groups(case.groups(backend).index, truth.index, decision_margins(case))


@over_backends
@pytest.mark.parametrize("split", ["alternating", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_most_images_are_decided(backend: str, split: str, dtype: torch.dtype) -> None:
    """The comparison above is not vacuous: of random images nearly all are compared to the last index."""
    features = make_features("normal", 3, 33, 24, seed=1, dtype=dtype)
    case = Case(features, [9, 5, 3], dict(num_protected=0, split=split, keep_order=False))
    truth = case.groups("reference", case.features.double())
    assert assert_same_groups(case.groups(backend).index, truth.index, decision_margins(case)) >= 2


@over_backends
@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("keep_order", [True, False])
def test_ties_go_to_the_lower_slot(backend: str, channels: int, keep_order: bool) -> None:
    """Similarities of -1 and 1 entries are exact here, so every implementation must break all ties alike."""
    features = make_features("ties", 3, 37, channels, seed=2, dtype=torch.float32)
    a, b = features[:, 0::2], features[:, 1::2]
    best, partner = (a @ b.transpose(1, 2)).max(-1)
    count = 11
    for image in range(3):
        ranked = sorted(range(19), key=lambda i: (-best[image, i].item(), i))
        kept = ranked[count:]
        order = [2 * i for i in (sorted(kept) if keep_order else kept)] + [2 * j + 1 for j in range(18)]
        expected = torch.zeros(37, dtype=torch.int32)
        for slot, token in enumerate(order):
            expected[token] = slot
        for i in ranked[:count]:
            expected[2 * i] = expected[2 * partner[image, i] + 1]
        groups = morph.match_tokens(features, [count], keep_order=keep_order, backend=backend)
        assert groups.index[image].cpu().equal(expected)


@over_backends
def test_equal_tokens_merge_first(backend: str) -> None:
    groups = morph.match_tokens(torch.ones(1, 8, 3, device=DEVICE), [2, 1], backend=backend)
    assert groups.index.tolist() == [[0, 0, 0, 3, 2, 1, 2, 4]]


@over_backends
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["one", "row", "all"])
def test_numbers_that_are_not_finite_still_give_a_partition(backend: str, value: float, where: str) -> None:
    features = make_features("normal", 2, 21, 6, seed=3, dtype=torch.float32)
    if where == "one":
        features[0, 4, 2] = value
    else:
        features[0, 3 if where == "row" else slice(None)] = value
    for protected in (0, 1):
        case = Case(features, [5, 5, 40, 40], dict(num_protected=protected, split="alternating", keep_order=None))
        groups = case.groups(backend)
        assert_partition(groups, case)
        assert groups.index[1].equal(case.groups(backend, features[1:]).index[0])
        if protected:
            assert groups.size.gather(1, groups.index[:, :1].long()).eq(1).all()


@over_backends
def test_a_token_that_is_not_a_number_merges_last(backend: str) -> None:
    features = make_features("normal", 1, 16, 4, seed=4, dtype=torch.float32)
    features[0, 6] = torch.nan
    groups = morph.match_tokens(features, [7], backend=backend)
    assert groups.size[0, groups.index[0, 6]] == 1


@over_backends
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 1, 3), (2, 5, 0), (1, 2, 1), (3, 7, 1)])
def test_smallest_shapes(backend: str, shape: tuple[int, int, int]) -> None:
    case = Case(torch.ones(shape, device=DEVICE), [3, 3], dict(num_protected=0, split="random", keep_order=None))
    assert_partition(case.groups(backend), case)


@pytest.mark.parametrize("backend", ["portable", "triton"], indirect=True)  # tiny tiles would take a minute
def test_more_tokens_than_one_launch_holds(backend: str) -> None:
    """More slots than the matching kernel has by default."""
    features = make_features("normal", 1, 300, 8, seed=5, dtype=torch.float32)
    case = Case(features, [100, 30], dict(num_protected=0, split="alternating", keep_order=None))
    truth = case.groups("reference", features.double())
    assert_same_groups(case.groups(backend).index, truth.index, decision_margins(case))


@over_backends
@pytest.mark.parametrize("split", ["alternating", "random"])
@pytest.mark.parametrize("threshold", [-9.0, 0.5, 9.0])
def test_images_differ_in_groups_under_a_threshold(backend: str, threshold: float, split: str) -> None:
    """Every image is grouped as it would be alone, by as many merges as its own similarities allow."""
    features = make_features("normal", 4, 21, 12, seed=8, dtype=torch.float32)
    features[0] = features[0, :1]  # all pass
    options = dict(num_protected=0, split=split, keep_order=None, threshold=threshold)
    case = Case(features, [7, 5], options)
    groups, truth = case.groups(backend), case.groups("reference", features.double())
    assert assert_same_groups(groups.index, truth.index, decision_margins(case)) >= 3
    counts = groups.count.tolist()
    if abs(threshold) > 1:
        assert counts == [9 if threshold < 0 else 21] * 4
    else:
        assert counts[0] == 9 and min(counts[1:]) > 9 and len(set(counts[1:])) > 1


@over_backends
def test_a_threshold_counts_each_image_s_own_pairs(backend: str) -> None:
    """The cosines of slots 0, 2, 4 with their partners are 1, 0.8 and 0; the best at most 2 of those above merge."""
    features = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 0.8, 0.6], [0, 1, 0], [0, 0, -1], [0, 0, 0]], device=DEVICE)
    features = torch.stack([features, -features.roll(2, 0), torch.eye(6, 3, device=DEVICE)])
    wanted = {-1.0: [4, 4, 4], 0.7: [4, 4, 6], 0.9: [5, 5, 6], 1.0: [6, 6, 6]}
    for threshold, counts in wanted.items():
        for keep_order in (True, False):
            groups = morph.match_tokens(features, [2], threshold=threshold, keep_order=keep_order, backend=backend)
            assert groups.count.tolist() == counts
            for image, count in enumerate(counts):
                if count == 6:  # nothing merges, nothing moves
                    assert groups.index[image].tolist() == list(range(6))


@over_backends
def test_what_did_not_pass_counts_once_later(backend: str) -> None:
    """Token 4, second to token 2, fails and then meets token 0; their mean is like token 2 by 0.439, below 0.45. Had
    token 4 counted twice, as if it had merged into itself, that would be 0.453."""
    u, v, w = [1, 0, 0, 0, 0], [0.5, 0.75**0.5, 0, 0, 0], [0.32, 0.3233, 0.8905, 0, 0]
    tokens = torch.tensor([u, [0, 0, 0, 1, 0], w, w, v, [0, 0, 0, 0, 1]])
    features = torch.stack([torch.ones_like(tokens), tokens]).to(DEVICE)  # where all merge, two do
    groups = morph.match_tokens(features, [2, 2, 2], threshold=0.45, keep_order=True, backend=backend)
    assert groups.count.tolist() == [1, 4]
    assert groups.index[1].tolist() == [2, 0, 3, 3, 2, 1]


@over_backends
@pytest.mark.parametrize("threshold", [-1e300, -1e30, -2.0])
def test_what_is_not_a_number_never_passes(backend: str, threshold: float) -> None:
    features = make_features("normal", 2, 12, 4, seed=9, dtype=torch.float32)
    features[0, 4] = torch.nan
    features[1] = torch.nan
    groups = morph.match_tokens(features, [6, 6, 6, 6], threshold=threshold, backend=backend)
    assert groups.size[0, groups.index[0, 4]] == 1 and groups.count.tolist() == [2, 12]
    assert groups.index[1].tolist() == list(range(12))


@over_backends
@pytest.mark.parametrize("exponent", [-70, -66, -63, 60, 63, 66])
def test_norms_at_the_ends_of_float32(backend: str, exponent: int) -> None:
    """Where squares over- or underflow, kernels and portable decide by the same arithmetic."""
    features = make_features("ties", 3, 24, 4, seed=10, dtype=torch.float32)
    scale = 2.0 ** torch.randint(exponent - 2, exponent + 3, (3, 24, 1), generator=torch.Generator().manual_seed(1))
    case = Case(features * scale.to(DEVICE), [7], dict(num_protected=0, split="alternating", keep_order=False))
    groups = case.groups(backend)
    assert_partition(groups, case)
    if backend != "reference":
        assert groups.index.equal(case.groups("portable").index)


@over_backends
def test_random_splits(backend: str) -> None:
    """Equal generators give equal splits, the next draw another, and the images of a batch have their own."""
    features = make_features("normal", 1, 30, 8, seed=6, dtype=torch.float32).repeat(2, 1, 1)
    generator = torch.Generator().manual_seed(1)
    draws = [morph.match_tokens(features, [8], split="random", generator=generator, backend=backend) for _ in range(2)]
    again = morph.match_tokens(
        features, [8], split="random", generator=torch.Generator().manual_seed(1), backend=backend
    )
    assert draws[0].index.equal(again.index)
    assert not draws[0].index.equal(draws[1].index)
    assert not draws[0].index[0].equal(draws[0].index[1])


def test_random_splits_are_uniform() -> None:
    """Each of 6 slots lies in the first half equally often: 4,000 draws, five standard deviations."""
    from dtm_triton.reference import shuffled_slots

    first = torch.zeros(6)
    for seed in range(40):
        slots = shuffled_slots(100, 6, (seed * 2**33 + 5, 1, 3), 0, "cpu")
        first += torch.zeros(100, 6).scatter_(1, slots[:, :3], 1).sum(0)
    assert (first / 4000 - 0.5).abs().max() < 5 * (0.25 / 4000) ** 0.5


@over_backends
def test_autocast_does_not_change_decisions(backend: str) -> None:
    features = make_features("clusters", 2, 40, 16, seed=7, dtype=torch.float32)
    plain = morph.match_tokens(features, [9, 9], backend=backend)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert morph.match_tokens(features, [9, 9], backend=backend).index.equal(plain.index)


@pytest.mark.parametrize("margin", [1e-2, 0.0])
def test_the_agreement_assertion_itself(margin: float) -> None:
    """It fails on a difference where the decision was clear, and only there."""
    actual, expected = torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 0]])
    if margin:
        with pytest.raises(AssertionError, match="differ"):
            assert_same_groups(actual, expected, torch.tensor([margin]))
    else:
        assert assert_same_groups(actual, expected, torch.tensor([margin])) == 0


def test_margins_of_a_known_case() -> None:
    """Token 0 is like token 1 by 1 and like token 3 by 0.8, token 2 like token 3 by 0.6: the gaps are 0.2 and 0.4."""
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]])
    case = Case(features, [1], dict(num_protected=0, split="alternating", keep_order=False))
    torch.testing.assert_close(decision_margins(case), torch.tensor([0.2]))
    case.options["threshold"] = 0.95  # token 0 passes by 0.05
    torch.testing.assert_close(decision_margins(case), torch.tensor([0.05]))
