"""How many tokens a recipe's encoder and decoder meet, and what the network computes for an image.

Throwing patches away pays here: a block costs 2 T for each weight of its linear layers and 4 T^2 D for attention, on T
tokens of width D. Nothing is run, and no memory taken: the network is built on tensors without values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dtm_triton.train.build import build_network
from dtm_triton.train.config import PretrainConfig
from dtm_triton.train.models.autoencoder import MaskedAutoencoder
from dtm_triton.train.models.student import CodeStudent, MaskedStudent, ProjectedStudent
from dtm_triton.train.planning.sizes import target_features


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Of one image's forward pass through the trained network; targets, maps and averages come on top."""

    patches: int
    """Of the image, without class and register tokens."""
    encoder_tokens: int
    """Class and register tokens included, as below."""
    decoder_tokens: int
    """0 without a decoder."""
    encoder_flops: int
    """A multiplication and an addition are two."""
    decoder_flops: int
    """Of the decoder, or of the heads where there is none."""

    @property
    def flops(self) -> int:
        """Of both."""
        return self.encoder_flops + self.decoder_flops

    def describe(self) -> str:
        """One line for people."""
        decoder = f", {self.decoder_tokens} in the decoder" if self.decoder_tokens else ""
        tokens = f"{self.encoder_tokens} tokens in the encoder{decoder}"
        return f"each image of {self.patches} patches: {tokens}; {self.flops / 1e9:.3g} GFLOP forward"


def describe_budget(config: PretrainConfig, network: nn.Module) -> str:
    """A line for people; two where attention maps come after some epochs. network: the recipe's."""
    line, epochs = token_budget(config, network).describe(), config.attention.warmup_epochs
    if config.mask.kind != "attention" or not epochs:
        return line
    before = token_budget(config, network, warming_up=True).describe()
    return f"{before}\nafter {epochs} epoch{'s' if epochs > 1 else ''} {line}"


def token_budget(config: PretrainConfig, network: Any = None, *, warming_up: bool = False) -> Budget:
    """The budget of a recipe.

    network: the recipe's if it is there, else one is built without values.
    warming_up: before there are attention maps.
    """
    data, masked, thrown = config.data, config.mask.masked, config.mask.thrown
    if warming_up:
        masked, thrown = config.attention.warmup_masked, 0
    student, decoder = replace(config.student, weights=None), None
    if network is None:
        with torch.device("meta"):
            network = _network(config, student)
    backbone: Any = network.backbone
    patches, prefix = network.grid[0] * network.grid[1], int(backbone.num_prefix_tokens)
    kept = patches - thrown
    seen = prefix + kept - (masked if config.method == "mae" else 0)
    pixels = data.channels * student.patch_size**2
    encoder = 2 * patches * pixels * int(backbone.embed_dim) + _blocks(backbone.blocks, seen)
    if isinstance(network, MaskedAutoencoder):
        decoder = network.decoder
        rest = _linear([decoder.embed], seen) + _blocks(decoder.blocks, prefix + kept) + _linear([decoder.head], kept)
    elif config.method == "beit_v2":
        rest = config.loss.num_schedules * _linear([network.head], masked)
    elif config.method == "byol":  # every token, and their mean
        rest = _linear([network.head, network.predictor], kept + 1)
    else:
        rest = _linear([network.head], kept)
    views = 2 if config.method == "byol" else 1
    return Budget(
        patches=patches,
        encoder_tokens=seen,
        decoder_tokens=prefix + kept if decoder is not None else 0,
        encoder_flops=views * encoder,
        decoder_flops=views * rest,
    )


def _network(config: PretrainConfig, student: Any) -> Any:
    """The recipe's network with random weights."""
    data = config.data
    if config.method == "beit_v2":
        return build_network(CodeStudent, student, data, out_features=config.codebook.codes)
    if config.method == "byol":
        heads = config.projector
        return build_network(ProjectedStudent, student, data, hidden=heads.hidden, out_features=heads.features)
    width = target_features(config)
    if config.method == "mae":
        decoder = dict(width=config.decoder.width, depth=config.decoder.depth, heads=config.decoder.heads)
        return build_network(MaskedAutoencoder, student, data, out_features=width, **decoder)
    return build_network(MaskedStudent, student, data, out_features=width)


def _blocks(blocks: Iterable[Any], tokens: int) -> int:
    return sum(_linear([block], tokens) + 4 * tokens**2 * _attended(block) for block in blocks)


def _attended(block: Any) -> int:
    """Width of a block's attention, of several side by side their sum; what is built in an unknown way counts as 0."""
    width = 0
    for part in block.modules():
        if hasattr(part, "num_heads") and hasattr(part, "head_dim"):
            width += int(part.num_heads * part.head_dim)
        elif hasattr(part, "num_heads") and hasattr(part, "proj"):
            width += int(part.proj.in_features)
    return width


def _linear(modules: list[nn.Module], tokens: int) -> int:
    """Of all linear layers in the modules."""
    parts = (part for module in modules for part in module.modules() if isinstance(part, nn.Linear))
    return sum(2 * tokens * part.weight.numel() for part in parts)
