"""The nn.Modules hold settings; what they compute is what the functions compute."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import DEVICE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dtm_triton import groups, matching, modules, morph

X = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0))


def test_token_morph_and_merge_are_the_functions() -> None:
    schedule = morph.MorphSchedule.uniform(6, 2)
    features = torch.randn(2, 16, 4)
    for chosen in (X, features):
        groups = morph.match_tokens(chosen, schedule)
        extra = () if chosen is X else (features,)
        assert morph.TokenMorph(schedule)(X, *extra).equal(morph.morph_tokens(X, groups))
        merged, merged_groups = morph.TokenMerge(schedule)(X, *extra)
        torch.testing.assert_close(merged, morph.merge_tokens(X, groups))
        assert merged_groups.index.equal(groups.index) and merged_groups.size.equal(groups.size)


def test_token_merge_is_differentiable() -> None:
    x = X.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: morph.TokenMerge([4, 3])(z)[0], x)


def test_a_protected_token_and_a_random_split() -> None:
    merge = morph.TokenMerge([7, 7], num_protected=1, split="random")
    first, groups = merge(X)
    assert first[:, 0].equal(X[:, 0]) and (groups.index[:, 0] == 0).all()
    assert not merge(X)[1].index.equal(groups.index)


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.6, 1.0])
def test_modules_pass_the_threshold_on(threshold: float) -> None:
    groups = morph.match_tokens(X, [6, 4], threshold=threshold)
    assert groups.size.shape == (2, 16) and (threshold > -1) == (groups.count.max().item() > 6)
    options = dict(threshold=threshold)
    assert morph.TokenMorph([6, 4], **options)(X).equal(morph.morph_tokens(X, groups))
    for extra in ((), (X.clone(),)):
        merged, found = morph.TokenMerge([6, 4], **options)(X, *extra)
        torch.testing.assert_close(merged, morph.merge_tokens(X, groups))
        assert found.index.equal(groups.index) and found.size.equal(groups.size)
        assert merged.shape == X.shape and (merged[groups.size == 0] == 0).all()
        assert morph.unmerge_tokens(merged, found).shape == X.shape


@pytest.mark.parametrize("kind", [morph.TokenMorph, morph.TokenMerge])
def test_the_schedule_goes_where_the_module_goes(kind: type[morph.TokenMorph]) -> None:
    """It is a buffer, so that no call copies it from the host; but no state, and nothing can change it."""
    module = kind([4, 3])
    assert module.state_dict() == {} and module.removed.tolist() == [[4, 3]]
    assert module.to("meta").removed.device.type == "meta"
    assert module.to_empty(device="cpu").removed.tolist() == [[4, 3]]
    assert module.half().removed.dtype == torch.int32 and module.double().removed.tolist() == [[4, 3]]
    with torch.device("meta"):
        assert kind([4, 3]).to_empty(device="cpu").removed.tolist() == [[4, 3]]
    expected = torch.utils._pytree.tree_leaves(module(X))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert all(a.equal(b) for a, b in zip(torch.utils._pytree.tree_leaves(twin(X)), expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"threshold": 0.3}, {"num_protected": 1}, {"split": "random"}], ids=str)
@pytest.mark.parametrize("kind", [morph.TokenMorph, morph.TokenMerge])
def test_modules_compile(kind: type[morph.TokenMorph], options: dict[str, Any]) -> None:
    module, results = kind([4, 3], **options), []
    for function in (module, torch.compile(module, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        results.append(torch.utils._pytree.tree_leaves(function(X)))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph")
@pytest.mark.parametrize("threshold", [None, 0.3])
def test_a_captured_module_replays(threshold: float | None) -> None:
    module, x = morph.TokenMerge([4, 3], threshold=threshold).cuda(), X.cuda()
    module(x)  # compiles the kernels
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged, groups = module(x)
    x.copy_(X.flip(0))
    graph.replay()
    expected, expected_groups = module(x)
    assert merged.equal(expected) and groups.index.equal(expected_groups.index)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="detects waits for a GPU")
def test_a_generator_on_the_gpu_is_not_waited_for() -> None:
    x, generator = X.cuda(), torch.Generator("cuda").manual_seed(0)
    module = morph.TokenMerge([4, 3]).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert matching.draw_seed("random", generator).is_cuda
        module(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    generator.manual_seed(0)
    seed = int(matching.draw_seed("random", generator))
    by_backend = []
    for backend in ("reference", "portable", "triton"):
        generator.manual_seed(0)
        by_backend.append(morph.match_tokens(x, [4], split="random", generator=generator, backend=backend).index)
    assert seed >= 0 and all(index.equal(by_backend[0]) for index in by_backend)


def losses(module: morph.DTMLoss, count: int = 5) -> list[float]:
    return [module(X, X.flip(0)).item() for _ in range(count)]


def make() -> morph.DTMLoss:
    return morph.DTMLoss(max_removed=16, max_iterations=4)


def test_the_state_of_the_draw_is_saved() -> None:
    module = make().manual_seed(1)
    losses(module)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    expected = losses(module)
    buffer.seek(0)
    restored = make()
    restored.load_state_dict(torch.load(buffer, weights_only=True))
    assert losses(restored) == expected


def test_draws_follow_the_seed() -> None:
    assert losses(make().manual_seed(1)) == losses(make().manual_seed(1)) != losses(make().manual_seed(2))
    torch.manual_seed(7)
    first = losses(make())
    torch.manual_seed(7)
    assert losses(make()) == first
    module = make().manual_seed(4)
    twin = copy.deepcopy(module)
    assert losses(module) == losses(twin)


def test_dtm_loss_is_the_function_on_the_drawn_schedules() -> None:
    module = make().manual_seed(5)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        drawn = [morph.MorphSchedule.sample(16, 16, 4, generator) for _ in range(2)]
        assert module(X, X.flip(0)).equal(morph.dtm_loss(X, X.flip(0), drawn))


@pytest.mark.parametrize(
    "options",
    [dict(kind="cosine"), dict(kind="l1"), dict(beta=0.5), dict(normalize_target=True), dict(num_protected=1)],
    ids=str,
)
def test_dtm_loss_passes_its_settings_on(options: dict[str, Any]) -> None:
    module = morph.DTMLoss(num_schedules=1, max_removed=16, max_iterations=4, **options).manual_seed(5)
    drawn = morph.MorphSchedule.sample(16, 16, 4, torch.Generator().manual_seed(5))
    assert drawn.num_groups(16) < 16
    expected = morph.dtm_loss(X, X.flip(0), drawn, **options)
    assert module(X, X.flip(0)).equal(expected)
    assert not expected.equal(morph.dtm_loss(X, X.flip(0), drawn))


def test_modules_run_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [morph.TokenMerge([4, 3])(X)[0], make().manual_seed(1)(X, X.flip(0))]
    for module in (modules, groups, matching):
        monkeypatch.setattr(module, "choose_backend", lambda backend, device: backend or "triton")
    x = X.to(DEVICE)
    actual = [morph.TokenMerge([4, 3])(x)[0], make().manual_seed(1)(x, x.flip(0))]
    torch.testing.assert_close(actual, [result.to(DEVICE) for result in expected])


def test_a_default_device_changes_nothing() -> None:
    with torch.device("meta"):
        groups = morph.match_tokens(X, [4, 2])
        loss = make().manual_seed(1)(X, X.flip(0))
        merged = morph.TokenMerge([3], split="random")(X)[0]
    assert groups.index.equal(morph.match_tokens(X, [4, 2]).index)
    assert loss.equal(make().manual_seed(1)(X, X.flip(0))) and merged.device == X.device


def test_recomputation_sees_the_same_random_split() -> None:
    module = morph.TokenMorph([6, 3], split="random")
    weight = torch.randn(X.shape)

    def gradient(checkpointed: bool) -> Tensor:
        torch.manual_seed(0)
        x = X.clone().requires_grad_()
        y = checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
        return torch.autograd.grad((y.square() * weight).sum(), x)[0]

    assert gradient(True).equal(gradient(False))


def test_groups_can_be_saved(tmp_path: Path) -> None:
    groups = morph.match_tokens(X, [4])
    torch.save(groups, tmp_path / "groups.pt")
    loaded = torch.load(tmp_path / "groups.pt", weights_only=True)
    assert isinstance(loaded, morph.TokenGroups) and loaded.index.equal(groups.index)


def test_training_with_the_module_moves_outputs_to_morphed_targets() -> None:
    """Gradient descent on the outputs alone, under schedules that merge now these tokens and now those."""
    outputs: Tensor = torch.zeros_like(X).requires_grad_()
    module = morph.DTMLoss(max_removed=4, max_iterations=2, kind="l2").manual_seed(0)
    for _ in range(300):
        loss = module(outputs, X)
        (grad,) = torch.autograd.grad(loss, outputs)
        outputs = (outputs - 0.3 * X.numel() * grad).detach().requires_grad_()
    assert (outputs - X).abs().max() < 1e-2


def test_repr_tells_the_settings() -> None:
    assert "removed=(3,), num_protected=1" in repr(morph.TokenMorph([3], num_protected=1))
    assert "threshold=0.5)" in repr(morph.TokenMerge([3], threshold=0.5))
    assert "num_schedules=2, max_removed=16" in repr(make())
