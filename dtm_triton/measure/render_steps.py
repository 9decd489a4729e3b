"""What BENCHMARKS.md says of recipes' training steps beside each other, from their records."""

from __future__ import annotations

from pathlib import Path

from dtm_triton.measure.machine import shown_commit
from dtm_triton.measure.step_record import StepRecord, read_steps
from dtm_triton.measure.tables import aligned, number, table
from dtm_triton.measure.train_record import Figure


def step_parts(folder: Path) -> list[str]:
    """The sections on recipes beside each other, from the records in `folder`."""
    return [part for record in read_steps(folder) for part in _section(record)]


def readable_steps(record: StepRecord) -> str:
    """A record for a terminal."""
    return "\n\n".join(aligned(part) if part.startswith("|") else part for part in _section(record)[1:])


def _section(record: StepRecord) -> list[str]:
    facts, first = record.machine, record.rows[0]
    setting = ", ".join([f"{record.batch} images a step", record.precision, *record.options])
    versions = f"{facts['cpu'].rpartition(', ')[2]}, torch {facts['torch']}"
    header = ["recipe", "step, ms (IQR)", f"times {first.recipe} (IQR)", "tokens: encoder / decoder", "GFLOP forward"]
    rows = []
    for row in record.rows:
        tokens = f"{row.encoder_tokens} / {row.decoder_tokens}" if row.decoder_tokens else str(row.encoder_tokens)
        flops = [number(row.flops / 1e9), number(row.flops / first.flops)]
        rows.append([row.recipe, _figure(row.step), _figure(row.times(first)), tokens, *flops])
    return [
        f"## Training steps beside each other on {facts['device']}",
        f"{setting}; {record.source}. Batches are loaded before; stored attention maps are random. "
        f"{versions}. {facts['date']}, commit {shown_commit(facts)}. Medians (IQR) over {len(first.step_ms)} turns of "
        f"{record.steps} steps, the recipes in turn; operations are those of the trained network for an image.",
        table([*header, "times the first's"], rows),
    ]


def _figure(figure: Figure) -> str:
    return f"{number(figure.median)} ({number(figure.iqr)})"
