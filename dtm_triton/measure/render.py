"""BENCHMARKS.md, rendered from the data of every machine, the table of compiled resources and the text on method."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtm_triton.measure.baselines import TITLES
from dtm_triton.measure.cases import gpu_cases
from dtm_triton.measure.ceilings import Ceilings
from dtm_triton.measure.estimate import ASSUMED, ASSUMED_DEVICE, estimate
from dtm_triton.measure.machine import ROOT, shown_commit
from dtm_triton.measure.record import Record, Row, read_all
from dtm_triton.measure.render_steps import step_parts
from dtm_triton.measure.render_training import training_parts
from dtm_triton.measure.tables import number, table
from dtm_triton.measure.timing import Timing

RESOURCES = ROOT / "tests" / "kernels" / "resources.json"
METHOD = ROOT / "benchmarks" / "method.md"

HOST_ON_GPU = "Host time of a call on tiny tensors, not waiting for the GPU:"
HOST_WITHOUT_GPU = (
    'Host time of a call on tiny tensors under `backend="triton"`, every kernel replaced by a function that does '
    "nothing: checks, dispatch, autograd, allocation and the launchers' own code are in it, Triton's launch is not:"
)


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where data is read and what is rendered goes."""

    data: Path
    page: Path
    pictures: Path


def checkout_places() -> Places:
    """Those of a checkout."""
    folder = ROOT / "benchmarks"
    return Places(data=folder / "data", page=ROOT / "BENCHMARKS.md", pictures=folder / "pictures")


def folder_places(folder: Path) -> Places:
    """Everything in one folder."""
    return Places(data=folder, page=folder / "BENCHMARKS.md", pictures=folder)


def render(places: Places) -> str:
    """The page, from the files as they are now."""
    records = read_all(places.data)
    parts = [
        "# Benchmarks",
        "Rendered by `python kernels/bench.py`, which measures, or `python kernels/bench.py --render`, which does not, "
        "from the data files of every machine; `python train/bench.py`, `python train/step_bench.py` and "
        "`python train/loader_bench.py` write those on training and loading. No measured figure is typed by hand; what "
        "the method's prose estimates, it calls so.",
    ]
    for record in records:
        parts += _machine(record, places)
    if not any(record.machine["kind"] == "gpu" for record in records):
        parts += _estimates()
    parts += training_parts(places.data)
    parts += step_parts(places.data)
    parts += _resources(RESOURCES)
    if METHOD.exists():
        parts.append(METHOD.read_text().strip())
    return "\n\n".join(parts) + "\n"


def _machine(record: Record, places: Places) -> list[str]:
    facts, ceilings = record.machine, record.ceilings
    versions = f"Python {facts['python']}, torch {facts['torch']}, Triton {facts['triton']}"
    if facts["kind"] == "gpu":
        versions += f", CUDA {facts['cuda']}, driver {facts['driver']}; host: {facts['cpu']}"
    else:
        versions = f"{facts['cpu'].rpartition(', ')[2]}, {versions}"
    rates = ", ".join(f"{number(rate)} TFLOP/s in {dtype}" for dtype, rate in ceilings.matrix_tflop_s.items())
    parts = [
        f"## {facts['device']}",
        f"{versions}. {facts['date']}, commit {shown_commit(facts)}. "
        f"Each median is over about {record.seconds:g} s of calls.",
        f"Ceilings measured in the same run: a copy moves {number(ceilings.copy_gb_s)} GB/s (read plus written); "
        f"matrix products run at {rates}.",
    ]
    picture = places.pictures / f"{facts['slug']}.png"
    if picture.exists():
        parts.append(f"![How far from the floor]({picture.relative_to(places.page.parent).as_posix()})")
    parts.append(cases_table(record))
    return parts + _calls(record)


def cases_table(record: Record) -> str:
    """Every case under every implementation, as Markdown; times in microseconds for a GPU, else in milliseconds."""
    unit, units = ("us", 1e3) if record.machine["kind"] == "gpu" else ("ms", 1.0)
    header = ["case", "implementation", f"median, {unit} (IQR)", "against the reference", "GB/s", "TFLOP/s"]
    rows = [_cells(row, record, units) for row in record.rows]
    return table([*header, f"floor, {unit}", "times the floor", "peak, MB"], rows)


