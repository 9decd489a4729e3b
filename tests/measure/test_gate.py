"""The gate lets right implementations pass, on every op, and stops each kind of wrong one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dtm_triton import portable, portable_loss, reference
from dtm_triton.measure import gate
from dtm_triton.measure.cases import OPS, Case
from dtm_triton.measure.margins import ROUNDING, decision_margins

CPU = torch.device("cpu")
MATCH = Case(op="match", batch=4, tokens=30, channels=24, dtype=torch.float32, schedules=((6, 5, 4),))
CASES = {op: replace(MATCH, op=op) for op in OPS} | {
    "dtm_loss": replace(MATCH, op="dtm_loss", schedules=((6, 5), (3, 3, 3))),
    "tome_step": replace(MATCH, op="tome_step", schedules=((7,),), protected=1),
    "once": replace(MATCH, schedules=((11,),)),
    "protected": replace(MATCH, protected=1),
    "many": replace(MATCH, batch=1, tokens=300, schedules=((20, 20),)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_right_results_pass(case: Case, dtype: torch.dtype) -> None:
    for backend in ("portable", "reference"):
        gate.check(replace(case, dtype=dtype), backend, CPU)


def breaking(target: Any, name: str, change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """Patch a function of the portable implementation so that it returns something else."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *args, **options: change(right(*args, **options)))

    return patch


def swap_two_tokens(groups: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Exchange the groups of two tokens of one image: sizes stay right."""
    index, size, members = groups
    image = index[0, -1]
    other = int((image != image[0]).nonzero()[0])
    image[[0, other]] = image[[other, 0]]
    return index, size, members


def poke(x: Tensor) -> Tensor:
    """One element of a large tensor, off by a third of the largest."""
    x = x.clone()
    x.view(-1)[-1] += x.abs().max() / 3
    return x


def test_a_token_in_a_wrong_group_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(portable, "match", swap_two_tokens)(monkeypatch)
    for name in ("match", "match_merge", "dtm_loss", "protected", "once", "many"):
        with pytest.raises(AssertionError, match="wrong groups"):
            gate.check(CASES[name], "portable", CPU)


def test_every_chunk_of_images_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong token is in the last image."""
    monkeypatch.setattr(gate, "REPLAYED_BYTES", 8 * 2 * MATCH.tokens**2)  # two images at a time
    gate.check(CASES["match"], "portable", CPU)
    breaking(portable, "match", swap_two_tokens)(monkeypatch)
    with pytest.raises(AssertionError, match="wrong groups"):
        gate.check(CASES["match"], "portable", CPU)


def test_sizes_that_do_not_count_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(portable, "match", lambda groups: (groups[0], groups[1].roll(1, -1), groups[2]))(monkeypatch)
    with pytest.raises(AssertionError, match="sizes do not count"):
        gate.check(CASES["match"], "portable", CPU)


def test_a_tie_that_goes_to_the_later_slot_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tokens whose similarities tie exactly tell."""
    right = portable._Matching._best_partners

    def last_of_the_best(self: Any, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        best, partner = right(self, a, b.flip(1))
        return best, b.shape[1] - 1 - partner

    monkeypatch.setattr(portable._Matching, "_best_partners", last_of_the_best)
    with pytest.raises(AssertionError, match="though nothing rounds"):
        gate.check(CASES["once"], "portable", CPU)


@pytest.mark.parametrize(
    ("op", "target", "function"),
    [
        ("merge", portable, "merge"),
        ("match_merge", portable, "merge"),
        ("unmerge", portable, "unmerge"),
        ("morph", portable, "morph"),
        ("morph_loss", portable_loss, "loss_backward"),
        ("dtm_loss", portable_loss, "loss_backward"),
    ],
)
def test_one_wrong_element_is_caught(op: str, target: Any, function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(target, function, poke)(monkeypatch)
    with pytest.raises(AssertionError, match="is off by"):
        gate.check(replace(CASES[op], dtype=torch.bfloat16), "portable", CPU)


def test_many_small_errors_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each far below the bound on one element, but everywhere."""
    breaking(portable, "unmerge", lambda x: x + 0.01 * x.abs().max())(monkeypatch)
    with pytest.raises(AssertionError, match="of its norm"):
        gate.check(replace(CASES["unmerge"], dtype=torch.bfloat16), "portable", CPU)


def test_a_loss_off_by_a_thousandth_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(portable_loss, "loss_forward", lambda result: (1.001 * result[0], *result[1:]))(monkeypatch)
    with pytest.raises(AssertionError, match="loss is off by"):
        gate.check(CASES["dtm_loss"], "portable", CPU)


def test_a_not_a_number_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    breaking(portable, "morph", lambda x: x.index_fill(0, torch.tensor(0), torch.nan))(monkeypatch)
    with pytest.raises(AssertionError, match="is off by nan"):
        gate.check(CASES["morph"], "portable", CPU)


@pytest.mark.parametrize(("protected", "keep_order"), [(0, False), (0, True), (1, True)])
def test_the_replay_groups_as_the_reference(protected: int, keep_order: bool) -> None:
    features = torch.randn(8, 21, 6, generator=torch.Generator().manual_seed(2))
    schedule = (5, 4, 9, 0, 1)
    options = dict(num_protected=protected, random_split=False, keep_order=keep_order)
    expected, _, _ = reference.match(features.double(), torch.tensor([schedule]), 0, **options)
    groups, margins = decision_margins(features, schedule, protected, keep_order)
    assert torch.equal(groups.int(), expected[0])
    assert (margins > 0).all() and (margins < 1).all()


def test_margins_see_every_kind_of_close_decision() -> None:
    """Which partner; who is last to merge; in what order those that stay come (only where that matters)."""
    close = 1e-7
    a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    partner = torch.stack([a, a + close * b, b, a - 2 * close * b])[None]
    assert decision_margins(partner, [1], 0, True)[1] < ROUNDING
    last = torch.stack([a, a + 0.3 * b, a, b])[None]
    assert decision_margins(last, [1], 0, True)[1] < ROUNDING, "both sources like the same partner equally"
    assert decision_margins(last, [2], 0, True)[1] > ROUNDING, "both merge"
    e = torch.eye(6)
    staying = torch.stack([e[0], e[0], e[1], e[1] + e[2], e[3], e[3] + e[4]])[None]
    assert decision_margins(staying, [1], 0, False)[1] < ROUNDING, "the two that stay are equally similar"
    assert decision_margins(staying, [1], 0, True)[1] > ROUNDING
