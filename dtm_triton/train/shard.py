"""Resize a dataset into tar shards: `dtm-shard --input FOLDER --output FOLDER`, `python train/shard.py ...`.

Shards are written by several processes, each whole or not at all, with a record of its checksum beside it. The same
command goes on where a killed one stopped: shards that are what their record says are kept. At the end all are read
again, every image is decoded, and manifest.json is written: only a folder with a manifest is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as a script: import the package from this checkout, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from dtm_triton.train.command_line import run_command
from dtm_triton.train.config import DataConfig
from dtm_triton.train.config.checks import check
from dtm_triton.train.data.draws import fold
from dtm_triton.train.data.images import open_images
from dtm_triton.train.data.shard_writer import Record, check_shard, matches, write_shard
from dtm_triton.train.data.shards import MANIFEST
from dtm_triton.train.data.workers import open_workers
from dtm_triton.train.engine.checkpoint import FolderError, write_text
from dtm_triton.train.engine.run_folder import hold_folder

FORMAT = "dtm-shards 1"
RECORDS = ".unfinished"  # what is known of the shards until there is a manifest


@dataclass(frozen=True, kw_only=True)
class ShardConfig:
    """What is resized, and how."""

    input: Path
    """The dataset, as `data.train_folder` of a recipe."""
    output: Path
    """Folder of the shards. One with unfinished shards of the same settings is continued."""
    source: Literal["folder", "shards", "huggingface", "torchvision"] = "folder"
    """Kind of dataset, as `data.source` of a recipe."""
    name: str = ""
    """Class in torchvision.datasets, for source "torchvision"."""
    part: Literal["train", "test"] = "train"
    """Split of a "huggingface" or "torchvision" set."""
    size: int = 256
    """Pixels of the shorter side; images that are not larger are copied as they are."""
    quality: int = 92
    """Of the JPEGs, 1..95."""
    channels: int = 3
    """1 (grey), 3 (RGB), or what the images have."""
    images_per_shard: int = 4096
    """About 30 kB each at the default size."""
    seed: int = 0
    """Decides the order: images are shuffled, so that a shard holds all classes."""
    workers: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes; by default one for each core."""

    def __post_init__(self) -> None:
        for name in ("size", "channels", "images_per_shard", "workers"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "positive")
        check("quality", self.quality, 1 <= self.quality <= 95, "in 1..95")
        inside = self.output.resolve().is_relative_to(self.input.resolve())
        check("output", str(self.output), not inside, "outside of input")

    def data(self) -> DataConfig:
        """How the dataset is opened."""
        return DataConfig(
            source=self.source,
            train_folder=self.input,
            test_folder=self.input,
            name=self.name,
            channels=self.channels,
            mean=(0.0,) * self.channels,
            std=(1.0,) * self.channels,
        )


def shard(config: ShardConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the shards, or go on with them; returns the manifest.

    Raises FolderError for a dataset that cannot be opened, a folder with shards of other settings, one in use or that
    cannot be written, and for shards that differ from what was written to them.
    """
    images: Any = open_images(config.data(), config.part)
    settings = {name: value for name, value in asdict(config).items() if name not in ("input", "output", "workers")}
    settings |= {"images": images.fingerprint}
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        with hold_folder(config.output / RECORDS):
            manifest = _write_all(config, images, settings, say)
            shutil.rmtree(config.output / RECORDS, ignore_errors=True)
    except OSError as error:
        raise FolderError(f"output {str(config.output)!r}: {error}; the same command goes on from here") from error
    return manifest


def _write_all(config: ShardConfig, images: Any, settings: Record, say: Callable[[str], None]) -> dict[str, Any]:
    output, count = config.output, len(images.labels)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(fold(config.seed, "shards")))
    starts = range(0, count, config.images_per_shard)
    names = [f"shard-{number:06}.tar" for number in range(len(starts))]
    manifest = _read(output / MANIFEST)
    begun = manifest or _read(output / RECORDS / "settings.json") or {"settings": settings}
    if begun.get("settings") != settings:
        raise FolderError(f"output {str(output)!r} holds shards of other images or settings; give another folder")
    strangers = sorted({path.name for path in output.glob("*.tar")} - set(names))
    if strangers:
        raise FolderError(f"output {str(output)!r} holds {strangers[0]!r}, which is not one of these shards")
    write_json(output / RECORDS / "settings.json", begun)
    told = manifest["shards"] if manifest else [_read(output / RECORDS / f"{name}.json") for name in names]
    with open_workers(config.workers, images) as workers:
        found = workers.run("kept shards", partial(_keep, output), [record for record in told if record])
        fine = {record["name"]: record for record in found if record}
        if fine:
            say(f"{output}: {len(fine)} of {len(names)} shards are there and have the right checksum")
        if manifest and len(fine) == len(names):
            return manifest
        tasks = []
        for name, start in zip(names, starts, strict=True):
            if name not in fine:
                places = range(start, min(start + config.images_per_shard, count))
                tasks.append((name, places, order[start : places.stop].tolist()))
        for record in workers.run("writing", partial(_write, config), tasks):
            fine[record["name"]] = record
        records = [fine[name] for name in names]
        for _ in workers.run("checking", partial(_check, output, config.channels), records):
            pass
    written = sum(record["images"] for record in records)
    if not written:
        raise FolderError(f"input {str(config.input)!r}: no image can be read, {records[0]['skipped'][0]}")
    manifest = {
        "format": FORMAT,
        "settings": settings,
        "images": written,
        "classes": images.classes or [str(number) for number in range(images.num_classes)],
        "skipped": [one for record in records for one in record["skipped"]],
        "shards": records,
    }
    write_json(output / MANIFEST, manifest)
    return manifest


def _keep(output: Path, _: Any, record: Record) -> Record | None:
    return record if matches(output / record["name"], record) else None


def _write(config: ShardConfig, images: Any, task: tuple[str, range, list[int]]) -> Record:
    name, places, numbers = task
    path = config.output / name
    record = write_shard(
        path, images, places, numbers, side=config.size, quality=config.quality, channels=config.channels
    )
    write_json(config.output / RECORDS / f"{name}.json", record)  # after the shard: what has a record is whole
    return record


def _check(output: Path, channels: int, _: Any, record: Record) -> None:
    check_shard(output / record["name"], record, channels)


def _read(path: Path) -> Record | None:
    """What a JSON file holds, None where there is none or it is no JSON."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def write_json(path: Path, content: Record) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(content, indent=1))


def _report(config: ShardConfig) -> None:
    manifest = shard(config)
    skipped = manifest["skipped"]
    size = sum(record["bytes"] for record in manifest["shards"])
    print(
        f"{config.output}: {manifest['images']} images of {len(manifest['classes'])} classes in "
        f"{len(manifest['shards'])} shards, {size / 1e9:.2f} GB; {len(skipped)} could not be read"
    )
    for one in skipped[:10]:
        print(f"  {one['name']}: {one['reason']}")
    if len(skipped) > 10:
        print(f"  and others, see {config.output / MANIFEST}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    import tyro

    config = tyro.cli(ShardConfig, prog="dtm-shard", description=__doc__, args=argv)
    run_command("dtm-shard", lambda processes: _report(config), "cpu")


if __name__ == "__main__":
    main()