def _cells(row: Row, record: Record, units: float) -> list[str]:
    """A row of that table; `units` of time are in a millisecond."""
    start = [row.case, TITLES[row.implementation]]
    floor = row.floor_ms(record.ceilings)
    if row.median_ms is None or row.iqr_ms is None:
        return [*start, f"not measured: {row.reason}", "", "", "", number(units * floor), "", ""]
    reference = [
        other.median_ms
        for other in record.rows
        if other.case == row.case and other.implementation == "reference" and other.median_ms
    ]
    return [
        *start,
        f"{number(units * row.median_ms)} ({number(units * row.iqr_ms)})",
        f"{number(reference[0] / row.median_ms)} x" if reference else "",
        number(row.bytes / row.median_ms / 1e6),
        number(row.flops / row.median_ms / 1e9),
        number(units * floor),
        number(row.median_ms / floor),
        "" if row.peak_bytes is None else number(row.peak_bytes / 2**20),
    ]


def _calls(record: Record) -> list[str]:
    parts = []
    if record.host:
        how = HOST_ON_GPU if record.machine["kind"] == "gpu" else HOST_WITHOUT_GPU
        parts += [how, _timings(record.host)]
    if record.replay:
        parts += ["Replays of a CUDA graph that holds one call:", _timings(record.replay)]
    elif record.machine["kind"] == "gpu":
        parts.append("Replays of a CUDA graph: not measured.")
    return parts


def _timings(timings: dict[str, Timing]) -> str:
    rows = [[name, f"{number(1e3 * t.median_ms)} ({number(1e3 * t.iqr_ms)})"] for name, t in timings.items()]
    return table(["call", "median, us (IQR)"], rows)


def _estimates() -> list[str]:
    """The target shapes with floors from assumed ceilings, where no GPU was measured."""
    rows = []
    for case in gpu_cases():
        figures = estimate(case)
        cells = [number(figures[name]) for name in ("megabytes", "gigaflops", "bytes_us", "flops_us", "floor_us")]
        rows.append([case.name, *cells, "not measured"])
    return [
        "## GPU: not measured",
        "No kernel has been timed on a GPU. Below are **estimates**: floors of the cases at ceilings **assumed** for "
        f"an {ASSUMED_DEVICE}, {_assumed(ASSUMED)}.",
        table(["case", "MB", "GFLOP", "bytes alone, us", "operations alone, us", "floor, us", "kernels"], rows),
    ]


def _assumed(ceilings: Ceilings) -> str:
    rates = ", ".join(f"{rate:g} TFLOP/s in {dtype}" for dtype, rate in ceilings.matrix_tflop_s.items())
    return f"{ceilings.copy_gb_s:g} GB/s and {rates}"


def _resources(path: Path) -> list[str]:
    """The rows of the newest Triton in the recorded table that the tests hold the compiler to."""
    if not path.exists():
        return []
    recorded: dict[str, Any] = json.loads(path.read_text())
    newest = max(recorded, key=lambda version: tuple(map(int, version.split("."))))
    targets = list(recorded[newest])
    figures = [figure for version in recorded.values() for target in version.values() for figure in target.values()]
    largest = {name: max(figure[name] for figure in figures) for name in ("stack", "loop_spills")}
    kernels = sorted({kernel for target in recorded[newest].values() for kernel in target})
    rows = []
    for kernel in kernels:
        found = [recorded[newest][target].get(kernel) for target in targets]
        rows.append([kernel, *(f"{f['registers']} / {f['stack']} / {f['shared']}" if f else "" for f in found)])
    return [
        "## Compiled resources",
        "From ahead-of-time compilation without a GPU (`python -m dtm_triton.kernels.resources`), at the settings "
        f"shipped, Triton {newest}: registers a thread / bytes of stack a thread / bytes of shared memory. Over all "
        f"{len(figures)} entries (every kernel, target and Triton {', '.join(sorted(recorded))}) the largest stack is "
        f"{largest['stack']} bytes, and spills inside loops number {largest['loop_spills']} at the most.",
        table(["kernel", *targets], rows),
    ]
