"""Tune the kernels' launch settings on the GPU at hand: `python kernels/tune.py`. Also `dtm-tune`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:  # run as a script: import the package from this checkout, and nothing from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from dtm_triton.measure.tune import main

if __name__ == "__main__":
    main()
