"""Which machine a file belongs to, and which commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from dtm_triton.measure import machine


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("AMD Instinct MI300X (gfx942)", "amd-instinct-mi300x-gfx942"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-r-xeon-r-cpu-2-20ghz"),
        ("../..", "unknown"),
        ("", "unknown"),
    ],
)
def test_slugs_are_file_names(name: str, expected: str) -> None:
    assert machine.slug(name) == expected


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_commit_is_dirty_only_when_code_changed(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    for name in ("code.py", "BENCHMARKS.md", "benchmarks/data/cpu.json"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("first")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    revision = git(tmp_path, "rev-parse", "HEAD")[:12]
    assert machine.commit(tmp_path) == revision
    for name in ("BENCHMARKS.md", "benchmarks/data/cpu.json"):
        (tmp_path / name).write_text("written by the benchmark")
    (tmp_path / "untracked.txt").write_text("a note")
    assert machine.commit(tmp_path) == revision
    (tmp_path / "code.py").write_text("changed")
    assert machine.commit(tmp_path) == f"{revision}-dirty"


def test_where_there_is_no_git_the_sources_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit(tmp_path) == "unknown"
    (tmp_path / "a.py").write_text("x = 1")
    first = machine.sources(tmp_path)
    (tmp_path / "a.py").write_text("x = 2")
    assert machine.sources(tmp_path) != first


def test_the_facts_are_text() -> None:
    facts = machine.describe(torch.device("cpu"))
    assert all(isinstance(value, str) and value for value in facts.values())
    assert {"slug", "kind", "device", "python", "torch", "triton", "date", "commit", "sources"} <= facts.keys()
