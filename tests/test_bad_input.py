"""Bad input to the functions: an error that names the argument and the value, never a crash."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dtm_triton import morph, tome
from dtm_triton.groups import weighted_merge_tokens

X = torch.randn(2, 8, 3)
GROUPS = morph.match_tokens(X, [3])
OTHER = morph.match_tokens(torch.randn(2, 9, 3), [3])
EMPTY = morph.TokenGroups(GROUPS.index + 1, torch.cat([torch.zeros(2, 1), GROUPS.size], 1).int())
SCHEDULE = morph.MorphSchedule((3,))

CASES: list[tuple[Any, type[Exception], str]] = [
    (lambda: morph.match_tokens(X[0], [3]), ValueError, r"features must have shape \[B, N, C\], got \[8, 3\]"),
    (lambda: morph.match_tokens(X.long(), [3]), TypeError, r"features must be float16.*got torch.int64"),
    (lambda: morph.match_tokens([[1.0]], [3]), TypeError, r"features must be a tensor, got list"),
    (lambda: morph.match_tokens(X, [-3]), ValueError, r"every count in removed must be at least 0, got -3"),
    (lambda: morph.match_tokens(X, [0.5]), TypeError, r"every count in removed must be an integer, got 0.5"),
    (lambda: morph.match_tokens(X, 3), TypeError, r"removed must be a sequence of integers, got 3"),
    (lambda: morph.match_tokens(X, [3], num_protected=2), ValueError, r"num_protected must be 0 or 1, got 2"),
    (lambda: morph.match_tokens(X, [3], num_protected=-1), ValueError, r"num_protected must be 0 or 1, got -1"),
    (lambda: morph.match_tokens(X, [3], num_protected=0.5), TypeError, r"num_protected must be an integer, got 0.5"),
    (lambda: morph.match_tokens(X, [3], num_protected=True), TypeError, r"num_protected must be an integer, got True"),
    (lambda: morph.match_tokens(X, [3], split="half"), ValueError, r"split must be one of .*, got 'half'"),
    (lambda: morph.match_tokens(X, [3], generator=7), TypeError, r"generator must be a torch.Generator or None, got 7"),
    (lambda: morph.match_tokens(X, [3], keep_order=1), TypeError, r"keep_order must be a bool or None, got 1"),
    (lambda: morph.match_tokens(X, [3], threshold=True), TypeError, r"threshold must be a number or None, got True"),
    (lambda: morph.match_tokens(X, [3], threshold="0.5"), TypeError, r"threshold must be a number or None, got '0.5'"),
    (lambda: tome.bipartite_soft_matching(X, "a"), TypeError, r"r must be an integer, got 'a'"),
    (lambda: tome.bipartite_soft_matching(X, 2.5), TypeError, r"r must be an integer, got 2.5"),
    (lambda: morph.match_tokens(X, [3], threshold=float("nan")), ValueError, r"threshold must be finite, got nan"),
    (lambda: morph.match_tokens(X, [3], threshold=-float("inf")), ValueError, r"threshold must be finite, got -inf"),
    (lambda: morph.TokenMorph([3], threshold=float("inf")), ValueError, r"threshold must be finite, got inf"),
    (lambda: morph.TokenMerge([3], threshold=1j), TypeError, r"threshold must be a number or None, got 1j"),
    (lambda: morph.match_tokens(X, [3], backend="cuda"), ValueError, r"backend must be one of .*, got 'cuda'"),
    (lambda: morph.merge_tokens(X, GROUPS, "max"), ValueError, r"mode must be one of .*, got 'max'"),
    (lambda: morph.merge_tokens(X, OTHER), ValueError, r"groups of 2 x 9 tokens do not belong to x of shape"),
    (lambda: morph.merge_tokens(X[:1], GROUPS), ValueError, r"groups of 2 x 8 tokens do not belong to x"),
    (lambda: morph.merge_tokens(X, GROUPS.index), TypeError, r"groups must be TokenGroups, got Tensor"),
    (
        lambda: morph.merge_tokens(X, morph.TokenGroups(GROUPS.index.long(), GROUPS.size)),
        TypeError,
        r"groups.index must be int32, got",
    ),
    (
        lambda: morph.merge_tokens(X, morph.TokenGroups(GROUPS.index, GROUPS.size[0])),
        ValueError,
        r"must be \[B, N\] and \[B, G\], got",
    ),
    (
        lambda: morph.merge_tokens(X, morph.TokenGroups(GROUPS.index + 9, GROUPS.size)),
        ValueError,
        r"groups.index must lie in 0..4, got",
    ),
    (
        lambda: morph.merge_tokens(X, morph.TokenGroups(GROUPS.index - 1, GROUPS.size)),
        ValueError,
        r"groups.index must lie in 0..4, got",
    ),
    (
        lambda: morph.merge_tokens(X, morph.TokenGroups(GROUPS.index, GROUPS.size + 1)),
        ValueError,
        r"groups.size must count",
    ),
    (lambda: morph.unmerge_tokens(X[:, :5], tuple(GROUPS)), TypeError, r"groups must be TokenGroups, got tuple"),
    (lambda: morph.merge_tokens(X, EMPTY), ValueError, r"groups.size must be 0 behind the last group only, got one"),
    (
        lambda: weighted_merge_tokens(X, X, GROUPS),
        ValueError,
        r"weight must be \[2, 8, 1\] on cpu like x, got \[2, 8, 3\]",
    ),
    (lambda: weighted_merge_tokens(X, X[:, :4, :1], GROUPS), ValueError, r"weight must be .* like x, got \[2, 4, 1\]"),
    (lambda: weighted_merge_tokens(X, X[..., :1].int(), GROUPS), TypeError, r"weight must be float16.*got torch.int32"),
    (lambda: weighted_merge_tokens(X, X[..., :1].to("meta"), GROUPS), ValueError, r"weight must be .* on meta"),
    (
        lambda: weighted_merge_tokens(X, X[..., 0], GROUPS),
        ValueError,
        r"weight must have shape \[B, N, C\], got \[2, 8\]",
    ),
    (lambda: weighted_merge_tokens(X, X[..., :1], OTHER), ValueError, r"groups of 2 x 9 tokens do not belong to x"),
    (lambda: morph.match_tokens(X.to_sparse(), [3]), TypeError, r"features must be dense, got torch.sparse_coo"),
    (lambda: morph.merge_tokens(X.to("meta"), GROUPS), ValueError, r"groups.index is on cpu but x is on meta"),
    (lambda: morph.unmerge_tokens(X, GROUPS), ValueError, r"groups of 2 x 5 groups do not belong to merged of shape"),
    (lambda: morph.morph_tokens(X[..., 0], GROUPS), ValueError, r"x must have shape \[B, N, C\], got \[2, 8\]"),
    (lambda: morph.morph_loss(X, X[:, :4], GROUPS), ValueError, r"targets must .*, got \[2, 4, 3\]"),
    (lambda: morph.morph_loss(X, X.to("meta"), GROUPS), ValueError, r"targets must be on .* cpu, got meta"),
    (lambda: morph.morph_loss(X, X, OTHER), ValueError, r"groups of 2 x 9 tokens do not belong to outputs"),
    (lambda: morph.morph_loss(X, X, GROUPS, "huber"), ValueError, r"kind must be one of .*, got 'huber'"),
    (lambda: morph.morph_loss(X, X, GROUPS, beta=-1), ValueError, r"beta must be finite and not negative, got -1"),
    (lambda: morph.morph_loss(X, X, GROUPS, beta=float("nan")), ValueError, r"beta must be finite .*got nan"),
    (lambda: morph.morph_loss(X, X, GROUPS, beta="2"), TypeError, r"beta must be a number, got '2'"),
    (lambda: morph.morph_loss(X, X, GROUPS, normalize_target=1), TypeError, r"normalize_target must be a bool, got 1"),
    (lambda: morph.dtm_loss(X, X, []), ValueError, r"schedules must hold at least one schedule, got none"),
    (lambda: morph.dtm_loss(X, X, [3, 3]), TypeError, r"schedules must be Morph.*, got \[3, 3\]"),
    (lambda: morph.dtm_loss(X, X, torch.ones(2, 3)), ValueError, r"schedules as a tensor must be int32 \[L, K\]"),
    (lambda: morph.dtm_loss(X, X, -torch.ones(2, 3).int()), ValueError, r"schedules must not be negative, got"),
    (lambda: morph.dtm_loss(X, X, SCHEDULE, split="odd"), ValueError, r"split must be one of .*, got 'odd'"),
    (lambda: morph.TokenMorph([3], num_protected=5), ValueError, r"num_protected must be 0 or 1, got 5"),
    (lambda: morph.TokenMerge([3])(X.int()), TypeError, r"x must be float16.*got torch.int32"),
    (lambda: morph.DTMLoss(num_schedules=0), ValueError, r"num_schedules must be at least 1, got 0"),
    (lambda: morph.DTMLoss(num_schedules=1.5), TypeError, r"num_schedules must be an integer, got 1.5"),
    (lambda: morph.DTMLoss(max_removed=-1), ValueError, r"max_removed must be at least 0, got -1"),
    (lambda: morph.DTMLoss(max_iterations=0), ValueError, r"max_iterations must be at least 1, got 0"),
    (lambda: morph.DTMLoss(kind="l3"), ValueError, r"kind must be one of .*, got 'l3'"),
    (lambda: morph.DTMLoss()(X, X[:1]), ValueError, r"targets must have the shape of outputs"),
    (
        lambda: morph.DTMLoss().load_state_dict({"_extra_state": torch.zeros(3)}),
        ValueError,
        r"state must be that of a CPU",
    ),
    (lambda: tome.bipartite_soft_matching(X, 2, distill_token=True), ValueError, r"needs class_token=True"),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES, ids=[message[:60] for _, _, message in CASES])
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_more_removals_than_possible_are_capped() -> None:
    groups = morph.match_tokens(X, [10**30, 10**12, 2**31, 2**63, 10**12])
    assert groups.num_groups == 1 and groups.size.tolist() == [[8], [8]]
    assert morph.match_tokens(X, [100], num_protected=1).num_groups == 5


def test_triton_asked_for_where_it_cannot_run_says_why() -> None:
    with pytest.raises(ValueError, match=r"backend='triton' cannot run on meta: "):
        morph.match_tokens(X.to("meta"), [3], backend="triton")
