"""The same bits on every call, on full shapes: a race or a missing barrier would show as a moving result."""

from __future__ import annotations

import pytest
import torch
from on_gpu import CASES, DEVICE, ids, needs_gpu

from dtm_triton.measure import gate
from dtm_triton.measure.cases import Case, call, make_inputs

pytestmark = needs_gpu

CALLS = 20


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_the_same_bits_on_repeated_calls(case: Case) -> None:
    function = call(case, make_inputs(case, DEVICE), "triton")
    first = [result.clone() for result in function()]
    for _ in range(CALLS):
        for result, expected in zip(function(), first, strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_right_on_fresh_inputs(case: Case) -> None:
    for seed in range(3):
        gate.check(case, "triton", DEVICE, seed)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_the_same_bits_beside_other_work(case: Case) -> None:
    """Programs start in another order when the GPU is shared, and scratch memory holds what others left."""
    function = call(case, make_inputs(case, DEVICE), "triton")
    first = [result.clone() for result in function()]
    other, noise = torch.cuda.Stream(), torch.randn(2048, 2048, device=DEVICE)
    torch.cuda.synchronize()
    for _ in range(CALLS):
        with torch.cuda.stream(other):
            noise = (noise @ noise).tanh()
        for result, expected in zip(function(), first, strict=True):
            assert torch.equal(result, expected)
    torch.cuda.synchronize()
