"""The formulas of a plan: P parameters, n GPUs, bytes and seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dtm_triton.train.planning.facts import Facts

FLOAT, HALF = 4, 2
"""Bytes of a weight, gradient or moment, and of what travels in bfloat16."""


def traffic(parameters: int, gpus: int, strategy: str) -> float:
    """Bytes that each GPU sends in a step, by rings.

    ddp: all-reduce of float32 gradients, 2 (n - 1) / n of them. fsdp: bfloat16 weights are gathered for the forward and
    again for the backward, float32 gradients are scattered, each (n - 1) / n.

    >>> traffic(1000, 8, "ddp"), traffic(1000, 8, "fsdp"), traffic(1000, 1, "ddp")
    (7000.0, 7000.0, 0.0)
    """
    part = (gpus - 1) / gpus
    return part * parameters * (2 * FLOAT if strategy == "ddp" else 2 * HALF + FLOAT)


def held(parameters: int, teacher: int, gpus: int, strategy: str, *, average: bool = False) -> dict[str, float]:
    """Bytes that each GPU holds from step to step, by what they are; activations are not among them.

    fsdp divides the student's over the GPUs; a frozen teacher is whole in each. ddp sends gradients where they lie.

    >>> sum(held(1000, 500, 10, "ddp").values()), sum(held(1000, 500, 10, "fsdp").values())
    (18000.0, 3600.0)
    """
    share = parameters / gpus if strategy == "fsdp" else parameters
    found = {
        "weights": FLOAT * share,
        "gradients": FLOAT * share,
        "moments": 2 * FLOAT * share,
        "teacher": float(FLOAT * teacher),
    }
    if average:
        found["average"] = FLOAT * share
    return found


def checkpoint(parameters: int, *, average: bool = False) -> int:
    """Bytes of a checkpoint: weights, two moments, and the moving average where there is one.

    >>> checkpoint(1000), checkpoint(1000, average=True)
    (12000, 16000)
    """
    return FLOAT * parameters * (4 if average else 3)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole training run on `gpus`."""

    steps: int
    compute_s: float
    """Of a step, at the rate of one GPU."""
    traffic_s: float
    """Of a step, if nothing of it hid behind the computing."""

    def seconds(self, *, hidden: bool) -> float:
        """Of the run: with traffic wholly hidden behind computing, or not at all."""
        step = max(self.compute_s, self.traffic_s) if hidden else self.compute_s + self.traffic_s
        return self.steps * step


def run(facts: Facts, *, rate: float, parameters: int, gpus: int, batch: int, epochs: int) -> Run:
    """`epochs` over the images in steps of `batch`; what does not fill a batch is left out of every epoch.

    >>> found = run(Facts(), rate=2800.0, parameters=86_000_000, gpus=8, batch=1024, epochs=300)
    >>> found.steps, round(found.compute_s, 4), round(1e3 * found.traffic_s, 2)
    (375300, 0.0457, 2.01)
    """
    link = facts.inside if gpus <= facts.node.value else facts.between
    return Run(
        steps=epochs * (int(facts.images.value) // batch),
        compute_s=batch / gpus / rate,
        traffic_s=traffic(parameters, gpus, "ddp") / link.value,
    )


def scaled_rate(lr: float, batch: int, larger: int) -> float:
    """The learning rate of a larger batch by the recipes' rule, its square root.

    >>> scaled_rate(1.0, 1024, 4096)
    2.0
    """
    return lr * math.sqrt(larger / batch)
