"""Images a second on one core, ours and by the released program's transforms: `python train/loader_bench.py`.

All chains run in one process on one core, in turns, on the same pictures. Ours are what a worker of a training run does
for a batch: read, decode, crop, stack, draw the numbers of flips, jitter and masks. What a run leaves to the device is
measured too, on the same core, and once added: on a machine without a GPU it is paid there.

The other side is what the released program's workers do for an image, written with torchvision: decode by Pillow,
ColorJitter, flip, a bicubic RandomResizedCrop, two float tensors of which one is normalised, a block mask in Python.
Its second crop, where it is configured, and the stacking of a batch are left out in its favour.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

if not __package__:  # run as a script: import the package from this checkout, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch

from dtm_triton.measure.machine import describe
from dtm_triton.measure.train_record import LOADER_FORMAT, LoaderRecord, LoaderRow
from dtm_triton.train.config import DataConfig, MaskConfig, RunConfig
from dtm_triton.train.config.checks import check
from dtm_triton.train.data.augment import Normalise, augment
from dtm_triton.train.data.batches import MicroBatches
from dtm_triton.train.data.images import open_images
from dtm_triton.train.data.masks import Masks
from dtm_triton.train.engine.distributed import Processes
from dtm_triton.train.shard import ShardConfig, shard

WIDTH, HEIGHT = 500, 375  # what most images of ImageNet-1K have
NOISE = 2.0  # deviation in grey levels, so that no two files are alike
MASKS = MaskConfig(kind="block", masked=75)
GRID = (14, 14)
Chain = Callable[[int], object]
"""Handles one batch of images; the number of the repetition decides what is drawn."""


@dataclass(frozen=True, kw_only=True)
class LoaderBenchConfig:
    """How long, and where the figures go."""

    images: int = 64
    """Pictures, one batch."""
    repetitions: int = 25
    """Of every chain; the median counts."""
    output: Path | None = None
    """Folder of the JSON record, for example benchmarks/data; nothing is written without."""

    def __post_init__(self) -> None:
        check("images", self.images, self.images >= 1, "positive")
        check("repetitions", self.repetitions, self.repetitions >= 2, "2 or more")


def measure_loaders(config: LoaderBenchConfig, folder: Path) -> LoaderRecord:
    """Measure all chains on pictures that are written below `folder`."""
    size = write_photos(folder / "photos", config.images)
    shard(ShardConfig(input=folder / "photos", output=folder / "shards", workers=1), say=lambda text: None)
    data = DataConfig(source="folder", train_folder=folder / "photos", colour_jitter=0.4)
    files = our_chain(data, config.images)
    shards = our_chain(replace(data, source="shards", train_folder=folder / "shards"), config.images)
    chains: dict[str, Chain] = {
        "released DTM": released_chain(sorted((folder / "photos").rglob("*.jpg"))),
        "folder": files,
        "shards": shards,
        "folder, device's share added": lambda number: device_share(files(number)),
        "shards, device's share added": lambda number: device_share(shards(number)),
    }
    rates: dict[str, list[float]] = {name: [] for name in chains}
    with one_core():
        for number in range(-1, config.repetitions):
            for name, chain in chains.items():  # in turns: what disturbs the machine disturbs all
                start = time.perf_counter()
                chain(number + 1)
                if number >= 0:  # the first one warms up
                    rates[name].append(config.images / (time.perf_counter() - start))
        machine = describe(torch.device("cpu"))
    source = (
        f"{config.images} JPEG files of {WIDTH} x {HEIGHT} pixels, qualities 90 to 95, {size / 1e3:.0f} kB on average: "
        f"crops of scikit-learn's two sample photographs with noise of {NOISE:g} grey levels, in the file system's "
        "cache; shards: the same, shorter side 256"
    )
    return LoaderRecord(machine=machine, source=source, rows=[_row(name, values) for name, values in rates.items()])


def our_chain(data: DataConfig, count: int) -> Chain:
    """What a worker does for a batch."""
    images = open_images(data, "train")
    assert images is not None
    run = RunConfig(folder=Path("unused"), epochs=1, batch_size=count)
    batches = MicroBatches(images, data, run, Processes(), {"mask": Masks(MASKS, GRID).draw})
    return lambda number: batches[number]


def device_share(batch: object) -> object:
    """What a run leaves to the device: floats, flips, jitter, two normalisations, masks."""
    assert isinstance(batch, dict)
    pixels = augment(batch)
    statistics_of = [Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), Normalise((0.5,) * 3, (0.5,) * 3)]
    return [normalise(pixels) for normalise in statistics_of], Masks(MASKS, GRID)(batch)


def released_chain(paths: Sequence[Path]) -> Chain:
    """The released program's transforms, image by image."""
    from PIL import Image
    from torchvision import transforms

    common = transforms.Compose(
        [
            transforms.ColorJitter(0.4, 0.4, 0.4),
            transforms.RandomHorizontalFlip(0.5),
            transforms.RandomResizedCrop(224, scale=(0.08, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
        ]
    )
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    patches = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean, std)])
    tokens = transforms.ToTensor()

    def chain(number: int) -> object:
        draw = random.Random(number)
        torch.manual_seed(number)
        results = []
        for path in paths:
            with open(path, "rb") as file:
                image = common(Image.open(file).convert("RGB"))
            results.append((patches(image), tokens(image), block_mask(draw)))
        return results

    return chain


