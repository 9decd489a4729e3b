"""What a plan stands on: every figure with its unit and where it comes from, measured where there is a record."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from dtm_triton.measure.train_record import TrainRecord, read_loader, read_train

GIGA = 1e9


@dataclass(frozen=True)
class Fact:
    """One figure: `source` is "assumed", "counted", "the recipe", or the record that it was measured in."""

    value: float
    unit: str
    source: str = "assumed"

    @property
    def measured(self) -> bool:
        """Whether a record stands behind it."""
        return self.source.startswith("measured")


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything a plan needs beside the recipes. The defaults are assumptions."""

    images: Fact = Fact(1_281_167, "images", "ImageNet-1K's training set")
    node: Fact = Fact(8, "GPUs a machine")
    batch: Fact = Fact(128, "images a GPU and step, where the batch is scaled")
    base_rate: Fact = Fact(2800, "images/s on a GPU, ViT-B", "assumed: the goal for an NVIDIA H200, not measured")
    other_rates: dict[str, Fact] = field(default_factory=dict)
    """Images a second on a GPU of further recipes, where they are measured."""
    folder_rate: Fact = Fact(600, "images/s decoded on a core, JPEG files as they are")
    shards_rate: Fact = Fact(1200, "images/s decoded on a core, shards resized to 256 pixels")
    inside: Fact = Fact(300 * GIGA, "bytes/s a GPU sends inside a machine (NVLink, two thirds of its 450 GB/s)")
    between: Fact = Fact(40 * GIGA, "bytes/s a GPU sends between machines (400 Gbit/s each, four fifths of it)")
    to_host: Fact = Fact(20 * GIGA, "bytes/s from a GPU to its host")
    storage: Fact = Fact(2 * GIGA, "bytes/s the shared storage takes")

    def rate(self, recipe: str, flops: int, base: str, base_flops: int) -> Fact:
        """Images a second on a GPU: measured, or scaled by operations from the rate of the recipe `base`.

        >>> Facts().rate("twice", 200, "once", 100).value
        1400.0
        """
        if recipe == base:
            return self.base_rate
        if recipe in self.other_rates:
            return self.other_rates[recipe]
        return Fact(self.base_rate.value * base_flops / flops, self.base_rate.unit, "ViT-B's, by operations")


def read_facts(folder: Path, base: str) -> Facts:
    """The assumptions, with what the records in `folder` measured in their place.

    >>> read_facts(Path("no such folder"), "base").folder_rate.measured
    False
    """
    found: dict[str, Fact] = {}
    rates = {}
    for record in read_train(folder):
        if record.machine["kind"] == "gpu" and record.processes == 1 and record.recipe not in rates:
            median = record.images_per_second(record.sides[0]).median
            rates[record.recipe] = Fact(median, "images/s on a GPU", _source(record))
    if base in rates:
        found["base_rate"] = rates.pop(base)
    for chain in ("folder", "shards"):
        for loader in read_loader(folder):
            if rate := loader.rate(chain):
                unit = getattr(Facts(), f"{chain}_rate").unit
                where = f"measured on {loader.machine['device']}, {loader.machine['date']}"
                found.setdefault(f"{chain}_rate", Fact(rate, unit, where))
    return Facts(other_rates=rates, **found)  # type: ignore[arg-type]


def _source(record: TrainRecord) -> str:
    return f"measured on {record.machine['device']}, {record.batch} images a step, {record.machine['date']}"
