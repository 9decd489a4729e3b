"""The DTM loss as an nn.Module that draws its schedules."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.library import custom_op

from dtm_triton import loss_ops, ops
from dtm_triton.backend import choose_backend
from dtm_triton.groups import check_tokens
from dtm_triton.losses import LossKind, check_loss, check_pair, matched_loss
from dtm_triton.matching import Split, check_matching, draw_seed
from dtm_triton.schedule import MorphSchedule, as_count


class Matching(NamedTuple):
    """What `DTMLoss.match` found: index, size and members, int32 [L, B, N], for L schedules."""

    index: Tensor  # type: ignore[assignment]  # a tuple has a method of that name
    size: Tensor
    members: Tensor


torch.serialization.add_safe_globals([Matching])  # so that torch.load(weights_only=True) takes what torch.save wrote


class DTMLoss(nn.Module):
    """`dtm_loss` with schedules drawn anew in every call, as the paper trains.

    num_schedules: schedules per call, L. max_removed and max_iterations bound the draw (`MorphSchedule.sample`; tokens
    beyond the image's are not counted). Other arguments and errors as in `dtm_loss`.
    forward(outputs [B, N, C], targets [B, N, C]) -> scalar. With a third argument, what `match(targets)` gave, nothing
    is drawn or matched: matching can then run on another CUDA stream while the student still computes the outputs.
    Works under torch.compile(fullgraph=True) without compiling again when the draw changes. The state of the draw is
    part of state_dict(); it starts from PyTorch's default generator, or from `manual_seed`. Data-parallel processes
    draw their own schedules when seeded differently: after loading one state_dict() in all of them, seed each again.
    Leave the loss out of activation checkpointing: it would draw other schedules when it computes again.
    Source: DTM, Algorithm 1 and section 3.3.

    >>> loss = DTMLoss(max_removed=12, max_iterations=3).manual_seed(0)
    >>> targets = torch.randn(2, 16, 8)
    >>> loss(targets, targets).item()
    0.0
    """

    def __init__(
        self,
        num_schedules: int = 2,
        max_removed: int = 196,
        max_iterations: int = 14,
        kind: LossKind = "smooth_l1",
        beta: float = 2.0,
        normalize_target: bool = False,
        num_protected: int = 0,
        split: Split = "alternating",
    ) -> None:
        super().__init__()
        MorphSchedule.sample(1, max_removed, max_iterations, torch.Generator())  # its errors name these arguments
        self.num_schedules = as_count("num_schedules", num_schedules, least=1)
        self.max_removed, self.max_iterations = int(max_removed), int(max_iterations)
        check_loss(kind, beta, normalize_target)
        check_matching(num_protected, split, None)
        self.kind, self.beta, self.normalize_target = kind, float(beta), normalize_target
        self.num_protected, self.split = int(num_protected), split
        self.manual_seed(int(torch.randint(2**63 - 1, (), device="cpu")))

    def manual_seed(self, seed: int) -> DTMLoss:
        """Start the draw anew from `seed`; returns the module."""
        self.draw_state = Generator().manual_seed(seed).get_state()
        return self

    def get_extra_state(self) -> Tensor:
        """The state of the draw, for state_dict()."""
        return self.draw_state.clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Continue the draw of a saved module. Raises ValueError when `state` is not the state of a CPU generator."""
        if not isinstance(state, Tensor) or state.shape != self.draw_state.shape or state.dtype != torch.uint8:
            raise ValueError(f"state must be that of a CPU generator, got {state!r:.80}")
        self.draw_state = state.cpu().clone()

    def draw(self, num_tokens: int) -> Tensor:
        """The schedules of one call on [B, num_tokens, C], int32 [L, max_iterations]: advances the draw.

        To replay a captured CUDA graph with new schedules, copy them into the tensor that `dtm_loss` was captured with.

        >>> DTMLoss(num_schedules=3, max_iterations=5).draw(196).shape
        torch.Size([3, 5])
        """
        return self._draw(as_count("num_tokens", num_tokens))[0]

    def match(self, targets: Tensor) -> Matching:
        """Draw schedules and match targets [B, N, C]: what `forward` does first."""
        check_tokens("targets", targets)
        removed, seed = self._draw(targets.shape[1])
        backend = choose_backend(None, targets.device)
        random_split, keep_order = self.split == "random", self.num_protected > 0
        options = (self.num_protected, random_split, keep_order, None)
        return Matching(*ops.match(targets.detach(), removed, seed, *options, backend))

    def forward(self, outputs: Tensor, targets: Tensor, matching: Matching | None = None) -> Tensor:
        check_pair(outputs, targets)
        backend = choose_backend(None, outputs.device)
        if matching is not None:
            return self._loss_of(outputs, targets, matching, backend)
        removed, seed = self._draw(outputs.shape[1])
        return matched_loss(
            outputs,
            targets,
            removed,
            seed,
            kind=self.kind,
            beta=self.beta,
            normalize_target=self.normalize_target,
            num_protected=self.num_protected,
            split=self.split,
            backend=backend,
        )

    def _draw(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        return _draw(self.draw_state, self.num_schedules, num_tokens, self.max_removed, self.max_iterations, self.split)

    def _loss_of(self, outputs: Tensor, targets: Tensor, matching: Matching, backend: str) -> Tensor:
        if not isinstance(matching, Matching):
            raise TypeError(f"matching must be what match() gave, got {matching!r:.80}")
        if matching.index.shape[1:] != outputs.shape[:2] or matching.index.device != outputs.device:
            wanted = f"{list(outputs.shape[:2])} tokens on {outputs.device}"
            found = f"{list(matching.index.shape[1:])} on {matching.index.device}"
            raise ValueError(f"matching must be of {wanted} like outputs, got {found}")
        save = torch.is_grad_enabled() and outputs.requires_grad
        options = (self.kind, self.beta, self.normalize_target, save, backend)
        return loss_ops.morph_loss(outputs, targets.detach(), *matching, *options)[0]

    def extra_repr(self) -> str:
        names = ("num_schedules", "max_removed", "max_iterations", "kind", "beta", "normalize_target")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in (*names, "num_protected", "split"))


@custom_op("dtm_triton::draw_schedules", mutates_args=("state",))
def _draw(
    state: Tensor, num_schedules: int, num_tokens: int, max_removed: int, max_iterations: int, split: str
) -> tuple[Tensor, Tensor]:
    """Schedules int32 [L, max_iterations] and a seed int64 [1]; a custom op so that a compiled loss draws anew too."""
    generator = Generator()
    generator.set_state(state)
    removed = torch.zeros(num_schedules, max_iterations, dtype=torch.int32, device="cpu")
    for row in removed:
        drawn = MorphSchedule.sample(max(num_tokens, 1), max_removed, max_iterations, generator).removed
        row[: len(drawn)] = torch.tensor(drawn, device="cpu")
    seed = draw_seed(split, generator)  # type: ignore[arg-type]
    state.copy_(generator.get_state())
    return removed, seed


@_draw.register_fake
def _(
    state: Tensor, num_schedules: int, num_tokens: int, max_removed: int, max_iterations: int, split: str
) -> tuple[Tensor, Tensor]:
    removed = torch.empty(num_schedules, max_iterations, dtype=torch.int32, device="cpu")
    return removed, torch.empty(1, dtype=torch.int64, device="cpu")
