"""The nn.Modules hold settings; what they compute is what the functions compute."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor

from dtm_triton import morph

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
    merge = morph.TokenMerge([7, 7], num_protected=1, split="random", generator=torch.Generator().manual_seed(3))
    first, groups = merge(X)
    assert first[:, 0].equal(X[:, 0]) and (groups.index[:, 0] == 0).all()
    assert not merge(X)[1].index.equal(groups.index)


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
    assert "num_schedules=2, max_removed=16" in repr(make())
