"""Baselines from checkouts of the released programs, tried on a stand-in that this test writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dtm_triton.dtm import DTMLoss
from dtm_triton.measure import released
from dtm_triton.measure.baselines import build_call
from dtm_triton.measure.cases import Case, call, make_inputs

CPU = torch.device("cpu")

STAND_IN = '''
"""The interface of a released program's matching, over this library's own functions."""
from dtm_triton import tome

def bipartite_soft_matching(metric, r, class_token=False, distill_token=False):
    return tome.bipartite_soft_matching(metric, r, class_token, distill_token, backend="reference")

merge_wavg = tome.merge_wavg
merge_source = tome.merge_source
'''


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for file in released.FILES.values():
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).write_text(STAND_IN)
    return tmp_path


def case(op: str) -> Case:
    schedules = {"match": ((9, 6, 4, 3),), "dtm_loss": ((9, 6, 4), (1,)), "tome_step": ((3,),)}[op]
    protected = int(op == "tome_step")
    return Case(op=op, batch=2, tokens=30, channels=4, dtype=torch.float32, schedules=schedules, protected=protected)


@pytest.mark.parametrize(("program", "op"), [(program, op) for program, ops in released.OPS.items() for op in ops])
def test_a_released_program_computes_the_same(program: str, op: str, checkout: Path) -> None:
    """Else comparing its time with ours would compare different things."""
    modules = {program: released.load(program, checkout)}
    inputs = make_inputs(case(op), CPU)
    function = build_call(program, case(op), inputs, modules, 0.0)
    assert function is not None
    actual, expected = function(), call(case(op), inputs, "reference")()
    if op == "match":  # it gives the dense source matrix
        source = actual[0]
        torch.testing.assert_close(source.argmax(1).int(), expected[0])
        torch.testing.assert_close(source.sum(2).int(), expected[1])
        return
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_a_program_does_not_do_is_left_out(checkout: Path) -> None:
    merge = replace(case("match"), op="merge")
    modules = {"tome": released.load("tome", checkout)}
    assert build_call("tome", merge, make_inputs(merge, CPU), modules, 0.0) is None
    assert build_call("dtm", case("match"), make_inputs(case("match"), CPU), modules, 0.0) is None, "not given"


def test_a_folder_that_is_no_checkout_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(released.NotReleased, match=r"bm/merge\.py: not found; --dtm takes"):
        released.load("dtm", tmp_path)


def test_a_file_without_the_functions_says_which(checkout: Path) -> None:
    (checkout / released.FILES["tome"]).write_text("def merge_wavg(): ...")
    with pytest.raises(released.NotReleased, match="has no function bipartite_soft_matching, merge_source"):
        released.load("tome", checkout)


def test_a_file_that_does_not_import_says_why(checkout: Path) -> None:
    (checkout / released.FILES["dtm"]).write_text("import a_package_that_is_not_there")
    with pytest.raises(released.NotReleased, match="cannot be imported: ModuleNotFoundError"):
        released.load("dtm", checkout)


@pytest.mark.parametrize("num_protected", [0, 1])
def test_the_released_loss_takes_the_place_of_ours(checkout: Path, num_protected: int) -> None:
    """The same draws, groups, loss and gradient: then a step's time differs by the operations alone."""
    ours = DTMLoss(max_removed=12, max_iterations=4, num_protected=num_protected)
    theirs = released.ReleasedLoss(ours, released.load("dtm", checkout))
    targets = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for loss in (ours, theirs):
        outputs = torch.zeros_like(targets).requires_grad_()
        loss.manual_seed(3)
        value = loss(outputs, targets, loss.match(targets))
        results.append((value.detach(), *torch.autograd.grad(value, outputs)))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][0] > 0 and not torch.equal(ours.draw(16), ours.manual_seed(3).draw(16)), "draws move on"


def test_the_released_loss_says_what_it_is_not_for(checkout: Path) -> None:
    module = released.load("dtm", checkout)
    for settings in ({"kind": "cosine"}, {"normalize_target": True}, {"split": "random"}):
        with pytest.raises(ValueError, match="ours must be smooth_l1"):
            released.ReleasedLoss(DTMLoss(**settings), module)
