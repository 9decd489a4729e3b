"""Two hosts made of network namespaces with one cable between them: nothing else is shared but the file system.

Run with `unshare --user --map-root-user --net --mount`; commands come as JSON lines on the standard input, one answer
each:
    {"do": "start", "host": 0, "words": [...], "output": PATH}     starts a command on a host
    {"do": "vanish", "host": 1}                                    the cable is cut, then all its processes are killed
    {"do": "return"}                                               the cable is there again
    {"do": "codes"}                                                exit codes by host, null for what still runs
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

ADDRESSES = ("10.77.0.1", "10.77.0.2")
NAMES = ("first", "second")
CABLE = "cable"  # the interface's name on both hosts


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def build() -> None:
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)  # where `ip` keeps its names
    for name in NAMES:
        ip("netns", "add", name)
    ip("-n", NAMES[0], "link", "add", CABLE, "type", "veth", "peer", "name", CABLE, "netns", NAMES[1])
    for name, address in zip(NAMES, ADDRESSES, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
        for device in ("lo", CABLE):
            ip("-n", name, "link", "set", device, "up")


def start(host: int, words: list[str], output: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": CABLE, "PYTHONUNBUFFERED": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or torchrun lets no host join a run that goes on
    return subprocess.Popen(
        ["ip", "netns", "exec", NAMES[host], *words],
        stdout=open(output, "ab"),
        stderr=subprocess.STDOUT,
        env=environment,
    )


def vanish(host: int) -> None:
    """Nobody is told: the cable goes first, so that no farewell of a dying process gets through."""
    ip("-n", NAMES[host], "link", "set", CABLE, "down")
    found = subprocess.run(["ip", "netns", "pids", NAMES[host]], capture_output=True, text=True, check=True)
    for process in map(int, found.stdout.split()):
        os.kill(process, signal.SIGKILL)


def main() -> None:
    build()
    running: dict[int, subprocess.Popen[bytes]] = {}
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command: dict[str, Any] = json.loads(line)
        answer: Any = "done"
        if command["do"] == "start":
            running[command["host"]] = start(command["host"], command["words"], command["output"])
        elif command["do"] == "vanish":
            vanish(command["host"])
            running.pop(command["host"]).wait()
        elif command["do"] == "return":
            ip("-n", NAMES[1], "link", "set", CABLE, "up")
        else:
            answer = {host: process.poll() for host, process in running.items()}
        print(json.dumps(answer), flush=True)
    for host, process in running.items():
        if process.poll() is None:
            vanish(host)


if __name__ == "__main__":
    main()
