"""Commands as child processes, side by side: two students train on a core each, faster than one after the other on two.

Children stop when this process is asked to, and die with it when it is killed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dtm_triton.train.engine.checkpoint import FolderError

LIFELINE = "DTM_TRITON_LIFELINE"  # environment variable: a pipe that reads as ended when the parent is gone
PROGRESS = re.compile(r"(.+?)  step (\d+)/(\d+)  (loss .*)  \S+ s left")


def run_side_by_side(commands: Mapping[str, Sequence[str]]) -> None:
    """Run all commands at once and show their output, as bars on a terminal.

    Raises FolderError when one of them fails, after stopping the others. On Ctrl-C and SIGTERM the children are told to
    stop, and waited for.
    """
    ours, theirs = os.pipe()[::-1]
    environment = {**os.environ, LIFELINE: str(theirs), "PYTHONUNBUFFERED": "1"}
    with _display() as show:
        children = {
            name: subprocess.Popen(
                words,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment,
                pass_fds=(theirs,),
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
            )
            for name, words in commands.items()
        }
        readers = [threading.Thread(target=_forward, args=(child.stdout, show)) for child in children.values()]
        for reader in readers:
            reader.start()
        number = signal.SIGTERM
        try:
            while any(child.poll() is None for child in children.values()):
                if any(child.poll() for child in children.values()):
                    break
                time.sleep(0.1)
        except KeyboardInterrupt:
            number = signal.SIGINT
            raise
        finally:
            for child in children.values():
                if child.poll() is None:
                    child.send_signal(number)
            for child in children.values():
                child.wait()
            for reader in readers:
                reader.join()
            os.close(ours)
            os.close(theirs)
    failed = [f"{name} ended with exit code {child.returncode}" for name, child in children.items() if child.returncode]
    if failed:
        raise FolderError("; ".join(failed))


def die_with_parent() -> None:
    """In a child of `run_side_by_side`: end at once when the parent is gone. Elsewhere nothing happens."""
    if LIFELINE in os.environ:
        end = int(os.environ.pop(LIFELINE))

        def watch() -> None:
            os.read(end, 1)  # returns when the last writer has gone
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _forward(lines: Any, show: Callable[[str], None]) -> None:
    for line in lines:
        show(line.rstrip("\n"))


@contextmanager
def _display() -> Iterator[Callable[[str], None]]:
    """A function that shows a line: on a terminal, progress becomes a bar for every title."""
    if not sys.stdout.isatty():
        yield lambda line: print(line, flush=True)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    note = TextColumn("{task.fields[note]}")
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), note, TimeRemainingColumn()
    ) as bar:
        tasks: dict[str, Any] = {}

        def show(line: str) -> None:
            progress = PROGRESS.fullmatch(line)
            if progress is None:
                bar.console.print(line, markup=False, highlight=False)
                return
            title, step, total, rest = progress.groups()
            if title not in tasks:
                tasks[title] = bar.add_task(title, note="")
            bar.update(tasks[title], completed=int(step), total=int(total), note=rest)

        yield show
