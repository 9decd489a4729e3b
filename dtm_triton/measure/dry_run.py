"""Without a GPU: rank candidates by what their machine code uses. A ranking is no measurement.

First come those with the least stack and the fewest spilling instructions in loops, then those of which the most warps
fit on a multiprocessor, then those with the fewest registers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

from torch import Tensor

from dtm_triton import backend, groups, losses
from dtm_triton.kernels import resources, tables
from dtm_triton.kernels.recording import Launch, identity, recording
from dtm_triton.measure.candidates import Fields, candidates
from dtm_triton.measure.trials import Subject


class Multiprocessor(NamedTuple):
    """What the programs on one multiprocessor share."""

    registers: int
    """In all, of 32 bits for one lane."""
    granule: int
    """A warp's registers are allocated in multiples of this."""
    warps: int
    shared: int
    lanes: int = 32


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(registers=65536, granule=256, warps=64, shared=164 * 1024),
    "sm_90": Multiprocessor(registers=65536, granule=256, warps=64, shared=228 * 1024),
    "sm_100": Multiprocessor(registers=65536, granule=256, warps=64, shared=228 * 1024),
    "gfx942": Multiprocessor(registers=4 * 512 * 64, granule=512, warps=32, shared=64 * 1024, lanes=64),
}
RESERVED = 1024
"""Bytes of shared memory that each program takes beside its own, on NVIDIA."""


@dataclass(frozen=True, kw_only=True)
class Ranked:
    """What the launches that depend on a candidate use: the worst of them."""

    fields: Fields
    stack: int = 0
    loop_spills: int = 0
    programs: int = 0
    """That fit on a multiprocessor."""
    warps: int = 0
    """Of those programs."""
    registers: int = 0
    shared: int = 0
    problem: str = ""

    @property
    def spills(self) -> tuple[bool, int, int]:
        """The less, the better."""
        return bool(self.problem), self.stack, self.loop_spills

    @property
    def order(self) -> tuple[Any, ...]:
        """What ranks."""
        return *self.spills, -self.warps, self.registers


def rank(
    subject: Subject, run: Callable[[], tuple[Tensor, ...]], target: str, report: Callable[[int, int, Ranked], None]
) -> list[Ranked]:
    """The defaults (as candidate {}) and all candidates that launch the same kernels, best first.

    One that launches other kernels cannot be compared this way, and is left out.
    """
    usual = launched(run, subject, {}, target)
    tried: list[tuple[Fields, list[Launch]]] = [({}, usual)]
    for fields in candidates(subject.op, subject.bucket, subject.default, target):
        launches = launched(run, subject, fields, target)
        if [launch.name for launch in launches] == [launch.name for launch in usual]:
            tried.append((fields, launches))
    depends = [
        any(identity(launches[place]) != identity(launch) for _, launches in tried)
        for place, launch in enumerate(usual)
    ]
    found = []
    compiled: dict[str, dict[str, int]] = {}
    for number, (fields, launches) in enumerate(tried, 1):
        chosen = [launch for launch, matters in zip(launches, depends, strict=True) if matters]
        found.append(_rank_one(fields, chosen, target, compiled))
        report(number, len(tried), found[-1])
    return sorted(found, key=lambda ranked: ranked.order)


def launched(run: Callable[[], object], subject: Subject, fields: Fields, target: str) -> list[Launch]:
    """The launches of a call under `fields`, on CPU tensors and without a GPU."""
    with tables.trial(target, subject.op, subject.bucket, fields), recording(target) as found, kernels_allowed():
        run()
    return found


@contextlib.contextmanager
def kernels_allowed() -> Iterator[None]:
    """Lets backend="triton" take CPU tensors where kernels are only recorded, and groups are whatever memory held."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(backend, "_reason", lambda device: None))
        for module in (groups, losses):
            stack.enter_context(mock.patch.object(module, "check_groups", lambda *_, **__: None))
        yield


def _rank_one(fields: Fields, launches: list[Launch], target: str, compiled: dict[str, dict[str, int]]) -> Ranked:
    try:
        for launch in launches:
            if identity(launch) not in compiled:
                compiled[identity(launch)] = resources.measure(launch, target)
    except Exception as error:  # compilers fail in many ways; one candidate must not end the ranking
        return Ranked(fields=fields, problem=f"{type(error).__name__}: {str(error).strip()[:120]}")
    figures = [compiled[identity(launch)] for launch in launches]
    counts = [launch.arguments["num_warps"] for launch in launches]
    programs = [resident(one, warps, target) for one, warps in zip(figures, counts, strict=True)]
    fewest = min(range(len(launches)), key=lambda i: programs[i] * counts[i])
    return Ranked(
        fields=fields,
        stack=sum(one["stack"] for one in figures),
        loop_spills=sum(one["loop_spills"] for one in figures),
        programs=programs[fewest],
        warps=programs[fewest] * counts[fewest],
        registers=max(one["registers"] for one in figures),
        shared=max(one["shared"] for one in figures),
    )


def resident(figures: dict[str, int], num_warps: int, target: str) -> int:
    """Programs that fit on one multiprocessor of `target` together.

    >>> resident({"registers": 128, "shared": 32768}, 8, "sm_90"), resident({"registers": 177, "shared": 0}, 8, "sm_90")
    (2, 1)
    """
    has = MULTIPROCESSORS[target]
    of_a_warp = -(-figures["registers"] * has.lanes // has.granule) * has.granule
    by_registers = has.registers // of_a_warp // num_warps if of_a_warp else has.warps // num_warps
    reserved = RESERVED if target.startswith("sm") else 0
    by_shared = has.shared // max(figures["shared"] + reserved, 1)
    return min(by_registers, by_shared, has.warps // num_warps, 32)
