"""Measure the portable implementation against the literal reference on this machine's CPU, and write BENCHMARKS.md.

    python benchmarks/cpu.py          print the figures
    python benchmarks/cpu.py --write  and render BENCHMARKS.md from them and from the compiled kernels' resources

Every figure is the median of repeated calls in one process; memory is the peak of what PyTorch allocates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dtm_triton import morph

ROOT = Path(__file__).parent.parent
SHAPE = (16, 196, 512)
SCHEDULES = {
    "14 iterations of 14": morph.MorphSchedule((14,) * 14),
    "7 iterations of 14": morph.MorphSchedule((14,) * 7),
    "1 iteration of 98": morph.MorphSchedule((98,)),
}


def median_ms(function: Callable[[], object], seconds: float = 4.0) -> tuple[float, float]:
    """Median and interquartile range in milliseconds, of at least five calls."""
    function()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - before))
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, high - low


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    return outputs.requires_grad_(), targets


def calls() -> dict[str, Callable[[str], object]]:
    outputs, targets = inputs()
    matching = {
        f"match_tokens, {name}": lambda backend, schedule=schedule: morph.match_tokens(
            targets, schedule, backend=backend
        )
        for name, schedule in SCHEDULES.items()
    }
    groups = morph.match_tokens(targets, SCHEDULES["7 iterations of 14"])

    def loss_step(backend: str) -> object:
        return torch.autograd.grad(morph.morph_loss(outputs, targets, groups, backend=backend), outputs)

    return {**matching, "morph_loss forward + backward, 98 groups": loss_step}


def peak_mb(function: Callable[[], object]) -> float:
    """Peak of the memory PyTorch allocates on top of what it held, in MB, by the profiler's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0)) / 2**20


def measure() -> list[dict[str, object]]:
    rows = []
    for name, call in calls().items():
        row: dict[str, object] = {"operation": name}
        for backend in ("reference", "portable"):
            row[backend], row[f"{backend} iqr"] = median_ms(lambda: call(backend))  # noqa: B023
            row[f"{backend} MB"] = peak_mb(lambda: call(backend))  # noqa: B023
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def machine() -> str:
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{model}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"


def render(rows: list[dict[str, object]]) -> str:
    lines = [
        "# Benchmarks",
        "",
        "Written by `python benchmarks/cpu.py --write`; nothing here is typed by hand.",
        "",
        f"## CPU: {' x '.join(map(str, SHAPE))} float32",
        "",
        f"{machine()}, {date.today().isoformat()}.",
        "Medians (interquartile ranges) of repeated calls in one process; memory is the peak of what PyTorch",
        "allocates on top of the inputs. `reference` is the literal statement of the method, written to be read",
        "beside the paper: it follows the features and the dense source matrix.",
        "Kernels have not been timed on a GPU.",
        "",
        "| operation | reference, ms | portable, ms | ratio | reference, MB | portable, MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [str(row["operation"])]
        cells += [f"{row[backend]:.1f} ({row[f'{backend} iqr']:.1f})" for backend in ("reference", "portable")]
        cells += [f"{float(row['reference']) / float(row['portable']):.1f}"]  # type: ignore[arg-type]
        cells += [f"{row[f'{backend} MB']:.0f}" for backend in ("reference", "portable")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *render_resources()]) + "\n"


def render_resources() -> list[str]:
    """The main kernels' rows of the recorded table that the tests hold the compiler to."""
    table = json.loads((ROOT / "tests" / "kernels" / "resources.json").read_text())
    newest = max(table, key=lambda version: tuple(map(int, version.split("."))))
    targets = list(table[newest])
    figures = [figure for version in table.values() for target in version.values() for figure in target.values()]
    largest = {name: max(figure[name] for figure in figures) for name in ("stack", "loop_spills")}
    lines = [
        "## Compiled resources",
        "",
        "From ahead-of-time compilation without a GPU (`python -m dtm_triton.kernels.resources`), at the shipped",
        f"launch settings, 196 tokens, 512 channels, Triton {newest}: registers a thread / bytes of shared memory.",
        f"Over all {len(figures)} entries (every kernel, target and Triton {', '.join(sorted(table))}) the largest",
        f"stack is {largest['stack']} bytes, and spills inside loops number {largest['loop_spills']} at the most.",
        "",
        f"| kernel | {' | '.join(targets)} |",
        f"|---|{'---|' * len(targets)}",
    ]
    for kernel in table[newest][targets[0]]:
        cells = [
            f"{figure['registers']} / {figure['shared']}" for figure in (table[newest][t][kernel] for t in targets)
        ]
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="render BENCHMARKS.md")
    write = parser.parse_args().write
    measured = measure()
    if write:
        (ROOT / "BENCHMARKS.md").write_text(render(measured))
