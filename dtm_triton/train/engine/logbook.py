"""What people see of a run: a progress bar or plain lines, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from dtm_triton.train.engine.checkpoint import write_atomically

Metrics = dict[str, float]


class Logbook:
    """Context that shows the progress of a run and writes its metrics; processes other than the first stay silent.

    Args:
        folder: metrics.jsonl and TensorBoard's files go here.
        title: in front of the bar or the lines.
        start, total: steps done, steps in all. Metrics of later steps than `start`, left by a run that was killed
            behind its last checkpoint, are removed.
        speaks: whether this process is the one that does all this.

    On a terminal a bar with loss, images per second and time left; elsewhere a plain line at most every 5 seconds.
    """

    def __init__(self, folder: Path, title: str, start: int, total: int, speaks: bool) -> None:
        self.folder, self.title, self.total, self.speaks = folder, title, total, speaks
        self.start, self.began, self.last_line = start, time.monotonic(), 0.0
        self.bar: Any = None
        if speaks:
            self.file = folder / "metrics.jsonl"
            kept = [row for row in read_metrics(folder) if row["step"] <= start]
            text = "".join(json.dumps(row) + "\n" for row in kept).encode()
            write_atomically(self.file, lambda file: file.write(text))
            self.size = len(text)

    def __enter__(self) -> Logbook:
        if self.speaks:
            from torch.utils.tensorboard import SummaryWriter

            self.board: Any = SummaryWriter(str(self.folder / "tensorboard"), purge_step=self.start + 1)
            if sys.stdout.isatty():
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                note = TextColumn("{task.fields[note]}")
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note)
                self.bar = Progress(*columns, TimeRemainingColumn(compact=True))
                self.bar.start()
                self.task = self.bar.add_task(self.title, total=self.total, completed=self.start, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.speaks:
            self.board.close()

    def write(self, step: int, metrics: Metrics) -> None:
        """Metrics of a step, to all three places."""
        if not self.speaks:
            return
        try:
            self._keep(step, metrics)
        except OSError as error:  # a disk that is full for an hour must not end a run of weeks
            self.say(f"{self.title.strip()}: metrics of step {step} could not be written: {error}")
        if "images_per_second" not in metrics:  # an evaluation
            shown = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            self.say(f"{self.title}  step {step}/{self.total}  {shown}")
            return
        note = f"loss {metrics['loss']:.4f}  {metrics['images_per_second']:,.0f} images/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, note=note)
        elif time.monotonic() - self.last_line > 5 or step == self.total:
            left = (time.monotonic() - self.began) / (step - self.start) * (self.total - step)
            self.last_line = time.monotonic()
            self.say(f"{self.title}  step {step}/{self.total}  {note}  {left:,.0f} s left")

    def _keep(self, step: int, metrics: Metrics) -> None:
        row = json.dumps({"step": step, **metrics}) + "\n"
        with open(self.file, "r+b") as file:
            file.truncate(self.size)  # half a row that did not fit
            file.seek(self.size)
            file.write(row.encode())
        self.size += len(row)
        for name, value in metrics.items():
            self.board.add_scalar(name, value, step)

    def say(self, text: str) -> None:
        """A line for people, above the bar."""
        if self.speaks:
            if self.bar is None:
                print(text, flush=True)
            else:
                self.bar.console.print(text, markup=False, highlight=False)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that a kill cut short is left out.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\\n{"step": 2, "lo')
    >>> read_metrics(folder)
    [{'step': 1, 'loss': 0.5}]
    """
    path = folder / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]
