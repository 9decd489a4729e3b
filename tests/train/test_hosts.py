"""Two hosts under torchrun: one vanishes without a word, the other goes on alone; it comes back, and both finish.

Hosts are network namespaces. Where the machine allows none, DTM_NO_NAMESPACES=1 skips these tests; without it they
fail there, for nobody should believe that they ran.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dtm_triton.train.engine.checkpoint import load_plain, saved_steps
from dtm_triton.train.engine.logbook import read_metrics

ROOT = Path(__file__).parents[2]
ENDPOINT = "10.77.0.1:29400"
QUICK = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=3"
"""torchrun's patience, in seconds: 30 and 5 usually."""


class Hosts:
    """The two hosts of tests/two_hosts.py."""

    def __init__(self) -> None:
        words = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--kill-child", "--fork"]
        self.process = subprocess.Popen(
            [*words, sys.executable, str(ROOT / "tests" / "two_hosts.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.answer()

    def answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            _, problem = self.process.communicate()
            pytest.fail(f"no network namespaces here (DTM_NO_NAMESPACES=1 skips this test): {problem}")
        return json.loads(line)

    def do(self, what: str, **more: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": what, **more}) + "\n")
        self.process.stdin.flush()
        return self.answer()


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    if os.environ.get("DTM_NO_NAMESPACES") == "1":
        pytest.skip("DTM_NO_NAMESPACES=1: this machine allows no network namespaces")
    found = Hosts()
    yield found
    found.process.communicate()


def pretraining(folder: Path) -> list[str]:
    run = dict(folder=folder, epochs=10, batch_size=64, checkpoint_every=3, log_every=1, threads=1, timeout_minutes=0.2)
    options = [f"--run.{name.replace('_', '-')}={value}" for name, value in run.items()]
    options += ["--teacher.kind=pixels", "--loss.max-iterations=3", "--student.model-kwargs.depth=1"]
    return [str(ROOT / "train" / "pretrain.py"), "--recipe=demo", *options]


def torchrun(host: int, folder: Path) -> list[str]:
    rendezvous = f"{QUICK},is_host={int(host == 0)}"  # both have one name; a cluster's hosts are told apart by theirs
    words = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=test"]
    words += [f"--rdzv-endpoint={ENDPOINT}", f"--rdzv-conf={rendezvous}", f"--local-addr=10.77.0.{host + 1}"]
    return [sys.executable, "-m", "torch.distributed.run", *words, *pretraining(folder)]


def wait(condition: Callable[[], object], seconds: float, output: Path) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, output.read_text()[-6000:]
        time.sleep(0.05)


def test_a_host_vanishes_and_comes_back(hosts: Hosts, tmp_path: Path) -> None:
    folder, outputs = tmp_path / "run", [tmp_path / f"output-{host}.txt" for host in range(2)]
    for host in range(2):
        hosts.do("start", host=host, words=torchrun(host, folder), output=str(outputs[host]))

    def steps() -> int:
        return len(read_metrics(folder))

    wait(lambda: steps() >= 8, 120, outputs[0])
    hosts.do("vanish", host=1)
    before = steps()
    newest = load_plain(saved_steps(folder / "checkpoints")[0])
    assert newest["processes"] == 2 and newest["step"] >= 3
    wait(lambda: "processes: 2 -> 1" in outputs[0].read_text(), 120, outputs[0])
    wait(lambda: steps() > before + 2, 60, outputs[0])
    hosts.do("return")
    hosts.do("start", host=1, words=torchrun(1, folder), output=str(outputs[1]))
    wait(lambda: None not in hosts.do("codes").values(), 180, outputs[0])
    assert hosts.do("codes") == {"0": 0, "1": 0}, outputs[0].read_text()[-6000:]
    text = outputs[0].read_text() + outputs[1].read_text()
    begun = [int(step) for step in re.findall(r"goes on from step (\d+) of 220", text)]
    assert "processes: 1 -> 2" in text, text[-6000:]
    assert min(begun) >= newest["step"], "nobody began anew"
    rows = [row["step"] for row in read_metrics(folder) if "loss" in row]
    assert rows == list(range(1, 221)) and (folder / "finished.json").is_file()
