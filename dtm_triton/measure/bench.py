"""Measure the library on the machine at hand: `python kernels/bench.py`, or `dtm-bench` where it is installed.

Checks every result against the reference first, then times every implementation of every op and shape, writes one JSON
file for this machine, and renders BENCHMARKS.md from the files of all machines. Only some of the cases, or --quick, is
printed but not written, unless --data says where.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dtm_triton.measure.cases import cpu_cases, gpu_cases
from dtm_triton.measure.plot import draw
from dtm_triton.measure.record import read_all
from dtm_triton.measure.released import NotReleased, load
from dtm_triton.measure.render import Places, cases_table, checkout_places, folder_places, render
from dtm_triton.measure.selection import add_case_arguments, chosen_cases
from dtm_triton.measure.sweep import GateFailed, Sweep
from dtm_triton.measure.tables import aligned

COMPILE_SECONDS = 20.0
"""A baseline that takes longer to compile is left out, and the table says so."""

QUICK_SECONDS = 0.05


def main(argv: Sequence[str] | None = None) -> None:
    arguments = _parser().parse_args(argv)
    places = folder_places(arguments.data) if arguments.data else checkout_places()
    if not (arguments.data or places.data.parent.is_dir()):
        sys.exit("dtm-bench: this is no checkout of the repository: say with --data DIR where results go")
    if arguments.render:
        write_page(places)
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler counts memory here, and need not report on itself
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("dtm-bench: PyTorch sees no GPU")
    usual = cpu_cases() if device.type == "cpu" else gpu_cases()
    cases = [case for case in chosen_cases(arguments, usual) if arguments.only in case.name]
    if not cases:
        sys.exit(f"dtm-bench: no case's name contains --only {arguments.only!r}")
    try:
        chosen = {"tome": arguments.tome, "dtm": arguments.dtm}
        released = {program: load(program, folder) for program, folder in chosen.items() if folder}
        record = Sweep(
            cases,
            device,
            seconds=QUICK_SECONDS if arguments.quick else arguments.seconds,
            minutes=arguments.minutes,
            compile_seconds=0 if arguments.quick else COMPILE_SECONDS,
            released=released,
        ).run()
    except NotReleased as error:
        sys.exit(f"dtm-bench: {error}")
    except GateFailed as failures:
        sys.exit(f"dtm-bench: wrong results, so nothing was measured:\n{failures}")
    sys.stdout.write(f"\n{aligned(cases_table(record))}\n")
    if arguments.data or (cases == usual and not arguments.quick):
        sys.stdout.write(f"\nwrote {record.write(places.data)}\n")
        write_page(places)


def write_page(places: Places) -> None:
    """Draw every machine's picture and render the page."""
    for record in read_all(places.data):
        if not draw(record, places.pictures / f"{record.machine['slug']}.png"):
            sys.stdout.write("Matplotlib is not installed: no picture\n")
    places.page.write_text(render(places))
    sys.stdout.write(f"wrote {places.page}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dtm-bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; by default the GPU where there is one")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="how long to repeat each call (%(default)s)")
    parser.add_argument("--minutes", type=float, default=15.0, help="measure no more after this (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="short and rough, nothing compiled")
    parser.add_argument("--tome", type=Path, metavar="DIR", help="a checkout of the released ToMe, to compare with")
    parser.add_argument("--dtm", type=Path, metavar="DIR", help="a checkout of the released DTM, to compare with")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where data, page and picture go, not the checkout")
    add_case_arguments(parser)
    parser.add_argument("--render", action="store_true", help="render the page from the data and measure nothing")
    return parser


if __name__ == "__main__":
    main()
