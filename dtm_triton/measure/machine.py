"""Which machine, versions and commit a measurement belongs to."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from datetime import date
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where the package is used from one."""

WRITTEN = ("BENCHMARKS.md", "docs/planning.md", "benchmarks/data", "benchmarks/pictures")
"""What the benchmarks write themselves does not make a checkout dirty."""


def describe(device: torch.device) -> dict[str, str]:
    """The facts that are kept with the figures, all as text.

    >>> facts = describe(torch.device("cpu"))
    >>> facts["kind"], facts["torch"] == torch.__version__
    ('cpu', True)
    """
    facts = {
        "slug": slug(device_name(device)),
        "kind": "gpu" if device.type == "cuda" else "cpu",
        "device": device_name(device),
        "cpu": f"{cpu_name()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "date": date.today().isoformat(),
        "commit": commit(ROOT),
        "sources": sources(ROOT / "dtm_triton"),
    }
    if device.type == "cuda":
        facts |= {"cuda": torch.version.cuda or f"ROCm {torch.version.hip}", "driver": _driver_version()}
    return facts


def slug(name: str) -> str:
    """A file name for a machine.

    >>> slug("NVIDIA H200"), slug("AMD EPYC 7B13 (64-Core)")
    ('nvidia-h200', 'amd-epyc-7b13-64-core')
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """What the operating system calls the processor."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.M) if path.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine() or "unknown CPU"


def commit(root: Path) -> str:
    """The commit of the checkout at `root`, "-dirty" when files differ from it, or "unknown" where git cannot tell.

    >>> commit(Path("/"))
    'unknown'
    """
    revision = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if revision is None:
        return "unknown"
    ours = [f":(exclude){path}" for path in WRITTEN]
    changes = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", ".", *ours])
    return revision + ("-dirty" if changes else "")


def shown_commit(facts: dict[str, str]) -> str:
    """The commit for a reader; where git could not tell, the digest of the sources beside it.

    >>> shown_commit({"commit": "unknown", "sources": "ba9876543210"})
    'unknown (sources ba9876543210)'
    """
    known = facts["commit"]
    return known if known != "unknown" else f"unknown (sources {facts['sources']})"


def sources(package: Path) -> str:
    """A digest of the package's Python files and tables, which tells a version where there is no git.

    >>> sources(Path("no such folder"))
    'e3b0c44298fc'
    """
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("tuned/*.json")]):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def _driver_version() -> str:
    found = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return found.splitlines()[0] if found else "unknown"
