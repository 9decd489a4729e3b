"""One picture per machine: how far every implementation of every case is from the floor."""

from __future__ import annotations

from pathlib import Path

from dtm_triton.measure.baselines import TITLES
from dtm_triton.measure.record import Record

COLOURS = {
    "triton": "#0b6e4f",
    "portable": "#2176ae",
    "reference": "#8d99ae",
    "compiled": "#c9a227",
    "tome": "#b5446e",
    "dtm": "#7d3c98",
}


def draw(record: Record, path: Path) -> bool:
    """Draw `record` into a PNG file; False where Matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    cases = list(dict.fromkeys(row.case for row in record.rows))
    figure = Figure(figsize=(9, 1.7 + 0.3 * len(cases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for implementation, colour in COLOURS.items():
        points = [
            (row.median_ms / row.floor_ms(record.ceilings), cases.index(row.case))
            for row in record.rows
            if row.implementation == implementation and row.median_ms is not None
        ]
        if points:
            times, places = zip(*points, strict=True)
            axes.scatter(times, places, s=46, color=colour, label=TITLES[implementation], zorder=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.grid(axis="both", color="#dddddd", linewidth=0.6, zorder=0)
    axes.set_xlabel("median time over the floor (1: the floor, at the ceilings measured in the same run)")
    axes.set_title(record.machine["device"], fontsize=11)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.collections:
        figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    return True
