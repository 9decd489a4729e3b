"""Two processes of a tiny run, to be killed: at any moment, or at a chosen place inside the writing of a checkpoint."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from processes import CONTEXT, free_port
from tiny import tiny_config, tiny_trainer
from torch.distributed.checkpoint.filesystem import FileSystem

from dtm_triton.train.command_line import run_command
from dtm_triton.train.engine.distributed import Processes

PLACES = ("half written", "before fsync", "before renaming", "after renaming", "while removing")
"""Inside the writing of a checkpoint. The second process writes only its part of the tensors, the first place."""

Place = tuple[str, int]
"""One of PLACES, and how often it is passed before the process stays there."""


class Start:
    """One start of the run: two processes that join by torchrun's environment variables.

    places: where a process stays, by its number.
    """

    def __init__(self, folder: Path, changes: dict[str, Any], places: dict[int, Place]) -> None:
        port = free_port()
        self.pipes, self.children = [], []
        for rank in range(2):
            ours, theirs = CONTEXT.Pipe()
            words = (rank, port, folder, changes, theirs, places.get(rank))
            self.children.append(CONTEXT.Process(target=train, args=words, daemon=True))
            self.pipes.append(ours)
        for child in self.children:
            child.start()
        self.step, other = self.hear(0), self.hear(1)
        """The step that the run went on from."""
        assert self.step == other

    def hear(self, rank: int, timeout: float = 30) -> Any:
        """What a process says next: the step it begins with, or the place where it stays."""
        assert self.pipes[rank].poll(timeout), "nothing heard"
        return self.pipes[rank].recv()

    def sleep(self, seconds: float) -> None:
        """Wait, but not for longer than both live."""
        wait([child.sentinel for child in self.children], seconds)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Until it holds, or one has ended."""
        while self.running and not condition():
            self.sleep(0.005)

    @property
    def running(self) -> bool:
        return all(child.is_alive() for child in self.children)

    def kill(self, ranks: tuple[int, ...], patience: float = 20) -> None:
        """kill -9; a process that is left must end by itself, and not as if all were well."""
        for rank in ranks:
            self.children[rank].kill()
        for child in self.children:
            child.join(patience)
        codes = [child.exitcode for child in self.children]
        for child in self.children:
            child.kill()
        assert None not in codes, f"{codes}: a process waits for one that was killed"
        assert 0 not in codes, codes

    def finish(self, code: int = 0, timeout: float = 60) -> None:
        """Wait for both to end with this exit code."""
        for child in self.children:
            child.join(timeout)
        codes = [child.exitcode for child in self.children]
        for child in self.children:
            child.kill()
        assert codes == [code, code], codes


def train(rank: int, port: int, folder: Path, changes: dict[str, Any], pipe: Connection, place: Place | None) -> None:
    """One of the two processes."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"output-{rank}.txt", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    if place is not None:
        stay_at(*place, pipe)

    def work(processes: Processes) -> None:
        config = tiny_config(folder, **changes)
        quick = replace(config, loss=replace(config.loss, max_iterations=3))
        trainer = tiny_trainer(quick, processes)
        pipe.send(trainer.step)
        trainer.fit()

    run_command("tiny", work, "cpu", timeout_minutes=1)


def stay_at(place: str, passed: int, pipe: Connection) -> None:
    """Say so and stay, once a place inside the writing of a checkpoint was passed so often."""
    count = 0

    def arrive(path: Any) -> None:
        nonlocal count
        if ".unfinished" in str(path):
            count += 1
            if count > passed:
                pipe.send(place)
                time.sleep(600)

    before: dict[str, tuple[Any, str, Callable[[Any], str]]] = {
        "before fsync": (os, "fsync", lambda file: os.readlink(f"/proc/self/fd/{file}")),
        "before renaming": (os, "replace", str),
        "while removing": (shutil, "rmtree", str),
    }
    if place == "half written":
        _write_half(arrive)
    elif place == "after renaming":
        replace = os.replace

        def renamed(source: Any, target: Any) -> None:
            replace(source, target)
            arrive(source)

        os.replace = renamed  # type: ignore[assignment]
    else:
        module, name, path_of = before[place]
        usual = getattr(module, name)

        def stopped(what: Any, *more: Any, **named: Any) -> Any:
            if place == "while removing" and count == passed:  # one file is gone already
                for file in sorted(Path(what).glob("*.safetensors"))[:1]:  # none where nothing was written yet
                    file.unlink()
            arrive(path_of(what))
            return usual(what, *more, **named)

        setattr(module, name, stopped)


def _write_half(arrive: Callable[[Any], None]) -> None:
    create = FileSystem.create_stream

    @contextmanager
    def create_stream(self: FileSystem, path: Any, mode: str) -> Iterator[Any]:
        with create(self, path, mode) as stream:
            if "w" in mode:
                write = stream.write

                def half(content: bytes) -> int:
                    write(content[: len(content) // 2])
                    stream.flush()
                    arrive(path)
                    return len(content) // 2 + write(content[len(content) // 2 :])

                yield _Writer(stream, half)
            else:
                yield stream

    FileSystem.create_stream = create_stream  # type: ignore[method-assign,assignment]


class _Writer:
    """A stream that writes in its own way."""

    def __init__(self, stream: Any, write: Callable[[bytes], int]) -> None:
        self.stream, self.write = stream, write

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
