"""Matching beside the student: streams wait for each other in the right order, and the CPU's results do not change."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dtm_triton.train.engine.beside import Beside


class Stream:
    """A stream that notes what it is told."""

    device = torch.device("cuda:0")

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    noted: list[str] = []
    main = Stream("main", noted)

    @contextmanager
    def within(stream: Stream) -> Any:
        noted.append(f"enter {stream.name}")
        yield
        noted.append(f"leave {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", noted))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", within)
    return noted


def test_streams_wait_for_each_other(log: list[str]) -> None:
    beside, device = Beside(), torch.device("cuda:0")
    result = [SimpleNamespace(record_stream=lambda stream: log.append(f"kept for {stream.name}"))]

    def work() -> Any:
        log.append("work")
        return result

    started = beside.start(work, device)
    log.append("student")
    assert beside.join(started, device) is result
    assert log == [
        "side waits for main",
        "enter side",
        "work",
        "leave side",
        "student",
        "main waits for side",
        "kept for main",
    ]


def test_on_a_cpu_there_is_no_stream(log: list[str]) -> None:
    beside, device = Beside(), torch.device("cpu")
    assert beside.join(beside.start(lambda: [torch.ones(1)], device), device)[0] == 1
    assert log == []
