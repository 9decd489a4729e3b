"""What is measured: an op, its shape and schedule; its inputs, one call of it, and the least work it can take.

B images, N tokens, C channels, L schedules, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtm_triton import matching, morph, ops, tome

OPS = ("match", "match_merge", "dtm_loss", "morph_loss", "merge", "unmerge", "morph", "tome_step")

METRIC_CHANNELS = 64
"""Channels of the keys that a ToMe step matches on; its tokens have the case's channels."""

LOSS_SCALE = 2.0**16
"""Without it the gradient of a mean over millions of elements is subnormal in float16."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op on one shape.

    >>> Case(op="match", batch=128, tokens=196, channels=512, schedules=((14,) * 14,)).name
    'match 128x196x512 bfloat16 14x14'
    """

    op: str
    batch: int
    tokens: int
    channels: int
    dtype: torch.dtype = torch.bfloat16
    schedules: tuple[tuple[int, ...], ...] = ()
    """Tokens removed in each iteration, a tuple for each schedule; only dtm_loss takes several."""
    protected: int = 0

    def __post_init__(self) -> None:
        assert self.op in OPS, self.op
        assert len(self.schedules) == 1 or (self.op == "dtm_loss" and self.schedules), self.schedules

    @property
    def name(self) -> str:
        """Unique, readable."""
        schedules = " and ".join(schedule_text(schedule) for schedule in self.schedules)
        protected = f" protected {self.protected}" if self.protected else ""
        return f"{self.op} {self.shape} {str(self.dtype).removeprefix('torch.')} {schedules}{protected}"

    @property
    def shape(self) -> str:
        """B x N x C."""
        return f"{self.batch}x{self.tokens}x{self.channels}"

    @property
    def num_groups(self) -> tuple[int, ...]:
        """Groups that each schedule leaves."""
        return tuple(morph.MorphSchedule(s).num_groups(self.tokens, self.protected) for s in self.schedules)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The tensors of one call."""

    features: Tensor
    """What is matched, merged, morphed or unmerged [B, N, C] ([B, G, C] to unmerge); the targets of a loss."""
    outputs: Tensor | None = None
    """The student's side of a loss [B, N, C], which requires a gradient."""
    tokens: Tensor | None = None
    """What a ToMe step merges [B, N, C]."""
    weights: Tensor | None = None
    """How many patches each of those stands for [B, N, 1]."""
    groups: morph.TokenGroups | None = None
    """For the ops that do not match."""
    removed: Tensor | None = None
    """The schedules of dtm_loss, int32 [L, K], on the features' device."""
    grad: Tensor | None = None
    """What comes back to a loss, float32 []: a loss scale, where float16 needs one."""


def schedule_text(schedule: tuple[int, ...]) -> str:
    """Iterations x tokens removed in each.

    >>> schedule_text((14,) * 7), schedule_text((5, 4))
    ('7x14', '5+4')
    """
    if len(set(schedule)) == 1:
        return f"{len(schedule)}x{schedule[0]}"
    return "+".join(map(str, schedule)) or "0x0"


def gpu_cases() -> list[Case]:
    """What is measured, and tuned, on a GPU."""
    full, average = ((14,) * 14,), ((14,) * 7,)
    match = Case(op="match", batch=128, tokens=196, channels=512, schedules=full)
    loss = replace(match, op="dtm_loss", schedules=average * 2)
    merge = replace(match, op="merge", channels=768, schedules=average)
    step = Case(op="tome_step", batch=256, tokens=197, channels=768, schedules=((16,),), protected=1)
    main = [
        match,
        loss,
        replace(loss, op="morph_loss", schedules=average),
        merge,
        replace(merge, op="unmerge"),
        replace(merge, op="morph"),
    ]
    return [
        *main,
        *(replace(case, dtype=dtype) for dtype in (torch.float16, torch.float32) for case in main),
        replace(match, schedules=average),
        replace(match, schedules=((98,),)),
        replace(match, batch=8),
        replace(match, op="match_merge", schedules=average),
        replace(loss, batch=16),
        step,
        replace(step, tokens=577),
        replace(match, batch=32, tokens=576, schedules=((32,) * 9,)),
        replace(match, batch=32, tokens=1024, schedules=((64,) * 8,)),
        replace(match, batch=8, tokens=4096, channels=320, schedules=((2048,),)),
        replace(match, batch=2, tokens=16384, channels=320, schedules=((8192,),)),
    ]


