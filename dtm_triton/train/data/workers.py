"""Worker processes over one source of images, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from dtm_triton.train.engine.checkpoint import FolderError

Result = TypeVar("Result")
_images: Any = None  # a worker's source


class Workers:
    """Processes that call functions of (images, item)."""

    def __init__(self, executor: ProcessPoolExecutor, count: int) -> None:
        self.executor, self.ahead = executor, 2 * count

    def run(self, title: str, function: Callable[[Any, Any], Result], items: Sequence[Any]) -> Iterator[Result]:
        """The results, as they come. Raises what a call raises, and FolderError when a worker was killed."""
        if not items:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        left = iter(items)
        running: set[Future[Result]] = set()
        with Progress(*columns) as progress:
            bar = progress.add_task(title, total=len(items))
            try:
                while True:
                    while len(running) < self.ahead and (item := next(left, None)) is not None:
                        running.add(self.executor.submit(_call, function, item))
                    if not running:
                        return
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        progress.advance(bar)
                        yield future.result()
            except BrokenProcessPool as error:
                raise FolderError(f"{title}: a worker was killed, perhaps for its memory; use fewer") from error


@contextmanager
def open_workers(count: int, images: Any) -> Iterator[Workers]:
    """`count` processes; they end with this one, however it ends."""
    executor = ProcessPoolExecutor(count, initializer=_begin, initargs=(images,))
    try:
        yield Workers(executor, count)
    finally:
        executor.shutdown(cancel_futures=True)


def _begin(images: Any) -> None:
    global _images
    _images = images
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the first process stops the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(function: Callable[[Any, Any], Result], item: Any) -> Result:
    return function(_images, item)
