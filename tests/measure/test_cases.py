"""Cases: unique names, bytes and operations counted by hand, and calls that give what the op gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtm_triton import morph
from dtm_triton.measure.baselines import TITLES
from dtm_triton.measure.cases import (
    METRIC_CHANNELS,
    OPS,
    Case,
    bytes_moved,
    call,
    cpu_cases,
    flops,
    gpu_cases,
    make_inputs,
)
from dtm_triton.measure.ceilings import Ceilings
from dtm_triton.measure.estimate import estimate

CPU = torch.device("cpu")
SMALL = Case(op="match", batch=2, tokens=12, channels=8, dtype=torch.float32, schedules=((3, 2),))


def small(op: str) -> Case:
    if op == "tome_step":
        return replace(SMALL, op=op, schedules=((3,),), protected=1)
    return replace(SMALL, op=op, schedules=((3, 2), (1, 1)) if op == "dtm_loss" else SMALL.schedules)


def test_names_are_unique() -> None:
    names = [case.name for case in (*gpu_cases(), *cpu_cases())]
    assert len(set(names)) == len(names)
    assert not any("|" in name for name in (*names, *TITLES.values())), "they stand in Markdown tables"


def test_every_op_is_measured_on_a_gpu() -> None:
    assert {case.op for case in gpu_cases()} == set(OPS)
    assert {case.dtype for case in gpu_cases()} == {torch.bfloat16, torch.float16, torch.float32}


def test_matching_counted_by_hand() -> None:
    """Read 2 x 12 x 8 numbers; write a group for each token and a size for each of the 7 groups."""
    assert bytes_moved(SMALL) == 4 * (2 * 12 * 8 + 2 * 12 + 2 * 7)
    assert flops(SMALL) == 2 * 2 * 8 * (12 * 13 // 2)  # the triangle with its diagonal
    assert flops(replace(SMALL, schedules=((3,),))) == 2 * 2 * 8 * 6 * 6  # one half with the other


def test_a_loss_counted_by_hand() -> None:
    """Outputs, targets and the gradient; then 7 + 10 rows of slopes each way, which 12 rows of gradient undercut."""
    loss = small("dtm_loss")
    assert bytes_moved(loss) == 4 * 2 * 8 * (3 * 12 + 2 * 12)
    few = replace(loss, schedules=((3, 2),))
    assert bytes_moved(few) == 4 * 2 * 8 * (3 * 12 + 2 * 7)


def test_a_tome_step_counted_by_hand() -> None:
    """The keys, the tokens and their weights in; 9 tokens and their weights out."""
    step = replace(small("tome_step"), dtype=torch.float16)
    assert bytes_moved(step) == 2 * 2 * (12 * METRIC_CHANNELS + 12 * 8 + 9 * 8 + 12 + 9)


def test_the_goals_floors() -> None:
    """At the ceilings assumed for an H200: matching 6 us, the loss with an average schedule 30 us."""
    match, loss = gpu_cases()[:2]
    assert (match.batch, match.tokens, match.channels, match.schedules) == (128, 196, 512, ((14,) * 14,))
    assert estimate(match)["floor_us"] == pytest.approx(6.0, abs=0.1)
    assert loss.op == "dtm_loss" and estimate(loss)["floor_us"] == pytest.approx(30, abs=0.5)


def test_the_floor_is_the_longer_time() -> None:
    ceilings = Ceilings(copy_gb_s=1.0, matrix_tflop_s={"float32": 1.0})
    assert ceilings.floor_ms(2_000_000, 1_000_000_000, "float32") == pytest.approx(2.0)
    assert ceilings.floor_ms(2_000_000, 5_000_000_000, "float32") == pytest.approx(5.0)


@pytest.mark.parametrize("op", OPS)
def test_implementations_give_the_same(op: str) -> None:
    case = small(op)
    inputs = make_inputs(case, CPU, seed=3)
    for expected, actual in zip(call(case, inputs, "reference")(), call(case, inputs, "portable")(), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", OPS)
def test_inputs_follow_the_seed(op: str) -> None:
    first, same, other = (make_inputs(small(op), CPU, seed) for seed in (3, 3, 4))
    assert torch.equal(first.features, same.features) and not torch.equal(first.features, other.features)


def test_losses_run_backward() -> None:
    case = small("morph_loss")
    inputs = make_inputs(case, CPU)
    loss, grad = call(case, inputs, "portable")()
    assert inputs.outputs is not None and inputs.groups is not None
    expected = morph.morph_loss(inputs.outputs, inputs.features, inputs.groups)
    assert torch.equal(loss, expected) and grad.shape == inputs.outputs.shape and grad.abs().sum() > 0


def test_a_float16_gradient_does_not_underflow() -> None:
    case = replace(gpu_cases()[1], batch=8, dtype=torch.float16)
    _, grad = call(case, make_inputs(case, CPU), "portable")()
    assert (grad.abs() > torch.finfo(torch.float16).tiny).double().mean() > 0.9
