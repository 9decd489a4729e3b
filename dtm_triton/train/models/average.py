"""A frozen moving average of a network, updated in place: the teacher of data2vec and BYOL.

Works on the local part of sharded parameters; timm's ModelEmaV3 does not.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtm_triton.train.models.encoder import Encoder


def frozen_copy(network: Encoder) -> Any:
    """A copy without gradients, without drop path and without what `network.not_averaged` names.

    >>> from dtm_triton.train.models.student import MaskedStudent
    >>> student = MaskedStudent("vit_tiny_patch16_224", out_features=8, image_size=12, patch_size=2,
    ...                         model_kwargs={"embed_dim": 24, "depth": 2, "num_heads": 3})
    >>> len(list(student.parameters())) - len(list(frozen_copy(student).parameters()))
    2
    """
    average = copy.deepcopy(network)
    for name in network.not_averaged:
        setattr(average, name, nn.Identity())
    return average.requires_grad_(False).eval()


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, momentum: float) -> None:
    """Move every parameter of `average` to momentum * itself + (1 - momentum) * the network's of the same name.

    >>> old, new = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(old.weight), nn.init.ones_(new.weight)
    >>> follow(old, new, 0.75)
    >>> old.weight.item()
    0.25
    """
    current = dict(network.named_parameters())
    pairs = [(parameter, current[name]) for name, parameter in average.named_parameters()]
    assert all(isinstance(ours, DTensor) == isinstance(theirs, DTensor) for ours, theirs in pairs)
    local = [(_local(ours), _local(theirs)) for ours, theirs in pairs]
    torch._foreach_lerp_([ours for ours, _ in local], [theirs for _, theirs in local], 1 - momentum)


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