def block_mask(draw: random.Random, least: int = 16) -> np.ndarray:
    """BEiT's Algorithm 1 (arXiv 2106.08254) for one image: 75 patches or a few less."""
    mask = np.zeros(GRID, dtype=int)
    covered, failures = 0, 0
    while covered < MASKS.masked and failures < 10:
        area = draw.uniform(min(least, MASKS.masked - covered), MASKS.masked - covered)
        ratio = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
        tall, wide = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if not (0 < tall < GRID[0] and 0 < wide < GRID[1]):
            failures += 1
            continue
        top, left = draw.randint(0, GRID[0] - tall), draw.randint(0, GRID[1] - wide)
        block = mask[top : top + tall, left : left + wide]
        new = block.size - int(block.sum())
        failures = 0 if 0 < new <= MASKS.masked - covered else failures + 1
        if failures == 0:
            block[:] = 1
            covered += new
    return mask


def write_photos(folder: Path, count: int) -> float:
    """Write `count` different JPEG files; returns their mean size in bytes."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    sizes = []
    for number in range(count):
        photo = photos[number % len(photos)]
        share = draw.uniform(0.6, 1.0)
        wide, high = share * photo.width, share * photo.width * HEIGHT / WIDTH
        if high > photo.height:
            wide, high = photo.height * WIDTH / HEIGHT, photo.height
        left, top = draw.uniform(0, photo.width - wide), draw.uniform(0, photo.height - high)
        small = photo.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC, box=(left, top, left + wide, top + high))
        pixels = np.asarray(small) + NOISE * draw.standard_normal((HEIGHT, WIDTH, 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90 + number % 6)
        (folder / f"{number:06}.jpg").write_bytes(buffer.getvalue())
        sizes.append(len(buffer.getvalue()))
    return statistics.mean(sizes)


@contextmanager
def one_core() -> Iterator[None]:
    """Run on one core only: no thread of any library can hide work on another one."""
    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    torch.set_num_threads(1)
    try:
        if cores:
            os.sched_setaffinity(0, {max(cores)})
        yield
    finally:
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def _row(name: str, rates: list[float]) -> LoaderRow:
    low, middle, high = statistics.quantiles(rates, n=4)
    return LoaderRow(chain=name, images_per_second_per_core=middle, iqr=high - low, runs=len(rates))


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    import tyro

    config = tyro.cli(LoaderBenchConfig, prog="dtm-loader-bench", description=__doc__, args=argv)
    with tempfile.TemporaryDirectory() as folder:
        record = measure_loaders(config, Path(folder))
    base = record.rate("released DTM")
    assert base is not None
    print(f"{record.machine['cpu']}, one core\n{record.source}\n")
    for row in record.rows:
        rate = row.images_per_second_per_core
        print(f"{row.chain:32} {rate:8.0f} images/s (IQR {row.iqr:.0f})   {rate / base:5.2f} x released DTM")
    if config.output is not None:
        path = config.output / f"loader-{record.machine['slug']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": LOADER_FORMAT, **asdict(record)}, indent=1) + "\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