def cpu_cases() -> list[Case]:
    """What is measured on a machine without a GPU."""
    match = Case(op="match", batch=16, tokens=196, channels=512, dtype=torch.float32, schedules=((14,) * 14,))
    average = ((14,) * 7,)
    return [
        match,
        replace(match, schedules=average),
        replace(match, schedules=((98,),)),
        replace(match, op="dtm_loss", schedules=average * 2),
        replace(match, op="morph_loss", schedules=average),
        replace(match, op="tome_step", tokens=197, channels=768, schedules=((16,),), protected=1),
    ]


def make_inputs(case: Case, device: torch.device, seed: int = 0) -> Inputs:
    """Fresh random inputs; equal seeds give equal ones.

    >>> case = Case(op="merge", batch=1, tokens=8, channels=4, schedules=((3,),))
    >>> make_inputs(case, torch.device("cpu")).groups.num_groups
    5
    """
    generator = torch.Generator(device).manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).to(case.dtype)

    batch, tokens, channels = case.batch, case.tokens, case.channels
    if case.op == "tome_step":
        weights = torch.randint(1, 5, (batch, tokens, 1), device=device, generator=generator).to(case.dtype)
        return Inputs(
            features=random(batch, tokens, METRIC_CHANNELS), tokens=random(batch, tokens, channels), weights=weights
        )
    groups = removed = outputs = grad = None
    if case.op in ("morph_loss", "merge", "unmerge", "morph"):
        groups = morph.match_tokens(
            random(batch, tokens, 16), case.schedules[0], num_protected=case.protected, backend="portable"
        )
    if case.op == "dtm_loss":
        removed = matching.schedules_tensor([morph.MorphSchedule(s) for s in case.schedules]).to(device)
    if case.op in ("dtm_loss", "morph_loss"):
        outputs = random(batch, tokens, channels).requires_grad_()
        grad = torch.tensor(LOSS_SCALE if case.dtype == torch.float16 else 1.0, device=device)
    rows = case.num_groups[0] if case.op == "unmerge" else tokens
    return Inputs(features=random(batch, rows, channels), outputs=outputs, groups=groups, removed=removed, grad=grad)


def call(case: Case, inputs: Inputs, backend: str) -> Callable[[], tuple[Tensor, ...]]:
    """One call of the op under `backend`; losses run forward and backward and give the loss and the gradient.

    >>> case = Case(op="match", batch=1, tokens=8, channels=4, dtype=torch.float32, schedules=((3,),))
    >>> index, size = call(case, make_inputs(case, torch.device("cpu")), "portable")()
    >>> index.shape, size.shape
    (torch.Size([1, 8]), torch.Size([1, 5]))
    """
    return lambda: _run(case, inputs, backend)


def _run(case: Case, inputs: Inputs, backend: str) -> tuple[Tensor, ...]:
    x, groups, protected = inputs.features, inputs.groups, case.protected
    if case.op == "match":
        return morph.match_tokens(x, case.schedules[0], num_protected=protected, backend=backend)
    if case.op == "match_merge":
        return _match_merge(case, x, backend)
    if case.op == "tome_step":
        assert inputs.tokens is not None
        merge, _ = tome.bipartite_soft_matching(x, case.schedules[0][0], class_token=protected > 0, backend=backend)
        return tome.merge_wavg(merge, inputs.tokens, inputs.weights)
    if case.op == "dtm_loss":
        assert inputs.outputs is not None and inputs.removed is not None
        loss = morph.dtm_loss(inputs.outputs, x, inputs.removed, num_protected=protected, backend=backend)
        return loss, *torch.autograd.grad(loss, inputs.outputs, inputs.grad)
    assert groups is not None
    if case.op == "morph_loss":
        assert inputs.outputs is not None
        loss = morph.morph_loss(inputs.outputs, x, groups, backend=backend)
        return loss, *torch.autograd.grad(loss, inputs.outputs, inputs.grad)
    if case.op == "merge":
        return (morph.merge_tokens(x, groups, backend=backend),)
    if case.op == "unmerge":
        return (morph.unmerge_tokens(x, groups, backend=backend),)
    return (morph.morph_tokens(x, groups, backend=backend),)


