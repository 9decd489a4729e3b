"""CUDA graphs: a captured call replays on new inputs and new schedules, and gives what a call outside a graph gives."""

from __future__ import annotations

import pytest
import torch
from on_gpu import DEVICE, LOSSES, SMALL, ids, needs_gpu

from dtm_triton import morph
from dtm_triton.measure.cases import Case, call, make_inputs
from dtm_triton.measure.overhead import capture

pytestmark = needs_gpu

CAPTURED = [case for case in SMALL if case.op in ("merge", "unmerge", "morph")]


@pytest.mark.parametrize("case", [*LOSSES, *CAPTURED], ids=ids([*LOSSES, *CAPTURED]))
def test_a_replay_reads_new_inputs(case: Case) -> None:
    inputs, fresh = make_inputs(case, DEVICE, 0), make_inputs(case, DEVICE, 1)
    graph, results = capture(call(case, inputs, "triton"))
    with torch.no_grad():
        inputs.features.copy_(fresh.features)
        if inputs.outputs is not None and fresh.outputs is not None:
            inputs.outputs.copy_(fresh.outputs)
    graph.replay()
    for result, expected in zip(results, call(case, inputs, "triton")(), strict=True):
        assert torch.equal(result, expected)


def test_a_replay_reads_new_schedules() -> None:
    """One graph serves all steps of a training that draws its schedule in each."""
    outputs, targets = (
        torch.randn(4, 196, 64, device=DEVICE, requires_grad=True),
        torch.randn(4, 196, 64, device=DEVICE),
    )
    removed = torch.zeros(2, 14, dtype=torch.int32, device=DEVICE)
    grad = torch.ones((), device=DEVICE)

    def step() -> tuple[torch.Tensor, ...]:
        loss = morph.dtm_loss(outputs, targets, removed)
        return loss, *torch.autograd.grad(loss, outputs, grad)

    removed[:] = 3
    graph, results = capture(step)
    for rows in ([[14] * 14, [98] + [0] * 13], [[0] * 14, [7] * 14]):
        removed.copy_(torch.tensor(rows, dtype=torch.int32))
        graph.replay()
        for result, expected in zip(results, step(), strict=True):
            assert torch.equal(result, expected)
        schedules = [morph.MorphSchedule(tuple(row)) for row in rows]
        assert torch.equal(results[0], morph.dtm_loss(outputs, targets, schedules).detach())


@pytest.mark.parametrize(("tokens", "removed"), [(196, [14] * 7), (576, [32] * 3), (1600, [800])])
def test_modules_are_captured(tokens: int, removed: list[int]) -> None:
    x, fresh = torch.randn(2, 2, tokens, 64, device=DEVICE)
    merge, replace = morph.TokenMerge(removed).to(DEVICE), morph.TokenMorph(removed).to(DEVICE)

    def step() -> tuple[torch.Tensor, ...]:
        merged, groups = merge(x)
        return merged, *groups, replace(x)

    graph, results = capture(step)
    x.copy_(fresh)
    graph.replay()
    for result, expected in zip(results, step(), strict=True):
        assert torch.equal(result, expected)


def test_a_random_split_is_captured_with_a_generator_on_the_gpu() -> None:
    """Replays of a registered generator draw anew, so the groups change from one to the next."""
    x = torch.randn(4, 196, 64, device=DEVICE)
    removed = torch.full((1, 7), 14, dtype=torch.int32, device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    assert morph.dtm_loss(x, x.flip(0), removed, split="random", generator=generator).isfinite()
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        loss = morph.dtm_loss(x, x.flip(0), removed, split="random", generator=generator)
    values = set()
    for _ in range(3):
        graph.replay()
        values.add(loss.item())
    assert len(values) == 3
