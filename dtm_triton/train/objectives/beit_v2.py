"""BEiT v2-style pre-training: predict which code of a codebook each morphed teacher token has."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from dtm_triton.groups import TokenGroups, morph_tokens
from dtm_triton.train.config import CodebookConfig, PretrainConfig
from dtm_triton.train.data.augment import augment
from dtm_triton.train.models.keeping import take
from dtm_triton.train.models.student import CodeStudent
from dtm_triton.train.objectives.tokens import TokenObjective

RARE = 0.01  # a code with less than this share of the mean code's tokens starts anew


class Codebook(nn.Module):
    """Spherical k-means that follows the tokens it sees: codes [K, C] of length 1, the same in all processes.

    Codes are constant within a step; `update` moves them by the statistics of all processes' tokens since the last one,
    averaged over steps. A code that hardly any token has becomes one of the tokens seen last. All of its state is in
    state_dict().

    >>> book = Codebook(CodebookConfig(codes=4, momentum=0.0), 2)
    >>> tokens = torch.tensor([[3.0, 0.1], [2.0, -0.1], [0.0, 1.0], [0.0, 5.0]])
    >>> for _ in range(3): book.observe(tokens); book.update()
    >>> index = book(tokens)
    >>> bool((book.codes[index] - F.normalize(tokens, dim=1)).abs().max() < 0.1)
    True
    """

    codes: Tensor
    sums: Tensor
    counts: Tensor
    new_sums: Tensor
    new_counts: Tensor
    last: Tensor

    def __init__(self, config: CodebookConfig, features: int) -> None:
        super().__init__()
        self.momentum = config.momentum
        shape = (config.codes, features)
        self.register_buffer("codes", F.normalize(torch.randn(shape), dim=1))
        self.register_buffer("sums", torch.zeros(shape))
        self.register_buffer("counts", torch.zeros(config.codes))
        for name, like in (("new_sums", self.sums), ("new_counts", self.counts), ("last", self.sums)):
            self.register_buffer(name, torch.zeros_like(like), persistent=False)  # empty between steps

    def forward(self, tokens: Tensor) -> Tensor:
        """The nearest code by cosine of tokens [..., C]: int64 [...]."""
        with torch.autocast(tokens.device.type, enabled=False):
            return (tokens.float() @ self.codes.T).argmax(-1)

    @torch.no_grad()
    def observe(self, tokens: Tensor) -> None:
        """Count tokens [M, C] for the next update."""
        unit = F.normalize(tokens.float(), dim=1)
        index = self(unit)
        self.new_sums.index_add_(0, index, unit)
        self.new_counts.index_add_(0, index, torch.ones_like(unit[:, 0]))
        spread = torch.arange(len(self.codes), device=unit.device) * max(len(unit) // len(self.codes), 1)
        self.last.copy_(unit[spread % len(unit)])

    @torch.no_grad()
    def update(self) -> None:
        """Move the codes; all processes call it after the same step."""
        rank, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        mine = torch.arange(len(self.codes), device=self.codes.device) % count == rank  # each offers a share of `last`
        seen = torch.cat([self.new_sums, self.new_counts[:, None], self.last * mine[:, None]], dim=1)
        if count > 1:
            dist.all_reduce(seen)
        sums, counts, last = seen.split([self.codes.shape[1], 1, self.codes.shape[1]], dim=1)
        self.sums.lerp_(sums, 1 - self.momentum)
        self.counts.lerp_(counts[:, 0], 1 - self.momentum)
        mean = self.counts.mean()
        rare = self.counts < RARE * mean
        self.sums.copy_(torch.where(rare[:, None], last * mean, self.sums))
        self.counts.copy_(torch.where(rare, mean, self.counts))
        self.codes.copy_(F.normalize(self.sums, dim=1))
        self.new_sums.zero_()
        self.new_counts.zero_()


class BeitV2(TokenObjective):
    """Cross-entropy between the student's logits and the codes of morphed teacher tokens, at masked patches.

    As in BEiT v2 (arXiv 2208.06366): a codebook of unit vectors compared by cosine, 8192 codes, a linear head,
    cross-entropy on masked patches. As in DTM: teacher and student tokens are morphed by the same groups first, and the
    loss is the mean over schedules. Ours: no tokeniser is trained before; the codes are k-means centres of the
    teacher's morphed tokens, which follow the training (`Codebook`); there is no patch aggregation through a [CLS]
    bottleneck.
    `loss.kind`, `loss.beta` and `loss.normalize_target` are not used: a code has no size.
    """

    def __init__(self, network: CodeStudent, teacher: nn.Module, config: PretrainConfig, features: int) -> None:
        super().__init__(network, teacher, config)
        self.codebook = Codebook(config.codebook, features)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        images = augment(batch)
        targets, partition = self.look(batch, images)
        targets, places = take(targets, partition.kept), partition.masked_among_kept
        groups = self._groups(targets)
        with torch.no_grad():
            chosen = torch.stack([take(morph_tokens(targets, each), places) for each in groups])
            codes = self.codebook(chosen)
        logits = self.network(self.normalise(images), partition, groups)
        if self.training:
            self.codebook.observe(chosen.flatten(0, 2))
        share = self.codebook.counts / self.codebook.counts.sum().clamp(min=1e-12)
        used = torch.special.entr(share).sum().exp()  # perplexity: so many equally frequent codes
        return {"loss": F.cross_entropy(logits.float().flatten(0, 2), codes.flatten()), "codes_used": used}

    def after_step(self, progress: float) -> None:
        super().after_step(progress)
        self.codebook.update()

    def _groups(self, targets: Tensor) -> list[TokenGroups]:
        matching = self.match(targets)
        if matching is None:  # every token is its own group
            batch, count = targets.shape[:2]
            index = torch.arange(count, dtype=torch.int32, device=targets.device).expand(batch, -1)
            return [TokenGroups(index, torch.ones_like(index))]
        index, size, _ = self.beside.join(matching, targets.device)
        return [TokenGroups(*pair) for pair in zip(index, size, strict=True)]