def _match_merge(case: Case, x: Tensor, backend: str) -> tuple[Tensor, ...]:
    """What TokenMerge does, with a backend to choose; the reference matches first and then merges."""
    if backend == "reference":
        groups = morph.match_tokens(x, case.schedules[0], num_protected=case.protected, backend=backend)
        return morph.merge_tokens(x, groups, backend=backend), *groups
    removed = matching.schedules_tensor([morph.MorphSchedule(case.schedules[0])])
    seed, (num_groups,) = torch.zeros(1, dtype=torch.int64), case.num_groups
    kept = case.protected > 0
    merged, index, size = ops.match_merge(x, removed, seed, num_groups, case.protected, False, kept, None, backend)
    return merged, index[0], size[0, :, :num_groups]


def bytes_moved(case: Case) -> int:
    """The least bytes to move: every input read once, every output written once.

    A loss moves as well what its forward must leave for its backward, once each way: a row per group and schedule, or
    one per token, whichever is less.

    >>> bytes_moved(Case(op="unmerge", batch=1, tokens=8, channels=4, schedules=((3,),))) == 2 * (8 + 5) * 4 + 4 * 8
    True
    """
    width = case.dtype.itemsize
    rows = case.batch * case.channels * width  # one token of every image
    index, groups = 4 * case.batch * case.tokens, sum(case.num_groups)
    sizes = 4 * case.batch * groups
    all_tokens, merged = rows * case.tokens, rows * groups
    if case.op == "match":
        return all_tokens + index + sizes
    if case.op == "match_merge":
        return all_tokens + index + sizes + merged
    if case.op == "dtm_loss":
        return 3 * all_tokens + 2 * min(merged, all_tokens)
    if case.op == "morph_loss":
        return 3 * all_tokens + 2 * min(merged, all_tokens) + index + sizes
    if case.op == "tome_step":
        metric = case.batch * case.tokens * METRIC_CHANNELS * width
        return metric + all_tokens + merged + case.batch * (case.tokens + groups) * width
    return {
        "merge": all_tokens + index + sizes + merged,
        "unmerge": merged + index + all_tokens,
        "morph": 2 * all_tokens + index + sizes,
    }[case.op]


def flops(case: Case) -> int:
    """The least operations: each inner product of two tokens that is needed, once; else an addition per element.

    One iteration needs those between its halves; several need all of them, half of the matrix by symmetry. The
    schedules of a loss share them.

    >>> flops(Case(op="match", batch=1, tokens=8, channels=4, schedules=((3,),))) == 2 * 4 * 4 * 4
    True
    """
    tokens, elements = case.tokens, case.batch * case.tokens * case.channels
    once = all(sum(count > 0 for count in schedule) <= 1 for schedule in case.schedules)
    pairs = (tokens + 1) // 2 * (tokens // 2) if once else tokens * (tokens + 1) // 2
    channels = METRIC_CHANNELS if case.op == "tome_step" else case.channels
    products = 2 * case.batch * pairs * channels
    morphing = (1 + 2 * len(case.schedules)) * elements  # the difference; then a sum each way for each schedule
    return {
        "match": products,
        "match_merge": products + elements,
        "dtm_loss": products + morphing,
        "morph_loss": morphing,
        "merge": elements,
        "unmerge": 0,
        "morph": elements,
        "tome_step": products + 2 * elements,
    }[case.op]
