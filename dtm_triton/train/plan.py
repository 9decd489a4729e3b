"""Plan runs on 8, 64 and 512 GPUs: `dtm-plan`, `python train/plan.py`. Writes docs/planning.md in a checkout.

Replace what is assumed there by measuring: `python train/bench.py --out benchmarks/data` on a GPU, and
`python train/loader_bench.py`; then render again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: import the package from this checkout, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dtm_triton.measure.machine import ROOT
from dtm_triton.train.planning.page import render

DATA = ROOT / "benchmarks" / "data"
PAGE = ROOT / "docs" / "planning.md"


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="dtm-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="records to plan with (%(default)s)")
    parser.add_argument("--out", type=Path, default=PAGE, metavar="FILE", help="the page to write (%(default)s)")
    options = parser.parse_args(argv)
    if not options.out.parent.is_dir():
        sys.exit(f"dtm-plan: no folder {str(options.out.parent)!r}: say with --out FILE where the page goes")
    options.out.write_text(render(options.data))
    sys.stdout.write(f"wrote {options.out}\n")


if __name__ == "__main__":
    main()
